"""Where does each line and mark of a chart lie? In percent of its plane, for a page that draws with HTML and paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edgeft.memory.simulated import Moment
from edgeft.reporting.bars import FAR
from edgeft.reporting.summary import Option
from edgeft.units import show_bytes

ACROSS, UP = 1000, 100  # units of a plane, which is stretched to the page's width


class Level(NamedTuple):
    """A horizontal line of a chart with its name, in percent from the top."""

    top: float
    text: str
    limit: bool = False


class Tick(NamedTuple):
    """A name under a chart, in percent from the left; `last`: it ends there."""

    left: float
    text: str
    last: bool = False


class Curve(NamedTuple):
    """A line over its steps: the path, what lies below it, its levels, the names under it, points of their own."""

    line: str
    area: str
    levels: tuple[Level, ...]
    ticks: tuple[Tick, ...]
    dots: tuple[tuple[float, float], ...] = ()  # from left, from top


class Way(NamedTuple):
    """An option with the share of the row that its memory takes, and where the limit lies."""

    option: Option
    share: float
    limit: float | None


def timeline(moments: Sequence[Moment], budget_bytes: int) -> Curve:
    """Live tensor bytes from moment to moment of a step, its highest one marked."""
    values = [moment.live_bytes for moment in moments]
    highest = max(values)
    near = budget_bytes <= FAR * highest
    end = 1.1 * max(highest, budget_bytes if near else 0)
    width = ACROSS / len(values)
    steps = [(round(x, 2), _up(value, end)) for i, value in enumerate(values) for x in (i * width, (i + 1) * width)]
    peak = values.index(highest)
    levels = [Level(_up(highest, end), show_bytes(highest))]
    if near:
        limit = Level(_up(budget_bytes, end), f"limit {show_bytes(budget_bytes)}", True)
        levels = [limit] if abs(limit.top - levels[0].top) < 12 else [limit, *levels]
    starts = [i for i, moment in enumerate(moments) if i == 0 or moment.phase != moments[i - 1].phase]
    ticks = [Tick(round(100 * i / len(values), 2), moments[i].phase or "step") for i in starts]
    shown = [tick._replace(last=tick.left > 80) for tick in ticks]
    at = round(100 * (peak + 0.5) / len(values), 2), _up(highest, end)
    return Curve(_path(steps), _area(steps), tuple(levels), tuple(shown), (at,))


def peak_of(moments: Sequence[Moment]) -> str:
    """The highest moment in words: `backward: layer 31`."""
    highest = max(moments, key=lambda moment: moment.live_bytes)
    return f"{highest.phase}: {highest.name}" if highest.phase else highest.name


def loss_curve(points: Sequence[tuple[int, float]], validations: Sequence[tuple[int, float]] = ()) -> Curve:
    """Training loss from step to step; dots: that of validation rows where they were scored."""
    end, last = 1.1 * max(loss for _, loss in (*points, *validations)), points[-1][0]
    line = [(round(ACROSS * step / last, 2), _up(loss, end)) for step, loss in points]
    dots = tuple((round(100 * step / last, 2), _up(loss, end)) for step, loss in validations)
    named = [
        Level(_up(points[0][1], end), f"{points[0][1]:.2f}"),
        Level(_up(points[-1][1], end), f"{points[-1][1]:.3f}"),
    ]
    levels = named if abs(named[0].top - named[1].top) >= 12 else named[1:]
    return Curve(_path(line), "", tuple(levels), (Tick(0, "step 0"), Tick(100, f"step {last:,}", True)), dots)


def frontier(options: Sequence[Option], budget_bytes: int) -> list[Way]:
    """The ways of training in the order of their quality, best on top: what memory each needs, which one was taken."""
    rows = told_apart([option for option in options if option.frontier])
    highest = max(option.high_bytes for option in rows)
    near = budget_bytes <= FAR * highest
    end = 1.01 * max(highest, budget_bytes if near else 0)
    limit = round(100 * budget_bytes / end, 2) if near else None
    return [Way(option, round(100 * option.high_bytes / end, 2), limit) for option in rows]


def told_apart(line: Sequence[Option]) -> list[Option]:
    """The options that a picture can tell apart: each at least 3% smaller than the one kept before; the chosen one."""
    kept: list[Option] = []
    for option in line:
        if option.chosen and kept and not kept[-1].chosen and kept[-1].high_bytes < 1.03 * option.high_bytes:
            kept.pop()
        if option.chosen or not kept or option.high_bytes < 0.97 * kept[-1].high_bytes:
            kept.append(option)
    return kept


def _up(value: float, end: float) -> float:
    """Percent from the top of a plane whose top is `end`."""
    return round(UP * (1 - value / end), 2)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{x:g} {y:g}" for x, y in points)


def _area(points: Sequence[tuple[float, float]]) -> str:
    return f"{_path(points)} L{points[-1][0]:g} {UP} L{points[0][0]:g} {UP} Z"
