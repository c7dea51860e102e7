"""Are the text model's layers found wherever they stand, and is what is not unique refused?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from torch import nn

from edgeft.errors import BadInput
from edgeft.models.stacks import find_stacks

WORDS = 11


class Block(nn.Module):
    """A layer with two weight matrices, `width` wide."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)


class OtherBlock(Block):
    """A layer of another class."""


class Toy(nn.Module):
    """Modules by dotted name beside `embedding`, and a config with numbers only: none of transformers' methods."""

    def __init__(self, embedding: str = "text.embedding", config: Any = None, **modules: nn.Module) -> None:
        super().__init__()
        self.config = config or SimpleNamespace(num_hidden_layers=2, vocab_size=WORDS)
        for name, module in {embedding: nn.Embedding(WORDS, 4), **modules}.items():
            parent: nn.Module = self
            *path, leaf = name.split("__" if "__" in name else ".")
            for step in path:
                if not hasattr(parent, step):
                    parent.add_module(step, nn.Module())
                parent = getattr(parent, step)
            parent.add_module(leaf, module)


def blocks(count: int = 2, kind: type[nn.Module] = Block) -> nn.ModuleList:
    return nn.ModuleList(kind() for _ in range(count))


def paths(model: nn.Module) -> list[tuple[str, str, int]]:
    return [(stack.name, stack.path, len(stack.layers)) for stack in find_stacks(model)]


# what is not unique


NONE = "the config says 2 for its layers; the lists of layers beside the token embedding: "
NONE_HINT = "\n\nhint: correct the number in config.json if it is wrong"
UNCLEAR = "it is not clear which list holds its layers: "


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, f"{NONE}none{NONE_HINT}"),
        ({"text__h": blocks(3)}, f"{NONE}text.h (3 Block){NONE_HINT}"),
        ({"text__h": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])}, f"{NONE}none{NONE_HINT}"),
        ({"text__h": nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])}, f"{NONE}none{NONE_HINT}"),
        (
            {"text__left": blocks(), "text__right": blocks()},
            f"{UNCLEAR}text.left (2 Block), text.right (2 Block)\n\nhint: report this model",
        ),
        (
            {"text__left": blocks(), "text__right": nn.ModuleList([Block(), OtherBlock()])},
            f"{UNCLEAR}text.left (2 Block), text.right (2 Block and OtherBlock)\n\nhint: report this model",
        ),
    ],
)
def test_layers_that_are_not_unique_are_refused(modules: dict[str, nn.Module], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        find_stacks(Toy(**modules))
    assert str(caught.value) == f"Toy: {message}"


def test_a_config_that_lies_about_its_layers_is_refused() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.config.num_hidden_layers = 5
    with pytest.raises(BadInput, match=r"the config says 5 for its layers; .*: model.layers \(3 LlamaDecoderLayer\)"):
        find_stacks(model)


def test_a_tower_is_not_taken_for_layers_that_the_config_lies_about() -> None:
    model = Toy(text__layers=blocks(3), tower__layers=blocks(2))
    with pytest.raises(BadInput, match=r"the config says 2 .* embedding: text.layers \(3 Block\)"):
        find_stacks(model)


def test_two_equal_lists_of_a_real_model_are_refused() -> None:
    """XLM keeps a layer's attention and its MLP in two lists: neither is the layers."""
    config = transformers.XLMConfig(vocab_size=64, emb_dim=32, n_layers=3, n_heads=4)
    with pytest.raises(BadInput, match=r"transformer.attentions \(3 MultiHeadAttention\), transformer.ffns"):
        find_stacks(transformers.XLMWithLMHeadModel(config))


def test_a_model_without_a_token_embedding_is_refused() -> None:
    model = Toy(text__layers=blocks())
    model.text.embedding = nn.Linear(4, 4)
    with pytest.raises(BadInput) as caught:
        find_stacks(model)
    assert str(caught.value) == "Toy: has no token embedding\n\nhint: use a language model"


# what is


def test_lists_inside_a_layer_and_small_ones_beside_are_no_candidates() -> None:
    """Experts as many as layers; norms, projections and small adapters as many as layers; other lengths."""
    layers = nn.ModuleList([Block(16), OtherBlock(16)])  # two classes: a hybrid
    for layer in layers:
        layer.experts = blocks()
    beside = {
        "text__norms": nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)]),
        "text__projections": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
        "text__adapters": blocks(),
        "text__predictors": blocks(3),
    }
    assert paths(Toy(text__blocks=layers, **beside)) == [("", "text.blocks", 2)]


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_one_layer(experts: int) -> None:
    layers = blocks(1)
    layers[0].experts = blocks(experts)
    config = SimpleNamespace(num_hidden_layers=1, vocab_size=WORDS)
    assert paths(Toy(config=config, text__layers=layers)) == [("", "text.layers", 1)]


