"""What does long work say of how far it is? (stage, done, total, numbers) to whoever shows it, sentences for people."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int, dict[str, float]], None]
Say = Callable[[str], None]  # a sentence for people: a warning, what is up to date

# Stages as people read them; one named `parity: NAME` or `repair: NAME` is of a bundle, or of an adapter in it.
WORDS = {
    "add": "adding the adapter",
    "answers": "writing sample answers",
    "base on test": "scoring the base on test rows",
    "base on valid": "scoring the base on validation rows",
    "build": "building the bundle",
    "calibrate": "calibrating",
    "calibrate the cache": "calibrating the KV cache",
    "golden": "asking the bundle for its golden vectors",
    "labels: calibration": "calibrating probabilities",
    "guesses": "counting the passes that guesses save",
    "load": "loading the model",
    "measure": "measuring the bundle",
    "merge": "merging",
    "parity: artifact": "checking the bundle",
    "parity: cache": "checking the 8-bit KV cache",
    "parity: labels": "checking the choice of labels",
    "parity: merged": "checking the merged model",
    "parity: original": "checking the change on the original weights",
    "parity: trained": "checking the trained model",
    "plan": "planning",
    "prefix": "keeping outputs of frozen layers",
    "promotion": "choosing tensors for 8 bits",
    "quantise": "rounding the base to 4 bits",
    "repair": "repairing",
    "repair: merged": "scoring the merged model",
    "resume": "going on",
    "sensitivity": "measuring what rounding costs",
    "survival": "comparing weights",
    "sweep": "scoring shares of the change",
    "test": "scoring on test rows",
    "train": "training",
    "valid": "scoring on validation rows",
    "validate": "validating",
    "values": "reading values",
}
OTHERS = {"parity": "checking", "repair": "trying"}


def in_words(stage: str) -> str:
    """A stage as people read it."""
    kind, colon, name = stage.partition(": ")
    return WORDS.get(stage) or (f"{OTHERS[kind]} {name}" if colon and kind in OTHERS else stage)


def silent(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
    """A Progress that shows nothing."""


def quiet(sentence: str) -> None:
    """A Say that says nothing."""
