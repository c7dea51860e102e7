"""What does a run write down of each step, so that each stands there once, however often the run was stopped?

steps.jsonl, a JSON object a line, grows in the work folder while a run goes on, and lies beside train.json in the end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pydantic
from pydantic import Field

from edgeft.documents import Strict, saving

STEPS = "steps.jsonl"


class StepRecord(Strict):
    """One optimizer step."""

    step: int
    loss: float = Field(description="nats per trained token of its samples, before the update")
    learning_rate: float
    tokens: int = Field(description="read so far, padding left out")
    seconds: float = Field(description="of training so far, also before the run was stopped")
    memory_bytes: int = Field(description="in use behind the step")
    valid_loss: float | None = Field(default=None, description="of the rows that say when to stop, where it was scored")


Watch = Callable[[StepRecord], None]


def unwatched(record: StepRecord) -> None:
    """A Watch that tells nobody."""


class StepLog:
    """The file, in a run's work folder, with one line for each step that the run has behind it."""

    def __init__(self, work: Path, step: int, *, writes: bool = True, watch: Watch = unwatched) -> None:
        """Keep what a checkpoint of `step` knows of; later lines, whole or torn, are of steps that come again.

        `watch` is told every step, also those that are there already.
        """
        self.path, self.writes, self.watch = work / STEPS, writes, watch
        if not writes:
            return
        with saving(self.path):
            kept = [record for record in read_steps(self.path) if record.step <= step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
            temporary.replace(self.path)
        for record in kept:
            watch(record)

    def add(self, record: StepRecord) -> None:
        """One more step."""
        if self.writes:
            with saving(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(record))
            self.watch(record)

    def sync(self) -> None:
        """Have every line on the disk: a checkpoint that is written now counts on them."""
        if self.writes:
            with saving(self.path), open(self.path, "rb+") as file:
                os.fsync(file.fileno())

    def put(self, folder: Path) -> None:
        """Copy it beside a result."""
        shutil.copyfile(self.path, folder / STEPS)


def read_steps(path: Path) -> Iterator[StepRecord]:
    """The records of a log up to the first line that is none, as a kill may leave the last one."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = StepRecord.model_validate_json(line)
            except pydantic.ValidationError:
                return
            if not line.endswith("\n"):
                return
            yield record


def _line(record: StepRecord) -> str:
    return record.model_dump_json(exclude_none=True) + "\n"
