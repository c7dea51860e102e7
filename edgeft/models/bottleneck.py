"""What does an adapter compute that no weight can hold, and where is it kept? h + W_up GELU(W_down h).

A bottleneck (arXiv 1902.00751) hangs on a module as `adapter` and takes its output, or (arXiv 2110.04366) lies beside
it as `parallel_adapter` and takes its input. The base's weights keep their names; a merged folder has a file beside
them, and `load_plain` hangs on what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeft.errors import BadInput
from edgeft.settings.tuners import BESIDE, BOTTLENECKS, HANGING, NARROW, WIDE


class Bottleneck(nn.Module):
    """W_up GELU(W_down h), for h (..., width); W_up begins at zero, which is the base itself."""

    def __init__(self, width: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False, device=device)
        self.up = nn.Linear(rank, width, bias=False, device=device)
        nn.init.zeros_(self.up.weight)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        widened: torch.Tensor = self.up(nn.functional.gelu(self.down(h)))
        return widened


@dataclass(eq=False)
class Hung:
    """Takes the place of a module's forward pass: its output, and what the bottleneck makes of that or of its input."""

    module: Any
    where: str
    own: Callable[..., torch.Tensor]

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.own(x, *args, **kwargs)
        more: torch.Tensor = getattr(self.module, self.where)(x if self.where == BESIDE else result)
        return result + more


def hang(module: Any, where: str, width: int, rank: int, device: torch.device) -> None:
    """Hang a new bottleneck on a module, in fp32."""
    module.add_module(where, Bottleneck(width, rank, device))
    module.forward = Hung(module, where, module.forward)


def hangs_on(module: nn.Module) -> bool:
    """Whether a bottleneck hangs on a module."""
    return any(where in module._modules for where in BOTTLENECKS)


def scale(module: Any, share: float) -> None:
    """Let a module compute with a share of what its bottleneck adds: exactly that of W_up."""
    for where in BOTTLENECKS:
        if where in module._modules:
            module.get_submodule(where).up.weight.data.mul_(share)


def places(names: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Tensors' names by (module, where they hang on it) and part. Raises ValueError for one that is no bottleneck's."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name in names:
        match = HANGING.fullmatch(name)
        if match is None:
            raise ValueError(name)
        found.setdefault((match["module"], match["where"]), {})[match["part"]] = name
    return found


def hang_kept(model: nn.Module, tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Hang on a model what a folder holds beside its weights in `file`. Raises BadInput for what does not fit."""
    try:
        for (name, where), parts in places(tensors).items():
            down, up = tensors[parts[NARROW]], tensors[parts[WIDE]]
            module = model.get_submodule(name)
            hang(module, where, down.shape[1], down.shape[0], torch.device("cpu"))
            module.get_submodule(where).requires_grad_(False).load_state_dict({NARROW: down, WIDE: up})
    except (AttributeError, KeyError, ValueError, RuntimeError) as problem:
        raise BadInput(file, f"does not fit the model beside it: {problem}", "run edgeft merge again") from None
