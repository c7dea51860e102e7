"""Would what this plan trains end in a bundle? Asked before the first step, in a process of its own, in seconds.

The model's first layers with a small random change go the whole way: merge, export, the target's own runtime, the
parity ladder and a few generated tokens. What the runtime's builder does not know, a tokenizer it reads in another way
or a template it renders differently then fails now, not after hours of training.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.documents import cache_folder, saving, sha256_json, unused, versions
from edgeft.errors import BadInput, EdgeftError, MissingExtra, ParityFailed, of_exit_code
from edgeft.machines import processes
from edgeft.machines.environment import cpuinfo
from edgeft.machines.limits import MALLOC_ENVIRONMENT, memory_limit, reset_resident_peak, resident_bytes
from edgeft.memory import disk, proof, stages
from edgeft.models.headers import local_folder
from edgeft.models.identity import data_inputs, model_inputs
from edgeft.models.metrics import Rung
from edgeft.planning.plan import Plan
from edgeft.planning.rows_read import DATA_BYTES
from edgeft.progress import silent
from edgeft.targets.target import Target, Tolerance, to_nearest
from edgeft.training.result import Failure, Rehearsal
from edgeft.units import show_bytes

if TYPE_CHECKING:
    from edgeft.data.dataset import Sample, TextTokenizer
    from edgeft.exporting.artifact import ArtifactModel
    from edgeft.models.metrics import Proof
    from edgeft.models.spec import ModelSpec
    from edgeft.settings.job import Training

FILE = "rehearsal.json"
PROMPTS = 4  # rows that are compared
# The random change: of an adapter's second factor; of one's beside the weights, which answers alone can miss; of a
# weight's own size.
ADAPTER_RMS, BESIDE_RMS, WEIGHT_SHARE = 1e-3, 0.1, 0.01
# How a few layers take 4-bit weights says nothing about the model: KL 0.0002 to 0.27 nats for three that were right.
# What can be told is whether the bundle computes what torch does with the same rounded weights: 1e-6 to 1.2e-3 measured
# where it does, 0.26 and 2.0 without rotary positions. Where torch has no form of the rounding, only nonsense is found.
ROUNDED_ALIKE = Tolerance(
    min_top1_agreement=0.0, max_mean_kl_nats=0.03, max_loss_increase_nats=0.5, max_exact_match_drop_points=100.0
)
LONGEST_ROW = 512  # tokens, that a KV cache of 8 bits is tried with
LEAST_SECONDS = 5.0  # that a rehearsal must have taken to be kept for the runs after it
# How fast and how long is trained, and what a training process holds: nothing that an excerpt of the model sees.
PACE = {
    "learning_rate", "lora_plus", "epochs", "max_steps", "steps", "warmup_fraction", "warmup_steps", "weight_decay",
    "max_grad_norm", "batch_size", "micro_batch_size", "eval_rows", "patience", "valid_steps", "checkpoint_steps",
    "checkpointing", "kept_layers", "malloc", "optimizer", "max_seconds", "test",
}  # fmt: skip
NO_NONSENSE = ROUNDED_ALIKE.model_copy(update={"max_mean_kl_nats": 1.0, "max_loss_increase_nats": 2.0})


def rehearse(plan: Plan, target: Target, work: Path, plan_sha256: str) -> Rehearsal:
    """The rehearsal of a plan, run unless `work` holds its record or checkpoints of the run already.

    Raises the error that the real stage would have raised later (exit 1, 4), saying which stage it was. What cannot be
    rehearsed here (no runtime, too little memory or disk, no few layers that stand for all) is skipped: `skipped`.
    """
    request = sha256_json([plan_sha256, target.model_dump(mode="json")])
    try:
        held = Rehearsal.read(work / FILE)
    except BadInput:
        held = None
    if held is not None and held.input_sha256 == request:
        return held.model_copy(update={"kept": True})
    same_plan = (work / "plan.sha256").is_file() and (work / "plan.sha256").read_text() == plan_sha256
    if same_plan and any(work.glob("step-*")):
        return Rehearsal(input_sha256=request, target=target.name, skipped="the run goes on from a checkpoint")
    place = cache_folder() / "rehearsals" / f"{sha256_json(key_of(plan, target))[:24]}.json"
    if (earlier := went_well(place)) is not None:
        return earlier.model_copy(update={"input_sha256": request, "earlier": str(place)})
    started = time.monotonic()
    with saving(work):
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=work) as scratch:
            made = _in_a_process(plan, target, Path(scratch))
    made = made.model_copy(update={"input_sha256": request, "seconds": round(time.monotonic() - started, 2)})
    if made.failure is not None:
        raise _as_error(made.failure, target)
    made.write(work / FILE)
    if made.rungs and made.seconds >= LEAST_SECONDS:
        with saving(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            for old in unused(place.parent, "*.json"):
                old.unlink(missing_ok=True)
            made.write(place)
    return made


def key_of(plan: Plan, target: Target) -> dict[str, Any]:
    """All that a rehearsal depends on: files, versions, the target, and every setting but those of the pace."""
    folder = local_folder(plan.job.model)
    said = plan.model_dump(mode="json", include={"job", "training", "labels", "grammar"})
    return {
        "base": model_inputs(folder, weights=True),
        "data": {role: digest for role, digest in data_inputs(plan.job).items() if role != "test data"},
        "job": {name: value for name, value in said["job"].items() if name not in PACE},
        "training": {name: value for name, value in said["training"].items() if name not in PACE},
        "answers": [said["labels"], said["grammar"]],
        "target": target.model_dump(mode="json"),
        "versions": versions(),
        "processor": [cpuinfo("model name"), cpuinfo("flags", "Features")],
    }


def went_well(place: Path) -> Rehearsal | None:
    """A rehearsal that an earlier run left there; None where there is none, or it is damaged."""
    try:
        kept = Rehearsal.read(place)
    except BadInput:
        return None
    if not kept.rungs or any(rung.problems for rung in kept.rungs):
        return None
    os.utime(place)
    return kept


def _in_a_process(plan: Plan, target: Target, scratch: Path) -> Rehearsal:
    """Run `main` and read what it wrote: what it holds and leaves in its heap does not count against training.

    This process imports meanwhile what training takes, and is counted as it is then.
    """
    (scratch / "target.json").write_text(target.model_dump_json(), encoding="utf-8")
    plan.write(scratch / "plan.json")
    code = "from edgeft.exporting.rehearsal import main; main()"
    waiting = max(resident_bytes(), stages.processes(plan.profile).training_bytes)
    done = processes.run(code, scratch, waiting, environment=MALLOC_ENVIRONMENT, meanwhile=_import_all)
    try:
        return Rehearsal.read(scratch / FILE)
    except BadInput:
        problem = "the process ended:\n" + processes.reason(done.returncode, done.stderr, 3)
        failure = Failure(where="its process", problem=problem, hint="", exit_code=1)
        return Rehearsal(target=target.name, failure=failure)


def _import_all() -> None:
    from edgeft.machines import meter

    meter.import_all()


def _as_error(failure: Failure, target: Target) -> EdgeftError:
    hint = f"{failure.hint}; " if failure.hint else ""
    hint += "name another target (edgeft train --target), or train all the same with --no-rehearsal"
    return of_exit_code(failure.exit_code, f"rehearsal for {target.name}: {failure.where}", failure.problem, hint)


def main() -> None:
    """`python -m edgeft.exporting.rehearsal FOLDER BYTES`: plan.json and target.json in, rehearsal.json out.

    BYTES is what the waiting process holds.
    """
    _import_all()
    scratch, waiting = Path(sys.argv[1]), int(sys.argv[2])
    plan = Plan.read(scratch / "plan.json")
    target = Target.model_validate_json((scratch / "target.json").read_bytes())
    try:
        made = go_through(plan, target, scratch, waiting)
    except EdgeftError as problem:

        def named(text: str) -> str:  # the excerpt's folders are gone when this is read
            for folder in ("base", "merged"):
                text = text.replace(str(scratch / folder), plan.job.model)
            return text

        failure = Failure(
            where=named(problem.where), problem=named(problem.problem), hint=problem.hint, exit_code=problem.exit_code
        )
        made = Rehearsal(target=target.name, failure=failure)
    made.write(scratch / FILE)


def go_through(plan: Plan, target: Target, scratch: Path, waiting_bytes: int = 0) -> Rehearsal:
    """Cut the plan's model, change it, merge, export and prove it, all in `scratch`. Raises as those stages do."""
    from edgeft.data.dataset import TextTokenizer, read_samples
    from edgeft.exporting.build import build_bundle, need_runtime
    from edgeft.exporting.golden import golden_inputs
    from edgeft.exporting.kv_scales import finder
    from edgeft.exporting.small_model import CannotCut, count_layers, cut
    from edgeft.merging.merge import merge
    from edgeft.models.checkpoint import local_folder

    def skip(reason: str) -> Rehearsal:
        return Rehearsal(target=target.name, skipped=reason)

    target = to_nearest(target)  # the graph, the kernels and the grids are the same
    folder = local_folder(plan.job.model)
    try:
        need_runtime(target)
        count = count_layers(folder)
    except MissingExtra as problem:
        return skip(f"{problem.where} is not installed here")
    except CannotCut as problem:
        return skip(problem.problem)
    spec = first_layers(plan.spec, count)
    training = plan.training.model_copy(update=layers_of_excerpt(plan.training, count))
    need = peak_bytes(plan, spec, training, target)
    if (reason := too_large(plan, spec, target, need, waiting_bytes, scratch)) is not None:
        return skip(reason)
    base, tuned, merged = (scratch / name for name in ("base", "train", "merged"))
    base.mkdir()
    cut(folder, base)
    tokenizer = TextTokenizer(base)
    source = plan.job.valid or plan.job.data
    if source is None:
        raise BadInput("plan", "was made without training data", "plan again with --data FILE (make: data=FILE)")
    rows = read_samples(source, tokenizer, plan.training.max_length, PROMPTS)
    prompts = [sample for sample in rows if sample.trained_tokens]
    if not prompts:
        return skip(f"the first {PROMPTS} rows of {source} have no token to train on within max_length")
    reset_resident_peak()
    change_at_random(base, training, tuned)
    made = merge(tuned, merged, wise_alpha=1.0, progress=silent, base=str(base))
    if not made.relative_change and not made.beside:
        raise ParityFailed("merge", "a change of every adapter left the base as it was", "report this model")
    golden, chat = golden_inputs(plan.job, tokenizer)
    rungs: list[Rung] = []

    def prove(artifact: ArtifactModel) -> Proof:
        return prove_excerpt(base, tuned, merged, training, artifact, prompts, tokenizer, target, rungs)

    bundle = build_bundle(
        merged, target, scratch / "bundle", prompts=golden, prompt_format="chat" if chat else "plain", prove=prove,
        measure=False, held_to=plan.held_to, scales=finder(merged, target, lambda: prompts, spec),
    )  # fmt: skip
    return Rehearsal(
        target=target.name, layers=count, rungs=tuple(rungs), predicted_peak_bytes=need,
        generated_tokens=sum(len(entry.greedy_ids) for entry in bundle.golden),
        measured_peak_bytes=resident_bytes(highest=True),
    )  # fmt: skip


