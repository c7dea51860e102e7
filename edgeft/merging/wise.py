"""What does a live model say anywhere between base and fine-tuned? Its whole change scaled, and put back bit for bit.

    with edgeft.wise(model, 0.5):
        model.generate(...)

`merge` does the same to a checkpoint on disk. Nothing is copied for adapters: LoRA's scale is multiplied; of whatever
else PEFT wraps, the outputs of base and fine-tuned are interpolated, which is exact where the output is linear in the
weights. Weights that trained themselves need the base they came from, and one new tensor each while the block runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from edgeft.errors import BadInput
from edgeft.merging.change import find_tensor
from edgeft.merging.peft_folder import BY_PEFT, CANNOT_FOLD, CHANGES_BASE, LORA_CANNOT_FOLD, MAY_FOLD
from edgeft.models.checkpoint import Checkpoint, local_folder

Model = TypeVar("Model", bound=nn.Module)

# PEFT types whose layers compute W x + b with some W and b: each is tested against PEFT's own merge
LINEAR = (*MAY_FOLD, *BY_PEFT)


@contextlib.contextmanager
def wise(model: Model, wise_alpha: float, *, base: Checkpoint | Path | str | None = None) -> Iterator[Model]:
    """The model at W0 + a (Wft - W0) while the block runs (Wise-FT, arXiv 2109.01903); 0 is the base, 1 fine-tuned.

    A PEFT model, or one with adapters from inject_adapter_in_model; with `base`, the checkpoint it began with, also
    weights and biases that trained themselves. A block inside another counts from the fine-tuned model, not from
    where the outer one is; blocks may end in any order. Code that reads a wrapped module's `.weight` instead of
    calling the module does not see the change of scale. Not for use from several threads at once.

    Raises BadInput for a share outside 0 to 1, a model with neither adapters nor `base`, adapters that are merged or
    not linear in their weights, and weights that trained without a `base` to tell what they were.
    """
    if not 0.0 <= wise_alpha <= 1.0:
        raise BadInput("wise_alpha", f"must be from 0 (base) to 1 (fine-tuned), got {wise_alpha}")
    places = _places(model, base)
    block = object()
    try:
        for place in places:
            place.enter(block, wise_alpha)
        yield model
    finally:
        for place in places:
            place.leave(block)


class _Place:
    """One piece of a model whose change is scaled. Of the blocks that it is in, the one entered last counts."""

    def __init__(self, key: object) -> None:
        self.key = key
        self.shares: dict[object, float] = {}

    def enter(self, block: object, share: float) -> None:
        if not self.shares:
            self.begin()
            _ACTIVE[id(self.key)] = self
        self.shares[block] = share
        self.scale(share)

    def leave(self, block: object) -> None:
        if self.shares.pop(block, None) is None:
            return
        if self.shares:
            self.scale(next(reversed(self.shares.values())))
        else:
            del _ACTIVE[id(self.key)]
            self.restore()

    def begin(self) -> None:
        raise NotImplementedError

    def scale(self, share: float) -> None:
        raise NotImplementedError

    def restore(self) -> None:
        raise NotImplementedError


class _Scaling(_Place):
    """A LoRA layer without a variant: its output is W0 x + scaling B A x."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.layer = layer

    def begin(self) -> None:
        self.original = dict(self.layer.scaling)

    def scale(self, share: float) -> None:
        for adapter, scaling in self.original.items():
            self.layer.scaling[adapter] = scaling * share

    def restore(self) -> None:
        self.layer.scaling.update(self.original)


class _Output(_Place):
    """A module beside its base: (1 - a) base(x) + a tuned(x), which is the interpolated module where it is linear."""

    def __init__(self, module: nn.Module, base: Callable[..., Any]) -> None:
        super().__init__(module)
        self.module, self.base = module, base

    def begin(self) -> None:
        # before other hooks, so that they see the interpolated output
        self.handle = self.module.register_forward_hook(self._hook, prepend=True, with_kwargs=True)

    def scale(self, share: float) -> None:
        self.share = share

    def restore(self) -> None:
        self.handle.remove()

    def _hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], tuned: Any) -> Any:
        if self.share == 1.0:
            return tuned
        base = self.base(*args, **{k: v for k, v in kwargs.items() if k not in ("adapter_names", "alora_offsets")})
        return base if self.share == 0.0 else torch.lerp(base.to(tuned.dtype), tuned, self.share)


class _Module(_Output):
    """A module saved as a whole that need not be linear: the base's forward with parameters made on the way."""

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper, wrapper.original_module)
        self.wrapper = wrapper

    def _hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], tuned: Any) -> Any:
        active = next((name for name in self.wrapper.active_adapters if name in self.wrapper.modules_to_save), None)
        if self.share == 1.0 or active is None or self.wrapper.disable_adapters:
            return tuned
        original = dict(self.wrapper.original_module.named_parameters())
        between = {
            name: torch.lerp(original[name].to(parameter.dtype), parameter, self.share)
            for name, parameter in self.wrapper.modules_to_save[active].named_parameters()
        }
        return torch.func.functional_call(self.wrapper.original_module, between, args, kwargs)


