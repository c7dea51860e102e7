"""What else did a plan look at, and what would that cost?"""

from __future__ import annotations

from rich.console import Group, RenderableType

from edgeft.planning.alternatives import describe
from edgeft.planning.other_tuners import Points
from edgeft.planning.plan import Plan
from edgeft.reporting.tables import Line, ScreenTable
from edgeft.settings.tuners import TUNERS
from edgeft.units import show_bytes, show_count, show_seconds


def explain_text(plan: Plan) -> RenderableType:
    """What else was looked at: one choice changed, the smallest of each quality, other tuners."""
    changed = ScreenTable("instead", "", "peak", "more memory", "more time", "quality given up", "fits",
                     title=f"{plan.looked_at} candidates; the chosen one with one choice changed")  # fmt: skip
    last = ""
    for other in plan.alternatives:
        time = 100 * other.more_seconds_per_step / plan.seconds_per_step if plan.seconds_per_step else 0.0
        changed.add_row(
            "" if other.setting == last else other.setting,
            other.value,
            show_bytes(other.high_bytes),
            f"{'+' if other.more_bytes >= 0 else ''}{show_bytes(other.more_bytes)}",
            f"{time:+.0f}%",
            f"{other.more_quality_cost:+.1f}",
            "yes" if other.fits else "no",
        )
        last = other.setting
    best = ScreenTable("quality given up", "peak", "time a step", "fits", "way", title="the smallest of each quality",
                       prose=["way"])  # fmt: skip
    for row in plan.frontier:
        rank = f" rank {row.rank}" if row.rank else ""
        way = f"{row.tuner}{rank}, {row.base_precision}, {row.layers} {row.trained} layers, {row.optimizer}"
        chosen = row.high_bytes == plan.peak_bytes
        best.add_row(
            f"{row.quality_cost:.1f}",
            show_bytes(row.high_bytes),
            show_seconds(row.seconds_per_step),
            "chosen" if chosen else "yes" if row.fits else "no",
            way,
        )
    return Group(changed, best, *tuners_text(plan))


def tuners_text(plan: Plan) -> list[RenderableType]:
    """The planned tuner and every other in its place: what it takes, what was measured of it, how far that reaches."""
    if not plan.tuners:
        return []
    own, which = plan.tuners[0], describe(plan.training, "layers")
    columns = ("tuner", "peak", "more time", "fits", "ships", "exact match, measured", "to LoRA in all layers", "why")
    title = f"other tuners in the same layers ({which}), all else as planned"
    table = ScreenTable(*columns, title=title, prose=["why"], below={"why": ""})
    for row in plan.tuners:
        name = TUNERS[row.tuner].title
        if row.refused:
            table.add_row(name, "-", "-", "no", "-", "-", "-", row.refused)
            continue
        table.add_row(
            name,
            show_bytes(row.high_bytes),
            "planned" if row is own else f"{100 * row.more_seconds_per_step / plan.seconds_per_step:+.0f}%",
            "yes" if row.fits else "no",
            "in the weights" if row.folds else "beside them",
            *_measured(row.measured),
        )
    seen = sorted({row.measured.measured_on for row in plan.tuners if row.measured})
    lines = [f"measured on: {each}" for each in seen]
    job = f"{show_count(plan.spec.total_parameters)} parameters, {_rows(plan)}"
    lines += [
        f"this job: {job}; another task or model may order tuners otherwise",
        "points with 95% intervals of test rows and seeds; noise: no difference is shown, and none is counted",
    ]
    return [table, *(Line(line, "  ") for line in lines)]


def _measured(points: Points | None) -> tuple[str, str]:
    if points is None:
        return "never", ""
    score = f"{points.score:.1f}%, {points.rows:,} rows" if points.score is not None else f"{points.rows:,} rows"
    if points.points is None:
        return score, "is that"
    by = points.points
    noise = "" if points.shown else ", noise"
    return score, f"{by.difference:+.1f} [{by.low:+.1f}, {by.high:+.1f}]{noise}"


def _rows(plan: Plan) -> str:
    return f"{plan.lengths.rows:,} rows" if plan.lengths else "no data named"