def prove_excerpt(
    base: Path, tuned: Path, merged: Path, training: Training, artifact: ArtifactModel, prompts: list[Sample],
    tokenizer: TextTokenizer, target: Target, rungs: list[Rung],
) -> Proof:  # fmt: skip
    """The ladder of an excerpt, its rungs into `rungs` too. Raises ParityFailed naming the first that fails."""
    from edgeft.exporting.bundle import MANIFEST, Bundle
    from edgeft.exporting.kv_rung import cache_rows
    from edgeft.exporting.parity import Ladder
    from edgeft.merging.merged_tensors import merged_rung
    from edgeft.models.layer_shares import Shares
    from edgeft.models.metrics import Proof
    from edgeft.models.spec import read_model_spec

    exact = target.weight_bits >= 16
    ladder = Ladder(target, tokenizer, silent, rungs)
    ladder.add(merged_rung(base, tuned, merged, training, Shares()))
    spec = read_model_spec(str(merged))
    context = Bundle.read(artifact.folder / MANIFEST).context_tokens
    cache = cache_rows(target, lambda: prompts, spec, prompts, min(context, LONGEST_ROW))
    form, _ = ladder.climb_artifact(
        merged, artifact.folder, artifact, prompts, tied=spec.tie_word_embeddings, alike=ROUNDED_ALIKE,
        quality=target.parity if exact else NO_NONSENSE, cache=cache, near=NO_NONSENSE,
    )  # fmt: skip
    positions = len(form.log_probabilities)
    return Proof(prompts=len(prompts), positions=positions, rungs=tuple(rungs), scored_on="", scores={})


