"""What does long work say of how far it is? (stage, done, total, numbers) to whoever shows it, sentences for people."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

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
    "rehearse": "rehearsing the way to the bundle",
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
FACTOR = 4.0  # by which an estimate may be off before the next ones are no longer corrected by it
OTHERS = {"parity": "checking", "repair": "trying"}


def in_words(stage: str) -> str:
    """A stage as people read it."""
    kind, colon, name = stage.partition(": ")
    return WORDS.get(stage) or (f"{OTHERS[kind]} {name}" if colon and kind in OTHERS else stage)


def silent(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
    """A Progress that shows nothing."""


def quiet(sentence: str) -> None:
    """A Say that says nothing."""


def with_time_left(
    progress: Progress, planned: Mapping[str, float], now: Callable[[], float] = time.monotonic
) -> Progress:
    """A Progress that is also told `seconds_left`: of this stage by its own pace, of those to come as planned.

    They take as much more or less than planned as the stages that are done, by a factor of FACTOR at most.
    """
    if not planned:
        return progress
    started: dict[str, float] = {}
    took: dict[str, float] = {}

    def tell(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        here = now()
        for name, start in started.items():
            if name != stage and name not in took:
                took[name] = here - start
        since = here - started.setdefault(stage, here)
        ended = [name for name in took if name in planned]
        before = sum(planned[name] for name in ended)
        pace = sum(took[name] for name in ended) / before if before else 1.0
        pace = min(FACTOR, max(1 / FACTOR, pace))
        paced = since > 0 and done > 0 and total > 1
        mine = since * (total - done) / done if paced else max(0.0, pace * planned.get(stage, 0.0) - since)
        to_come = sum(seconds for name, seconds in planned.items() if name not in started)
        progress(stage, done, total, numbers | {"seconds_left": mine + pace * to_come})

    return tell
