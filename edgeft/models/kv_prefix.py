"""How does attention see trained keys and values before every text, and where are they kept?

A prefix (arXiv 2101.00190) is so many tokens that each layer has keys and values of, and nobody reads. The text's own
positions begin behind them, as behind any past. The model's cache holds the text alone: what is generated, masked and
scored goes on as without.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeft.errors import BadInput
from edgeft.models.cache_names import cache_in
from edgeft.models.families import family_of
from edgeft.models.parts import Parts, find_parts
from edgeft.settings.tuners import PREFIX

PEFT_KIND, PEFT_NAME = "PREFIX_TUNING", "prompt_embeddings"  # of an adapter that holds one, and its only tensor
ATTENTIONS = ("self_attn", "attn", "attention")  # what families call it
Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values, (heads, tokens, head_dim) each


class KeyValues(nn.Module):
    """Keys and values that one layer's attention sees before any text."""

    reads = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)


def before(own: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """A prefix's keys, or values, and those of a text (rows, heads, tokens, head_dim) behind them."""
    return torch.cat([own.to(text.dtype).expand(text.shape[0], -1, -1, -1), text], dim=2)


def attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
           attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
           is_causal: bool | None = None, repeats: bool = False, **_: object) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Scaled dot-product attention to a module's prefix and the text; (rows, tokens, heads, head_dim) and None.

    A whole text needs no mask: with as many empty queries before it as the prefix has keys, each token sees what is not
    behind it, and attention keeps its fastest kernel. `repeats`: key and value heads, as `parts.repeat_for_groups`.
    """
    past: Any = module._modules[PREFIX]
    if past.reads:  # a prompt (`soft_prompt`), before which nothing lies
        past.keep(key, value)
        tokens = 0
    else:
        tokens = past.keys.shape[1]
        key, value = before(past.keys, key), before(past.values, value)
    if repeats and (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    whole = attention_mask is None and query.shape[2] > 1
    if whole and tokens:
        query = nn.functional.pad(query, (0, 0, tokens, 0))
    elif attention_mask is not None:
        attention_mask = nn.functional.pad(attention_mask, (tokens, 0), value=attention_mask.dtype == torch.bool)
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, is_causal=whole,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    if whole and tokens:
        output = output[:, :, tokens:]
    return output.transpose(1, 2).clone(memory_format=torch.contiguous_format), None


def hang(model: Any, parts: Parts, pairs: Sequence[Pair]) -> None:
    """Put keys and values, a pair for each layer, before all that a model reads from now on."""
    for layer, (keys, values) in zip(parts.layers, pairs, strict=True):
        attention_of(layer).add_module(PREFIX, KeyValues(keys, values))
    tokens = pairs[0][0].shape[1]
    parts.body.register_forward_pre_hook(functools.partial(behind, tokens), with_kwargs=True)
    attend_with(model)


def attention_of(layer: nn.Module) -> nn.Module:
    """A decoder layer's attention. Raises BadInput where it has none by a known name."""
    found = next((layer._modules[name] for name in ATTENTIONS if name in layer._modules), None)
    if found is None:
        problem = f"{type(layer).__name__} has no attention of a known name that a prefix could lie in"
        raise BadInput("tuner", problem, "use tuner=lora")
    return found


def behind(tokens: int, body: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """A body's arguments with the text's positions behind the prefix."""
    positions = named.get("position_ids")
    if positions is None:
        ids = given[0] if given else named.get("input_ids")
        ids = named["inputs_embeds"] if ids is None else ids
        cache = cache_in(named)
        first = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
    return given, {**named, "position_ids": positions + tokens}


def attend_with(model: Any) -> None:
    """Make a transformers model attend by `attend`. Raises BadInput where it does not attend by torch's function."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    own = model.config.get_text_config(decoder=True)._attn_implementation
    if own not in ("sdpa", "edgeft_repeat", "edgeft_prefix", "edgeft_prefix_repeat"):
        raise BadInput("tuner", f"attention is {own!r}, which takes no keys from elsewhere", "use tuner=lora")
    repeats = own.endswith("repeat")
    name = "edgeft_prefix_repeat" if repeats else "edgeft_prefix"
    AttentionInterface.register(name, functools.partial(attend, repeats=repeats))
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


def pairs_of(parts: Parts) -> list[Pair]:
    """The keys and values before the text of every layer."""
    found: list[Any] = [attention_of(layer)._modules[PREFIX] for layer in parts.layers]
    return [(each.keys.detach(), each.values.detach()) for each in found]


def pairs_in(saved: torch.Tensor, layers: int, heads: int) -> list[Pair]:
    """The keys and values of every layer in PEFT's tensor (tokens, layers x (keys, values) x heads x head_dim)."""
    each = saved.float().view(len(saved), 2 * layers, heads, -1).permute(1, 2, 0, 3)
    return [(each[2 * layer], each[2 * layer + 1]) for layer in range(layers)]


def kept_name(layer: int, part: str) -> str:
    """The name in a kept file of a layer's `key` or `value`: the input of a graph that takes a past."""
    return f"past_key_values.{layer}.{part}"


def kept(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """Keys and values as they are kept: (1, heads, tokens, head_dim) in fp32, by the names of a graph's inputs."""
    return {
        kept_name(layer, part): tensor[None].float().contiguous()
        for layer, pair in enumerate(pairs)
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }


def hang_kept(model: Any, tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Hang on a model what a folder holds before its texts in `file`. Raises BadInput for what does not fit."""
    parts = find_parts(model)
    config = model.config.get_text_config(decoder=True)
    heads, width = kv_shape(config)
    try:
        pairs = [(tensors[kept_name(n, "key")][0], tensors[kept_name(n, "value")][0]) for n in range(len(parts.layers))]
        shapes = {tuple(tensor.shape) for pair in pairs for tensor in pair}
        if len(tensors) != 2 * len(pairs) or shapes != {(heads, pairs[0][0].shape[1], width)}:
            raise ValueError(f"keys and values of {len(tensors) / 2:g} layers, of {sorted(shapes)}")
        hang(model, parts, pairs)
    except (KeyError, ValueError, IndexError) as problem:
        raise BadInput(file, f"does not fit the model beside it: {problem}", "run edgeft merge again") from None
    for layer in parts.layers:
        attention_of(layer).get_submodule(PREFIX).requires_grad_(False)


def kv_shape(config: Any) -> tuple[int, int]:
    """(heads, width) of a model's keys and values, by what of its config its family reads."""
    queries, read = config.num_attention_heads, family_of(config.model_type).optional
    heads, width = (
        getattr(config, name, None) if name in read else None for name in ("num_key_value_heads", "head_dim")
    )
    return heads or queries, width or config.hidden_size // queries
