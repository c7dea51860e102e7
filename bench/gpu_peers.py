"""Is edgeft faster and smaller on a GPU than PEFT + Trainer? The same job by both, in turn, in one process.

Both start from the same random weights and adapters, take the same rows in the same order, and give back what they
held. edgeft takes the micro-batches that it plans; Trainer takes the batch at once, as its users write it.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_models import (
    WARM_UP,
    Case,
    bytes_at_the_highest,
    clear,
    errors,
    pack,
    planned,
    random_model,
    rows_of,
    start,
    summary,
    timed,
    wait,
)
from run import CONFIGS

from edgeft.planning.plan import make_plan
from edgeft.settings.job import make_job

if TYPE_CHECKING:
    from gpu import Bench

ROUNDS, STEPS = 2, 4
AIMS = {"seconds_per_step": 0.95, "reserved_bytes": 0.5}


@dataclass(frozen=True)
class Comparison:
    """A job that both sides do."""

    name: str
    model: str
    base_precision: str
    batch_size: int
    max_length: int


COMPARISONS = (
    Comparison("1B LoRA bf16, beside PEFT + Trainer", "llama-3.2-1b", "bf16", 16, 512),
    Comparison("8B LoRA NF4, beside PEFT + Trainer", "llama-3.1-8b", "nf4", 4, 1024),
)


def planned_case(comparison: Comparison, bench: Bench) -> Case:
    """What edgeft plans for this machine."""
    settings: dict[str, Any] = {
        "tuner": "lora", "rank": 16, "checkpointing": True, "batch_size": comparison.batch_size,
        "max_length": comparison.max_length, "base_precision": comparison.base_precision,
        "max_steps": WARM_UP + STEPS, "lora_alpha": 16.0,
    }  # fmt: skip
    if bench.rehearsal and comparison.base_precision == "bf16":
        settings["base_precision"] = "fp32"
    job = make_job(model=str(CONFIGS / comparison.model), profile=str(bench.scratch / "here.toml"), **settings)
    training = make_plan(job.model_copy(update={"max_memory_bytes": None})).training
    return bench.fitting(Case(comparison.name, CONFIGS / comparison.model, training, steps=STEPS))


def compare(comparison: Comparison, bench: Bench) -> Iterator[dict[str, Any]]:
    """A row for each side and round as it ends, then the ratios."""
    found: dict[str, list[dict[str, Any]]] = {}
    first: dict[str, torch.Tensor] = {}
    try:
        case = planned_case(comparison, bench)
        sides = {"edgeft": by_edgeft, "trainer": by_trainer}
        if importlib.util.find_spec("liger_kernel"):
            sides["trainer + liger"] = by_liger
        for number in range(ROUNDS):
            for side, work in sides.items():
                row = {"run": f"{comparison.name}: {side}, round {number + 1}"}
                try:
                    row |= work(case, bench, first)
                except Exception as problem:  # the other side's numbers are still worth having
                    row["failed"] = f"{type(problem).__name__}: {problem}"[:600]
                found.setdefault(side, []).append(row)
                gc.collect()
                clear(bench.device)
                yield row
        facts = {"model": case.folder.name, "training": case.training.model_dump(mode="json", exclude_defaults=True)}
        row = {"run": comparison.name, **facts, **planned(case, bench.profile), **ratios(found)}
        yield row | errors(row)
    except Exception as problem:
        yield {"run": comparison.name, "failed": f"{type(problem).__name__}: {problem}"[:600]}


def ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """edgeft's seconds and bytes in those of each other side: medians over all timed steps, the worst round's bytes."""
    whole = {side: rows for side, rows in found.items() if not any("failed" in row for row in rows)}
    sides = {}
    for side, rows in whole.items():
        sides[side] = {"seconds_per_step": statistics.median([s for row in rows for s in row["seconds"]])}
        for what in ("allocated_bytes", "reserved_bytes"):
            sides[side] |= {what: max(row[what] for row in rows)} if what in rows[0] else {}
    ours = sides.pop("edgeft")
    against = {side: {what: round(ours[what] / theirs[what], 3) for what in ours} for side, theirs in sides.items()}
    trainer = against["trainer"]
    apart = max(abs(a - b) for a, b in zip(found["edgeft"][0]["losses"], found["trainer"][0]["losses"], strict=True))
    return {**ours, "ratios": against, "aims": AIMS, "largest_loss_difference": round(apart, 5),
            "met": {what: trainer[what] <= aim for what, aim in AIMS.items() if what in trainer}}  # fmt: skip


def by_edgeft(case: Case, bench: Bench, first: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One run of edgeft's own step."""
    with tempfile.TemporaryDirectory() as scratch:
        run = start(case, bench.device, Path(scratch))
    if not first:
        first |= {name: parameter.detach().cpu().clone() for name, parameter in run.chosen}
    clear(bench.device)
    seconds, busy, losses = timed(run, rows_of(case), STEPS, bench.device)
    return {**bytes_at_the_highest(bench.device), **summary(seconds), "host_seconds_per_step": round(busy, 4),
            "micro_batch_size": case.training.micro_batch_size, "losses": losses}  # fmt: skip


def by_trainer(case: Case, bench: Bench, first: dict[str, torch.Tensor], **more: Any) -> dict[str, Any]:
    """One run of Trainer on PEFT's adapters, a 4-bit base prepared as PEFT's documentation has it."""
    from peers import InOrder, Noted, adapted, arguments
    from transformers import default_data_collator

    training, device, again = case.training, bench.device, {"use_reentrant": False}
    plain = replace(case, training=training.model_copy(update={"base_precision": training.compute_dtype}))
    model, _ = random_model(plain, device)
    if training.base_precision == "nf4":
        import peft

        pack(model, getattr(torch, "float32" if bench.rehearsal else "bfloat16"))
        model.is_loaded_in_4bit = True
        model = peft.prepare_model_for_kbit_training(model, True, again)
    model = adapted(model, training, first)
    samples = [
        {"input_ids": list(s.ids), "labels": list(s.labels), "attention_mask": [1] * len(s)} for s in rows_of(case)
    ]
    noted = Noted(lambda: wait(device))
    where: dict[str, Any] = {"use_cpu": True} if bench.rehearsal else {"bf16": True}
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            training, [samples] * (WARM_UP + STEPS), model=model, callbacks=[noted],
            data_collator=default_data_collator,
            args=arguments(training, folder, per_device_train_batch_size=training.batch_size,
                           gradient_checkpointing_kwargs=again, **where, **more),
        )  # fmt: skip
        clear(device)
        trainer.train()
    seconds = [after - before for before, after in pairwise(noted.ends)][WARM_UP - 1 :]
    busy = [after - before for before, after in pairwise(noted.busy)][WARM_UP - 1 :]
    return {**bytes_at_the_highest(device), **summary(seconds), "host_seconds_per_step": round(sum(busy) / STEPS, 4),
            "micro_batch_size": training.batch_size, "losses": noted.losses}  # fmt: skip


def by_liger(case: Case, bench: Bench, first: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Trainer with liger-kernel's layers and loss."""
    return by_trainer(case, bench, first, use_liger_kernel=True)
