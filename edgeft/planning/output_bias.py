"""Which models, and which targets, have a place for a vector that is added to what attention gives?"""

from __future__ import annotations

from edgeft.errors import BadInput
from edgeft.models.output_biases import holds_shift, with_biases
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import ALL_THAT_FIT, AUTO, Job, Training
from edgeft.settings.tuners import ADAPTERS, TUNERS, Tuning
from edgeft.targets.runtimes import cannot_build
from edgeft.targets.target import load_target


def check_shift(job: Job, spec: ModelSpec, row: Tuning) -> None:
    """Raise BadInput for a tuner that adds one where the model, or what the job exports to, cannot hold it."""
    if not row.shifts:
        return
    other = f"use tuner={ADAPTERS} or tuner=ia3"
    if not holds_shift(spec):
        problem = f"{job.tuner} adds a vector after attention, and {spec.architecture} has no place for one: its output"
        raise BadInput("tuner", f"{problem} projections have no bias, and no key of its config gives them one", other)
    if job.target in (AUTO, ALL_THAT_FIT):
        return
    target = load_target(job.target)
    problem = cannot_build(target, with_biases(spec))
    if problem and not cannot_build(target, spec):
        raise BadInput(f"target {target.name}", problem, f"name an ort- or onnx-portable- target, or {other}")


def as_merged(spec: ModelSpec, training: Training) -> ModelSpec:
    """The spec of what a merge writes: with biases that the base has not, where the tuner adds to them."""
    return with_biases(spec) if TUNERS[training.tuner].shifts else spec
