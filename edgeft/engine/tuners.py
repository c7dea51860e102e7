"""Which parameters train, and how is what they learnt kept?"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeft.engine.adapted_linear import fuse
from edgeft.engine.lisa import Lisa, Named, Turns
from edgeft.engine.quantized_layers import train_rounded
from edgeft.models.checkpoint import Checkpoint, TensorFile
from edgeft.models.parts import Parts, units
from edgeft.settings import ENDS, Training
from edgeft.tuners import ADAPTER, SAVED, TUNERS, module_of, other_factor

CHANGED = "changed.safetensors"  # what was trained in place, whole tensors in fp32 under the model's names


def apply_tuner(model: nn.Module, parts: Parts, training: Training) -> list[tuple[str, nn.Parameter]]:
    """Freeze everything, then give back what trains as (name, parameter), adapters built where the plan wants them.

    Under LISA that is everything which may train; `make_lisa` says what does at a time.

    Adapters are fp32 also under half-precision compute: updates of a few 1e-4 relative vanish in bf16. Autocast runs
    their products in the compute dtype, and PEFT's own cast of every input to fp32 is switched off, since it would
    keep an fp32 copy of each linear's input alive.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if training.adapts:
        _inject_lora(model, parts, training)
    chosen = [entry for entries in trained_units(model, parts, training).values() for entry in entries]
    for _, parameter in chosen if training.layers != "lisa" else []:
        parameter.requires_grad_(parameter.is_floating_point())  # 4-bit ones train once they are dense
    if training.quantize_aware is not None:
        train_rounded(model, parts, training)
    return chosen


def trained_units(model: nn.Module, parts: Parts, training: Training) -> dict[str, Named]:
    """The units that may train, by name, each with what of it trains: its adapters, or all of its parameters."""
    ends = [end for end in ENDS if getattr(training, end) != "off"]
    wanted = [*(f"layer {i}" for i in training.trained_layers), *ends]
    found = units(model, parts)
    return {unit: [entry for entry in found[unit] if not training.adapts or ADAPTER in entry[0]]
            for unit in wanted if found[unit]}  # fmt: skip


def make_lisa(model: nn.Module, parts: Parts, training: Training, turns: Turns | None, folder: Path) -> Lisa:
    """The plan's rotation over a model that `apply_tuner` has prepared, not yet started; sparse layers never switch."""
    found = trained_units(model, parts, training)
    always = tuple(end for end in ENDS if getattr(training, end) == "on" and end in found)
    pool = tuple(unit for unit in found if unit not in always)
    rotating_ends = len(pool) - len(training.trained_layers)
    mean = sum(training.layer_weights) / max(1, len(training.layer_weights))
    count, interval = training.active_layers or len(pool), training.lisa_interval or training.steps
    return Lisa(
        found, pool, count, interval, training.lisa_schedule,
        weights=(*training.layer_weights, *[mean] * rotating_ends) if training.layer_weights else (),
        always=always, seed=training.seed, state=training.lisa_state, folder=folder, turns=turns,
    )  # fmt: skip


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
        if ADAPTER in name:
            parameter.data = parameter.data.float()
    if training.compute_dtype == "fp32" and training.quantize_aware is None:
        fuse(model)


def lora_config(model: nn.Module, parts: Parts, training: Training) -> Any:
    """PEFT's config of the plan's adapters: exact layers, no dropout."""
    from peft import LoraConfig

    chosen = [
        f"{parts.layers_path}.{i}.{name}"
        for i in training.trained_layers
        for name, _ in parts.layers[i].named_modules()
        if f".{name}".endswith(tuple(f".{target}" for target in training.target_modules))  # GPT-2: attn.c_proj
    ]
    fan_in_fan_out = any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in chosen)
    return LoraConfig(
        r=training.rank,
        lora_alpha=training.lora_alpha,  # type: ignore[arg-type]
        target_modules=chosen,
        fan_in_fan_out=fan_in_fan_out,
        task_type="CAUSAL_LM",
        **TUNERS[training.tuner].peft,  # type: ignore[arg-type]
    )


def save_tuned(model: nn.Module, parts: Parts, training: Training, chosen: Named, base: str, out: Path) -> None:
    """Write what trained into `out`: a standard PEFT adapter folder, or the `chosen` tensors under their own names.

    The changed tensors of full fine-tuning are kept in fp32, whatever the base is stored in: the merge rounds once.
    """
    from safetensors.torch import save_file

    if training.adapts:
        tensors = {
            SAVED + name.replace(".default.", "."): p.detach().cpu().contiguous()
            for name, p in model.named_parameters()
            if ADAPTER in name
        }
        config = lora_config(model, parts, training)
        config.base_model_name_or_path = base
        config.save_pretrained(out)
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        tensors = {name: p.detach().float().cpu().contiguous() for name, p in chosen}
        save_file(tensors, out / CHANGED, metadata={"format": "pt"})


def unit_changes(tuned: Path, base: Checkpoint, model: nn.Module, parts: Parts, training: Training) -> dict[str, float]:
    """||W - W0|| / ||W0|| of each unit that `tuned` holds something of, over those tensors, one at a time."""
    moved: dict[str, float] = {}
    total: dict[str, float] = {}

    def note(unit: str, change: float, weight: float) -> None:
        moved[unit], total[unit] = moved.get(unit, 0.0) + change, total.get(unit, 0.0) + weight

    if (tuned / CHANGED).is_file():
        file = TensorFile(tuned / CHANGED)
        owner = {name: unit for unit, entries in units(model, parts).items() for name, _ in entries}
        for name in file.entries:
            old = base.read(base.name_of(name)).float()
            note(owner[name], float(torch.dist(file.read(name), old)) ** 2, float(old.norm()) ** 2)
        return {unit: (moved[unit] / total[unit]) ** 0.5 if total[unit] else moved[unit] ** 0.5 for unit in moved}
    file = TensorFile(tuned / "adapter_model.safetensors")
    for name in file.entries:
        if (module := module_of(name)) is not None:
            a, b, target = file.read(name).float(), file.read(other_factor(name)).float(), f"{module}.weight"
            # ||B A||^2 = tr((B^T B)(A A^T)): r x r instead of the whole matrix
            change = float(((b.T @ b) * (a @ a.T)).sum()) * training.lora_scale**2
            unit = "layer " + target.removeprefix(parts.layers_path + ".").split(".")[0]
            note(unit, max(0.0, change), float(base.read(base.name_of(target)).float().norm()) ** 2)
    return {unit: (moved[unit] / total[unit]) ** 0.5 for unit in moved}
