"""For which target can a job train, so that the codes of its last step are those of the bundle? If none, why not?"""

from __future__ import annotations

from edgeft.errors import BadInput
from edgeft.models.families import in_conv1d
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import AUTO, Job, Precision, Rounding
from edgeft.settings.tuners import TUNERS
from edgeft.targets.kinds import unknown_rounding
from edgeft.targets.target import Target, candidates

WHERE = "quantize_aware"
# what holds every value of a dtype that weights are stored in: the merge adds to what is stored
HOLDS: dict[str, tuple[Precision, ...]] = {
    "float32": ("fp32",), "bfloat16": ("bf16", "fp32"), "float16": ("fp16", "fp32"),
}  # fmt: skip


def aimed_at(job: Job) -> Target:
    """The target that a job trains for: the one it names, or the smallest that `auto` tries."""
    return candidates(job.target)[0]


def rounding_of(job: Job, spec: ModelSpec) -> Rounding | None:
    """How the weights of a job's products are rounded while it trains; None where they are not.

    Raises BadInput with the reason where the codes of training could not be those of the export.
    """
    if not job.quantize_aware:
        return None
    target = aimed_at(job)
    if problem := unknown_rounding(target):
        raise BadInput(WHERE, f"target {target.name} {problem}", "name one that rounds to nearest: ort-int4, gguf-q4_0")
    if target.weight_bits >= 16:
        problem = f"target {target.name} keeps weights in {target.weight_bits} bits: there is nothing to train for"
        raise BadInput(WHERE, problem, "leave quantize_aware off, or name a target of 4 or 8 bits")
    if job.init != "random":
        problem = f"init={job.init} changes a weight by two products of factors: training folds in one"
        raise BadInput(WHERE, problem, "leave init out")
    if job.tuner is not None and not TUNERS[job.tuner].rounded:
        problem = f"{job.tuner} changes a weight by more than a product of two factors: training folds in no more"
        raise BadInput(WHERE, problem, "use tuner=lora or tuner=full")
    if spec.stacked:
        problem = f"{spec.stacked[0]} and its like are put together from several tensors, which targets round apart"
        raise BadInput(WHERE, problem, "leave quantize_aware off for a model with experts")
    if in_conv1d(spec.model_type):
        problem = f"{spec.model_type} keeps its matrices transposed, and targets round them as they are multiplied"
        raise BadInput(WHERE, problem, "leave quantize_aware off for this family")
    if spec.dtype not in HOLDS:
        problem = f"weights are stored in {spec.dtype}, which no training precision holds"
        raise BadInput(WHERE, problem, "convert the checkpoint to float32")
    if job.base_precision is not None and job.base_precision not in HOLDS[spec.dtype]:
        raise cannot_hold(job.base_precision, spec.dtype)
    return target.rounding


def cannot_hold(precision: Precision, stored: str) -> BadInput:
    """What to say of a base that is not, bit for bit, what the merge will add to."""
    held = "an NF4 base is rounded" if precision == "nf4" else f"a base in {precision} is not what is stored, {stored}"
    problem = f"{held}, the merge adds to the original weights: their codes would be others"
    return BadInput(WHERE, problem, "use base_precision=" + " or ".join(HOLDS[stored]))


def exact_precisions(found: list[Precision], spec: ModelSpec) -> list[Precision]:
    """Of the ways to keep a base those that hold its weights as they are stored; fp32 does where none of them does."""
    return [each for each in found if each in HOLDS[spec.dtype]] or ["fp32"]


def rounding_notes(job: Job, rounding: Rounding | None) -> list[str]:
    """A line on what is trained for."""
    if rounding is None:
        return []
    why = ", the smallest that auto tries" if job.target == AUTO else ""
    return [f"quantize_aware: every product sees its weight rounded as {rounding.name} will hold it{why}; so do scores"]
