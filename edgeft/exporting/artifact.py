"""How does a bundle answer here, in its own runtime, where every position's logits are wanted?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from edgeft.errors import BadInput, MissingExtra
from edgeft.targets.runner import runner_module

Logits = numpy.ndarray[Any, numpy.dtype[numpy.float32]]


class ArtifactModel:
    """A bundle in its own runtime, token ids in and logits out: what the parity ladder compares.

    An ONNX graph gives logits after the last token of a pass alone. Here it runs with every position's: the same
    weights and operators, one Gather less.
    """

    def __init__(self, bundle: Path, *, full_cache: bool = False) -> None:
        """`full_cache`: keys and values are kept as the runtime does by itself, not in the bundle's 8 bits."""
        from edgeft.targets.onnx_file import MODEL
        from edgeft.targets.ort import every_position

        runner, folder = runner_module(), Path(bundle)
        self.folder = folder
        try:
            graph = every_position(folder, full_cache) if (folder / MODEL).is_file() else None
        except Exception:  # a damaged file: the runtime says so better
            graph = None
        try:
            self._runner = runner.Runner(folder, graph)
        except runner.MissingRuntime as problem:
            raise _missing(problem) from None
        except runner.RunError as problem:
            raise BadInput(bundle, str(problem)) from None
        if full_cache:
            self._runner.engine.kv_bits = None
        self.context_tokens: int = self._runner.context_tokens
        self.stop_ids: list[int] = list(self._runner.eos_ids)

    def use(self, adapter: str | None) -> None:
        """Answer with this adapter of the bundle from now on (None: without). Raises BadInput."""
        try:
            self._runner.use(adapter)
        except runner_module().RunError as problem:
            raise BadInput("artifact", str(problem)) from None

    def logits(self, ids: list[int], first: int = 0) -> Logits:
        """Logits after each token from `first` on: (len(ids) - first, vocabulary). Raises BadInput beyond the context.

        What comes before `first` is read without them.
        """
        try:
            self._runner.fit(list(ids), 0)
            session = self._runner.engine.start(len(ids))
            self._read(session, list(ids[:first]))
            return self._append(session, list(ids[first:]))
        except runner_module().RunError as problem:
            raise BadInput("artifact", str(problem)) from None

    def follow(
        self, ids: list[int], first: int, prompt_tokens: int, max_new_tokens: int, stop_ids: Sequence[int],
        hopeless: Callable[[list[int]], bool] = lambda made: False,
    ) -> tuple[Logits, list[int]]:  # fmt: skip
        """(logits after each token of a row but its last, from `first` on; the greedy answer to its prompt).

        The prompt is read once: as long as decoding gives the row's own tokens, its logits are theirs. Where it leaves
        them the rest of the row is read by itself. Decoding ends before a stop id, and where `hopeless` says so.
        """
        runner, prompt, room = self._runner, list(ids[:prompt_tokens]), max(0, self.context_tokens - prompt_tokens)
        try:
            runner.fit(list(ids), 0)
            session = runner.engine.start(min(self.context_tokens, max(len(ids), prompt_tokens + max_new_tokens)))
            if first < prompt_tokens - 1:  # an earlier answer is trained too
                self._read(session, prompt[:first])
                rows = list(self._append(session, prompt[first:]))
            else:
                rows = [self._read(session, prompt)]
            answer: list[int] = []
            last, followed = rows[-1], 0
            most = min(max_new_tokens, room)
            while len(answer) < most and (token := int(last.argmax())) not in stop_ids:
                answer.append(token)
                follows = followed == len(answer) - 1 and prompt_tokens + followed < len(ids) - 1
                follows = follows and token == ids[prompt_tokens + followed]
                if (not follows and hopeless(answer)) or len(answer) == most:
                    break
                last = numpy.asarray(session.append([token]), dtype=numpy.float32)
                if follows:
                    rows.append(last)
                    followed += 1
            done = prompt_tokens + followed
            if done < len(ids) - 1:
                rows += list(self.logits(ids[:-1], done))
            return numpy.stack(rows), answer
        except runner_module().RunError as problem:
            raise BadInput("artifact", str(problem)) from None

    def _read(self, session: Any, ids: list[int]) -> Logits:
        """Logits after the last of some tokens, in passes of a bounded length."""
        last: Any = None
        for part in runner_module().passes(ids):
            last = session.append(part)
        return numpy.asarray(last, dtype=numpy.float32)

    def _append(self, session: Any, ids: list[int]) -> Logits:
        """Logits after each of some tokens, in passes of a bounded length."""
        parts = [session.append(part, every=True) for part in runner_module().passes(ids)]
        return numpy.concatenate([numpy.asarray(part, dtype=numpy.float32) for part in parts])

    def choose(self, ids: list[int], enough: Callable[[Any], bool] | None = None) -> Any:
        """run.py's search for the best of the bundle's labels, ended as soon as it is decided or `enough` says so."""
        runner = runner_module()
        try:
            return self._runner.choose(list(ids), enough or runner.LabelSearch.decided)
        except runner.RunError as problem:
            raise BadInput("artifact", str(problem)) from None

    def write(self, ids: list[int], most: int) -> list[int] | None:
        """The answer that the bundle's grammar allows, without its end; None where that is not within `most` tokens."""
        try:
            return list(self._runner.write(list(ids), most))
        except runner_module().RunError:
            return None

    def with_full_cache(self) -> ArtifactModel:
        """The same bundle, its keys and values as its runtime keeps them by itself."""
        return ArtifactModel(self.folder, full_cache=True)

    def each_pass(self, ids: list[int]) -> Iterator[Logits]:
        """Logits after each token of a row, a pass at a time. Raises BadInput beyond the context."""
        self._fit(ids)
        session = self._runner.engine.start(len(ids))
        for part in runner_module().passes(list(ids)):
            yield numpy.asarray(session.append(part, every=True), dtype=numpy.float32)

    def _fit(self, ids: list[int]) -> None:
        try:
            self._runner.fit(list(ids), 0)
        except runner_module().RunError as problem:
            raise BadInput("artifact", str(problem)) from None

    def cached(self, ids: list[int], layers: int) -> list[tuple[Any, Any]]:
        """What ONNX Runtime GenAI keeps of some tokens, by layer: keys and values (heads, tokens, head_dim).

        Raises BadInput beyond the context.
        """
        self._fit(ids)
        session = self._runner.engine.start(len(ids))
        self._read(session, list(ids))
        kept = session.generator.get_output
        sides = ((kept(f"present.{layer}.{side}")[0] for side in ("key", "value")) for layer in range(layers))
        return [(keys, values) for keys, values in sides]

    def greedy(self, ids: list[int], max_new_tokens: int, eos_ids: Sequence[int]) -> list[int]:
        """The likeliest continuation, cut before its first end token, as `evaluate.greedy` gives it."""
        try:
            return list(self._runner.greedy(list(ids), max_new_tokens, eos_ids))
        except runner_module().RunError as problem:
            raise BadInput("artifact", str(problem)) from None


def load_shipped(folder: Path) -> Any:
    """The bundle as a device runs it, its own graph included: a Runner of run.py. Raises MissingExtra and BadInput."""
    runner = runner_module()
    try:
        return runner.Runner(folder)
    except runner.MissingRuntime as problem:
        raise _missing(problem) from None
    except runner.RunError as problem:
        raise BadInput(folder, str(problem)) from None


def _missing(problem: Exception) -> MissingExtra:
    text, _, hint = str(problem).partition("\n\nhint: ")
    package, _, what = text.partition(": ")
    return MissingExtra(package, what, hint)
