"""What does a target's quantiser make of a weight? The same codes as ONNX Runtime's, so that no export is needed.

Blocks of `block_size` weights along a row (a linear's inputs, an embedding's width) share a scale and a zero point.
Checked code for code against the weights in built bundles (tests/test_rounding.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch

from edgeft.change import blocks
from edgeft.errors import BadInput
from edgeft.headers import EMBEDDINGS, HEADS
from edgeft.target import Target, eight_bit_modules

POSITIONS = ("wpe.weight", "embed_positions.weight")  # tables of positions are added, not multiplied

# rtn: ONNX Runtime's neural_compressor port; mlas: its C++ kernel; gather: its rule for embedding tables
Method = Literal["rtn", "mlas", "gather"]


@dataclass(frozen=True)
class Rule:
    """How one tensor is rounded."""

    bits: Literal[4, 8]
    block_size: int
    symmetric: bool
    method: Method


@dataclass(frozen=True)
class Rounded:
    """Codes (rows, columns) and, per block, scale and zero point (rows, blocks): weight = (code - zero) * scale."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    block_size: int

    def weight(self) -> torch.Tensor:
        """What the runtime computes with, fp32."""
        rows, columns = self.codes.shape
        wide = torch.zeros(rows, self.scale.shape[1] * self.block_size, device=self.codes.device)
        wide[:, :columns] = self.codes
        grouped = wide.view(rows, -1, self.block_size)
        return grouped.sub_(self.zero[..., None]).mul_(self.scale[..., None]).view(rows, -1)[:, :columns]


def rule_of(
    name: str, shape: tuple[int, ...], target: Target, tied: bool, promoted: Collection[str] | None = None
) -> Rule | None:
    """How the export to `target` rounds this tensor of a checkpoint; None: kept in fp32.

    As `ort._quantisation` asks the builder: every matrix product, and tables that share the head's weights or that
    the target wants in 4 bits. `promoted` are the modules with 8 bits of a target that mixes them, by their names in
    the checkpoint. Raises BadInput for a target that rounds in another way than to nearest by ONNX Runtime.
    """
    mixed = (target.mixed_layers or target.eight_bit) and promoted is None
    if target.runtime != "ort-genai" or target.method != "rtn" or mixed or target.weight_bits == 16:
        problem = "rounds in a way that is not computed here"
        raise BadInput(f"target {target.name}", problem, "choose ort-int4, ort-int8 or ort-fp32")
    if target.weight_bits == 32 or len(shape) != 2 or name.endswith(POSITIONS):
        return None
    separate = not tied and target.embedding_bits == 4
    matmul: Method = "mlas" if separate else "rtn"
    if name.endswith(EMBEDDINGS) and not tied:
        return Rule(4, target.block_size, target.symmetric, "gather") if separate else None
    of_head = name.endswith(HEADS) or name.endswith(EMBEDDINGS)
    bits = target.head_bits if of_head else target.weight_bits
    if name.removesuffix(".weight") in (promoted or ()):
        bits = 8
    assert bits == 4 or bits == 8  # Target refuses a head of 32 bits on a body of fewer
    return Rule(bits, target.block_size, target.symmetric, matmul)


def round_(weight: torch.Tensor, rule: Rule) -> torch.Tensor:
    """The weight itself, each value replaced by what the runtime will compute with; by blocks of rows."""
    for part in blocks(tuple(weight.shape)):
        weight[part] = rounded(weight[part].float(), rule).weight().to(weight.dtype)
    return weight


@torch.no_grad()
def round_model(model: Any, target: Target) -> int:
    """Round every weight of a torch model as the export to `target` would; how many tensors that were.

    Its logits are then the artifact's, but for the 8-bit activations of accuracy level 4 and the order of sums.
    """
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    promoted = promoted_modules([name for name, _ in model.named_parameters()], target)
    count = 0
    for name, parameter in model.named_parameters():
        rule = rule_of(name, tuple(parameter.shape), target, tied, promoted)
        if rule is not None:
            round_(parameter.data, rule)
            count += 1
    return count


