"""Do bars and curves lie where their numbers are, and can their colours be told apart by every eye?"""

from __future__ import annotations

import itertools
import re

import pytest
from reports import plan_summary
from tiny import CONFIGS, ROOT

from edgeft.memory.simulated import Moment
from edgeft.memory.train_step import Term
from edgeft.planning.plan import make_plan
from edgeft.reporting import bars, charts, palette
from edgeft.reporting.read_run import Run
from edgeft.reporting.summary import Option, Stage, Summary, summarise
from edgeft.settings.job import make_job
from edgeft.units import GIB


def stage(name: str, sizes: dict[str, float], limit: float | None = 10, measured: int | None = None,
          where: str = "device") -> Stage:  # fmt: skip
    terms = tuple(Term(name=term, bytes=int(size * GIB), formula="") for term, size in sizes.items())
    total = sum(term.bytes for term in terms)
    return Stage(
        name=name, where=where, terms=terms, low_bytes=total, expected_bytes=total, high_bytes=total + GIB // 4,
        limit_bytes=None if limit is None else int(limit * GIB), measured_bytes=measured,
    )  # fmt: skip


STAGES = (stage("load", {"weights": 4}), stage("train", {"weights": 4, "adapters": 1, "made up": 2, "height: loss": 1}))
MOMENTS = [Moment(phase="forward", name=f"layer {i}", live_bytes=(5 + i) * GIB) for i in range(3)] + [
    Moment(phase="backward", name="loss", live_bytes=9 * GIB),
    Moment(phase="optimizer", name="step", live_bytes=4 * GIB),
]


@pytest.fixture(scope="module")
def summary() -> Summary:
    return plan_summary()


def test_segments_of_a_bar_touch_and_add_up_to_what_is_expected(summary: Summary) -> None:
    for found in (*summary.stages, *summary.later_stages):
        pieces = bars.segments(found)
        assert pieces[0].start == 0
        assert all(a.start + a.length == b.start for a, b in itertools.pairwise(pieces))
        assert pieces[-1].start + pieces[-1].length == found.expected_bytes


def test_bars_are_drawn_as_long_as_the_terms_are_large() -> None:
    [group] = bars.groups(STAGES, {})
    load, train = group.bars
    assert load.limit is not None and load.pieces[0].width == train.pieces[0].width == pytest.approx(
        0.4 * load.limit, abs=0.02
    )
    weights, adapters, other, loss = train.pieces
    assert adapters.left == pytest.approx(weights.width, abs=0.02)
    assert adapters.width == pytest.approx(weights.width / 4, abs=0.02)
    assert other.width == pytest.approx(weights.width / 2, abs=0.02)
    assert train.expected == pytest.approx(loss.left + loss.width, abs=0.02)
    assert train.high == pytest.approx(train.expected + weights.width / 16, abs=0.02)


def test_bars_name_their_numbers() -> None:
    [group] = bars.groups((stage("train", {"weights": 4}, measured=3 * GIB),), {"device": "On the GPU"})
    [bar] = group.bars
    assert (group.where, bar.title) == ("On the GPU", "Training")
    assert bar.said == "4.00 GiB expected, 4.25 GiB at most of 10.0 GiB, 3.00 GiB measured"
    assert (bar.pieces[0].name, bar.pieces[0].size, bar.pieces[0].room) == ("weights", "4.00 GiB", "always")
    assert bar.measured == pytest.approx(0.75 * bar.expected, abs=0.02) and not bar.over


def test_memories_of_different_machines_have_scales_of_their_own() -> None:
    later = (stage("merge", {"blocks": 5}, 8, where="host"), stage("export: build", {"builder": 58}, 16, where="host"),
             stage("bundle", {"weights": 4}, 6, where="target"))  # fmt: skip
    host, target = bars.groups(later, {"host": "here", "target": "there"})
    assert (host.where, target.where) == ("here", "there")
    assert [bar.limit is not None for bar in (*host.bars, *target.bars)] == [True] * 3
    assert target.bars[0].pieces[0].width > 60 > 10 > host.bars[0].pieces[0].width
    assert [bar.over for bar in host.bars] == [False, True]


def test_a_limit_far_beyond_is_written_alone() -> None:
    [group] = bars.groups((stage("merge", {"blocks": 1}, 100),), {})
    assert group.bars[0].limit is None and "of 100 GiB" in group.bars[0].said


def test_pages_of_a_file_do_not_count_against_a_limit() -> None:
    assert not stage("resume", {"weight file": 6, "weights": 5}, 8).over
    assert stage("resume", {"weights": 11}, 8).over and "a file's pages" in bars.said(stage("x", {"weight file": 1}))


def test_a_term_has_one_family_everywhere_and_every_term_of_a_plan_is_known(summary: Summary) -> None:
    assert palette.family("height: loss") == palette.family("height: top layer") == "temporary"
    assert palette.family("made up") == "other"
    assert palette.families(["logits", "weights", "rounding"]) == ["weights", "temporary"]
    assert bars.plain("height: loss") == "temporary (loss)" and bars.plain("weights") == "weights"
    full = summarise(Run(make_plan(make_job(model=str(CONFIGS / "gpt2"), profile="cpu-16gb", tuner="full"))))
    for found in (*summary.stages, *summary.later_stages, *full.stages, *full.later_stages):
        for term in found.terms:
            assert term.name.partition(": ")[0] in palette.FAMILY_OF, term.name


