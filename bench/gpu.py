"""How far are a GPU's planned bytes from its allocator's, on the GPU that is here? Real steps with random weights.

    make bench-cuda

Each case is planned for this GPU as a profile of its own and run for three steps on samples as long as the longest, all
in one process: allocated and reserved bytes at their highest, seconds of the third step. `--device cpu` rehearses the
same cases on tiny shapes without a GPU, so that nothing fails on the first line when there is one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["PYTORCH_ALLOC_CONF"] = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as edgeft train

import torch
from run import CONFIGS, record

from edgeft.engine.loop import make_run
from edgeft.machines import meter
from edgeft.planning.plan import Plan, make_plan
from edgeft.settings.job import make_job
from edgeft.training.train import prepare
from edgeft.training.try_plan import filled_sample, random_checkpoint

LORA = {"tuner": "lora", "rank": 16}
FULL = {"tuner": "full"}
LISA = {"tuner": "full", "layers": "lisa", "active_layers": 2, "lisa_interval": 1}
KEPT, AGAIN = {"checkpointing": False}, {"checkpointing": True}
# (model, samples per micro-batch, tokens per sample, what is pinned)
CASES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "135M LoRA bf16, kept": ("smollm2-135m", 4, 512, {**LORA, "base_precision": "bf16", **KEPT}),
    "135M LoRA NF4, recomputed": ("smollm2-135m", 4, 512, {**LORA, "base_precision": "nf4", **AGAIN}),
    "135M full, kept": ("smollm2-135m", 4, 512, {**FULL, **KEPT}),
    "135M full, 8-bit AdamW": ("smollm2-135m", 4, 512, {**FULL, **KEPT, "optimizer": "adamw8bit"}),
    "135M LISA bf16": ("smollm2-135m", 4, 512, {**LISA, "base_precision": "bf16", **KEPT}),
    "135M LISA NF4, parked": ("smollm2-135m", 4, 512, {**LISA, "base_precision": "nf4", **KEPT, "lisa_state": "park"}),
    "160M GPT-NeoX LoRA bf16, recomputed": ("pythia-160m", 4, 512, {**LORA, "base_precision": "bf16", **AGAIN}),
    "0.5B LoRA bf16, kept": ("qwen2.5-0.5b", 4, 512, {**LORA, "base_precision": "bf16", **KEPT}),
    "0.5B full, recomputed": ("qwen2.5-0.5b", 2, 512, {**FULL, **AGAIN}),
    "1B LoRA bf16, recomputed": ("llama-3.2-1b", 4, 512, {**LORA, "base_precision": "bf16", **AGAIN}),
    "1B sparse full bf16": ("llama-3.2-1b", 4, 512, {**FULL, "layers": "sparse", "active_layers": 2,
                                                     "base_precision": "bf16", **AGAIN}),
    "Gemma 3 1B LoRA bf16, recomputed": ("gemma-3-1b", 2, 512, {**LORA, "base_precision": "bf16", **AGAIN}),
    "1.7B LoRA bf16, kept": ("qwen3-1.7b", 4, 512, {**LORA, "base_precision": "bf16", **KEPT}),
}  # fmt: skip


GPU = """description = "{name}"
roles = ["train"]
device = "cuda"
memory_gib = {gib}
runtime_memory_gib = 0.7
host_memory_gib = 64.0
cores = 8
compute_capability = {capability}
bandwidth_gb_per_second = 3000  # rates are assumed: bytes do not depend on them

[matmul_tflops]
fp32 = 60
fp16 = 700
bf16 = 700
"""
STAND_IN = """description = "stands in for a GPU in a rehearsal"
roles = ["train"]
device = "cpu"
memory_gib = 16
runtime_memory_gib = 1
cores = 1
bandwidth_gb_per_second = 10
matmul_tflops = {fp32 = 0.05}
"""


def write_profile(device: str, path: Path) -> Path:
    """This machine's profile as a user would write it."""
    text = STAND_IN
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        gib = round(found.total_memory / 2**30, 2)
        text = GPU.format(name=found.name, gib=gib, capability=found.major + found.minor / 10)
    path.write_text(text)
    return path


def shrink(folder: Path, out: Path) -> Path:
    """A config of the same family, two layers of a small width."""
    config = json.loads((folder / "config.json").read_text())
    heads = max(1, config["num_attention_heads"] // config.get("num_key_value_heads", config["num_attention_heads"]))
    small = {
        "num_hidden_layers": 2, "hidden_size": 64 * heads, "intermediate_size": 128, "num_attention_heads": 2 * heads,
        "vocab_size": 512, "layer_types": config.get("layer_types", [])[:2] or None, "pad_token_id": 0,
        "max_window_layers": 2,
    }  # fmt: skip
    config |= {key: value for key, value in small.items() if key in config}
    config |= {"num_key_value_heads": 2} if "num_key_value_heads" in config else {}
    config |= {"head_dim": 32} if "head_dim" in config else {}
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config))
    return out


