"""What does each of several processes take beside what its plan says, and how long is a step?

    make bench-ranks                # or: python bench/ranks.py --small, a rehearsal that records nothing

SmolLM2-135M's shape with random weights under torchrun, on this machine, one thread each: LoRA, all weights, layers in
turn on NF4, LoRA on a base of which each process has a part. Of each process the highest bytes of its run, before the
tuned model is scored, against the plan's expected ones. Nothing else may run beside it. Runs that have ended are kept
in build/bench-ranks.jsonl (remove it to measure again).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from prefix_cache import SMALL, rows_of
from run import ROOT, Kept, pins, random_135m, random_model, record, verb

from edgeft.planning.plan import Plan

# set before the machine is measured: what its matrix library keeps is of each thread
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
COMMON = {"batch_size": 8, "eval_rows": 4, "max_steps": 8, "malloc": "tight", "prefix_cache": False}
LORA = {"tuner": "lora", "rank": 16}
# a plan expects the draw that needs most, the lowest layer and the topmost, which comes in a long run: here at once
IN_TURN = {"tuner": "full", "layers": "lisa", "active_layers": 2, "lisa_interval": 8, "max_steps": 16, "seed": 16}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "LoRA, 2 processes": (2, {**LORA, "base_precision": "fp32"}),
    "LoRA, 4 processes": (4, {**LORA, "base_precision": "fp32"}),
    "all weights, 2 processes": (2, {"tuner": "full", "base_precision": "fp32"}),
    "layers in turn on NF4, 2 processes": (2, {**IN_TURN, "base_precision": "nf4"}),
    "LoRA, base in 2 parts": (2, {**LORA, "base_precision": "fp32", "shard_base": True}),
    "LoRA, base in 4 parts": (4, {**LORA, "base_precision": "fp32", "shard_base": True}),
    "LoRA, NF4 base in 2 parts": (2, {**LORA, "base_precision": "nf4", "shard_base": True}),
}  # fmt: skip


def one_run(folder: Path, model: Path, data: tuple[Path, Path], count: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What a run of so many processes took."""
    path = folder / "plan.json"
    verb("plan", "--model", str(model), "--data", str(data[0]), "--valid", str(data[1]), "--processes", str(count),
         *pins(COMMON | settings), "--out", str(path))  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "edgeft", "train",
               str(path), "--no-rehearsal", "--json"]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    result = json.loads((folder / "train" / "train.json").read_text())
    plan = Plan.read(path)
    expected = max(phase.expected_bytes for phase in plan.phases)
    return {
        "expected_bytes": expected, "high_bytes": plan.peak_bytes, "process_peak_bytes": result["process_peak_bytes"],
        "errors": [round(expected / peak - 1, 5) for peak in result["process_peak_bytes"]],
        "phase_peak_bytes": result["phase_peak_bytes"], "deviations": result["deviations"],
        "seconds_per_step": result["seconds"] / result["steps"], "estimated_seconds_per_step": plan.seconds_per_step,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny model; nothing is recorded")
    options = parser.parse_args()
    past = Kept("ranks-small" if options.small else "ranks")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        os.environ |= ONE_THREAD | {"XDG_CACHE_HOME": str(scratch / "cache")}
        model = random_model(scratch / "model", SMALL) if options.small else random_135m(scratch / "model")
        data = rows_of(scratch, 64)
        for name, (count, settings) in CASES.items():
            if name not in past.rows or options.small:
                (scratch / name).mkdir()
                past.add({"run": name, **one_run(scratch / name, model, data, count, settings)})
            found[name] = {key: value for key, value in past.rows[name].items() if key != "run"}
            errors = ", ".join(f"{100 * error:+.1f}%" for error in found[name]["errors"])
            print(f"{name:36} plan against each process: {errors}", flush=True)
    errors = [abs(error) for case in found.values() for error in case["errors"]]
    summary = {"largest_absolute_error": max(errors), "mean_absolute_error": round(sum(errors) / len(errors), 5)}
    print(json.dumps(summary))
    if not options.small:
        record("ranks", {"threads": 1, "summary": summary, "cases": found})


if __name__ == "__main__":
    main()
