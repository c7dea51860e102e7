"""Which parameters train, and how is what they learnt kept?"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeft.architectures import Parts
from edgeft.settings import Training


def apply_tuner(model: nn.Module, parts: Parts, training: Training) -> list[tuple[str, nn.Parameter]]:
    """Freeze everything, then give back what trains as (name, parameter), adapters built where the plan wants them.

    Adapters are fp32 also under half-precision compute: updates of a few 1e-4 relative vanish in bf16. Autocast runs
    their products in the compute dtype, and PEFT's own cast of every input to fp32 is switched off, since it would
    keep an fp32 copy of each linear's input alive.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if training.tuner == "lora":
        _inject_lora(model, parts, training)
        chosen = [(name, p) for name, p in model.named_parameters() if ".lora_" in name]
    else:
        prefixes = tuple(f"{parts.layers_path}.{i}." for i in training.trained_layers)
        chosen = [
            (name, p) for name, p in model.named_parameters() if training.trains_ends or name.startswith(prefixes)
        ]
    for _, parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def _inject_lora(model: nn.Module, parts: Parts, training: Training) -> None:
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(training.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about Conv1D's transposed weights, which it handles
        inject_adapter_in_model(lora_config(model, parts, training), model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = training.compute_dtype == "fp32"
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def lora_config(model: nn.Module, parts: Parts, training: Training) -> Any:
    """PEFT's config of the plan's adapters: rsLoRA scale, exact layers, no dropout."""
    from peft import LoraConfig

    chosen = [
        f"{parts.layers_path}.{i}.{name}"
        for i in training.trained_layers
        for name, _ in parts.layers[i].named_modules()
        if name.split(".")[-1] in training.target_modules
    ]
    fan_in_fan_out = any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in chosen)
    return LoraConfig(
        r=training.rank,
        lora_alpha=training.lora_alpha,  # type: ignore[arg-type]
        use_rslora=True,
        target_modules=chosen,
        fan_in_fan_out=fan_in_fan_out,
        task_type="CAUSAL_LM",
    )


def save_tuned(model: nn.Module, parts: Parts, training: Training, base: str, out: Path) -> None:
    """Write what trained into `out`: a standard PEFT adapter folder, or the changed tensors under their own names.

    The changed tensors of full fine-tuning are kept in fp32, whatever the base is stored in: the merge rounds once.
    """
    from safetensors.torch import save_file

    if training.tuner == "lora":
        tensors = {
            "base_model.model." + name.replace(".default.", "."): p.detach().cpu().contiguous()
            for name, p in model.named_parameters()
            if ".lora_" in name
        }
        config = lora_config(model, parts, training)
        config.base_model_name_or_path = base
        config.save_pretrained(out)
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        tensors = {
            name: p.detach().float().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad
        }
        save_file(tensors, out / "changed.safetensors", metadata={"format": "pt"})
