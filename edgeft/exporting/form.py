"""What does one form of a model say of rows, and on which of them can two forms be compared?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from edgeft.data.samples import Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.models.evaluate import metrics
from edgeft.models.metrics import Metrics


@dataclass
class Form:
    """What one form of the model says of some rows.

    `log_probabilities` (N, V) are those at the answers' positions of the first PARITY_PROMPTS rows; `losses` each
    row's summed nats, `tokens` its trained tokens; `exact` whether it is answered exactly, where that was asked.
    `drawn` are the numbers of the rows that were read, where not all were: the others have no tokens.
    """

    name: str
    log_probabilities: torch.Tensor
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    exact: tuple[bool, ...] = ()
    written: dict[int, str] = field(default_factory=dict)  # answers of rows, by their number, where they were asked for
    drawn: tuple[int, ...] = ()

    @property
    def loss(self) -> float:
        """Mean nats per trained token of all rows that were read."""
        return sum(self.losses) / max(1, sum(self.tokens))

    def read(self, rows: slice = slice(None)) -> list[int]:
        """The numbers of those of some rows that were read."""
        numbers = range(len(self.losses))[rows]
        drawn = set(self.drawn)
        return [number for number in numbers if number in drawn] if drawn else list(numbers)

    def on(self, rows: Iterable[int]) -> Form:
        """The same form on some of the rows, by their numbers; its table is that of the first ones."""
        kept = list(rows)
        exact = tuple(self.exact[i] for i in kept) if self.exact else ()
        losses, tokens = (tuple(each[i] for i in kept) for each in (self.losses, self.tokens))
        return Form(self.name, self.log_probabilities, losses, tokens, exact)  # type: ignore[arg-type]

    def metrics(self, samples: Sequence[Sample], tokenizer: TextTokenizer, rows: slice = slice(None)) -> Metrics:
        """Scores of those of some rows that were read, `samples` being all of them."""
        numbers = self.read(rows)
        mine = self.on(numbers)
        found = metrics([samples[i] for i in numbers], tokenizer, mine.losses, mine.exact or (False,) * len(numbers))
        asked = range(len(self.losses))[rows]
        if len(numbers) == len(asked):
            return found
        return found.model_copy(update={"drawn": tuple(number - asked[0] for number in numbers), "of_rows": len(asked)})

    def answers(self, rows: Sequence[int]) -> list[str]:
        """What was written for some rows; nothing where any of them was not written."""
        return [self.written[row] for row in rows] if all(row in self.written for row in rows) else []


def first(form: Form, rows: int) -> Form:
    """The same form on its first rows alone."""
    exact = form.exact[:rows]
    drawn = tuple(number for number in form.drawn if number < rows)
    return replace(form, losses=form.losses[:rows], tokens=form.tokens[:rows], exact=exact, drawn=drawn, written={})


def with_more(form: Form, more: Form) -> Form:
    """A form of all rows, of which some were read, and what it says of others; their positions are not kept."""
    read = sorted({*form.read(), *more.read()})
    losses, tokens = (
        tuple(a + b for a, b in zip(one, other, strict=True))
        for one, other in ((form.losses, more.losses), (form.tokens, more.tokens))
    )
    exact = tuple(a or b for a, b in zip(form.exact, more.exact, strict=True))
    drawn = tuple(read) if len(read) < len(losses) else ()
    written = {**form.written, **more.written}
    return Form(form.name, form.log_probabilities, losses, tokens, exact, written, drawn)  # type: ignore[arg-type]


def joined(name: str, rows: int, parts: Sequence[tuple[Sequence[int], Form]]) -> Form:
    """One form of what it says of parts of so many rows, by their numbers; the first part has the table."""
    losses, tokens, exact = [0.0] * rows, [0] * rows, [False] * rows
    for numbers, form in parts:
        for place, number in enumerate(numbers):
            losses[number], tokens[number] = form.losses[place], form.tokens[place]
            exact[number] = bool(form.exact) and form.exact[place]
    read = sorted(number for numbers, _ in parts for number in numbers)
    table, asked = parts[0][1].log_probabilities, bool(parts[0][1].exact)
    drawn = tuple(read) if len(read) < rows else ()
    return Form(name, table, tuple(losses), tuple(tokens), tuple(exact) if asked else (), drawn=drawn)
