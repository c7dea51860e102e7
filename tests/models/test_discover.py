"""Is what `edgeft show layers` says of a config what the model is, to the byte, and is what it cannot tell refused?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors import safe_open
from tiny import CONFIGS, EXAMPLE
from typer.testing import CliRunner

from edgeft.cli import app
from edgeft.errors import BadInput
from edgeft.models.discover import Discovery, LayerGroup, discover, meta_model
from edgeft.reporting.terminal import layers_text

TINY = EXAMPLE
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
BERT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = BERT | {"num_key_value_heads": 2, "head_dim": 8}
LFM2 = LLAMA | {"layer_types": ["conv", "full_attention", "conv"]}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def save(folder: Path, config: Any) -> str:
    config.save_pretrained(folder)
    return str(folder)


def text(found: Discovery) -> list[list[str]]:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(layers_text(found))
    return [line.split() for line in capture.get().splitlines() if line.strip()]


def test_the_example_to_the_byte() -> None:
    """Every tensor of the checkpoint, which the meta model has not read, is in the count."""
    found = discover(str(TINY))
    with safe_open(TINY / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert found.total_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert (found.architecture, found.dtype, found.tied_head) == ("LlamaForCausalLM", "float16", True)
    [stack] = found.stacks
    layer = [tensor for name, tensor in tensors.items() if name.startswith("model.layers.3.")]
    assert (stack.name, stack.path, stack.num_layers) == ("", "model.layers", 8)
    assert stack.groups == (
        LayerGroup(
            first=0,
            last=7,
            module="LlamaDecoderLayer",
            parameters=sum(tensor.numel() for tensor in layer),
            bytes=sum(tensor.nbytes for tensor in layer),
        ),
    )
    assert {unit.name: (unit.modules, unit.bytes) for unit in found.units} == {
        "embedding": (("model.embed_tokens",), tensors["model.embed_tokens.weight"].nbytes),
        "norm": (("model.norm",), tensors["model.norm.weight"].nbytes),
    }


def configs() -> dict[str, Any]:
    t = transformers
    return {
        "llama": t.LlamaConfig(**LLAMA, dtype="bfloat16"),
        "lfm2": t.Lfm2Config(**LFM2),
        "t5": t.T5Config(**T5),
        "bart": t.BartConfig(
            vocab_size=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
        ),
        "bert": t.BertConfig(**BERT),
        "gemma3": t.Gemma3Config(text_config=LLAMA, vision_config=VISION | {"image_size": 16, "patch_size": 4}),
    }


@pytest.mark.parametrize(
    ("name", "architecture", "stacks"),
    [
        ("llama", "LlamaForCausalLM", [("", "model.layers", [(0, 2)])]),
        ("lfm2", "Lfm2ForCausalLM", [("", "model.layers", [(0, 0), (1, 1), (2, 2)])]),
        (
            "t5",  # the first layer of a side holds its position biases
            "T5ForConditionalGeneration",
            [("encoder", "encoder.block", [(0, 0), (1, 1)]), ("decoder", "decoder.block", [(0, 0), (1, 2)])],
        ),
        (
            "bart",  # whose decoder transformers also knows as a causal model
            "BartForConditionalGeneration",
            [("encoder", "model.encoder.layers", [(0, 1)]), ("decoder", "model.decoder.layers", [(0, 1)])],
        ),
        ("bert", "BertForMaskedLM", [("", "bert.encoder.layer", [(0, 2)])]),
        ("gemma3", "Gemma3ForConditionalGeneration", [("", "model.language_model.layers", [(0, 2)])]),
    ],
)
def test_kinds_of_models(name: str, architecture: str, stacks: list[Any], tmp_path: Path) -> None:
    """The class is the one for the config's kind, named in it or not; the units add up to the model."""
    config = configs()[name]
    found = discover(save(tmp_path / "unnamed", config))
    config.architectures = [architecture]
    assert discover(save(tmp_path / "named", config)) == found.model_copy(update={"model": str(tmp_path / "named")})
    assert found.architecture == architecture
    assert [(s.name, s.path, [(g.first, g.last) for g in s.groups]) for s in found.stacks] == stacks
    model = getattr(transformers, architecture)(config)
    bytes_each = 2 if name == "llama" else 4
    count = sum(parameter.numel() for parameter in model.parameters())
    assert (found.total_parameters, found.total_bytes) == (count, count * bytes_each)
    groups = [(g.last - g.first + 1, g) for s in found.stacks for g in s.groups]
    assert sum(n * g.parameters for n, g in groups) + sum(unit.parameters for unit in found.units) == count
    assert sum(n * g.bytes for n, g in groups) + sum(unit.bytes for unit in found.units) == found.total_bytes