def promoted_modules(parameters: Collection[str], target: Target) -> set[str]:
    """Which modules of a checkpoint get 8 bits in a target that mixes them, by the names of its parameters."""
    inside: dict[str, tuple[str, str]] = {}
    for name in parameters:
        found = re.fullmatch(r".*layers\.(\d+)\..*?([a-z_]+_proj)\.weight", name)
        if found:
            inside[name.removesuffix(".weight")] = found[1], found[2]
    layers = 1 + max((int(layer) for layer, _ in inside.values()), default=-1)
    projections = tuple(dict.fromkeys(projection for _, projection in inside.values()))
    eight = set(eight_bit_modules(target, layers, projections))
    return {name for name, (layer, projection) in inside.items() if f"layers.{layer}.{projection}" in eight}


def rounded(weight: torch.Tensor, rule: Rule) -> Rounded:
    """The codes of a (rows, columns) weight under a rule. Half of the intermediate values are fp64, as in the rtn."""
    rows, columns = weight.shape
    count = -(-columns // rule.block_size)
    grouped = torch.zeros(rows, count * rule.block_size, device=weight.device)
    grouped[:, :columns] = weight
    grouped = grouped.view(rows, count, rule.block_size)
    codes, scale, zero = _RULES[rule.method](grouped, grouped.amin(dim=-1), grouped.amax(dim=-1), rule)
    return Rounded(codes.view(rows, -1)[:, :columns], scale.float(), zero, rule.block_size)


def _rtn(
    grouped: torch.Tensor, low: torch.Tensor, high: torch.Tensor, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Range from the smallest to the largest weight, which need not hold zero; halves to even; scale in fp64."""
    most = 2**rule.bits - 1
    if rule.symmetric:
        reach = torch.maximum(low.abs(), high.abs())
        scale = torch.where(reach > 0, (reach * 2.0).double() / most, 1.0)
        zero = torch.full_like(reach, 2 ** (rule.bits - 1))
    else:
        scale = torch.where(low != high, (high - low).double() / most, 1.0)
        zero = (-low.double() / scale).round().clamp(0, most).float()
    codes = (grouped.double() / scale[..., None] + zero[..., None]).round_().clamp_(0, most)
    return codes.float(), scale, zero


def _mlas(
    grouped: torch.Tensor, low: torch.Tensor, high: torch.Tensor, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Range that always holds zero; halves away from zero; fp32 throughout, times the scale's reciprocal."""
    most, middle = 2**rule.bits - 1, 2 ** (rule.bits - 1)
    if rule.symmetric:  # the extreme of larger size becomes -middle
        scale = torch.where(high.abs() > low.abs(), high, low) / -middle
        zero = torch.full_like(scale, middle)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / most
        zero = _half_up(torch.where(scale != 0, -low / scale, low)).clamp_(0, most)
    reciprocal = torch.where(scale != 0, 1 / scale, 0.0)
    codes = _half_up(grouped * reciprocal[..., None] + zero[..., None]).clamp_(0, most)
    return codes, scale, zero


def _gather(
    grouped: torch.Tensor, low: torch.Tensor, high: torch.Tensor, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As mlas, but halves to even and divided by the scale."""
    most, middle = 2**rule.bits - 1, 2 ** (rule.bits - 1)
    if rule.symmetric:
        scale = torch.where(high.abs() > low.abs(), high, low) / -middle
        zero = torch.full_like(scale, middle)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / most
        zero = torch.where(scale == 0, middle, -low / scale).round_().clamp_(0, most)
    shifted = torch.where(scale[..., None] == 0, middle, grouped / scale[..., None] + zero[..., None])
    return shifted.round_().clamp_(0, most), scale, zero


def _half_up(value: torch.Tensor) -> torch.Tensor:
    """Round halves away from zero, as C's roundf; torch rounds them to even."""
    return torch.where(value < 0, -(0.5 - value).floor_(), (value + 0.5).floor())


_RULES = {"rtn": _rtn, "mlas": _mlas, "gather": _gather}
