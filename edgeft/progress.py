"""What does long work say of how far it is? (stage, done, total, numbers), shown as a bar or as lines of a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from edgeft.units import show_bytes, show_seconds

Progress = Callable[[str, int, int, dict[str, float]], None]
Say = Callable[[str], None]  # a sentence for people: a warning, what is up to date


def silent(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
    """A Progress that shows nothing."""


def quiet(sentence: str) -> None:
    """A Say that says nothing."""


class Reporter:
    """Progress on a console: a bar on a terminal, in a log a plain line at most every ten seconds."""

    def __init__(self, console: Console) -> None:
        self.console, self.stage, self.last = console, "", 0.0
        self.budget_bytes = 0  # shown beside memory in use, where it is known
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
            console=console, transient=True,
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
        text = self.describe(numbers)
        if self.console.is_terminal:
            if stage != self.stage:
                if self.task is not None:
                    self.bar.remove_task(self.task)
                self.task = self.bar.add_task(stage, total=total, numbers="")
            self.bar.update(self.task, completed=done, total=total, numbers=text)
        elif stage != "done" and (stage != self.stage or time.monotonic() - self.last > 10 or (done == total and text)):
            self.console.print(f"{stage} {done}/{total} {text}".rstrip(), soft_wrap=True, markup=False)
            self.last = time.monotonic()
        self.stage = stage

    def describe(self, numbers: dict[str, float]) -> str:
        """Loss, rate, memory and time left, as far as they are among the numbers."""
        parts = []
        if "loss" in numbers:
            parts.append(f"loss {numbers['loss']:.4f} lr {numbers['learning_rate']:.1e}")
            parts.append(f"{numbers['tokens_per_second']:,.0f} tok/s")
        if "bytes_now" in numbers:
            budget = f" of {show_bytes(self.budget_bytes)}" if self.budget_bytes else ""
            parts.append(show_bytes(numbers["bytes_now"]) + budget)
        if "seconds_left" in numbers:
            parts.append(f"{show_seconds(numbers['seconds_left'])} left")
        return ", ".join(parts)
