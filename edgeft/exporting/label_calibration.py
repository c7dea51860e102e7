"""How probable is a label really? One temperature, fitted on some rows, and judged on others.

A row's scores are the log-probabilities of whole labels; softmax(score / temperature) gives probabilities. The log loss
of the right labels is convex in 1 / temperature, so one search finds the best.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from edgeft.data.labels import FEWEST_TO_CALIBRATE, NO_LABEL, Label
from edgeft.data.samples import Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.engine.label_scores import label_numbers
from edgeft.exporting.answers import WANTED_RIGHT, Answers, Bin, Calibration, Certain, Threshold
from edgeft.exporting.artifact_answers import Artifact
from edgeft.exporting.label_search import known_enough
from edgeft.models.intervals import paired_losses
from edgeft.models.metrics import Difference
from edgeft.progress import Progress

SHARPEST, FLATTEST = 0.2, 5.0  # temperatures
BINS = 10
PARTS = (0.25, 0.5, 0.75, 1.0)
TEST_ROWS = 500  # that probabilities are judged on: a quarter of them tells 90% to 5 points
Values = numpy.ndarray[Any, numpy.dtype[numpy.float64]]


@dataclass(frozen=True)
class Judged:
    """One row: scores of its labels, best first, and the place of the right one; NO_LABEL where it asks for none."""

    scores: Values
    right: int

    @property
    def is_right(self) -> bool:
        return self.right == 0


def calibrated(
    artifact: Artifact, answers: Answers, labels: Sequence[Label], valid: Sequence[Sample], test: Sequence[Sample],
    tokenizer: TextTokenizer, progress: Progress,
) -> Answers:  # fmt: skip
    """What a manifest says of its answers, by the artifact's own scores of the validation and the first test rows."""
    rows = [*valid, *test[:TEST_ROWS]]
    found = []
    for number, (row, right) in enumerate(zip(rows, label_numbers(labels, rows, tokenizer), strict=True)):
        found.append(judged(artifact.choose(row.prompt, known_enough(right)), right))
        progress("labels: calibration", number + 1, len(rows), {})
    temperature, made = calibrate(found[: len(valid)], found[len(valid) :])
    return answers.model_copy(update={"temperature": temperature, "calibration": made})


def judged(search: Any, right: int) -> Judged:
    """A row by the search that ended."""
    places = [place for place, (_, number) in enumerate(search.found) if number == right]
    return Judged(numpy.array([score for score, _ in search.found]), places[0] if places else NO_LABEL)


def log_loss(row: Judged, temperature: float) -> float:
    """Nats of the right label."""
    scores = row.scores / temperature
    highest = float(scores.max())
    return highest + math.log(float(numpy.exp(scores - highest).sum())) - float(scores[row.right])


def certainty(row: Judged, temperature: float) -> float:
    """Probability of the best label."""
    scores = row.scores / temperature
    return 1.0 / float(numpy.exp(scores - scores[0]).sum())


def fit_temperature(rows: Sequence[Judged]) -> float:
    """The temperature of the least log loss, of the rows that ask for a label; 1.0 where those are too few."""
    known = [row for row in rows if row.right != NO_LABEL]
    if len(known) < FEWEST_TO_CALIBRATE:
        return 1.0

    def loss(sharpness: float) -> float:
        return math.fsum(log_loss(row, 1 / sharpness) for row in known)

    low, high = 1 / FLATTEST, 1 / SHARPEST
    ratio = (math.sqrt(5) - 1) / 2
    while high / low > 1.001:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return round(2 / (low + high), 3)


def halves(rows: Sequence[Judged]) -> tuple[list[Judged], list[Judged]]:
    """Every second row, and the others."""
    return list(rows[::2]), list(rows[1::2])


def best_temperature(rows: Sequence[Judged]) -> float:
    """The fitted temperature, unless the one fitted on a half makes the other half's log loss worse than none."""
    first, second = halves(rows)
    sides = ((first, fit_temperature(second)), (second, fit_temperature(first)))
    known = [(row, temperature) for half, temperature in sides for row in half if row.right != NO_LABEL]
    gained = math.fsum(log_loss(row, 1.0) - log_loss(row, temperature) for row, temperature in known)
    return fit_temperature(rows) if gained > 0 else 1.0


