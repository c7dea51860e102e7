"""How far is what edgeft says of a GPU from what the GPU that is here does, and how far is edgeft ahead of its peers?

    make bench-cuda

All in one process, with random weights made on the device, the most telling first: edgeft and PEFT + Trainer in turn
on the same job, then planned against allocated and reserved bytes and seconds of each run of bench/gpu_runs.json and
some more, of runs whose layers stay in their files beside those that hold them, what one launch costs, what the device
and the host spend on NF4 codes, and how many kernels some steps take.
Rows are written as they are measured (build/bench-cuda.jsonl, or in the folder $OUT): a run that is cut short keeps
them. What fails is a row that says so. `--device cpu` rehearses everything on tiny shapes without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["PYTORCH_ALLOC_CONF"] = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as edgeft train
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from gpu_models import (
    Case,
    clear,
    count_kernels,
    errors,
    launch_seconds,
    measure,
    measured_before,
    nf4_from_files,
    planned,
    shrink,
)
from gpu_peers import COMPARISONS, compare
from gpu_streamed import streamed, streamed_cases
from run import BASE, CONFIGS, ROOT, record

from edgeft.machines import meter
from edgeft.machines.profile import Profile, load_profile
from edgeft.settings.job import Training

RESULTS = ROOT / "bench" / "results" / "cuda.json"
RUNS = json.loads((ROOT / "bench" / "gpu_runs.json").read_text())
LISA = {"tuner": "full", "layers": "lisa", "active_layers": 2}
AGAIN = {"checkpointing": True}
BF16, FP16, NF4 = ({"base_precision": base, "compute_dtype": compute}
                   for base, compute in (("bf16", "bf16"), ("fp16", "fp16"), ("nf4", "bf16")))  # fmt: skip
# beside the runs of bench/gpu_runs.json: (model, what is set)
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "135M LISA on NF4, parked": ("smollm2-135m", {**LISA, **NF4, "lisa_state": "park"}),
    "135M LoRA in fp16, recomputed": ("smollm2-135m", {**FP16, **AGAIN}),
    "gemma-2-2b LoRA, recomputed": ("gemma-2-2b", {**BF16, **AGAIN, "batch_size": 8}),
    "1B LoRA on NF4, kept": ("llama-3.2-1b", NF4),
}
# run after every constant had been fitted on the others: their error is that of a prediction
UNSEEN: dict[str, tuple[str, dict[str, Any]]] = {
    "unseen: 1.5B LoRA, kept": ("qwen2.5-1.5b", BF16),
    "unseen: 1.5B LoRA, recomputed, 16 at once": ("qwen2.5-1.5b", {**BF16, **AGAIN, "micro_batch_size": 16}),
    "unseen: 3B LoRA on NF4, recomputed": ("llama-3.2-3b", {**NF4, **AGAIN, "batch_size": 8}),
    "unseen: 3B LoRA on NF4, recomputed, 8 at once": (
        "llama-3.2-3b", {**NF4, **AGAIN, "batch_size": 8, "micro_batch_size": 8}),
    "unseen: 360M full": ("smollm2-360m", {"tuner": "full", "base_precision": "fp32", "compute_dtype": "fp32",
                                          "embedding": "on", "norm": "on", "head": "on", **AGAIN}),
    "unseen: 0.6B DoRA": ("qwen3-0.6b", {**BF16, "tuner": "dora"}),
    "unseen: 1.1B LoRA, 8 at once": ("tinyllama-1.1b", {**BF16, "micro_batch_size": 8}),
    "unseen: OLMo 2 1B LoRA, recomputed, 8 at once": ("olmo-2-1b", {**BF16, **AGAIN, "micro_batch_size": 8}),
    "unseen: 7B LoRA, recomputed": ("mistral-7b", {**BF16, **AGAIN, "batch_size": 8}),
    "unseen: 7B LoRA on NF4, recomputed, 4 x 1,024": (
        "qwen2.5-7b", {**NF4, **AGAIN, "batch_size": 4, "max_length": 1024}),
}  # fmt: skip
COUNTED = (
    "the example, LoRA 64",
    "135M LoRA, kept",
    "135M full, kept",
    "1B LoRA, recomputed",
    "8B LoRA on NF4 in 9 GiB",
)
STEPS_OF_8B = {"batch_size": 4}  # two micro-batches and more hold what sixteen do
GPU = """description = "{name}"
roles = ["train"]
device = "cuda"
memory_gib = {gib}
runtime_memory_gib = 0.7
host_memory_gib = 128.0
cores = 16
compute_capability = {capability}
bandwidth_gb_per_second = 3350  # NVIDIA H100 SXM datasheet

[matmul_tflops]
fp32 = 495  # NVIDIA H100 SXM datasheet: TF32, by which fp32 is multiplied
fp16 = 989
bf16 = 989
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


