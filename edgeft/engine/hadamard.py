"""How does attention's output train element by element? The Hadamard adapter (arXiv 2407.11033): w * h + b.

It hangs on the output projection, whose rows and bias hold it after a merge. PEFT has none of the kind: what is written
has PEFT's names of files and modules. It begins with ones and zeros, which is the base itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from edgeft.engine import low_rank
from edgeft.engine.own_config import OwnConfig
from edgeft.models.checkpoint import Checkpoint
from edgeft.models.parts import Parts
from edgeft.settings.job import Training
from edgeft.settings.tuners import GAIN, HADAMARD


class Hadamard(nn.Module):
    """A factor and a number to add for each of so many outputs, in fp32."""

    def __init__(self, outputs: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(outputs, device=device))
        self.bias = nn.Parameter(torch.zeros(outputs, device=device))


@dataclass(eq=False)
class Scaled:
    """Takes the place of a projection's forward pass."""

    module: Any
    own: Callable[..., torch.Tensor]

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result, adapter = self.own(x, *args, **kwargs), self.module.hadamard
        tuned: torch.Tensor = result * adapter.weight + adapter.bias
        return tuned.to(result.dtype)


def inject(model: nn.Module, parts: Parts, training: Training, stored: Checkpoint | None = None) -> None:
    """Ones and zeros on the output of each of the plan's projections."""
    for name in low_rank.chosen_modules(parts, training):
        projection: Any = model.get_submodule(name)
        conv1d = type(projection).__name__ == "Conv1D"
        outputs = projection.nf if conv1d else projection.out_features
        projection.add_module(HADAMARD, Hadamard(outputs, projection.weight.device))
        projection.forward = Scaled(projection, projection.forward)


@dataclass
class Config(OwnConfig):
    """adapter_config.json of Hadamard adapters."""

    target_modules: list[str]
    peft_type: str = "EDGEFT_HADAMARD"  # PEFT, which has none of the kind, refuses it by this name
    task_type: str = "CAUSAL_LM"
    base_model_name_or_path: str = field(default="")


def written(model: nn.Module, parts: Parts, training: Training) -> tuple[Any, dict[str, torch.Tensor]]:
    """What a saved adapter holds: its config, and two vectors for each projection."""
    return Config(list(training.target_modules)), low_rank.tensors_of(model)


def scale(module: Any, share: float) -> None:
    """Let a projection compute with a share of what is changed so far."""
    module.hadamard.weight.data.sub_(1).mul_(share).add_(1)
    module.hadamard.bias.data.mul_(share)


def squared_change(module: Any, weight: torch.Tensor, parts: dict[str, torch.Tensor], scale: float) -> float:
    """||W' - W||^2 of the stored weight of a projection."""
    transposed = type(module).__name__ == "Conv1D"
    change = parts[GAIN] - 1
    return float((weight * (change if transposed else change[:, None])).square().sum())
