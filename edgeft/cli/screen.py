"""What do commands print, and where? Results on stdout, the progress line and errors on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from edgeft.documents import Artifact
from edgeft.errors import BadInput, EdgeftError
from edgeft.machines.launcher import launched
from edgeft.progress import in_words
from edgeft.units import show_bytes, show_seconds

# one width for logs and pipes; a terminal has its own
stdout, stderr = (Console(stderr=e, width=None if sys.stdout.isatty() else 140, highlight=False) for e in (False, True))

OutOption = Annotated[Path | None, typer.Option("--out", help="where to write; default beside what is read")]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on stdout instead of text")]
DataOption = Annotated[
    list[str] | None,
    typer.Option(rich_help_panel="Data", help="training data, also several: files (jsonl, json, csv, parquet), "
                 "patterns, a hub dataset id, "
                 "a folder with train, valid and test files; FILE#500 is 500 of its rows, FILE#3x all three times"),
]  # fmt: skip
ColumnsOption = Annotated[
    str | None,
    typer.Option(rich_help_panel="Data", help="own columns by the known names: prompt=question,completion=answer"),
]


speaks = launched().first  # of several processes one, but for what ends another


def show(as_json: bool, artifact: Artifact, text: RenderableType) -> None:
    if not speaks:
        return
    if as_json:
        sys.stdout.write(artifact.model_dump_json() + "\n")
    else:
        stdout.print(text)


def say(message: str) -> None:
    if speaks:
        stderr.print(message, soft_wrap=True, markup=False)


def complain(problem: EdgeftError) -> None:
    """An error's message, with its process where there are several."""
    here = launched()
    who = f"edgeft, process {here.rank} of {here.size}" if here.size > 1 else "edgeft"
    if not problem.told:
        stderr.print(f"{who}: {problem}", soft_wrap=True, markup=False)


@contextlib.contextmanager
def stopping(what: str) -> Iterator[None]:
    """Ctrl-C is said with what it leaves, and ends with its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"\nstopped; {what}")
        raise typer.Exit(130) from None


def part_of_job(given: Path, file: str) -> Path:
    """What was named; of a job's folder, build/NAME, its part: where `file`, as in train/train.json, lies in it."""
    part = given / file
    return part.parent if part.is_file() and not (given / part.name).is_file() else given


def need(path: Path, command: str) -> None:
    if not path.is_file():
        raise BadInput(path, "no such file", f"run {command} first")


class TwoLines(Bar):
    """A bar with its numbers on a line of their own: both are whole at eighty columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["numbers"]:
                yield Text(f"  {task.fields['numbers']}", no_wrap=True, overflow="ellipsis")


class Reporter:
    """Progress on a console: a bar on a terminal, in a log a plain line at most every ten seconds."""

    def __init__(self, console: Console) -> None:
        self.console, self.stage, self.last = console, "", 0.0
        self.logged = set[str]()  # stages that have had a line: some take turns with each step
        self.budget_bytes = 0  # shown beside memory in use, where it is known
        self.bar = TwoLines(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[left]}"), console=console, transient=True,
        )  # fmt: skip
        self.task: Any = None

    def __enter__(self) -> Reporter:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def __call__(self, stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        if stage == "done":
            return
        if stage == "resume":  # which a user wants to see afterwards too
            self._print(f"continues at step {done + 1:,} of {total:,}")
        elif self.console.is_terminal:
            self._move(stage, done, total, numbers)
        else:
            self._log(stage, done, total, numbers)
        self.stage = stage

    def _move(self, stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        if stage != self.stage:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task = self.bar.add_task(in_words(stage), total=total, numbers="", count="", left="")
        self.bar.update(
            self.task, completed=done, total=total, numbers=self.describe(numbers), count=count_of(done, total),
            left=time_left(numbers),
        )  # fmt: skip

    def _log(self, stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        text = ", ".join(part for part in (self.describe(numbers), time_left(numbers)) if part)
        if stage in self.logged and time.monotonic() - self.last <= 10 and not (done == total and text):
            return
        self.logged.add(stage)
        self._print(" ".join(part for part in (in_words(stage), count_of(done, total), text) if part))
        self.last = time.monotonic()

    def _print(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, markup=False)

    def describe(self, numbers: dict[str, float]) -> str:
        """Losses, rate, speed and memory, as far as they are among the numbers."""
        parts = []
        if "loss" in numbers:
            parts.append(f"loss {numbers['loss']:.4f}")
        if "valid_loss" in numbers:
            parts.append(f"validation {numbers['valid_loss']:.4f}")
        if "loss" in numbers:
            parts.append(f"lr {numbers['learning_rate']:.1e}")
            parts.append(f"{numbers['tokens_per_second']:,.0f} tok/s")
        if "bytes_now" in numbers:
            budget = f" of {show_bytes(self.budget_bytes)}" if self.budget_bytes else ""
            parts.append(show_bytes(numbers["bytes_now"]) + budget)
        return ", ".join(parts)


def count_of(done: int, total: int) -> str:
    """How many of how many; nothing where there is one alone."""
    return f"{done:,}/{total:,}" if total > 1 else ""


def time_left(numbers: dict[str, float]) -> str:
    """What is left of the training, where it is known."""
    return f"{show_seconds(numbers['seconds_left'])} left" if "seconds_left" in numbers else ""
