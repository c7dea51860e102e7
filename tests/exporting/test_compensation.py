"""Codes, ranges and scales of one weight: against solutions in fp64 that know no factors, and planted faults."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edgeft.exporting.compensation import (
    RANGES,
    damped,
    gptq,
    gptq_alone,
    inverse_factor,
    least_change,
    output_error,
    solve_scales,
)
from edgeft.targets.grid import GGML, Encoded, Fitted, Grid

ASYMMETRIC = Grid(4, 32, False, "rtn")
GRIDS = [ASYMMETRIC, Grid(4, 32, True, "mlas"), Grid(8, 32, False, "rtn"), *GGML.values()]
FOUR_BITS = [grid for grid in GRIDS if grid.bits == 4]
FEW = (1.0, 0.9, 0.8)


def correlated(rows: int, columns: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    mixed = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=random)
    return torch.randn(rows, columns, generator=random) @ mixed


def weights(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4))


def gram_of(read: torch.Tensor) -> torch.Tensor:
    return damped(read.T @ read)


def coded(weight: torch.Tensor, gram: torch.Tensor, grid: Grid, ranges: tuple[float, ...]) -> Encoded:
    return gptq(weight, inverse_factor(gram), grid, ranges)


def column_by_column(left: torch.Tensor, gram: torch.Tensor, grid: Grid, share: float) -> tuple[torch.Tensor, ...]:
    """(codes, weights as decoded, what becomes of the rest) of the first block, all that is left solved anew each time.

    The best w' of the columns left, given that column c moved by e: w' - w = -e inv(H)[c, left] / inv(H)[c, c].
    """
    left = left.clone()
    width = min(grid.block_size, left.shape[1])
    block = torch.zeros(len(left), grid.block_size)
    block[:, :width] = left[:, :width]
    fitted = grid.stored(grid.fit(block * share))
    codes = torch.zeros(len(left), width)
    made = torch.zeros(len(left), width, dtype=torch.float64)
    for column in range(width):
        codes[:, column] = grid.codes(left[:, column].float(), fitted)
        made[:, column] = fitted.values(codes[:, column].clone()).double()
        inverse = torch.linalg.inv(gram[column:, column:])
        error = (left[:, column] - made[:, column]) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0][None]
    return codes, made, left[:, width:]


def one_by_one(weight: torch.Tensor, gram: torch.Tensor, grid: Grid, ranges: tuple[float, ...]) -> torch.Tensor:
    """The codes in fp64; of each block in the range whose error is least when the columns after it are free."""
    left, gram, found = weight.double(), gram.double(), []
    while left.shape[1]:
        width = min(grid.block_size, left.shape[1])
        tried, costs = [column_by_column(left, gram, grid, share) for share in ranges], []
        for _, made, rest in tried:
            moved = torch.cat([made, rest], dim=1) - left
            costs.append(((moved @ gram) * moved).sum(dim=1))
        best = torch.stack(costs).argmin(dim=0)
        rows = torch.arange(len(left))
        found.append(torch.stack([codes for codes, _, _ in tried])[best, rows])
        left, gram = torch.stack([rest for _, _, rest in tried])[best, rows], gram[width:, width:]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("ranges", [RANGES[:1], FEW], ids=["whole", "three"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_are_those_of_solving_what_is_left_column_by_column(grid: Grid, ranges: tuple[float, ...]) -> None:
    weight, gram = weights(24, 80), gram_of(correlated(300, 80))  # the last block is half full
    made, expected = coded(weight, gram, grid, ranges), one_by_one(weight, gram, grid, ranges)
    # a value between two codes falls to either side, and takes those after it in its row along
    assert (made.codes != expected).float().mean() < 0.01
    assert output_error(weight, made, gram).sum() < 0.75 * output_error(weight, grid.encode(weight), gram).sum()
    wrong = {"its diagonal": gram.diagonal().diag(), "of other inputs": gram.flip(0).flip(1).contiguous()}
    for what, other in wrong.items():  # planted
        assert (coded(weight, other, grid, ranges).codes != expected).float().mean() > 0.05, what


@pytest.mark.parametrize("grid", [ASYMMETRIC, GGML["Q4_0"]], ids=str)
def test_inputs_that_say_nothing_of_each_other_leave_the_nearest_codes(grid: Grid) -> None:
    weight = weights(16, 64)
    made = coded(weight, torch.eye(64) * 7, grid, RANGES[:1])
    assert (made.codes != grid.encode(weight).codes).sum() <= 2  # a scale as stored against one in fp64 or fp32


def least_squares(weight: torch.Tensor, read: torch.Tensor, encoded: Encoded) -> torch.Tensor:
    """What is left of each output's error in fp64 when its scales are free, by QR of what its blocks put out."""
    left = []
    for row, wanted in enumerate((read.double() @ weight.double().T).T):
        columns = []
        for block in range(encoded.scale.shape[1]):
            part = slice(block * encoded.block_size, (block + 1) * encoded.block_size)
            shifted = encoded.codes[row, part].double() - encoded.zero[row, block]
            columns.append(read[:, part].double() @ shifted)
            if encoded.least is not None:
                columns.append(read[:, part].double().sum(dim=1))
        outputs = torch.stack(columns, dim=1)
        best = torch.linalg.lstsq(outputs, wanted[:, None], driver="gelsd").solution
        left.append((outputs @ best - wanted[:, None]).square().sum())
    return torch.stack(left)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_other_scales_leave_less_of_the_outputs_error(grid: Grid) -> None:
    weight, read = weights(12, 80), correlated(300, 80)
    gram, nearest = read.T @ read, grid.encode(weights(12, 80))
    made = solve_scales(weight, nearest, gram, grid)
    assert torch.equal(made.codes, nearest.codes) and torch.equal(made.zero, nearest.zero)
    left = output_error(weight, made, gram).double()
    rest = least_squares(weight, read, nearest)
    # of the error before: what scales in fp16 cannot hold, which of 8 bits is as much as rounding leaves
    held = {"q_0": 2e-3, "q_1": 2e-3, "q8_0": 1.0}.get(grid.method, 1e-4)
    assert (left <= rest * (1 + 1e-3) + held * output_error(weight, nearest, gram)).all()
    assert (left >= rest * (1 - 1e-3)).all()
    if grid.bits == 4:
        assert left.sum() < 0.96 * output_error(weight, nearest, gram).sum()
        diagonal = solve_scales(weight, nearest, gram.diagonal().diag(), grid)  # planted
        assert output_error(weight, diagonal, gram).sum() > 1.01 * left.sum()


