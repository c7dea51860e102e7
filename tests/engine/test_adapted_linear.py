"""One operation for a frozen projection and its adapter: what PEFT's own layers give, both ways, with less made."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers.pytorch_utils import Conv1D

from edgeft.engine import adapted_linear
from edgeft.machines.meter import LiveBytes

INPUTS, OUTPUTS, RANK = 64, 96, 8


def base(kind: str) -> nn.Module:
    """A frozen projection of one kind."""
    torch.manual_seed(0)
    if kind == "Conv1D":
        made: nn.Module = Conv1D(OUTPUTS, INPUTS)
        nn.init.normal_(made.bias)
    elif kind == "Linear4bit":
        from bitsandbytes.nn import Linear4bit

        made = Linear4bit(INPUTS, OUTPUTS, bias=True, quant_type="nf4", compute_dtype=torch.float32)
        made.to("cpu")
    else:
        made = nn.Linear(INPUTS, OUTPUTS, bias=kind == "Linear, bias")
    return made.requires_grad_(False)


def adapted(kind: str) -> Any:
    """PEFT's LoRA layer around one, its second factor not zero."""
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential()
    model.add_module("one", base(kind))
    config = LoraConfig(r=RANK, lora_alpha=4, target_modules=["one"], fan_in_fan_out=kind == "Conv1D")
    inject_adapter_in_model(config, model)
    layer: Any = model.get_submodule("one")
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def way(layer: Any, forward: Any, wants: bool = True) -> list[torch.Tensor]:
    """(result, gradients of both factors and, where it is wanted, of the input) of a loss that is no sum."""
    torch.manual_seed(1)
    x = torch.randn(2, 5, INPUTS, requires_grad=wants)
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    result = forward(x)
    found = torch.autograd.grad((result * torch.sin(result.detach())).sum(), [*factors, *([x] if wants else [])])
    return [result.detach(), *found]


KINDS = ["Linear", "Linear, bias", "Conv1D", "Linear4bit"]


@pytest.mark.parametrize("wants", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forward", [adapted_linear._forward, adapted_linear._forward_saving_first])
def test_it_is_pefts_result_with_its_gradients(forward: Any, kind: str, wants: bool) -> None:
    layer = adapted(kind)
    own = partial(type(layer).forward, layer)
    joined = partial(forward, layer)
    peft = way(layer, own, wants)
    for expected, found in zip(peft, way(layer, joined, wants), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    layer.scaling["default"] *= 1.01  # a fault that the comparison sees
    for expected, found in zip(peft, way(layer, joined, wants), strict=True):
        assert not torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_factor_that_does_not_train_gets_no_gradient() -> None:
    layer = adapted("Linear")
    layer.lora_A["default"].weight.requires_grad_(False)
    adapted_linear._forward(layer, torch.randn(3, INPUTS)).sum().backward()
    assert layer.lora_A["default"].weight.grad is None and layer.lora_B["default"].weight.grad is not None


class Counted(nn.Linear):
    """How often a frozen product is made."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


def test_recomputation_does_not_make_a_layers_last_product_again() -> None:
    counts, gradients = [], []
    for forward in (adapted_linear._forward, adapted_linear._forward_saving_first):
        first, last = adapted("Linear"), adapted("Linear")
        for layer in (first, last):
            frozen = layer.base_layer
            layer.base_layer = Counted(INPUTS, INPUTS).requires_grad_(False)
            layer.base_layer.weight = nn.Parameter(frozen.weight[:INPUTS].detach(), requires_grad=False)
            layer.lora_B["default"].weight = nn.Parameter(torch.full((INPUTS, RANK), 0.1))
            layer.forward = partial(forward, layer)
        x = torch.linspace(-1, 1, 3 * INPUTS).view(3, INPUTS).requires_grad_()
        out = recompute(lambda x, f=first, s=last: x + s(torch.sin(f(x))), x, use_reentrant=False)
        out.square().sum().backward()
        counts.append((first.base_layer.calls, last.base_layer.calls))
        gradients.append([x.grad, *(m.lora_A["default"].weight.grad for m in (first, last))])
    assert counts == [(2, 2), (2, 1)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True)) and gradients[0][0] is not None


def test_it_makes_less() -> None:
    peaks = []
    for forward in (
        lambda layer: partial(type(layer).forward, layer),
        lambda layer: partial(adapted_linear._forward, layer),
    ):
        layer = adapted("Linear")
        x = torch.randn(512, INPUTS, requires_grad=True)
        with LiveBytes() as live:
            forward(layer)(x).sum().backward()
        peaks.append(live.peak_bytes)
    assert peaks[1] < peaks[0] - 4 * 512 * OUTPUTS  # by a tensor of the result's size and more


def test_weights_that_scoring_reads_stay_as_they_are() -> None:
    layer = adapted("Linear4bit").eval()
    codes = layer.base_layer.weight.data.clone()
    with torch.no_grad():
        first = adapted_linear._forward(layer, torch.ones(1, INPUTS))
        again = adapted_linear._forward(layer, torch.ones(1, INPUTS))
    assert torch.equal(first, again) and torch.equal(layer.base_layer.weight.data, codes)
