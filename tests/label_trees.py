"""Labels and hand-made logits that tests of the search share, and the search's referee: every label, token by token."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from edgeft.machines.runner import runner_module

run = runner_module()
WORDS, END = 12, 0
PROMPT = [3, 4, 5]


def random_labels(random: np.random.Generator) -> Any:
    """Up to 40 labels of up to 5 tokens, many of them the beginning of another."""
    paths: set[tuple[int, ...]] = set()
    for _ in range(int(random.integers(2, 40))):
        known = sorted(paths)
        start = known[int(random.integers(len(known)))][:-1] if known and random.random() < 0.5 else ()
        more = random.integers(1, WORDS, size=int(random.integers(0 if start else 1, 4))).tolist()
        paths.add((*start[: int(random.integers(1, 5))], *more, END))
    if len(paths) < 2:
        paths |= {(1, END), (2, END)}
    found = [list(path) for path in sorted(paths)]
    return run.Labels([f"label {number}" for number in range(len(found))], found)


class Session:
    """Logits that are a function of all tokens so far, by a table that is drawn where it is first asked for."""

    def __init__(self, seed: int, sharp: float) -> None:
        self.seed, self.sharp, self.ids, self.read = seed, sharp, list[int](), 0

    def start(self, tokens: int, grammar: object = None) -> Session:
        self.ids = []
        return self

    def append(self, ids: list[int]) -> Any:
        self.ids += ids
        self.read += len(ids)
        return self.logits(tuple(self.ids))

    def rewind(self, tokens: int) -> None:
        assert tokens < len(self.ids)
        del self.ids[tokens:]

    def logits(self, ids: tuple[int, ...]) -> Any:
        random = np.random.default_rng([self.seed, *ids])
        return self.sharp * random.normal(size=WORDS).astype(np.float32)


def runner_of(session: Session, labels: Any, temperature: float = 1.0, context: int = 100) -> Any:
    made = object.__new__(run.Runner)
    made.engine = SimpleNamespace(start=session.start)
    made.labels, made.temperature, made.context_tokens = labels, temperature, context
    return made


def brute_force(session: Session, labels: Any) -> np.ndarray:
    """Each label's score: the sum of its tokens' log-probabilities, one at a time."""
    scores = []
    for path in labels.paths:
        total = 0.0
        for at, token in enumerate(path):
            logits = session.logits((*PROMPT, *path[:at])).astype(np.float64)
            total += logits[token] - math.log(np.exp(logits).sum())
        scores.append(total)
    return np.array(scores)
