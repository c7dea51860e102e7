"""How does a merged checkpoint become a folder that a device runs, and that proves what it is?"""

from __future__ import annotations

import importlib
import importlib.util
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeft.data.dataset import TextTokenizer
from edgeft.data.grammar import Grammar, HeldTo
from edgeft.data.labels import FILE, labels_file
from edgeft.documents import saving, sha256_file, shipped_folder, staging, versions
from edgeft.errors import BadInput, DoesNotFit, EdgeftError, ParityFailed
from edgeft.exporting.adapters import AdapterSource, Written, add_adapters, check_switches
from edgeft.exporting.answers import Answers, HeldToGrammar
from edgeft.exporting.artifact import ArtifactModel, load_shipped
from edgeft.exporting.bundle import (
    MANIFEST,
    README,
    SBOM,
    Bundle,
    BundledAdapter,
    BundledFile,
    BundledPrefix,
    GoldenInput,
    Kept,
    Measured,
    Measurement,
    PromptFormat,
    failed_path,
    measurement_path,
    readme,
)
from edgeft.exporting.golden import environment, record
from edgeft.exporting.portable_adapters import add_inputs
from edgeft.exporting.sbom import Component, bill_of_materials
from edgeft.machines import meter
from edgeft.machines.extras import missing
from edgeft.machines.limits import reset_resident_peak, resident_bytes
from edgeft.machines.runner import RUNNER
from edgeft.models.headers import KV_PREFIX, Header, lies_beside
from edgeft.models.metrics import Promotion, Proof, Repair
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.progress import Progress, silent
from edgeft.targets.footprint import LimitedBy, choose_context, predict
from edgeft.targets.matrices import Weights
from edgeft.targets.runtimes import runtime_of
from edgeft.targets.target import Target, check_beside
from edgeft.units import show_bytes

if TYPE_CHECKING:
    from edgeft.targets.codes import Codes
    from edgeft.targets.kv_cache import CacheScales


def need_runtime(target: Target) -> None:
    """Nothing. Raises MissingExtra (exit 5) now rather than after a long build, where a package is not installed."""
    runtime = runtime_of(target)
    if runtime.other_interpreter:
        from edgeft.targets.portable_onnx import interpreter

        interpreter()
    if importlib.util.find_spec(runtime.module) is None:
        raise missing(runtime.packages[0], f"is not installed, and target {target.name} runs in it", runtime.part)


class Filled(NamedTuple):
    """What lies in a new bundle's folder before its manifest does."""

    weights: Weights
    context_tokens: int
    limited_by: LimitedBy
    builder_bytes: int  # the builder's own highest memory; 0: not told
    adapter_inputs: dict[str, list[int]]
    adapters: dict[str, Written]
    files: dict[str, BundledFile]
    found: dict[str, str]  # on rows, for the manifest: its sha256 by name
    prefix: BundledPrefix | None  # before every text

    @property
    def before(self) -> int:
        """Tokens of the prefix, or of the longest that it can be switched to."""
        return tokens_before(self.prefix, self.adapters)