class _Parameter(_Place):
    """A parameter that trained itself: another tensor stands in for its own, which comes back as it was."""

    def __init__(self, parameter: nn.Parameter, base: Checkpoint, name: str) -> None:
        super().__init__(parameter)
        self.parameter, self.base, self.name = parameter, base, name

    def begin(self) -> None:
        self.original = self.parameter.data

    def scale(self, share: float) -> None:
        if share == 1.0:
            self.parameter.data = self.original
            return
        between = self.base.read(self.name).to(self.original.device, torch.float32)
        self.parameter.data = between.lerp_(self.original.float(), share).to(self.original.dtype)

    def restore(self) -> None:
        self.parameter.data = self.original
        del self.original


# what blocks are in now, by the id of its module or parameter: a block inside another must find the outer one's places
_ACTIVE: dict[int, _Place] = {}


def _place(key: object, make: Callable[..., _Place], *arguments: Any) -> _Place:
    """The one place of a module or parameter: the one that a block is in, or a new one."""
    return _ACTIVE.get(id(key)) or make(*arguments)


def _places(model: nn.Module, base: Checkpoint | Path | str | None) -> list[_Place]:
    """Every place of a model where its change shows. Raises BadInput as `wise` says."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    configs: dict[str, Any] = getattr(model, "peft_config", {})
    _check(model, configs)
    places: list[_Place] = []
    adapted: set[int] = set()  # parameters that belong to adapters
    coupled: set[int] = set()  # parameters that an adapter multiplies: the two changes are no sum
    layer: Any
    for name, layer in model.named_modules():
        if isinstance(layer, ModulesToSaveWrapper):
            adapted |= {id(parameter) for parameter in layer.modules_to_save.parameters()}
            if isinstance(layer.original_module, (nn.Linear, nn.Embedding)):
                places.append(_place(layer, _Output, layer, layer.original_module))
            else:
                places.append(_place(layer, _Module, layer))
        elif isinstance(layer, BaseTunerLayer):
            tuner: Any = layer
            if tuner.merged:
                raise BadInput(name, "its adapter is merged into its weights", "call model.unmerge_adapter() first")
            inside: nn.Module = tuner.base_layer
            adapted |= {id(p) for p in tuner.parameters()} - {id(p) for p in inside.parameters()}
            if isinstance(layer, LoraLayer) and not any(a in layer.lora_variant for a in layer.active_adapters):
                places.append(_place(layer, _Scaling, layer))
                continue
            if any(isinstance(module, BaseTunerLayer) for module in inside.modules()):
                raise BadInput(name, "has an adapter on an adapter", "merge one of them first")
            coupled |= {id(p) for n, p in inside.named_parameters() if n != "bias" or not isinstance(layer, LoraLayer)}
            places.append(_place(layer, _Output, layer, inside))
    others = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in adapted and parameter.is_floating_point()
    }
    if base is not None:
        places += _trained(model, others, base, coupled)
    else:
        trained = [name for name, parameter in others.items() if parameter.requires_grad]
        biased = [name for name, config in configs.items() if getattr(config, "bias", "none") != "none"]
        if places and (trained or biased):
            what = f"{trained[0]} trains" if trained else f"adapter {biased[0]!r} has biases of its own"
            hint = "wise(model, a, base=FOLDER), or requires_grad_(False) for what did not train"
            raise BadInput(type(model).__name__, f"{what}, and nothing says what it was before", hint)
    if not places and base is None:
        hint = "give the checkpoint it began with: wise(model, a, base=FOLDER)"
        raise BadInput(type(model).__name__, "has no adapters", hint)
    return places


def _check(model: nn.Module, configs: dict[str, Any]) -> None:
    """Raise BadInput for adapters whose output is no W x + b, or whose base is no longer the base."""
    for config in configs.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        reasons = [] if kind in LINEAR else [CANNOT_FOLD.get(kind, f"{kind} is not known to be linear in its weights")]
        reasons += [reason for key, reason in LORA_CANNOT_FOLD.items() if getattr(config, key, None)]
        start = str(getattr(config, "init_lora_weights", "")).lower()
        if start.startswith(CHANGES_BASE):
            reasons.append(f"{start} began by changing the base's own weights")
        if reasons:
            raise BadInput(type(model).__name__, "its change cannot be scaled: " + "; ".join(reasons))


def _trained(
    model: nn.Module, parameters: dict[str, nn.Parameter], base: Checkpoint | Path | str, coupled: set[int]
) -> list[_Place]:
    """The places of all parameters that differ from the base's tensors; the base is read one tensor at a time."""
    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint(local_folder(str(base)))
    places: list[_Place] = []
    problems = []
    for name, parameter in parameters.items():
        plain = name.removeprefix("base_model.model.")
        for wrapped in (".base_layer.", ".original_module.", ".token_adapter."):
            plain = plain.replace(wrapped, ".")
        found = find_tensor(checkpoint, plain)
        if found is None:
            problems.append(f"{plain}: not in the base")
        elif checkpoint.shape(found) != tuple(parameter.shape):
            problems.append(f"{plain}: {tuple(parameter.shape)} in the model, {checkpoint.shape(found)} in the base")
        elif id(parameter) in _ACTIVE or not torch.equal(
            checkpoint.read(found).to(parameter.device, parameter.dtype), parameter.detach()
        ):
            places.append(_place(parameter, _Parameter, parameter, checkpoint, found))
            if id(parameter) in coupled:
                problems.append(f"{plain}: trained beneath an adapter that multiplies it")
    if problems:
        raise BadInput(type(model).__name__, "does not fit the base:\n" + "\n".join(problems[:8]))
    return places
