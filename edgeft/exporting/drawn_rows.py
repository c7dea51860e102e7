"""Of which rows does a form of a model have to answer, so that all of them would not say anything else?

The first ones, whose positions are compared, and those whose answers are shown, in any case. Then rows at random, until
both of a gate's questions are decided (models/drawing.py): does the loss rise by more than it may, are more answers
lost than may be? A form that fails one has failed. What a gate says is what the rows say that were drawn.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence

from edgeft.exporting.form import Form
from edgeft.models.drawing import Mean

AHEAD = 1.5  # times the rows that decide where nothing changes
BLOCK = 32  # rows that torch reads before it is asked again
# A row's loss may rise by so many times what it may on average before it counts as one that nobody foresaw.
REACH = 20.0


class Drawing:
    """Rows for a form that is compared with the one `before` it.

    `tokens` are the trained ones of each row. `gate` rows are those of the loss, which may rise by `nats` a token; of
    the `scored` ones `points` of 100 may be lost. `taken` are the numbers of rows that are read in any case. Of a form
    before that has not read all rows only those are drawn that it has: they lie first in the order of the draw.
    """

    def __init__(
        self, tokens: Sequence[int], nats: float, points: float, *, gate: int, scored: slice | None,
        taken: Iterable[int],
    ) -> None:  # fmt: skip
        self.tokens, self.taken = tokens, sorted(set(taken))
        self.gate, self.scored = range(gate), range(len(tokens))[scored] if scored is not None else range(0)
        self.mean_tokens = max(1.0, sum(tokens[:gate]) / max(1, gate))
        self.unit = nats * self.mean_tokens
        self.loss = Mean(gate, REACH, sure=False)
        self.lost = max(points / 100, 1 / len(self.scored)) if self.scored else 0.0
        self.exact = Mean(len(self.scored), 1 + self.lost)
        self.decided: dict[str, bool] = {}  # whether each question is answered with yes
        known = set(self.taken)
        self.order = [number for number in sorted({*self.gate, *self.scored}) if number not in known]
        random.Random(0).shuffle(self.order)
        self.before: Form | None = None
        self.left = [self.taken]  # to be read before any other

    def follows(self, before: Form) -> Drawing:
        """The same drawing, for a form that is compared with this one."""
        self.before = before
        return self

    def ahead(self) -> list[int]:
        """Numbers of rows that decide where nothing changes, and half as many more: what a form before reads first."""
        same = copy.deepcopy(self)
        last = -1
        for number in itertools.chain(self.taken, self.order):
            if number not in self.taken:
                if not same.open:
                    break
                last += 1
            same.see_change(number, 0.0, 0.0)
        return sorted([*self.taken, *self.order[: math.ceil(AHEAD * (last + 1))]])

    def more(self) -> list[int]:
        """Numbers of as many rows again as the form before has read, of those that it has not."""
        assert self.before is not None
        read = set(self.before.read())
        return sorted([number for number in self.order if number not in read][: len(read)])

    @property
    def open(self) -> bool:
        """Whether a row is left that says anything of what is undecided."""
        return any(self._asked(number) for number in self.order)

    def blocks(self, rows: int = BLOCK) -> Iterator[list[int]]:
        """Numbers of rows to read next, at most so many after the first of them."""
        assert self.before is not None
        known = set(self.before.read())
        while self.left:
            yield self.left.pop()
        while block := list(
            itertools.islice((number for number in self.order if number in known and self._asked(number)), rows)
        ):
            yield block
            read = set(block)
            self.order = [number for number in self.order if number not in read]

    def _asked(self, number: int) -> bool:
        """Whether a row says anything of what is still open."""
        if False in self.decided.values():
            return False
        return ("loss" not in self.decided and number in self.gate) or (
            "exact" not in self.decided and number in self.scored
        )

    def see(self, number: int, loss: float, exact: bool) -> None:
        """What a row that was read says."""
        assert self.before is not None
        was = bool(self.before.exact) and self.before.exact[number]
        self.see_change(number, loss - self.before.losses[number], float(was) - exact)

    def see_change(self, number: int, rise: float, lost: float) -> None:
        """By how many nats a row's loss has risen, and how many of its answers were lost."""
        known = number in self.taken
        if number in self.gate:
            self._take("loss", self.loss, rise / self.unit - self.tokens[number] / self.mean_tokens, known)
        if number in self.scored:
            self._take("exact", self.exact, lost - self.lost, known)

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
    return (before.on(rows), form.on(rows)) if form.drawn or before.drawn else (before, form)
