"""Where do bottleneck adapters hang on a model that trains, and how are they written?

On the attention's and the MLP's last projections (Houlsby's serial adapter, AdapterH elsewhere), on the MLP's alone, or
beside the whole MLP. PEFT has none of the kind: what is written has PEFT's names of files and modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from edgeft.engine import low_rank
from edgeft.engine.own_config import OwnConfig
from edgeft.errors import BadInput
from edgeft.models.bottleneck import hang
from edgeft.models.checkpoint import Checkpoint
from edgeft.models.parts import Parts
from edgeft.settings.job import Training
from edgeft.settings.tuners import AFTER, BESIDE


def after(model: nn.Module, parts: Parts, training: Training, stored: Checkpoint | None = None) -> None:
    """A bottleneck on the output of each of the plan's projections."""
    torch.manual_seed(training.seed)
    for name in low_rank.chosen_modules(parts, training):
        projection = model.get_submodule(name)
        hang(projection, AFTER, _outputs(projection), training.rank, _device(projection))


def beside(model: nn.Module, parts: Parts, training: Training, stored: Checkpoint | None = None) -> None:
    """A bottleneck beside the module that each of the plan's projections ends: from its input to its output."""
    torch.manual_seed(training.seed)
    for name in low_rank.chosen_modules(parts, training):
        projection, around = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        if around in parts.layers:
            problem = f"{name} is in the layer itself: there is no MLP that an adapter could lie beside"
            raise BadInput("adapter_at", problem, "use adapter_at=both or adapter_at=mlp")
        hang(around, BESIDE, _outputs(projection), training.rank, _device(projection))


def _outputs(projection: Any) -> int:
    conv1d = type(projection).__name__ == "Conv1D"
    return int(projection.nf if conv1d else projection.out_features)


def _device(projection: Any) -> torch.device:
    device: torch.device = projection.weight.device
    return device


@dataclass
class Config(OwnConfig):
    """adapter_config.json of bottlenecks."""

    r: int
    adapter_at: str
    target_modules: list[str]
    peft_type: str = "EDGEFT_BOTTLENECK"  # PEFT, which has none of the kind, refuses it by this name
    activation: str = "gelu"
    task_type: str = "CAUSAL_LM"
    base_model_name_or_path: str = field(default="")


def written(model: nn.Module, parts: Parts, training: Training) -> tuple[Any, dict[str, torch.Tensor]]:
    """What a saved adapter holds: its config, and every bottleneck's two matrices."""
    return Config(training.rank, training.adapter_at, list(training.target_modules)), low_rank.tensors_of(model)
