"""What do layers that stay in their files cost on a GPU: time and bytes of a step beside the run that holds them?

Both begin with the same random weights and take the same rows. The files of layers are written from the model that was
made on the device, and lie in the host's page cache then, as those of a run that has read them once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_models import (
    Case,
    bytes_at_the_highest,
    clear,
    limited,
    measured_before,
    random_model,
    rows_of,
    summary,
    timed,
)

from edgeft.engine.copies import Copies
from edgeft.engine.loop import Run, make_run
from edgeft.engine.streaming import Maps, Window, rows_as_asked
from edgeft.engine.trainable import apply_tuner
from edgeft.models.checkpoint import DTYPES, TensorFile, write_tensors
from edgeft.models.parts import Parts, is_linear
from edgeft.settings.job import Training
from edgeft.training.prepare import tf32

AGAIN = {"checkpointing": True, "stream_layers": True}
BF16, NF4 = ({"base_precision": base, "compute_dtype": "bf16", **AGAIN} for base in ("bf16", "nf4"))
# (model, what is set, GiB that the streamed run may have of the card; 0: all)
STREAMED: dict[str, tuple[str, dict[str, Any], float]] = {
    "8B LoRA on NF4, streamed in 3.2 GiB": (
        "llama-3.1-8b", {**NF4, "batch_size": 4, "micro_batch_size": 1, "loss_chunk_tokens": 256}, 3.2),
    "1B LoRA, streamed": ("llama-3.2-1b", BF16, 0.0),
    "1B LISA on NF4, streamed": (
        "llama-3.2-1b", {**NF4, "tuner": "full", "layers": "lisa", "active_layers": 2, "batch_size": 8}, 0.0),
}  # fmt: skip


def streamed_cases(runs: dict[str, Any]) -> Iterator[Case]:
    """The cases, with the settings that all cases share."""
    for name, (model, settings, cap) in STREAMED.items():
        yield replace(measured_before(runs, {"run": name, "model": model, "settings": settings}), cap_gib=cap)


def streamed(case: Case, device: torch.device, scratch: Path) -> dict[str, Any]:
    """Bytes and seconds of the streamed run, and what they are in those of the resident one.

    Their losses before the first update are the same bit for bit; later ones are where a GPU adds up in one order.
    """
    sides: dict[bool, dict[str, Any]] = {}
    for way in (False, True):
        training = case.training.model_copy(update={"stream_layers": way})
        own = replace(case, training=training, cap_gib=case.cap_gib if way else 0.0)
        sides[way] = side(own, device, scratch / str(way))
        clear(device)
    resident, found = sides[False], sides[True]
    apart = [abs(a - b) for a, b in zip(resident["losses"], found["losses"], strict=True)]
    ratios = {what: round(found[what] / resident[what], 3)
              for what in ("seconds_per_step", "allocated_bytes", "reserved_bytes") if what in found}  # fmt: skip
    return {**found, "resident": resident, "ratios": {"resident": ratios}, "first_loss_equal": not apart[0],
            "largest_loss_difference": max(apart)}  # fmt: skip


def side(case: Case, device: torch.device, scratch: Path) -> dict[str, Any]:
    """One run of a case: its bytes at their highest, seconds and losses."""
    training, compute, base = case.training, DTYPES[case.training.compute_dtype], scratch / "base"
    (scratch / "work").mkdir(parents=True)
    model, parts = random_model(case, device, base if case.needs_files else None)
    if training.stream_layers:
        leave_in_files(model, parts, training, scratch, device)
    run = (
        make_run(training, device, compute, model, parts, base, scratch / "work")
        if case.needs_files
        else Run(training, device, compute, model, parts, apply_tuner(model, parts, training))
    )
    clear(device)
    with tf32(training, device), limited(case, device):
        seconds, busy, losses = timed(run, rows_of(case), case.steps, device)
    return {**bytes_at_the_highest(device), **summary(seconds), "host_seconds_per_step": round(busy, 4),
            "losses": losses}  # fmt: skip


def leave_in_files(model: Any, parts: Parts, training: Training, folder: Path, device: torch.device) -> None:
    """Let a model's layers come from files of their own, and rows of its embedding too where a plan counts on that."""
    layers = list(parts.layers)
    window = Window(layers, [[] for _ in layers], Maps(), Copies(device))
    for number, layer in enumerate(layers):
        linears = {f"{name}.weight": module for name, module in layer.named_modules() if is_linear(module)}
        path = folder / f"layer-{number}.safetensors"
        write_tensors(path, {name: module.weight for name, module in linears.items()})
        window.give(number, TensorFile(path), linears)
    if not parts.tied and training.embedding == "off":
        table: Any = parts.embedding
        write_tensors(folder / "table.safetensors", {"table": table.weight})
        mapped = Maps().tensor(TensorFile(folder / "table.safetensors"), "table")
        rows_as_asked(table, mapped, table.weight.dtype, device)
    model.edgeft_window = window
