"""What is alive during a deep model's step, computed from steps of shallow ones? Exact: memory is a sum over layers.

Layers of one kind hold the same bytes, so that what is alive at an operation of layer j of n is linear in j and in n.
Three layers of a kind and then four give both slopes, for each operation of its own: the highest may be another one
in the deep model than in the shallow.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

KEPT, WORTHWHILE, LONGEST_PERIOD = 3, 5, 8


class Place(NamedTuple):
    """Where in a step an operation runs: `layer` counts decoder layers, None outside of them."""

    phase: str
    micro_batch: int
    layer: int | None
    part: str


# The bytes of consecutive operations of the deep model: the sum of factor * bytes of the events from `first` on in
# `trace`, operation for operation.
Sum = tuple[tuple[int, int, int], ...]


class Stretch(NamedTuple):
    """Operations of the deep model: those of the base's trace from `first` on, in decoder layer `layer` of the deep."""

    layer: int | None
    first: int
    length: int
    terms: Sum


@dataclass(frozen=True)
class Region:
    """Consecutive layers first .. first + period * units - 1 whose kinds repeat every `period`."""

    first: int
    period: int
    units: int

    def layers(self, units: int) -> range:
        return range(self.first, self.first + self.period * units)


def find_regions(kinds: Sequence[Hashable]) -> list[Region]:
    """The layers as repeating stretches, each as long as possible; what does not repeat often enough stands alone."""
    found, start = [], 0
    while start < len(kinds):
        best = Region(start, 1, 1)
        for period in range(1, LONGEST_PERIOD + 1):
            end = start + period
            while end < len(kinds) and kinds[end] == kinds[end - period]:
                end += 1
            units = (end - start) // period
            if units >= WORTHWHILE and period * units > best.period * best.units:
                best = Region(start, period, units)
        found.append(best)
        start += best.period * best.units
    return found


def shallow_models(regions: Sequence[Region]) -> list[list[int]]:
    """Units of each region in each model to trace: the base with at most three, then one more of each cut region."""
    base = [min(region.units, KEPT) if region.units >= WORTHWHILE else region.units for region in regions]
    cut = [k for k, region in enumerate(regions) if base[k] < region.units]
    return [base, *([units + (k == one) for k, units in enumerate(base)] for one in cut)]


def kept_layers(regions: Sequence[Region], units: Sequence[int]) -> list[int]:
    """Indices, in the deep model, of the layers that a shallow one has."""
    return [layer for region, count in zip(regions, units, strict=True) for layer in region.layers(count)]


def weights_of(regions: Sequence[Region], models: Sequence[Sequence[int]]) -> list[int]:
    """The factors by which the shallow models' bytes add up to the deep one's, for what is there from the start."""
    more = [region.units - count for region, count in zip(regions, models[0], strict=True) if region.units > count]
    return [1 - sum(more), *more]


class _Key(NamedTuple):
    """Consecutive operations of one pass in one layer, by (region, unit, offset) of it, or outside of the layers."""

    phase: str
    micro_batch: int
    spot: tuple[int, int, int] | None
    nth: int


def _blocks(
    regions: Sequence[Region], units: Sequence[int], places: Sequence[Place], live: Sequence[int]
) -> dict[_Key, range]:
    """The events of each block of one trace, in order."""
    spots = [(r, u, o) for r, count in enumerate(units) for u in range(count) for o in range(regions[r].period)]
    blocks: dict[_Key, range] = {}
    start = 0
    for end in range(1, len(places) + 1):
        if end < len(places) and places[end][:3] == places[start][:3]:
            continue
        phase, micro_batch, layer, _ = places[start]
        events = range(start, end)
        if phase == "optimizer":  # as many operations as parameters; its highest one is the same in every model
            highest = max(events, key=live.__getitem__)
            events = range(highest, highest + 1)
        key = _Key(phase, micro_batch, None if layer is None else spots[layer], 0)
        while key in blocks:
            key = key._replace(nth=key.nth + 1)
        blocks[key] = events
        start = end
    return blocks


Terms = list[tuple[int, int, int]]  # as in Sum


