"""The codes of the runtimes' own quantisers, one for one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from runtimes import by_onnxruntime

from edgeft.targets.gguf_file import packed
from edgeft.targets.grid import GGML, Encoded, Fitted, Grid
from edgeft.targets.rounding import round_


def awkward(rows: int, columns: int) -> torch.Tensor:
    """Weights with every kind of block: of one sign, constant, zero, tiny, with an outlier, with exact halves."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    weight[0], weight[1], weight[2], weight[3] = weight[0].abs(), -weight[1].abs(), 0.0, 0.25
    weight[4] *= 1e-30
    weight[5, ::32] = 40.0
    weight[6] = torch.arange(columns) % 16 - 7.5
    weight[7] = (torch.arange(columns) % 31) / 2.0
    return weight


GRIDS = [
    Grid(bits, size, symmetric, method)  # type: ignore[arg-type]
    for method in ("rtn", "mlas")
    for bits in (4, 8)
    for size in (32, 128)
    for symmetric in (False, True)
] + [Grid(4, 32, False, "gather")]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("columns", [256, 160])
def test_codes_are_those_of_onnxruntime(grid: Grid, columns: int) -> None:
    weight = awkward(16, columns)
    codes, scale, zero = by_onnxruntime(weight, grid)
    mine = grid.encode(weight)
    np.testing.assert_array_equal(mine.scale.numpy(), scale.astype(np.float32))
    np.testing.assert_array_equal(mine.zero.numpy(), zero.astype(np.float32))
    np.testing.assert_array_equal(mine.codes.numpy(), codes.astype(np.float32))
    expected = (codes - np.repeat(zero, grid.block_size, axis=1)[:, :columns].astype(np.float32)) * np.repeat(
        scale.astype(np.float32), grid.block_size, axis=1
    )[:, :columns]
    np.testing.assert_allclose(mine.weight().numpy(), expected.astype(np.float32), rtol=1e-6, atol=0)
    assert torch.equal(round_(weight.clone(), grid), mine.weight())


@pytest.mark.parametrize("name", sorted(GGML))
def test_bytes_and_values_are_those_of_gguf(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    weight, kind = awkward(16, 256), gguf.GGMLQuantizationType[name]
    weight[8, :32] = torch.tensor([1.0, -1.0] * 16)  # two values of largest size: the first decides the scale's sign
    weight[9, :32] = torch.tensor([-1.0, 1.0] * 16)
    stored = gguf.quants.quantize(weight.numpy(), kind)
    mine = GGML[name].encode(weight)
    np.testing.assert_array_equal(packed(mine), stored)
    np.testing.assert_array_equal(mine.weight().numpy(), gguf.quants.dequantize(stored, kind))
    planted = mine.codes.clone()
    planted[3, 77] += 1
    assert (packed(Encoded(planted, mine.scale, mine.zero, 32, mine.bits, mine.least)) != stored).sum() == 1


@pytest.mark.parametrize("grid", [*GRIDS, *GGML.values()], ids=str)
def test_values_on_a_grid_keep_their_codes_under_what_is_stored(grid: Grid) -> None:
    """Codes of the decoded values, by scales as a file holds them, are the codes: nothing is rounded twice."""
    mine = grid.encode(awkward(16, 256))
    fitted = Fitted(mine.scale, mine.zero, mine.least).wide()
    grouped = mine.weight().view(16, -1, grid.block_size)
    again = grid.codes(grouped, fitted).view(16, -1)
    usable = (fitted.scale.abs() > 1e-37).expand_as(grouped).reshape(16, -1)  # a block of one value has no steps
    assert torch.equal(again[usable], mine.codes[usable]) and usable.float().mean() > 0.8


def test_a_promoted_tensor_stays_on_its_runtimes_kind_of_grid() -> None:
    assert Grid(4, 32, False, "rtn").in_eight_bits() == Grid(8, 32, False, "rtn")
    assert GGML["Q4_1"].in_eight_bits().method == GGML["Q8_0"].method
