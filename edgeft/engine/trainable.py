"""Which parameters train, and how is what they learnt kept?"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from edgeft.engine.forms import form_of
from edgeft.engine.lisa import Lisa, Named, Turns
from edgeft.engine.quantized_layers import train_rounded
from edgeft.models.checkpoint import CHANGED, Checkpoint, TensorFile, read_changed
from edgeft.models.parts import Parts, units
from edgeft.settings.job import ENDS, Training
from edgeft.settings.tuners import PROMPT, adapter_parts, is_adapter


def apply_tuner(
    model: nn.Module, parts: Parts, training: Training, stored: Checkpoint | None = None
) -> list[tuple[str, nn.Parameter]]:
    """Freeze everything, then give back what trains as (name, parameter), adapters built where the plan wants them.

    `stored` holds the base's weights where its modules do not (`Training.holds_others`). Under LISA that is everything
    which may train; `make_lisa` says what does at a time.

    Adapters are fp32 also under half-precision compute: updates of a few 1e-4 relative vanish in bf16. Autocast runs
    their products in the compute dtype, and PEFT's own cast of every input to fp32 is switched off, since it would
    keep an fp32 copy of each linear's input alive.
    """
    if training.adapts:
        form_of(training).inject(model, parts, training, stored)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    chosen = [entry for entries in trained_units(model, parts, training).values() for entry in entries]
    for _, parameter in chosen if training.layers != "lisa" else []:
        parameter.requires_grad_(parameter.is_floating_point())  # 4-bit ones train once they are dense
    if training.quantize_aware is not None:
        train_rounded(model, parts, training)
    return chosen


def trained_units(model: nn.Module, parts: Parts, training: Training) -> dict[str, Named]:
    """The units that may train, by name, each with what of it trains: its adapters, or all of its parameters."""
    ends = [end for end in ENDS if getattr(training, end) != "off"]
    wanted = [PROMPT] if training.embeds else [*(f"layer {i}" for i in training.trained_layers), *ends]
    found = units(model, parts)
    return {unit: [entry for entry in found[unit] if not training.adapts or is_adapter(entry[0])]
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


def save_tuned(model: nn.Module, parts: Parts, training: Training, chosen: Named, base: str, out: Path) -> None:
    """Write what trained into `out`: a standard PEFT adapter folder, or the `chosen` tensors under their own names.

    The changed tensors of full fine-tuning are kept in fp32, whatever the base is stored in: the merge rounds once.
    """
    from safetensors.torch import save_file

    if training.adapts:
        config, tensors = form_of(training).written(model, parts, training)
        config.base_model_name_or_path = base
        config.save_pretrained(out)
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        tensors = {name: p.detach().float().cpu().contiguous() for name, p in chosen}
        save_file(tensors, out / CHANGED, metadata={"format": "pt"})


def unit_changes(tuned: Path, base: Checkpoint, model: nn.Module, parts: Parts, training: Training) -> dict[str, float]:
    """||W - W0|| / ||W0|| of each unit that `tuned` holds something of, over those tensors, one at a time.

    Nothing where what trained lies beside the weights.
    """
    moved: dict[str, float] = {}
    total: dict[str, float] = {}

    def note(unit: str, change: float, weight: float) -> None:
        moved[unit], total[unit] = moved.get(unit, 0.0) + change, total.get(unit, 0.0) + weight

    if (file := read_changed(tuned)) is not None:
        owner = {name: unit for unit, entries in units(model, parts).items() for name, _ in entries}
        for name in file.entries:
            old = base.read(base.name_of(name)).float()
            note(owner[name], float(torch.dist(file.read(name), old)) ** 2, float(old.norm()) ** 2)
        return {unit: (moved[unit] / total[unit]) ** 0.5 if total[unit] else moved[unit] ** 0.5 for unit in moved}
    squared_change = form_of(training).squared_change
    if squared_change is None:
        return {}
    file = TensorFile(tuned / "adapter_model.safetensors")
    for module, keys in adapter_parts(file.entries).items():
        tensors = {part: file.read(key).float() for part, key in keys.items()}
        weight = base.read(base.name_of(f"{module}.weight")).float()
        change = squared_change(model.get_submodule(module), weight, tensors, training.adapter_scale)
        unit = "layer " + module.removeprefix(parts.layers_path + ".").split(".")[0]
        note(unit, change, float(weight.norm()) ** 2)
    return {unit: (moved[unit] / total[unit]) ** 0.5 for unit in moved}
