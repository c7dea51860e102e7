"""How far is a training process's predicted peak memory from its measured one? Real runs on this CPU, three parts.

    make bench-planner      # or: python bench/planner.py --seed 7 --count 60 --only "random bloom"

An interrupted bench goes on with the runs it lacks (build/bench-planner.jsonl); those that --only names are run again.

Shapes: four (tied and untied, vocabularies of 4,096 to 49,152, grouped and full attention) x seven ways to train (LoRA
in all layers, in the top quarter, full fine-tuning, LISA; fp32 and NF4 bases) x activations kept and recomputed, rows
of text that fill three lengths. Broken once: jobs for which an earlier planner promised too little. Random: jobs drawn
by a seed, of 23 families, rows of prompts, chats and texts, settings and validation data (bench/jobs.py).

Weights are random. Predicted is the highest phase's expected bytes in the plan, of LISA for the layers that were drawn;
measured the process's highest RSS, as it records it and as it is seen from outside. High is the plan's promise.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs import Case, broken_once, random_case
from run import AT_START, ROOT, Kept, interval_plans, random_model, record

from edgeft.errors import BadInput
from edgeft.machines.limits import resident_bytes
from edgeft.models.families import LIKE_LLAMA
from edgeft.planning.plan import Plan, make_plan
from edgeft.reporting.palette import INK, MARKERS, SERIES
from edgeft.reporting.sweep_charts import figure
from edgeft.settings.job import make_job

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
SLOW_SECONDS = 1800  # of one run: it is not waited for longer
# the process's own share (memory.CPU_BUFFERS and so on) was fitted on two of the shapes, "deep" and "vocabulary, tied"


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
    """Errors of predicted against measured of one part's runs."""
    chosen = [row for row in rows if "error" in row]
    errors = [row["error"] for row in chosen] or [0.0]
    return {"runs": len(chosen), "refused": sum("refused" in row for row in rows),
            "failed": sum("failed" in row for row in rows),
            "mean_absolute_error": round(statistics.fmean(map(abs, errors)), 5),
            "most_under": min(errors), "most_over": max(errors),
            "high_below_measured": sum(row["high_bytes"] < row["measured_bytes"] for row in chosen)}  # fmt: skip


def mode_of(plan: Plan) -> str:
    """How a plan knows its bytes."""
    if plan.spec.exact:
        return "closed form"
    if plan.spec.model_type in LIKE_LLAMA:
        return "like a Llama"
    train = next(phase for phase in plan.phases if phase.name == "train")
    return "simulated" if any(term.name == "simulated" for term in train.terms) else "not simulated"


