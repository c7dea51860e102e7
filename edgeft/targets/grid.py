"""Which values can a block of weights take in a runtime, and which of them does a weight get?

A grid is what a runtime's kernels read: blocks of weights along a row (a linear's inputs, an embedding's width), each
with a scale and, by kind, an integer zero point or a smallest value. Every rounding in edgeft goes through here: to
nearest, calibrated, simulated. The codes are those of the runtimes' own quantisers, one for one
(tests/targets/test_grid.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from edgeft.targets.kinds import GGML_KINDS, Method


class Fitted(NamedTuple):
    """Of each block, all of one shape: value = (code - zero) * scale + least. None: no block has a least."""

    scale: torch.Tensor
    zero: torch.Tensor
    least: torch.Tensor | None = None

    def wide(self) -> Fitted:
        """With an axis for the weights of a block."""
        return Fitted(*(None if part is None else part[..., None] for part in self))  # type: ignore[arg-type]

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What the runtime computes with, fp32; `codes` of the same shape is overwritten."""
        values = codes.sub_(self.zero).mul_(self.scale)
        return values if self.least is None else values.add_(self.least)


@dataclass(frozen=True)
class Encoded:
    """A weight's codes (rows, columns) and what its blocks were given (rows, blocks)."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    block_size: int
    bits: Literal[4, 5, 8]
    least: torch.Tensor | None = None

    def rows(self, which: Any) -> Encoded:
        """Some outputs, in any order."""
        least = None if self.least is None else self.least[which]
        return replace(self, codes=self.codes[which], scale=self.scale[which], zero=self.zero[which], least=least)

    def weight(self) -> torch.Tensor:
        """What the runtime computes with, fp32."""
        rows, columns = self.codes.shape
        wide = torch.zeros(rows, self.scale.shape[1] * self.block_size, device=self.codes.device)
        wide[:, :columns] = self.codes
        fitted = Fitted(self.scale, self.zero, self.least).wide()
        return fitted.values(wide.view(rows, -1, self.block_size)).view(rows, -1)[:, :columns]


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The outputs of several weights of one kind, one after the other."""
    least = None if parts[0].least is None else torch.cat([part.least for part in parts if part.least is not None])
    codes, scale, zero = (torch.cat([getattr(part, of) for part in parts]) for of in ("codes", "scale", "zero"))
    return replace(parts[0], codes=codes, scale=scale, zero=zero, least=least)