def build_bundle(
    merged: Path, target: Target, out: Path, *, prompts: Sequence[GoldenInput], prompt_format: PromptFormat = "plain",
    system: str | None = None, device_memory_bytes: int | None = None,
    device_bandwidth_bytes_per_second: float | None = None, input_sha256: str = "",
    provenance: dict[str, str] | None = None, prove: Callable[[ArtifactModel], Proof] | None = None,
    measure: bool = True, predicted_peak_bytes: int | None = None, sources: Sequence[Component] = (),
    adapters: Sequence[AdapterSource] = (), promotion: Promotion | None = None, repair: Repair | None = None,
    keep_failed: bool = False, size_budget_bytes: int | None = None, kept: Kept | None = None,
    codes: Callable[[Path], Codes] | None = None, scales: Callable[[Codes | None], CacheScales] | None = None,
    held_to: HeldTo = (), judge: Callable[[ArtifactModel, Bundle], Bundle] | None = None, progress: Progress = silent,
) -> Bundle:  # fmt: skip
    """The bundle of a standard checkpoint folder, written to `out` as a whole or not at all.

    `sources` are what it was made from, for the bill of materials. What is measured goes beside the folder: the same
    inputs give the same bundle, byte for byte. `adapters` go beside the model, each with golden vectors of its own;
    `kept` has each row's results, which `prove` has put there, and which go beside the folder as well.
    Answers are held to labels or a grammar; `judge` adds what the proven bundle's answers show on rows.
    `codes` makes those of a calibrated target in a folder of its own, `scales` those of a KV cache of 8 bits. With
    `keep_failed` a bundle that fails its proof lies in `failed_path(out)`, and says why; one that passes removes it.

    Raises BadInput (an unknown architecture, no tokenizer), DoesNotFit, ParityFailed (other ids), MissingExtra.
    """
    start = time.perf_counter()
    _check_target(target, adapted=bool(adapters), coded=codes is not None, scaled=scales is not None)
    check_beside([target], beside=lies_beside(merged) is not None)
    spec, tokenizer = read_model_spec(str(merged)), TextTokenizer(merged)
    _check_template(merged, tokenizer, prompt_format)
    device = device_memory_bytes, device_bandwidth_bytes_per_second
    failed = failed_path(out.resolve()) if keep_failed else None
    with staging(out) as folder:
        reset_resident_peak()
        waiting = resident_bytes()
        page = readme(target, prompt_format, system, [source.name for source in adapters], held_to, prompts)
        with saving(out):
            answers = _hold(folder, held_to)
        filled = _fill(
            folder, out, merged, target, spec, tokenizer, codes, scales, adapters, page, device_memory_bytes,
            lambda hashes: bill_of_materials(hashes, sources, target, held_to),
        )  # fmt: skip
        bundle = Bundle(
            input_sha256=input_sha256, versions=versions(), target=target, prompt_format=prompt_format, system=system,
            prefix_ids=tokenizer.prefix_ids, stop_ids=tokenizer.stop_ids, context_tokens=filled.context_tokens,
            context_limited_by=filled.limited_by, golden_logit_tolerance=target.golden_logit_tolerance,
            environment=environment(runtime_of(target)), weight_bytes_per_token=filled.weights.bytes_per_token,
            size_bytes=sum(file.size_bytes for file in filled.files.values()), files=filled.files, golden=[],
            answers=answers, kv_prefix=filled.prefix,
            provenance=(provenance or {}) | filled.found, promotion=promotion, repair=repair,
            predicted=predict(spec, target, filled.weights, filled.context_tokens, *device, before=filled.before),
        )  # fmt: skip
        bundle.write(folder / MANIFEST)
        _within(size_budget_bytes, bundle.size_bytes, target)  # before it is proven: that takes longer
        bundle = _proven(folder, bundle, filled, tokenizer, prompts, adapters, prove, judge, failed, progress)
        _within(size_budget_bytes, bundle.size_bytes + (folder / MANIFEST).stat().st_size, target)
        measured, peak = _measure(folder, waiting + filled.builder_bytes, progress) if measure else (None, 0)
    _forget(measurement_path(out.resolve()), failed)
    if measured is not None:
        _write_measurement(
            out, measured, spec, target, filled, kept or Kept(), predicted_peak_bytes, peak or None, start
        )
    return Bundle.read(out / MANIFEST)


def _write_measurement(
    out: Path, measured: Measured, spec: ModelSpec, target: Target, filled: Filled, kept: Kept,
    predicted_peak_bytes: int | None, measured_peak_bytes: int | None, started: float,
) -> None:  # fmt: skip
    """Beside a bundle: what running it took here, what that was to take, and what its export took."""
    here = predict(spec, target, filled.weights, measured.prompt_tokens + measured.new_tokens, before=filled.before)
    Measurement(
        input_sha256=sha256_file(out / MANIFEST), versions=versions(), measured=measured, rows=kept.scores,
        answers=tuple(kept.answers),
        predicted_here_bytes=here.memory_bytes, predicted_peak_bytes=predicted_peak_bytes,
        measured_peak_bytes=measured_peak_bytes, seconds=time.perf_counter() - started,
    ).write(measurement_path(out.resolve()))  # fmt: skip


def _hold(folder: Path, held_to: HeldTo) -> Answers | HeldToGrammar | None:
    """What the manifest says of answers that are held to something, after writing it into the folder."""
    if isinstance(held_to, Grammar):
        (folder / held_to.file).write_text(held_to.text, encoding="utf-8")
        return HeldToGrammar(form=held_to.form, file=held_to.file, source=held_to.source)
    if not held_to:
        return None
    (folder / FILE).write_text(labels_file(held_to), encoding="utf-8")
    return Answers(file=FILE, labels=len(held_to))


