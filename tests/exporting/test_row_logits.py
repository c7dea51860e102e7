"""Rows of a proof, read together: the same logits as each alone, whatever their lengths, in bounded pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_model

from edgeft.data.dataset import IGNORED, Sample
from edgeft.exporting import row_logits as module
from edgeft.exporting.row_logits import row_logits, together, trained_at
from edgeft.models.checkpoint import load_plain
from edgeft.models.parts import find_parts


def test_whole_rows_go_together_and_a_long_one_in_pieces() -> None:
    assert together([], 3, 3) == together([[], []], 3, 3) == []
    assert together([[1], [2, 3], [4]], 3, 9) == [[(0, 1), (1, 2), (1, 3)], [(2, 4)]]
    assert together([[1, 2], [3, 4], []], 3, 9) == [[(0, 1), (0, 2)], [(1, 3), (1, 4)]], "a row is not cut for another"
    assert together([[7], [1, 2, 3, 4]], 2, 9) == [[(0, 7)], [(1, 1), (1, 2), (1, 3), (1, 4)]], "nor for being long"
    assert together([[1, 2, 3, 4, 5]], 2, 4) == [[(0, 1), (0, 2), (0, 3), (0, 4)], [(0, 5)]]


def row(length: int, prompt: int, begin: int) -> Sample:
    ids = [begin, *range(3, 2 + length)]
    return Sample(ids, [IGNORED] * prompt + ids[prompt:], prompt)


def test_logits_are_those_of_each_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths differ, so that rows are padded; the pieces are smaller than the longest row trains."""
    save_model(tmp_path)
    model = load_plain(tmp_path)
    parts = find_parts(model)
    rows = [row(4 + 3 * n, 2 + n, 10 + n) for n in range(7)]
    monkeypatch.setattr(module, "POSITIONS", 8)
    monkeypatch.setattr(module, "FEW", 4)
    pieces: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for number, logits, targets in row_logits(model, parts, rows, torch.float32, 64):
        assert len(logits) == len(targets) <= 8
        pieces.setdefault(number, []).append((logits, targets))
    assert sorted(pieces) == list(range(len(rows))) and len(pieces[6]) == 2
    with torch.no_grad():
        for number, sample in enumerate(rows):
            at = trained_at(sample)
            alone = model(torch.tensor([sample.ids])).logits[0, at]
            assert torch.allclose(torch.cat([logits for logits, _ in pieces[number]]), alone, atol=1e-5)
            assert torch.cat([given for _, given in pieces[number]]).tolist() == [sample.ids[i + 1] for i in at]
