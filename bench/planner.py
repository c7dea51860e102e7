"""How far is a training process's predicted peak memory from its measured one? 56 real runs on this CPU.

    make bench-planner

Four shapes (tied and untied, vocabularies of 4,096 to 49,152, grouped and full attention) x seven ways to train
(LoRA in all layers, in the top quarter, full fine-tuning, LISA; fp32 and NF4 bases) x activations kept and recomputed,
with three lengths and two batch sizes in turn. Weights are random. Predicted is the highest phase's expected bytes in
the plan, of LISA for the layers that were drawn; measured the process's highest RSS. What was measured is kept in
build/bench-planner.jsonl as soon as a run ends: an interrupted bench goes on, and a changed planner is compared with
the same runs (remove it to measure again).
"""

from __future__ import annotations

import gzip
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from run import ROOT, Kept, interval_plans, random_model, record, train

from edgeft.planner import make_plan
from edgeft.settings import Job, make_job

SHAPES: dict[str, dict[str, Any]] = {
    "wide, tied": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 4096,
                   "tie_word_embeddings": True},
    "deep": {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 16, "vocab_size": 8192},
    "vocabulary, tied": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 49152,
                         "tie_word_embeddings": True},
    "grouped, vocabulary": {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 8, "vocab_size": 32768,
                            "num_key_value_heads": 1},
}  # fmt: skip
LISA = {"tuner": "full", "layers": "lisa", "active_layers": 2, "lisa_interval": 2}
WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {"tuner": "lora", "rank": 16, "base_precision": "fp32"},
    "LoRA on NF4": {"tuner": "lora", "rank": 16, "base_precision": "nf4"},
    "LoRA in top quarter": {"tuner": "lora", "rank": 16, "base_precision": "fp32", "layers": "sparse"},
    "LoRA in top quarter on NF4": {"tuner": "lora", "rank": 16, "base_precision": "nf4", "layers": "sparse"},
    "full": {"tuner": "full"},
    "LISA": {**LISA, "base_precision": "fp32"},
    "LISA on NF4": {**LISA, "base_precision": "nf4"},
}
LENGTHS, BATCHES = (128, 256, 512), (1, 4)
FITTED_ON = (
    "deep",
    "vocabulary, tied",
)  # the process's own share (memory.CPU_BUFFERS and so on); nothing else is fitted


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    """(shape, way, settings) of each run."""
    found = []
    for number, (shape, way, checkpointing) in enumerate(itertools.product(SHAPES, WAYS, (False, True))):
        settings = {**WAYS[way], "checkpointing": checkpointing, "max_length": LENGTHS[number % 3]}
        settings |= {"batch_size": BATCHES[number // 3 % 2], "max_steps": 3, "eval_rows": 8}
        if way.startswith("LISA"):  # each layer has its turn: the plan is for the layers that need most
            settings["max_steps"] = 2 * -(-SHAPES[shape]["num_hidden_layers"] // settings["active_layers"])
        if settings.get("layers") == "sparse":
            settings["active_layers"] = max(1, SHAPES[shape]["num_hidden_layers"] // 4)
        found.append((shape, way, {**settings, "micro_batch_size": settings["batch_size"]}))
    return found


def long_texts(path: Path) -> Path:
    """Rows of the example's text that fill 512 tokens."""
    with gzip.open(ROOT / "examples" / "debian-descriptions" / "train.jsonl.gz", "rt") as lines:
        long = [line for line in (next(lines) for _ in range(4000)) if len(line) > 1500]
    path.write_text("".join(long[:100]))
    return path


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors of predicted against measured: over all runs, and over the shapes that nothing was fitted on."""

    def of(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        errors = [row["error"] for row in chosen]
        return {"runs": len(chosen), "mean_absolute_error": round(statistics.fmean(map(abs, errors)), 5),
                "most_under": min(errors), "most_over": max(errors),
                "high_below_measured": sum(row["high_bytes"] < row["measured_bytes"] for row in chosen)}  # fmt: skip

    return {"all": of(rows), "not fitted on": of([row for row in rows if row["shape"] not in FITTED_ON])}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted against measured, a point a run, with the lines of 2.5% error."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "edgeft", "font.size": 9})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4))
    for way in WAYS:
        own = [row for row in rows if row["way"] == way]
        sizes = [row["measured_bytes"] / 2**20 for row in own]
        left.plot(sizes, [row["predicted_bytes"] / 2**20 for row in own], ".", label=way)
        right.plot(sizes, [100 * row["error"] for row in own], ".")
    ends = [min(r["measured_bytes"] for r in rows) / 2**20, max(r["measured_bytes"] for r in rows) / 2**20]
    left.plot(ends, ends, "k-", linewidth=0.6)
    left.set(xlabel="measured peak, MiB", ylabel="predicted peak, MiB")
    left.legend(fontsize=7, frameon=False)
    for level in (-2.5, 0, 2.5):
        right.axhline(level, color="k", linewidth=0.6, linestyle="-" if level == 0 else ":")
    right.set(xlabel="measured peak, MiB", ylabel="error of the prediction, %")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def measure(folder: Path, settings: dict[str, Any], model: Path, text: Path) -> dict[str, Any]:
    """What one run took, phase by phase."""
    result = train(folder, settings, data=text, valid=text, model=model)
    return {"measured_bytes": result["measured_peak_bytes"], "phase_peak_bytes": result["phase_peak_bytes"]}


def predict(settings: dict[str, Any], model: Path, text: Path) -> dict[str, Any]:
    """What today's planner says of that run."""
    files = {"model": str(model), "data": str(text), "valid": str(text)}
    plan = make_plan(make_job(profile="cpu", **files, **settings))
    phases = {phase.name: phase.expected_bytes for phase in plan.phases}
    if plan.training.layers == "lisa":  # the plan is for the layers that need most: compare with those that were drawn
        phases["train"] = max(expected for _, expected in interval_plans(plan))
    planned = max(phase.expected_bytes for phase in plan.phases)
    return {"predicted_bytes": max(phases.values()), "planned_bytes": planned, "high_bytes": plan.peak_bytes,
            "phases": phases}  # fmt: skip


def main() -> None:
    only = sys.argv[1:]  # words that the name of a run must hold
    kept, rows = Kept("planner"), []
    with tempfile.TemporaryDirectory() as scratch:
        text = long_texts(Path(scratch) / "text.jsonl")
        models = {shape: random_model(Path(scratch) / shape, values) for shape, values in SHAPES.items()}
        for number, (shape, way, settings) in enumerate(cases()):
            name = f"{shape}; {way}; {'recomputed' if settings['checkpointing'] else 'kept'}"
            if not all(word in name for word in only):
                continue
            if name not in kept.rows:
                kept.add({"run": name, **measure(Path(scratch) / str(number), settings, models[shape], text)})
            row = {"run": name, "shape": shape, "way": way,
                   "settings": {key: value for key, value in settings.items() if key in Job.model_fields},
                   **predict(settings, models[shape], text), **kept.rows[name]}  # fmt: skip
            row["error"] = round(row["predicted_bytes"] / row["measured_bytes"] - 1, 5)
            rows.append(row)
            mib = 2**20
            print(f"{name:60} {settings['max_length']:4} x {settings['batch_size']}  predicted "
                  f"{row['predicted_bytes'] / mib:7.1f}  measured {row['measured_bytes'] / mib:7.1f} MiB  "
                  f"{100 * row['error']:+.2f}%", flush=True)  # fmt: skip
    if only:
        return
    print(json.dumps(summary(rows)))
    record("planner", {"summary": summary(rows), "runs": rows})
    plot(rows, ROOT / "bench" / "results" / "planner.svg")


if __name__ == "__main__":
    main()