def _check_target(target: Target, *, adapted: bool, coded: bool, scaled: bool) -> None:
    """Nothing. Raises BadInput for what a target cannot hold, MissingExtra where its runtime is not here."""
    if adapted:
        check_switches(target)
    if coded != (target.calibration != "none"):
        problem = f"has calibration {target.calibration!r}: it is built with calibrated codes, and no other target is"
        raise BadInput(
            f"target {target.name}", problem, "export a merged checkpoint, whose training data it is made with"
        )
    if scaled != target.has_cache_scales:
        problem = f"has {'a' if target.has_cache_scales else 'no'} KV cache whose scales are found on training rows"
        raise BadInput(f"target {target.name}", problem, "export a merged checkpoint, or with --set kv_bits=32")
    need_runtime(target)


def _check_template(merged: Path, tokenizer: TextTokenizer, prompt_format: PromptFormat) -> None:
    """Raise BadInput for chats without a template."""
    if prompt_format == "chat" and tokenizer.template_text is None:
        raise BadInput(merged, "there is no chat template", "export with prompt_format 'plain'")


def _fill(
    folder: Path, out: Path, merged: Path, target: Target, spec: ModelSpec, tokenizer: TextTokenizer,
    codes: Callable[[Path], Codes] | None, scales: Callable[[Codes | None], CacheScales] | None,
    adapters: Sequence[AdapterSource], page: str, device_memory_bytes: int | None,
    bill: Callable[[Mapping[str, str]], str],
) -> Filled:  # fmt: skip
    """Everything in the folder but its manifest: the runtime's files, adapters, runner, `page`, the bill of materials.

    `out` is where the folder will lie, and what a failed write is said of.
    """
    backend: Any = importlib.import_module(f"edgeft.targets.{runtime_of(target).builder}")
    scratch = folder / ".codes"
    chosen: dict[str, Any] = {} if codes is None else {"codes": _made(codes, scratch)}
    found = {}
    if scales is not None:
        chosen["scales"] = kept = scales(chosen.get("codes"))
        found["cache scales"] = kept.sha256
        meter.give_back()
    builder_bytes = backend.build_model(merged, target, spec, folder, **chosen)
    shutil.rmtree(scratch, ignore_errors=True)
    put = add_inputs if runtime_of(target).switches == "inputs" else add_adapters
    inputs, written = put(folder, spec, adapters) if adapters else ({}, {})
    with saving(out):
        prefix = _bring_prefix(merged, folder)
        shutil.copyfile(shipped_folder("export") / RUNNER, folder / RUNNER)
        (folder / README).write_text(page, encoding="utf-8")
    weights = with_adapters(backend.read_weights(folder), written)
    before = tokens_before(prefix, written)
    context_tokens, limited_by = choose_context(spec, target, weights, device_memory_bytes, before)
    backend.write_limits(folder, context_tokens, tokenizer.stop_ids)
    hashes = {name: file.sha256 for name, file in hash_files(folder).items()}
    with saving(out):
        (folder / SBOM).write_text(bill(hashes), encoding="utf-8")
    hashed = hash_files(folder)
    return Filled(weights, context_tokens, limited_by, builder_bytes, inputs, written, hashed, found, prefix)


def _bring_prefix(merged: Path, folder: Path) -> BundledPrefix | None:
    """What lies before every text, after copying its file into the bundle; nothing where nothing does."""
    if not (merged / KV_PREFIX).is_file():
        return None
    shutil.copyfile(merged / KV_PREFIX, folder / KV_PREFIX)
    header = Header(merged / KV_PREFIX)
    return BundledPrefix(file=KV_PREFIX, tokens=header.shape(next(iter(header.entries)))[2])


def _proven(
    folder: Path, bundle: Bundle, filled: Filled, tokenizer: TextTokenizer, prompts: Sequence[GoldenInput],
    adapters: Sequence[AdapterSource], prove: Callable[[ArtifactModel], Proof] | None,
    judge: Callable[[ArtifactModel, Bundle], Bundle] | None, failed: Path | None, progress: Progress,
) -> Bundle:  # fmt: skip
    """The bundle with golden vectors, adapters and proof, each in its manifest before the next reads it.

    Raises ParityFailed; with `failed` the bundle lies there then.
    """
    progress("golden", 0, 1, {})
    golden = record(load_shipped(folder), tokenizer, prompts)
    meter.give_back()
    bundle = bundle.model_copy(update={"golden": golden, "adapter_inputs": filled.adapter_inputs})
    bundle.write(folder / MANIFEST)
    bundle = bundle.model_copy(update={"adapters": prove_adapters(folder, bundle, adapters, filled.adapters)})
    bundle.write(folder / MANIFEST)
    if prove is None:
        return bundle
    try:
        bundle = bundle.model_copy(update={"proof": prove(artifact := ArtifactModel(folder))})
    except ParityFailed as problem:
        if failed is not None:
            _keep_failed(folder, bundle, problem, failed)
        raise
    if judge is not None:
        bundle = judge(artifact, bundle)
    bundle.write(folder / MANIFEST)
    return bundle


