"""What does it take to leave layers in their files: time beside a run that has them in memory, memory beside the plan?

    make bench-stream               # or: python bench/stream.py --small, a rehearsal that records nothing

First a model that fits, SmolLM2-135M's shape: its resident and its streamed run take steps in turns in one process,
both recomputed, and are the same to the last bit. Then one that does not: 1.1B parameters, whose fp32 weights take
twice what the system lets the whole process have, planned and trained to the end inside of a control group
(limited.py). Random weights; nothing else may run beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from large_stages import random_shards
from limited import Group, limited, limited_verb
from prefix_cache import own_cache, rows_of
from run import pins, random_model, record, verb

from edgeft.data.samples import Sample
from edgeft.engine.loop import Run, make_run
from edgeft.engine.nf4_base import load_base
from edgeft.machines import meter
from edgeft.memory import train_step
from edgeft.models.parts import find_parts
from edgeft.models.spec import read_model_spec
from edgeft.planning.plan import Plan, make_plan
from edgeft.settings.job import Training, make_job

FITS, BEYOND = "smollm2-135m", "tinyllama-1.1b"
# how the base is kept, and stored
FORMS: dict[str, tuple[str, torch.dtype]] = {
    "fp32": ("fp32", torch.float32), "fp32 of a bf16 file": ("fp32", torch.bfloat16), "nf4": ("nf4", torch.bfloat16),
}  # fmt: skip
HOW = {"tuner": "lora", "rank": 16, "checkpointing": True, "kept_layers": 0, "malloc": "tight", "prefix_cache": False}
TOKENS = 128  # of each sample: the fewer, the more of a step is reading
LIMIT_BYTES = 2 * 2**30
BEYOND_HOW = {
    **HOW, "rank": 8, "base_precision": "fp32", "max_steps": 3, "batch_size": 2, "micro_batch_size": 2,
    "max_length": TOKENS, "eval_rows": 2,
}  # fmt: skip
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 4096}
CPU = torch.device("cpu")


def begin(model: Path, training: Training, work: Path) -> Run:
    base = load_base(model, training, CPU, torch.float32).requires_grad_(False)
    work.mkdir(parents=True)
    return make_run(training, CPU, torch.float32, base, find_parts(base), model, work)


def side_by_side(model: Path, precision: str, work: Path, steps: int) -> dict[str, Any]:
    """Seconds of a step of both runs, that take turns; the first step of each is not counted."""
    settings = {**HOW, "base_precision": precision, "max_length": TOKENS, "batch_size": 2, "micro_batch_size": 2}
    plan = make_plan(make_job(model=str(model), stream_layers=True, max_steps=steps + 1, **settings))
    ways = {"streamed": plan.training, "resident": plan.training.model_copy(update={"stream_layers": False})}
    runs = {way: begin(model, training, work / way) for way, training in ways.items()}
    ids = [[(7 * n + 31 * row) % 4000 + 3 for n in range(TOKENS)] for row in range(2)]
    samples = [Sample(row, row, 1) for row in ids]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for step in range(steps + 1):
        for way in sorted(ways, reverse=bool(step % 2)):
            started = time.monotonic()
            runs[way].train_step(samples)
            if step:
                seconds[way].append(time.monotonic() - started)
    pairs = zip(runs["streamed"].chosen, runs["resident"].chosen, strict=True)
    ratios = [one / other for one, other in zip(seconds["streamed"], seconds["resident"], strict=True)]
    return {
        "times": round(statistics.median(ratios), 4), "ratios": ratios, "seconds": seconds,
        "equal": all(torch.equal(one, other) for (_, one), (_, other) in pairs),
    }  # fmt: skip


def beyond(model: Path, group: Group, limit_bytes: int, folder: Path) -> dict[str, Any]:
    """Planned against measured bytes of a run whose weights alone are more than it may have."""
    data, valid = rows_of(folder, 8)
    job = ["--model", str(model), "--data", str(data), "--valid", str(valid), *pins(BEYOND_HOW)]
    verb("plan", *job, "--set", "stream_layers=true", "--out", str(folder / "probe.json"))  # this machine's rates
    limited_verb(group, "plan", *job, "--set", "stream_layers=true", "--out", str(folder / "plan.json"))
    started = time.monotonic()
    limited_verb(group, "train", str(folder / "plan.json"), "--out", str(folder / "train"), "--no-rehearsal")
    wall = time.monotonic() - started
    plan, result = Plan.read(folder / "plan.json"), json.loads((folder / "train" / "train.json").read_text())
    resident = plan.training.model_copy(update={"stream_layers": False})
    phases = {phase.name: phase for phase in plan.phases}
    peaks = {
        name: {"predicted_bytes": phases[name].expected_bytes, "high_bytes": phases[name].high_bytes,
               "measured_bytes": peak, "error": round(phases[name].expected_bytes / peak - 1, 4)}
        for name, peak in result["phase_peak_bytes"].items() if name in phases
    }  # fmt: skip
    return {
        "limit_bytes": limit_bytes, "weights_bytes": train_step.weight_bytes(plan.spec, resident),
        "file_bytes": plan.spec.stored_bytes, "parameters": plan.spec.total_parameters,
        "budget_bytes": plan.budget_bytes, "peaks": peaks, "steps": result["steps"], "wall_seconds": round(wall, 1),
        "seconds_per_step": result["seconds"] / result["steps"], "estimated_seconds_per_step": plan.seconds_per_step,
        "curve": [loss for _, loss in result["loss_curve"]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny models and a limit of 0.75 GiB; nothing is recorded")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    limit = 3 * 2**28 if options.small else LIMIT_BYTES
    meter.import_all()
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        own_cache(scratch)
        model = random_model(scratch / "beyond", SMALL) if options.small else random_shards(scratch / "beyond", BEYOND)
        with limited(limit) as group:
            larger = beyond(model, group, limit, scratch)
        print(json.dumps(larger), flush=True)
        meter.control_malloc()
        fits = {}
        for form, (precision, dtype) in FORMS.items():
            folder = scratch / form.replace(" ", "-")
            if options.small:
                random_model(folder, SMALL | {"dtype": dtype})
            else:
                random_shards(folder, FITS, dtype)
            fits[form] = side_by_side(folder, precision, scratch / f"work {form}", options.steps)
            print(
                f"{form:20} {fits[form]['times']:.3f} times the resident step, equal: {fits[form]['equal']}", flush=True
            )
            meter.give_back()
        shape = {"model": FITS, "parameters": read_model_spec(str(folder)).total_parameters, "tokens": 2 * TOKENS}
    if not options.small:
        record("stream", {"fits": {**shape, "steps": options.steps, "forms": fits}, "beyond": larger})


if __name__ == "__main__":
    main()