def test_layers_in_a_sequential_and_in_a_model_in_a_list() -> None:
    config = SimpleNamespace(num_hidden_layers=2, vocab_size=WORDS)
    assert paths(Toy(text__layers=nn.Sequential(Block(), Block()))) == [("", "text.layers", 2)]
    whole = nn.ModuleList([Toy(text__layers=blocks(), config=config), Toy(text__layers=blocks(), config=config)])
    del whole[1].text.embedding
    model = Toy(models=whole, config=config)
    model.text.embedding = whole[0].text.embedding  # such a wrapper has to say where its embedding is
    assert paths(model) == [("", "models.0.text.layers", 2)]


def test_the_number_may_have_another_name() -> None:
    """LongCat's num_hidden_layers is twice its list's length; num_layers is the length."""
    for config in (
        SimpleNamespace(num_layers=2, vocab_size=WORDS),
        SimpleNamespace(num_hidden_layers=4, num_layers=2, vocab_size=WORDS),
        SimpleNamespace(num_hidden_layers=None, n_layer=2, layers_dropout=0.1, padded_vocab_size=WORDS),
    ):
        assert paths(Toy(text__layers=blocks(), config=config)) == [("", "text.layers", 2)]
        with pytest.raises(BadInput, match="it is not clear"):  # a number of who knows what: nothing else may be there
            find_stacks(Toy(text__layers=blocks(), text__others=blocks(3), config=config))


def test_a_tower_of_equal_length() -> None:
    """The nearer to the token embedding, the head's tied weight notwithstanding; else by its config."""
    towers = {"inner__tower__layers": blocks(), "inner__text__layers": blocks()}
    model = Toy("inner.text.embedding", **towers)
    model.head = nn.Linear(4, WORDS, bias=False)
    model.head.weight = model.inner.text.embedding.weight
    assert paths(model) == [("", "inner.text.layers", 2)]

    beside = Toy("embedding", tower__layers=blocks(), layers=blocks())  # equally near: both share the root with it
    with pytest.raises(BadInput, match="it is not clear"):
        find_stacks(beside)
    beside.tower.config = transformers.CLIPVisionConfig()
    assert paths(beside) == [("", "layers", 2)]


def test_the_embedding_of_the_words_is_told_from_larger_ones() -> None:
    """By the config's vocabulary; where it names none, the one with most rows is taken."""
    towers = {"tower__positions": nn.Embedding(50, 4), "tower__layers": blocks(), "text__layers": blocks()}
    assert paths(Toy(**towers)) == [("", "text.layers", 2)]
    unnamed = SimpleNamespace(num_hidden_layers=2)
    assert paths(Toy(config=unnamed, text__layers=blocks(), tower__positions=nn.Embedding(5, 4))) == [
        ("", "text.layers", 2)
    ]


def test_an_embedding_that_is_no_nn_embedding() -> None:
    config = transformers.IBertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    model = transformers.IBertForMaskedLM(config)
    assert not isinstance(model.get_input_embeddings(), nn.Embedding)
    assert paths(model) == [("", "ibert.encoder.layer", 3)]


