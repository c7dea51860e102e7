"""What tests share of fine-tunes that no weight can hold: they lie beside a merge, whose weights are the base's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edgeft.errors import ParityFailed
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.export import prove_bundle
from edgeft.exporting.outputs import load_tuned
from edgeft.exporting.proof_rows import ProofRows
from edgeft.merging.merge import merge
from edgeft.merging.merged_tensors import merged_rung
from edgeft.merging.result import MergedCheckpoint
from edgeft.models.checkpoint import Checkpoint, load_plain
from edgeft.models.layer_shares import Shares
from edgeft.models.streamed import load_streamed
from edgeft.progress import silent
from edgeft.targets.target import Target
from edgeft.training.job_data import Data
from edgeft.training.result import TrainResult


def merged_beside(trained: Path, base: Path, out: Path, file: str, share: float) -> TrainResult:
    """Merge a run into `out`, see that it has the base's bytes and `file` beside them, and give the run's record."""
    result = TrainResult.read(trained / "train.json")
    made = merge(trained, out, wise_alpha=share, progress=silent)
    before, after = Checkpoint(base), Checkpoint(out)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.owner)
    assert not merged_rung(base, trained, out, result.training, Shares(rest=share)).problems
    assert (out / file).is_file() == bool(made.beside) == bool(share)
    return result


def computes_as_trained(
    trained: Path, base: Path, merged: Path, file: str, share: float, logits: Callable[[Any], torch.Tensor]
) -> torch.Tensor:
    """Logits of a merge beside its base, whole or streamed those of the tuned model at that share; at 0 the base's."""
    result = merged_beside(trained, base, merged, file, share)
    found = logits(load_plain(merged))
    assert torch.equal(found, logits(load_tuned(trained, result, Shares(rest=share))))
    assert torch.equal(found, logits(load_streamed(merged)))
    if not share:
        assert torch.equal(found, logits(load_plain(base)))
    return found


def stopped_by(place: Path, bundle: Path, target: Target) -> str:
    """What the ladder says of a bundle; nothing where it passes."""
    merged = MergedCheckpoint.read(place / "merged" / "merged.json")
    rows = ProofRows.of(Data.read(merged.train.plan, train=False), merged.train.plan)
    try:
        prove_bundle(place / "train", place / "merged", merged, target, rows, ArtifactModel(bundle), silent)
    except ParityFailed as problem:
        return str(problem.where)
    return ""
