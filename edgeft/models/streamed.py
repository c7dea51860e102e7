"""How does a model compute in fp32 whose decoder layers stay in their files?

Its weights are pages of the checkpoint, in the files' dtype. A layer gets fp32 memory when it computes and gives it
back; what is to happen to a weight (rounding, a change that training made) happens each time. Results are those of the
whole model in fp32, bit for bit. It costs a cast of every weight for each pass, and reading them where the system has
taken their pages back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeft.models.checkpoint import load_plain
from edgeft.models.parts import find_parts
from edgeft.models.spec import read_model_spec

Alteration = Callable[[torch.Tensor], object]  # of an fp32 weight, in place
Load = Callable[[Path], Any]
_STREAM = "edgeft_stream"


def load_in_files(folder: Path) -> Any:
    """A checkpoint's model in the dtype of its files, whose pages its weights stay; in fp32 where one table is rounded.

    Tables that a model computes for itself (sines, slopes) are then of that dtype too, in a few families.
    """
    dtype = getattr(torch, read_model_spec(str(folder)).dtype)
    model = load_plain(folder, dtype)
    rounded = any(each.is_floating_point() and each.dtype != torch.float32 for each in model.buffers())
    return load_plain(folder) if rounded else model


def hold(parameters: Iterable[Any]) -> None:
    """Give weights fp32 memory of their own."""
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.float32, copy=True)


def load_streamed(folder: Path) -> Any:
    """A causal LM that computes in fp32 on the CPU with one decoder layer in memory; embedding rows as they are asked.

    For passes without gradients. Alteration its weights through `alter` alone. Raises BadInput as `load_plain`.
    """
    model = load_in_files(folder)
    setattr(model, _STREAM, _Stream(model))
    return model


@torch.no_grad()
def alter(model: Any, name: str, change: Alteration) -> None:
    """Change a weight by its name in the model: now, or, where it stays in its file, whenever it is used."""
    stream, parameter = getattr(model, _STREAM, None), model.get_parameter(name)
    if stream is None or id(parameter) not in stream.changes:
        change(parameter.data)
    else:
        stream.changes[id(parameter)].append(change)


class _Stream:
    """Which weights of a model stay in their files, and what is done to each when it is used."""

    def __init__(self, model: Any) -> None:
        parts = find_parts(model)
        self.changes: dict[int, list[Alteration]] = {}
        self.files: dict[int, torch.Tensor] = {}  # of weights in use
        for layer in parts.layers:
            weights = list(layer.parameters())
            self.changes |= {id(each): [] for each in weights}
            layer.register_forward_pre_hook(lambda *_, weights=weights: self._enter(weights))
            layer.register_forward_hook(lambda *_, weights=weights: self._leave(weights), always_call=True)
        table = parts.embedding
        if type(table) is nn.Embedding and not parts.tied:
            self.changes[id(table.weight)] = []
            table.register_forward_hook(lambda _, __, rows: self._rows(table.weight, rows))
        hold(each for each in model.parameters() if id(each) not in self.changes)

    @torch.no_grad()
    def _enter(self, weights: Iterable[Any]) -> None:
        for weight in weights:
            changes = self.changes[id(weight)]
            if changes or weight.dtype != torch.float32:
                self.files[id(weight)] = weight.data
                hold([weight])
                for change in changes:
                    change(weight.data)

    def _leave(self, weights: Iterable[Any]) -> None:
        for weight in weights:
            if id(weight) in self.files:
                weight.data = self.files.pop(id(weight))

    @torch.no_grad()
    def _rows(self, table: Any, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding in fp32, each changed as its table would be: blocks lie along a row."""
        found = rows.to(torch.float32, copy=True)
        for change in self.changes[id(table)]:
            change(found.view(-1, found.shape[-1]))
        return found
