"""Where does a model keep its decoder layers, embedding and head? Found in its structure, not by its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeft.errors import BadInput


@dataclass(frozen=True)
class Parts:
    """The pieces of one causal LM. `body(input_ids=...)` gives the hidden states that `head` turns into logits."""

    body: nn.Module
    layers: nn.ModuleList
    layers_path: str
    embedding: nn.Module
    head: nn.Module


def find_parts(model: nn.Module) -> Parts:
    """The parts of a causal LM. Raises BadInput listing the candidates when the decoder layers are not unique.

    Decoder layers are the homogeneous ModuleList whose length is the text config's layer count.
    """
    causal: Any = model  # transformers' own methods, which nn.Module's type does not know
    config = causal.config.get_text_config(decoder=True)
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == config.num_hidden_layers
        and len({type(layer) for layer in module}) == 1
        and any(parameter.ndim > 1 for parameter in module.parameters())
        and not _inside_layer(name, model)
    }
    if len(candidates) != 1:
        found = ", ".join(candidates) or "none"
        wanted = f"one list of {config.num_hidden_layers} equal layers"
        raise BadInput(type(model).__name__, f"{wanted} was expected, found {len(candidates)}: {found}")
    path, layers = next(iter(candidates.items()))
    head, embedding = causal.get_output_embeddings(), causal.get_input_embeddings()
    if head is None or embedding is None:
        raise BadInput(type(model).__name__, "has no language-model head", "use a ...ForCausalLM checkpoint")
    return Parts(causal.get_decoder(), layers, path, embedding, head)


def units(model: nn.Module, parts: Parts) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Every parameter of a model in exactly one unit: "layer 0" and on, "embedding", "head", "norm" (what is left)."""
    found: dict[str, list[tuple[str, nn.Parameter]]] = {f"layer {i}": [] for i in range(len(parts.layers))}
    found |= {"embedding": [], "norm": [], "head": []}
    ends = {id(p): "head" for p in parts.head.parameters()}
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    ends |= {id(p): "embedding" for table in [*tables, parts.embedding] for p in table.parameters()}
    for name, parameter in model.named_parameters():
        if name.startswith(parts.layers_path + "."):
            unit = "layer " + name.removeprefix(parts.layers_path + ".").split(".")[0]
        else:
            unit = ends.get(id(parameter), "norm")
        found[unit].append((name, parameter))
    return found


def _inside_layer(name: str, model: nn.Module) -> bool:
    """Whether a ModuleList lies inside another one (experts of a layer, say)."""
    parents = name.split(".")[:-1]
    return any(isinstance(model.get_submodule(".".join(parents[:i])), nn.ModuleList) for i in range(1, len(parents)))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product that adapters can sit on: Linear, its 4-bit form, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit")


def repeat_for_groups(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                      attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
                      is_causal: bool | None = None, **_: object) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Scaled dot-product attention with key and value heads repeated; (B, S, heads, head_dim) and None.

    Before compute capability 8.0 grouped-query attention otherwise falls to the math kernel, whose S x S scores turn
    7.5 GiB into 12.9 at 4,096 tokens of an 8B model; the memory-efficient kernel needs equal head counts.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    causal = (is_causal if is_causal is not None else True) and attention_mask is None and query.shape[2] > 1
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, is_causal=causal
    )
    return output.transpose(1, 2).contiguous(), None


def repeat_groups(model: nn.Module) -> None:
    """Make a transformers model attend with `repeat_for_groups`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("edgeft_repeat", repeat_for_groups)
    AttentionMaskInterface.register("edgeft_repeat", sdpa_mask)
    causal: Any = model
    causal.set_attn_implementation("edgeft_repeat")
