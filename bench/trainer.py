"""Is edgeft faster and smaller than what people write with PEFT and transformers' Trainer? The same job by both.

    make bench-trainer

The example (LoRA of rank 64 in batches of 16), and SmolLM2-135M's shape with random weights (2 samples of 512 tokens a
step): LoRA with activations kept and recomputed, full fine-tuning, LoRA on NF4. Both sides start from the same
weights and adapters and take the same rows in the same order at the same learning rates: their losses must agree. They
take turns, each run in a process of its own with the same number of threads. Seconds are the median of the steps after
the first three, of all runs; memory is the process's highest RSS, of the worst run; edgeft's includes scoring.
`--steps` and `--rounds` make a shorter run, which is not recorded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WARM_UP, CURVES_DIFFER = 3, 1e-3
COMMON = {"lora_alpha": 16.0, "seed": 0, "eval_rows": 1}
LORA = {"tuner": "lora", "rank": 64, "base_precision": "fp32", "checkpointing": False}
LONG = {"batch_size": 2, "micro_batch_size": 2, "max_length": 512}
AT_135M = {"seconds": 0.95, "bytes": 0.6}
CASES: dict[str, dict[str, Any]] = {
    "example, LoRA": {
        "settings": {**LORA, "batch_size": 16, "micro_batch_size": 16}, "steps": 40,
        "aims": {"seconds": 0.9, "bytes": 0.8},
    },
    "135M, LoRA": {"settings": {**LORA, **LONG}, "steps": 7, "aims": AT_135M},
    "135M, LoRA, recomputed": {"settings": {**LORA, **LONG, "checkpointing": True}, "steps": 7, "aims": AT_135M},
    "135M, full": {"settings": {"tuner": "full", "checkpointing": False, **LONG}, "steps": 7, "aims": AT_135M},
    "135M, LoRA on NF4": {"settings": {**LORA, **LONG, "base_precision": "nf4"}, "steps": 7, "aims": AT_135M},
}  # fmt: skip


def by_edgeft(folder: Path) -> dict[str, Any]:
    """One run of `edgeft.training.train.train`, as the verb runs it."""
    from edgeft.planning.plan import Plan
    from edgeft.training.train import train

    ends: list[float] = []
    busy: list[float] = []

    def note(phase: str, done: int, total: int, values: dict[str, float]) -> None:
        if phase == "train":
            ends.append(time.perf_counter())
            busy.append(time.process_time())

    result = train(Plan.read(folder / "plan.json"), folder / "train", plan_sha256="", progress=note)
    return {
        "ends": ends, "busy": busy, "losses": [loss for _, loss in result.loss_curve],
        "bytes": result.measured_peak_bytes,
        "predicted_bytes": result.predicted_peak_bytes,
    }  # fmt: skip


def by_trainer(folder: Path) -> dict[str, Any]:
    """One run of Trainer, on PEFT's adapters where the plan has some, as their documentation has it."""
    import torch
    import transformers
    from peers import InOrder, Noted, adapted, arguments
    from safetensors.torch import load_file

    from edgeft.machines.limits import resident_bytes
    from edgeft.planning.plan import Plan

    plan = Plan.read(folder / "plan.json")
    training, rows = plan.training, json.loads((folder / "rows.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(plan.job.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    options: dict[str, Any] = {"dtype": torch.float32}
    if training.base_precision == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(plan.job.model, **options)
    model.config.use_cache = False
    if training.tuner == "lora":
        if training.base_precision == "nf4":
            import peft

            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=training.checkpointing)
        model = adapted(model, training, load_file(folder / "adapters.safetensors"))
    noted = Noted()
    batch = training.batch_size
    trainer = InOrder(
        training, rows, model=model, callbacks=[noted], data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        args=arguments(training, str(folder / "trainer"), per_device_train_batch_size=batch, use_cpu=True),
    )  # fmt: skip
    trainer.train()
    return {"ends": noted.ends, "busy": noted.busy, "losses": noted.losses, "bytes": resident_bytes(highest=True)}


SIDES = {"edgeft": by_edgeft, "trainer": by_trainer}


def prepare(folder: Path, settings: dict[str, Any], steps: int, files: dict[str, str]) -> None:
    """The plan, the rows of its steps and the adapters that it starts from, for both sides."""
    import torch
    from safetensors.torch import save_file

    from edgeft.engine.loop import remaining_steps
    from edgeft.engine.trainable import apply_tuner
    from edgeft.models.checkpoint import local_folder
    from edgeft.planning.plan import make_plan
    from edgeft.settings.job import make_job
    from edgeft.training.job_data import Data
    from edgeft.training.train import prepare

    plan = make_plan(make_job(profile="cpu", max_steps=steps, **COMMON, **files, **settings))
    plan.write(folder / "plan.json")
    data = Data.read(plan)
    rows = [
        [{"input_ids": list(map(int, s.ids)), "labels": list(map(int, s.labels)), "attention_mask": [1] * len(s.ids)}
         for s in samples] for samples in remaining_steps(plan.training, data.train, 0)
    ]  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(rows))
    if plan.training.tuner == "lora":
        dense = plan.training.model_copy(update={"base_precision": "fp32"})
        model, parts = prepare(plan.model_copy(update={"training": dense}), torch.device("cpu"), torch.float32,
                               local_folder(plan.job.model))  # fmt: skip
        chosen = apply_tuner(model, parts, plan.training)
        save_file({name: p.detach().contiguous() for name, p in chosen}, folder / "adapters.safetensors")


