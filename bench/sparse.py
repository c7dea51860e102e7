"""Which layers should train? Full, LoRA, sparse LoRA by each score against top and random layers, LISA, and more.

    make bench-sparse

On the example's base and task, at equal steps (and the seconds each took): exact match and loss on the test rows, loss
on held-out general text (Debian descriptions, what the base was pretrained on), peak memory. Two runs at a time with
one thread each. Each run is kept as soon as it ends: an interrupted bench goes on.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import math
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from run import BASE, ROOT, SECTIONS, Kept, record, train, verb  # after the line above: torch reads it at import

from edgeft.data.dataset import TextTokenizer, read_rows, to_samples
from edgeft.models.checkpoint import load_plain
from edgeft.models.evaluate import evaluate
from edgeft.models.parts import find_parts
from edgeft.reporting.palette import BLUE, LINES, ORANGE, SERIES
from edgeft.reporting.sweep_charts import figure

PALE = "#e3e7ec"
STEPS = {"epochs": 1}
QUARTER = {"tuner": "lora", "rank": 64, "layers": "sparse", "active_layers": 2}
LISA = {"tuner": "full", "layers": "lisa", "active_layers": 2}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"tuner": "full"},
    "LoRA, all 8 layers": {"tuner": "lora", "rank": 64},
    "LoRA, top 2": QUARTER,
    **{f"LoRA, random 2, seed {seed}": {**QUARTER, "layer_score": "random", "seed": seed} for seed in range(5)},
    **{f"LoRA, 2 by {score}": {**QUARTER, "layer_score": score}
       for score in ("gradient", "hidden", "ablation", "progressive")},
    "rotating LoRA, 2 of 8": {"tuner": "lora", "rank": 64, "layers": "lisa", "active_layers": 2},
    "LISA-2, cycle": LISA,
    "LISA-2, uniform": {**LISA, "lisa_schedule": "uniform"},
    "LISA-2, weighted by gradient": {**LISA, "lisa_schedule": "weighted", "layer_score": "gradient"},
    "LISA-2, parked states": {**LISA, "lisa_state": "park"},
    "LISA-2, embedding and norm on": {**LISA, "embedding": "on", "norm": "on"},
    "LISA-4, cycle": {**LISA, "active_layers": 4},
    "LISA-2 on NF4": {**LISA, "base_precision": "nf4"},
}  # fmt: skip


def general_loss(merged: Path) -> float:
    """Nats per token on held-out text of the kind that the base was pretrained on."""
    model, tokenizer = load_plain(merged), TextTokenizer(BASE)
    rows = read_rows(str(ROOT / "examples" / "debian-descriptions" / "valid.jsonl"), tokenizer)[:200]
    samples = to_samples(rows, tokenizer, 256)
    return evaluate(model, find_parts(model), samples, tokenizer, device=torch.device("cpu")).loss


def measure(name: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run, from plan to merged checkpoint and its scores."""
    result = train(folder, {**STEPS, **settings}, test=SECTIONS / "test.jsonl")
    verb("merge", str(folder / "train"), "--out", str(folder / "merged"))
    training = result["plan"]["training"]
    row = {
        "run": name, "settings": settings, "layers": training["trained_layers"], "test": result["test"],
        "general_loss": round(general_loss(folder / "merged"), 4), "seconds": result["seconds"],
        "measured_peak_bytes": result["measured_peak_bytes"], "train_peak_bytes": result["phase_peak_bytes"]["train"],
        "steps": result["steps"], "loss_curve": result["loss_curve"][::5],
    }  # fmt: skip
    test = row["test"]
    print(f"{name:32} exact match {100 * test['exact_match']:.1f}%  loss {test['loss']:.4f}  general "
          f"{row['general_loss']:.3f}  peak {row['train_peak_bytes'] / 2**20:.0f} MiB  {row['seconds']:.0f} s  "
          f"layers {training['trained_layers']}", flush=True)  # fmt: skip
    return row


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Quality and memory, a line a run; and the loss curves of full fine-tuning and LISA on two bases."""
    lines: dict[str, list[dict[str, Any]]] = {}  # the seeds of random layers share one
    for row in sorted(rows, key=lambda row: row["test"]["exact_match"]):
        lines.setdefault(row["run"].partition(", seed")[0], []).append(row)
    with figure(out, 11, 5.2) as made:
        quality, memory, curves = made.subplots(1, 3, width_ratios=(3, 1.6, 3))
        for y, own in enumerate(lines.values()):
            for row in own:
                share, count = row["test"]["exact_match"], row["test"]["rows"]
                half = 196 * math.sqrt(share * (1 - share) / count) if len(own) == 1 else 0
                fill = "full" if half else "none"
                quality.errorbar(100 * share, y, xerr=half or None, color=BLUE, marker="o", markersize=5,
                                 elinewidth=1.2, capsize=2.5, fillstyle=fill)  # fmt: skip
                memory.plot(row["train_peak_bytes"] / 2**20, y, color=ORANGE, marker="D", markersize=5)
        for axes in (quality, memory):
            axes.set_yticks(range(len(lines)), list(lines) if axes is quality else [])
            axes.grid(axis="y", color=PALE, linewidth=0.8)
            axes.set_ylim(-0.6, len(lines) - 0.4)
        count = rows[0]["test"]["rows"]
        quality.set(xlabel=f"exact match on {count:,} test rows, %")
        quality.set_title("Quality, with 95% intervals; rings: five seeds")
        memory.set(xlabel="training peak, MiB")
        memory.set_title("Memory")
        _curves(curves, rows)


def _curves(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Training loss, each point the mean of five."""
    for i, name in enumerate(("full", "LISA-2, cycle", "LISA-2 on NF4")):
        curve = next(row["loss_curve"] for row in rows if row["run"] == name)
        smooth = [statistics.fmean(loss for _, loss in curve[max(0, i - 4) : i + 1]) for i in range(len(curve))]
        axes.plot([step for step, _ in curve], smooth, label=name, linewidth=1.5, color=SERIES[i], linestyle=LINES[i])
    axes.set(xlabel="step", ylabel="training loss, nats (mean of 5)", ylim=(0, 3))
    axes.set_title("How the loss falls")
    axes.legend()


def main() -> None:
    kept = Kept("sparse")
    left = [name for name in RUNS if name not in kept.rows]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as pool:
        for row in pool.map(lambda name: measure(name, RUNS[name], Path(scratch) / name), left):
            kept.add(row)
    rows = [kept.rows[name] for name in RUNS]
    for row in rows:
        row["time_against_full"] = round(row["seconds"] / rows[0]["seconds"], 3)
    random = [row["test"]["exact_match"] for row in rows if "random" in row["run"]]
    summary = {
        "random_mean_exact_match": round(statistics.fmean(random), 4),
        "random_deviation": round(statistics.stdev(random), 4),
    }
    record("sparse", {"summary": summary, "runs": rows})
    plot(rows, ROOT / "bench" / "results" / "sparse.svg")
    kept.path.unlink()


if __name__ == "__main__":
    main()
