"""Is what follows many beginnings of a text, read in one pass under a mask, what plain passes give?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeft.models.checkpoint import load_plain
from edgeft.models.parts import Parts, find_parts
from edgeft.models.tree_pass import Begun, Prefix, TreeReader, TreeRow

TEXT = (5, 6, 7, 8, 9)
PREFIXES: tuple[Prefix, ...] = ((), (10,), (10, 11), (10, 12), (10, 12, 13), (14,), (20, 21, 22))


def found(reader: TreeReader, begun: list[Begun]) -> dict[tuple[int, Prefix], torch.Tensor]:
    made: dict[tuple[int, Prefix], torch.Tensor] = {}
    reader.read(begun, lambda number, prefix, logits: made.update({(number, prefix): logits.clone()}))
    return made


def reader_of(model: Any, parts: Parts, group_tokens: int) -> TreeReader:
    return TreeReader(model, parts, torch.device("cpu"), torch.float32, 3, group_tokens)


class Deaf(torch.nn.Module):
    """A body that takes no notice of a mask and of positions, as some families would."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body

    def forward(self, input_ids: torch.Tensor, use_cache: bool, **ignored: Any) -> Any:
        return self.body(input_ids=input_ids, use_cache=use_cache)


@pytest.mark.parametrize("takes_the_mask", [True, False])
@pytest.mark.parametrize("group_tokens", [8, 1000])
def test_every_beginning_gets_the_logits_of_a_pass_of_its_own(
    takes_the_mask: bool, group_tokens: int, checkpoint_folder: Path
) -> None:
    model = load_plain(checkpoint_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(30.0)  # else all logits are nearly equal
    parts = find_parts(model)
    heard = parts if takes_the_mask else replace(parts, body=Deaf(parts.body))
    begun = [Begun(TEXT, PREFIXES), Begun((3, 4), ((10,), (30, 31)))]
    reader = reader_of(model, heard, group_tokens)
    made = found(reader, begun)
    assert reader.packs is takes_the_mask
    assert set(made) == {(number, prefix) for number, each in enumerate(begun) for prefix in each.prefixes}
    with torch.no_grad():
        for (number, prefix), logits in made.items():
            alone = model(torch.tensor([[*begun[number].text, *prefix]])).logits[0, -1]
            torch.testing.assert_close(logits, alone, atol=1e-3, rtol=1e-4)


def test_a_tree_costs_less_than_its_beginnings(checkpoint_folder: Path) -> None:
    model = load_plain(checkpoint_folder)
    tree, alone = (reader_of(model, find_parts(model), 1000) for _ in range(2))
    alone.packs = False
    for reader in (tree, alone):
        found(reader, [Begun(TEXT * 4, PREFIXES)])
    assert tree.tokens < alone.tokens


def test_a_beginning_stands_in_a_tree_once() -> None:
    row = TreeRow.of(Begun(TEXT, PREFIXES))
    assert row.ids == (*TEXT, 10, 11, 12, 13, 14, 20, 21, 22)
    assert row.positions == (0, 1, 2, 3, 4, 5, 6, 6, 7, 5, 5, 6, 7)
    assert row.asked[()] == 4 and row.asked[(10, 12, 13)] == 8
    seen = row.sees(14)
    assert seen[8].nonzero()[0].tolist() == [0, 1, 2, 3, 4, 5, 7, 8]
    assert seen[13].nonzero()[0].tolist() == [13] and seen[2].nonzero()[0].tolist() == [0, 1, 2]
