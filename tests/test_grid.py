"""The codes of the runtimes' own quantisers, one for one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

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


def by_onnxruntime(weight: torch.Tensor, grid: Grid) -> tuple[Any, Any, Any]:
    """(codes, scale, zero point) by ONNX Runtime's own quantisers."""
    from onnxruntime.capi import _pybind_state as kernels
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantizer as Default
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor

    rows, columns = weight.shape
    count = -(-columns // grid.block_size)
    padded = np.zeros((rows, count * grid.block_size), dtype=np.float32)
    padded[:, :columns] = weight.numpy()
    if grid.method == "rtn":
        scheme = "sym" if grid.symmetric else "asym"
        codes, scale, zero = quant_tensor(padded, grid.bits, grid.block_size, scheme, "uint", 1)
    elif grid.method == "gather":
        slices = padded.reshape(rows * count, grid.block_size)
        codes, scale, zero = Default.quant_slice_asymmetric(slices)
    else:
        each = 8 // grid.bits
        codes = np.zeros((rows, count, grid.block_size // each), dtype=np.uint8)
        zero = np.zeros((rows, -(-count // each)), dtype=np.uint8)
        scale = np.zeros((rows, count), dtype=np.float32)
        kernel = kernels.quantize_matmul_4bits if grid.bits == 4 else kernels.quantize_matmul_8bits
        kernel(codes, np.ascontiguousarray(padded.T), scale, zero, grid.block_size, rows, columns, grid.symmetric)
        codes, zero = unpacked(codes, grid.bits), unpacked(zero, grid.bits)[:, :count]
        if grid.symmetric:
            zero = np.full((rows, count), 2 ** (grid.bits - 1))
    return codes.reshape(rows, -1)[:, :columns], scale.reshape(rows, count), zero.reshape(rows, count)


def unpacked(packed: Any, bits: int) -> Any:
    rows = packed.shape[0]
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1) if bits == 4 else packed.reshape(rows, -1)


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
