"""Are layers, embedding and head found in models of many families, and is what is not unique refused?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.pytorch_utils import Conv1D

from edgeft.architectures import find_parts, is_linear, repeat_for_groups
from edgeft.errors import BadInput
from edgeft.loss import head_transform

LAYERS, WORDS = 3, 64
USUAL = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
UNGROUPED = {key: value for key, value in USUAL.items() if key != "num_key_value_heads"}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("model.layers", USUAL),
    "GPT2": ("transformer.h", {"vocab_size": WORDS, "n_embd": 32, "n_layer": LAYERS, "n_head": 4} | ENDS),
    "GPTNeoX": ("gpt_neox.layers", UNGROUPED),
    "OPT": ("model.decoder.layers", UNGROUPED | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "Qwen3": ("model.layers", USUAL | {"head_dim": 8}),
    "Gemma2": ("model.layers", USUAL | {"head_dim": 8, "final_logit_softcapping": 5.0}),
    "Phi3": ("model.layers", USUAL),
    "Bloom": (
        "transformer.h",
        {"vocab_size": WORDS, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4} | ENDS,
    ),
    "Mixtral": ("model.layers", USUAL | {"num_local_experts": LAYERS}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_a_family(family: str) -> None:
    """What was found computes the model's own logits, so it is the right body and the right head."""
    path, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    parts: Any = find_parts(model)
    assert parts.layers_path == path and parts.layers is model.get_submodule(path) and len(parts.layers) == LAYERS
    assert parts.embedding.weight.shape[0] == parts.head.weight.shape[0] == WORDS
    seen: list[int] = []
    for number, layer in enumerate(parts.layers):
        layer.register_forward_hook(lambda *_, number=number: seen.append(number))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        hidden = parts.body(input_ids=ids, use_cache=False).last_hidden_state
        assert seen == list(range(LAYERS))
        logits = parts.head(hidden)
        scale, softcap = head_transform(model.config)
        logits = softcap * torch.tanh(logits * scale / softcap) if softcap else logits * scale
        torch.testing.assert_close(logits, model(input_ids=ids).logits)


class Fake(nn.Module):
    """A model of named lists of layers, with what find_parts asks a causal LM for."""

    def __init__(self, head: nn.Module | None = None, **lists: nn.Module) -> None:
        super().__init__()
        text = SimpleNamespace(num_hidden_layers=2)
        self.config = SimpleNamespace(get_text_config=lambda decoder: text)
        self.body = nn.Module()
        for name, module in lists.items():
            setattr(self.body, name, module)
        self.head, self.embedding = head, nn.Embedding(5, 4)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_decoder(self) -> nn.Module:
        return self.body


def linears(count: int = 2) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(4, 4) for _ in range(count))


@pytest.mark.parametrize(
    ("lists", "found"),
    [
        ({}, "found 0: none"),
        ({"layers": linears(3)}, "found 0: none"),
        ({"layers": nn.ModuleList([nn.Linear(4, 4), nn.Conv1d(4, 4, 1)])}, "found 0: none"),
        ({"layers": nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])}, "found 0: none"),
        ({"left": linears(), "right": linears()}, "found 2: body.left, body.right"),
    ],
)
def test_layers_that_are_not_unique_are_refused(lists: dict[str, nn.Module], found: str) -> None:
    with pytest.raises(BadInput) as caught:
        find_parts(Fake(nn.Linear(4, 5), **lists))
    assert str(caught.value) == f"Fake: one list of 2 equal layers was expected, {found}"


def test_lists_inside_a_layer_and_of_other_lengths_are_no_candidates() -> None:
    layers = nn.ModuleList(nn.Module() for _ in range(2))
    for layer in layers:
        layer.experts = linears()
    model = Fake(nn.Linear(4, 5), layers=layers, other=linears(3), norms=nn.ModuleList([nn.LayerNorm(4)] * 2))
    parts = find_parts(model)
    assert (parts.layers_path, parts.layers) == ("body.layers", layers)
    assert (parts.body, parts.embedding, parts.head) == (model.body, model.embedding, model.head)


def test_a_model_without_a_head() -> None:
    with pytest.raises(BadInput) as caught:
        find_parts(Fake(None, layers=linears()))
    assert str(caught.value) == "Fake: has no language-model head\n\nhint: use a ...ForCausalLM checkpoint"


class Linear4bit(nn.Module):
    """Named as bitsandbytes' module, which is no nn.Linear to a machine without bitsandbytes."""


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 3), True),
        (Conv1D(3, 2), True),
        (Linear4bit(), True),
        (nn.Embedding(2, 3), False),
        (nn.Conv1d(2, 3, 1), False),
        (nn.LayerNorm(2), False),
    ],
)
def test_what_adapters_can_sit_on(module: nn.Module, expected: bool) -> None:
    assert is_linear(module) is expected


# attention


@pytest.mark.parametrize("key_value_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["causal", "mask", "one query", "not causal"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_repeated_heads_are_grouped_query_attention(key_value_heads: int, mode: str, scaling: float | None) -> None:
    generator = torch.Generator().manual_seed(3)
    asked = 1 if mode == "one query" else 6
    query = torch.randn(2, 8, asked, 16, generator=generator)
    key, value = (torch.randn(2, key_value_heads, 6, 16, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, asked, 6, generator=generator) if mode == "mask" else None
    is_causal = False if mode == "not causal" else None
    output, weights = repeat_for_groups(
        nn.Module(), query, key, value, mask, scaling=scaling, is_causal=is_causal, sliding_window=None
    )
    expected = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mode == "causal", scale=scaling, enable_gqa=True
    )
    assert weights is None and output.is_contiguous() and output.shape == (2, asked, 8, 16)
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_it_serves_a_transformers_model_as_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register("test_repeat", repeat_for_groups)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**USUAL)).eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids).logits
        model.set_attn_implementation("test_repeat")
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
