"""Of which rows does a form of a model have to answer, so that all of them would not say anything else?

The first ones, whose positions are compared, and those whose answers are shown, in any case. Then rows at random, until
both of a gate's questions are decided (models/drawing.py): does the loss rise by more than it may, are more answers
lost than may be? A form that fails one has failed. What a gate says is what the rows say that were drawn.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

from edgeft.exporting.form import Form
from edgeft.models.drawing import Mean

BLOCK = 32  # rows that torch reads before it is asked again
# A row's loss may rise by so many times what it may on average before it counts as one that nobody foresaw.
REACH = 20.0


class Drawing:
    """Rows for a form that is compared with the one `before` it, which has read all of them.

    `gate` rows are those of the loss, which may rise by `nats` a token; of the `scored` ones `points` of 100 may be
    lost. `taken` are the numbers of rows that are read in any case.
    """

    def __init__(
        self, before: Form, nats: float, points: float, *, gate: int, scored: slice | None, taken: Iterable[int]
    ) -> None:
        self.before, self.taken = before, sorted(set(taken))
        self.gate, self.scored = range(gate), range(len(before.losses))[scored] if scored is not None else range(0)
        tokens = before.tokens[:gate]
        self.mean_tokens = max(1.0, sum(tokens) / max(1, len(tokens)))
        self.unit = nats * self.mean_tokens
        self.loss = Mean(gate, REACH, sure=False)
        self.lost = max(points / 100, 1 / len(self.scored)) if self.scored else 0.0
        self.exact = Mean(len(self.scored), 1 + self.lost)
        self.decided: dict[str, bool] = {}  # whether each question is answered with yes

    def blocks(self, rows: int = BLOCK) -> Iterator[list[int]]:
        """Numbers of rows to read next, at most so many after the first of them."""
        yield self.taken
        taken, every = set(self.taken), sorted({*self.gate, *self.scored})
        order = [number for number in every if number not in taken]
        random.Random(0).shuffle(order)
        while block := list(itertools.islice((number for number in order if self._asked(number)), rows)):
            yield block
            read = set(block)
            order = [number for number in order if number not in read]

    def _asked(self, number: int) -> bool:
        """Whether a row says anything of what is still open."""
        if False in self.decided.values():
            return False
        return ("loss" not in self.decided and number in self.gate) or (
            "exact" not in self.decided and number in self.scored
        )

    def see(self, number: int, loss: float, exact: bool) -> None:
        """What a row that was read says."""
        known = number in self.taken
        if number in self.gate:
            rise = (loss - self.before.losses[number]) / self.unit
            self._take("loss", self.loss, rise - self.before.tokens[number] / self.mean_tokens, known)
        if number in self.scored:
            self._take("exact", self.exact, self.before.exact[number] - exact - self.lost, known)

    def _take(self, name: str, question: Mean, value: float, known: bool) -> None:
        (question.know if known else question.draw)(value)
        if name not in self.decided and (question.low or question.high):
            self.decided[name] = question.low

    def each(self) -> Iterator[int]:
        """The rows one by one, each to be seen before the next one is asked for."""
        return itertools.chain.from_iterable(self.blocks(1))


def both(before: Form, form: Form) -> tuple[Form, Form]:
    """Two forms on the rows that the second one has read."""
    rows: Sequence[int] = form.read()
    return (before.on(rows), form.on(rows)) if form.drawn else (before, form)
