"""How do two factors of low rank lie beside a projection? PEFT's LoRA layers, under PEFT's names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from edgeft.models.checkpoint import Checkpoint
from edgeft.models.parts import Parts
from edgeft.settings.job import Training
from edgeft.settings.tuners import TUNERS, is_adapter, saved_name


def inject(model: nn.Module, parts: Parts, training: Training, stored: Checkpoint | None = None) -> None:
    """Hang fp32 factors, the second one zero, on the plan's projections."""
    from peft import inject_adapter_in_model

    torch.manual_seed(training.seed)
    made = config(model, parts, training)
    made.use_dora = False  # `dora` gives rows their lengths itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about Conv1D's transposed weights, which it handles
        inject_adapter_in_model(made, model)
    for module in layers(model):
        module.cast_input_dtype_enabled = training.compute_dtype == "fp32"
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


def config(model: nn.Module, parts: Parts, training: Training) -> Any:
    """PEFT's config of the plan's adapters: exact layers, no dropout."""
    from peft import LoraConfig

    chosen = chosen_modules(parts, training)
    return LoraConfig(
        r=training.rank,
        lora_alpha=training.lora_alpha,  # type: ignore[arg-type]
        target_modules=chosen,
        use_rslora=training.lora_scale == "rslora",
        fan_in_fan_out=in_conv1d(model, chosen),
        task_type="CAUSAL_LM",
        **TUNERS[training.tuner].peft,  # type: ignore[arg-type]
    )


def chosen_modules(parts: Parts, training: Training) -> list[str]:
    """The names of the modules that get an adapter."""
    return [
        f"{parts.layers_path}.{i}.{name}"
        for i in training.adapted_layers
        for name, _ in parts.layers[i].named_modules()
        if f".{name}".endswith(tuple(f".{target}" for target in training.target_modules))  # GPT-2: attn.c_proj
    ]


def in_conv1d(model: nn.Module, names: list[str]) -> bool:
    """Whether modules hold their matrices as inputs x outputs, as GPT-2's do."""
    return any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in names)


def written(model: nn.Module, parts: Parts, training: Training) -> tuple[Any, dict[str, torch.Tensor]]:
    """What a saved adapter holds: PEFT's config, and every tensor of the adapters."""
    return config(model, parts, training), tensors_of(model)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model's adapters by its name in a saved adapter's file, of whatever kind they are."""
    named = ((name, p) for name, p in model.named_parameters() if is_adapter(name))
    return {saved_name(name): parameter.detach().cpu().contiguous() for name, parameter in named}


def same(training: Training) -> Training:
    """The plan of a run that would begin with what was written: this one's."""
    return training


def layers(module: nn.Module) -> Iterator[Any]:
    """Every projection of a model, or of a part of it, that has factors beside it."""
    from peft.tuners.lora import LoraLayer

    return (each for each in module.modules() if isinstance(each, LoraLayer))


def base_weight(name: str, layer: Any, stored: Checkpoint | None) -> torch.Tensor:
    """What a projection multiplies with, read from `stored` where its module does not hold it; of 4 bits as stored."""
    weight: torch.Tensor = layer.base_layer.weight.detach()
    if stored is None:
        return weight
    found = stored.read(stored.name_of(f"{name}.weight")).to(weight.device)
    return found.to(weight.dtype) if weight.is_floating_point() else found


def scale(layer: Any, share: float) -> None:
    """Let an adapted projection compute with a share of what is changed so far."""
    for adapter in layer.scaling:
        layer.scaling[adapter] *= share


def squared_change(layer: Any, weight: torch.Tensor, parts: dict[str, torch.Tensor], scale: float) -> float:
    """||s B A||^2 = s^2 tr((B^T B)(A A^T)): r x r instead of the whole matrix."""
    a, b = parts["lora_A"], parts["lora_B"]
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()) * scale**2)
