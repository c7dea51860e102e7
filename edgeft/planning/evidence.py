"""What has been measured of one way of training beside another, and how far does that reach?

evidence.json is written by `make bench-methods` from its own record and by nobody else. It is gone by where it is
nearest: in decades of training rows and of parameters together. Another task or model may order ways otherwise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from edgeft.documents import Strict
from edgeft.models.metrics import Difference
from edgeft.settings.job import Training
from edgeft.settings.tuners import ADAPTERS
from edgeft.units import show_count

FILE = Path(__file__).with_name("evidence.json")
REFERENCE = f"{ADAPTERS}, all"  # what every tuner is compared with
# Points of a way that trains no layer at all, where nothing was shown between few layers and all: an order, on the
# careful side. One seed of a small model that shows no difference says too little to leave layers of a large one
# untrained.
UNSHOWN = {"sparse": 12.0, "lisa": 2.0}
# The same where few layers were shown to be better: of equals the one with more layers comes first.
TIE = 0.01


class Comparison(Strict):
    """Scores of a way less those of another, with the 95% intervals of test rows and seeds together."""

    way: str = Field(description="method and layers, as in `lora, sparse`")
    against: str
    rows: int = Field(description="that were trained on")
    seeds: int
    points: Difference = Field(description="of exact match, of 100")
    loss: Difference = Field(description="nats per token")

    @property
    def shown(self) -> bool:
        """Whether exact match, or the loss in its favour, shows a difference; the loss is the sharper of the two."""
        agrees = (self.loss.difference > 0) == (self.points.difference < 0)
        return self.points.shown or (self.loss.shown and agrees)

    @property
    def lost(self) -> float:
        """Points that the way gives up against the other; 0 where the difference is within noise."""
        return -self.points.difference if self.shown else 0.0

    @property
    def line(self) -> str:
        points = self.points
        text = f"exact match {points.difference:+.1f} points [{points.low:+.1f}, {points.high:+.1f}]"
        return text + ("" if self.shown else ", no difference is shown")


class Score(Strict):
    """What a way reached: exact match of 100, the mean of its seeds."""

    way: str
    rows: int
    seeds: int
    points: float


class Study(Strict):
    """What was compared on one model and task."""

    model: str
    parameters: int
    layers: int
    task: str
    rank: int
    test_rows: int
    shares: Mapping[str, float] = Field(description="of the layers that train at a time, where not all do")
    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...]

    def line(self, rows: int) -> str:
        """What a number of it was measured on."""
        return f"{self.task}, {self.model} of {show_count(self.parameters)} parameters, {rows:,} rows"


class Evidence(Strict):
    """All that is gone by."""

    source: str
    commit: str
    studies: tuple[Study, ...]


class Measured(NamedTuple):
    """One comparison, and what it is of."""

    comparison: Comparison
    study: Study

    @property
    def line(self) -> str:
        return f"{self.comparison.line} ({self.study.line(self.comparison.rows)})"


@functools.cache
def evidence() -> Evidence:
    return Evidence.model_validate_json(FILE.read_text(encoding="utf-8"))


def method_of(training: Training) -> str:
    """The name that a training's tuner was measured under."""
    return "lora_plus" if training.tuner == ADAPTERS and training.lora_plus != 1 else training.tuner


@functools.cache
def nearest(way: str, against: str, rows: int, parameters: int) -> Measured | None:
    """The comparison of two ways nearest to a job of so many rows and a model of so many parameters; None: never made.

    Distance: |log10 of the rows' ratio| + |log10 of the parameters' ratio|.
    """
    found = [
        Measured(each, study)
        for study in evidence().studies
        for each in study.comparisons
        if (each.way, each.against) == (way, against)
    ]

    def distance(measured: Measured) -> float:
        ratios = measured.comparison.rows / max(1, rows), measured.study.parameters / max(1, parameters)
        return sum(abs(math.log10(ratio)) for ratio in ratios)

    return min(found, key=distance, default=None)


def tuner_points(method: str, rows: int, parameters: int) -> float:
    """Points that a tuner gives up against LoRA, both in all layers; less than 0 where it was shown to be better."""
    measured = nearest(f"{method}, all", REFERENCE, rows, parameters)
    return measured.comparison.lost if measured else 0.0


def layers_points(method: str, kind: str, share: float, rows: int, parameters: int) -> float:
    """Points that a tuner gives up where only a share of its layers trains (at a time), against all of them.

    Linear between all layers and the share that was measured, and on below it. Never less than nothing: that few layers
    of one model did better on one task says too little of which layers another model could do without.
    """
    if share >= 1:
        return 0.0
    measured = of_layers(method, kind, rows, parameters)
    if measured is None or not measured.comparison.shown:
        return UNSHOWN[kind] * (1 - share)
    lost = max(0.0, measured.comparison.lost) / (1 - measured.study.shares[kind])
    return (lost + TIE) * (1 - share)


def of_layers(method: str, kind: str, rows: int, parameters: int) -> Measured | None:
    """A tuner in few layers beside the same in all; LoRA's, which was measured most, where it never was."""
    own = nearest(f"{method}, {kind}", f"{method}, all", rows, parameters)
    return own or nearest(f"{ADAPTERS}, {kind}", REFERENCE, rows, parameters)
