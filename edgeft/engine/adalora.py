"""How do ranks move from matrix to matrix while they train? AdaLoRA (arXiv 2303.10512): W x + s P diag(L) Q x.

PEFT's tensors under PEFT's names: Q is lora_A, L lora_E, P lora_B, and L begins at zero, which is the base itself.
After each update every triplet (a row of Q, a column of P, the number between them) has an importance: |weight x
gradient| smoothed, times how much it varies. As the run goes on the numbers of the least important ones become zero,
of all matrices together, until `target_rank` of each is left on average. A term of the loss keeps rows of Q, and
columns of P, orthogonal.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeft.engine import low_rank
from edgeft.models.checkpoint import Checkpoint, TensorFile
from edgeft.models.parts import Parts
from edgeft.settings.job import Training
from edgeft.settings.tuners import is_adapter

SMOOTHING = 0.85  # of importance, and of how much it varies: PEFT's beta1 and beta2
ORTHOGONAL = 0.5  # weight of the term of the loss: PEFT's orth_reg_weight
PARTS = ("lora_A", "lora_B", "lora_E")


def inject(model: nn.Module, parts: Parts, training: Training, stored: Checkpoint | None = None) -> None:
    """Triplets in fp32 beside the plan's projections, with room for their importance."""
    from peft import inject_adapter_in_model

    torch.manual_seed(training.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about Conv1D's transposed weights, which it handles
        inject_adapter_in_model(_config(model, parts, training), model)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()
    for layer in low_rank.layers(model):
        layer.ranknum["default"].data = layer.ranknum["default"].data.float()  # PEFT gives it the base's dtype
        for part in PARTS:
            own = getattr(layer, part)["default"]
            for kind in ("importance", "varies"):
                layer.register_buffer(f"{kind}_{part}", torch.zeros_like(own), persistent=False)
        layer.register_buffer("left", torch.ones_like(layer.lora_E["default"]), persistent=False)
        layer.forward = Triplets(layer)


def _config(model: nn.Module, parts: Parts, training: Training) -> Any:
    from peft import AdaLoraConfig

    chosen = low_rank.chosen_modules(parts, training)
    first, last, every = schedule(training)
    return AdaLoraConfig(
        init_r=training.rank, target_r=training.target_rank, lora_alpha=training.lora_alpha,  # type: ignore[arg-type]
        tinit=first, tfinal=training.steps - last, deltaT=every, beta1=SMOOTHING, beta2=SMOOTHING,
        orth_reg_weight=ORTHOGONAL, total_step=training.steps, target_modules=chosen,
        fan_in_fan_out=low_rank.in_conv1d(model, chosen), task_type="CAUSAL_LM",
    )  # fmt: skip


def schedule(training: Training) -> tuple[int, int, int]:
    """(the step after which ranks go, the step at which the last have gone, steps between): a tenth, seven tenths."""
    steps = training.steps
    return steps // 10, steps - 3 * steps // 10, max(1, steps // 100)


@dataclass(eq=False)
class Triplets:
    """Takes the place of an adapted projection's forward pass."""

    layer: Any

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer = self.layer
        down, up, between = (getattr(layer, part)["default"] for part in PARTS)
        result: torch.Tensor = layer.base_layer(x)
        low = nn.functional.linear(x, down)
        low = (low * between.flatten()).to(low.dtype)
        return result + nn.functional.linear(low, up) * scale_of(layer)


def scale_of(layer: Any) -> float:
    """What a projection's product is multiplied by: PEFT's alpha over the first rank, a share of it once scaled."""
    return float(layer.scaling["default"] / (layer.r["default"] + 1e-5))


def written(model: nn.Module, parts: Parts, training: Training) -> tuple[Any, dict[str, torch.Tensor]]:
    """What a saved adapter holds: PEFT's config, and every triplet, the numbers of those that went at zero."""
    return _config(model, parts, training), low_rank.tensors_of(model)


def squared_change(layer: Any, weight: torch.Tensor, parts: dict[str, torch.Tensor], scale: float) -> float:
    """||s P diag(L) Q||^2."""
    right = {"lora_A": parts["lora_A"] * parts["lora_E"], "lora_B": parts["lora_B"]}
    return low_rank.squared_change(layer, weight, right, scale)


@dataclass
class Pruning:
    """What becomes of a run's triplets around each update."""

    training: Training
    model: nn.Module

    def layers(self) -> list[Any]:
        """The adapted projections."""
        return list(low_rank.layers(self.model))

    @torch.no_grad()
    def straighten(self) -> None:
        """Add the gradient of c mean(||Q Q^T - 1||, ||P^T P - 1||) over the matrices that train now."""
        found = [(getattr(layer, part)["default"], part) for layer in self.layers() for part in PARTS[:2]]
        found = [(matrix, part) for matrix, part in found if matrix.grad is not None]
        for matrix, part in found:
            rows = matrix if part == "lora_A" else matrix.T
            apart = rows @ rows.T
            apart.diagonal().sub_(1)
            apart.div_(apart.norm().clamp_min_(1e-12))
            slope = matrix.grad if part == "lora_A" else matrix.grad.T
            slope.addmm_(apart, rows, alpha=2 * ORTHOGONAL / len(found))

    @torch.no_grad()
    def allocate(self, step: int) -> None:
        """Measure importance after an update, and take numbers away where the schedule says so."""
        first, last, every = schedule(self.training)
        if step < last:
            for layer in self.layers():
                _measure(layer)
        if first < step < last and step % every == 0:
            self._keep(self._budget(step, first, last))
        elif step == last:
            self._keep(self.training.target_rank * len(self.layers()))
        elif step > last:
            for layer in self.layers():
                layer.lora_E["default"].mul_(layer.left)

    def _budget(self, step: int, first: int, last: int) -> int:
        """Triplets of all matrices that a step leaves: from all of them to the target, falling with the cube."""
        most, least = (rank * len(self.layers()) for rank in (self.training.rank, self.training.target_rank))
        return int((most - least) * (1 - (step - first) / (last - first)) ** 3 + least)

    def _keep(self, budget: int) -> None:
        layers = self.layers()
        scores = [_importance(layer) for layer in layers]
        every = torch.cat(scores)
        gone = len(every) - budget
        if gone <= 0:
            return
        threshold = torch.kthvalue(every, gone).values
        for layer, score in zip(layers, scores, strict=True):
            layer.left.copy_((score > threshold).view_as(layer.left))
            layer.lora_E["default"].mul_(layer.left)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of all that a checkpoint must hold."""
        for name, layer in self.model.named_modules():
            if isinstance(getattr(layer, "left", None), torch.Tensor):
                kept = ("left", *(f"{kind}_{part}" for part in PARTS for kind in ("importance", "varies")))
                yield from ((f"{name}.{each}", getattr(layer, each)) for each in kept)

    def restore(self, saved: TensorFile) -> None:
        """Take up what a checkpoint holds."""
        for name, tensor in self.tensors():
            tensor.copy_(saved.read(name))


def _measure(layer: Any) -> None:
    """Smooth |w g| of every number, and its distance from that."""
    for part in PARTS:
        own = getattr(layer, part)["default"]
        if own.grad is None:
            continue
        importance, varies = getattr(layer, f"importance_{part}"), getattr(layer, f"varies_{part}")
        now = (own * own.grad).abs_()
        importance.mul_(SMOOTHING).add_(now, alpha=1 - SMOOTHING)
        varies.mul_(SMOOTHING).add_(now.sub_(importance).abs_(), alpha=1 - SMOOTHING)


def _importance(layer: Any) -> torch.Tensor:
    """Of each triplet: its number's, and the means of its row's and its column's."""
    down, up, between = (getattr(layer, f"importance_{part}") * getattr(layer, f"varies_{part}") for part in PARTS)
    found: torch.Tensor = between.flatten() + (down.mean(1) + up.mean(0))
    return found


def pruning_of(training: Training, model: nn.Module) -> Pruning | None:
    """What prunes a run's triplets; nothing where its adapters have none."""
    return Pruning(training, model) if training.target_rank else None