def in_process(*arguments: str, threads: int) -> dict[str, Any]:
    """What this file printed last when run with these arguments, in a process of so many threads."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def seconds_per_step(runs: list[dict[str, Any]], clock: str = "ends") -> float:
    """The median over the steps of all runs, the first ones of each left out; of "busy", seconds of all cores."""
    steps = [
        after - before
        for run in runs
        for before, after in list(itertools.pairwise(run[clock]))[min(WARM_UP, len(run["ends"]) - 2) - 1 :]
    ]
    return statistics.median(steps)


def compare(name: str, runs: dict[str, list[dict[str, Any]]], aims: dict[str, float]) -> dict[str, Any]:
    """Both sides' seconds, bytes and losses, their ratios, and whether the aims are met."""
    sides = {
        side: {
            "seconds_per_step": round(seconds_per_step(own), 4),
            "cpu_seconds_per_step": round(seconds_per_step(own, "busy"), 4),
            "peak_bytes": max(run["bytes"] for run in own),
            "losses": own[0]["losses"],
        }
        for side, own in runs.items()
    }  # fmt: skip
    ours, theirs = sides["edgeft"], sides["trainer"]
    ours["predicted_bytes"] = runs["edgeft"][0]["predicted_bytes"]
    ratios = {
        "seconds": round(ours["seconds_per_step"] / theirs["seconds_per_step"], 3),
        "bytes": round(ours["peak_bytes"] / theirs["peak_bytes"], 3),
    }
    apart = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    return {
        "case": name, **sides, "ratios": ratios, "aims": aims, "largest_loss_difference": apart,
        "losses_agree": apart <= CURVES_DIFFER, "met": {what: ratios[what] <= aim for what, aim in aims.items()},
    }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """One line of the table; seconds of all cores in brackets."""

    def side(name: str) -> str:
        own = row[name]
        seconds = f"{own['seconds_per_step']:7.3f} s ({own['cpu_seconds_per_step']:.3f} of CPU)"
        return f"{seconds} {own['peak_bytes'] / 2**20:6.0f} MiB"

    met = " ".join(f"{what} {row['ratios'][what]:.2f} (aim {aim})" for what, aim in row["aims"].items())
    apart = f"losses apart {row['largest_loss_difference']:.1e}"
    print(f"{row['case']:24} edgeft {side('edgeft')}   PEFT + Trainer {side('trainer')}   {met}   {apart}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="of each run; not recorded")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side, in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose name holds this; not recorded")
    parser.add_argument("--set", action="append", default=[], help="key=value of edgeft's plan; not recorded")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(SIDES[given.side](given.folder)))
        return
    from planner import long_texts
    from run import BASE, SECTIONS, random_135m, record

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        example = {"model": str(BASE), "data": str(SECTIONS / "train.jsonl"), "valid": str(SECTIONS / "valid.jsonl")}
        chosen = {name: case for name, case in CASES.items() if given.only in name}
        long: dict[str, str] = {}
        if any(name.startswith("135M") for name in chosen):
            text = str(long_texts(Path(scratch) / "text.jsonl"))
            long = {"model": str(random_135m(Path(scratch) / "135m")), "data": text, "valid": text}
        for number, (name, case) in enumerate(chosen.items()):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            own = dict(pair.split("=", 1) for pair in given.set)
            prepare(
                folder, {**case["settings"], **own}, given.steps or case["steps"], long if "135M" in name else example
            )
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for _ in range(given.rounds):
                for side in SIDES:
                    runs[side].append(in_process("--side", side, "--folder", str(folder), threads=given.threads))
            rows.append(compare(name, runs, case["aims"]))
            show(rows[-1])
    if not (given.steps or given.only or given.set):
        record("trainer", {"threads": given.threads, "rounds": given.rounds, "cases": rows})


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "bench"))
    main()
