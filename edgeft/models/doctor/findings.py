"""What does the doctor say of a folder: one verdict, and what it rests on? (data only)"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeft.documents import Artifact, Strict
from edgeft.models.identity import Inputs

Verdict = Literal["usable", "repairable", "not usable"]
VERDICTS: dict[Verdict, str] = {
    "usable": "usable as it is",
    "repairable": "not usable as it is, but it can be repaired",
    "not usable": "not usable",
}


class Finding(Strict):
    """One thing that is wrong, or only to be known, and what a repair does about it."""

    code: str
    level: Literal["wrong", "note"] = "wrong"
    problem: str
    names: tuple[str, ...] = Field(default=(), description="of the tensors or files that it is about")
    repair: str = Field(default="", description="what a repair does about it; empty: nothing")
    from_base: bool = Field(default=False, description="whether that takes the model it was made from")
    hint: str = ""


class Diagnosis(Artifact):
    """What a folder is, and whether edgeft can train what is in it."""

    folder: str
    kind: str = Field(description="what the folder is, in words")
    verdict: Verdict
    reason: str = Field(default="", description="why it is not usable: the first thing that is wrong")
    command: str = Field(default="", description="what makes it usable, or takes it as it is")
    findings: tuple[Finding, ...] = ()
    weights: str = Field(default="", description="the form that they are kept in")
    files: int = 0
    size_bytes: int = 0
    tensors: int = 0
    dtype: str = ""
    model_type: str = ""
    parameters: int = 0
    vocabulary: int = Field(default=0, description="rows of the embedding")
    tokens: int = Field(default=0, description="highest id of the tokenizer, and one")
    tied: bool | None = None
    chat_template: bool = False
    end_ids: tuple[int, ...] = ()
    base: str | None = Field(default=None, description="the model it was made from, where it was named")

    @property
    def wrong(self) -> list[Finding]:
        """What stands in the way of training."""
        return [finding for finding in self.findings if finding.level == "wrong"]


class Repaired(Artifact):
    """doctor.json in a repaired folder: what was read, with hashes, and what was done to it."""

    source: str
    base: str | None
    before: Diagnosis
    done: tuple[str, ...]
    sources: Inputs = Field(description="sha256 of every file that was read, by its name")
    base_sources: Inputs = Field(description="of the base's files that were taken")
    files: Inputs = Field(description="of what was written beside this document")
    dtype: str
    exact: bool = Field(description="whether every number is the one that was stored: nothing was rounded")
