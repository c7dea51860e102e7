"""Which logits does a torch model give along rows? What begins alike, and the head, is read for many at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from edgeft.data.dataset import IGNORED, Sample
from edgeft.memory.proof import POSITIONS
from edgeft.models.beginning import read_beginning
from edgeft.models.evaluate import autocast, by_length
from edgeft.models.loss import head_transform
from edgeft.models.parts import Parts

FEW = 16  # positions that are worth reading the head for once: most of what more would save
CPU = torch.device("cpu")


def trained_at(sample: Sample) -> list[int]:
    """Positions whose next token is trained."""
    return [i for i, label in enumerate(sample.labels[1:]) if label != IGNORED]


def together(rows: Sequence[Sequence[int]], few: int, most: int) -> list[list[tuple[int, int]]]:
    """(row, position) of several at a time: whole rows as long as there are `few`, of a longer row `most` at most."""
    found: list[list[tuple[int, int]]] = [[]]
    for row, positions in enumerate(rows):
        for part in (positions[first : first + most] for first in range(0, len(positions), most)):
            if len(found[-1]) + len(part) > few:
                found.append([])
            found[-1] += [(row, position) for position in part]
    return [some for some in found if some]


@torch.no_grad()
def row_logits(
    model: Any, parts: Parts, rows: Sequence[Sample], compute: torch.dtype, group_tokens: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(row, logits (n, V), the tokens that follow) at the rows' trained positions, rows of similar length at once.

    The head reads a few positions of a group's rows at once, or it would be read from memory for each row again; more
    would be logits that this process's malloc keeps.
    """
    scale, softcap = head_transform(model.config.get_text_config(decoder=True))
    numbers = {id(sample): number for number, sample in enumerate(rows)}
    head: Any = parts.head
    with autocast(CPU, compute):
        behind = read_beginning(model, parts, rows, CPU, compute)
    for group in by_length(rows, group_tokens):
        with autocast(CPU, compute):
            hidden = behind.read(parts, behind.batch(group).ids).to(compute)
        for some in together([trained_at(sample) for sample in group], FEW, POSITIONS):
            places, positions = torch.tensor(some).T
            with autocast(CPU, compute):
                logits = hidden[places, positions - behind.tokens] @ head.weight.T.to(compute)
                logits = (logits if head.bias is None else logits + head.bias).float() * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            targets = torch.tensor([group[place].ids[at + 1] for place, at in some])
            counts = Counter(place for place, _ in some)  # a row's positions lie behind one another
            parts_of = (each.split(list(counts.values())) for each in (logits, targets))
            for place, mine, wanted in zip(counts, *parts_of, strict=True):
                yield numbers[id(group[place])], mine, wanted
            del logits, mine  # or they stay beside the next ones