def first_layers(spec: ModelSpec, count: int) -> ModelSpec:
    """The spec of a model's first `count` layers with everything around them."""
    kept = spec.layer_parameters[:count]
    return spec.model_copy(
        update={
            "num_hidden_layers": count,
            "layer_parameters": kept,
            "total_parameters": spec.total_parameters - sum(spec.layer_parameters) + sum(kept),
        }
    )


def layers_of_excerpt(training: Training, count: int) -> dict[str, object]:
    """What changes in a plan's training when all layers of an excerpt train, each at every step."""
    every = tuple(range(count))
    layers = "all" if training.layers == "all" else "sparse"
    # what is written begins at random also where training begins elsewhere
    return {"init": "random", "layers": layers, "trained_layers": every, "active_layers": 0, "cached_layers": 0,
            "stream_layers": False, "shard_base": False,
            "resting_layers": (), "compute_dtype": "fp32"}  # fmt: skip


def peak_bytes(plan: Plan, spec: ModelSpec, training: Training, target: Target) -> int:
    """At most what exporting and proving the excerpt takes, by the estimates of those stages."""
    from edgeft.planning.costs import Question

    question = Question(plan.job, plan.profile, spec, plan.lengths, plan.work, DATA_BYTES, plan.budget_bytes)
    phases = (stages.build(question, target), proof.prove(question, training, target, None))
    return max(stages.needed_bytes(phase) for phase in phases)