def calibrate(valid: Sequence[Judged], test: Sequence[Judged]) -> tuple[float, Calibration | None]:
    """(temperature, how it fares): on test rows where there are any, else on halves of the validation rows in turn.

    None where the rows are too few to say anything.
    """
    temperature = best_temperature(valid)
    if test:
        splits, compared = [(list(valid), list(test))], f"{len(test)} test rows"
    else:
        first, second = halves(valid)
        splits = [(first, second), (second, first)]
        compared = f"{len(valid)} validation rows, each half by what was fitted on the other"
    if min(len(side) for split in splits for side in split) < FEWEST_TO_CALIBRATE:
        return temperature, None
    taken = [(split, best_temperature(split[0])) for split in splits]
    rows = [(row, fitted) for (_, others), fitted in taken for row in others]
    certain = numpy.array([certainty(row, fitted) for row, fitted in rows])
    right = numpy.array([row.is_right for row, _ in rows])
    known = [(row, fitted) for row, fitted in rows if row.right != NO_LABEL]
    plain, better = [log_loss(row, 1.0) for row, _ in known], [log_loss(row, fitted) for row, fitted in known]
    return temperature, Calibration(
        fitted_rows=len(valid), compared=compared, rows=len(rows), log_loss_plain=_mean(plain), log_loss=_mean(better),
        change=Difference.of(paired_losses(plain, better, [1] * len(known))), bins=tuple(_bins(certain, right)),
        certain=tuple(most_certain(certain, right, part) for part in PARTS),
        threshold=suggestion(valid, temperature, [(*split, fitted) for split, fitted in taken]),
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(1, len(values))


def _bins(certain: Values, right: Any) -> Iterator[Bin]:
    """The answers in equal parts of what probability can be; empty parts are left out."""
    places = numpy.minimum((certain * BINS).astype(int), BINS - 1)
    for place in range(BINS):
        inside = places == place
        if inside.any():
            yield Bin(
                low=place / BINS, high=(place + 1) / BINS, rows=int(inside.sum()),
                probability=float(certain[inside].mean()), right=float(right[inside].mean()),
            )  # fmt: skip


def most_certain(certain: Values, right: Any, share: float) -> Certain:
    """What so large a part of the answers, the most certain ones, gets right."""
    rows = max(1, round(share * len(certain)))
    order = numpy.argsort(-certain, kind="stable")[:rows]
    return Certain(share=share, rows=rows, right=float(right[order].mean()))


def choose_threshold(rows: Sequence[Judged], temperature: float) -> float:
    """The lowest whole percent from which on enough answers are right, counted and by their probabilities alike.

    0.0: all answers are right so often, 1.0: none. The count alone, at the luckiest of a hundred places, flatters:
    on drawn scores, 60 rows chosen for 90% gave 73 to 87% on others.
    """
    certain = numpy.array([certainty(row, temperature) for row in rows])
    right = numpy.array([row.is_right for row in rows])
    for percent in range(100):
        above = certain >= percent / 100
        if above.sum() < FEWEST_TO_CALIBRATE / 2:
            break
        if min(right[above].mean(), certain[above].mean()) >= WANTED_RIGHT:
            return percent / 100
    return 1.0


def suggestion(
    valid: Sequence[Judged], temperature: float, splits: Sequence[tuple[Sequence[Judged], Sequence[Judged], float]]
) -> Threshold | None:
    """A threshold chosen on all validation rows, and what one chosen in the same way does on rows of its own.

    `splits` are (rows it is chosen on, rows it is judged on, temperature of the first).
    """
    threshold = choose_threshold(valid, temperature)
    if threshold in (0.0, 1.0):
        return None
    answered = []
    for chosen, others, fitted in splits:
        least = choose_threshold(chosen, fitted)
        answered += [(certainty(row, fitted) >= least, row.is_right) for row in others]
    given = [right for is_given, right in answered if is_given]
    return Threshold(
        min_probability=threshold, wanted_right=WANTED_RIGHT, answered=len(given) / len(answered),
        right=_mean([float(right) for right in given]),
    )  # fmt: skip