def plan_case(name: str, profile: Path, rehearsal: bool, folder: Path) -> Plan:
    """The plan of one case; a CPU's rehearsal leaves out what only a GPU has."""
    _, batch, length, pins = CASES[name]
    if rehearsal:
        pins = {k: v for k, v in pins.items() if k != "optimizer" and (k, v) != ("base_precision", "bf16")}
        length = 64
    values = {"batch_size": batch, "micro_batch_size": batch, "max_length": length, "max_steps": 3, **pins}
    return make_plan(make_job(model=str(folder), profile=str(profile), **values))


def measure(plan: Plan, weights: Path, scratch: Path) -> dict[str, Any]:
    """Bytes and seconds of three real steps."""
    device = torch.device(plan.training.device)
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[plan.training.compute_dtype]
    model, parts = prepare(plan, device, compute, weights)
    run = make_run(plan.training, device, compute, model, parts, weights, scratch)
    sample = filled_sample(plan)
    meter.reset_peak(device)
    for _ in range(3):
        started = time.monotonic()
        run.train_step([sample] * plan.training.batch_size)
        if device.type == "cuda":
            torch.cuda.synchronize()
    seconds = time.monotonic() - started
    if device.type != "cuda":
        return {"seconds_per_step": round(seconds, 4)}
    return {"allocated_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved(),
            "seconds_per_step": round(seconds, 4)}  # fmt: skip


def one(name: str, profile: Path, rehearsal: bool, folder: Path, weights: Path, scratch: Path) -> dict[str, Any]:
    """One row: planned beside measured. A case that fails is a row that says so."""
    plan = plan_case(name, profile, rehearsal, folder)
    phase = next(phase for phase in plan.phases if phase.name == "train")
    row: dict[str, Any] = {"run": name, "planned_bytes": phase.expected_bytes, "planned_high_bytes": phase.high_bytes,
                           "planned_seconds_per_step": plan.seconds_per_step}  # fmt: skip
    try:
        row |= measure(plan, weights, scratch)
    except Exception as problem:  # the other cases are still worth their minutes
        row["failed"] = f"{type(problem).__name__}: {problem}"[:400]
    gc.collect()
    torch.cuda.empty_cache()  # nothing without a GPU
    if "reserved_bytes" in row:
        row["error_of_reserved"] = round(row["planned_bytes"] / row["reserved_bytes"] - 1, 4)
        row["above_high"] = row["reserved_bytes"] > row["planned_high_bytes"]
    return row


def show(row: dict[str, Any]) -> None:
    mib = {key: f"{row[key] / 2**20:,.0f}" for key in
           ("planned_bytes", "planned_high_bytes", "allocated_bytes", "reserved_bytes") if key in row}  # fmt: skip
    print(f"{row['run']:38}", *(f"{key.removesuffix('_bytes')} {value}" for key, value in mib.items()),
          f"error {row.get('error_of_reserved', '')}", f"{row.get('seconds_per_step', '')} s",
          "ABOVE HIGH" if row.get("above_high") else "", row.get("failed", ""), flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench-cuda: PyTorch sees no GPU here; rehearse with --device cpu")
    meter.import_all()
    rehearsal, rows = asked.device == "cpu", []
    with tempfile.TemporaryDirectory() as scratch:
        profile = write_profile(asked.device, Path(scratch) / "here.toml")
        made: dict[str, tuple[Path, Path]] = {}
        for number, name in enumerate(name for name in CASES if asked.only in name):
            model = CASES[name][0]
            if model not in made:
                folder = CONFIGS / model
                if rehearsal:
                    folder = shrink(folder, Path(scratch) / "configs" / model)
                made[model] = folder, Path(scratch) / "weights" / model
                random_checkpoint(folder, made[model][1], asked.device)
            work = Path(scratch) / f"work-{number}"
            work.mkdir()
            rows.append(one(name, profile, rehearsal, *made[model], work))
            show(rows[-1])
    failed = [row["run"] for row in rows if "failed" in row]
    if not rehearsal:
        smi = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        gpu = subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip()
        record("cuda", {"gpu": gpu, "capability": torch.cuda.get_device_capability(), "rows": rows})
    else:
        print(f"rehearsed {len(rows) - len(failed)} of {len(rows)} cases; bytes of a GPU were not measured")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