def cases() -> Iterator[Case]:
    """Every case with planned beside measured bytes, the largest models first."""
    runs = sorted(RUNS["runs"], key=lambda run: (not run["run"].startswith("8B"), run["model"] != "debian-tiny"))
    for run in runs:
        yield measured_before(RUNS, run, **(STEPS_OF_8B if run["run"].startswith("8B") else {}))
    for name, (model, settings) in (MORE | UNSEEN).items():
        yield measured_before(RUNS, {"run": name, "model": model, "settings": settings})


class Bench:
    """One run: where its rows go, how long it may last, what it runs on."""

    def __init__(self, device: torch.device, seconds: float, scratch: Path) -> None:
        self.device, self.scratch, self.rows = device, scratch, list[dict[str, Any]]()
        self.rehearsal, self.started, self.ends = device.type == "cpu", time.monotonic(), time.monotonic() + seconds
        self.out = Path(os.environ.get("OUT") or ROOT / "build")
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / ("rehearsal-cuda.jsonl" if self.rehearsal else "bench-cuda.jsonl")
        self.file.write_text("")
        self.profile = self.own_profile()

    def own_profile(self) -> Profile:
        """This machine as a user would write it down."""
        path, text = self.scratch / "here.toml", STAND_IN
        if not self.rehearsal:
            found = torch.cuda.get_device_properties(0)
            text = GPU.format(name=found.name, gib=gib_here(), capability=found.major + found.minor / 10)
        path.write_text(text)
        return load_profile(str(path))

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row and show it."""
        row["at_seconds"] = round(time.monotonic() - self.started, 1)
        self.rows.append(row)
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")
        show(row)

    def attempt(self, name: str, work: Callable[[Path], dict[str, Any]], reserve: float = 0.0) -> None:
        """One row: what `work` finds, or why it failed, or that no time was left for it."""
        row: dict[str, Any] = {"run": name}
        folder = self.scratch / str(len(self.rows))
        folder.mkdir()
        if time.monotonic() > self.ends - reserve:
            row["failed"] = "left out: no time"
        else:
            try:
                row |= work(folder)
            except Exception as problem:  # the others are still worth their minutes
                row["failed"] = f"{type(problem).__name__}: {problem}"[:600]
        gc.collect()
        clear(self.device)
        self.add(row)

    def fitting(self, case: Case) -> Case:
        """The case itself, or its small form in a rehearsal."""
        return shrink(case, self.scratch / f"config-{len(self.rows)}") if self.rehearsal else case

    def planned_and_measured(self, case: Case, folder: Path) -> dict[str, Any]:
        """Bytes and seconds of one case beside what is planned."""
        case = self.fitting(case)
        row = {"model": case.folder.name, "training": case.training.model_dump(mode="json", exclude_defaults=True)}
        row |= planned(case, self.profile) | measure(case, self.device, folder)
        return row | errors(row)

    def streamed(self, case: Case, folder: Path) -> dict[str, Any]:
        """Bytes and seconds of a case whose layers stay in files, beside what is planned and a run that holds them."""
        case = self.fitting(case)
        row = {"model": case.folder.name, "training": case.training.model_dump(mode="json", exclude_defaults=True)}
        row |= planned(case, self.profile) | streamed(case, self.device, folder)
        return row | errors(row)

    def counted(self, case: Case, folder: Path) -> dict[str, Any]:
        """Kernels of one step."""
        return count_kernels(self.fitting(case), self.device, folder)

    def host(self, folder: Path) -> dict[str, Any]:
        """What one small launch costs, and what of the card is neither this process's tensors nor free."""
        row: dict[str, Any] = {"launch_seconds": round(launch_seconds(self.device), 9)}
        if not self.rehearsal:
            free, total = torch.cuda.mem_get_info()
            row["context_bytes"] = total - free - torch.cuda.memory_reserved()
        return row


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors over all rows, and over those that no constant was fitted on.

    Layers in turn are planned for their worst set, which a few steps need not draw: not in the means of bytes.
    """
    planned_rows = [row for row in rows if "planned_to_measured_seconds" in row and "reserved_bytes" in row]
    found = {}
    for name, some in (("all", planned_rows), ("unseen", [r for r in planned_rows if r["run"].startswith("unseen")])):
        fixed = [row for row in some if row["training"].get("layers") != "lisa"]
        if fixed:
            found[name] = {
                "runs": len(some), "above_high": sum(row["above_high"] for row in some),
                **{f"mean_error_of_{what}": round(statistics.fmean(abs(row[f"error_of_{what}"]) for row in fixed), 4)
                   for what in ("allocated", "reserved")},
                "worst_error_of_reserved": max((row["error_of_reserved"] for row in fixed), key=abs),
                "typical_factor_of_seconds": round(math.exp(statistics.fmean(
                    abs(math.log(row["planned_to_measured_seconds"])) for row in some)), 3),
            }  # fmt: skip
    return found


def show(row: dict[str, Any]) -> None:
    mib = {key: f"{row[key] / 2**20:,.0f}" for key in
           ("planned_allocated_bytes", "allocated_bytes", "planned_bytes", "planned_high_bytes", "reserved_bytes")
           if key in row}  # fmt: skip
    words = [f"{key.removesuffix('_bytes')} {value}" for key, value in mib.items()]
    words += [f"{key} {row[key]}" for key in ("planned_seconds_per_step", "seconds_per_step", "error_of_allocated",
              "error_of_reserved", "ratios", "met", "launch_seconds", "context_bytes", "kernels", "device_seconds",
              "seconds_to_make", "host_bytes_more", "codes_that_differ", "scales_that_differ", "first_loss_equal",
              "largest_loss_difference")
              if key in row]  # fmt: skip
    words += ["ABOVE HIGH"] if row.get("above_high") else []
    words += [row["failed"]] if "failed" in row else []
    print(f"{row['at_seconds']:6.1f}  {row['run']:42}", " ".join(words), flush=True)


def run_all(bench: Bench, only: str) -> None:
    """Every row, the most telling first; half a minute is left for counting kernels."""
    for comparison in COMPARISONS:
        if only in comparison.name:
            for row in compare(comparison, bench):
                bench.add(row)
    wanted = {case.name: case for case in cases()}
    if not only:
        bench.attempt("a launch", bench.host)
    for case in streamed_cases(RUNS):
        if only in case.name:
            bench.attempt(case.name, lambda folder, case=case: bench.streamed(case, folder), 60.0)
    for name, case in wanted.items():
        if only in name:
            bench.attempt(name, lambda folder, case=case: bench.planned_and_measured(case, folder), 40.0)
    bf16 = wanted["1B LoRA, recomputed"]
    if "NF4 from files".startswith(only):
        work = lambda folder: nf4_from_files(bench.fitting(bf16), bench.device, folder)  # noqa: E731
        bench.attempt("1B made NF4 from its files", work, 30.0)
    for name in COUNTED:
        if only in name:
            case = replace(wanted[name], cap_gib=0.0)
            bench.attempt(f"{name}: kernels", lambda folder, case=case: bench.counted(case, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", help="cases whose name holds this; recorded beside the others")
    parser.add_argument("--seconds", type=float, default=540.0, help="no case starts after so many")
    parser.add_argument("--replan", action="store_true", help="plan what was recorded again; nothing is measured")
    asked = parser.parse_args()
    if asked.replan:
        replan()
        return
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench-cuda: PyTorch sees no GPU here; rehearse with --device cpu")
    meter.import_all()
    warnings.simplefilter("ignore")  # of the peers' packages; nothing here depends on them
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(torch.device(asked.device), asked.seconds, Path(scratch))
        run_all(bench, asked.only)
    failed = [row["run"] for row in bench.rows if "failed" in row]
    if bench.rehearsal:
        done = f"rehearsed {len(bench.rows) - len(failed)} of {len(bench.rows)} rows; a GPU was not measured"
        print(f"{done}: its bytes, its seconds, and of layers in files pinned buffers, the copy stream and its waits")
    else:
        keep(bench.rows, beside=bool(asked.only))
        (bench.out / "cuda.json").write_text(RESULTS.read_text())
    sys.exit(1 if failed else 0)


def keep(rows: list[dict[str, Any]], beside: bool) -> None:
    """Record rows, `beside` those of other names that the same kind of GPU gave before."""
    smi = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpu = subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip()
    before = json.loads(RESULTS.read_text()) if beside and RESULTS.is_file() else {"gpu": gpu, "rows": []}
    if before["gpu"] != gpu:
        sys.exit(f"bench-cuda: {RESULTS.name} is of {before['gpu']}; measure all of it here, without --only")
    names = {row["run"] for row in rows}
    found = [row for row in before["rows"] if row["run"] not in names] + rows
    facts = {"gpu": gpu, "gib": gib_here(), "capability": list(torch.cuda.get_device_capability())}
    record("cuda", {**facts, "summary": summary_of(found), "rows": found})


def gib_here() -> float:
    return round(torch.cuda.get_device_properties(0).total_memory / 2**30, 2)


def replan() -> None:
    """Plan what was recorded again, from configs and settings alone, as edgeft is now: what was measured stays."""
    kept = json.loads(RESULTS.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "there.toml"
        capability = kept["capability"][0] + kept["capability"][1] / 10
        path.write_text(GPU.format(name=kept["gpu"].split(",")[0], gib=kept["gib"], capability=capability))
        profile = load_profile(str(path))
    for row in kept["rows"]:
        if "training" in row:
            folder = BASE if row["model"] == BASE.name else CONFIGS / row["model"]
            row |= planned(Case(row["run"], folder, Training.model_validate(row["training"])), profile)
            row |= errors(row)
    kept["summary"] = summary_of(kept["rows"])
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept["summary"], indent=1))


if __name__ == "__main__":
    main()
