"""How does a base come into memory a tensor at a time, by plain reads: nothing is mapped, nothing there twice?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeft.engine.nf4_codes import give_4bit_linears
from edgeft.errors import BadInput
from edgeft.models.boundary import Weight
from edgeft.models.checkpoint import Checkpoint, quiet_transformers
from edgeft.models.headers import blocks
from edgeft.models.parts import cap_scores


def model_without_weights(folder: Path, dtype: torch.dtype, *, packed: bool) -> Any:
    """The model of a folder's config, its parameters on the meta device, what it computes for itself in memory.

    `packed`: with the matrices that transformers packs as its 4-bit Linears, which multiply in `dtype` too.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights(include_buffers=False):
            model = auto.from_config(config, dtype=dtype).eval()
        model.tie_weights()
        if packed:
            give_4bit_linears(model, pre_quantized=True)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = dtype
            if module.bias is not None:
                module.bias.data = module.bias.data.to(dtype)
    model.config.use_cache = False
    cap_scores(model)
    return model


def nothing_like(data: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What stands in a matrix's place that is not there: its shape, in the memory of one number, which is none.

    Whoever reads it gets no healthy loss.
    """
    value = math.nan if data.is_floating_point() else 0
    return torch.full((), value, dtype=data.dtype, device=device).expand(data.shape)


def empty_weights(model: nn.Module) -> Iterator[Weight]:
    """Every parameter of a model, and every buffer that its files have, that holds nothing yet; a tied one once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen or key in module._non_persistent_buffers_set:
                continue
            seen.add(id(tensor))
            packed = type(module).__name__ == "Linear4bit" and key == "weight"
            yield Weight(module, key, f"{path}.{key}" if path else key, tensor.dtype, packed)


def load_packed(folder: Path, compute: torch.dtype, device: torch.device) -> Any:
    """The 4-bit model of a folder, frozen matrices in 4 bits, all else in `compute`.

    None where a tensor of it is none of the files' (experts that are put together, say; or one was lost).
    """
    model, files = model_without_weights(folder, compute, packed=True), Checkpoint(folder, packed=True)
    weights = list(empty_weights(model))
    if not all(holds(files, weight) for weight in weights):
        return None
    fill(weights, files, device)
    model.tie_weights()
    return model.to(device)


def holds(files: Checkpoint, weight: Weight) -> bool:
    """Whether files have a weight, as large as it is."""
    name = files.find(weight.name)
    if name is None:
        return False
    if weight.packed:
        size: int = weight.module.out_features * weight.module.in_features
        return math.prod(files.shape(name)) == -(-size // 2)
    own = (*weight.module._parameters.items(), *weight.module._buffers.items())
    return files.shape(name) == tuple(dict(own)[weight.key].shape)


def check_held(files: Checkpoint, weights: Iterable[Weight], folder: Path, so: str, hint: str) -> None:
    """Raise BadInput, saying what follows from it, where files do not have all weights as large as they are."""
    if missing := [weight.name for weight in weights if not holds(files, weight)]:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise BadInput(folder, f"{some}: not in the files as the model has them, so {so}", hint)


def fill(weights: Iterable[Weight], files: Checkpoint, device: torch.device) -> None:
    """Give a model's weights what their files hold, each in its dtype."""
    for weight in weights:
        name = files.name_of(weight.name)
        if weight.packed:
            fill_packed(weight.module, files, name, device)
            continue
        value = read_as(files, name, weight.dtype).to(device)
        if weight.key in weight.module._buffers:
            weight.module._buffers[weight.key] = value
        else:
            weight.module._parameters[weight.key] = nn.Parameter(value, requires_grad=False)


def read_as(files: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in some dtype, cast a block of its rows at a time."""
    shape = files.shape(name)
    if not shape or files.dtype(name) == dtype:
        return files.read(name).to(dtype)
    found = torch.empty(shape, dtype=dtype)
    for rows in blocks(shape):
        found[rows] = files.read(name, rows)
    return found


def fill_packed(
    linear: Any, files: Checkpoint, name: str, device: torch.device, codes: torch.Tensor | None = None
) -> None:  # fmt: skip
    """Give a 4-bit Linear its matrix: statistics from the files, and codes, unless they are given."""
    from bitsandbytes import nn as layers

    kinds: Any = layers
    stats = {own.removeprefix(f"{name}."): files.read(own) for own in files.owner if own.startswith(f"{name}.")}
    linear._parameters["weight"] = kinds.Params4bit.from_prequantized(
        files.read(name) if codes is None else codes, stats, device=device, module=linear
    )
    multiply_in(linear, linear.compute_dtype)


def multiply_in(linear: Any, compute: torch.dtype) -> None:
    """Let a 4-bit Linear multiply in `compute`, with a backward pass.

    In eval mode bitsandbytes packs the weights for its AVX512-BF16 kernel, which has none: every layer below would get
    no gradient, and nothing would say so. Its backward pass unpacks to the dtype that was quantised.
    """
    linear.compute_dtype, linear.compute_type_is_set = compute, True
    if getattr(linear.weight, "quant_state", None) is not None:
        linear.weight.quant_state.dtype = compute
    linear.train()
