"""How does a merged checkpoint become a folder that a device runs, and that proves what it is?"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from edgeft.data.dataset import TextTokenizer
from edgeft.documents import saving, sha256_file, shipped_folder, staging, versions
from edgeft.errors import BadInput, DoesNotFit, EdgeftError, MissingExtra, ParityFailed
from edgeft.exporting.adapters import AdapterSource, Written, add_adapters
from edgeft.exporting.bundle import (
    MANIFEST,
    README,
    SBOM,
    Bundle,
    BundledAdapter,
    BundledFile,
    Environment,
    Golden,
    GoldenInput,
    Measured,
    Measurement,
    PromptFormat,
    failed_path,
    measurement_path,
    readme,
)
from edgeft.exporting.sbom import Component, bill_of_materials
from edgeft.machines import meter
from edgeft.machines.environment import cpu_model, cpuinfo
from edgeft.machines.limits import reset_resident_peak, resident_bytes
from edgeft.models.metrics import Metrics, Promotion, Proof, Repair
from edgeft.models.spec import read_model_spec
from edgeft.targets.footprint import choose_context, predict
from edgeft.targets.matrices import Weights
from edgeft.targets.runner import RUNNER, runner_module
from edgeft.targets.runtimes import Runtime, runtime_of
from edgeft.targets.target import Target
from edgeft.units import show_bytes

if TYPE_CHECKING:
    from edgeft.targets.codes import Codes

SIMPLIFY = "simplify chat_template.jinja, or export plain prompts"
GOLDEN_TOKENS = 16  # greedy tokens kept per golden vector
GOLDEN_LOGITS = 8  # largest first logits kept per golden vector


Logits = numpy.ndarray[Any, numpy.dtype[numpy.float32]]


class ArtifactModel:
    """A bundle in its own runtime, token ids in and logits out: what the parity ladder compares.

    An ONNX graph gives logits after the last token of a pass alone. Here it runs with every position's: the same
    weights and operators, one Gather less.
    """

    def __init__(self, bundle: Path) -> None:
        from edgeft.targets.onnx_file import MODEL
        from edgeft.targets.ort import every_position

        runner, folder = runner_module(), Path(bundle)
        self.folder = folder
        try:
            graph = every_position(folder) if (folder / MODEL).is_file() else None
        except Exception:  # a damaged file: the runtime says so better
            graph = None
        try:
            self._runner = runner.Runner(folder, graph)
        except runner.MissingRuntime as problem:
            raise _missing(problem) from None
        except runner.RunError as problem:
            raise BadInput(bundle, str(problem)) from None
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
        step = runner_module().PREFILL_TOKENS
        last: Any = None
        for start in range(0, len(ids), step):
            last = session.append(ids[start : start + step])
        return numpy.asarray(last, dtype=numpy.float32)

    def _append(self, session: Any, ids: list[int]) -> Logits:
        """Logits after each of some tokens, in passes of a bounded length."""
        step = runner_module().PREFILL_TOKENS
        parts = [session.append(ids[start : start + step], every=True) for start in range(0, len(ids), step)]
        return numpy.concatenate([numpy.asarray(part, dtype=numpy.float32) for part in parts])

    def greedy(self, ids: list[int], max_new_tokens: int, eos_ids: Sequence[int]) -> list[int]:
        """The likeliest continuation, cut before its first end token, as `evaluate.greedy` gives it."""
        try:
            return list(self._runner.greedy(list(ids), max_new_tokens, eos_ids))
        except runner_module().RunError as problem:
            raise BadInput("artifact", str(problem)) from None


def _load_shipped(folder: Path) -> Any:
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


def need_runtime(target: Target) -> None:
    """Nothing. Raises MissingExtra (exit 5) now rather than after a long build, where a package is not installed."""
    runtime = runtime_of(target)
    if runtime.other_interpreter:
        from edgeft.targets.portable_onnx import interpreter

        interpreter()
    if importlib.util.find_spec(runtime.module) is None:
        problem = f"is not installed, and target {target.name} runs in it"
        raise MissingExtra(runtime.packages[0], problem, f"pip install {runtime.install}")


def build_bundle(
    merged: Path,
    target: Target,
    out: Path,
    *,
    prompts: Sequence[GoldenInput],
    prompt_format: PromptFormat = "plain",
    system: str | None = None,
    device_memory_bytes: int | None = None,
    device_bandwidth_bytes_per_second: float | None = None,
    input_sha256: str = "",
    provenance: dict[str, str] | None = None,
    prove: Callable[[ArtifactModel], Proof] | None = None,
    measure: bool = True,
    predicted_peak_bytes: int | None = None,
    sources: Sequence[Component] = (),
    adapters: Sequence[AdapterSource] = (),
    promotion: Promotion | None = None,
    repair: Repair | None = None,
    keep_failed: bool = False,
    size_budget_bytes: int | None = None,
    rows: Mapping[str, Metrics] | None = None,
    codes: Callable[[Path], Codes] | None = None,
) -> Bundle:
    """The bundle of a standard checkpoint folder, written to `out` as a whole or not at all.

    `sources` are what it was made from, for the bill of materials. What is measured goes beside the folder: the same
    inputs give the same bundle, byte for byte. `adapters` go beside the model, each with golden vectors of its own;
    `rows` are each row's results, which `prove` has put there, and which go beside the folder as well.
    `codes` makes those of a calibrated target in a folder of its own. With `keep_failed` a bundle whose proof fails
    lies in `failed_path(out)` afterwards, its manifest says why; one that passes removes it.

    Raises BadInput (an architecture that the runtime's builder does not know, no tokenizer), DoesNotFit,
    ParityFailed (the runtime tokenizes or templates a prompt differently) and MissingExtra.
    """
    start = time.perf_counter()
    runtime = runtime_of(target)
    if adapters and not runtime.switches_adapters:
        problem = f"runs in {target.runtime}, which edgeft cannot give several adapters to switch between"
        raise BadInput(f"target {target.name}", problem, "choose an ort- target, or export each merged model by itself")
    if (codes is None) == (target.calibration != "none"):
        problem = f"has calibration {target.calibration!r}: it is built with calibrated codes, and no other target is"
        raise BadInput(
            f"target {target.name}", problem, "export a merged checkpoint, whose training data it is made with"
        )
    need_runtime(target)
    backend: Any = importlib.import_module(f"edgeft.targets.{runtime.builder}")
    spec = read_model_spec(str(merged))
    tokenizer = TextTokenizer(merged)
    if prompt_format == "chat" and tokenizer.template_text is None:
        raise BadInput(merged, "there is no chat template", "export with prompt_format 'plain'")
    with staging(out) as folder:
        reset_resident_peak()
        waiting = resident_bytes()
        scratch = folder / ".codes"
        chosen = () if codes is None else (_made(codes, scratch),)
        builder = backend.build_model(merged, target, spec, folder, *chosen)
        shutil.rmtree(scratch, ignore_errors=True)
        inputs, written = add_adapters(folder, spec, adapters) if adapters else ({}, {})
        with saving(out):
            shutil.copyfile(shipped_folder("export") / RUNNER, folder / RUNNER)
            names = [source.name for source in adapters]
            (folder / README).write_text(readme(target, prompt_format, system, names), encoding="utf-8")
        weights = _with_adapters(backend.read_weights(folder), written)
        context_tokens, limited_by = choose_context(spec, target, weights, device_memory_bytes)
        stop_ids = tokenizer.stop_ids
        backend.write_limits(folder, context_tokens, stop_ids)
        files = hash_files(folder)
        hashes = {name: file.sha256 for name, file in files.items()}
        with saving(out):
            (folder / SBOM).write_text(bill_of_materials(hashes, sources, target), encoding="utf-8")
        files = hash_files(folder)
        bundle = Bundle(
            input_sha256=input_sha256,
            versions=versions(),
            target=target,
            prompt_format=prompt_format,
            system=system,
            prefix_ids=tokenizer.prefix_ids,
            stop_ids=stop_ids,
            context_tokens=context_tokens,
            context_limited_by=limited_by,
            golden_logit_tolerance=target.golden_logit_tolerance,
            environment=environment(runtime),
            weight_bytes_per_token=weights.bytes_per_token,
            size_bytes=sum(file.size_bytes for file in files.values()),
            files=files,
            golden=[],
            provenance=provenance or {},
            promotion=promotion,
            repair=repair,
            predicted=predict(
                spec, target, weights, context_tokens, device_memory_bytes, device_bandwidth_bytes_per_second
            ),
        )
        bundle.write(folder / MANIFEST)
        _within(size_budget_bytes, bundle.size_bytes, target)  # before it is proven: that takes longer
        golden = _record(_load_shipped(folder), tokenizer, prompts)
        bundle = bundle.model_copy(update={"golden": golden, "adapter_inputs": inputs})
        bundle.write(folder / MANIFEST)
        bundle = bundle.model_copy(update={"adapters": _prove_adapters(folder, bundle, adapters, written)})
        bundle.write(folder / MANIFEST)
        if prove is not None:
            try:
                bundle = bundle.model_copy(update={"proof": prove(ArtifactModel(folder))})
            except ParityFailed as problem:
                if keep_failed:
                    _keep_failed(folder, bundle, problem, failed_path(out.resolve()))
                raise
            bundle.write(folder / MANIFEST)
        _within(size_budget_bytes, bundle.size_bytes + (folder / MANIFEST).stat().st_size, target)
        peak = max(waiting + builder, resident_bytes(highest=True)) or None
        measured = _measure(folder) if measure else None
    path = measurement_path(out.resolve())
    with saving(path):
        path.unlink(missing_ok=True)  # of the bundle that was here before
        if keep_failed and (failed_path(out.resolve()) / MANIFEST).is_file():
            shutil.rmtree(failed_path(out.resolve()))
    if measured is not None:
        here = predict(spec, target, weights, measured.prompt_tokens + measured.new_tokens)
        Measurement(
            input_sha256=sha256_file(out / MANIFEST),
            versions=versions(),
            measured=measured,
            rows=dict(rows or {}),
            predicted_here_bytes=here.memory_bytes,
            predicted_peak_bytes=predicted_peak_bytes,
            measured_peak_bytes=peak,
            seconds=time.perf_counter() - start,
        ).write(path)
    return Bundle.read(out / MANIFEST)


def _keep_failed(folder: Path, bundle: Bundle, problem: ParityFailed, place: Path) -> None:
    """Move a bundle that failed its proof to `place`, its manifest saying so. Raises BadInput for somebody's folder."""
    if place.exists() and not (place / MANIFEST).is_file():
        raise BadInput(place, f"exists and holds no {MANIFEST}: it will not be replaced", "give another --out")
    bundle.model_copy(update={"failed": f"{problem.where}: {problem.problem}"}).write(folder / MANIFEST)
    with saving(place):
        shutil.rmtree(place, ignore_errors=True)
        folder.replace(place)


def environment(runtime: Runtime) -> Environment:
    """Where golden vectors are recorded: another processor or runtime may round otherwise."""
    flags = cpuinfo("flags", "Features").split()
    features = sorted(flag for flag in flags if flag.startswith(runner_module().FEATURES))
    found = versions(runtime.packages)
    runtimes = " ".join(f"{name} {found.get(name, '')}".strip() for name in runtime.packages)
    return Environment(cpu=cpu_model(), features=features, runtime=runtimes)


def _made(codes: Callable[[Path], Codes], scratch: Path) -> Codes:
    """Calibrated codes in a new folder; the model that they were made with is given back before the builder starts."""
    with saving(scratch):
        scratch.mkdir()
        made = codes(scratch)
    gc.collect()
    meter.give_back()
    return made


def _with_adapters(weights: Weights, written: Mapping[str, Written]) -> Weights:
    """All adapters may be loaded at a time; a token reads those of one."""
    sizes = [sum(4 * rows * columns for rows, columns in each.parameters.values()) for each in written.values()]
    if not sizes:
        return weights
    return Weights(weights.stored_bytes + sum(sizes), weights.head_bytes, weights.bytes_per_token + max(sizes))


def _prove_adapters(
    folder: Path, bundle: Bundle, sources: Sequence[AdapterSource], written: Mapping[str, Written]
) -> dict[str, BundledAdapter]:
    """What each adapter answers and how near that is to what was trained, all of them by one loaded model."""
    entries: dict[str, BundledAdapter] = {}
    if not sources:
        return entries
    for source in sources:
        file, rank, parameters = written[source.name]
        entries[source.name] = BundledAdapter(
            file=file,
            base_sha256=source.base_sha256,
            train_sha256=source.train_sha256,
            rank=rank,
            prompt_format=source.prompt_format,
            system=source.system,
            parameters=parameters,
            golden=[],
        )
    bundle.model_copy(update={"adapters": entries}).write(folder / MANIFEST)  # for the runner's check of the contract
    shipped = _load_shipped(folder)
    for source in sources:
        shipped.use(source.name)
        golden = _record(shipped, source.tokenizer, source.prompts)
        entries[source.name] = entries[source.name].model_copy(update={"golden": golden})
    del shipped  # its memory, before the proofs
    model = ArtifactModel(folder)
    for source in sources:
        model.use(source.name)
        proof = source.prove(model) if source.prove else None
        entries[source.name] = entries[source.name].model_copy(update={"proof": proof})
    return entries


def _within(size_budget_bytes: int | None, size_bytes: int, target: Target) -> None:
    """Nothing. Raises DoesNotFit (exit 3) for a bundle larger than it may be: then none is written."""
    if size_budget_bytes is not None and size_bytes > size_budget_bytes:
        problem = (
            f"the bundle for {target.name} is {show_bytes(size_bytes)}, the budget {show_bytes(size_budget_bytes)}"
        )
        raise DoesNotFit("--size-budget", problem, "give more room, or fewer tensors 8 bits")


def hash_files(folder: Path) -> dict[str, BundledFile]:
    """Every file of a bundle but its manifest."""
    return {
        path.relative_to(folder).as_posix(): BundledFile(sha256=sha256_file(path), size_bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _record(model: Any, tokenizer: TextTokenizer, prompts: Sequence[GoldenInput]) -> list[Golden]:
    """Golden vectors, made by the artifact. Raises ParityFailed if text or ids are not what training used."""
    made = []
    for prompt in prompts:
        plain = prompt.messages is None
        text = prompt.text or ""
        if prompt.messages is not None:
            text = tokenizer.render(prompt.messages, add_generation_prompt=True)
        expected = (tokenizer.prefix_ids if plain else []) + tokenizer.encode([text])[0]
        dated = "strftime" in (tokenizer.template_text or "")
        if prompt.messages is not None and not dated and (given := _rendered(model, prompt.messages)) != text:
            problem = f"the runtime renders {given!r}, training used {text!r}"
            raise ParityFailed("chat template", problem, SIMPLIFY)
        ids = model.encode(text, plain=plain)
        if ids != expected:
            problem = f"the runtime encodes {text!r:.200} as {ids[:20]}, training used {expected[:20]}"
            raise ParityFailed("tokenizer", problem, "the runtime does not know this kind of tokenizer.json")
        steps, margins, first = _continue(model, ids)
        top = numpy.argsort(-first, kind="stable")[:GOLDEN_LOGITS]
        made.append(
            Golden(
                messages=None if dated else prompt.messages,
                text=text,
                plain=plain,
                ids=ids,
                greedy_ids=steps,
                margins=margins,
                top_ids=[int(token) for token in top],
                top_logits=[float(first[token]) for token in top],
            )
        )
    return made


def _continue(model: Any, ids: list[int]) -> tuple[list[int], list[float], Logits]:
    """(greedy tokens, by how much each led the next best, logits after the prompt), by one cache."""
    count = min(GOLDEN_TOKENS, model.context_tokens - len(ids))
    model.fit(ids, 0)
    session = model.engine.start(len(ids) + max(0, count))
    step = runner_module().PREFILL_TOKENS
    for start in range(0, len(ids), step):
        last = session.append(ids[start : start + step])
    first = last = numpy.array(last, dtype=numpy.float32)
    steps: list[int] = []
    margins: list[float] = []
    while len(steps) < count:
        second, best = numpy.sort(last)[-2:]
        steps.append(int(last.argmax()))
        margins.append(float(best - second))
        if len(steps) < count:
            last = numpy.asarray(session.append(steps[-1:]), dtype=numpy.float32)
    return steps, margins, first


def _rendered(model: Any, messages: list[dict[str, Any]]) -> str:
    """What the runtime makes of a chat. Raises ParityFailed where it cannot read the template at all."""
    try:
        return str(model.render(messages))
    except runner_module().RunError as problem:
        why = next((line for line in str(problem).splitlines() if line.strip()), "")
        raise ParityFailed("chat template", f"the runtime cannot render it: {why}", SIMPLIFY) from None


def _measure(folder: Path) -> Measured:
    """run.py --bench in a process of its own, so that its peak memory is the runner's."""
    command = [sys.executable, "-P", str(folder / RUNNER), "--bench", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise EdgeftError(folder / RUNNER, f"--bench failed (exit {done.returncode}): {lines[-1]}")
    return Measured.model_validate_json(done.stdout)
