"""How do a sweep and a survival look? SVG files, the same bytes for the same numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.documents import saving
from edgeft.machines.extras import missing
from edgeft.reporting.palette import BLUE, GREY, INK, ORANGE, SERIES

if TYPE_CHECKING:
    from edgeft.merging.survival import Survival
    from edgeft.models.metrics import Metrics, Sweep, SweepPoint

# A fixed salt and no date: an SVG's ids and metadata would else differ from run to run.
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "edgeft", "svg.fonttype": "none", "font.size": 9.5, "axes.spines.top": False,
    "axes.spines.right": False, "text.color": INK, "axes.labelcolor": INK, "axes.titlesize": 10,
    "axes.titlelocation": "left", "axes.axisbelow": True, "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of that size in inches, written to `path` at the end. Raises MissingExtra without matplotlib."""
    try:
        import matplotlib
        from cycler import cycler
        from matplotlib.figure import Figure
    except ImportError:
        raise missing("matplotlib", "is not installed", "report", "leave out --plot") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own style is
        for name, value in {**STYLE, "axes.prop_cycle": cycler(color=SERIES)}.items():
            matplotlib.rcParams[name] = value
        made = Figure(figsize=(width, height), layout="constrained")
        yield made
        with saving(path):
            made.savefig(path, format="svg", metadata={"Date": None})


def plot_survival(survival: Survival, path: Path) -> None:
    """A map of layers and their tensors: the cosine between the change and what arrives of it."""
    rounded = [tensor for tensor in survival.tensors if tensor.bits != 32]
    kinds = list(dict.fromkeys(_kind(tensor.name) for tensor in rounded))
    layers = sorted({tensor.layer for tensor in rounded if tensor.layer is not None})
    rows: list[int | None] = [*layers, None] if any(tensor.layer is None for tensor in rounded) else [*layers]
    table = [[float("nan")] * len(kinds) for _ in rows]
    for tensor in rounded:
        table[rows.index(tensor.layer)][kinds.index(_kind(tensor.name))] = tensor.cosine
    with figure(path, 2.5 + 0.9 * len(kinds), 1.8 + 0.28 * len(rows)) as made:
        axes = made.subplots()
        if table:
            image = axes.imshow(table, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
            made.colorbar(image, ax=axes, label="cosine of the change and what arrives of it: 1 is all, 0 nothing")
        axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), ["ends" if layer is None else str(layer) for layer in rows])
        axes.set_ylabel("decoder layer")
        for i, line in enumerate(table):
            for j, value in enumerate(line):
                if value == value:
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.7 else "black")
        axes.set_title(f"What of the change survives in {survival.target}: cosine {survival.cosine:.3f} over all")


def _kind(name: str) -> str:
    """The module's own name, without layer and block: q_proj, up_proj, lm_head."""
    return re.sub(r"\.(weight|bias)$", "", name).rpartition(".")[2]


def _is_taken(point: SweepPoint, sweep: Sweep) -> bool:
    return (point.wise_alpha, point.groups) == (sweep.wise_alpha, sweep.groups)


def plot_sweep(sweep: Sweep, path: Path) -> None:
    """Task loss against general loss, a mark per share, as merged and as rounded; over the share without general text.

    The line joins the shares that no other beats; a ring is around the one that was taken.
    """
    merged = [(p, p.task, p.general) for p in sweep.points]
    rounded = [(p, p.rounded_task, p.rounded_general) for p in sweep.points if p.rounded_task]
    with figure(path, 6.8, 4.6) as made:
        axes = made.subplots()
        if rounded:
            _marks(axes, merged, "as merged", "o", ORANGE)
        shipped, name = (rounded, f"as rounded for {sweep.target}") if rounded else (merged, "as merged")
        x, y = _marks(axes, shipped, name, "s", BLUE)
        labelled = [(p, a, b) for (p, _, _), a, b in zip(shipped, x, y, strict=True)]
        for p, a, b in labelled:
            if not p.groups:
                axes.annotate(f"{p.wise_alpha:g}", (a, b), xytext=(5, 6), textcoords="offset points", fontsize=9)
            if _is_taken(p, sweep):
                axes.scatter(
                    [a], [b], s=170, facecolors="none", edgecolors=INK, linewidths=1.4, label="taken", zorder=4
                )
        front = sorted((a, b) for p, a, b in labelled if not p.groups and p.wise_alpha in sweep.pareto)
        if front:
            axes.plot(*zip(*front, strict=True), color=GREY, linewidth=1.2, zorder=1, label="beaten by no other")
        axes.set_xlabel("loss on general text, nats per token" if sweep.general_rows else "share of the fine-tune")
        axes.set_ylabel("loss on the task, nats per token")
        _plain_log(axes, y)
        axes.legend()
        shares = taken[0] if (taken := [p.shares for p in sweep.points if _is_taken(p, sweep)]) else sweep.wise_alpha
        axes.set_title(f"What each share of the fine-tune costs and gains; {shares} was taken ({sweep.select})")


def _marks(
    axes: Any, points: Sequence[tuple[SweepPoint, Metrics | None, Metrics | None]], name: str, mark: str, colour: str
) -> tuple[list[float], list[float]]:
    """A mark for each share, and where they are."""
    x = [general.loss if general else p.wise_alpha for p, _, general in points]
    y = [task.loss for _, task, _ in points if task]
    axes.scatter(x, y, marker=mark, color=colour, label=name, zorder=3, s=28, edgecolors="white", linewidths=0.5)
    return x, y


def _plain_log(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis whose ticks are plain numbers."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    ticks = [step * 10.0**power for power in range(-3, 3) for step in (1, 2, 3, 5, 7)]
    low, high = 0.9 * min(values), 1.1 * max(values)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
