"""How does a merged checkpoint, or a base with adapters, become a proven bundle: built, compared, scored, written?"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.data.dataset import Sample, TextTokenizer, read_samples
from edgeft.data.sources import names
from edgeft.documents import sha256_file
from edgeft.errors import BadInput, QualityLost
from edgeft.exporting.adapters import AdapterSource, check_switched, factors
from edgeft.exporting.answers import Answers
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.build import build_bundle
from edgeft.exporting.bundle import MANIFEST, Bundle, Kept, PromptFormat, adapters_digest
from edgeft.exporting.form import Form, first
from edgeft.exporting.golden import golden_inputs, shared_system
from edgeft.exporting.guesses import measured, note
from edgeft.exporting.kv_rung import CacheRows, cache_rows
from edgeft.exporting.kv_scales import finder
from edgeft.exporting.label_calibration import calibrated
from edgeft.exporting.outputs import load_tuned, observe_artifact, observe_model
from edgeft.exporting.parity import HINTS, Known, Ladder, compare, exact_match_problem
from edgeft.exporting.portable_adapters import inputs_of
from edgeft.exporting.proof_rows import ProofRows
from edgeft.exporting.room import check_room, loader
from edgeft.exporting.sbom import BASE, Component, model_licence
from edgeft.machines import meter
from edgeft.memory import stages
from edgeft.memory.export_time import reads_all
from edgeft.memory.stages import PARITY_PROMPTS
from edgeft.merging.ancestors import ancestors_of, provenance_of
from edgeft.merging.merge import check_trained, verify_merged
from edgeft.merging.merged_tensors import merged_rung
from edgeft.merging.result import MergedCheckpoint
from edgeft.models.checkpoint import local_folder
from edgeft.models.identity import DATA
from edgeft.models.metrics import Metrics, Promotion, Proof, Repair, Rung, pair
from edgeft.planning.plan import Plan
from edgeft.planning.stage_checks import target_device
from edgeft.progress import Progress
from edgeft.settings.tuners import TUNERS
from edgeft.targets.target import Target
from edgeft.training.job_data import Data
from edgeft.training.result import TrainResult

if TYPE_CHECKING:
    from edgeft.targets.codes import Codes


@dataclass(frozen=True)
class Chosen:
    """What is known of a target that was chosen by simulation: all that was considered, promotions, codes, forms.

    `climbed` are the rungs below the bundle, the same for every target: found once, then left there for the next one.
    """

    repair: Repair
    promotion: Promotion | None = None
    codes: Codes | None = None
    known: Known | None = None
    climbed: list[Rung] = field(default_factory=list)


def export(
    merged_folder: Path, target: Target, out: Path, *, device: str | None, progress: Progress,
    chosen: Chosen | None = None, size_budget_bytes: int | None = None, train: Path | None = None,
    calibration: str | None = None, keep_failed: bool = False,
) -> Bundle:  # fmt: skip
    """Build, prove and write the bundle of a merged checkpoint; `device` names the profile it must fit.

    `train` is the folder that was merged, where merged.json does not find it. Codes are chosen on rows of the file
    `calibration`, or of the training data. With `keep_failed` a bundle that fails lies beside `out` (build_bundle).

    Raises ParityFailed (exit 4), and then writes no `out`, when the artifact is not the model that was trained, of it
    QualityLost when rounding alone is to blame; DoesNotFit when the device, this machine or its disk has no room;
    BadInput for an unknown device or a missing merge.
    """
    merged, trained = verify_merged(merged_folder, train)
    profile = target_device(device)
    plan = merged.train.plan
    has_codes = chosen is not None and chosen.codes is not None
    expected_bytes = check_room(plan, target, out, computed=chosen is not None, calibrate=not has_codes)
    data = Data.read(plan, train=False)
    tokenizer = TextTokenizer(merged_folder)
    rows = ProofRows.of(data, plan)
    kept, clocked = Kept(), list[float | None]()

    def tuning() -> list[Sample]:
        return calibration_samples(merged_folder, plan, calibration, stages.CALIBRATION_ROWS)

    def prove(artifact: ArtifactModel) -> Proof:
        context = Bundle.read(artifact.folder / MANIFEST).context_tokens
        cache = cache_rows(target, tuning, plan.spec, rows.every, context)
        return prove_bundle(trained, merged_folder, merged, target, rows, artifact, progress, cache, chosen, kept)

    progress("build", 0, 1, {})
    golden, chat = golden_inputs(plan.job, tokenizer)
    notes = {"calibration": f"{target.calibration}, {rows_of(calibration)}"} if target.calibration != "none" else {}
    notes |= {"cache scales from": rows_of(calibration)} if target.has_cache_scales else {}
    bundle = build_bundle(
        merged_folder, target, out, prompts=golden, prompt_format="chat" if chat else "plain",
        system=shared_system(plan.job, golden, tokenizer),
        device_memory_bytes=profile.budget_bytes if profile else None,
        device_bandwidth_bytes_per_second=profile.bandwidth_gb_per_second * 1e9 if profile else None,
        input_sha256=sha256_file(merged_folder / "merged.json"),
        provenance={
            "merged.json": sha256_file(merged_folder / "merged.json"), "train.json": merged.input_sha256,
            "plan.json": merged.train.input_sha256, **merged.train.inputs, "device": profile.name if profile else "",
        } | provenance_of(merged.ancestors) | notes,
        prove=prove, predicted_peak_bytes=expected_bytes, sources=made_from(merged.train, merged_folder),
        promotion=chosen.promotion if chosen else None, repair=chosen.repair if chosen else None,
        keep_failed=keep_failed, size_budget_bytes=size_budget_bytes, kept=kept,
        codes=_codes(merged_folder, target, tuning, chosen, progress),
        scales=finder(merged_folder, target, tuning, plan.spec, progress), held_to=plan.held_to,
        judge=_judging(plan, rows, tokenizer, clocked, progress), progress=progress,
    )  # fmt: skip
    note(out, clocked)
    return bundle


def _judging(
    plan: Plan, rows: ProofRows, tokenizer: TextTokenizer, clocked: list[float | None], progress: Progress
) -> Callable[[ArtifactModel, Bundle], Bundle]:
    """What adds to a proven bundle what its answers show on rows; how many times faster guesses were into `clocked`."""

    def judge(artifact: ArtifactModel, made: Bundle) -> Bundle:
        test, answers = rows.every[len(rows.trained) :], made.answers
        if isinstance(answers, Answers):
            answers = calibrated(artifact, answers, plan.labels, rows.trained, test, tokenizer, progress)
            return made.model_copy(update={"answers": answers})
        guesses, faster = measured(artifact, rows.trained, progress) if answers is None else (None, None)
        clocked.append(faster)
        return made.model_copy(update={"guesses": guesses})

    return judge


def prove_bundle(
    trained: Path, merged_folder: Path, merged: MergedCheckpoint, target: Target, rows: ProofRows,
    artifact: ArtifactModel, progress: Progress, cache: CacheRows | None = None, chosen: Chosen | None = None,
    kept: Kept | None = None,
) -> Proof:  # fmt: skip
    """The proof of a merged checkpoint's bundle; each row's own results go into `kept`. Raises ParityFailed."""
    tokenizer = TextTokenizer(merged_folder)
    plan = merged.train.plan
    every = reads_all(plan.stages.export)
    ladder = Ladder(target, tokenizer, progress, load=loader(plan), held_to=plan.held_to, every_row=every)
    climbed = chosen.climbed if chosen else []
    if not climbed:
        ladder.climb_training(trained, merged.train, rows.trained)
        ladder.add(merged_rung(local_folder(plan.job.model), trained, merged_folder, plan.training, merged.shares))
        climbed += ladder.rungs
    else:
        ladder.go_on(climbed, merged.train)
    known = chosen.known if chosen else None
    made = ladder.climb_artifact(
        merged_folder, artifact.folder, artifact, rows.every, tied=plan.spec.tie_word_embeddings,
        answers=rows.scored, gate=len(rows.trained), cache=cache, known=known, write=rows.write(plan),
    )  # fmt: skip
    scores = _scores_of_training(merged.train, rows.source == "test")
    for name, form in zip(("merged", target.name), made, strict=True):
        scores[name] = rows.metrics(form, tokenizer, plan)
    if kept is not None:
        kept.scores.update(scores)
        kept.answers += made[1].answers(rows.shown(plan))
    if problem := exact_match_problem(*made, target.parity, rows.scored):
        lost = QualityLost(
            f"parity ladder, exact match of the artifact on {rows.source} rows", problem, HINTS["artifact"]
        )
        lost.rows = rows.source
        raise lost
    return make_proof(ladder, scores, rows.source, made[0])


def make_proof(ladder: Ladder, scores: Mapping[str, Metrics], source: str, form: Form) -> Proof:
    """What a bundle keeps of a ladder: each row's own results lie beside it."""
    names = list(scores)
    steps = [*itertools.pairwise(names), (names[0], names[-1])] if len(names) > 2 else list(itertools.pairwise(names))
    pairs = (pair(before, scores[before], after, scores[after]) for before, after in steps)
    return Proof(
        prompts=min(PARITY_PROMPTS, len(form.losses)),
        positions=len(form.log_probabilities),
        rungs=tuple(ladder.rungs),
        scored_on=source,
        scores={name: found.marked for name, found in scores.items()},
        pairs=tuple(found for found in pairs if found is not None),
        gain_nats=ladder.gain.nats if ladder.gain.shown else None,
    )


