"""Intervals of paired differences: known values, exact small cases, and how often they hold what is true."""

from __future__ import annotations

import math
import random

import pytest

from edgeft.models.intervals import Interval, paired_losses, paired_rates, share, student


def test_quantiles_of_student() -> None:
    """Printed tables: 2.776, 2.571, 2.262, 2.045, 1.984."""
    for degrees, expected in ((4, 2.776), (5, 2.571), (9, 2.262), (29, 2.045), (99, 1.984)):
        assert student(degrees) == pytest.approx(expected, rel=3e-3)
    assert student(0) == math.inf


def test_losses_of_rows_of_one_token_are_a_paired_t_interval() -> None:
    """Differences 1, 2, 3: mean 2, s = 1, t(2) / sqrt(3) = 2.484 in printed tables."""
    found = paired_losses([0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [1, 1, 1])
    assert found.difference == 2.0
    assert found.high - 2 == pytest.approx(4.303 / math.sqrt(3), rel=0.05)
    assert 2 - found.low == pytest.approx(found.high - 2)


def test_losses_are_weighted_by_tokens_and_what_is_common_to_rows_cancels() -> None:
    easy, hard = [1.0, 50.0, 3.0, 700.0], [1.1, 50.2, 3.1, 700.4]
    found = paired_losses(easy, hard, [1, 2, 1, 4])
    assert found.difference == pytest.approx(0.1) and found.high - found.low < 1e-9
    assert found.shown and not paired_losses(easy, easy, [1, 2, 1, 4]).shown
    assert paired_losses([1.0], [2.0], [1]) == Interval(1.0, -math.inf, math.inf)


def test_rates_count_discordant_rows_alone() -> None:
    """12 rows gained, 3 lost of 100: 0.09, and Bonett and Price's limits by hand."""
    first = [False] * 12 + [True] * 3 + [True] * 40 + [False] * 45
    second = [True] * 12 + [False] * 3 + [True] * 40 + [False] * 45
    found = paired_rates(first, second)
    up, down = 13 / 102, 4 / 102
    reach = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 102)
    assert found.difference == pytest.approx(0.09)
    assert (found.low, found.high) == pytest.approx((up - down - reach, up - down + reach), rel=1e-6)
    assert found.shown and not paired_rates(first, first).shown


@pytest.mark.parametrize("rows", [20, 64, 300])
def test_nineteen_of_twenty_intervals_hold_the_true_difference(rows: int) -> None:
    draw = random.Random(rows)
    held_rates = held_losses = 0
    trials = 800
    for _ in range(trials):
        first, second, before, after, tokens = [], [], [], [], []
        for _ in range(rows):
            easy = draw.random()
            first.append(draw.random() < 0.9 * easy)
            second.append(draw.random() < 0.9 * easy + 0.05)
            tokens.append(draw.choice([1, 2, 2, 3, 8]))
            level = draw.expovariate(1.0)
            before.append(tokens[-1] * level)
            after.append(sum(level + draw.gauss(0.1, 0.4) for _ in range(tokens[-1])))
        held_rates += (found := paired_rates(first, second)).low <= 0.05 <= found.high
        held_losses += (loss := paired_losses(before, after, tokens)).low <= 0.1 <= loss.high
    assert 0.92 * trials < held_rates < 0.99 * trials
    assert 0.90 * trials < held_losses < 0.98 * trials


def test_rows_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="2, 3 and 2 rows are no pairs"):
        paired_losses([1.0, 2.0], [1.0, 2.0, 3.0], [1, 1])
    with pytest.raises(ValueError, match="0 and 0 rows are no pairs"):
        paired_rates([], [])


def test_a_share_of_few_is_uncertain_also_where_it_is_none_or_all() -> None:
    """Wilson's intervals as published: 0 of 10 reaches to 0.2775, 5 of 10 from 0.2366 to 0.7634."""
    assert share(0, 10) == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
    assert share(5, 10) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    assert share(10, 10) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)
    for count, total in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="is no share"):
            share(count, total)
