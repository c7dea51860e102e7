"""How much longer does an export take than the runtime's own builder, and a training than its steps?

    make bench-proof                   about seven minutes on a quiet machine with two cores
    make bench-proof whole=1           training as it is planned without a setting: about a quarter of an hour
    make bench-proof model=example     the small example instead of 135M, to try it

SmolLM2-135M-Instruct of bench/smollm2.py, 30 steps of LoRA on debian-sections, then `edgeft export --target ort-int8`
and the builder of onnxruntime-genai by its own command line on the same merged checkpoint, in turns, each a process of
its own as a user starts it. Steps alone are what the very run says of its own steps. What the export's stages took is
laid beside what the plan said. Nothing is recorded where other work took more than a tenth of a core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from decode import MOST_BY_OTHERS, busy_ticks, work_of_others
from run import BASE, ROOT, SECTIONS, pins, record, verb

TARGET, ROUNDS = "ort-int8", 2
SETTINGS = {"tuner": "lora", "rank": 16, "max_steps": 30, "batch_size": 16, "eval_rows": 200}
AIMS = {"export": 3.0, "train": 1.15}  # times the builder alone, times the steps alone
# What ort-int8 is in the builder's words (tests/runtimes.py)
WEIGHTS = {"type": "int8", "method": "rtn", "block_size": 32, "symmetric": False, "accuracy_level": 4,
           "overrides": [], "op_types": ["MatMul"]}  # fmt: skip
BUILDER = (
    "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "--builder_config_version", "2", "--target_options",
    json.dumps({"quant_config": {"io_dtype": "fp32", "weights": WEIGHTS}}),
)  # fmt: skip


def children_seconds() -> float:
    """CPU seconds of this process and of all that it waited for."""
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of some work in processes of its own, its CPU seconds, and the cores that others had meanwhile."""
    started, mine, machine = time.monotonic(), children_seconds(), busy_ticks()
    work()
    seconds = time.monotonic() - started
    cpu = children_seconds() - mine
    others = max(0.0, busy_ticks() - machine - cpu) / seconds
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "cores_others": round(others, 3)}


def source(name: str) -> tuple[Path, list[str]]:
    """(a base, files of its data)."""
    if name == "example":
        return BASE, [str(SECTIONS / "train.jsonl"), str(SECTIONS / "valid.jsonl")]
    from smollm2 import FOLDER, ROWS, base_model, chats

    folder = FOLDER / "sections"
    folder.mkdir(parents=True, exist_ok=True)
    return base_model(FOLDER), [str(chats("sections", part, ROWS[part], folder / f"{part}.jsonl")) for part in ROWS]


def run_builder(merged: Path, out: Path) -> None:
    """The builder of onnxruntime-genai by its own command line, into a folder that goes away."""
    command = [sys.executable, *BUILDER, "-i", str(merged), "-o", str(out), "-c", str(out / "cache")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   env=os.environ | {"HF_HUB_OFFLINE": "1"})  # fmt: skip
    shutil.rmtree(out)


def training(base: Path, files: Sequence[str], build: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A whole `edgeft train` beside what it says that its own steps took."""
    given = ["--data", files[0], "--valid", files[1]]
    verb("plan", "--model", str(base), "--profile", "cpu", *given, *pins(settings), "--out", str(build / "plan.json"))
    train = timed(lambda: verb("train", str(build / "plan.json"), "--target", TARGET))
    result = json.loads((build / "train" / "train.json").read_text())
    steps = round(result["seconds"], 2)
    found = train | {"steps": result["steps"], "steps_seconds": steps,
                     "times_steps": round(train["seconds"] / steps, 3)}  # fmt: skip
    print(f"train: {found['times_steps']:.2f} times the {steps:.1f} s of its {result['steps']} steps", flush=True)
    return found


def bench(model: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Everything, in the order of a user's work; what is timed last is timed in turns."""
    base, files = source(model)
    build = folder / "build"
    train = training(base, files, build, SETTINGS)
    verb("merge", str(build / "train"))
    runs: dict[str, list[dict[str, float]]] = {"export": [], "builder": []}
    for number in range(rounds):
        out = folder / f"bundle-{number}"
        merged = build / "merged"
        runs["builder"].append(timed(lambda: run_builder(merged, folder / "builder")))  # noqa: B023
        runs["export"].append(timed(lambda: verb("export", str(merged), "--target", TARGET, "--out", str(out))))  # noqa: B023
        ratio = runs["export"][-1]["seconds"] / runs["builder"][-1]["seconds"]
        print(f"export: {ratio:.2f} times the builder's {runs['builder'][-1]['seconds']:.1f} s", flush=True)
    ratios = [one["seconds"] / other["seconds"] for one, other in zip(runs["export"], runs["builder"], strict=True)]
    bundle = json.loads((folder / "bundle-0" / "bundle.json").read_text())
    stages = json.loads((build / "plan.json").read_text())["stages"]["export"]
    return {
        "train": train, "runs": runs, "export_times_builder": round(statistics.median(ratios), 3),
        "planned": {each["stage"]: each["seconds"] for each in stages},
        "rungs": {rung["name"] + " against " + rung["against"]: rung["compared"] for rung in bundle["proof"]["rungs"]},
    }  # fmt: skip


def busiest(found: dict[str, Any]) -> float:
    """Cores that others had in the timed run that they disturbed most."""
    runs = [found[name] for name in ("train", "whole_train") if name in found]
    runs += [run for each in found.get("runs", {}).values() for run in each]
    return float(max(run["cores_others"] for run in runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("smollm2", "example"), nargs="?", default="smollm2")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--whole", action="store_true", help="train as planned without a setting, and export nothing")
    parser.add_argument("--print", action="store_true", help="also beside other work; record nothing")
    given = parser.parse_args()
    if not given.print and (others := work_of_others()) > MOST_BY_OTHERS:
        raise SystemExit(f"other work takes {others:.2f} of a core: wait until it takes less than {MOST_BY_OTHERS}")
    with tempfile.TemporaryDirectory() as scratch:
        if given.whole:
            found = {"whole_train": training(*source(given.model), Path(scratch) / "build", {})}
            times = {"train": found["whole_train"]["times_steps"]}
        else:
            found = bench(given.model, Path(scratch), given.rounds)
            times = {"export": found["export_times_builder"], "train": found["train"]["times_steps"]}
    for name, ratio in times.items():
        within = "within" if ratio <= AIMS[name] else "beyond"
        print(f"{name}: {ratio:.2f} times, {within} the aim of {AIMS[name]:g}")
    if given.print:
        print(json.dumps(found, indent=1))
        return
    if (others := busiest(found)) > MOST_BY_OTHERS:
        raise SystemExit(f"not recorded: other work took {others:.2f} of a core meanwhile")
    path = ROOT / "bench" / "results" / "proof.json"
    before = json.loads(path.read_text()).get("models", {}) if path.is_file() else {}
    models = before | {given.model: before.get(given.model, {}) | found}
    record("proof", {"settings": SETTINGS, "target": TARGET, "aims": AIMS, "models": models})


if __name__ == "__main__":
    main()
