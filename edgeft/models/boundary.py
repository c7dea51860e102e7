"""How does a model go on from its lower layers' outputs, which are kept elsewhere, in place of computing them?

The model's own code runs as ever, with its masks, positions and what stands between embedding and layers. While states
are given, the embedding and the layers below the boundary hand them on; the first layer above reads them. Nothing of
what lies below is then used, and its weights can go.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from edgeft.data.samples import Sample
from edgeft.machines import pages
from edgeft.models.parts import Parts

States = Callable[[Sequence[Sample]], torch.Tensor]  # (B, S, h) of samples, padded on the right


class Weight(NamedTuple):
    """A weight that was let go: whose it is, its name in the model, and what it was."""

    module: Any
    key: str
    name: str
    dtype: torch.dtype
    packed: bool  # a matrix in 4 bits


class _Reached(Exception):
    """The layers below the boundary have run; nothing above need."""


class Boundary:
    """The place between a model's lowest `cut` decoder layers and those above."""

    def __init__(self, parts: Parts, cut: int) -> None:
        self.cut, self.body, self.embedding = cut, parts.body, parts.embedding
        self.lower = list(parts.layers)[:cut]
        self.tied = parts.tied
        self.dropped: list[Weight] = []
        self._given: torch.Tensor | None = None
        self._reached: torch.Tensor | None = None
        self._seeking = self._in_tuples = False
        self._width = max(weight.shape[-1] for weight in parts.embedding.parameters())
        self.embedding.forward = self._embedding(self.embedding.forward)  # type: ignore[method-assign]
        for number, layer in enumerate(self.lower, 1):
            layer.forward = self._layer(layer.forward, number == cut)  # type: ignore[method-assign]

    def _embedding(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            given = self._given
            if given is None:
                return forward(*args, **kwargs)
            # a projection may stand between an embedding of another width and the layers
            return given if given.shape[-1] == self._width else given.new_zeros(*given.shape[:2], self._width)

        return run

    def _layer(self, forward: Callable[..., Any], last: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._given is not None:
                return (self._given,) if self._in_tuples else self._given
            result = forward(*args, **kwargs)
            self._in_tuples = isinstance(result, tuple)
            if last and self._seeking:
                self._reached = result[0] if isinstance(result, tuple) else result
                raise _Reached
            return result

        return run

    @torch.no_grad()
    def reach(self, ids: torch.Tensor) -> torch.Tensor:
        """The outputs (B, S, h) of the layers below for ids (B, S); no layer above runs."""
        self._seeking = True
        with contextlib.suppress(_Reached):
            self.body(input_ids=ids, use_cache=False)
        states, self._reached, self._seeking = self._reached, None, False
        if states is None:
            raise RuntimeError(f"{type(self.body).__name__} ran none of its lowest {self.cut} layers")
        return states

    @contextlib.contextmanager
    def given(self, states: torch.Tensor) -> Iterator[None]:
        """Let the model go on from `states` whatever ids it is given, of the same (B, S)."""
        self._given = states
        try:
            yield
        finally:
            self._given = None

    def above(self, parts: Parts, states: States) -> Parts:
        """The parts of a model that starts from what `states` gives for samples."""
        return replace(parts, start=lambda samples: self.given(states(samples)))

    def drop(self, model: nn.Module, release: Callable[[torch.Tensor], None] = lambda _: None) -> None:
        """Let go of the weights below, and of an embedding that is no head: NaN stands in their place, and takes none.

        `release` sees each before it goes. A weight that a layer above shares stays.
        """
        below = {id(module) for layer in self.lower for module in layer.modules()}
        below |= set() if self.tied else {id(module) for module in self.embedding.modules()}
        modules = dict(model.named_modules())
        shared = {id(p) for m in modules.values() if id(m) not in below for p in m.parameters(recurse=False)}
        for path, module in modules.items():
            if id(module) in below:
                for key, weight in list(module.named_parameters(recurse=False)):
                    if id(weight) not in shared:
                        release(weight.data)
                        self._drop(module, key, f"{path}.{key}", weight)

    def _drop(self, module: Any, key: str, name: str, weight: nn.Parameter) -> None:
        packed = getattr(weight, "quant_state", None) is not None
        self.dropped.append(Weight(module, key, name, weight.dtype, packed))
        nothing = torch.full((), float("nan") if weight.is_floating_point() else 0, dtype=weight.dtype)
        module._parameters[key] = nn.Parameter(nothing.to(weight.device).expand(weight.shape), requires_grad=False)
        if packed:
            module.quant_state = None


def release_pages(tensor: torch.Tensor) -> None:
    """Give the system back the pages that lie wholly in a tensor that nobody reads again.

    Weights that are pages of their file would stay resident as long as one tensor of that file is in use.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    pages.release_within(tensor.data_ptr(), tensor.nbytes)