def rows_of(calibration: str | None) -> str:
    """Which rows codes are chosen on, for the manifest: a file by its content, no path of this machine."""
    if calibration is None:
        return "the first training rows"
    path = Path(calibration)
    return f"{path.name}, sha256 {sha256_file(path)[:12]}" if path.is_file() else calibration


def calibration_samples(merged_folder: Path, plan: Plan, calibration: str | None, rows: int) -> list[Sample]:
    """The first samples with something to train on, of the file or else of the training data."""
    if calibration is None:
        return Data.read(plan).train[:rows]
    found = read_samples(calibration, TextTokenizer(merged_folder), plan.training.max_length, rows)
    return [sample for sample in found if sample.trained_tokens]


def _codes(
    merged_folder: Path, target: Target, tuning: Callable[[], list[Sample]], chosen: Chosen | None, progress: Progress
) -> Callable[[Path], Codes] | None:
    """What makes the codes of a calibrated target, or has them already; None for any other target."""
    if target.calibration == "none":
        return None

    def make(folder: Path) -> Codes:
        from edgeft.exporting.calibrate import calibrate

        if chosen is not None and chosen.codes is not None:
            return chosen.codes
        return calibrate(merged_folder, target, tuning(), folder, progress)

    return make


def made_from(result: TrainResult, folder: Path) -> list[Component]:
    """What a model was made from: base model and data by name and hash, never a path or content."""
    job = result.plan.job
    licence = model_licence(Path(job.model)) or model_licence(folder)
    name = Path(job.model).resolve().name if Path(job.model).is_dir() else job.model
    found = [Component("machine-learning-model", name, BASE, weights_sha256=result.base_sha256, licence=licence)]
    for role, source in zip(DATA, (job.data, job.valid, job.test), strict=True):
        if source is not None:
            digest = result.inputs.get(role, "")  # none of a hub dataset
            found.append(Component("data", names(source) if digest else source, role, sha256=digest))
    return found


