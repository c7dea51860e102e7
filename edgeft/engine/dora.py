"""How does a projection compute whose rows have lengths of their own? DoRA: m (W + s B A) / ||W + s B A||.

Of arXiv 2402.09353, with PEFT's tensors under PEFT's names. PEFT's own forward pass multiplies an identity matrix
through both factors and takes norms of whole weights in the compute dtype. Here the norm of a row w + s b A is
sqrt(||w||^2 + 2 s b (A w) + s^2 b (A A^T) b), in fp32: products with A alone. As in the paper it takes no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeft.engine import low_rank
from edgeft.engine.adapted_linear import dense_weight
from edgeft.models.checkpoint import Checkpoint
from edgeft.models.folding import folded, lengths
from edgeft.models.parts import Parts
from edgeft.settings.job import Training


class Lengths(nn.Module):
    """The length of each row, under the name that PEFT gives it."""

    def __init__(self, lengths: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(lengths)


def inject(model: nn.Module, parts: Parts, training: Training, stored: Checkpoint | None = None) -> None:
    """Factors as LoRA's, and the lengths of the base's rows, which train too; so the start is the base itself.

    `stored` holds the base's weights where the model has them rounded, to 4 bits: the lengths are those of what a merge
    will change.
    """
    low_rank.inject(model, parts, training)
    adapted = {id(layer) for layer in low_rank.layers(model)}
    for name, layer in model.named_modules():
        if id(layer) in adapted:
            _give_lengths(name, layer, stored)


def _give_lengths(name: str, layer: Any, stored: Checkpoint | None) -> None:
    if layer.base_layer.weight.is_meta:
        found = torch.empty(layer.out_features, device="meta")
    else:
        found = lengths(low_rank.base_weight(name, layer, stored), _transposed(layer.base_layer))
    layer.register_buffer("squared_lengths", found.square(), persistent=False)
    layer.lora_magnitude_vector["default"] = Lengths(found)
    layer.forward = Dora(layer)


def _transposed(base: nn.Module) -> bool:
    """Whether a module holds its matrix as inputs x outputs, as GPT-2's does."""
    return type(base).__name__ == "Conv1D"


@dataclass(eq=False)
class Dora:
    """Takes the place of an adapted projection's forward pass; `share` of the change, 1 while it trains."""

    layer: Any
    share: float = 1.0

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer, bias = self.layer, self.layer.base_layer.bias
        gain = layer.lora_magnitude_vector["default"].weight / self.norms()
        result: torch.Tensor = layer.base_layer(x)
        product = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        tuned = (result + product) * gain
        del product
        if bias is not None:
            tuned = tuned + (1 - gain) * bias
        tuned = tuned.to(result.dtype)
        return tuned if self.share == 1.0 else torch.lerp(result, tuned, self.share)

    @torch.no_grad()
    def norms(self) -> torch.Tensor:
        """||W + s B A||, of each row."""
        layer, scale = self.layer, self.layer.scaling["default"]
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.autocast(down.device.type, enabled=False):
            crossed = torch.addmm(_through(layer.base_layer, down).T, up, down @ down.T, beta=2, alpha=scale)
            squares: torch.Tensor = (crossed * up).sum(1).mul_(scale).add_(layer.squared_lengths)
            return squares.clamp_min_(0).sqrt_()


def _through(base: Any, rows: torch.Tensor) -> torch.Tensor:
    """rows W^T in fp32, without the bias."""
    if type(base).__name__ == "Linear4bit":
        from bitsandbytes.autograd._functions import matmul_4bit

        rows = rows.to(base.compute_dtype)
        found: torch.Tensor = matmul_4bit(rows, base.weight, quant_state=base.weight.quant_state)
        return found.float()
    rows = rows.to(base.weight.dtype)
    return nn.functional.linear(rows, dense_weight(base, rows.dtype)).float()


def scale(layer: Any, share: float) -> None:
    """Let an adapted projection compute with a share of its whole change."""
    layer.forward.share *= share


def squared_change(layer: Any, weight: torch.Tensor, parts: dict[str, torch.Tensor], scale: float) -> float:
    """||W' - W||^2 of the stored weight of a projection."""
    left, right = parts["lora_B"], parts["lora_A"]
    if transposed := _transposed(layer.base_layer):
        left, right = right.T, left.T
    tuned = folded(weight, left, right, scale)
    gain = parts["lora_magnitude_vector"] / lengths(tuned, transposed)
    return float(torch.dist(tuned.mul_(gain if transposed else gain[:, None]), weight)) ** 2