@pytest.mark.parametrize("grid", FOUR_BITS, ids=str)
def test_each_step_leaves_less_and_none_more_than_the_nearest_codes(grid: Grid) -> None:
    weight, gram = weights(700, 96), gram_of(correlated(300, 96))
    factor = inverse_factor(gram)
    nearest = output_error(weight, grid.encode(weight), gram)
    plain, whole = (output_error(weight, rule(weight, gram, factor, grid), gram) for rule in (gptq_alone, least_change))
    chosen = output_error(weight, gptq(weight, factor, grid, RANGES), gram)
    assert whole.sum() < chosen.sum() < 0.95 * plain.sum() < nearest.sum()
    assert (whole <= nearest).all()
    part = least_change(weight[512:], gram, factor, grid)  # rows are problems of their own
    torch.testing.assert_close(output_error(weight[512:], part, gram), whole[512:])


def test_an_output_that_the_rule_would_worsen_keeps_its_nearest_codes() -> None:
    """A weight that lies on the grid but for what GPTQ's damping and stored scales make of it."""
    grid = GGML["Q4_0"]
    weight = grid.encode(weights(64, 64)).weight()
    gram = gram_of(correlated(300, 64))
    made = least_change(weight, gram, inverse_factor(gram), grid)
    assert torch.equal(made.weight(), weight)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zeros_and_inputs_that_are_always_zero_are_harmless(grid: Grid) -> None:
    read, weight = correlated(100, 64), weights(8, 64)
    read[:, 5] = 0
    weight[3] = 0
    weight[4, 32:] = 0
    weight[5, :32] = 1.5
    gram = gram_of(read)
    made = least_change(weight, gram, inverse_factor(gram), grid)
    assert torch.isfinite(made.weight()).all() and torch.isfinite(made.scale).all()
    assert not made.weight()[3].any()


def test_the_error_of_an_output_is_that_of_its_values_on_the_rows() -> None:
    read, weight = correlated(50, 64), weights(8, 64)
    made = ASYMMETRIC.encode(weight)
    expected = (read @ (weight - made.weight()).T).square().sum(dim=0)
    torch.testing.assert_close(output_error(weight, made, read.T @ read), expected, rtol=1e-4, atol=1e-3)
    other = Fitted(made.scale * 1.01, made.zero)
    worse = replace(made, scale=ASYMMETRIC.stored(other).scale)
    assert output_error(weight, worse, read.T @ read).sum() > expected.sum()
