"""What does LISA hold in memory at every interval, on SmolLM2-135M's shape, against full fine-tuning and its plan?

    make bench-lisa

Random weights, batch 2 x 512 tokens, embedding off, two layers at a time, eight switches: on the fp32 base, on its NF4
form, and full fine-tuning, each with activations kept and recomputed. Also the seconds of a step.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from planner import long_texts
from run import ROOT, interval_plans, record, train
from transformers import AutoConfig, AutoModelForCausalLM

from edgeft.planning.plan import Plan

COMMON = {"max_length": 512, "batch_size": 2, "micro_batch_size": 2, "eval_rows": 4, "tuner": "full"}
INTERVAL, SWITCHES = 2, 8
LISA = {"layers": "lisa", "active_layers": 2, "lisa_interval": INTERVAL, "max_steps": INTERVAL * (SWITCHES + 1)}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"max_steps": 4, "base_precision": "fp32"},
    "LISA-2": {**LISA, "base_precision": "fp32"},
    "LISA-2 on NF4": {**LISA, "base_precision": "nf4"},
}


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        config = AutoConfig.from_pretrained(ROOT / "examples" / "configs" / "smollm2-135m")
        config.eos_token_id = config.bos_token_id = 0
        model = Path(scratch) / "model"
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (model / name).write_bytes((ROOT / "examples" / "debian-tiny" / name).read_bytes())
        text = long_texts(Path(scratch) / "text.jsonl")
        for checkpointing in (False, True):
            for name, settings in RUNS.items():
                folder = Path(scratch) / f"{name} {checkpointing}"
                result = train(folder, {**COMMON, **settings, "checkpointing": checkpointing}, data=text, valid=text,
                               model=model)  # fmt: skip
                plan = Plan.read(folder / "plan.json")
                phase = next(p for p in plan.phases if p.name == "train")
                intervals = []
                if plan.training.layers == "lisa":
                    for (units, predicted), peak in zip(
                        interval_plans(plan), result["interval_peak_bytes"], strict=True
                    ):
                        intervals.append({"units": units, "predicted_bytes": predicted, "measured_bytes": peak,
                                          "error": round(predicted / peak - 1, 4)})  # fmt: skip
                rows.append({
                    "run": name, "checkpointing": checkpointing, "predicted_bytes": phase.expected_bytes,
                    "high_bytes": phase.high_bytes, "measured_bytes": result["phase_peak_bytes"]["train"],
                    "seconds_per_step": round(result["seconds"] / result["steps"], 3), "intervals": intervals,
                    "interval_optimizer_bytes": sorted(set(result["interval_optimizer_bytes"])),
                })  # fmt: skip
                full = next(row for row in rows if row["run"] == "full" and row["checkpointing"] == checkpointing)
                share = rows[-1]["measured_bytes"] / full["measured_bytes"]
                rows[-1]["share_of_full"] = round(share, 4)
                rows[-1]["step_time_against_full"] = round(rows[-1]["seconds_per_step"] / full["seconds_per_step"], 3)
                row, mib = rows[-1], 2**20
                print(f"{name:14} recomputed {checkpointing!s:5} predicted {row['predicted_bytes'] / mib:6.0f} "
                      f"measured {row['measured_bytes'] / mib:6.0f} MiB  {100 * share:5.1f}% of full  "
                      f"{row['step_time_against_full']:.2f} of its step time", flush=True)  # fmt: skip
                for one in intervals:
                    print(f"    {', '.join(one['units']):22} predicted {one['predicted_bytes'] / mib:6.0f} measured "
                          f"{one['measured_bytes'] / mib:6.0f} MiB {100 * one['error']:+.1f}%", flush=True)  # fmt: skip
    errors = [abs(interval["error"]) for row in rows for interval in row["intervals"]]
    summary = {"interval_mean_error": round(statistics.fmean(errors), 4), "interval_worst_error": max(errors)}
    print(json.dumps(summary))
    record("lisa", {"summary": summary, "runs": rows})


if __name__ == "__main__":
    main()
