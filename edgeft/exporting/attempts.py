"""What is said of an artifact that a climb considered: what its rows show, what it is predicted to cost?"""

from __future__ import annotations

from edgeft.models.metrics import Attempt, Difference


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