@dataclass(frozen=True)
class Grid:
    """How one tensor is rounded: what a block holds besides its codes, and the rule that fits it."""

    bits: Literal[4, 5, 8]
    block_size: int
    symmetric: bool
    method: Method

    def fit(self, blocks: torch.Tensor) -> Fitted:
        """Scale, zero point and least value for each of `blocks` (..., block_size), in the fitting rule's precision."""
        return _RULES[self.method].fit(blocks, self)

    def stored(self, fitted: Fitted) -> Fitted:
        """The same as a file holds it, in fp32: scales and least values lose what the file's type cannot hold."""
        kept = _RULES[self.method].stored
        scale, zero, least = fitted
        return Fitted(scale.to(kept).float(), zero.float(), None if least is None else least.to(kept).float())

    def codes(self, values: torch.Tensor, fitted: Fitted) -> torch.Tensor:
        """The code of each value, as floats of whole numbers; `fitted` of a shape that broadcasts to theirs."""
        return _RULES[self.method].code(values, fitted, self)

    def encode(self, weight: torch.Tensor) -> Encoded:
        """The codes of a (rows, columns) weight to nearest; a last block that is not full counts zeros too."""
        rows, columns = weight.shape
        count = -(-columns // self.block_size)
        grouped = torch.zeros(rows, count * self.block_size, device=weight.device)
        grouped[:, :columns] = weight
        grouped = grouped.view(rows, count, self.block_size)
        fitted = self.fit(grouped)
        codes = self.codes(grouped, fitted.wide()).view(rows, -1)[:, :columns]
        scale, zero, least = self.stored(fitted)
        return Encoded(codes, scale, zero, self.block_size, self.bits, least)

    def in_eight_bits(self) -> Grid:
        """The grid of the same runtime for a tensor that is promoted."""
        return replace(self, bits=8, method="q8_0" if self.method in ("q_0", "q_1") else self.method)


class _Rule(NamedTuple):
    fit: Callable[[torch.Tensor, Grid], Fitted]
    code: Callable[[torch.Tensor, Fitted, Grid], torch.Tensor]
    stored: torch.dtype  # of a block's scale in the file


def _rtn_fit(blocks: torch.Tensor, grid: Grid) -> Fitted:
    """Range from the smallest to the largest weight, which need not hold zero; the scale is made in fp64."""
    low, high, most = blocks.amin(dim=-1), blocks.amax(dim=-1), 2**grid.bits - 1
    if grid.symmetric:
        reach = torch.maximum(low.abs(), high.abs())
        scale = torch.where(reach > 0, (reach * 2.0).double() / most, 1.0)
        return Fitted(scale, torch.full_like(reach, 2 ** (grid.bits - 1)))
    scale = torch.where(low != high, (high - low).double() / most, 1.0)
    return Fitted(scale, (-low.double() / scale).round().clamp(0, most).float())


def _rtn_code(values: torch.Tensor, fitted: Fitted, grid: Grid) -> torch.Tensor:
    """Halves to even, in fp64."""
    return (values.double() / fitted.scale + fitted.zero).round_().clamp_(0, 2**grid.bits - 1).float()


def _extreme(blocks: torch.Tensor) -> torch.Tensor:
    """The value of largest size, with its sign."""
    low, high = blocks.amin(dim=-1), blocks.amax(dim=-1)
    return torch.where(high.abs() > low.abs(), high, low)


def _with_zero(blocks: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(lowest, scale) of a range that always holds zero."""
    low, high = blocks.amin(dim=-1).clamp(max=0), blocks.amax(dim=-1).clamp(min=0)
    return low, (high - low) / most


def _mlas_fit(blocks: torch.Tensor, grid: Grid) -> Fitted:
    """Range that always holds zero, fp32; symmetric: the extreme of larger size becomes -middle."""
    most, middle = 2**grid.bits - 1, 2 ** (grid.bits - 1)
    if grid.symmetric:
        scale = _extreme(blocks) / -middle
        return Fitted(scale, torch.full_like(scale, middle))
    low, scale = _with_zero(blocks, most)
    return Fitted(scale, _half_up(torch.where(scale != 0, -low / scale, low)).clamp_(0, most))


def _mlas_code(values: torch.Tensor, fitted: Fitted, grid: Grid) -> torch.Tensor:
    """Halves away from zero, times the scale's reciprocal."""
    return _half_up(values * _reciprocal(fitted.scale) + fitted.zero).clamp_(0, 2**grid.bits - 1)


def _gather_fit(blocks: torch.Tensor, grid: Grid) -> Fitted:
    """As mlas, but halves to even."""
    most, middle = 2**grid.bits - 1, 2 ** (grid.bits - 1)
    if grid.symmetric:
        return _mlas_fit(blocks, grid)
    low, scale = _with_zero(blocks, most)
    return Fitted(scale, torch.where(scale == 0, middle, -low / scale).round_().clamp_(0, most))


def _gather_code(values: torch.Tensor, fitted: Fitted, grid: Grid) -> torch.Tensor:
    """Halves to even, divided by the scale."""
    shifted = torch.where(fitted.scale == 0, 2 ** (grid.bits - 1), values / fitted.scale + fitted.zero)
    return shifted.round_().clamp_(0, 2**grid.bits - 1)


def _q_0_fit(blocks: torch.Tensor, grid: Grid) -> Fitted:
    """The first value of largest size gets code 0, -middle."""
    middle = 2 ** (grid.bits - 1)
    extreme = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))[..., 0]
    return Fitted(extreme / -middle, torch.full_like(extreme, middle))


def _q_0_code(values: torch.Tensor, fitted: Fitted, grid: Grid) -> torch.Tensor:
    """Halves up."""
    return (values * _reciprocal(fitted.scale) + (fitted.zero + 0.5)).trunc_().clamp_(0, 2**grid.bits - 1)


def _q_1_fit(blocks: torch.Tensor, grid: Grid) -> Fitted:
    """From the smallest to the largest weight, which need not hold zero."""
    low = blocks.amin(dim=-1)
    return Fitted((blocks.amax(dim=-1) - low) / (2**grid.bits - 1), torch.zeros_like(low), low)


def _q_1_code(values: torch.Tensor, fitted: Fitted, grid: Grid) -> torch.Tensor:
    """Halves up."""
    assert fitted.least is not None
    return ((values - fitted.least) * _reciprocal(fitted.scale) + 0.5).trunc_().clamp_(0, 2**grid.bits - 1)


def _q8_0_fit(blocks: torch.Tensor, grid: Grid) -> Fitted:
    """The largest size becomes 127; codes have a sign."""
    scale = blocks.abs().amax(dim=-1) / 127
    return Fitted(scale, torch.zeros_like(scale))


def _q8_0_code(values: torch.Tensor, fitted: Fitted, grid: Grid) -> torch.Tensor:
    return _half_up(values * _reciprocal(fitted.scale)).clamp_(-128, 127)


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale != 0, 1 / scale, 0.0)


def _half_up(value: torch.Tensor) -> torch.Tensor:
    """Round halves away from zero, as C's roundf; torch rounds them to even."""
    return torch.where(value < 0, -(0.5 - value).floor_(), (value + 0.5).floor())


_RULES: dict[Method, _Rule] = {
    "rtn": _Rule(_rtn_fit, _rtn_code, torch.float32),
    "mlas": _Rule(_mlas_fit, _mlas_code, torch.float32),
    "gather": _Rule(_gather_fit, _gather_code, torch.float32),
    "q_0": _Rule(_q_0_fit, _q_0_code, torch.float16),
    "q_1": _Rule(_q_1_fit, _q_1_code, torch.float16),
    "q8_0": _Rule(_q8_0_fit, _q8_0_code, torch.float16),
}

GGML = {name: Grid(*kind) for name, kind in GGML_KINDS.items()}
