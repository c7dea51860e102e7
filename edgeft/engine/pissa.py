"""How does LoRA begin with the largest singular values of a weight? PiSSA (arXiv 2404.02948): W + s (B A - B0 A0).

s B0 A0 is W cut to the rank, and B A begins there: what trains is what matters most of W. The rest of W is not written
down: B0 A0 is taken off each time, which leaves a base of any precision as it is, and the start is the base itself.
What is kept is LoRA of twice the rank, [B, -B0] [A; A0].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeft.engine import low_rank
from edgeft.models.checkpoint import Checkpoint
from edgeft.models.parts import Parts
from edgeft.settings.job import Training
from edgeft.settings.tuners import SAVED, SCALES

ITERATIONS = 16  # of a random projection towards the largest singular values: PEFT's own advice for speed


def inject(model: nn.Module, parts: Parts, training: Training, stored: Checkpoint | None = None) -> None:
    """Factors that begin as the largest singular values of the base, of `stored` where the model has it in 4 bits."""
    low_rank.inject(model, parts, training)
    names = {id(layer): name for name, layer in model.named_modules()}
    for layer in low_rank.layers(model):
        _begin(layer, names[id(layer)], training, stored)


def _begin(layer: Any, name: str, training: Training, stored: Checkpoint | None) -> None:
    base, down, up = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if not down.is_meta:
        weight = low_rank.base_weight(name, layer, stored).to(down.device).float()
        left, right = largest(weight.T if type(base).__name__ == "Conv1D" else weight, training.rank)
        scale = layer.scaling["default"] ** 0.5
        down.data, up.data = (right / scale).contiguous(), (left / scale).contiguous()
    layer.register_buffer("first_down", down.detach().clone(), persistent=False)
    layer.register_buffer("minus_first_up", -up.detach(), persistent=False)
    layer.forward = Less(layer)


def largest(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(U sqrt(S), sqrt(S) V^T) of the largest singular values of a weight, outputs x inputs."""
    u, s, v = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=ITERATIONS)
    roots = s[:rank].sqrt()
    return u[:, :rank] * roots, roots[:, None] * v[:, :rank].T


@dataclass(eq=False)
class Less:
    """Takes the place of an adapted projection's forward pass: W x + s (B A x - B0 A0 x)."""

    layer: Any

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer = self.layer
        result: torch.Tensor = layer.base_layer(x)
        scale: float = layer.scaling["default"]
        return result + self._change(x) * scale

    def _change(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        product: torch.Tensor = layer.lora_B["default"](layer.lora_A["default"](x))
        return product + nn.functional.linear(nn.functional.linear(x, layer.first_down), layer.minus_first_up)


def written(model: nn.Module, parts: Parts, training: Training) -> tuple[Any, dict[str, torch.Tensor]]:
    """LoRA of twice the rank, for PEFT and all that follows."""
    tensors = {}
    names = {id(layer): name for name, layer in model.named_modules()}
    for layer in low_rank.layers(model):
        name = f"{SAVED}{names[id(layer)]}"
        down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        tensors[f"{name}.lora_A.weight"] = torch.cat([down, layer.first_down]).cpu()
        tensors[f"{name}.lora_B.weight"] = torch.cat([up, layer.minus_first_up], dim=1).cpu()
    return low_rank.config(model, parts, as_written(training)), tensors


def as_written(training: Training) -> Training:
    """LoRA of twice the rank and of the same scale."""
    scale, rank = SCALES[training.lora_scale], training.rank
    alpha = training.lora_alpha * scale(1.0, rank) / scale(1.0, 2 * rank)
    return training.model_copy(update={"rank": 2 * rank, "lora_alpha": alpha, "init": "random"})
