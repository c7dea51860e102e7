"""How do rows of training data go through a model of which one layer is in memory?

Its weights are pages of the checkpoint's files. A layer gets fp32 memory, is changed as the walk says, sees what the
layer before it gave for each batch of rows, and gives its memory back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeft.data.samples import Sample
from edgeft.machines import meter
from edgeft.memory.stages import CALIBRATION_BATCH, CALIBRATION_ROWS, CALIBRATION_TOKENS
from edgeft.models.cache_names import NAMES
from edgeft.models.parts import find_parts
from edgeft.models.streamed import hold, load_in_files


class LayerWalk:
    """A model in its files, and what goes into the layer that comes next, for each batch of rows."""

    def __init__(self, merged: Path) -> None:
        self.model = load_in_files(merged)
        parts = find_parts(self.model)
        self.body, self.layers = parts.body, list(parts.layers)
        self.last = {id(each): index for index, layer in enumerate(self.layers) for each in layer.parameters()}
        self.names = {id(parameter): name for name, parameter in self.model.named_parameters()}

    def begin(self, rows: Sequence[Sample], change: Callable[[str, torch.Tensor], object]) -> None:
        """Send the rows up to the first layer; `change` is given the name and fp32 values of each weight on the way."""
        before = {id(each): each for each in self.body.parameters() if id(each) not in self.last}
        hold(before.values())
        for key, parameter in before.items():
            if key in self.names:
                change(self.names[key], parameter.data)
        self.batches = padded(rows)
        self.states, self.given = entries(self.body, self.layers, self.batches)
        drop(before.values())

    def enter(self, index: int) -> None:
        """Give a layer's weights memory."""
        hold(self.layers[index].parameters())

    @torch.no_grad()
    def leave(
        self, index: int, more: Mapping[str, Any] | None = None, after: Callable[[int], object] = lambda batch: None
    ) -> None:
        """Send every batch through a layer, with `more` arguments, and take its memory back; `after` hears of each."""
        layer = self.layers[index]
        for at, state in enumerate(self.states):
            self.states[at] = output(layer(state, **self.given[index][at], **(more or {})))
            after(at)
            self.given[index][at] = {}
        drop(each for each in layer.parameters() if self.last[id(each)] == index)
        meter.trim()  # each layer's working memory would lie beside what is left of the last one's


def chosen_rows(samples: Sequence[Sample], most_tokens: int | None = None) -> list[Sample]:
    """The first rows, CALIBRATION_ROWS at most, that together have so many tokens at most, but one at least."""
    found: list[Sample] = []
    left = CALIBRATION_TOKENS if most_tokens is None else most_tokens
    for sample in samples[:CALIBRATION_ROWS]:
        left -= len(sample)
        if found and left < 0:
            break
        found.append(sample)
    return found


def drop(parameters: Iterable[Any]) -> None:
    """Take weights' memory back."""
    for parameter in parameters:
        parameter.data = torch.empty(0)


@dataclass(frozen=True)
class Padded:
    """Rows of one forward pass, padded on the right, where a causal model looks from nowhere; which tokens are real."""

    ids: torch.Tensor
    real: torch.Tensor  # of ids as one row


def padded(rows: Sequence[Sample]) -> list[Padded]:
    groups: list[list[Sample]] = []
    for row in sorted(rows, key=lambda row: len(row)):
        if not groups or len(row) * (len(groups[-1]) + 1) > CALIBRATION_BATCH:
            groups.append([])
        groups[-1].append(row)
    found = []
    for group in groups:
        width = len(group[-1])
        ids = torch.tensor([[*row.ids, *[0] * (width - len(row))] for row in group])
        real = torch.tensor([[at < len(row) for at in range(width)] for row in group])
        found.append(Padded(ids, real.reshape(-1)))
    return found


@torch.no_grad()
def entries(
    body: Any, layers: Sequence[Any], batches: Sequence[Padded]
) -> tuple[list[torch.Tensor], list[list[dict[str, Any]]]]:
    """(what goes into the first layer, by batch; what else each layer is given, by layer and batch).

    From a pass through the model with layers that do nothing.
    """
    states: list[torch.Tensor] = []
    given: list[list[dict[str, Any]]] = [[] for _ in layers]

    def record(index: int, arguments: Any, named: dict[str, Any]) -> None:
        if index == 0:
            states.append(arguments[0])
        given[index].append({name: value for name, value in named.items() if name not in NAMES})

    hooks = [
        layer.register_forward_pre_hook(lambda _, a, k, index=index: record(index, a, k), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    for layer in layers:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    for batch in batches:
        body(input_ids=batch.ids, use_cache=False)
    for layer, hook in zip(layers, hooks, strict=True):
        del layer.forward
        hook.remove()
    return states, given


def output(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]
