"""What does a model write for some rows, held to labels or a grammar as its device will be?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edgeft.data.grammar import Grammar, HeldTo
from edgeft.data.samples import Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.engine.grammar_scores import Allowed, GrammarRows, held_rows
from edgeft.engine.label_scores import LabelRows
from edgeft.models.evaluate import answer_tokens, asked_for, autocast, by_answer, by_length, cut_at, greedy, score_group
from edgeft.models.parts import Parts


@torch.no_grad()
def written(
    model: Any, parts: Parts, rows: Sequence[Sample], tokenizer: TextTokenizer, held_to: HeldTo = (), *,
    device: torch.device, compute: torch.dtype, chunk_tokens: int, group_tokens: int,
) -> list[list[int]]:  # fmt: skip
    """The ids of each row's greedy answer, without its end.

    Each is read up to one token beyond the expected answer's length, which is what scoring has room for: where it goes
    on is another answer in any case.
    """
    held = held_rows(held_to, rows, tokenizer, model)
    if isinstance(held, LabelRows) and not isinstance(held_to, Grammar):
        for group in by_length(rows, group_tokens):
            score_group(model, parts, group, device, compute, chunk_tokens, held.look(group))
        held.settle(model, parts, device, compute, chunk_tokens, group_tokens)
        return [cut_at(held_to[held.chosen(row)].ids, tokenizer.stop_ids) for row in rows]
    made: dict[int, list[int]] = {}
    for group in by_answer(rows, group_tokens):
        allowed = Allowed(held.words, held.grammar, len(group)) if isinstance(held, GrammarRows) else None
        with autocast(device, compute):
            prompts = [row.prompt for row in group]
            answers = greedy(model, prompts, tokenizer.stop_ids, answer_tokens(group), device, allowed)
        made |= {id(row): answer[: answer_tokens([row])] for row, answer in zip(group, answers, strict=True)}
    return [made[id(row)] for row in rows]


def answer_text(tokenizer: TextTokenizer, ids: Sequence[int]) -> str:
    """An answer as people read it."""
    return tokenizer.spell(ids).strip()


def expected_text(tokenizer: TextTokenizer, row: Sample) -> str:
    """The answer that a row asks for."""
    return answer_text(tokenizer, asked_for(row, tokenizer.stop_ids)[0])
