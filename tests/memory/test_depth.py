"""Shallow models' operations put together: against models whose bytes follow a known formula."""

from __future__ import annotations

import pytest

from edgeft.memory.depth import Place, deepen, find_regions, kept_layers, live_bytes, shallow_models, weights_of, whole


def step(kinds: str) -> tuple[list[Place], list[int]]:
    """A step of made-up layers: capitals train; a letter's weight, activations and gradient have their own sizes."""
    size = {kind: 7 + ord(kind.lower()) for kind in set(kinds)}
    trains = {kind: kind.isupper() for kind in set(kinds)}
    weights = sum(100 * size[kind] for kind in kinds)
    places, live, kept, gradients = [Place("forward", 0, None, "embedding")], [weights], 0, 0
    for layer, kind in enumerate(kinds):
        for n, part in enumerate(("attention", "attention", "mlp")):
            kept += n * size[kind] * trains[kind]
            places.append(Place("forward", 0, layer, part))
            live.append(weights + kept + 5 * n)
    places.append(Place("forward", 0, None, "loss"))
    live.append(weights + kept + 40)
    for layer in reversed(range(len(kinds))):
        for n, part in enumerate(("mlp", "attention")):
            places.append(Place("backward", 0, layer, part))
            live.append(weights + kept + gradients + 50 - 20 * n)
        kept -= 3 * size[kinds[layer]] * trains[kinds[layer]]
        gradients += 11 * size[kinds[layer]] * trains[kinds[layer]]
    for n in range(len(kinds)):  # as many as there are parameters
        places.append(Place("optimizer", 0, None, "optimizer"))
        live.append(weights + gradients + n + 1)
    return places, live


@pytest.mark.parametrize("kinds", ["A" * 12, "a" * 9 + "B" * 7, "AB" * 9, "aab" * 8 + "C" * 6, "xA" + "A" * 9 + "y"])
def test_the_deep_step_is_found_operation_by_operation(kinds: str) -> None:
    regions = find_regions(kinds)
    models = shallow_models(regions)
    shallow = ["".join(kinds[layer] for layer in kept_layers(regions, units)) for units in models]
    assert sum(map(len, shallow)) < 2 * len(kinds)
    traces, live = zip(*map(step, shallow), strict=True)
    stretches = deepen(regions, models, traces, live)
    assert stretches is not None
    got = [(s.layer, size) for s in stretches for size in live_bytes(s, live)]
    places, sizes = step(kinds)
    highest = max(size for place, size in zip(places, sizes, strict=True) if place.phase == "optimizer")
    want = [(place.layer, size) for place, size in zip(places, sizes, strict=True) if place.phase != "optimizer"]
    assert got == [*want, (None, highest)]
    parts = [traces[0][s.first + n].part for s in stretches for n in range(s.length)]
    assert parts[:-1] == [place.part for place in places if place.phase != "optimizer"]
    first = [trace[0] for trace in live]
    assert sum(a * b for a, b in zip(weights_of(regions, models), first, strict=True)) == sizes[0]


def test_a_trace_of_the_deep_model_is_itself() -> None:
    places, live = step("aBBc")
    got = [(s.layer, size) for s in whole(places) for size in live_bytes(s, [live])]
    assert got == [(place.layer, size) for place, size in zip(places, live, strict=True)]


def test_repeats_are_found_whole() -> None:
    assert [(r.first, r.period, r.units) for r in find_regions("aaaaaa")] == [(0, 1, 6)]
    assert [(r.first, r.period, r.units) for r in find_regions("abababababa")] == [(0, 2, 5), (10, 1, 1)]
    assert [r.units for r in find_regions("aabb")] == [1, 1, 1, 1]


def test_other_operations_in_a_deeper_model_give_no_answer() -> None:
    regions = find_regions("A" * 8)
    models = shallow_models(regions)
    traces, live = zip(*(step("A" * sum(units)) for units in models), strict=True)
    odd = [*traces[1][:3], Place("forward", 0, None, "surprise"), *traces[1][3:]]
    assert deepen(regions, models, [traces[0], odd], [live[0], [*live[1], 0]]) is None
    longer = [*traces[1][:3], traces[1][2], *traces[1][3:]]
    assert deepen(regions, models, [traces[0], longer], [live[0], [*live[1], 0]]) is None