LLAMA: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def image_text_configs() -> list[tuple[Any, str]]:
    """Every tower has as many layers as the text model."""
    t = transformers
    text = {**LLAMA, "head_dim": 8}
    qwen_vision = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    mllama = {**LLAMA, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    mllama_vision = {**VISION, "num_global_layers": 3, "attention_heads": 4, "vision_output_dim": 64}
    qwen = {**LLAMA, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
    return [
        (t.Gemma3Config(text_config=text, vision_config=VISION), "model.language_model.layers"),
        (
            t.LlavaConfig(text_config=t.LlamaConfig(**LLAMA), vision_config=t.CLIPVisionConfig(**VISION)),
            "model.language_model.layers",
        ),
        (t.Qwen2VLConfig(text_config=qwen, vision_config=qwen_vision), "model.language_model.layers"),
        (t.MllamaConfig(text_config=mllama, vision_config=mllama_vision), "model.language_model.layers"),
        (t.GitConfig(**LLAMA, vision_config=VISION), "git.encoder.layer"),
    ]


@pytest.mark.parametrize("number", range(5), ids=["gemma3", "llava", "qwen2_vl", "mllama", "git"])
def test_vision_towers_as_deep_as_the_text_model(number: int) -> None:
    config, path = image_text_configs()[number]
    model = transformers.AutoModelForImageTextToText.from_config(config)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 3]
    assert len(lists) >= 2  # the tower is as deep
    assert paths(model) == [("", path, 3)]


# an encoder and a decoder


class TwoSided(Toy):
    """A toy with `left` and `right` sides; `get_decoder` gives the one named `decoder`, or the whole for ""."""

    def __init__(self, decoder: str | None, **modules: nn.Module) -> None:
        config = SimpleNamespace(is_encoder_decoder=True, left_layers=2, right_layers=3, vocab_size=WORDS)
        super().__init__("left.embedding", config, right__embedding=nn.Embedding(WORDS, 4), **modules)
        self.decoder = decoder

    def get_decoder(self) -> nn.Module:
        if self.decoder is None:
            raise NotImplementedError
        return self.get_submodule(self.decoder)


@pytest.mark.parametrize(("decoder", "first"), [("right", "left"), ("left", "right"), ("", "left"), (None, "left")])
def test_two_sides_are_told_apart_by_the_decoder_or_by_their_order(decoder: str | None, first: str) -> None:
    sides = {"left": ("left.layers", 2), "right": ("right.layers", 3)}
    second = "right" if first == "left" else "left"
    model = TwoSided(decoder, left__layers=blocks(2), right__layers=blocks(3))
    assert paths(model) == [("encoder", *sides[first]), ("decoder", *sides[second])]


def test_a_side_that_is_not_unique_or_of_another_length_is_refused() -> None:
    with pytest.raises(BadInput, match=r"the config says 2, 3 for its layers; .*: right.layers \(4 Block\)"):
        find_stacks(TwoSided("right", left__layers=blocks(2), right__layers=blocks(4)))
    with pytest.raises(BadInput, match=r"not clear .*: left.layers \(2 Block\), left.more \(2 Block\)"):
        find_stacks(TwoSided("right", left__layers=blocks(2), left__more=blocks(2), right__layers=blocks(3)))


def test_an_encoder_that_reads_no_tokens_is_no_stack() -> None:
    t = transformers
    bert = t.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(t.ViTConfig(**VISION), bert)
    assert paths(t.VisionEncoderDecoderModel(config)) == [("", "decoder.bert.encoder.layer", 3)]


def test_sides_of_two_families() -> None:
    """Each side has a config of a class of its own, and is no tower: it embeds tokens."""
    t = transformers
    bert = t.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    gpt2 = t.GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4)
    model = t.EncoderDecoderModel(t.EncoderDecoderConfig.from_encoder_decoder_configs(bert, gpt2))
    assert paths(model) == [("encoder", "encoder.encoder.layer", 3), ("decoder", "decoder.transformer.h", 3)]


def test_sides_with_vocabularies_of_their_own() -> None:
    """FSMT's sides embed different languages; nothing is tied between them, and its decoder cannot be asked."""
    config = transformers.FSMTConfig(
        langs=["en", "ru"], src_vocab_size=40, tgt_vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=3,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    model = transformers.FSMTForConditionalGeneration(config)
    assert paths(model) == [("encoder", "model.encoder.layers", 2), ("decoder", "model.decoder.layers", 3)]


def test_a_part_with_the_models_own_config_is_no_tower() -> None:
    model = Toy("embedding", body__layers=blocks())
    model.body.config = model.config
    assert paths(model) == [("", "body.layers", 2)]