# Linear RGB as people without one kind of cones see it (Machado, Oliveira and Fernandes, 2009)
BLIND = {
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def lab(colour: str, kind: str = "") -> tuple[float, float, float]:
    """CIE L*a*b* of #rrggbb, as it is or as somebody sees it who is blind to a colour."""
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    rgb = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    if kind:
        rgb = [min(1.0, max(0.0, sum(a * b for a, b in zip(row, rgb, strict=True)))) for row in BLIND[kind]]
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    xyz = [
        sum(a * b for a, b in zip(row, rgb, strict=True)) / w for row, w in zip(rows, (0.9505, 1, 1.089), strict=True)
    ]
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def apart(one: str, other: str, kind: str = "") -> float:
    return sum((a - b) ** 2 for a, b in zip(lab(one, kind), lab(other, kind), strict=True)) ** 0.5


COLOURS = [look.colour for look in palette.FAMILIES.values()]
GREY = "#8a94a0"  # as bright as the purple: for one man in twenty the same colour


@pytest.mark.parametrize("kind", ["", *BLIND])
def test_families_are_told_apart_by_every_eye(kind: str) -> None:
    assert min(apart(a, b, kind) for a, b in itertools.combinations(COLOURS, 2)) > 15
    if kind in ("deutan", "protan"):
        assert min(apart(GREY, other, kind) for other in COLOURS) < 15  # what the check is for


def test_the_page_draws_families_in_their_colours() -> None:
    style = (ROOT / "edgeft" / "reporting" / "templates" / "page.html.j2").read_text(encoding="utf-8")
    outline = f".seg.files, .swatch.files {{ background: transparent; box-shadow: inset 0 0 0 2px {palette.SKY}; "
    assert outline + "color: var(--ink); }" in style and palette.FAMILIES["files"].colour == palette.SKY
    for name, look in palette.FAMILIES.items():
        if name == "files":
            continue  # the system takes them back: an outline, written on as on the page
        found = re.search(
            rf"\.swatch\.{name} {{ background: ([^;]*(#[0-9a-f]{{6}})[^;]*); color: (#[0-9a-f]+); }}", style
        )
        assert found is not None and found[2] != "" and look.colour in found[1], name
        assert found[3] in (look.text, f"#{look.text[1::2]}")


def test_what_is_written_on_a_segment_can_be_read() -> None:
    for look in palette.FAMILIES.values():
        assert palette.contrast(look.colour, look.text) >= 4.5, look
    assert palette.contrast("#000000", "#ffffff") == pytest.approx(21) and palette.contrast("#777777", "#777777") == 1
    assert len(set(palette.SERIES)) == len(set(palette.MARKERS)) == len(palette.LINES) == 8


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_the_timeline_lies_where_its_moments_are() -> None:
    drawn = charts.timeline(MOMENTS, 10 * GIB)
    heights = [y for _, y in points(drawn.line)[::2]]
    assert heights == pytest.approx([100 * (1 - gib / 11) for gib in (5, 6, 7, 9, 4)], abs=0.01)
    assert points(drawn.line)[-1][0] == 1000 and drawn.area.endswith("Z")
    assert drawn.dots == (pytest.approx((70, 100 * (1 - 9 / 11)), abs=0.01),)
    assert [tick.text for tick in drawn.ticks] == ["forward", "backward", "optimizer"]
    assert charts.peak_of(MOMENTS) == "backward: loss"
    assert [level.text for level in drawn.levels] == ["limit 10.0 GiB"]  # the peak's own name would lie over it
    assert [level.limit for level in charts.timeline(MOMENTS, 20 * GIB).levels] == [True, False]
    assert [level.text for level in charts.timeline(MOMENTS, 100 * GIB).levels] == ["9.00 GiB"]


def test_a_loss_curve_ends_at_its_last_step() -> None:
    drawn = charts.loss_curve([(1, 3.0), (2, 2.5), (4, 1.0)])
    assert points(drawn.line) == [(250, pytest.approx(9.09)), (500, pytest.approx(24.24)), (1000, pytest.approx(69.7))]
    assert [tick.text for tick in drawn.ticks] == ["step 0", "step 4"]
    assert [level.text for level in drawn.levels] == ["3.00", "1.000"]


def test_the_frontier_marks_the_chosen_way_and_the_limit(summary: Summary) -> None:
    rows = charts.frontier(summary.options, summary.budget_bytes)
    [chosen] = [row for row in rows if row.option.chosen]
    assert chosen.option.high_bytes == summary.peak_bytes
    for row in rows:
        assert row.limit is not None and (row.share <= row.limit) == row.option.fits


def test_ways_that_a_picture_cannot_tell_apart_are_drawn_once() -> None:
    def option(gib: float, chosen: bool = False) -> Option:
        return Option(
            text=f"{gib}", quality_cost=10 - gib, high_bytes=int(gib * GIB), seconds_per_step=1, fits=True,
            chosen=chosen,
        )  # fmt: skip

    found = charts.told_apart([option(9), option(8.9), option(7, True), option(6.95), option(5)])
    assert [row.text for row in found] == ["9", "7", "5"]
