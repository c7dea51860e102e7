"""What does a merge leave on record: merged.json? (data only, no torch)"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from edgeft.documents import Artifact, Strict
from edgeft.errors import BadInput
from edgeft.models.identity import Inputs
from edgeft.models.layer_shares import Group, Shares
from edgeft.models.metrics import Sweep
from edgeft.training.result import TrainResult


class Trained(Strict):
    """Where the folder lies that was merged: seen from the merged one, and on this machine."""

    relative: str
    absolute: str


class Ancestor(Strict):
    """One folder that edgeft made and trained on: its record, and the hashes of what that was made from, by name."""

    record: str
    made: str
    sha256: Inputs


class Merged(Artifact):
    """merged.json: which share of which change was taken, and what it did to the weights."""

    wise_alpha: float
    groups: tuple[Group, ...] = ()
    kind: str
    dtype: str
    changed_tensors: int
    tensors: int
    beside: int = 0  # adapters beside the weights, which no weight can hold
    untied_head: bool
    relative_change: float
    predicted_peak_bytes: int
    measured_peak_bytes: int
    seconds: float
    inputs: Inputs  # of the base
    files: Inputs  # as they were written beside this document
    ancestors: tuple[Ancestor, ...] = ()  # of the base, the nearest first
    notes: tuple[str, ...] = ()

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
    trained: Trained
    sweep: Sweep | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read one back. Raises BadInput, for a foreign merge with what is missing."""
        if path.is_file() and '"train":' not in path.read_text(encoding="utf-8"):
            hint = "the folder is a standard checkpoint: use it with any tool, or train with edgeft to prove a bundle"
            raise BadInput(path.parent, "was merged from what edgeft did not train: it has no data to prove with", hint)
        return super().read(path)
