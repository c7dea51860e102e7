"""What does each form of adapter do to a model that trains? A row of FORMS, under the names of `settings.tuners`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeft.engine import adalora, adapted_linear, bottlenecks, dora, hadamard, ia3, low_rank, pissa, prefixes, prompts
from edgeft.models import bottleneck
from edgeft.models.checkpoint import Checkpoint, TensorFile
from edgeft.models.parts import Parts
from edgeft.settings.job import Training
from edgeft.settings.tuners import HADAMARD, PREFIX, saved_name


@dataclass(frozen=True)
class Form:
    """One form: how it is hung on a frozen model, scaled there, written, and measured."""

    inject: Callable[[nn.Module, Parts, Training, Checkpoint | None], None]
    # (model, parts, plan): what PEFT reads of it, and its tensors by the names in a saved adapter's file
    written: Callable[[nn.Module, Parts, Training], tuple[Any, dict[str, torch.Tensor]]]
    as_written: Callable[[Training], Training]  # the plan of a run that would begin with what was written
    scale: Callable[[Any, float], None]  # an adapted module computes with a share of its change from now on
    # (adapted projection, stored weight, a saved adapter's tensors by part, scale): ||W' - W||^2; none: no weight holds
    squared_change: Callable[[Any, torch.Tensor, dict[str, torch.Tensor], float], float] | None = None
    # (model, parts, saved adapter): a whole adapter that is not saved parameter by parameter
    restore: Callable[[nn.Module, Parts, TensorFile], None] | None = None


FORMS = {
    "product": Form(adapted_linear.inject, low_rank.written, low_rank.same, low_rank.scale, low_rank.squared_change),
    "less": Form(pissa.inject, pissa.written, pissa.as_written, low_rank.scale, low_rank.squared_change),
    "lengths": Form(dora.inject, low_rank.written, low_rank.same, dora.scale, dora.squared_change),
    "triplets": Form(adalora.inject, adalora.written, low_rank.same, low_rank.scale, adalora.squared_change),
    "scales": Form(ia3.inject, ia3.written, low_rank.same, ia3.scale, ia3.squared_change),
    "hadamard": Form(hadamard.inject, hadamard.written, low_rank.same, hadamard.scale, hadamard.squared_change),
    "after": Form(bottlenecks.after, bottlenecks.written, low_rank.same, bottleneck.scale),
    "beside": Form(bottlenecks.beside, bottlenecks.written, low_rank.same, bottleneck.scale),
    "past": Form(prefixes.inject, prefixes.written, low_rank.same, prefixes.scale, restore=prefixes.restore),
    "read": Form(prompts.inject, prompts.written, low_rank.same, prefixes.scale, restore=prompts.restore),
}


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every adapted module with its name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def is_adapted(module: nn.Module) -> bool:
        hung = PREFIX in module._modules or HADAMARD in module._modules
        return hung or isinstance(module, BaseTunerLayer) or bottleneck.hangs_on(module)

    return ((name, each) for name, each in model.named_modules() if is_adapted(each))


@torch.no_grad()
def restore(
    model: nn.Module, parts: Parts, training: Training, saved: TensorFile, chosen: list[tuple[str, nn.Parameter]]
) -> None:
    """Give the adapters that hang on a model, `chosen` of which train, what was saved of them."""
    whole = form_of(training).restore
    if whole is not None:
        return whole(model, parts, saved)
    for name, parameter in chosen:
        parameter.copy_(saved.read(saved_name(name)))


def form_of(training: Training) -> Form:
    """The form of a plan's adapters."""
    return FORMS[training.form.operation]
