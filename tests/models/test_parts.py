"""Are layers, embedding, head and norms found in models of every family, and is each parameter in one unit?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from edgeft.errors import BadInput
from edgeft.models.loss import head_transform
from edgeft.models.parts import Parts, find_parts, is_linear, repeat_for_groups, units

LAYERS, WORDS = 3, 64
USUAL = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
UNGROUPED = {key: value for key, value in USUAL.items() if key != "num_key_value_heads"}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOE = {"num_experts_per_tok": 2}
# the path of the layers, the modules of the units "embedding", "norm" and "head", the config
FAMILIES: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    "Llama": ("model.layers", "model.embed_tokens", "model.norm", "lm_head", USUAL),
    "Mistral": ("model.layers", "model.embed_tokens", "model.norm", "lm_head", USUAL),
    "Qwen2": ("model.layers", "model.embed_tokens", "model.norm", "", USUAL | {"tie_word_embeddings": True}),
    "Qwen3": ("model.layers", "model.embed_tokens", "model.norm", "lm_head", USUAL | {"head_dim": 8}),
    "Gemma2": (
        "model.layers", "model.embed_tokens", "model.norm", "",
        USUAL | {"head_dim": 8, "final_logit_softcapping": 5.0},
    ),
    "Gemma3Text": ("model.layers", "model.embed_tokens", "model.norm", "", USUAL | {"head_dim": 8}),
    "Phi3": ("model.layers", "model.embed_tokens", "model.norm", "lm_head", USUAL),
    "GPT2": (
        "transformer.h", "transformer.wte transformer.wpe", "transformer.ln_f", "",
        {"vocab_size": WORDS, "n_embd": 32, "n_layer": LAYERS, "n_head": 4} | ENDS,
    ),
    "GPTJ": (
        "transformer.h", "transformer.wte", "transformer.ln_f", "lm_head",  # a head with a bias
        {"vocab_size": WORDS, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 8} | ENDS,
    ),
    "GPTNeoX": ("gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "lm_head", UNGROUPED),
    "OPT": (
        "model.decoder.layers", "model.decoder.embed_tokens model.decoder.embed_positions",
        "model.decoder.project_out model.decoder.project_in model.decoder.final_layer_norm", "",
        UNGROUPED | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    ),
    "Bloom": (
        "transformer.h", "transformer.word_embeddings", "transformer.word_embeddings_layernorm transformer.ln_f", "",
        {"vocab_size": WORDS, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4} | ENDS,
    ),
    # as many experts as layers
    "Mixtral": (
        "model.layers", "model.embed_tokens", "model.norm", "lm_head", USUAL | MOE | {"num_local_experts": LAYERS},
    ),
    "Qwen3Moe": (
        "model.layers", "model.embed_tokens", "model.norm", "lm_head",
        USUAL | MOE | {"num_experts": LAYERS, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    # hybrids: layers of two classes
    "Jamba": (
        "model.layers", "model.embed_tokens", "model.final_layernorm", "lm_head",
        USUAL | MOE | {"num_experts": LAYERS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4,
                       "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "Lfm2": (
        "model.layers", "model.embed_tokens", "model.embedding_norm", "",
        USUAL | {"layer_types": ["conv", "full_attention", "conv"]},
    ),
}  # fmt: skip


def modules_of(model: nn.Module, unit: list[tuple[str, nn.Parameter]]) -> set[str]:
    return {name.rpartition(".")[0] for name, _ in unit}


def check_partition(model: nn.Module, parts: Parts) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The units, each parameter in exactly one under its own name; a layer's are those that no earlier layer has."""
    found = units(model, parts)
    listed = [pair for unit in found.values() for pair in unit]
    assert len(listed) == len({parameter for _, parameter in listed})
    assert dict(listed) == dict(model.named_parameters())
    layers = [(stack, i) for stack in parts.stacks for i in range(len(stack.layers))]
    assert list(found)[: len(layers)] == [stack.unit(i) for stack, i in layers]
    assert set(list(found)[len(layers) :]) - {"other"} == {"embedding", "norm", "head"}
    earlier: set[nn.Parameter] = set()
    for stack, i in layers:
        own = set(stack.layers[i].parameters()) - earlier
        assert {parameter for _, parameter in found[stack.unit(i)]} == own
        assert type(stack.layers[i]).forward is not nn.Module.forward
        earlier |= own
    embedding = {parameter for _, parameter in found["embedding"]}
    assert set(parts.embedding.parameters()) <= embedding
    assert {parameter for _, parameter in found["head"]} == set(parts.head.parameters()) - embedding
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_a_family(family: str) -> None:
    """What was found computes the model's own logits, so it is the right body and the right head."""
    path, embedding, norm, head, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    parts: Any = find_parts(model)
    assert parts.layers_path == path and parts.layers is model.get_submodule(path) and len(parts.layers) == LAYERS
    assert [(stack.name, stack.layers) for stack in parts.stacks] == [("", parts.layers)]
    assert parts.embedding.weight.shape[0] == parts.head.weight.shape[0] == WORDS
    assert parts.tied is (parts.head.weight is parts.embedding.weight) is not bool(head)
    found = check_partition(model, parts)
    assert modules_of(model, found["embedding"]) == set(embedding.split())
    assert modules_of(model, found["norm"]) == set(norm.split())
    assert modules_of(model, found["head"]) == set(head.split())
    assert "other" not in found
    check_logits(model, parts)


