"""How does bench/results/methods.json look? A line a way: exact match at each size, memory, seconds of a step."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compared.evidence import grouped
from compared.ways import CHOSEN_AT, METHODS, REFERENCE, split, ways
from edgeft.reporting.palette import BLUE, GREEN, GREY, ORANGE, SLATE
from edgeft.reporting.sweep_charts import figure

PALE, BAND = "#e3e7ec", "#f1f4f7"
SIZES = {100: (GREEN, "s"), 1000: (BLUE, "o"), 6000: (ORANGE, "D")}
MIB = 2**20


def plot(result: Mapping[str, Any], out: Path) -> None:
    """Draw what there is: the ways of a tuner together, tuners in the order of their best."""
    runs = grouped(result["rows"])
    names = in_order(runs)
    seconds = {row["way"]: row["seconds_per_step"] for row in result.get("time", {}).get("rows", ())}
    widths = (4.2, 1.5, 1.5) if seconds else (4.2, 1.5)
    with figure(out, 10.5 if seconds else 9, 1.6 + 0.235 * len(names)) as made:
        match, memory, *more = made.subplots(1, len(widths), width_ratios=widths, sharey=True)
        draw_match(match, names, runs)
        for axes in (match, memory, *more):
            bands(axes, names)
            axes.set_ylim(len(names) - 0.4, -0.6)
        peaks = {
            way: max(run["train_peak_bytes"] for run in runs[way, CHOSEN_AT]) / MIB
            for way in names if (way, CHOSEN_AT) in runs
        }  # fmt: skip
        bars(memory, names, peaks, "training peak, MiB")
        if more:
            bars(more[0], names, {way: each["median"] for way, each in seconds.items()}, "a step, seconds")


def in_order(runs: Mapping[tuple[str, int], Any]) -> list[str]:
    """The ways that have run, those of one tuner one below another."""
    there = [way for way in ways() if any(name == way for name, _ in runs)]

    def best(method: str) -> float:
        own = [score(runs[way, CHOSEN_AT]) for way in there if split(way)[0] == method and (way, CHOSEN_AT) in runs]
        return -max(own, default=0.0)

    methods = sorted(METHODS, key=best)
    return sorted(there, key=lambda way: (methods.index(split(way)[0]), there.index(way)))


def score(own: list[Mapping[str, Any]]) -> float:
    return statistics.fmean(100 * run["test"]["exact_match"] for run in own)


def bands(axes: Any, names: list[str]) -> None:
    """A pale band behind every second tuner."""
    methods = list(dict.fromkeys(split(way)[0] for way in names))
    for place, way in enumerate(names):
        if methods.index(split(way)[0]) % 2 == 0:
            axes.axhspan(place - 0.5, place + 0.5, color=BAND, linewidth=0, zorder=0)


def draw_match(axes: Any, names: list[str], runs: Mapping[tuple[str, int], list[Mapping[str, Any]]]) -> None:
    """Exact match with its interval; rings: the seeds of a way that ran with several."""
    for nth, (size, (colour, mark)) in enumerate(SIZES.items()):
        own = {way: runs[way, size] for way in names if (way, size) in runs}
        if not own:
            continue
        places = [names.index(way) + 0.24 * (nth - 1) for way in own]
        found = [score(each) for each in own.values()]
        reach = [[abs(100 * each[0]["exact_match_interval"][end] - 100 * each[0]["test"]["exact_match"])
                  for each in own.values()] for end in (0, 1)]  # fmt: skip
        axes.errorbar(
            found, places, xerr=reach, fmt=mark, color=colour, markersize=3.6, elinewidth=0.9, label=f"{size:,} rows"
        )
        rings = [(100 * run["test"]["exact_match"], place) for place, each in zip(places, own.values(), strict=True)
                 for run in each if len(each) > 1]  # fmt: skip
        if rings:
            axes.plot(*zip(*rings, strict=True), mark, color=colour, fillstyle="none", markersize=2.6,
                      markeredgewidth=0.6, linestyle="none")  # fmt: skip
        if size == CHOSEN_AT and (REFERENCE, size) in runs:
            axes.axvline(score(runs[REFERENCE, size]), color=GREY, linewidth=0.8, linestyle=":", zorder=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("exact match on 1,000 test rows, % (95% interval; rings: seeds)")
    axes.grid(axis="x", color=PALE, linewidth=0.8)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(SIZES), fontsize=8)


def bars(axes: Any, names: list[str], values: Mapping[str, float], label: str) -> None:
    """One bar a way, its number behind it."""
    for way, value in values.items():
        axes.barh(names.index(way), value, height=0.55, color=SLATE)
        axes.text(value, names.index(way), f" {value:.3g}" if value < 100 else f" {value:.0f}", va="center", fontsize=7)
    axes.set_xlim(0, 1.25 * max(values.values(), default=1.0))
    axes.set_xlabel(label)
    axes.tick_params(axis="y", length=0)
