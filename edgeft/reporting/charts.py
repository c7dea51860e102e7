"""How does memory look in a picture? Figures of a report as SVG text to put into a page, the same bytes every time."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, ParamSpec

from edgeft.memory.simulated import Moment
from edgeft.reporting.matrix import Grade, Matrix
from edgeft.reporting.summary import Option, Stage
from edgeft.units import GIB, MIB, show_bytes, show_count, show_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.4  # inches: what A4 leaves between its margins
INK, MUTED, RULE, LIMIT = "#1c2430", "#5b6675", "#d8dde4", "#b3261e"
GRADES: dict[Grade, tuple[str, str]] = {  # colour, marker: told apart without colour too
    "full": ("#1b7a4b", "o"), "4-bit": ("#3b78b5", "D"), "reduced": ("#c77700", "v"), "none": ("#9aa3ae", "x"),
}  # fmt: skip
# A term has one colour in every phase and figure; light and dark alternate in the order of a stack.
COLOURS = {
    "process": "#7b8794", "runtime": "#7b8794", "cuBLAS workspace": "#7b8794", "CUDA": "#a9b2bd",
    "builder": "#a9b2bd", "buffers": "#a9b2bd", "waiting": "#a9b2bd",
    "data": "#c9d0d8", "reserved": "#d8dde3",
    "weights": "#1f4e79", "model": "#1f4e79", "one layer": "#1f4e79",
    "weight file": "#9dbbd8", "head copies": "#9dbbd8",
    "NF4 codes": "#4f86b8", "quantised": "#4f86b8", "bundle": "#4f86b8",
    "adapters": "#e8a33d", "blocks": "#e8a33d",
    "gradients": "#f3d19c", "largest tensor": "#f3d19c",
    "optimizer": "#8a4b08", "optimizer states": "#8a4b08", "one tensor": "#c98f4a", "state file": "#b9793a",
    "activations": "#1b7a4b",
    "forward": "#59a878", "fused QKV": "#59a878",
    "key-value cache": "#8fcf9f", "rows": "#8fcf9f", "layer outputs": "#8fcf9f",
    "height": "#7b5ea7", "quantiser": "#7b5ea7", "pool": "#b0a08c", "head": "#7b5ea7", "embedding": "#7b5ea7",
    "logits": "#c9b8e0", "probabilities": "#c9b8e0", "rounding": "#a58fc7",
    "inputs": "#e4e8ed", "rotary tables": "#e4e8ed",
    "simulated": "#3b8f8a", "cast": "#d9c4a0",
}  # fmt: skip
# Of the frontier's table, right edges in widths of its axes.
COLUMNS = {"points": 1.2, "memory": 1.55, "a step": 1.98}
OTHERS = ("#5f9ea0", "#b0c4b1", "#a05f7a", "#e0b8c9", "#6d8f3a", "#cfdca8")


Parameters = ParamSpec("Parameters")


def reproducible(draw: Callable[Parameters, str]) -> Callable[Parameters, str]:
    """`draw` in matplotlib's own style, whatever the user's matplotlibrc says: the same bytes on every machine."""

    @functools.wraps(draw)
    def drawn(*args: Parameters.args, **kwargs: Parameters.kwargs) -> str:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
            matplotlib.rcParams["svg.hashsalt"] = draw.__name__
            matplotlib.rcParams["text.color"] = INK
            matplotlib.rcParams["text.parse_math"] = False  # a dollar in a name is a dollar
            matplotlib.rcParams["axes.unicode_minus"] = False
            return draw(*args, **kwargs)

    return drawn


class Segment(NamedTuple):
    """One piece of a stacked bar, in bytes from zero."""

    term: str
    start: int
    length: int


def segments(stage: Stage) -> list[Segment]:
    """The pieces of a phase's bar in the order of its terms; the last one ends at the expected bytes."""
    found, start = [], 0
    for term in stage.terms:
        if term.bytes:
            found.append(Segment(term.name, start, term.bytes))
            start += term.bytes
    return found


def plain(term: str) -> str:
    """A term's name as a figure shows it: `height: loss` is what a step holds for a moment, at the loss."""
    kind, _, when = term.partition(": ")
    return f"temporary ({when})" if kind == "height" and when else term


def colours(terms: Sequence[str]) -> dict[str, str]:
    """A colour for each term: its own, or for an unknown name the next of a list that is never mixed up with those."""
    found: dict[str, str] = {}
    for term in terms:
        own = COLOURS.get(term.partition(": ")[0])
        strangers = [other for other in found if other.partition(": ")[0] not in COLOURS]
        found.setdefault(term, own or OTHERS[len(strangers) % len(OTHERS)])
    return found


