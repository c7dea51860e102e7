"""What follows several beginnings of one text, in one pass over it? Beginnings as a tree behind the text, under a mask.

Each token of the tree sees the text and its own ancestors, at the positions where it would stand alone. A family that
does not take such a mask as it is meant is noticed: the first row is read plainly too, and where the two differ each
beginning is read with the text before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from edgeft.data import scoring_groups
from edgeft.data.scoring_groups import Size
from edgeft.models.evaluate import autocast
from edgeft.models.loss import head_transform
from edgeft.models.parts import Parts

Prefix = tuple[int, ...]
Seen = Callable[[int, Prefix, torch.Tensor], None]  # (number of the text, beginning, logits (V,) after it)
ALIKE = {torch.float32: 2e-2, torch.float16: 0.5, torch.bfloat16: 2.0}  # of any logit, where the mask is understood


@dataclass(frozen=True)
class Begun:
    """A text and beginnings of what may follow it; () asks for what follows the text itself."""

    text: tuple[int, ...]
    prefixes: tuple[Prefix, ...]


@dataclass(frozen=True)
class TreeRow:
    """A text and a tree behind it as one sequence: each token's position, and where its parent stands."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    parents: tuple[int, ...]
    text_tokens: int
    asked: dict[Prefix, int]  # where what follows a beginning is predicted

    @classmethod
    def of(cls, begun: Begun) -> TreeRow:
        """The sequence; beginnings of beginnings stand in it once."""
        length = len(begun.text)
        places: dict[Prefix, int] = {(): length - 1}
        ids, parents = list(begun.text), list(range(-1, length - 1))
        positions = list(range(length))
        for prefix in begun.prefixes:
            for end in range(1, len(prefix) + 1):
                if prefix[:end] not in places:
                    places[prefix[:end]] = len(ids)
                    ids.append(prefix[end - 1])
                    parents.append(places[prefix[: end - 1]])
                    positions.append(length + end - 1)
        asked = {prefix: places[prefix] for prefix in begun.prefixes}
        return cls(tuple(ids), tuple(positions), tuple(parents), length, asked)

    def sees(self, width: int) -> Any:
        """(width, width) booleans: which earlier token each one attends to; padding sees itself."""
        seen = numpy.eye(width, dtype=bool)
        length = self.text_tokens
        seen[:length, :length] = numpy.tri(length, dtype=bool)
        for place in range(length, len(self.ids)):
            seen[place] |= seen[self.parents[place]]
        return seen


@dataclass
class TreeReader:
    """Reads beginnings with one model, several texts at once, in at most `group_tokens` padded tokens."""

    model: Any
    parts: Parts
    device: torch.device
    compute: torch.dtype
    chunk_tokens: int
    group_tokens: int
    tokens: int = 0  # read so far
    packs: bool | None = field(default=None)  # whether the model takes the mask; None: not looked at yet

    @torch.no_grad()
    def read(self, begun: Sequence[Begun], seen: Seen) -> None:
        """Show `seen` what follows every beginning of every text."""
        if self.packs is None and begun:
            self.packs = self._takes_the_mask(max(begun, key=lambda each: len(each.prefixes)))
        work = [(number, part) for number, each in enumerate(begun) for part in self._parts_of(each)]
        rows = [TreeRow.of(part) for _, part in work]
        sizes = [Size(len(row.ids), 0, len(row.asked)) for row in rows]
        for group in scoring_groups.by_length(sizes, self.group_tokens):
            some = [rows[place] for place in group]
            for place, prefix, logits in self._group(some, plain=not self.packs):
                seen(work[group[place]][0], prefix, logits)

    def _parts_of(self, begun: Begun) -> Iterator[Begun]:
        """So few beginnings of a text at a time that they and it fit a group; one where the mask is not taken."""
        room = max(1, self.group_tokens - len(begun.text)) if self.packs else 0
        part, nodes = list[Prefix](), 0
        for prefix in sorted(begun.prefixes):
            if part and nodes + len(prefix) > room:
                yield Begun(begun.text, tuple(part))
                part, nodes = [], 0
            part.append(prefix)
            nodes += max(1, len(prefix))
        yield Begun(begun.text, tuple(part))

    def _takes_the_mask(self, begun: Begun) -> bool:
        """Whether the longest beginning's logits are those of a plain pass, with others beside it."""
        longest = max(begun.prefixes, key=len)
        alone = next(self._group([TreeRow.of(Begun(begun.text, (longest,)))], plain=True))[2]
        tree = {prefix: logits for _, prefix, logits in self._group([TreeRow.of(begun)], plain=False)}
        return bool((tree[longest] - alone).abs().max() <= ALIKE[self.compute])

    def _group(self, rows: Sequence[TreeRow], *, plain: bool) -> Iterator[tuple[int, Prefix, torch.Tensor]]:
        """(row, beginning, logits (V,)) of rows in one pass; `plain`: without a mask, for rows that are no trees."""
        width = max(len(row.ids) for row in rows)
        self.tokens += width * len(rows)
        given = {"input_ids": _padded([row.ids for row in rows], width).to(self.device)}
        if not plain:
            sees = torch.from_numpy(numpy.stack([row.sees(width) for row in rows]))[:, None].to(self.device)
            mask = torch.zeros(sees.shape, dtype=self.compute, device=self.device)
            given["attention_mask"] = mask.masked_fill_(~sees, torch.finfo(self.compute).min)
            given["position_ids"] = _padded([row.positions for row in rows], width).to(self.device)
        with autocast(self.device, self.compute):
            hidden = self.parts.body(**given, use_cache=False).last_hidden_state
            asked = [(number, prefix, place) for number, row in enumerate(rows) for prefix, place in row.asked.items()]
            flat = hidden.reshape(-1, hidden.shape[-1])[[number * width + place for number, _, place in asked]]
            for start in range(0, len(asked), self.chunk_tokens):
                logits = self._logits(flat[start : start + self.chunk_tokens].to(self.compute))
                for (number, prefix, _), row in zip(asked[start:], logits, strict=False):
                    yield number, prefix, row

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head: Any = self.parts.head
        scale, softcap = head_transform(self.model.config.get_text_config(decoder=True))
        logits = hidden @ head.weight.T.to(hidden.dtype)
        logits = (logits if head.bias is None else logits + head.bias).float() * scale
        return softcap * torch.tanh(logits / softcap) if softcap else logits


def _padded(rows: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    return torch.tensor([[*row, *([0] * (width - len(row)))] for row in rows])