def test_the_table(tmp_path: Path) -> None:
    t5 = text(discover(save(tmp_path / "t5", transformers.T5Config(**T5))))
    first = [line[:3] for line in t5[3:]]
    assert first == [
        ["encoder", "layer", "0"], ["encoder", "layer", "1"], ["decoder", "layer", "0"], ["decoder", "layers", "1-2"],
        ["embedding", "shared", "2.05k"], ["norm", "encoder.final_layer_norm", "64"], ["decoder.final_layer_norm"],
        ["head", "weight", "tied"],
    ]  # fmt: skip
    assert t5[6][3:] == ["decoder.block:", "T5Block", "11.4k", "each", "44.4", "KiB", "each"]
    hybrid = text(discover(save(tmp_path / "lfm2", transformers.Lfm2Config(**LFM2))))
    assert hybrid[3][:5] == ["layers", "0,", "2", "model.layers:", "Lfm2DecoderLayer"]
    assert hybrid[4][:4] == ["layer", "1", "model.layers:", "Lfm2DecoderLayer"]
    gemma = text(discover(save(tmp_path / "gemma3", configs()["gemma3"])))
    assert ["other", "model.vision_tower"] in [line[:2] for line in gemma] and ["model.multi_modal_projector"] in gemma
    bert = text(discover(save(tmp_path / "bert", transformers.BertConfig(**BERT))))
    assert bert[-2][:3] == ["head", "cls.predictions.bias", "64"] and bert[-1][:2] == ["weight", "tied"]


def test_the_verb(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False))
    done = CliRunner().invoke(app, ["show", "layers", folder, "--json"])
    assert done.exit_code == 0 and Discovery.model_validate_json(done.stdout) == discover(folder)
    shown = CliRunner().invoke(app, ["show", "layers", folder])
    assert shown.exit_code == 0 and "layers 0-2" in shown.stdout and "lm_head" in shown.stdout


def test_no_memory_is_taken_for_weights() -> None:
    model = meta_model(str(CONFIGS / "llama-3.1-8b"))
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}


def test_an_older_name_of_a_class_is_understood(tmp_path: Path) -> None:
    config = transformers.T5Config(**T5, architectures=["T5WithLMHeadModel"])
    assert discover(save(tmp_path, config)).architecture == "T5ForConditionalGeneration"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification has no language-model"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "ViTModel has no language-model head"),
        ({"model_type": "unheard_of"}, "transformers cannot build this model: The checkpoint you are trying to load"),
        ({"num_attention_heads": 5}, "transformers cannot build this model: "),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised: config.json does not tell"),
    ],
)
def test_what_cannot_be_told_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.LlamaConfig(**LLAMA))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput) as caught:
        discover(folder)
    assert caught.value.where == str(path) and caught.value.problem.startswith(message)


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
        )
    )
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(BadInput, match=r"transformers cannot build this model: The repository .* contains custom code"):
        discover(str(tmp_path))


def test_no_folder() -> None:
    with pytest.raises(BadInput, match="no such folder"):
        discover("/nowhere/at/all")