def unit_of(highest: float) -> tuple[int, str]:
    """The unit an axis is drawn in: GiB, or MiB where a GiB would be most of the axis."""
    return (GIB, "GiB") if highest >= 1.5 * GIB else (MIB, "MiB")


@reproducible
def memory_bars(stages: Sequence[Stage], name: str = "memory") -> str:
    """A stacked bar for each phase, its high estimate, what was measured, and the limit it has to stay below."""
    highest = max(max(stage.high_bytes, stage.measured_bytes or 0) for stage in stages)
    # a limit far outside would leave the bars unreadable: it is written at the edge then
    shown = [stage.limit_bytes for stage in stages if stage.limit_bytes and stage.limit_bytes <= 2.5 * highest]
    end = 1.03 * max([highest, *shown])
    size, unit = unit_of(end)
    names = list(dict.fromkeys(term.name for stage in stages for term in stage.terms if term.bytes))
    palette = colours(names)
    figure, axes = _figure(0.66 * len(stages) + 1.3)
    for row, stage in enumerate(stages):
        for piece in segments(stage):
            colour = palette[piece.term]
            axes.barh(row, piece.length / size, 0.5, piece.start / size, color=colour, edgecolor="white", linewidth=0.6)
            letters = 105 * piece.length / end  # of this size, along the axis
            lines = plain(piece.term), show_bytes(piece.length)
            if max(map(len, lines)) < letters:
                middle = (piece.start + piece.length / 2) / size
                axes.text(middle, row, "\n".join(lines), ha="center", va="center", fontsize=6.5, linespacing=1.25,
                          color=_contrast(colour))  # fmt: skip
        at = stage.expected_bytes / size, stage.high_bytes / size
        axes.plot(at, (row, row), color=INK, linewidth=1.1, solid_capstyle="butt")
        axes.plot((at[1], at[1]), (row - 0.13, row + 0.13), color=INK, linewidth=1.1)
        text = f"expected {show_bytes(stage.expected_bytes)}, high {show_bytes(stage.high_bytes)}"
        if stage.measured_bytes is not None:
            text += f", measured {show_bytes(stage.measured_bytes)}"
            axes.plot([stage.measured_bytes / size], [row], marker="D", color="white", markeredgecolor=INK,
                      markersize=5.5, linestyle="none", zorder=5)  # fmt: skip
        axes.text(0, row - 0.29, text, fontsize=7, color=MUTED, va="bottom")
    _limits(axes, stages, shown, size, end)
    axes.set_yticks(range(len(stages)), [stage.title for stage in stages], fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(stages) - 0.6, -0.85)
    axes.set_xlim(0, end / size)
    axes.set_xlabel(unit)
    visible = {piece.term for stage in stages for piece in segments(stage) if piece.length > 0.004 * end}
    _legend(figure, [(plain(name), palette[name]) for name in names if name in visible],
            any(stage.measured_bytes is not None for stage in stages))  # fmt: skip
    return _svg(figure, name)


