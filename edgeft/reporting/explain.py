"""What else did a plan look at, and what would that cost?"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from edgeft.planning.plan import Plan
from edgeft.reporting.terminal import new_table
from edgeft.units import show_bytes, show_seconds


def explain_text(plan: Plan) -> RenderableType:
    """What else was looked at: the chosen candidate with one choice changed, and the smallest of each quality."""
    changed = new_table("instead", "", "peak", "more memory", "more time", "quality given up", "fits",
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
    best = new_table("quality given up", "peak", "time a step", "fits", "way", title="the smallest of each quality")
    for row in plan.frontier:
        rank = f" rank {row.rank}" if row.rank else ""
        way = f"{row.tuner}{rank}, {row.base_precision}, {row.layers} {row.trained} layers, {row.optimizer}"
        chosen = row.high_bytes == plan.peak_bytes
        best.add_row(
            f"{row.quality_cost:.1f}",
            show_bytes(row.high_bytes),
            show_seconds(row.seconds_per_step),
            "chosen" if chosen else "yes" if row.fits else "no",
            Text(way, justify="left"),
        )
    return Group(changed, best)