def summaries(parts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The errors of each part, of all of them by how the bytes were known, and by how freed memory is kept."""
    every = [row for rows in parts.values() for row in rows]
    found = {part: summary(rows) for part, rows in parts.items() if rows} | {"all": summary(every)}
    for key in ("mode", "malloc"):
        names = sorted({row[key] for row in every if key in row})
        found[f"by {key}"] = {name: summary([row for row in every if row.get(key) == name]) for name in names}
    return found


def way_of(row: dict[str, Any]) -> str:
    """How a run trained, in two or three words."""
    settings = row["settings"]
    on = " on NF4" if settings.get("base_precision") == "nf4" else ""
    return f"{settings['tuner']} {settings.get('layers', 'all')}{on}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted against measured, a point a run, with the lines of 2.5% error."""
    with figure(path, 10, 4.6) as made:
        left, right = made.subplots(1, 2)
        for i, way in enumerate(dict.fromkeys(way_of(row) for row in rows)):
            own = [row for row in rows if way_of(row) == way]
            sizes = [row["measured_bytes"] / 2**20 for row in own]
            look = {"marker": MARKERS[i], "linestyle": "none", "color": SERIES[i], "markersize": 5.5,
                    "markeredgecolor": "white", "markeredgewidth": 0.5}  # fmt: skip
            left.plot(sizes, [row["predicted_bytes"] / 2**20 for row in own], label=f"{way} ({len(own)})", **look)
            right.plot(sizes, [100 * row["error"] for row in own], **look)
        ends = [min(r["measured_bytes"] for r in rows) / 2**20, max(r["measured_bytes"] for r in rows) / 2**20]
        left.plot(ends, ends, color=INK, linewidth=0.8, label="as predicted")
        left.set(xlabel="measured peak, MiB", ylabel="predicted peak, MiB")
        left.set_title(f"Memory of {len(rows)} training runs, by way of training (runs)")
        left.legend(fontsize=8.5)
        for level in (-2.5, 0, 2.5):
            right.axhline(level, color=INK, linewidth=0.8, linestyle="-" if level == 0 else ":")
        inside = sum(abs(row["error"]) <= 0.025 for row in rows)
        right.set(xlabel="measured peak, MiB", ylabel="error of the prediction, %")
        right.set_title(f"{inside} of {len(rows)} within 2.5% (dotted)")


def predict(plan: Plan) -> dict[str, Any]:
    """What a plan says of its run; of LISA for the layers that were drawn, not for those that need most."""
    phases = {phase.name: phase.expected_bytes for phase in plan.phases}
    if plan.training.layers == "lisa":
        phases["train"] = max(expected for _, expected in interval_plans(plan))
    planned = max(phase.expected_bytes for phase in plan.phases)
    return {"predicted_bytes": max(phases.values()), "planned_bytes": planned, "high_bytes": plan.peak_bytes,
            "phases": phases}  # fmt: skip


def measure(plan: Plan, folder: Path, resumed: bool) -> dict[str, Any]:
    """What one run took: train.json's phases, and the highest RSS seen from outside; `resumed`: killed half way."""
    plan.write(folder / "plan.json")
    first = watch(plan, folder, kill_at=plan.training.steps // 2) if resumed else 0
    seen = watch(plan, folder)
    result = json.loads((folder / "train" / "train.json").read_text())
    if resumed and not result["resumed_at"]:
        raise RuntimeError("the run was not killed before its end")
    highest = max(first, seen, result["measured_peak_bytes"])
    return {"measured_bytes": highest, "recorded_bytes": result["measured_peak_bytes"],
            "phase_peak_bytes": result["phase_peak_bytes"]}  # fmt: skip


def watch(plan: Plan, folder: Path, kill_at: int = 0) -> int:
    """Highest RSS of `edgeft train` in a process of its own, read 50 times a second; killed after `kill_at` steps."""
    command = [sys.executable, "-m", "edgeft", "train", str(folder / "plan.json"), "--out", str(folder / "train"),
               "--no-rehearsal", "--json"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(plan.profile.cores), "HF_HUB_OFFLINE": "1"}
    with open(folder / "log.txt", "ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log, env=environment)
        highest, status = 0, Path(f"/proc/{process.pid}/status")
        limit = time.monotonic() + SLOW_SECONDS
        while process.poll() is None:
            if time.monotonic() > limit:
                process.kill()
                raise RuntimeError("too slow")
            with contextlib.suppress(OSError):
                highest = max(highest, resident_bytes(highest=True, status=status))
            if kill_at and list(folder.glob(f".train.work/step-*{kill_at}")):
                process.kill()
                process.wait()
                return highest
            time.sleep(0.02)
    if process.returncode:
        raise RuntimeError((folder / "log.txt").read_text()[-2000:])
    return highest


def fixed_cases() -> Iterator[Case]:
    """The four shapes, seven ways and two kinds of recomputation."""
    for shape, way, settings in cases():
        name = f"{shape}; {way}; {'recomputed' if settings['checkpointing'] else 'kept'}"
        yield Case(name, shape, SHAPES[shape], {}, settings)


def run_case(case: Case, scratch: Path, texts: Path) -> dict[str, Any]:
    """One job planned and run, or what the planner refused."""
    folder = scratch / "case"
    shutil.rmtree(folder, ignore_errors=True)
    if case.rows:
        files = case.write(folder)
    else:
        folder.mkdir(parents=True)
        files = {"model": str(random_model(folder / "model", case.config)), "data": str(texts), "valid": str(texts)}
    settings = {**case.settings, **({"checkpoint_steps": 1} if case.resumed else {})}
    row = {
        "run": case.name,
        "family": case.family,
        "commit": AT_START["git"].get("commit", ""),
        "settings": settings,
        "rows": case.rows,
    }
    try:
        plan = make_plan(make_job(profile="cpu", **files, **settings))
    except BadInput as problem:
        return {**row, "refused": str(problem)}
    row |= {"mode": mode_of(plan), "malloc": plan.training.malloc, **predict(plan)}
    try:
        took = measure(plan, folder, case.resumed)
    except RuntimeError as problem:
        return {**row, "failed": str(problem)}
    row |= {"parameters": plan.spec.total_parameters, "threads": plan.profile.cores, **took}
    row["error"] = round(row["predicted_bytes"] / row["measured_bytes"] - 1, 5)
    return row


def show(row: dict[str, Any]) -> None:
    """One line of a run."""
    if "refused" in row:
        print(f"{row['run']:60} refused: {row['refused']}", flush=True)
        return
    if "failed" in row:
        print(f"{row['run']:60} failed: {row['failed']}", flush=True)
        return
    mib = 2**20
    warning = "  HIGH IS BELOW" if row["high_bytes"] < row["measured_bytes"] else ""
    print(f"{row['run'] + ' ' + row['family']:60} predicted {row['predicted_bytes'] / mib:7.1f}  high "
          f"{row['high_bytes'] / mib:7.1f}  measured {row['measured_bytes'] / mib:7.1f} MiB  "
          f"{100 * row['error']:+.2f}%{warning}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the random jobs")
    parser.add_argument("--count", type=int, default=72, help="random jobs")
    parser.add_argument("--first", type=int, default=0, help="number of the first random job")
    parser.add_argument("--only", default="", help="run again those whose names hold these words, and no other")
    parser.add_argument("--record", action="store_true", help="run nothing: write the runs that there are")
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.count} random jobs", flush=True)
    drawn = [random_case(options.seed, options.first + number) for number in range(options.count)]
    parts = {"broken once": broken_once(), "random": drawn, "shapes": list(fixed_cases())}
    kept = Kept("planner")
    with tempfile.TemporaryDirectory() as scratch:
        texts = long_texts(Path(scratch) / "text.jsonl")
        for part, cases_of in parts.items():
            for case in cases_of:
                named = all(word in f"{part} {case.name} {case.family}" for word in options.only.split())
                if named and not options.record and (options.only or case.name not in kept.rows):
                    kept.add(run_case(case, Path(scratch), texts))
                    show(kept.rows[case.name])
    found = {part: [kept.rows[c.name] for c in some if c.name in kept.rows] for part, some in parts.items()}
    write(found, {part: len(some) - len(found[part]) for part, some in parts.items()}, options)


def write(parts: dict[str, list[dict[str, Any]]], not_run: dict[str, int], options: argparse.Namespace) -> None:
    """The rows that there are, how many of each part there are not, their summary and their plot."""
    found = summaries(parts)
    print(json.dumps(found, indent=1))
    drawn = {"seed": options.seed, "first": options.first, "count": options.count}
    record("planner", {**drawn, "not_run": not_run, "summary": found, "runs": parts})
    plot([row for some in parts.values() for row in some if "error" in row],
         ROOT / "bench" / "results" / "planner.svg")  # fmt: skip


if __name__ == "__main__":
    main()
