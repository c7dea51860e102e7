"""Which label does a torch model hold for the most probable, on many rows at a time? By the search that run.py makes.

The pass over a row's own answer, which gives its loss, has read the prompt and one label: what follows the prompt and
every beginning of that label is known from it. Only beginnings of others that may still have more are read, of a row
all at once and of all rows together, until every row is decided. Nothing is left out that could win.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from edgeft.data.labels import NO_LABEL, Label, whole_answer
from edgeft.data.samples import IGNORED, Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.machines.runner import runner_module
from edgeft.models.parts import Parts
from edgeft.models.tree_pass import Begun, Prefix, Seen, TreeReader

Read = Callable[[Sequence[Begun], Seen], None]
MOST_BEGINNINGS = 64  # of a row that are read at once


def row_by_row(
    group: Sequence[Sample], along: Callable[[Sample, int, torch.Tensor], None]
) -> Callable[[int, torch.Tensor], None]:
    """What `score_group` shows its logits to, handed on as (sample, number of its trained token, logits (1, V))."""
    places = [(sample, at) for sample in group for at in range(sample.trained_tokens)]

    def seen(start: int, logits: torch.Tensor) -> None:
        for (sample, at), row in zip(places[start:], logits, strict=False):
            along(sample, at, row[None])

    return seen


class LabelRows:
    """A best-first search for each of some rows."""

    def __init__(
        self, labels: Sequence[Label], rows: Sequence[Sample], tokenizer: TextTokenizer, most_tokens: int | None = None
    ) -> None:
        """`most_tokens`: the model's positions; of a prompt that leaves no room for a label the start goes."""
        runner = runner_module()
        self.labels: Any = runner.Labels([label.text for label in labels], [list(label.ids) for label in labels])
        self.rows, self.most_tokens, self.passes, self.tokens = list(rows), most_tokens, 0, 0
        self.searches: dict[int, Any] = {id(row): runner.LabelSearch(self.labels) for row in rows}
        self.asked = dict(zip(map(id, rows), label_numbers(labels, rows, tokenizer), strict=True))

    def look(self, group: Sequence[Sample]) -> Callable[[int, torch.Tensor], None]:
        """What `score_group` shows its logits to: they belong to the trained tokens of `group`, row after row."""
        return row_by_row(group, self.along)

    def along(self, sample: Sample, at: int, logits: torch.Tensor) -> None:
        """Logits (n, V) of a row's own tokens from its trained one number `at` on, in order."""
        search, answer = self.searches.get(id(sample)), sample.ids[sample.prompt_tokens :]
        first = at - (sample.trained_tokens - len(answer))  # earlier answers of a chat train too
        for place, row in enumerate(logits, start=first):
            if search is None or place < 0:
                continue
            prefix = tuple(answer[:place])
            entry = next((each for each in search.open if each[1] == prefix), None)
            if entry is not None:
                search.open.remove(entry)
                heapq.heapify(search.open)
                self._expand(search, prefix, -entry[0], row)

    def settle(
        self, model: Any, parts: Parts, device: torch.device, compute: torch.dtype, chunk_tokens: int, group_tokens: int
    ) -> None:
        """Every row's best label, by what the pass over its own answer has left open."""
        reader = TreeReader(model, parts, device, compute, chunk_tokens, group_tokens)
        self.settle_by(reader.read)
        self.tokens = reader.tokens

    def settle_by(self, read: Read) -> None:
        """`settle` by any reader. Each round reads all beginnings that may still have more than the best so far."""
        while asked := [row for row in self.rows if not self.searches[id(row)].decided()]:
            taken = [self._taken(self.searches[id(row)]) for row in asked]
            begun = [Begun(self._text(row), tuple(prefixes)) for row, prefixes in zip(asked, taken, strict=True)]

            def seen(
                number: int, prefix: Prefix, logits: torch.Tensor,
                asked: list[Sample] = asked, taken: list[dict[Prefix, float]] = taken,
            ) -> None:  # fmt: skip
                self._expand(self.searches[id(asked[number])], prefix, taken[number][prefix], logits)

            read(begun, seen)
            self.passes += len(begun)

    def _taken(self, search: Any) -> dict[Prefix, float]:
        """The open beginnings that one round reads, with their scores: those that no whole label beats yet."""
        least = search.found[0][0] if search.found else -math.inf
        taken: dict[Prefix, float] = {}
        while search.open and len(taken) < MOST_BEGINNINGS:
            score = -search.open[0][0]
            if taken and not score > least:
                break
            taken[search.next()] = score
        return taken

    def _text(self, row: Sample) -> tuple[int, ...]:
        """A row's prompt, cut at its start where a label would not fit behind it."""
        room = None if self.most_tokens is None else max(1, self.most_tokens - self.labels.longest)
        return tuple(row.prompt if room is None else row.prompt[-room:])

    def _expand(self, search: Any, prefix: tuple[int, ...], score: float, logits: torch.Tensor) -> None:
        gained = torch.log_softmax(logits.float(), dim=-1)[self.labels.children[prefix]]
        search.expand(prefix, score, gained.tolist())

    def chosen(self, row: Sample) -> int:
        """The number of the most probable label."""
        return int(self.searches[id(row)].found[0][1])

    def is_exact(self, row: Sample) -> bool:
        """Whether it is the one that the row asks for."""
        return self.asked[id(row)] != NO_LABEL and self.chosen(row) == self.asked[id(row)]


def positions(model: Any) -> int | None:
    """How many positions a model has, where its config says it."""
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(found) if found else None


def whole_scores(
    labels: Sequence[Label], rows: Sequence[Sample], logits: Callable[[Sequence[Sample]], Iterator[Any]]
) -> torch.Tensor:
    """(rows, labels): each label's score, the sum over its tokens in a pass of its own: no search, no tree.

    `logits` gives (number of the sample, logits (n, V), the tokens that follow) of samples, as `row_logits` does. It
    takes a pass a label: for a few rows.
    """
    samples = [_answered(row, label) for row in rows for label in labels]
    scores = torch.zeros(len(samples), dtype=torch.float64)
    for number, found, targets in logits(samples):
        scores[number] += torch.log_softmax(found.double(), dim=-1).gather(1, targets[:, None]).sum()
    return scores.reshape(len(rows), len(labels))


def _answered(row: Sample, label: Label) -> Sample:
    """A row's prompt with this label as its answer."""
    ids = [*row.prompt, *label.ids]
    return Sample(ids, [IGNORED] * row.prompt_tokens + list(label.ids), row.prompt_tokens)


def label_numbers(labels: Sequence[Label], rows: Sequence[Sample], tokenizer: TextTokenizer) -> list[int]:
    """Which label each row asks for, by its text; NO_LABEL where it asks for something else."""
    numbers: dict[str | None, int] = {label.text: number for number, label in enumerate(labels)}
    return [numbers.get(_text(row, tokenizer), NO_LABEL) for row in rows]


def _text(row: Sample, tokenizer: TextTokenizer) -> str | None:
    answer = whole_answer(row, tokenizer.stop_ids)
    return None if answer is None else tokenizer.decode(answer[:-1]).strip()
