"""How does a bundle answer here, in its own runtime, where every position's logits are wanted?"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from edgeft.errors import BadInput, MissingExtra
from edgeft.machines import meter
from edgeft.machines.runner import runner_module

Logits = numpy.ndarray[Any, numpy.dtype[numpy.float32]]


class ArtifactModel:
    """A bundle in its own runtime, token ids in and logits out: what the parity ladder compares.

    It is loaded when it is first asked for something: what is compared with it is done and gone by then. An ONNX graph
    gives logits after the last token of a pass alone. Here it runs with every position's: the same weights and
    operators, one Gather less.
    """

    def __init__(self, bundle: Path, *, full_cache: bool = False, adapter: str | None = None) -> None:
        """`full_cache`: keys and values are kept as the runtime does by itself, not in the bundle's 8 bits.

        `adapter` is one of the bundle's, to answer with. Raises BadInput for a folder that is no bundle.
        """
        self.folder, self.full_cache, self.adapter = Path(bundle), full_cache, adapter
        self._searches: dict[tuple[int, ...], Any] = {}
        try:
            runner_module().read_manifest(self.folder)
        except runner_module().RunError as problem:
            raise BadInput(bundle, str(problem)) from None

    @functools.cached_property
    def _runner(self) -> Any:
        """run.py's Runner. Raises MissingExtra and BadInput."""
        from edgeft.targets.onnx_file import MODEL
        from edgeft.targets.ort import every_position

        runner = runner_module()
        try:
            graph = every_position(self.folder, self.full_cache) if (self.folder / MODEL).is_file() else None
        except Exception:  # a damaged file: the runtime says so better
            graph = None
        try:
            found = runner.Runner(self.folder, graph)
            found.keep_tokens = 1  # what a row has in common with the last one is not read again
            found.use(self.adapter)
        except runner.MissingRuntime as problem:
            raise _missing(problem) from None
        except runner.RunError as problem:
            raise BadInput(self.folder, str(problem)) from None
        if self.full_cache:
            found.engine.kv_bits = None
        meter.give_back()  # what loading took, once
        return found

    def close(self) -> None:
        """Let go of the runtime; the next question loads it again."""
        self._searches.clear()
        self.__dict__.pop("_runner", None)
        meter.give_back()

    @property
    def context_tokens(self) -> int:
        """The longest text it reads."""
        return int(self._runner.context_tokens)

    def use(self, adapter: str | None) -> None:
        """Answer with this adapter of the bundle from now on (None: without). Raises BadInput."""
        self._searches.clear()
        with _as_bad_input():
            self._runner.use(adapter)

    def logits(self, ids: list[int], first: int = 0) -> Logits:
        """Logits after each token from `first` on: (len(ids) - first, vocabulary). Raises BadInput beyond the context.

        What comes before `first` is read without them.
        """
        return numpy.concatenate(list(self.each_pass(ids, first)))

    def each_pass(self, ids: list[int], first: int = 0) -> Iterator[Logits]:
        """Logits after each token of a row from `first` on, a pass at a time. Raises BadInput beyond the context."""
        with _as_bad_input():
            self._runner.fit(list(ids), 0)
            if first:
                # with the grammar that its answer was held to: the prompt is there then, and logits are given unmasked
                with self._runner.cache(len(ids), self._runner.grammar) as cache:
                    cache.read(list(ids[:first]))
                    yield from _each(cache, ids[first:])
            else:
                yield from _each(self._runner.engine.start(len(ids)), ids)

    def follow(
        self, ids: list[int], first: int, prompt_tokens: int, max_new_tokens: int, stop_ids: Sequence[int],
        take: Callable[[Logits], None], hopeless: Callable[[list[int]], bool] = lambda made: False,
    ) -> list[int]:  # fmt: skip
        """The greedy answer to a row's prompt; `take` gets logits after each token of the row but its last.

        From `first` on, some at a time. The prompt is read once: as long as decoding gives the row's own tokens, its
        logits are theirs. Where it leaves them it is forgotten to there, and the rest of the row is read. Decoding ends
        before a stop id, and where `hopeless` says so.
        """
        most = min(max_new_tokens, max(0, self.context_tokens - prompt_tokens))
        with _as_bad_input():
            self._runner.fit(list(ids), 0)
            with self._runner.cache(max(len(ids), prompt_tokens + most)) as cache:
                answer, done = self._decode(cache, ids, first, prompt_tokens, most, stop_ids, take, hopeless)
                left = list(ids[done:-1])
                try:
                    cache.rewind(done)
                except (runner_module().RunError, RuntimeError):  # this kind of model cannot forget
                    cache = runner_module().Cache(self._runner.engine, len(ids))
                    cache.read(list(ids[:done]))
                for rows in _each(cache, left):
                    take(rows)
        return answer

    def _decode(
        self, cache: Any, ids: list[int], first: int, prompt_tokens: int, most: int, stop_ids: Sequence[int],
        take: Callable[[Logits], None], hopeless: Callable[[list[int]], bool],
    ) -> tuple[list[int], int]:  # fmt: skip
        """(the greedy answer of `follow`, how many tokens of the row it has gone along)."""
        prompt = list(ids[:prompt_tokens])
        if first < prompt_tokens - 1:  # an earlier answer is trained too
            cache.read(prompt[:first]) if first else cache.rewind(0)
            for rows in _each(cache, prompt[first:]):
                take(rows)
            last = rows[-1]
        else:
            last = numpy.array(cache.read(prompt), dtype=numpy.float32)
            take(last[None])
        answer: list[int] = []
        followed = 0
        while len(answer) < most and (token := int(last.argmax())) not in stop_ids:
            answer.append(token)
            follows = followed == len(answer) - 1 and prompt_tokens + followed < len(ids) - 1
            follows = follows and token == ids[prompt_tokens + followed]
            if (not follows and hopeless(answer)) or len(answer) == most:
                break
            last = numpy.array(cache.append([token]), dtype=numpy.float32)
            if follows:
                take(last[None])
                followed += 1
        return answer, prompt_tokens + followed

    def _read(self, session: Any, ids: list[int]) -> Logits:
        """Logits after the last of some tokens, in passes of a bounded length."""
        last: Any = None
        for part in runner_module().passes(ids):
            last = session.append(part)
        return numpy.array(last, dtype=numpy.float32)

    def choose(self, ids: list[int], enough: Callable[[Any], bool] | None = None) -> Any:
        """run.py's search for the best of the bundle's labels, ended as soon as it is decided or `enough` says so.

        One that has gone so far for this prompt is not made again.
        """
        enough, found = enough or runner_module().LabelSearch.decided, self._searches.get(tuple(ids))
        if found is None or (found.open and not enough(found)):
            with _as_bad_input():
                found = self._searches[tuple(ids)] = self._runner.choose(list(ids), enough)
        return found

    def write(self, ids: list[int], most: int) -> list[int] | None:
        """The answer that the bundle's grammar allows, without its end; None where that is not within `most` tokens."""
        try:
            return list(self._runner.write(list(ids), most))
        except runner_module().RunError:
            return None

    def with_full_cache(self) -> ArtifactModel:
        """The same bundle, its keys and values as its runtime keeps them by itself."""
        return ArtifactModel(self.folder, full_cache=True)

    def cached(self, ids: list[int], layers: int) -> list[tuple[Any, Any]]:
        """What ONNX Runtime GenAI keeps of some tokens, by layer: keys and values (heads, tokens, head_dim).

        Raises BadInput beyond the context.
        """
        with _as_bad_input():
            self._runner.fit(list(ids), 0)
        session = self._runner.engine.start(len(ids))
        self._read(session, list(ids))
        kept = session.generator.get_output
        sides = ((kept(f"present.{layer}.{side}")[0] for side in ("key", "value")) for layer in range(layers))
        return [(keys, values) for keys, values in sides]

    def answer(self, ids: list[int], most: int, *, guess: bool) -> list[int]:
        """The greedy answer, its tokens guessed several at a time or one by one."""
        with _as_bad_input():
            self._runner.guess = guess
            return list(self._runner.stream(list(ids), most))

    def greedy(self, ids: list[int], max_new_tokens: int, eos_ids: Sequence[int]) -> list[int]:
        """The likeliest continuation, cut before its first end token, as `evaluate.greedy` gives it."""
        with _as_bad_input():
            return list(self._runner.greedy(list(ids), max_new_tokens, eos_ids))


def _each(session: Any, ids: Sequence[int]) -> Iterator[Logits]:
    """Logits after each of some more tokens, a pass at a time."""
    for part in runner_module().passes(list(ids)):
        yield numpy.asarray(session.append(part, every=True), dtype=numpy.float32)


@contextlib.contextmanager
def _as_bad_input() -> Iterator[None]:
    """What run.py refuses, as an error of edgeft's."""
    try:
        yield
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
