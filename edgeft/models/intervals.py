"""Is one form of a model better than another on the same rows? Paired differences with their 95% intervals.

Both forms answer the same rows, so what counts is how each row changes: the spread between rows, by far the larger
part of a score's own error, cancels. An interval that covers zero shows no difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

Z = NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """A difference, second less first, and where it lies with 95% confidence."""

    difference: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether the rows show any difference at all."""
        return self.low > 0 or self.high < 0


def student(degrees: int) -> float:
    """The 97.5% quantile of Student's t, by Cornish and Fisher's expansion: 0.2% off at 4 degrees, less above."""
    if degrees < 1:
        return math.inf
    powers = [
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    ]
    return Z + sum(float(power / degrees ** (i + 1)) for i, power in enumerate(powers))


def paired_losses(first: Sequence[float], second: Sequence[float], tokens: Sequence[int]) -> Interval:
    """Difference of the losses per token, from each row's summed loss under both forms and its tokens.

    d = sum(b_i - a_i) / sum(n_i), a ratio of two sums over rows; its error by linearisation, s^2 of
    (b_i - a_i - d n_i), with Student's t for the rows there are. Raises ValueError for rows that do not match.
    """
    if not len(first) == len(second) == len(tokens) or not sum(tokens):
        raise ValueError(f"{len(first)}, {len(second)} and {len(tokens)} rows are no pairs")
    moves = [b - a for a, b in zip(first, second, strict=True)]
    rows, total = len(moves), sum(tokens)
    difference = math.fsum(moves) / total
    if rows < 2:
        return Interval(difference, -math.inf, math.inf)
    squares = math.fsum((move - difference * count) ** 2 for move, count in zip(moves, tokens, strict=True))
    reach = student(rows - 1) * math.sqrt(squares * rows / (rows - 1)) / total
    return Interval(difference, difference - reach, difference + reach)


def paired_means(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Difference of the means of a score that each row has under both forms, by Student's t of the rows' differences.

    Raises ValueError for rows that do not match.
    """
    return paired_losses(first, second, [1] * len(first))


def paired_rates(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """Difference of two shares of right answers, from which rows each form answers.

    Only discordant rows say anything, as in McNemar's test. Bonett and Price's interval (2012): one row is added to
    both kinds of them, which keeps 95% where there are few or none. Raises ValueError for rows that do not match.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} rows are no pairs")
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    rows = len(first)
    up, down = (gained + 1) / (rows + 2), (lost + 1) / (rows + 2)
    reach = Z * math.sqrt((up + down - (up - down) ** 2) / (rows + 2))
    return Interval((gained - lost) / rows, max(-1.0, up - down - reach), min(1.0, up - down + reach))


def share(count: int, total: int) -> Interval:
    """A share with its 95% interval (Wilson's score interval), which says something of 0 and of all, too.

    Raises ValueError for a count that is no share of the total.
    """
    if not 0 <= count <= total or not total:
        raise ValueError(f"{count} of {total} is no share")
    rate, extra = count / total, Z**2 / total
    middle = (rate + extra / 2) / (1 + extra)
    reach = math.sqrt(rate * (1 - rate) * extra + extra**2 / 4) / (1 + extra)
    return Interval(rate, max(0.0, middle - reach), min(1.0, middle + reach))
