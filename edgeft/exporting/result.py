"""What does an evaluation leave on record? (data only, no torch)"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeft.documents import Artifact, Strict
from edgeft.models.metrics import Metrics, Pair


class Evaluated(Strict):
    """One form of a model that was scored; `sha256` is that of a bundle's manifest, or of all weights."""

    name: str
    kind: Literal["checkpoint", "bundle"]
    sha256: str


class TaskScore(Strict):
    """One number that lm-eval gives for a task, as it names it."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    samples: int


class Evaluation(Artifact):
    """Scores of several forms of a model on the same rows, or on lm-eval's tasks, and what each form changes."""

    data: str = Field(default="", description="files of the rows, without their folders")
    data_sha256: str = ""
    cut_rows: int = Field(default=0, description="longer than a form can read, or than was asked for")
    forms: tuple[Evaluated, ...]
    scores: dict[str, Metrics] = Field(default={}, description="by the form's name")
    pairs: tuple[Pair, ...] = ()
    tasks: dict[str, tuple[TaskScore, ...]] = Field(default={}, description="of lm-eval, by the form's name")
    seconds: float
