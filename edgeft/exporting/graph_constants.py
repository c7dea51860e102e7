"""Does a bundle's graph compute with the numbers of the merged model: positions, norms, biases, heads, windows, caps?

What they must be comes from transformers' own modules of the merged config and from its tensors; what they are is read
out of model.onnx and genai_config.json. On a small model a wrong one of these can hide below the noise of activations
of 8 bits, so that running the bundle does not show it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgeft.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from edgeft.exporting.stored_codes import GraphFile

ATTENTION = "GroupQueryAttention"
NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "LayerNormalization",
         "SkipLayerNormalization")  # fmt: skip
NODE = re.compile(r"/model/layers\.(\d+)/")
NORM = re.compile(r"model\.layers\.(\d+)\.(\w+)\.weight")
BIAS = re.compile(r"model\.layers\.(\d+)\.(attn|mlp)\.(\w+)\.Add\.bias")
LAST_NORM = "final_norm_layernorm"  # the builder's name, as of one more layer
LAST_NORMS = ("model.norm.weight", "model.final_layernorm.weight")
BY_LENGTH = ("dynamic", "longrope")  # rotary tables that depend on how long a text is
NEAR = 1e-6  # relative: a number stored in fp32
HALF = 2.0**-10  # the same of fp16
TURN = 1e-6  # how far fp32 angles may be apart, per position


class Reference:
    """The merged model's modules, without weights, and its tensors."""

    def __init__(self, merged: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.config = AutoConfig.from_pretrained(merged).get_text_config(decoder=True)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(self.config)  # type: ignore[no-untyped-call]
        self.weights = Checkpoint(merged)
        self.norms = [
            module
            for _, module in self.model.named_modules()
            if type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
        ]
        self.attentions = [module for name, module in self.model.named_modules() if name.endswith(".self_attn")]

    @property
    def epsilon(self) -> float | None:
        """Of every norm; None where they differ."""
        found = {float(getattr(norm, "variance_epsilon", getattr(norm, "eps", math.nan))) for norm in self.norms}
        return found.pop() if len(found) == 1 else None

    @property
    def norm_offset(self) -> float:
        """What a norm adds to its weight: the output of one with a weight of zero says whether it is 1, as Gemma's."""
        norm = type(self.norms[-1])(2)
        with torch.no_grad():
            norm.weight.zero_()
            return float(norm(torch.ones(1, 2)).abs().max().round())

    def window(self, layer: int) -> int:
        """Positions that a layer sees; -1: all of them."""
        kinds = getattr(self.config, "layer_types", None)
        size = getattr(self.config, "sliding_window", None)
        if not size or (kinds and kinds[layer] != "sliding_attention"):
            return -1
        return int(size) if size < self.config.max_position_embeddings else -1

    def rotations(self, positions: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(cosines, sines) of the first positions; None where they depend on more than the position."""
        kind = (getattr(self.config, "rope_parameters", None) or {}).get("rope_type", "default")
        rotary = getattr(getattr(self.model, "model", None), "rotary_emb", None)
        if rotary is None or kind in BY_LENGTH:
            return None
        places = torch.arange(positions)[None]
        cos, sin = type(rotary)(self.config)(torch.zeros(1), places)
        half = cos.shape[-1] // 2
        return cos[0, :, :half], sin[0, :, :half]


def constant_problems(file: GraphFile, merged: Path) -> tuple[int, list[str]]:
    """(how many numbers and vectors were compared, what is wrong with any of them)."""
    reference = Reference(merged)
    found = [
        *_attentions(file, reference), *_epsilons(file, reference), *_rotary(file, reference),
        *_vectors(file, reference), *_session(file.folder, reference),
    ]  # fmt: skip
    return len(found), [problem for problem in found if problem]


def _number(place: str, what: str, given: float, wanted: float) -> str:
    near = abs(given - wanted) <= NEAR * abs(wanted)
    return "" if near else f"{place}: {what} is {given:g}, the model's {wanted:g}"


def _attentions(file: GraphFile, reference: Reference) -> Iterator[str]:
    rotated_inside = not any(node.op_type == "RotaryEmbedding" for node in file.nodes)
    for node in file.nodes:
        match = NODE.match(node.name)
        if node.op_type != ATTENTION or match is None or int(match[1]) >= len(reference.attentions):
            continue
        given = {attribute.name: attribute.f if attribute.type == 1 else attribute.i for attribute in node.attribute}
        layer, config = int(match[1]), reference.config
        module = reference.attentions[layer]
        head = getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads
        scale = head**-0.5
        size = given.get("local_window_size", -1)
        wanted = {
            "num_heads": (given.get("num_heads", 0), config.num_attention_heads),
            "kv_num_heads": (given.get("kv_num_heads", 0), config.num_key_value_heads),
            "scale": (given.get("scale", 0.0) or scale, getattr(module, "scaling", scale)),
            "softcap": (given.get("softcap", 0.0), getattr(config, "attn_logit_softcapping", None) or 0.0),
            "local_window_size": (
                size if size < config.max_position_embeddings else -1,
                reference.window(layer),
            ),
        }
        if rotated_inside and reference.rotations(1) is not None:
            wanted["do_rotary"] = (given.get("do_rotary", 0), 1)
        for what, (one, other) in wanted.items():
            yield _number(node.name, what, one, other)


def _epsilons(file: GraphFile, reference: Reference) -> Iterator[str]:
    if (wanted := reference.epsilon) is None:
        return
    for node in file.nodes:
        if node.op_type in NORMS:
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    yield _number(node.name, "epsilon", attribute.f, wanted)


def _rotary(file: GraphFile, reference: Reference) -> Iterator[str]:
    names = [name for name in ("cos_cache", "sin_cache") if name in file.tensors]
    tables = [torch.from_numpy(file.read(name).copy()) for name in names]
    rotations = reference.rotations(len(tables[0])) if len(tables) == 2 else None
    if rotations is None or len(reference.attentions) == 0:
        return
    for name, table, wanted in zip(names, tables, rotations, strict=True):
        if table.shape != wanted.shape:
            yield f"{name}: shape {tuple(table.shape)}, the model's {tuple(wanted.shape)}"
            continue
        slack = (HALF if table.dtype == torch.float16 else 1e-5) + TURN * torch.arange(len(table))[:, None]
        wrong = int((~((table.float() - wanted).abs() <= slack)).sum())
        yield f"{name}: {wrong} of {table.numel()} values are not those of the model's positions" if wrong else ""


def _vectors(file: GraphFile, reference: Reference) -> Iterator[str]:
    offset = reference.norm_offset if reference.norms else 0.0
    for name, tensor in file.tensors.items():
        if len(tensor.dims) != 1:
            continue
        wanted = _wanted(name, reference, offset)
        if wanted is None:
            continue
        given = torch.from_numpy(file.read(name).copy())
        near = HALF if given.dtype == torch.float16 else NEAR
        if given.shape != wanted.shape:
            yield f"{name}: {len(given)} values, merged {len(wanted)}"
            continue
        wrong = int((~((given.float() - wanted).abs() <= near * wanted.abs())).sum())
        yield f"{name}: {wrong} of {len(wanted)} values are others" if wrong else ""


def _wanted(name: str, reference: Reference, offset: float) -> torch.Tensor | None:
    """A vector of the graph, from the checkpoint; None where the names do not tell which it is."""

    weights = reference.weights
    if match := NORM.fullmatch(name):
        layer, kind = match.groups()
        ends = LAST_NORMS if kind == LAST_NORM else (f"layers.{layer}.{kind}.weight",)
        found = [each for each in weights.owner if each.endswith(ends)]
        return weights.read(found[0]).float() + offset if len(found) == 1 else None
    if match := BIAS.fullmatch(name):
        layer, block, leaf = match.groups()
        parts = [f"layers.{layer}.{BLOCKS[block]}.{part}.bias" for part in JOINED.get(leaf, (leaf,))]
        found = [each for part in parts for each in weights.owner if each.endswith(part)]
        return torch.cat([weights.read(each).float() for each in found]) if len(found) == len(parts) else None
    return None


def _session(folder: Path, reference: Reference) -> Iterator[str]:
    document: dict[str, Any] = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    decoder, config = document.get("decoder", {}), reference.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wanted = {
        "head_size": head, "hidden_size": config.hidden_size, "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers, "num_key_value_heads": config.num_key_value_heads,
    }  # fmt: skip
    for what, value in wanted.items():
        if what in decoder:
            yield _number("genai_config.json", what, decoder[what], value)
    yield _number("genai_config.json", "vocab_size", document["vocab_size"], config.vocab_size)


BLOCKS = {"attn": "self_attn", "mlp": "mlp"}  # the builder's names: transformers'
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
