"""Does a torch model that is held to a grammar give the answers that rows ask for? By the masks that devices apply.

The pass over a row's own answer, which gives its loss, tells: the answer is exact where each of its tokens is the most
likely of those that the grammar allows there. What another first token leaves open is generated, held to the grammar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgeft.data.grammar import Grammar, HeldTo
from edgeft.data.samples import Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.engine.label_scores import LabelRows, positions, row_by_row
from edgeft.models.evaluate import answer_tokens, autocast, by_answer, greedy, is_exact, judge
from edgeft.models.parts import Parts
from edgeft.targets.words import Words

UNREAD = -1  # the token at a place that no allowed path leads to


class GrammarRows:
    """Which of some rows are answered exactly, held to a grammar."""

    def __init__(self, grammar: Grammar, rows: Sequence[Sample], tokenizer: TextTokenizer) -> None:
        self.rows, self.tokenizer = list(rows), tokenizer
        self.words, self.grammar = Words(tokenizer), grammar
        self.matcher = self.words.matcher(grammar)
        self.likely = {id(row): [UNREAD] * (len(row) - row.prompt_tokens) for row in rows}
        self.at: tuple[int, int] | None = None  # the row and its place that the matcher stands before
        self.judged: dict[int, bool | None] = {}

    def look(self, group: Sequence[Sample]) -> Callable[[int, torch.Tensor], None]:
        """What `score_group` shows its logits to: they belong to the trained tokens of `group`, row after row."""
        return row_by_row(group, self.along)

    def along(self, sample: Sample, at: int, logits: torch.Tensor) -> None:
        """Logits (n, V) of a row's own tokens from its trained one number `at` on, in order."""
        answer = sample.ids[sample.prompt_tokens :]
        first = at - (sample.trained_tokens - len(answer))  # earlier answers of a chat train too
        for place, row in enumerate(logits, start=first):
            if place == 0 and id(sample) in self.likely:
                self.matcher.restart()
                self.at = id(sample), 0
            if self.at != (id(sample), place):
                continue
            allowed = torch.from_numpy(self.matcher.allowed(len(row))).to(row.device)
            self.likely[id(sample)][place] = int(row.masked_fill(~allowed, -torch.inf).argmax())
            self.at = (id(sample), place + 1) if self.matcher.take(answer[place]) else None

    def settle(
        self, model: Any, parts: Parts, device: torch.device, compute: torch.dtype, chunk_tokens: int, group_tokens: int
    ) -> None:
        """Judge every row; what may spell the same answer in other tokens is generated."""
        self.judged = {id(row): judge(self.tokenizer, row, self.likely[id(row)]) for row in self.rows}
        for group in by_answer([row for row in self.rows if self.judged[id(row)] is None], group_tokens):
            allowed = Allowed(self.words, self.grammar, len(group))
            with autocast(device, compute):
                prompts = [row.prompt for row in group]
                made = greedy(model, prompts, self.tokenizer.stop_ids, answer_tokens(group), device, allowed)
            for row, answer in zip(group, made, strict=True):
                self.judged[id(row)] = is_exact(self.tokenizer, row, answer)

    def is_exact(self, row: Sample) -> bool:
        """Whether a row's held answer is what it asks for."""
        return bool(self.judged[id(row)])


class Allowed:
    """What transformers asks before each token that it generates: logits, with those that a grammar forbids at -inf."""

    def __init__(self, words: Words, grammar: Grammar, rows: int) -> None:
        self.matchers, self.width = [words.matcher(grammar) for _ in range(rows)], 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        made = input_ids.shape[1] - self.width if self.width else 0
        self.width = self.width or input_ids.shape[1]
        for matcher, ids, row in zip(self.matchers, input_ids, scores, strict=True):
            if made and not matcher.stopped():
                matcher.take(int(ids[-1]))
            allowed = torch.from_numpy(matcher.allowed(len(row))).to(row.device)
            row.masked_fill_(~allowed, -torch.inf)
        return scores


def held_rows(
    held_to: HeldTo, rows: Sequence[Sample], tokenizer: TextTokenizer, model: Any
) -> LabelRows | GrammarRows | None:
    """What judges rows whose answers are held to something; None where they are free, or no row asks for one."""
    if not held_to or not rows or not rows[0].has_prompt:
        return None
    if isinstance(held_to, Grammar):
        return GrammarRows(held_to, rows, tokenizer)
    return LabelRows(held_to, rows, tokenizer, positions(model))
