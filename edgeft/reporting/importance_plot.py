"""How do the scores of a model's layers look, and which of them were chosen? One bar per layer, as SVG text."""

from __future__ import annotations

import io

from edgeft.models.metrics import Importance

LABELS = {
    "gradient": "norm of weights times norm of gradients",
    "hidden": "change of hidden states",
    "ablation": "validation loss without the layer's adapters, less that with all (nats)",
    "progressive": "fall of validation loss when the layer joined (nats)",
}
CHOSEN, LEFT_OUT = "#1f77b4", "#c7c7c7"


def importance_svg(importance: Importance) -> str:
    """A bar chart of the scores, the chosen layers dark; text stays text. Needs matplotlib."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: it keeps every figure and picks a window system

    count = len(importance.scores)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "edgeft"}):  # the same scores, the same bytes
        figure = Figure(figsize=(max(4.0, 1.5 + 0.22 * count), 3.0), layout="constrained")
        axes = figure.add_subplot()
        bars = axes.bar(range(count), importance.scores)
        for index, bar in enumerate(bars):
            bar.set_facecolor(CHOSEN if index in importance.chosen else LEFT_OUT)
            bar.set_gid(f"layer {index}{' chosen' if index in importance.chosen else ''}")
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_xticks(range(0, count, max(1, -(-count // 16))))
        axes.set_xlabel(f"decoder layer ({len(importance.chosen)} of {count} chosen)")
        axes.set_ylabel(LABELS.get(importance.method, importance.method), fontsize=8)
        axes.set_title(f"importance by {importance.method}, {importance.rows} rows", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
