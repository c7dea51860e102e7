"""How often does a part of the rows say what all of them would not? Bundles at the border, looked at all the time."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable

import pytest

from edgeft.models.drawing import LEVEL, Mean
from edgeft.models.intervals import paired_means

KNOWN = 64  # rows that every proof takes
Rows = list[float]


def lost_answers(rows: int, lost: int, gained: int, allowed: float) -> Callable[[random.Random], Rows]:
    """Rows of which so many lose their answer and so many gain it, less what may be lost of each."""

    def make(draw: random.Random) -> Rows:
        moves = [1.0] * lost + [-1.0] * gained + [0.0] * (rows - lost - gained)
        draw.shuffle(moves)
        return [move - allowed for move in moves]

    return make


def losses(spread: float, mean: float, heavy: bool = False) -> Callable[[random.Random], Rows]:
    """200 rows whose mean is exactly that; `heavy`: most of it is in a few rows."""

    def make(draw: random.Random) -> Rows:
        found = [draw.lognormvariate(0, 1) * spread if heavy else draw.gauss(0, spread) for _ in range(200)]
        middle = statistics.fmean(found)
        return [each - middle + mean for each in found]

    return make


def drawn(rows: Rows, draw: random.Random, *, reach: float, sure: bool) -> tuple[bool, int]:
    """(whether they pass, of how many that was known), the first rows being known, the others drawn at random."""
    mean = Mean(len(rows), reach, sure)
    for value in rows[:KNOWN]:
        mean.know(value)
    rest = rows[KNOWN:]
    draw.shuffle(rest)
    for value in rest:
        if mean.low or mean.high:
            break
        mean.draw(value)
    assert mean.low != mean.high
    return mean.low, mean.seen


def passing(make: Callable[[random.Random], Rows], reach: float, sure: bool, trials: int = 400) -> tuple[float, float]:
    """(how many bundles pass, of how many rows on average)."""
    draw = random.Random(7)
    found = [drawn(make(draw), draw, reach=reach, sure=sure) for _ in range(trials)]
    return statistics.fmean(low for low, _ in found), statistics.fmean(seen for _, seen in found)


def at_most(trials: int) -> float:
    """How often something of a chance of LEVEL is seen in so many trials, three standard deviations and no more."""
    return LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / trials)


@pytest.mark.parametrize(("rows", "points"), [(200, 0.02), (1000, 0.01)])
@pytest.mark.parametrize("gained", [0, 5, 20])
def test_a_bundle_that_loses_one_answer_too_many_passes_as_rarely_as_the_level_says(
    rows: int, points: float, gained: int
) -> None:
    border = int(rows * points) + 1
    assert passing(lost_answers(rows, border + gained, gained, points), 1 + points, sure=True)[0] <= at_most(400)
    assert passing(lost_answers(rows, border - 1, 0, points), 1 + points, sure=True)[0] > 0.3  # which all rows let pass


@pytest.mark.parametrize(("spread", "heavy"), [(1.0, False), (5.0, False), (1.0, True)])
def test_a_bundle_whose_loss_rises_a_hair_too_much_passes_as_rarely(spread: float, heavy: bool) -> None:
    assert passing(losses(spread, 1e-9, heavy), 20.0, sure=False)[0] <= at_most(400)


def test_looking_after_each_row_at_an_interval_of_its_own_would_pass_them() -> None:
    """The planted fault: Student's interval at the same level, looked at after each row."""
    draw, passed, trials = random.Random(7), 0, 200
    make = lost_answers(200, 5, 0, 0.02)
    for _ in range(trials):
        rows = make(draw)
        ends = (paired_means([0.0] * count, rows[:count]).high for count in range(20, 200, 5))
        passed += any(end < 0 for end in ends)
    assert passed / trials > 5 * LEVEL


def test_good_and_bad_bundles_are_known_before_all_rows_are_read() -> None:
    good, of_good = passing(lost_answers(1000, 1, 1, 0.01), 1.01, sure=True, trials=50)
    bad, of_bad = passing(lost_answers(1000, 100, 0, 0.01), 1.01, sure=True, trials=50)
    assert (good, bad) == (1.0, 0.0) and of_good < 600 and of_bad < 300
    near, of_near = passing(losses(1.0, -0.9), 20.0, sure=False, trials=50)
    far, of_far = passing(losses(1.0, 4.0), 20.0, sure=False, trials=50)
    assert (near, far) == (1.0, 0.0) and of_near < 150 and of_far < 100


def test_a_row_that_nobody_foresaw_ends_the_bet_and_all_rows_are_read() -> None:
    rows = [-1.0] * 200
    assert drawn(list(rows), random.Random(0), reach=20.0, sure=False) == (True, pytest.approx(120, abs=30))
    rows[100] = 150.0  # the others make up for it, but that is not known before all are read
    seen = [drawn(list(rows), random.Random(seed), reach=20.0, sure=False) for seed in range(20)]
    assert all(low for low, _ in seen) and sum(count == 200 for _, count in seen) >= 5


def test_all_rows_decide_by_themselves() -> None:
    mean = Mean(2, 1.0)
    mean.know(0.5)
    assert not mean.low and not mean.high
    mean.draw(-0.5)
    assert mean.low and not mean.high  # exactly what is allowed
