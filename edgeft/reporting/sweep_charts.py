"""How do a sweep and a survival look? SVG files, the same bytes for the same numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.documents import saving
from edgeft.errors import MissingExtra

if TYPE_CHECKING:
    from edgeft.merging.survival import Survival
    from edgeft.models.metrics import Metrics, Sweep, SweepPoint


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of that size in inches, written to `path` at the end. Raises MissingExtra without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "is not installed", "pip install matplotlib, or leave out --plot") from None
    # a fixed salt and no date: an SVG's ids and metadata would else differ from run to run
    with matplotlib.rc_context({"svg.hashsalt": "edgeft", "svg.fonttype": "none", "font.size": 9}):
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
            made.colorbar(image, ax=axes, label="cosine(change, what arrives)")
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
    forms: list[tuple[str, str, list[tuple[SweepPoint, Metrics, Metrics | None]]]] = [
        ("as merged", "o", [(p, p.task, p.general) for p in sweep.points]),
        (
            sweep.target,
            "s",
            [(p, p.rounded_task, p.rounded_general) for p in sweep.points if p.rounded_task],
        ),
    ]
    with figure(path, 6.4, 4.2) as made:
        axes = made.subplots()
        for name, mark, points in forms:
            if not points:
                continue
            x = [general.loss if general else p.wise_alpha for p, _, general in points]
            y = [task.loss for _, task, _ in points]
            shipped = name == sweep.target or len(forms[1][2]) == 0
            axes.scatter(x, y, marker=mark, label=name, zorder=3, s=28)
            for (p, _, _), a, b in zip(points, x, y, strict=True):
                if shipped and not p.groups:
                    axes.annotate(f"{p.wise_alpha:g}", (a, b), xytext=(4, 4), textcoords="offset points", fontsize=7)
                if shipped and _is_taken(p, sweep):
                    axes.scatter([a], [b], s=160, facecolors="none", edgecolors="black", label="taken", zorder=4)
            if shipped:
                front = sorted(
                    (a, b)
                    for (p, _, _), a, b in zip(points, x, y, strict=True)
                    if not p.groups and p.wise_alpha in sweep.pareto
                )
                axes.plot(*zip(*front, strict=True), color="grey", linewidth=1, zorder=1)
        axes.set_xlabel("general loss, nats per token" if sweep.general_rows else "wise_alpha")
        axes.set_ylabel("task loss, nats per token")
        axes.set_yscale("log")
        axes.legend()
        shares = taken[0] if (taken := [p.shares for p in sweep.points if _is_taken(p, sweep)]) else sweep.wise_alpha
        axes.set_title(f"W0 + a (Wft - W0): a = {shares} taken ({sweep.select})")
