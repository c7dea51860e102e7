"""What tests share of fine-tunes that no weight can hold: they lie beside a merge, whose weights are the base's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeft.errors import BadInput, ParityFailed
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


def peft_logits(base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of PEFT's own forward pass with its own model of a folder: the text's, without what PEFT puts before it."""
    from peft import PeftModel

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(load_plain(base), adapter)
        found = model(input_ids=ids, use_cache=True).logits
    return found[:, found.shape[1] - ids.shape[1] :]  # type: ignore[no-any-return]


def others_merge(config: Any, base: Path, work: Path, ids: torch.Tensor, wrong: str) -> None:
    """What PEFT makes by `config` merges and computes as in PEFT; cut to half its width it is refused as `wrong`."""
    from peft import get_peft_model

    theirs, weights = work / "theirs", work / "theirs" / "adapter_model.safetensors"
    torch.manual_seed(0)
    get_peft_model(load_plain(base), config).save_pretrained(theirs)
    merge(theirs, work / "merged", wise_alpha=1.0, progress=silent, base=str(base))
    with torch.no_grad():
        ours = load_plain(work / "merged")(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, peft_logits(base, theirs, ids), rtol=1e-4, atol=1e-5)
    save_file({name: tensor[:, 2:].contiguous() for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(BadInput, match=wrong):
        merge(theirs, work / "wrong", wise_alpha=1.0, progress=silent, base=str(base))


def stopped_by(place: Path, bundle: Path, target: Target) -> str:
    """What the ladder says of a bundle; nothing where it passes."""
    merged = MergedCheckpoint.read(place / "merged" / "merged.json")
    rows = ProofRows.of(Data.read(merged.train.plan, train=False), merged.train.plan)
    try:
        prove_bundle(place / "train", place / "merged", merged, target, rows, ArtifactModel(bundle), silent)
    except ParityFailed as problem:
        return str(problem.where)
    return ""
