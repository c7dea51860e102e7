"""Runs of a tiny model, resident or beside layers in their files, whose steps are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgeft.data.samples import Sample
from edgeft.engine.loop import Run, make_run
from edgeft.engine.nf4_base import load_base
from edgeft.models.checkpoint import DTYPES
from edgeft.models.parts import find_parts
from edgeft.settings.job import Training

CPU = torch.device("cpu")
SAMPLES = [Sample(ids := [(7 * i + n) % 500 + 1 for i in range(12 + n)], ids, 1) for n in range(4)]
# stored in, and how the base is kept and computed
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("float32", {}),
    "fp32 of a bf16 file": ("bfloat16", {}),
    "bf16": ("bfloat16", {"base_precision": "bf16", "compute_dtype": "bf16"}),
    "bf16 of an fp32 file": ("float32", {"base_precision": "bf16", "compute_dtype": "bf16"}),
    "nf4": ("bfloat16", {"base_precision": "nf4"}),
}


def begin(folder: Path, training: Training, work: Path) -> Run:
    """A run of the model in `folder`, before its first step."""
    compute = DTYPES[training.compute_dtype]
    model = load_base(folder, training, CPU, compute).requires_grad_(False)
    work.mkdir(exist_ok=True)
    return make_run(training, CPU, compute, model, find_parts(model), folder, work)