def _contrast(colour: str) -> str:
    """Black or white, whichever is read on that colour (relative luminance, WCAG)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if luminance < 0.35 else INK


def _limits(axes: Axes, stages: Sequence[Stage], shown: Sequence[int], size: int, end: float) -> None:
    """A dashed line over the rows that share a limit, with its bytes; an arrow where it lies beyond the axis."""
    row = 0
    while row < len(stages):
        limit, first = stages[row].limit_bytes, row
        while row < len(stages) and stages[row].limit_bytes == limit:
            row += 1
        if not limit:
            continue
        beyond = limit not in shown
        at = end / size if beyond else limit / size
        text = f"limit {show_bytes(limit)}" + (" \N{RIGHTWARDS ARROW}" if beyond else "")
        if not beyond:
            axes.plot((at, at), (first - 0.55, row - 0.5), color=LIMIT, linestyle=(0, (4, 2)), linewidth=1.4, zorder=4)
        axes.text(at, first - 0.58, text, ha="right", va="bottom", fontsize=8, color=LIMIT, fontweight="bold")


@reproducible
def timeline(moments: Sequence[Moment], budget_bytes: int) -> str:
    """Live tensor bytes from moment to moment of a step, its highest one named."""
    values = [moment.live_bytes for moment in moments]
    highest = max(values)
    near = budget_bytes <= 2.5 * highest
    end = 1.12 * max(highest, budget_bytes if near else 0)
    size, unit = unit_of(end)
    figure, axes = _figure(2.5)
    edges = list(range(len(values) + 1))
    axes.stairs([value / size for value in values], edges, fill=True, color="#1f4e79", alpha=0.25)
    axes.stairs([value / size for value in values], edges, color="#1f4e79", linewidth=1.2)
    peak = values.index(highest)
    name = f"{moments[peak].phase}: {moments[peak].name}" if moments[peak].phase else moments[peak].name
    side = "left" if peak < len(values) / 2 else "right"
    axes.plot([peak + 0.5], [highest / size], marker="o", markersize=4, color=INK)
    # above the point, or where it would stand on the limit's line below the curve, led there by a line
    low = near and 0 <= budget_bytes - highest < 0.12 * end
    axes.annotate(f"{name}, {show_bytes(highest)}", (peak + 0.5, highest / size), textcoords="offset points",
                  xytext=((0, -55) if low else (0, 5)), ha=side, fontsize=8, color=INK,
                  arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.7} if low else None)  # fmt: skip
    if near:
        axes.axhline(budget_bytes / size, color=LIMIT, linestyle=(0, (4, 2)), linewidth=1.4)
        axes.text(0, budget_bytes / size, f" limit {show_bytes(budget_bytes)}", va="bottom", fontsize=8, color=LIMIT,
                  fontweight="bold")  # fmt: skip
    starts = [i for i, moment in enumerate(moments) if i == 0 or moment.phase != moments[i - 1].phase]
    for start in starts[1:]:
        axes.axvline(start, color=RULE, linewidth=1)
    axes.set_xticks(starts, [moments[i].phase or "step" for i in starts], ha="left", fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(0, len(values))
    axes.set_ylim(0, end / size)
    axes.set_ylabel(unit)
    return _svg(figure, "timeline")


@reproducible
def frontier(options: Sequence[Option], budget_bytes: int) -> str:
    """The ways of training in the order of their quality, best on top: what memory each needs, which one was taken."""
    rows = _told_apart([option for option in options if option.frontier])
    highest = max(option.high_bytes for option in rows)
    near = budget_bytes <= 2.5 * highest
    end = 1.02 * max(highest, budget_bytes if near else 0)
    size, unit = unit_of(end)
    height = 0.215 * len(rows) + 0.75
    # fixed margins: a layout engine would not see the columns beside the axes
    figure, axes = _figure(height, margins={"left": 0.42, "right": 0.7, "bottom": 0.42 / height, "top": 1.0})
    at = budget_bytes / size if near else end / size
    text = f"limit {show_bytes(budget_bytes)}" + ("" if near else " \N{RIGHTWARDS ARROW}")
    axes.text(at, -0.6, text, ha="right" if at > 0.7 * end / size else "center", va="bottom", fontsize=8, color=LIMIT,
              fontweight="bold")  # fmt: skip
    if near:
        axes.axvspan(at, end / size, color="#f1f2f4", zorder=0)
        axes.plot((at, at), (-0.5, len(rows) - 0.4), color=LIMIT, linestyle=(0, (4, 2)), linewidth=1.4)
    for row, option in enumerate(rows):
        at, line = option.high_bytes / size, "#1f4e79" if option.fits else "#9aa3ae"
        axes.plot((0, at), (row, row), color=line, linewidth=3 if option.chosen else 1, solid_capstyle="butt")
        inner = "#e8a33d" if option.chosen else line if option.fits else "white"
        axes.plot([at], [row], linestyle="none", zorder=4, marker="*" if option.chosen else "o", color=inner,
                  markersize=13 if option.chosen else 5, markeredgecolor=INK if option.chosen else line)  # fmt: skip
        shown = f"{option.quality_cost:.1f}", show_bytes(option.high_bytes), show_seconds(option.seconds_per_step)
        for column, text in zip(COLUMNS.values(), shown, strict=True):
            axes.text(column, row, text, transform=axes.get_yaxis_transform(), fontsize=7.5, va="center_baseline",
                      ha="right", fontweight="bold" if option.chosen else "normal")  # fmt: skip
    for text, column in COLUMNS.items():
        axes.text(column, -0.75, text, transform=axes.get_yaxis_transform(), fontsize=7, color=MUTED, ha="right")
    axes.set_yticks(range(len(rows)), [option.text for option in rows], fontsize=7.5)
    for label, option in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if option.chosen else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, end / size)
    axes.set_ylim(len(rows) - 0.4, -1.15)
    axes.set_xlabel(f"high estimate of memory, {unit}")
    return _svg(figure, "frontier")


def _told_apart(line: Sequence[Option]) -> list[Option]:
    """The options that a picture can tell apart: each at least 3% smaller than the one kept before; the chosen one."""
    kept: list[Option] = []
    for option in line:
        if option.chosen and kept and not kept[-1].chosen and kept[-1].high_bytes < 1.03 * option.high_bytes:
            kept.pop()
        if option.chosen or not kept or option.high_bytes < 0.97 * kept[-1].high_bytes:
            kept.append(option)
    return kept


@reproducible
def loss_curve(points: Sequence[tuple[int, float]]) -> str:
    """Training loss from step to step."""
    figure, axes = _figure(1.9)
    axes.plot([step for step, _ in points], [loss for _, loss in points], color="#1f4e79", linewidth=1.2)
    axes.set_ylim(0)
    axes.set_xlim(0, points[-1][0])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    return _svg(figure, "loss")


@reproducible
def reach(matrix: Matrix) -> str:
    """Models by size, a row for each training machine: how each can be fine-tuned there."""
    import matplotlib.ticker

    machines = matrix.training_machines
    figure, axes = _figure(0.3 * len(machines) + 0.8, WIDTH * 1.4)
    for row in range(len(machines)):
        axes.axhline(row, color=RULE, linewidth=0.8, zorder=0)
        for grade, (colour, marker) in reversed(GRADES.items()):  # what fits lies on top
            found = [m.parameters or 0 for m in matrix.models if m.training and m.training[row].grade == grade]
            axes.plot(found, [row] * len(found), marker=marker, markersize=6, linestyle="none", color=colour,
                      markeredgecolor=colour if marker == "x" else "white")  # fmt: skip
    axes.set_xscale("log")
    sizes = [float(model.parameters) for model in matrix.models if model.parameters]
    axes.set_xlim(0.8 * min(sizes, default=1e8), 1.25 * max(sizes, default=1e9))
    ticks = [size for size in (1e8, 2e8, 5e8, 1e9, 2e9, 5e9, 1e10, 2e10, 5e10, 1e11, 2e11) if _within(axes, size)]
    axes.set_xticks(ticks, [show_count(size) for size in ticks])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_yticks(range(len(machines)), [f"{m.name}  {show_bytes(m.budget_bytes)}" for m in machines], fontsize=8)
    axes.set_ylim(len(machines) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("parameters of the model")
    return _svg(figure, "reach")


def _within(axes: Axes, value: float) -> bool:
    low, high = axes.get_xlim()
    return low <= value <= high


def _figure(height: float, width: float = WIDTH, margins: dict[str, float] | None = None) -> tuple[Figure, Axes]:
    """A figure of that size in inches with one plain pair of axes, within margins that fit what stands around them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=None if margins else "constrained")
    if margins:
        figure.subplots_adjust(**margins)
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set(color=MUTED, fontsize=8)
    axes.yaxis.label.set(color=MUTED, fontsize=8)
    return figure, axes


