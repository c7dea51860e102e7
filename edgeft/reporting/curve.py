"""How does a loss curve read in plain characters, no wider than eighty columns?"""

from __future__ import annotations

import math
from collections.abc import Sequence

Points = Sequence[tuple[int, float]]

WIDTH, HEIGHT = 80, 8
LABEL = 8  # columns of the losses at the left
TRAINING, VALIDATION = ".", "o"
LEAST_THIRD = 5  # steps


def curve_lines(points: Points, validations: Points = (), width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """Lines of a plot from the first step to the last; none where there are too few steps to see anything in.

    A column holds the mean of its steps. A validation stands above the training loss where both fall on one place.
    """
    known = [(step, loss) for step, loss in (*points, *validations) if math.isfinite(loss)]
    if len(points) < 3 or len(known) < 3:
        return []
    last, columns = max(step for step, _ in known), width - LABEL - 1
    columns = min(columns, max(20, last))
    drawn = [(TRAINING, _columns(points, last, columns)), (VALIDATION, _columns(validations, last, columns))]
    losses = [loss for _, means in drawn for loss in means.values()]
    low, high = min(losses), max(losses)
    rows = [[" "] * columns for _ in range(height)]
    for mark, means in drawn:
        for column, loss in means.items():
            share = (high - loss) / (high - low) if high > low else 0.5
            rows[round(share * (height - 1))][column] = mark
    labels = {0: high, height - 1: low}
    marked = f"{TRAINING} training" + (f", {VALIDATION} validation" if validations else "")
    lines = [f"loss, nats a token: {marked}"]
    for number, row in enumerate(rows):
        label = f"{labels[number]:.4g}" if number in labels else ""
        lines.append(f"{label:>{LABEL - 1}} |{''.join(row)}".rstrip())
    lines.append(" " * LABEL + "+" + "-" * columns)
    end = f"step {last:,}"
    lines.append(" " * (LABEL + 1) + "1" + end.rjust(columns - 1))
    return lines


def last_fall(points: Points) -> float:
    """By what share the mean training loss of the last third of the steps is below that of the middle third.

    0 where there are too few steps to tell.
    """
    losses = [loss for _, loss in points if math.isfinite(loss)]
    third = len(losses) // 3
    if third < LEAST_THIRD:
        return 0.0
    middle, last = losses[third : 2 * third], losses[-third:]
    return 1 - math.fsum(last) / math.fsum(middle)


def _columns(points: Points, last: int, columns: int) -> dict[int, float]:
    """The mean loss of the steps that fall on each column."""
    found: dict[int, list[float]] = {}
    for step, loss in points:
        if math.isfinite(loss):
            found.setdefault((step - 1) * (columns - 1) // max(1, last - 1), []).append(loss)
    return {column: math.fsum(losses) / len(losses) for column, losses in found.items()}
