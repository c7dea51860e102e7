"""Is every number of a folder's weights finite? Reads all of them, a tensor at a time."""

from __future__ import annotations

import torch

from edgeft.models.doctor.exam import Exam
from edgeft.models.doctor.findings import Finding
from edgeft.models.doctor.unpack import make
from edgeft.models.headers import blocks
from edgeft.progress import Progress


def look_at_values(exam: Exam, progress: Progress) -> list[Finding]:
    """A finding that names every tensor with NaN or an infinity in it; none where all are finite."""
    bad = []
    for done, (name, piece) in enumerate(exam.pieces.items(), 1):
        progress("values", done, len(exam.pieces), {})
        if exam.store is None or piece.how == "base":
            continue
        tensor = make(exam.store, piece)
        if tensor.is_floating_point() and (count := sum(_odd(tensor[part]) for part in blocks(tuple(tensor.shape)))):
            bad.append(f"{name}: {count} of {tensor.numel()}")
    hint = "go back to an older checkpoint of the run: nothing in the file says what they were"
    problem = f"{len(bad)} tensors hold numbers that are not finite"
    return [Finding(code="values", problem=problem, names=tuple(bad), hint=hint)] if bad else []


def _odd(block: torch.Tensor) -> int:
    return int(block.numel() - torch.isfinite(block.float()).sum())
