"""Which score says how well a task is done, and of how many rows are answers written out? (no torch)

Exact match where answers are labels: held to them, or the same few short ones again and again. Free text is never word
for word the same: there the loss leads, and F1 over words stands beside it. Text without a prompt has its loss alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from edgeft.data.labels import AskedAnswers
from edgeft.data.scoring_groups import Size

TaskScore = Literal["exact_match", "f1", "loss"]
LABEL_TOKENS = 16  # of the longest label, its end included
SHOWN, SCORED = 10, 30  # rows whose answers are written out: to be looked at; where they are scored as well


def task_score(sizes: Iterable[Size], asked: AskedAnswers, *, held_to_labels: bool) -> TaskScore:
    """The score that suits training data whose rows ask for these answers."""
    if not any(size.prompt for size in sizes):
        return "loss"
    short = all(len(answer) <= LABEL_TOKENS for answer in asked.found)
    return "exact_match" if held_to_labels or (asked.repeats and short) else "f1"


def rows_written(score: TaskScore, asked_for: int | None) -> int:
    """Of how many rows of each scored file answers are written out; `asked_for`: what the user set."""
    if score == "loss":
        return 0
    return asked_for if asked_for is not None else SCORED if score == "f1" else SHOWN