def _scores_of_training(result: TrainResult, test: bool) -> dict[str, Metrics]:
    base, tuned = (result.base_test, result.test) if test else (result.base_valid, result.valid)
    return {name: scores for name, scores in (("base", base), ("fine-tuned", tuned)) if scores is not None}


def export_adapters(
    trained: Mapping[str, Path], target: Target, out: Path, *, device: str | None, progress: Progress
) -> Bundle:
    """Build, prove and write one bundle of a base model and its adapters or prefixes, by the names they get in it.

    Raises BadInput (full fine-tunes, adapters of different bases, a base that is no longer what they were trained on),
    ParityFailed if base or an adapter is not in the runtime what it was in training: then nothing is written.
    """
    results = {name: TrainResult.read(folder / "train.json") for name, folder in trained.items()}
    first, result = next(iter(results.items()))
    base = local_folder(result.plan.job.model)
    _same_base(trained, results)
    for name, folder in trained.items():
        check_trained(folder, results[name])
    if 8 in (target.kv_bits, *(each.plan.job.kv_bits for each in results.values())):
        problem = "keeps keys and values in 8 bits: its scales fit one model, not each of several adapters"
        raise BadInput(f"target {target.name}", problem, "leave kv_bits out, or export each merged model by itself")
    profile = target_device(device)
    sources = [adapter_source(name, trained[name], results[name], base, target, progress) for name in trained]
    rows = Data.read(result.plan, train=False).valid[:PARITY_PROMPTS]
    tokenizer = TextTokenizer(base)

    def prove(artifact: ArtifactModel) -> Proof:
        ladder = Ladder(target, tokenizer, progress, load=loader(result.plan))
        tied = result.plan.spec.tie_word_embeddings
        form, _ = ladder.climb_artifact(base, artifact.folder, artifact, rows, tied=tied)
        return make_proof(ladder, {}, "validation", form)

    progress("build", 0, 1, {})
    digests = {name: source.train_sha256 for name, source in zip(trained, sources, strict=True)}
    components = {component: None for each in results.values() for component in made_from(each, base)}
    return build_bundle(
        base,
        target,
        out,
        prompts=sources[0].prompts,
        prompt_format=sources[0].prompt_format,
        system=sources[0].system,
        device_memory_bytes=profile.budget_bytes if profile else None,
        device_bandwidth_bytes_per_second=profile.bandwidth_gb_per_second * 1e9 if profile else None,
        input_sha256=adapters_digest(digests),
        provenance={"base weights": results[first].base_sha256, "device": profile.name if profile else ""}
        | {f"train.json of {name}": digest for name, digest in digests.items()}
        | provenance_of(ancestors_of(base)[0]),
        prove=prove,
        sources=list(components),
        adapters=sources,
    )


