"""What does a manifest say of answers that are held to something, and how far can labels' probabilities be trusted?

Data only: `label_calibration` makes it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeft.documents import Strict
from edgeft.models.metrics import Difference


class GoldenLabel(Strict):
    """What the artifact chose for a golden prompt, and the next best label; scores are sums of log-probabilities."""

    label: str
    score: float
    runner_up: str
    runner_up_score: float


class Bin(Strict):
    """Answers whose probability lies between two bounds: their mean, and how many of them are right."""

    low: float
    high: float
    rows: int
    probability: float
    right: float = Field(description="a share of 1")


class Certain(Strict):
    """What the most certain of all answers get right."""

    share: float
    rows: int
    right: float = Field(description="a share of 1")


WANTED_RIGHT = 0.9  # of the answers at or above a suggested threshold


class Threshold(Strict):
    """A --min-probability, chosen on validation rows, and what it does on rows that it was not chosen on."""

    min_probability: float
    wanted_right: float = Field(description="the share of its answers that should be right, as it was chosen")
    answered: float = Field(description="share of the other rows that get an answer")
    right: float = Field(description="share of those answers that are right")


class Calibration(Strict):
    """A temperature for labels' scores, fitted on validation rows; the rest is of rows that it was not fitted on."""

    fitted_rows: int
    compared: str = Field(description="the rows of everything below")
    rows: int
    log_loss_plain: float = Field(description="nats a row, without a temperature")
    log_loss: float
    change: Difference | None = Field(description="of the log loss by the temperature")
    bins: tuple[Bin, ...]
    certain: tuple[Certain, ...]
    threshold: Threshold | None = Field(description="None: no answers are so often right, or all are")


class GoldenAnswer(Strict):
    """What the artifact wrote for a golden prompt, held to the grammar: its tokens, the one that ends it at the end."""

    ids: list[int]
    margins: list[float] = Field(
        description="of each: its logit less the next best allowed one's; 1e9 where it is alone"
    )


class HeldToGrammar(Strict):
    """How answers are held: to the grammar in `file`, as llguidance reads it."""

    form: Literal["regex", "json_schema", "lark"]
    file: str
    source: str = Field(description="the setting that it was made from; of a file its name alone")


class Answers(Strict):
    """How answers are held: the most probable of the labels in `file`."""

    form: Literal["labels"] = "labels"
    file: str
    labels: int
    temperature: float = Field(default=1.0, description="probabilities are softmax(score / temperature)")
    calibration: Calibration | None = None
