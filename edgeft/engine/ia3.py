"""How does a projection compute that is scaled element by element? IA3 (arXiv 2205.05638): l * W x, or W (l * x).

PEFT's tensors under PEFT's names: a number for each output of keys and values, and for each input of what leads out of
the MLP. All begin at one, which is the base itself.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeft.engine import low_rank
from edgeft.models.checkpoint import Checkpoint
from edgeft.models.parts import Parts
from edgeft.settings.job import Training
from edgeft.settings.tuners import ELEMENTS


def inject(model: nn.Module, parts: Parts, training: Training, stored: Checkpoint | None = None) -> None:
    """Scales of one, in fp32."""
    from peft import inject_adapter_in_model
    from peft.tuners.ia3 import IA3Layer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about Conv1D's transposed weights, which it handles
        inject_adapter_in_model(_config(model, parts, training), model)
    for layer in model.modules():
        if isinstance(layer, IA3Layer):
            of_layer: Any = layer
            of_layer.ia3_l["default"].data = of_layer.ia3_l["default"].data.float()
            of_layer.forward = Scaled(layer)


def _config(model: nn.Module, parts: Parts, training: Training) -> Any:
    from peft import IA3Config

    chosen = low_rank.chosen_modules(parts, training)
    into = tuple(f".{target}" for target in training.scaled_inputs)
    return IA3Config(
        target_modules=chosen,
        feedforward_modules=[name for name in chosen if name.endswith(into)],
        fan_in_fan_out=low_rank.in_conv1d(model, chosen),
        task_type="CAUSAL_LM",
    )


@dataclass(eq=False)
class Scaled:
    """Takes the place of an adapted projection's forward pass."""

    layer: Any

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        scales = self.layer.ia3_l["default"].flatten()
        if self.layer.is_feedforward:
            x = (x * scales).to(x.dtype)
        result: torch.Tensor = self.layer.base_layer(x)
        return result if self.layer.is_feedforward else (result * scales).to(result.dtype)


def written(model: nn.Module, parts: Parts, training: Training) -> tuple[Any, dict[str, torch.Tensor]]:
    """What a saved adapter holds: PEFT's config, and the scales."""
    return _config(model, parts, training), low_rank.tensors_of(model)


def scale(layer: Any, share: float) -> None:
    """Let an adapted projection compute with a share of what is changed so far."""
    layer.ia3_l["default"].data.sub_(1).mul_(share).add_(1)


def squared_change(layer: Any, weight: torch.Tensor, parts: dict[str, torch.Tensor], scale: float) -> float:
    """||W' - W||^2 of the stored weight of a projection."""
    transposed = type(layer.base_layer).__name__ == "Conv1D"
    change = parts[ELEMENTS] - 1
    return float((weight * (change.T if transposed else change)).square().sum())
