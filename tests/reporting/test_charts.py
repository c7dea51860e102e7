"""Do the figures show the numbers they are given, the same bytes every time, and nothing from outside?"""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import pytest
from tiny import CONFIGS

from edgeft.memory.simulated import Moment
from edgeft.memory.train_step import Term
from edgeft.planning.plan import make_plan
from edgeft.reporting import charts
from edgeft.reporting.matrix import find_profiles, make_matrix
from edgeft.reporting.read_run import Run
from edgeft.reporting.summary import Option, Stage, Summary, summarise
from edgeft.settings.job import make_job
from edgeft.units import GIB


def stage(name: str, sizes: dict[str, float], limit: float | None = 10, measured: int | None = None) -> Stage:
    terms = tuple(Term(name=term, bytes=int(size * GIB), formula="") for term, size in sizes.items())
    total = sum(term.bytes for term in terms)
    return Stage(
        name=name, where="device", terms=terms, low_bytes=total, expected_bytes=total, high_bytes=total + GIB // 4,
        limit_bytes=None if limit is None else int(limit * GIB), measured_bytes=measured,
    )  # fmt: skip


STAGES = (stage("load", {"weights": 4}), stage("train", {"weights": 4, "adapters": 1, "made up": 2, "height: loss": 1}))
MOMENTS = [Moment(phase="forward", name=f"layer {i}", live_bytes=(5 + i) * GIB) for i in range(3)] + [
    Moment(phase="backward", name="loss", live_bytes=9 * GIB),
    Moment(phase="optimizer", name="step", live_bytes=4 * GIB),
]


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarise(Run(make_plan(make_job(model=str(CONFIGS / "llama-3.1-8b"), profile="t4"))))


@pytest.fixture(scope="module")
def drawings(summary: Summary) -> dict[str, Callable[[], str]]:
    matrix = make_matrix([("smol", str(CONFIGS / "smollm2-135m"))], find_profiles("cpu-8gb,t4"))
    return {
        "memory": lambda: charts.memory_bars(summary.stages),
        "later": lambda: charts.memory_bars(summary.later_stages, "later"),
        "frontier": lambda: charts.frontier(summary.options, summary.budget_bytes),
        "timeline": lambda: charts.timeline(MOMENTS, 10 * GIB),
        "loss": lambda: charts.loss_curve([(1, 3.0), (2, 2.5), (3, 2.0)]),
        "reach": lambda: charts.reach(matrix),
    }


def texts(svg: str) -> list[str]:
    return [" ".join("".join(node.itertext()).split()) for node in ElementTree.fromstring(svg).iter("text")]


def rectangles(svg: str, colour: str) -> list[tuple[float, float]]:
    """(left, width) of every filled path of that colour, in points."""
    found = []
    for node in ElementTree.fromstring(svg).iter("path"):
        if f"fill: {colour}" in node.get("style", ""):
            across = [float(x) for x, _ in re.findall(r"[ML] ([\d.]+) ([\d.]+)", node.get("d", ""))]
            found.append((min(across), max(across) - min(across)))
    return found


def test_segments_of_a_bar_touch_and_add_up_to_what_is_expected(summary: Summary) -> None:
    for found in (*summary.stages, *summary.later_stages):
        pieces = charts.segments(found)
        assert pieces[0].start == 0
        assert all(a.start + a.length == b.start for a, b in itertools.pairwise(pieces))
        assert pieces[-1].start + pieces[-1].length == found.expected_bytes


def test_bars_are_drawn_as_long_as_the_terms_are_large() -> None:
    svg = charts.memory_bars(STAGES)
    [(left, width), (other, same)] = rectangles(svg, charts.COLOURS["weights"])[:2]
    assert (left, width) == pytest.approx((other, same))
    start, adapters = rectangles(svg, charts.COLOURS["adapters"])[0]
    assert start == pytest.approx(left + width, abs=0.01)
    assert adapters == pytest.approx(width / 4, rel=1e-3)
    assert rectangles(svg, charts.OTHERS[0])[0][1] == pytest.approx(width / 2, rel=1e-3)


def test_bars_name_their_numbers() -> None:
    found = texts(charts.memory_bars((stage("train", {"weights": 4}, measured=3 * GIB),)))
    for text in (
        "expected 4.00 GiB, high 4.25 GiB, measured 3.00 GiB",
        "limit 10.0 GiB",
        "Training",
        "GiB",
        "measured",
    ):
        assert text in found
    assert {"weights", "4.00 GiB"} <= set(found)