def _same_base(trained: Mapping[str, Path], results: Mapping[str, TrainResult]) -> None:
    if len({result.base_sha256 for result in results.values()}) > 1:
        lines = [f"{name} ({trained[name]}): trained on {result.base_sha256}" for name, result in results.items()]
        raise BadInput(
            "adapters", "were trained on different base weights\n" + "\n".join(lines), "give those of one base"
        )


def adapter_source(
    name: str, folder: Path, result: TrainResult, base: Path, target: Target, progress: Progress
) -> AdapterSource:
    """A training result as an adapter of a bundle, with what proves it. Raises BadInput as `check_switched`."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise BadInput("adapters", f"{name!r} is no name", "use small letters, digits, - and _: NAME=TRAIN")
    if held_to := result.plan.held_to:
        what = "labels" if isinstance(held_to, tuple) else "a grammar"
        hint = "merge it and export a bundle of its own, or train with --set answers=free"
        raise BadInput(folder, f"is held to {what}, which a bundle of adapters cannot switch between", hint)
    check_switched(folder, TUNERS[result.plan.training.tuner], target)
    tensors = None if result.plan.training.folds else inputs_of(folder, result, base)
    tokenizer = TextTokenizer(local_folder(result.plan.job.model))
    prompts, chat = golden_inputs(result.plan.job, tokenizer)
    data = Data.read(result.plan, train=False)
    rows = ProofRows.of(data, result.plan)

    def prove(artifact: ArtifactModel) -> Proof:
        ladder = Ladder(target, tokenizer, progress, load=loader(result.plan))
        ladder.climb_training(folder, result, rows.trained)
        count = len(rows.trained)
        progress(f"parity: {name}", 0, 1, {})
        form = observe_model(f"{name} as trained", load_tuned(folder, result, load=ladder.load), rows.trained)
        meter.give_back()
        made = observe_artifact(
            name, artifact, rows.every, tokenizer, answers=rows.scored, write=rows.write(result.plan)
        )
        ladder.add(compare(form, first(made, count), target.parity, ladder.gain))
        scores = _scores_of_training(result, bool(data.test))
        scores[target.name] = rows.metrics(made, tokenizer, result.plan)
        return make_proof(ladder, scores, rows.source, form)

    digest = sha256_file(folder / "train.json")
    form: PromptFormat = "chat" if chat else "plain"
    system = shared_system(result.plan.job, prompts, tokenizer)
    changes = factors(folder, base) if tensors is None else {}
    return AdapterSource(
        name, folder, changes, result.base_sha256, digest, form, prompts, tokenizer, prove, system, tensors
    )  # fmt: skip
