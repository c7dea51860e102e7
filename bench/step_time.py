"""How far is the estimated time of a training step from the measured one? Twenty plans on this CPU.

    make bench-time

Four shapes x five ways to train, 4 samples of 256 tokens a step. Each plan's own step runs with random weights
(`edgeft plan --verify`); the third is timed. Nothing else may run beside it: the estimate counts operations against the
matrix rate that was measured when the machine was quiet. What was measured is kept in build/bench-time.jsonl: a changed
estimate is compared with the same runs (remove it to measure again).
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from planner import SHAPES
from run import Kept, pins, random_model, record, verb

from edgeft.machines.probe import probe_cpu
from edgeft.planning.plan import make_plan
from edgeft.settings.job import make_job

FITTED_ON = ("deep", "vocabulary, tied")  # of the shapes, what a process takes beside its tensors
PLAIN, AWARE = "LoRA", "LoRA, quantize_aware"
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {"tuner": "lora", "rank": 16, "base_precision": "fp32"},
    "LoRA, recomputed": {"tuner": "lora", "rank": 16, "base_precision": "fp32", "checkpointing": True},
    "LoRA on NF4": {"tuner": "lora", "rank": 16, "base_precision": "nf4"},
    "full": {"tuner": "full"},
    AWARE: {"tuner": "lora", "rank": 16, "base_precision": "fp32", "quantize_aware": True, "target": "ort-int4"},
}
COMMON = {"max_length": 256, "batch_size": 4, "micro_batch_size": 4, "checkpointing": False}


def measure(plan: Path, model: Path, settings: dict[str, Any]) -> float:
    """Seconds of one real step of that plan."""
    verb("plan", "--model", str(model), "--profile", "cpu", *pins(settings), "--verify", "--out", str(plan),
         as_json=False)  # fmt: skip
    return float(json.loads(plan.with_name("trial.json").read_text())["measured_seconds_per_step"])


def of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How far estimates are from measurements, as factors."""
    ratios = sorted(row["estimated_to_measured"] for row in rows)
    typical = math.exp(statistics.fmean(abs(math.log(ratio)) for ratio in ratios))
    return {"runs": len(rows), "lowest": ratios[0], "median": statistics.median(ratios), "highest": ratios[-1],
            "typical_factor": round(typical, 3)}  # fmt: skip


def main() -> None:
    kept, rows = Kept("time"), []
    probe = probe_cpu()
    if probe.busy:
        sys.exit("the rates of this machine were measured beside other work: remove the probe from edgeft's cache")
    with tempfile.TemporaryDirectory() as scratch:
        for shape, values in SHAPES.items():
            model = random_model(Path(scratch) / shape, values)
            for way, settings in WAYS.items():
                name, wanted = f"{shape}; {way}", {**COMMON, **settings}
                if name not in kept.rows:
                    kept.add({"run": name, "measured_seconds": measure(Path(scratch) / "plan.json", model, wanted)})
                measured = kept.rows[name]["measured_seconds"]
                estimated = make_plan(make_job(profile="cpu", model=str(model), **wanted)).seconds_per_step
                ratio = round(estimated / measured, 3)
                rows.append({"run": name, "fitted_on": shape in FITTED_ON, "estimated_seconds": round(estimated, 4),
                             "measured_seconds": measured, "estimated_to_measured": ratio})  # fmt: skip
                print(f"{name:40} estimated {estimated:.2f} s, measured {measured:.2f} s, ratio {ratio}", flush=True)
    summary = {name: of([row for row in rows if not row["fitted_on"] or name == "all"])
               for name in ("all", "not fitted on")}  # fmt: skip
    seconds = {row["run"]: row["measured_seconds"] for row in rows}
    aware = {shape: round(seconds[f"{shape}; {AWARE}"] / seconds[f"{shape}; {PLAIN}"], 3) for shape in SHAPES}
    print(json.dumps({**summary, "quantize_aware_to_plain": aware}), file=sys.stderr)
    record("time", {"summary": summary, "quantize_aware_to_plain": aware,
                    "probe": probe.model_dump(mode="json"), "runs": rows})  # fmt: skip


if __name__ == "__main__":
    main()