def test_limits_of_different_memories_are_drawn_apart_and_far_ones_at_the_edge() -> None:
    found = texts(charts.memory_bars((stage("merge", {"blocks": 5}, 8), stage("bundle", {"weights": 4}, 6))))
    assert {"limit 8.00 GiB", "limit 6.00 GiB"} <= set(found)
    found = texts(charts.memory_bars((stage("merge", {"blocks": 1}, 100), stage("bundle", {"weights": 1}, None))))
    assert [text for text in found if text.startswith("limit")] == ["limit 100 GiB \N{RIGHTWARDS ARROW}"]


def test_a_term_has_one_colour_in_every_figure_and_strangers_differ() -> None:
    names = ["weights", "height: loss", "height: top layer", "a", "b", "activations"]
    found = charts.colours(names)
    assert found["height: loss"] == found["height: top layer"] == charts.COLOURS["height"]
    assert charts.colours(["activations", "weights"])["weights"] == found["weights"]
    assert found["a"] != found["b"] and not {found["a"], found["b"]} & set(charts.COLOURS.values())
    assert charts.plain("height: loss") == "temporary (loss)" and charts.plain("weights") == "weights"


def test_terms_of_every_stage_have_a_colour_of_their_own(summary: Summary) -> None:
    for found in (*summary.stages, *summary.later_stages):
        for term in found.terms:
            assert term.name.partition(": ")[0] in charts.COLOURS, term.name


def test_the_timeline_names_its_highest_moment_and_its_phases() -> None:
    found = texts(charts.timeline(MOMENTS, 10 * GIB))
    assert "backward: loss, 9.00 GiB" in found
    assert {"forward", "backward", "optimizer", "limit 10.0 GiB"} <= set(found)
    assert not any("limit" in text for text in texts(charts.timeline(MOMENTS, 100 * GIB)))


def test_the_frontier_names_each_way_and_marks_the_chosen_one(summary: Summary) -> None:
    svg = charts.frontier(summary.options, summary.budget_bytes)
    [chosen] = [option for option in summary.options if option.chosen]
    assert chosen.text in texts(svg) and svg.count("e8a33d") == 1  # one star
    bold = [" ".join("".join(n.itertext()).split()) for n in ElementTree.fromstring(svg).iter("text")
            if "font-weight: 700" in n.get("style", "")]  # fmt: skip
    assert chosen.text in bold


def test_ways_that_a_picture_cannot_tell_apart_are_drawn_once() -> None:
    def option(gib: float, chosen: bool = False) -> Option:
        return Option(
            text=f"{gib}", quality_cost=10 - gib, high_bytes=int(gib * GIB), seconds_per_step=1, fits=True,
            chosen=chosen,
        )  # fmt: skip

    found = texts(charts.frontier([option(9), option(8.9), option(7, True), option(6.95), option(5)], 10 * GIB))
    assert [text for text in found if re.fullmatch(r"\d(\.\d+)?", text) and text in ("9", "8.9", "7", "6.95", "5")]
    assert {"9", "7", "5"} <= set(found) and not {"8.9", "6.95"} & set(found)


def test_figures_are_the_same_bytes_whatever_the_users_style(drawings: dict[str, Callable[[], str]]) -> None:
    import matplotlib

    first = {name: draw() for name, draw in drawings.items()}
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": "other", "axes.facecolor": "red"}):
        second = {name: draw() for name, draw in drawings.items()}
        assert matplotlib.rcParams["font.size"] == 20
    assert first == second


def test_figures_stand_on_their_own(drawings: dict[str, Callable[[], str]]) -> None:
    """Well-formed, no address, no script, ids that no other figure of a page has, references that lead to them."""
    seen: set[str] = set()
    for name, draw in drawings.items():
        svg = draw()
        root = ElementTree.fromstring(svg)
        assert "http" not in svg and "<script" not in svg and "<style" not in svg and "<!--" not in svg
        ids = [node.get("id", "") for node in root.iter() if node.get("id")]
        assert all(found.startswith(f"{name}-") for found in ids) and len(ids) == len(set(ids))
        assert not seen & set(ids)
        seen |= set(ids)
        used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
        assert used <= set(ids)


def test_names_from_outside_stay_text() -> None:
    hostile = "<script>$\\alpha$</script>&amp;"
    assert hostile in texts(charts.memory_bars((stage(hostile, {hostile: 4}),)))


def test_small_runs_are_drawn_in_mebibytes() -> None:
    assert charts.unit_of(1.4 * GIB) == (2**20, "MiB") and charts.unit_of(1.6 * GIB) == (GIB, "GiB")