def _forget(measurement: Path, failed: Path | None) -> None:
    """Remove what an earlier bundle left beside this one: its measurement, and a failed one where those are kept."""
    with saving(measurement):
        measurement.unlink(missing_ok=True)
        if failed is not None and (failed / MANIFEST).is_file():
            shutil.rmtree(failed)


def _keep_failed(folder: Path, bundle: Bundle, problem: ParityFailed, place: Path) -> None:
    """Move a bundle that failed its proof to `place`, its manifest saying so. Raises BadInput for somebody's folder."""
    if place.exists() and not (place / MANIFEST).is_file():
        raise BadInput(place, f"exists and holds no {MANIFEST}: it will not be replaced", "give another --out")
    bundle.model_copy(update={"failed": f"{problem.where}: {problem.problem}"}).write(folder / MANIFEST)
    with saving(place):
        shutil.rmtree(place, ignore_errors=True)
        folder.replace(place)


def _made(codes: Callable[[Path], Codes], scratch: Path) -> Codes:
    """Calibrated codes in a new folder; the model that they were made with is given back before the builder starts."""
    with saving(scratch):
        scratch.mkdir()
        made = codes(scratch)
    meter.give_back()
    return made


def tokens_before(prefix: BundledPrefix | None, written: Mapping[str, Written]) -> int:
    """The most tokens that may lie before a text."""
    return max([prefix.tokens if prefix else 0, *(each.tokens for each in written.values())])


def with_adapters(weights: Weights, written: Mapping[str, Written]) -> Weights:
    """All adapters may be loaded at a time; a token reads those of one."""
    sizes = [sum(4 * math.prod(shape) for shape in each.parameters.values()) for each in written.values()]
    if not sizes:
        return weights
    return Weights(weights.stored_bytes + sum(sizes), weights.head_bytes, weights.bytes_per_token + max(sizes))


def prove_adapters(
    folder: Path, bundle: Bundle, sources: Sequence[AdapterSource], written: Mapping[str, Written]
) -> dict[str, BundledAdapter]:
    """What each adapter answers and how near that is to what was trained, all of them by one loaded model."""
    entries: dict[str, BundledAdapter] = {}
    if not sources:
        return entries
    for source in sources:
        file, rank, parameters, tokens = written[source.name]
        entries[source.name] = BundledAdapter(
            file=file,
            base_sha256=source.base_sha256,
            train_sha256=source.train_sha256,
            rank=rank,
            kv_prefix=BundledPrefix(file=file, tokens=tokens) if tokens else None,
            prompt_format=source.prompt_format,
            system=source.system,
            parameters=parameters,
            golden=[],
        )
    bundle.model_copy(update={"adapters": entries}).write(folder / MANIFEST)  # for the runner's check of the contract
    shipped = load_shipped(folder)
    for source in sources:
        shipped.use(source.name)
        golden = record(shipped, source.tokenizer, source.prompts)
        entries[source.name] = entries[source.name].model_copy(update={"golden": golden})
    del shipped
    for source in sources:
        meter.give_back()  # its proof begins with models in torch
        proof = source.prove(ArtifactModel(folder, adapter=source.name)) if source.prove else None
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


def _measure(folder: Path, building_bytes: int, progress: Progress = silent) -> tuple[Measured, int]:
    """run.py --bench in a process of its own, so that its peak is the runner's; what the export took at most.

    That is of the builder beside this process, of the proof, or of this process beside the one that measures; 0 where
    no /proc tells.
    """
    progress("measure", 0, 1, {})
    highest = max(building_bytes, resident_bytes(highest=True))
    meter.give_back()  # of the proof
    waiting = resident_bytes()
    command = [sys.executable, "-P", str(folder / RUNNER), "--bench", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise EdgeftError(folder / RUNNER, f"--bench failed (exit {done.returncode}): {lines[-1]}")
    measured = Measured.model_validate_json(done.stdout)
    return measured, max(highest, waiting + measured.peak_memory_bytes) if highest else 0