def note_calls(parts: Parts) -> list[str]:
    """A list that every call of a layer appends the layer's key to."""
    seen: list[str] = []
    for stack in parts.stacks:
        for number, layer in enumerate(stack.layers):
            layer.register_forward_hook(lambda *_, stack=stack, number=number: seen.append(stack.unit(number)))
    return seen


def check_logits(model: Any, parts: Any) -> None:
    seen = note_calls(parts)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        hidden = parts.body(input_ids=ids, use_cache=False).last_hidden_state
        assert seen == [f"layer {number}" for number in range(LAYERS)]
        logits = parts.head(hidden)
        scale, softcap = head_transform(model.config)
        logits = softcap * torch.tanh(logits * scale / softcap) if softcap else logits * scale
        torch.testing.assert_close(logits, model(input_ids=ids, use_cache=False).logits)


def test_an_encoder_and_a_decoder() -> None:
    """Both stacks, each layer's parameters under its side; the tied table is embedding, learnt positions too."""
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3,
                              num_heads=4, decoder_start_token_id=0)
    )  # fmt: skip
    bart = transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=WORDS, d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=48,
                                decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4)
    )  # fmt: skip
    expected = {
        t5: ("encoder.block", "decoder.block", {"shared"}),
        bart: (
            "model.encoder.layers",
            "model.decoder.layers",
            {"model.shared", "model.encoder.embed_positions", "model.decoder.embed_positions"},
        ),
    }
    for model, (encoder, decoder, tables) in expected.items():
        parts = find_parts(model)
        assert [(s.name, s.path, len(s.layers)) for s in parts.stacks] == [
            ("encoder", encoder, 2),
            ("decoder", decoder, 3),
        ]
        assert (parts.layers_path, parts.layers, parts.tied) == (decoder, parts.stacks[1].layers, True)
        assert parts.body is model.get_decoder()
        found = check_partition(model, parts)
        assert list(found) == ["encoder layer 0", "encoder layer 1", "decoder layer 0", "decoder layer 1",
                               "decoder layer 2", "embedding", "norm", "head"]  # fmt: skip
        assert {name for name, _ in found["decoder layer 1"]} == {
            f"{decoder}.1.{name}" for name, _ in parts.layers[1].named_parameters()
        }
        assert modules_of(model, found["embedding"]) == tables
        assert found["head"] == []
        seen = note_calls(parts)
        ids = torch.arange(3, 15)[None]
        model(input_ids=ids, decoder_input_ids=ids)
        assert seen == list(found)[:5]


