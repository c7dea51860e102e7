"""What is the model between base and fine-tuned? W0 + a (Wft - W0), tensor by tensor, in the base's own precision.

Wise-FT (arXiv 2109.01903): one code path for every adapter that a weight can hold and for weights that trained.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch

from edgeft import disk, host, ledger
from edgeft.artifacts import Artifact, sha256_file, staging, versions
from edgeft.change import Change, Rows, blocks
from edgeft.checkpoint import Checkpoint, copy_side_files, local_folder, write_checkpoint
from edgeft.errors import BadInput
from edgeft.model_spec import read_model_spec
from edgeft.peft_folder import read_adapter_config
from edgeft.scores import Sweep
from edgeft.shares import Group, Shares, check_shares, layer_of
from edgeft.train import TrainResult

Progress = Callable[[str, int, int, dict[str, float]], None]


class Merged(Artifact):
    """merged.json: which share of which change was taken, and what it did to the weights."""

    wise_alpha: float
    groups: tuple[Group, ...] = ()
    kind: str
    dtype: str
    changed_tensors: int
    tensors: int
    untied_head: bool
    relative_change: float
    predicted_peak_bytes: int
    measured_peak_bytes: int
    seconds: float

    @property
    def shares(self) -> Shares:
        """The share of every tensor: `wise_alpha`, but for the layers of `groups`."""
        return Shares(rest=self.wise_alpha, groups=self.groups)


class MergedForeign(Merged):
    """merged.json of an adapter or checkpoint that edgeft did not train."""

    base: str
    tuned: str


class MergedCheckpoint(Merged):
    """merged.json of what `edgeft train` made, and the sweep that chose the share, where one did."""

    train: TrainResult
    sweep: Sweep | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read one back. Raises BadInput, for a foreign merge with what is missing."""
        if path.is_file() and '"train":' not in path.read_text(encoding="utf-8"):
            hint = "the folder is a standard checkpoint: use it with any tool, or train with edgeft to prove a bundle"
            raise BadInput(path.parent, "was merged from what edgeft did not train: it has no data to prove with", hint)
        return super().read(path)


def blend(stored: torch.Tensor, tuned: Rows, wise_alpha: float) -> tuple[float, float]:
    """Turn `stored` W0 into W0 + a (Wft - W0), in place, by blocks of rows; (sum of squared moves, of squared W0).

    The sum is in fp32 and rounded once to the tensor's dtype. Exactly W0 at 0 and exactly Wft, so rounded, at 1.
    """
    moved = total = 0.0
    for part in blocks(tuple(stored.shape)):
        wanted = tuned(part)
        block = stored[part] if stored.ndim else stored
        before = block.to(wanted.dtype, copy=True)
        block.copy_(wanted if wise_alpha == 1.0 else torch.lerp(before, wanted, wise_alpha))
        total += float(torch.linalg.vector_norm(before)) ** 2
        moved += float(torch.linalg.vector_norm(before.sub_(block))) ** 2
    return moved, total


def merge(
    trained: Path,
    out: Path,
    *,
    wise_alpha: float | Shares,
    progress: Progress,
    base: str | None = None,
    input_sha256: str = "",
    sweep: Sweep | None = None,
) -> Merged:
    """Write the merged checkpoint, a standard folder, to `out`.

    `trained` is what `edgeft train` wrote, or with `base` any PEFT adapter or fine-tuned checkpoint of that model.
    `wise_alpha` is one share for all tensors, or one for each group of layers.
    Raises BadInput for an alpha outside 0 to 1 and for a change that does not fit the base or no weight can hold,
    DoesNotFit when this machine's memory or the disk has no room.
    """
    shares = wise_alpha if isinstance(wise_alpha, Shares) else Shares(rest=wise_alpha)
    started = time.monotonic()
    ledger.control_malloc()
    result = TrainResult.read(trained / "train.json") if (trained / "train.json").is_file() and base is None else None
    model = result.plan.job.model if result else base or base_of(trained)
    folder = local_folder(model)
    source = Checkpoint(folder)
    spec = result.plan.spec if result else read_model_spec(str(folder))
    check_shares(shares, spec.num_hidden_layers)
    disk.require(disk.merge_disk(spec, sum(file.path.stat().st_size for file in source.files)), out)
    ledger.reset_peak(torch.device("cpu"))
    change = Change(trained, source, tied=spec.tie_word_embeddings)
    untied = change.untied if shares.rest else None
    if untied is not None:
        add_head(source, untied, str(change.embedding))
    changes = {name: shares.of(layer_of(name)) for name in change.steps.keys() & source.owner.keys()}
    predicted = ledger.rss_bytes() + peak_above_baseline(source, change)
    host.check_host("merge", predicted)
    moved = total = 0.0

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal moved, total
        if changes.get(name):
            more = blend(tensor, change.open(name, tensor), changes[name])
            moved, total = moved + more[0], total + more[1]
        return tensor

    with staging(out) as temporary:
        copy_side_files(folder, temporary)
        if untied is not None:
            untie_config(temporary)
        for _, done, count in write_checkpoint(source, temporary, changed):
            progress("merge", done, count, {"bytes_now": ledger.rss_bytes()})
        facts: dict[str, Any] = {
            "input_sha256": input_sha256 or (sha256_file(trained / "train.json") if result else ""),
            "versions": versions(),
            "wise_alpha": shares.rest,
            "groups": shares.groups,
            "kind": change.kind,
            "dtype": spec.dtype,
            "changed_tensors": len(change.steps.keys() & source.owner.keys()),
            "tensors": len(source.owner),
            "untied_head": untied is not None,
            "relative_change": (moved / total) ** 0.5 if total else 0.0,
            "predicted_peak_bytes": predicted,
            "measured_peak_bytes": ledger.peak_rss_bytes(),
            "seconds": round(time.monotonic() - started, 2),
        }
        merged: Merged
        if result is not None:
            merged = MergedCheckpoint(**facts, train=result, sweep=sweep)
        else:
            merged = MergedForeign(**facts, base=model, tuned=str(trained))
        merged.write(temporary / "merged.json")
    return merged


def base_of(tuned: Path) -> str:
    """The base model that an adapter folder names. Raises BadInput when it names none."""
    if not (tuned / "adapter_config.json").is_file():
        hint = "run edgeft train PLAN first, or name the base: edgeft merge FOLDER --base MODEL"
        raise BadInput(tuned / "train.json", "no such file", hint)
    named = read_adapter_config(tuned).get("base_model_name_or_path")
    if not named:
        raise BadInput(tuned, "names no base model", "give it: edgeft merge FOLDER --base MODEL")
    return str(named)


def peak_above_baseline(source: Checkpoint, change: Change) -> int:
    """Bytes of the tensor that needs most."""
    return max(
        host.merge_bytes(
            torch.Size(source.shape(name)).numel(),
            source.itemsize(name),
            changed=name in change,
            factor_bytes=change.factor_bytes.get(name, 0),
        )
        for name in source.owner
    )


def add_head(source: Checkpoint, head: str, embedding: str) -> None:
    """Give a tied checkpoint a head of its own, which so far reads the embedding's bytes."""
    if head in source:
        return
    file = source.owner[embedding]
    file.entries[head] = dict(file.entries[embedding])
    source.owner[head] = file


def untie_config(folder: Path) -> None:
    """Say in config.json that head and embedding are two tensors."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2) + "\n")
