"""How far is the estimated time of a training step from the measured one? Sixteen plans on this CPU.

    make bench-time

Four shapes x four ways to train, 4 samples of 256 tokens a step. Each plan's own step runs with random weights
(`edgeft plan --verify`); the third is timed. Nothing else may run beside it: the estimate counts operations against the
matrix rate that was measured when the machine was quiet.
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
from run import ROOT, random_model, record, verb

WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {"tuner": "lora", "rank": 16, "base_precision": "fp32"},
    "LoRA, recomputed": {"tuner": "lora", "rank": 16, "base_precision": "fp32", "checkpointing": True},
    "LoRA on NF4": {"tuner": "lora", "rank": 16, "base_precision": "nf4"},
    "full": {"tuner": "full"},
}
COMMON = {"max_length": 256, "batch_size": 4, "micro_batch_size": 4, "checkpointing": False}


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape, values in SHAPES.items():
            model = random_model(Path(scratch) / shape, values)
            for way, settings in WAYS.items():
                pins = [part for key, value in {**COMMON, **settings}.items() for part in ("--set", f"{key}={value}")]
                plan = Path(scratch) / f"{len(rows)}.json"
                verb(
                    "plan",
                    "--model",
                    str(model),
                    "--profile",
                    "cpu",
                    *pins,
                    "--verify",
                    "--out",
                    str(plan),
                    as_json=False,
                )
                trial = json.loads(plan.with_name("trial.json").read_text())
                estimated, measured = trial["estimated_seconds_per_step"], trial["measured_seconds_per_step"]
                ratio = round(estimated / measured, 3)
                rows.append({"run": f"{shape}; {way}", "estimated_seconds": estimated, "measured_seconds": measured,
                             "estimated_to_measured": ratio})  # fmt: skip
                print(f"{rows[-1]['run']:40} estimated {estimated:.2f} s, measured {measured:.2f} s, ratio {ratio}",
                      flush=True)  # fmt: skip
    away = [abs(math.log(row["estimated_to_measured"])) for row in rows]
    ratios = sorted(row["estimated_to_measured"] for row in rows)
    summary = {"runs": len(rows), "lowest": ratios[0], "median": statistics.median(ratios), "highest": ratios[-1],
               "typical_factor": round(math.exp(statistics.fmean(away)), 3)}  # fmt: skip
    print(json.dumps(summary), file=sys.stderr)
    probes = sorted((Path.home() / ".cache" / "edgeft").glob("probe-*.json"))
    record("time", {"summary": summary, "probe": json.loads(probes[-1].read_text()) if probes else None, "runs": rows})


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "bench"))
    main()