def test_a_head_that_is_given_as_its_embedding() -> None:
    """FSMT calls its decoder's table the output embedding; the linear module that makes the logits is the head."""
    sizes = {f"{side}_{what}": size for side in ("encoder", "decoder")
             for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    model = transformers.FSMTForConditionalGeneration(
        transformers.FSMTConfig(langs=["en", "ru"], src_vocab_size=WORDS, tgt_vocab_size=WORDS, d_model=32, **sizes)
    )
    assert isinstance(model.get_output_embeddings(), nn.Embedding)
    parts = find_parts(model)
    assert parts.head is model.model.decoder.output_projection
    check_partition(model, parts)


def test_an_encoder() -> None:
    """A tied head keeps its own bias; its transform is neither embedding nor head."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**UNGROUPED))
    parts = find_parts(model)
    assert (parts.layers_path, parts.body, parts.tied) == ("bert.encoder.layer", model.bert, True)
    found = check_partition(model, parts)
    tables = {f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")}
    assert modules_of(model, found["embedding"]) == tables
    assert modules_of(model, found["norm"]) == {
        "bert.embeddings.LayerNorm",
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
    }
    assert [name for name, _ in found["head"]] == ["cls.predictions.bias"]


# a model whose code comes with its checkpoint


class GlmBlock(nn.Module):
    """One layer, with what a layer of this test needs: attention has no part in where it is found."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.mlp(self.input_layernorm(hidden))


class GlmTransformer(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GlmBlock() for _ in range(count))
        self.final_layernorm = nn.LayerNorm(32)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return self.final_layernorm(hidden)


class GlmModel(nn.Module):
    """ChatGLM's names: embedding, encoder and even the head lie in what gives the hidden states."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embedding = nn.Module()
        self.embedding.word_embeddings = nn.Embedding(config.padded_vocab_size, 32)
        self.encoder = GlmTransformer(config.num_layers)
        self.output_layer = nn.Linear(32, config.padded_vocab_size, bias=False)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        hidden = self.encoder(self.embedding.word_embeddings(input_ids))
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden)


class GlmConfig(transformers.PretrainedConfig):
    model_type = "chatglm-like"

    def __init__(self, num_layers: int = LAYERS, padded_vocab_size: int = WORDS, **rest: Any) -> None:
        self.num_layers, self.padded_vocab_size = num_layers, padded_vocab_size
        super().__init__(**rest)


class PlainConfig:
    """Not even transformers' config."""

    def __init__(self) -> None:
        self.num_layers, self.padded_vocab_size = LAYERS, WORDS


def glm_forward(self: Any, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
    logits = self.transformer.output_layer(self.transformer(input_ids).last_hidden_state)
    return transformers.modeling_outputs.CausalLMOutput(logits=logits)


class GlmForCausalLM(transformers.PreTrainedModel):
    config_class = GlmConfig
    forward = glm_forward

    def __init__(self, config: GlmConfig) -> None:
        super().__init__(config)
        self.transformer = GlmModel(config)


class PlainGlm(nn.Module):
    forward = glm_forward

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = GlmModel(config)


@pytest.mark.parametrize("make", [lambda: GlmForCausalLM(GlmConfig()), lambda: PlainGlm(PlainConfig())])
def test_a_model_with_names_of_its_own(make: Any) -> None:
    """No num_hidden_layers, no attribute_map, no get_input_embeddings or get_output_embeddings that answers."""
    model = make().eval()
    assert not hasattr(model.config, "num_hidden_layers")
    with pytest.raises((NotImplementedError, AttributeError)):
        model.get_input_embeddings()
    parts = find_parts(model)
    assert parts.layers_path == "transformer.encoder.layers"
    assert parts.embedding is model.transformer.embedding.word_embeddings
    assert (parts.head, parts.body, parts.tied) == (model.transformer.output_layer, model.transformer, False)
    found = check_partition(model, parts)
    assert modules_of(model, found["norm"]) == {"transformer.encoder.final_layernorm"}
    check_logits(model, parts)
    model.transformer.output_layer.weight = model.transformer.embedding.word_embeddings.weight
    parts = find_parts(model)
    assert parts.tied and parts.layers_path == "transformer.encoder.layers"
    assert check_partition(model, parts)["head"] == []


def test_a_model_without_a_head() -> None:
    model = transformers.LlamaModel(transformers.LlamaConfig(**USUAL))
    with pytest.raises(BadInput) as caught:
        find_parts(model)
    assert str(caught.value) == "LlamaModel: has no language-model head\n\nhint: use a ...ForCausalLM checkpoint"


def test_another_modality_is_a_unit_of_its_own() -> None:
    """Tower and projector are "other", so nothing that trains norms trains them; Git's tower is in the text model."""
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    git = transformers.GitForCausalLM(transformers.GitConfig(**UNGROUPED, vision_config=vision))
    found = check_partition(git, find_parts(git))
    assert {parameter for _, parameter in found["other"]} == set(git.git.image_encoder.parameters())
    config = transformers.Gemma3Config(text_config=USUAL | {"head_dim": 8}, vision_config=vision)
    model = transformers.Gemma3ForConditionalGeneration(config)
    found = check_partition(model, find_parts(model))
    assert modules_of(model, found["norm"]) == {"model.language_model.norm"}
    beside = {*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()}
    assert {parameter for _, parameter in found["other"]} == beside


def test_a_parameter_of_several_layers_is_of_the_first() -> None:
    """Zamba's attention layers share one block."""
    options = USUAL | {"num_hidden_layers": 8, "attention_head_dim": 16, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    config = transformers.ZambaConfig(**options, n_mamba_heads=2, attn_layer_period=3, attn_layer_offset=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    hybrids = [i for i, layer in enumerate(model.model.layers) if hasattr(layer, "shared_transf")]
    assert len(hybrids) >= 2
    found = check_partition(model, find_parts(model))
    first, second = hybrids[:2]
    shared = set(model.model.layers[first].shared_transf.parameters())
    assert shared == set(model.model.layers[second].shared_transf.parameters())
    assert shared <= {parameter for _, parameter in found[f"layer {first}"]}
    assert shared.isdisjoint({parameter for _, parameter in found[f"layer {second}"]})


# adapters


ADAPTERS = {
    "projections": {"target_modules": ["q_proj", "down_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("wraps", [True, False], ids=["get_peft_model", "inject_adapter_in_model"])
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_with_adapters(adapters: str, wraps: bool) -> None:
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**USUAL)).eval()
    layers, body = model.model.layers, model.model
    config = LoraConfig(r=2, init_lora_weights=False, **ADAPTERS[adapters])
    if wraps:
        model = get_peft_model(model, config).eval()
    else:
        inject_adapter_in_model(config, model)
    parts = find_parts(model)
    assert parts.layers_path == "base_model.model." * wraps + "model.layers"
    assert (parts.layers, parts.body) == (layers, body)
    found = check_partition(model, parts)
    unit_of = {name: unit for unit, pairs in found.items() for name, _ in pairs}
    assert {unit for name, unit in unit_of.items() if ".lora_" in name} == {
        *(f"layer {i}" for i in range(LAYERS)),
        *(["embedding"] if adapters == "embedding" else []),
    }
    assert {unit for name, unit in unit_of.items() if "lm_head" in name} == {"head"}
    check_logits(model, parts)


# every class of transformers


AUTO = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_TO_SEQ_CAUSAL_LM": transformers.AutoModelForSeq2SeqLM,
    "MASKED_LM": transformers.AutoModelForMaskedLM,
    "IMAGE_TEXT_TO_TEXT": transformers.AutoModelForImageTextToText,
}
# Not lists of layers, or two that take turns: nothing here is to be trained layer by layer without further thought.
REFUSED = {
    "CAUSAL_LM": {
        "blt": "four transformers over bytes and patches, no one layer count",
        "hrm_text": "two stacks of equal length that take turns",
        "xlm": "attentions and MLPs in a list each",
    },
    "SEQ_TO_SEQ_CAUSAL_LM": {},
    "MASKED_LM": {
        "albert": "one layer that runs 12 times",
        "flaubert": "attentions and MLPs in a list each",
        "funnel": "blocks of lists, then a decoder",
        "perceiver": "one list that runs several times, no layer count",
        "xlm": "attentions and MLPs in a list each",
    },
    "IMAGE_TEXT_TO_TEXT": {
        "idefics": "cross-attention layers in a list of equal length",
        "pi0": "two language models, no one layer count",
    },
}
FAST = (
    "apertus", "bart", "bert", "biogpt", "cohere2", "cpmant", "ctrl", "deepseek_v3", "falcon", "falcon_h1", "gemma3",
    "gemma3n_text", "git", "glm4", "gpt_bigcode", "gpt_oss", "granitemoehybrid", "longcat_flash", "mamba2", "mpt",
    "nemotron_h", "olmo2", "phi4_multimodal", "recurrent_gemma", "rwkv", "xglm", "zamba2",
)  # fmt: skip
# a forward pass cannot tell of these
UNSEEN = {
    "mllama": "its cross-attention layers are passed over without an image",
    "squeezebert": "it calls layer.forward, past the hooks",
}
# what a config class has no usable default of
NEEDS: dict[str, dict[str, Any]] = {
    "dots1": {"num_key_value_heads": 32, "n_routed_experts": 4, "n_shared_experts": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
}
SMALL = (
    (r"^(num_hidden_layers|n_layers?|num_layers|num_(en|de)coder_layers|(en|de)coder_layers|depth|layers)$", 4),
    (r"vocab_size", 96),
    (r"(pad|bos|eos|start|end|sep|cls)_token_id$", 1),
    (r"experts_per_tok|top_?k$", 2),
    (r"experts", 4),
    (r"heads|n_head", 4),
    (r"head_dim|head_size|d_kv|rotary_dim", 16),
    (r"lora_rank", 16),
    (r"hidden_size$|d_model|n_embd$|embed_dim$|embedding_size|^dim$|hidden_dim$|model_dim$", 64),
    (r"intermediate|ffn|n_inner|d_ff|d_inner|ff_dim", 64),
    (r"max_position|n_positions|max_seq_len", 128),
)


def shrunk(config: Any) -> dict[str, Any]:
    """The config's sizes made small, towers as deep as the text model; what is not a size stays."""
    small: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        nested = getattr(config, key, None)
        if isinstance(nested, transformers.PretrainedConfig):
            small[key] = shrunk(nested) | {"model_type": nested.model_type}
        elif type(value) is int and value > 4:
            sizes = [size for pattern, size in SMALL if re.search(pattern, key)]
            small |= {key: min(value, sizes[0])} if sizes else {}
    return small


def build(kind: str, model_type: str, tiny: bool, device: str = "meta") -> Any:
    config_class = transformers.CONFIG_MAPPING[model_type]
    needs = NEEDS.get(model_type, {}) if kind == ("MASKED_LM" if model_type == "esm" else "CAUSAL_LM") else {}
    config = config_class(**needs)
    if tiny:
        config = config_class(**shrunk(config))
    with torch.device(device):
        return AUTO[kind].from_config(config)


def runs_its_layers(kind: str, model_type: str) -> bool | None:
    """Whether a forward pass calls the layers that are found, each once and in order; None when it cannot run."""
    try:
        if sum(parameter.numel() for parameter in build(kind, model_type, True).parameters()) > 2e7:
            return None
        torch.manual_seed(0)
        model = build(kind, model_type, True, "cpu").eval()
    except Exception:
        return None
    parts = find_parts(model)
    expected = [stack.unit(number) for stack in parts.stacks for number in range(len(stack.layers))]
    seen = note_calls(parts)
    inputs = {"input_ids": torch.arange(5, 21)[None], "use_cache": False}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    for known in (inputs, {key: value for key, value in inputs.items() if key != "use_cache"}):
        seen.clear()
        try:
            with torch.no_grad():
                model(**known)
        except Exception:
            continue
        return seen == expected
    return None


def sweep(kind: str, names: list[str], sizes: tuple[bool, ...] = (False, True)) -> Iterator[tuple[str, str, str]]:
    """(model type, outcome, reason) with the outcomes found, refused, wrong and not built."""
    for name in names:
        built = []
        reason = ""
        for tiny in sizes:
            try:
                built.append(build(kind, name, tiny))
            except Exception as problem:  # optional packages, configs without usable defaults
                reason = reason or f"{type(problem).__name__}: {' '.join(str(problem).split()):.90}"
        if not built:
            yield name, "not built", reason
            continue
        try:
            for model in built:
                check_partition(model, find_parts(model))
            yield name, "found", ""
        except BadInput as problem:
            yield name, "refused", problem.problem
        except Exception as problem:
            yield name, "wrong", f"{type(problem).__name__}: {problem}"


def test_classes_of_transformers_by_name() -> None:
    """Default configs on the meta device; small ones run. Git's and phi4's towers stand inside the text model."""
    outcomes = {name: (outcome, reason) for name, outcome, reason in sweep("CAUSAL_LM", list(FAST), (False,))}
    assert outcomes == {name: ("found", "") for name in FAST}
    runs = [runs_its_layers("CAUSAL_LM", name) for name in FAST]
    assert runs.count(False) == 0 and runs.count(True) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", AUTO)
def test_every_class_of_transformers(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers found and units a partition in every class that can be built, but for those refused with a reason."""
    names = list(getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES"))
    outcomes = {name: (outcome, reason) for name, outcome, reason in sweep(kind, names)}
    counts = Counter(outcome for outcome, _ in outcomes.values())
    runs = {name: runs_its_layers(kind, name) for name, (outcome, _) in outcomes.items() if outcome == "found"}
    tried = [result for result in runs.values() if result is not None]
    with capsys.disabled():
        print(f"\n{kind}: {dict(counts)}; ran {len(tried)}, of these through their layers in order {sum(tried)}")
        for name, (outcome, reason) in outcomes.items():
            if outcome != "found":
                print(f"  {name}: {outcome}: {reason}")
    built = len(names) - counts["not built"]
    assert counts["wrong"] == 0
    assert {name for name, (outcome, _) in outcomes.items() if outcome == "refused"} <= set(REFUSED[kind])
    if kind == "CAUSAL_LM":
        assert counts["found"] >= 0.95 * built
    assert {name for name, result in runs.items() if result is False} <= set(UNSEEN)
    assert len(tried) >= 0.5 * counts["found"]


# linear modules


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
