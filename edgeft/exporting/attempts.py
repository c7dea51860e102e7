"""What is said of an artifact that a climb considered, and of what is left where none passes?"""

from __future__ import annotations

from edgeft.errors import EdgeftError
from edgeft.exporting.parity import HINTS
from edgeft.models.metrics import Attempt, Difference
from edgeft.planning.plan import Plan, make_plan
from edgeft.units import show_bytes, show_seconds


def shown(loss: Difference | None, match: Difference | None) -> str:
    """Whether the rows show any difference at all, where they say something."""
    found = match or loss
    if found is None:
        return "passes; too few rows for an interval"
    return "passes; the rows show a difference" if found.shown else "passes; the interval covers zero"


def cost(made: Attempt) -> str:
    """`, predicted -1.0 points [-4.1, +2.1]`, or the loss where no answers are scored."""
    found, scale, digits, what = made.exact_match, 100.0, 1, "points"
    if found is None:
        found, scale, digits, what = made.loss, 1.0, 4, "nats of loss"
    if found is None:
        return ""
    middle, low, high = (f"{scale * value:+.{digits}f}" for value in (found.difference, found.low, found.high))
    return f", predicted {middle} {what} [{low}, {high}]"


def left(plan: Plan) -> str:
    """What is left to do where nothing passes: training that sees its weights rounded, with its time and memory.

    No other share of the change is tried: a smaller one loses more by rounding (bench/LOG.md), and one beyond the whole
    is what `edgeft merge --sweep` chooses by other scores.
    """
    if plan.training.quantize_aware is not None:
        return HINTS["artifact"]
    lead = f"{HINTS['artifact']}; training what is shipped may keep more (plan it again with --set quantize_aware=true"
    job = plan.job.model_copy(update={"quantize_aware": True})
    try:
        made = make_plan(job, plan.importance, spec=plan.spec, profile=plan.profile)
    except EdgeftError as problem:
        return f"{lead}: {problem.where}: {problem.problem})"
    return f"{lead}: about {show_seconds(made.seconds)} and {show_bytes(made.peak_bytes)} on {plan.profile.name})"