def too_large(
    plan: Plan, spec: ModelSpec, target: Target, need_bytes: int, waiting_bytes: int, scratch: Path
) -> str | None:
    """Why memory or disk do not allow it, None where they do. A CPU's budget holds for both processes together."""
    have = memory_limit()
    if need_bytes > have.bytes:
        return f"it may need {show_bytes(need_bytes)}, {show_bytes(have.bytes)} can be had ({have.reason})"
    if plan.training.device == "cpu" and need_bytes + waiting_bytes > plan.budget_bytes:
        return f"it may need {show_bytes(need_bytes + waiting_bytes)}, the budget is {show_bytes(plan.budget_bytes)}"
    files = 2 * disk.merge_disk(spec).peak_bytes + disk.export_disk(spec, target).peak_bytes
    free = disk.free_bytes(scratch)
    return f"its files may need {show_bytes(files)} of disk, {show_bytes(free)} are free" if files > free else None


def change_at_random(base: Path, training: Training, out: Path) -> None:
    """Write into `out` what training could have left: every parameter that trains changed a little, at random."""
    import torch

    from edgeft.engine.trainable import apply_tuner, save_tuned
    from edgeft.models.checkpoint import load_plain
    from edgeft.models.parts import find_parts
    from edgeft.settings.tuners import BETWEEN, DOWN, NARROW, SHIFT, UP, WIDE, is_adapter

    model = load_plain(base)
    parts = find_parts(model)
    chosen = apply_tuner(model, parts, training)
    random = torch.Generator().manual_seed(training.seed)
    with torch.no_grad():
        for name, parameter in chosen:
            noise = torch.randn(parameter.shape, generator=random)
            if UP in name:
                parameter.copy_(noise * ADAPTER_RMS)
            elif name.endswith(WIDE) and is_adapter(name):
                parameter.copy_(noise * BESIDE_RMS)
            elif f".{BETWEEN}." in name:
                parameter.copy_(noise)
            elif name.endswith(SHIFT):  # zeros: a share of them would be none
                parameter.copy_(noise * WEIGHT_SHARE)
            elif DOWN not in name and not (name.endswith(NARROW) and is_adapter(name)):
                parameter.add_(noise, alpha=WEIGHT_SHARE * float(parameter.square().mean().sqrt()))
    out.mkdir()
    save_tuned(model, parts, training, chosen, str(base), out)


if __name__ == "__main__":
    main()