def _legend(figure: Figure, entries: Sequence[tuple[str, str]], measured: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [Patch(facecolor=colour, label=name) for name, colour in entries]
    handles.append(Line2D([], [], color=INK, marker="|", markersize=7, linewidth=1.1, label="to the high estimate"))
    if measured:
        handles.append(Line2D([], [], color="none", marker="D", markerfacecolor="white", markeredgecolor=INK,
                              markersize=5.5, label="measured"))  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7.5, frameon=False,
                  handlelength=1.2, columnspacing=1.4)  # fmt: skip


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for an HTML page: text as text, ids of its own, nothing of date or machine."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", text, flags=re.S)
    text = text.replace("xlink:href=", "href=")  # the prefix is declared in the tag that is replaced below
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)  # the page's own
    text = re.sub(r"font: ((?:\w+ )*)([\d.]+)px [^;\"]*", _font, text)  # the same before matplotlib 3.11
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text).groups()  # type: ignore[union-attr]
    opening = f'<svg class="plot" role="img" style="width:{width}pt" viewBox="0 0 {width} {height}" version="1.1">'
    return re.sub(r"^<svg[^>]*>", opening, text, count=1).strip()


def _font(match: re.Match[str]) -> str:
    """Size and weight of a font in one, without its family."""
    weight = "700" if "bold" in match[1] or "700" in match[1] else "400"
    return f"font-weight: {weight}; font-size: {match[2]}px"
