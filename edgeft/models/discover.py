"""Which layers, embeddings and head has this model, and how large is each, found without reading a weight?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from edgeft.documents import Strict
from edgeft.errors import BadInput
from edgeft.models.config_file import config_path
from edgeft.models.families import ENCODERS
from edgeft.models.parts import Units, find_parts, units
from edgeft.models.stacks import Stack

Outside = Literal["embedding", "norm", "head", "other"]
OUTSIDE: tuple[Outside, ...] = ("embedding", "norm", "head", "other")


class LayerGroup(Strict):
    """Layers `first` to `last` of a stack, equal in class and size; `parameters` and `bytes` are each layer's."""

    first: int
    last: int
    module: str
    parameters: int
    bytes: int


class FoundStack(Strict):
    """One stack of layers; `name` is "encoder" or "decoder" when the model has both, else ""."""

    name: str
    path: str
    num_layers: int
    groups: tuple[LayerGroup, ...]


class FoundUnit(Strict):
    """What lies outside the stacks, as `parts.units` divides it; `modules` own the parameters."""

    name: Outside
    modules: tuple[str, ...]
    parameters: int
    bytes: int


class Discovery(Strict):
    """A model's units. A parameter that several layers share counts in the first; bytes are those in the checkpoint."""

    model: str
    architecture: str
    dtype: str
    total_parameters: int
    total_bytes: int
    stacks: tuple[FoundStack, ...]
    units: tuple[FoundUnit, ...]
    tied_head: bool


def discover(model: str) -> Discovery:
    """The units of a checkpoint folder, or of a hub id while the hub or its cache has it. Raises BadInput.

    The model is built on the meta device from config.json: no weights are read and no memory is taken.
    """
    net = meta_model(model)
    parts = find_parts(net)
    found = units(net, parts)
    modules = _modules_of(found)
    everything = [pair for unit in found.values() for pair in unit]
    [(dtype, _)] = Counter(str(weight.dtype).removeprefix("torch.") for _, weight in everything).most_common(1)
    total, total_bytes = _size(everything)
    outside = []
    for name in OUTSIDE:
        if found.get(name):
            parameters, size = _size(found[name])
            outside.append(FoundUnit(name=name, modules=modules[name], parameters=parameters, bytes=size))
    return Discovery(
        model=model,
        architecture=type(net).__name__,
        dtype=dtype,
        total_parameters=total,
        total_bytes=total_bytes,
        stacks=tuple(
            FoundStack(
                name=stack.name, path=stack.path, num_layers=len(stack.layers), groups=tuple(_groups(stack, found))
            )
            for stack in parts.stacks
        ),
        units=tuple(outside),
        tied_head=parts.tied,
    )


def _groups(stack: Stack, found: Units) -> Iterator[LayerGroup]:
    sizes = [(type(layer).__name__, *_size(found[stack.unit(i)])) for i, layer in enumerate(stack.layers)]
    first = 0
    for (name, parameters, size), equal in groupby(sizes):
        last = first + len(list(equal)) - 1
        yield LayerGroup(first=first, last=last, module=name, parameters=parameters, bytes=size)
        first = last + 1


def _size(pairs: list[tuple[str, nn.Parameter]]) -> tuple[int, int]:
    """(parameters, bytes) of a unit."""
    return sum(p.numel() for _, p in pairs), sum(p.numel() * p.element_size() for _, p in pairs)


def _modules_of(found: Units) -> dict[str, tuple[str, ...]]:
    """For each unit the largest modules of which every parameter is in it."""
    units_in: dict[str, set[str]] = {}
    for unit, pairs in found.items():
        for name, _ in pairs:
            for prefix in _prefixes(name):
                units_in.setdefault(prefix, set()).add(unit)
    return {
        unit: tuple(
            dict.fromkeys(next(x for x in _prefixes(name) if units_in[x] == {unit}) for name, _ in pairs)  # in order
        )
        for unit, pairs in found.items()
    }


def _prefixes(name: str) -> Iterator[str]:
    return accumulate(name.split("."), "{}.{}".format)


def meta_model(model: str) -> nn.Module:
    """The language model that a config.json describes, without memory, in the dtype its weights are stored in.

    Raises BadInput for a model that transformers cannot build, has no language-model head or is quantised.
    """
    from transformers import AutoConfig

    path = config_path(model)
    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
        kind = _auto_class(path, config)
        with torch.device("meta"):
            net: nn.Module = kind.from_config(config)
    except BadInput:
        raise
    except Exception as problem:  # a model's code may raise anything here
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise BadInput(path, f"transformers cannot build this model: {reason:.200}") from None
    return net


def _auto_class(path: Path, config: Any) -> Any:
    """The AutoModelFor... that builds what config.architectures names, else the first that knows the config."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if getattr(config, "quantization_config", None):
        hint = "give the checkpoint it was quantised from"
        raise BadInput(path, "is quantised: config.json does not tell how its weights are stored", hint)
    causal = (transformers.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING)
    image = (transformers.AutoModelForImageTextToText, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    two_sided = (transformers.AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    masked = (transformers.AutoModelForMaskedLM, auto.MODEL_FOR_MASKED_LM_MAPPING)
    likely = two_sided if config.is_encoder_decoder else masked if config.model_type in ENCODERS else causal
    known = [pair for pair in (likely, causal, image, two_sided, masked) if type(config) in pair[1]]
    named = next(iter(config.architectures or ()), "")
    for kind, mapping in known:
        entry = mapping[type(config)]
        if named in {each.__name__ for each in (entry if isinstance(entry, tuple) else (entry,)) if each}:
            return kind
    if known and re.search(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForMaskedLM|^)$", named):
        return known[0][0]
    what = named or type(config).__name__
    raise BadInput(path, f"{what} has no language-model head", "use a ...ForCausalLM checkpoint")
