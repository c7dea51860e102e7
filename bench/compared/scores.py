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
    """How far a way's score is from seed to seed, what a seed does to all ways taken out: a deviation."""

    typical: float  # of a way that ran with one seed
    own: Mapping[str, float]  # of a way that ran with several: half of its variance is its own, half the typical one

    def of(self, way: str) -> float:
        return self.own.get(way, self.typical)


UNKNOWN = Spread(0.0, {})


def spread_of(by_way: Mapping[str, Mapping[int, float]]) -> Spread:
    """The deviations between seeds of ways that ran with the same seeds.

    A seed may draw the training rows too: what it moves all ways by, in the median, is no difference between them. Ways
    differ in how far seeds move them, and three seeds say little of one way: so each way's variance is moderated by the
    typical one, the median of all, which an outlier does not move (as in moderated t statistics, Smyth 2004, with as
    much weight on either).
    """
    groups = {way: scores for way, scores in by_way.items() if len(scores) > 1}
    shared = sorted(set[int]().union(*groups.values()).intersection(*groups.values())) if groups else []
    if len(shared) < 2:
        return UNKNOWN
    table = {way: [scores[seed] - statistics.fmean(scores[each] for each in shared) for seed in shared]
             for way, scores in groups.items()}  # fmt: skip
    moved = [statistics.median(column) if len(table) > 1 else 0.0 for column in zip(*table.values(), strict=True)]
    degrees = len(shared) - 1
    own = {way: math.fsum((each - moved[n]) ** 2 for n, each in enumerate(row)) / degrees for way, row in table.items()}
    typical = statistics.median(own.values()) / (1 - 2 / (9 * degrees)) ** 3  # the median of chi squared over its mean
    return Spread(math.sqrt(typical), {way: math.sqrt((each + typical) / 2) for way, each in own.items()})


def nearest_spread(found: Mapping[int, Spread], rows: int) -> Spread:
    """The spread at the size nearest to `rows` at which several seeds ran."""
    known = [size for size, spread in found.items() if spread.own]
    return found[min(known, key=lambda size: abs(math.log(size / rows)))] if known else UNKNOWN


def apart(
    ours: Mapping[int, Test], theirs: Mapping[int, Test], deviations: Mapping[str, tuple[float, float]]
) -> dict[str, Any] | None:  # fmt: skip
    """Scores of a way less those of another, of the seeds that both ran with; None where there is no such seed.

    `deviations`: of each score, between seeds, of either way.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    rates = [mean_rows([[float(bit) for bit in side[seed]["row_exact"]] for seed in shared]) for side in (theirs, ours)]
    losses = [mean_rows([side[seed]["row_losses"] for seed in shared]) for side in (theirs, ours)]
    tokens = ours[shared[0]]["row_tokens"]
    found = {"exact_match": paired_means(*rates), "loss": paired_losses(*losses, tokens)}
    return {"seeds": len(shared), **{
        name: shown(widened(interval, *deviations[name], len(shared))) for name, interval in found.items()
    }}  # fmt: skip


def mean_rows(runs: Sequence[Sequence[float]]) -> list[float]:
    """Each row's mean over runs."""
    return [statistics.fmean(values) for values in zip(*runs, strict=True)]


def widened(interval: Interval, ours: float, theirs: float, seeds: int) -> Interval:
    """An interval of test rows with what other seeds would have moved either side by, from their deviations."""
    of_seeds = Z * math.hypot(ours, theirs) / math.sqrt(seeds)
    reach = math.hypot((interval.high - interval.low) / 2, of_seeds)
    return Interval(interval.difference, interval.difference - reach, interval.difference + reach)


def shown(interval: Interval) -> dict[str, float]:
    return {name: round(value, 5) for name, value in interval._asdict().items()}
