"""Did a run learn anything that its scored rows show, and where it did not, what is there to change?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from edgeft.errors import BadInput
from edgeft.models.metrics import Difference, Metrics, pair
from edgeft.planning.rows_read import FEW
from edgeft.reporting.words import NEARLY_ALL, difference_text, percent
from edgeft.settings.job import Job, Training
from edgeft.settings.tuners import TUNERS

if TYPE_CHECKING:
    from edgeft.training.result import TrainResult

LEAST_NATS = 1.0  # of a row, which every right answer keeps where one of its tokens cannot be learnt

Said = Callable[[Training], str]


def _projections(training: Training) -> str:
    return ",".join(training.target_modules) if TUNERS[training.tuner].placed else ""


def _scale(training: Training) -> str:
    return f"{training.adapter_scale:.3g}" if TUNERS[training.tuner].scaled else ""


# what decides how much is learnt: its name, the settings that ask for it, how it was then done
ASKED: tuple[tuple[str, tuple[str, ...], Said], ...] = (
    ("tuner", ("tuner",), lambda training: training.tuner),
    ("layers", ("layers", "active_layers", "layer_score", "trained_layers"),
     lambda training: f"{training.active_layers or len(training.trained_layers)} at a time"),
    ("learning_rate", ("learning_rate",), lambda training: f"{training.learning_rate:g}"),
    ("rank", ("rank",), lambda training: str(training.rank or "")),
    ("target_modules", ("target_modules",), _projections),
    ("a scale (lora_alpha, lora_scale) of", ("lora_alpha", "lora_scale"), _scale),
    ("steps", ("max_steps", "epochs", "batch_size"), lambda training: str(training.steps)),
)  # fmt: skip


class _Scored(NamedTuple):
    """Base and fine-tuned model on the same rows, by the score that leads for the task."""

    exact: bool  # whether that is exact match; else it is the loss
    base: Metrics
    tuned: Metrics
    change: Difference | None  # with the 95% interval of pairs of rows, where each row's own were kept

    @property
    def better(self) -> bool:
        """Whether the rows show that training did good, or that there was nothing left to learn."""
        if not self.exact:
            return self.change.high < 0 if self.change else self.tuned.loss < self.base.loss
        before, after = self.base.exact_match or 0.0, self.tuned.exact_match or 0.0
        if before > NEARLY_ALL and (self.change.high >= 0 if self.change else after >= before):
            return True
        return after > 0 and (self.change.low > 0 if self.change else after > before)


def _scored(result: TrainResult) -> _Scored:
    """Of the test rows where there are any, else of the validation rows."""
    base, tuned = result.base_valid, result.valid
    if result.base_test is not None and result.test is not None:
        base, tuned = result.base_test, result.test
    exact = result.plan.task_score == "exact_match" and None not in (base.exact_match, tuned.exact_match)
    found = pair("base", base, "fine-tuned", tuned)
    change = None if found is None else found.exact_match if exact else found.loss
    return _Scored(exact, base, tuned, change)


def has_learnt(result: TrainResult) -> bool:
    """Whether the scored rows of a run show that it learnt anything."""
    return _scored(result).better


def nothing_learnt(result: TrainResult) -> list[str]:
    """What shows that a run learnt nothing, and what to change; nothing where its rows show that it did."""
    found = _scored(result)
    if found.better:
        return []
    base, tuned, change = found.base, found.tuned, found.change
    if found.exact:
        scores = f"exact match {percent(base.exact_match)} before, {percent(tuned.exact_match)} after"
        shown = f", {difference_text(change, 100, 1, 'points')}" if change else ""
    else:
        scores = f"loss {base.loss:.4f} before, {tuned.loss:.4f} after"
        shown = f", {difference_text(change)}" if change else ""
    said = [f"WARNING: nothing was learnt that {tuned.rows} scored rows show: {scores}{shown}"]
    if tuned.rows < FEW:
        said.append(f"so few rows show large differences alone: --valid FILE with {FEW} or more")
    return [*said, _to_change(result)]


def loss_that_stays(result: TrainResult) -> list[str]:
    """Why the loss is high though answers are right: each keeps as many nats, whatever its length; else nothing.

    A token that the base never saw has the head's row of all such tokens. Where the head does not train, they share its
    probability: `<|im_end|>` of the example's model, one of 58, costs ln 58 = 4.06 nats in every row.
    """
    scores = result.valid
    right = [loss for loss, bit in zip(scores.row_losses, scores.row_exact, strict=False) if bit == "1"]
    if (scores.exact_match or 0) <= NEARLY_ALL or not right or min(right) < LEAST_NATS:
        return []
    return [
        f"the loss stays: every right answer keeps {min(right):.2f} nats or more, in a token that is not learnt, as "
        "the end of a turn that the base never saw; labels do without it, free answers may not end, and any rounding "
        "may decide which: --set tuner=full trains it (docs/train.md)"
    ]


def _to_change(result: TrainResult) -> str:
    """What was asked for beside what a plan takes by itself; where nothing was, what else it can be."""
    from edgeft.planning.own_choice import own_choice

    plan, own = result.plan, None
    with contextlib.suppress(BadInput):
        own = own_choice(plan)
    differing = []
    for name, settings, said in ASKED if own else ():
        asked = any(getattr(plan.job, each) != Job.model_fields[each].default for each in settings)
        asked = asked or name == "tuner"  # which a rank or projections decide too
        if own and asked and said(own) and said(plan.training) not in ("", said(own)):
            differing.append(f"{name} {said(plan.training)} (edgeft's own choice: {said(own)})")
    other = "the base is too small for the task (a larger one), or rows are not read as meant (edgeft data shows them)"
    if differing:
        return f"asked for were {', '.join(differing)}: leave that out; if it stays so, {other}"
    return f"rate, rank and steps were edgeft's own choice: more rows or epochs, or {other}"
