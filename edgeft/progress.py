"""What does long work say of how far it is? (stage, done, total, numbers) to whoever shows it, sentences for people."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int, dict[str, float]], None]
Say = Callable[[str], None]  # a sentence for people: a warning, what is up to date


def silent(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
    """A Progress that shows nothing."""


def quiet(sentence: str) -> None:
    """A Say that says nothing."""
