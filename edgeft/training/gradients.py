"""How large is the gradient of each matrix, also of a frozen 4-bit one, when none of it may be in memory?

Of a linear y = W x over tokens t the gradient is G = sum_t d_t x_t^T, d_t being the loss's gradient at the output, so
that ||G||^2 = sum_{s,t} (d_s . d_t) (x_s . x_t): products of tokens, made a few rows at a time. The inputs x are what
training an adapter on the linear keeps anyway, the d pass by in the backward pass, and both are there for a base in any
precision, though a 4-bit kernel gives no gradient of its weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from edgeft.models.parts import Parts, is_linear

GRAM_ENTRIES = 2**18  # products of two tokens made at a time


class _Watch(torch.autograd.Function):
    """The identity on a linear's output; its backward pass shows the gradient there, with the linear's input.

    The input is saved as autograd saves, so recomputation drops it and brings it back like every other activation.
    `probe` requires a gradient and never gets one: it starts the graph at the lowest linear, with nothing below.
    """

    @staticmethod
    def forward(context: Any, output: torch.Tensor, inputs: torch.Tensor, probe: torch.Tensor,
                show: Callable[[torch.Tensor, torch.Tensor], None]) -> torch.Tensor:  # fmt: skip
        context.save_for_backward(inputs)
        context.show = show
        return output.view_as(output)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        context.show(*context.saved_tensors, *gradients)
        return *gradients, None, None, None


def gradient_norm(inputs: torch.Tensor, gradients: torch.Tensor) -> float:
    """||sum_t d_t x_t^T|| of a linear's inputs x (..., in) and output gradients d (..., out), without that matrix."""
    x, d = inputs.flatten(0, -2).float(), gradients.flatten(0, -2).float()
    rows = max(1, GRAM_ENTRIES // len(x))
    total = 0.0
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        total += float((x[part] @ x.T).mul_(d[part] @ d.T).sum(dtype=torch.float64))
    return max(0.0, total) ** 0.5 if math.isfinite(total) else math.inf


def weight_norm(linear: Any) -> float:
    """Frobenius norm of a linear's weight; a 4-bit one is made dense for the moment."""
    weight = linear.weight
    if type(linear).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float32))


@contextlib.contextmanager
def watched(parts: Parts) -> Iterator[list[float]]:
    """A list that each backward pass adds ||W|| ||dL/dW|| of every layer's linears to; the layers are left as found."""
    now = [0.0] * len(parts.layers)
    handles = []
    device = next(parts.embedding.parameters()).device

    def watch(index: int, linear: nn.Module, probe: torch.Tensor) -> Any:
        weight = weight_norm(linear)

        def show(inputs: torch.Tensor, gradients: torch.Tensor) -> None:
            now[index] += weight * gradient_norm(inputs, gradients)

        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
            return _Watch.apply(output, inputs[0], probe, show)  # type: ignore[no-untyped-call]

        return linear.register_forward_hook(hook)

    for index, layer in enumerate(parts.layers):
        linears = [module for module in layer.modules() if is_linear(module)]
        # a parameter of the layer: by it a layer that is recomputed knows that autograd will come by
        probe = nn.Parameter(torch.zeros((), device=device))
        layer.register_parameter("edgeft_probe", probe)
        handles += [watch(index, linear, probe) for linear in linears]
    try:
        yield now
    finally:
        for handle in handles:
            handle.remove()
        for layer in parts.layers:
            del layer.edgeft_probe
