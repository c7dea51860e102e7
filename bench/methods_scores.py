"""How far are two ways of training apart? Paired on the same test rows, with what another seed would have changed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from edgeft.models.intervals import Interval, Z, paired_losses, paired_means

Test = dict[str, Any]  # scores of one run on the test rows: those of `edgeft.models.metrics.Metrics`
SCORES = ("exact_match", "loss")


class Spread(NamedTuple):
    """How far a way's score is from seed to seed, its seeds' common part taken out."""

    deviation: float
    degrees: int

    @property
    def known(self) -> bool:
        return self.degrees > 0


def spread_of(by_way: Sequence[Mapping[int, float]]) -> Spread:
    """The deviation between seeds of ways that ran with the same seeds, pooled.

    A seed may draw the training rows too: what it moves all ways by is no difference between them. So ways and seeds
    are taken out (two-way analysis of variance without interaction); of a single way its mean alone.
    """
    groups = [scores for scores in by_way if len(scores) > 1]
    shared = sorted(set[int]().union(*groups).intersection(*groups)) if groups else []
    table = [[scores[seed] for seed in shared] for scores in groups]
    if not table or len(shared) < 2:
        return Spread(0.0, 0)
    means = [statistics.fmean(row) for row in table]
    middle = statistics.fmean(means)
    moved = [statistics.fmean(column) - middle if len(table) > 1 else 0.0 for column in zip(*table, strict=True)]
    left = [row[n] - mean - moved[n] for row, mean in zip(table, means, strict=True) for n in range(len(shared))]
    degrees = max(1, len(table) - 1) * (len(shared) - 1)
    return Spread(math.sqrt(math.fsum(each * each for each in left) / degrees), degrees)


def nearest_spread(found: Mapping[int, Spread], rows: int) -> Spread:
    """The spread at the size nearest to `rows` at which several seeds ran."""
    known = [size for size, spread in found.items() if spread.known]
    return found[min(known, key=lambda size: abs(math.log(size / rows)))] if known else Spread(0.0, 0)


def apart(ours: Mapping[int, Test], theirs: Mapping[int, Test], spreads: Mapping[str, Spread]) -> dict[str, Any] | None:
    """Scores of a way less those of another, of the seeds that both ran with; None where there is no such seed."""
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    rates = [mean_rows([[float(bit) for bit in side[seed]["row_exact"]] for seed in shared]) for side in (theirs, ours)]
    losses = [mean_rows([side[seed]["row_losses"] for seed in shared]) for side in (theirs, ours)]
    tokens = ours[shared[0]]["row_tokens"]
    found = {"exact_match": paired_means(*rates), "loss": paired_losses(*losses, tokens)}
    return {"seeds": len(shared), **{
        name: shown(widened(interval, spreads[name], len(shared))) for name, interval in found.items()
    }}  # fmt: skip


def mean_rows(runs: Sequence[Sequence[float]]) -> list[float]:
    """Each row's mean over runs."""
    return [statistics.fmean(values) for values in zip(*runs, strict=True)]


def widened(interval: Interval, spread: Spread, seeds: int) -> Interval:
    """An interval of test rows with what other seeds would have moved both sides by."""
    of_seeds = Z * spread.deviation * math.sqrt(2 / seeds)
    reach = math.hypot((interval.high - interval.low) / 2, of_seeds)
    return Interval(interval.difference, interval.difference - reach, interval.difference + reach)


def shown(interval: Interval) -> dict[str, float]:
    return {name: round(value, 5) for name, value in interval._asdict().items()}
