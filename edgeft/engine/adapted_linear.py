"""How is a frozen projection computed together with its LoRA adapter, as one operation?

PEFT's forward makes five tensors of the result's size, two of them for the backward pass's sake alone, and its
backward adds two gradients of the input. Here the adapter's product is added to the frozen one in place, both ways.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from edgeft.engine import low_rank
from edgeft.models.checkpoint import Checkpoint
from edgeft.models.parts import Parts
from edgeft.settings.job import Training

Gradient = torch.Tensor | None
STORED = "stored"  # of a module whose weight stays in its file, in another dtype (`engine.streaming`)


class _Adapted(torch.autograd.Function):
    """x W^T + b + scale (x A^T) B^T for a frozen W, in fp32; x (..., in), A (rank, in), B (out, rank)."""

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: nn.Module, scale: float
    ) -> torch.Tensor:
        low = x.reshape(-1, x.shape[-1]) @ down.T
        result = _added(base, x, low, up, scale)
        context.save_for_backward(x, low, down, up)
        context.base, context.scale = base, scale
        return result

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[Gradient, Gradient, Gradient, None, None]:
        into = _gradients(context, gradient, *context.saved_tensors, wants_input=context.needs_input_grad[0])
        return *into, None, None


class _Saved(torch.autograd.Function):
    """x, where what the product's way back needs is saved before the product is made.

    PyTorch's own operations save first, one written in Python once it is done. Recomputation ends at the last thing
    that was saved: it need not make the last product of a layer, a seventh to a third of it.
    """

    @staticmethod
    def forward(context: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        low = x.reshape(-1, x.shape[-1]) @ down.T
        context.save_for_backward(x, low, down, up)
        context.set_materialize_grads(False)
        context.low = low
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Gradient) -> tuple[Gradient, None, None]:
        return gradient, None, None


class _AdaptedSaved(torch.autograd.Function):
    """As `_Adapted`, of an x that `_Saved` gave."""

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: nn.Module, scale: float, saved: Any
    ) -> torch.Tensor:
        low, saved.low = saved.low, None
        result = _added(base, x, low, up, scale)
        context.base, context.scale, context.saved, context.wants_input = base, scale, saved, saved.needs_input_grad[0]
        return result

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[Gradient, Gradient, Gradient, None, None, None]:
        into = _gradients(context, gradient, *context.saved.saved_tensors, wants_input=context.wants_input)
        return *into, None, None, None


def _gradients(
    context: Any, gradient: torch.Tensor, x: torch.Tensor, low: torch.Tensor, down: torch.Tensor, up: torch.Tensor,
    *, wants_input: bool,
) -> tuple[Gradient, Gradient, Gradient]:  # fmt: skip
    """Of the input and both factors, each None where it is not wanted."""
    flat, inputs = gradient.reshape(-1, up.shape[0]), x.reshape(-1, x.shape[-1])
    into_low = (flat @ up).mul_(context.scale)
    into_up = (flat.T @ low).mul_(context.scale) if context.needs_input_grad[2] else None
    into_down = into_low.T @ inputs if context.needs_input_grad[1] else None
    into = None
    if wants_input:
        into = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows = into.view(inputs.shape)
        torch.mm(flat, dense_weight(context.base, x.dtype), out=rows)
        rows.addmm_(into_low, down)
    return into, into_down, into_up


def _added(base: nn.Module, x: torch.Tensor, low: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """The frozen product, and the adapter's added to it in place."""
    result = _product(base, x)
    result.view(-1, up.shape[0]).addmm_(low, up.T, alpha=scale)
    return result


def _product(linear: Any, x: torch.Tensor) -> torch.Tensor:
    if type(linear).__name__ == "Linear4bit":
        return nn.functional.linear(x, dense_weight(linear, x.dtype), linear.bias)
    return linear(x)  # type: ignore[no-any-return]


def dense_weight(linear: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The (out, in) weight of a linear module; made dense where it is kept in 4 bits."""
    weight: Any = getattr(linear, STORED, linear.weight).to(dtype) if hasattr(linear, STORED) else linear.weight
    if type(linear).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)  # type: ignore[no-any-return]
    return weight.T if type(linear).__name__ == "Conv1D" else weight  # type: ignore[no-any-return]


def inject(model: nn.Module, parts: Parts, training: Training, stored: Checkpoint | None = None) -> None:
    """Factors beside the plan's projections, each pair one operation with its projection where that is fp32."""
    low_rank.inject(model, parts, training)
    for module in low_rank.layers(model) if training.compute_dtype == "fp32" else ():
        module.forward = partial(_forward, module)


def save_first(layer: nn.Module) -> None:
    """For a layer that is recomputed: see `_Saved`."""
    for module in layer.modules():
        own: Any = module.forward
        if getattr(own, "func", None) is _forward:
            module.forward = partial(_forward_saving_first, module)  # type: ignore[method-assign]


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
    scale = module.scaling["default"]
    return _Adapted.apply(x, down, up, module.base_layer, scale)  # type: ignore[no-any-return, no-untyped-call]


def _forward_saving_first(module: Any, x: torch.Tensor) -> torch.Tensor:
    down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
    if not torch.is_grad_enabled() or not (x.requires_grad or down.requires_grad or up.requires_grad):
        return _forward(module, x)
    scale, seen = module.scaling["default"], _Saved.apply(x, down, up)  # type: ignore[no-untyped-call]
    return _AdaptedSaved.apply(seen, down, up, module.base_layer, scale, seen.grad_fn)  # type: ignore