@dataclass(frozen=True)
class _Traces:
    """The blocks of every shallow model: the first is the base, each further one has one unit more of one region."""

    regions: Sequence[Region]
    units: Sequence[int]  # of each region in the base
    stretched: Sequence[int]  # the region that each further model has one unit more of
    blocks: Sequence[dict[_Key, range]]

    @property
    def base(self) -> dict[_Key, range]:
        return self.blocks[0]

    def alike(self) -> bool:
        """Whether all models have the same operations, layer for layer."""
        for own, blocks in enumerate(self.blocks):
            more = {key for key in blocks if own and key.spot and key.spot[:2] == (self.stretched[own - 1], KEPT)}
            twin = {key: key._replace(spot=(key.spot[0], KEPT - 1, key.spot[2])) for key in more if key.spot}
            if blocks.keys() - more != self.base.keys() or not self.base.keys() >= set(twin.values()):
                return False
            if any(len(events) != len(self.base[twin.get(key, key)]) for key, events in blocks.items()):
                return False
        return True

    def across(self, key: _Key, own: int | None) -> Terms:
        """The sum for a block; how deep region `own` is, is left to the caller."""
        terms = [(0, self.base[key].start, 1)]
        for trace, region in enumerate(self.stretched, 1):
            if region != own:
                more = self.regions[region].units - self.units[region]
                terms += [(trace, self.blocks[trace][key].start, more), (0, self.base[key].start, -more)]
        return terms

    def of_unit(self, key: _Key, unit: int) -> Terms:
        """The sum for a block of one unit of a stretched region; `key` is the block's in the base."""
        assert key.spot is not None
        region, near, offset = key.spot
        own, more = self.stretched.index(region) + 1, self.regions[region].units - KEPT
        last = near == KEPT - 1
        deeper = self.blocks[own][key._replace(spot=(region, KEPT if last else near, offset))].start
        terms = [*self.across(key, region), (0, self.base[key].start, -more), (own, deeper, more)]
        if near == 1:  # a middle unit: unit - 1 further along than the first of them
            beside = self.blocks[own][key._replace(spot=(region, 2, offset))].start
            terms += [(own, beside, unit - 1), (own, deeper, 1 - unit)]
        return terms

    def once(self, key: _Key) -> Stretch:
        """A block that the deep model has once, as the base has it."""
        layer = None
        if key.spot is not None:
            region = self.regions[key.spot[0]]
            layer = region.first + key.spot[1] * region.period + key.spot[2]
        return self._stretch(key, layer, self.across(key, None))

    def repeated(self, first: _Key) -> Iterator[tuple[_Key, Stretch]]:
        """All blocks of a stretched region in the deep model's order, each with the base's that it is like."""
        assert first.spot is not None
        region = self.regions[first.spot[0]]
        step = -1 if first.spot[1] > 0 else 1  # the backward pass meets the last layer first
        for unit in range(region.units)[::step]:
            near = 0 if unit == 0 else KEPT - 1 if unit == region.units - 1 else 1
            for offset in range(region.period)[::step]:
                key = first._replace(spot=(first.spot[0], near, offset))
                layer = region.first + unit * region.period + offset
                yield key, self._stretch(key, layer, self.of_unit(key, unit))

    def _stretch(self, key: _Key, layer: int | None, terms: Terms) -> Stretch:
        return Stretch(layer, self.base[key].start, len(self.base[key]), tuple(terms))


def deepen(
    regions: Sequence[Region], models: Sequence[Sequence[int]], traces: Sequence[Sequence[Place]],
    live: Sequence[Sequence[int]],
) -> list[Stretch] | None:  # fmt: skip
    """Every operation of the deep model in order, with its bytes as a sum over the traces of `models`.

    None where the traces do not have the same operations, layer for layer: then only the deep model itself tells.
    """
    stretched = [next(r for r, count in enumerate(units) if count > models[0][r]) for units in models[1:]]
    blocks = [_blocks(regions, *args) for args in zip(models, traces, live, strict=True)]
    found = _Traces(regions, models[0], stretched, blocks)
    if not found.alike():
        return None
    result: list[Stretch] = []
    done: set[_Key] = set()
    for key in found.base:
        if key in done:
            continue
        if key.spot is None or key.spot[0] not in stretched:
            result.append(found.once(key))
            continue
        for like, stretch in found.repeated(key):
            done.add(like)
            result.append(stretch)
    return result


def whole(places: Sequence[Place]) -> list[Stretch]:
    """A trace of the deep model itself, in the same form."""
    starts = [n for n, place in enumerate(places) if n == 0 or place[:3] != places[n - 1][:3]]
    ends = [*starts[1:], len(places)]
    return [Stretch(places[a].layer, a, b - a, ((0, a, 1),)) for a, b in zip(starts, ends, strict=True)]


def live_bytes(stretch: Stretch, live: Sequence[Sequence[int]]) -> list[int]:
    """What is alive at each operation of a stretch, from what was at each event of each trace."""
    total = [0] * stretch.length
    for trace, first, factor in stretch.terms:
        total = [a + factor * b for a, b in zip(total, live[trace][first : first + stretch.length], strict=True)]
    return total
