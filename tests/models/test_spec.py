"""Are the shape and parameter counts read from config.json those of the model that transformers builds?"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import pytest
import torch
from tiny import CONFIGS, ROOT
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from edgeft.errors import BadInput
from edgeft.models.families import FAMILIES
from edgeft.models.parts import find_parts
from edgeft.models.spec import ModelSpec, read_model_spec

# One of each family and shape against the model itself; the rest against the published counts below.
PUBLISHED = (
    "gemma-2-2b", "gemma-2b", "gemma-3-1b", "gemma-3-4b", "gpt2", "granite-3.0-2b", "llama-3.1-8b", "mistral-7b",
    "mistral-nemo-12b", "opt-125m", "opt-350m", "phi-3-mini", "phi-4-mini", "pythia-160m", "qwen2.5-0.5b",
    "qwen2.5-1.5b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-8b", "smollm2-135m", "smollm3-3b",
)  # fmt: skip
# Sums over the published safetensors (a tied head once), as the table beside the configs names them.
TOTALS = {
    name: int(count.replace(",", ""))
    for name, count in re.findall(r"^\| ([\w.-]+) \| ([\d,]+) \|", (CONFIGS / "README.md").read_text(), re.M)
}

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "pad_token_id": 0,
}
GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 40}
NEOX = LLAMA | {"model_type": "gpt_neox", "hidden_act": "gelu_new"}
OPT = {key: LLAMA[key] for key in LLAMA if key != "intermediate_size"} | {"model_type": "opt", "ffn_dim": 160}
TINY: dict[str, dict[str, Any]] = {
    "llama defaults": {key: LLAMA[key] for key in LLAMA if key != "num_key_value_heads"},
    "llama null heads": LLAMA | {"num_key_value_heads": None, "head_dim": None},
    "llama biased, tied": LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama head_dim": LLAMA | {"head_dim": 24},
    "llama ignores": LLAMA | {"sliding_window": 8, "enable_bias": False, "final_logit_softcapping": 3.0},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": None, "attention_bias": True},
    "mistral default heads": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    | {"model_type": "mistral", "num_attention_heads": 16},
    "qwen2": LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "attention_bias": False},
    "qwen3": LLAMA | {"model_type": "qwen3"},
    "qwen3 biased": LLAMA | {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    "gemma": LLAMA | {"model_type": "gemma"},
    "gemma2": LLAMA | {"model_type": "gemma2", "attention_bias": True, "head_dim": 32},
    "gemma2 no caps": LLAMA | {"model_type": "gemma2", "attn_logit_softcapping": None, "hidden_act": "silu"},
    "gemma3": LLAMA | {"model_type": "gemma3_text", "hidden_activation": "gelu", "sliding_window": 32},
    "phi3": LLAMA | {"model_type": "phi3", "tie_word_embeddings": True},
    "smollm3": LLAMA | {"model_type": "smollm3"},
    "smollm3 biased": LLAMA | {"model_type": "smollm3", "attention_bias": True, "mlp_bias": True},
    "granite": LLAMA | {"model_type": "granite", "attention_bias": True, "mlp_bias": True},
    "gpt2": GPT2,
    "gpt2 n_inner, untied": GPT2 | {"n_inner": 100, "tie_word_embeddings": False},
    "gpt2 ignores": GPT2 | {"num_key_value_heads": 1, "head_dim": 3},
    "gpt2 relu": GPT2 | {"n_head": 2, "activation_function": "relu"},
    "gpt_neox": NEOX,
    "gpt_neox no bias": NEOX | {"attention_bias": False, "tie_word_embeddings": True},
    "opt": OPT,
    "opt no bias": OPT | {"enable_bias": False, "tie_word_embeddings": False},
    "opt projected": OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
}
UNKNOWN: dict[str, dict[str, Any]] = {
    "bloom": {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100},
    "falcon": LLAMA | {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": False},
    "stablelm": LLAMA | {"model_type": "stablelm", "qk_layernorm": False, "use_qkv_bias": True},
    "olmo2": LLAMA | {"model_type": "olmo2"},
    "gptj": GPT2 | {"model_type": "gptj", "rotary_dim": 4},
    "gpt2 cross attention": GPT2 | {"add_cross_attention": True},
    "opt no affine": OPT | {"layer_norm_elementwise_affine": False},
}


def save(folder: Path, config: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check_against_meta_model(spec: ModelSpec, folder: str, roles: bool = True) -> None:
    """Every part of the spec against the model that transformers builds from the same file."""
    config = AutoConfig.from_pretrained(folder).get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parts = find_parts(model)
    tied = parts.head.weight is parts.embedding.weight
    assert spec.architecture == type(model).__name__
    assert spec.model_type == config.model_type
    assert spec.total_parameters == count(model)
    assert spec.embedding_parameters == count(parts.embedding)
    assert spec.layer_parameters == tuple(count(layer) for layer in parts.layers)
    assert spec.head_parameters == (0 if tied else count(parts.head))
    assert spec.other_parameters == count(model) - count(parts.embedding) - spec.head_parameters - count(parts.layers)
    assert spec.tie_word_embeddings is tied

    layer = dict(parts.layers[0].named_modules())
    linears = {name: module for name, module in layer.items() if isinstance(module, torch.nn.Linear | Conv1D)}
    assert len(spec.linears) == len(linears)
    for linear in spec.linears:
        [module] = [m for name, m in linears.items() if f".{name}".endswith(f".{linear.name}")]
        shape = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        assert (linear.in_features, linear.out_features) == tuple(shape), linear.name
        assert linear.has_bias is (module.bias is not None), linear.name
        assert linear.parameters == count(module)
    norms = {name: module for name, module in layer.items() if "Norm" in type(module).__name__}
    assert spec.norm_parameters_per_layer == sum(count(norm) for norm in norms.values())
    assert spec.norms_per_layer + 2 * spec.qk_norm == len(norms)
    assert (
        sum(linear.parameters for linear in spec.linears) + spec.norm_parameters_per_layer == spec.layer_parameters[0]
    )

    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(spec, key) == getattr(config, key)
    if roles:
        kv = spec.num_key_value_heads * spec.head_dim
        widths = {
            role: sum(x.out_features for x in spec.linears if x.role == role) for role in ("attention_in", "mlp_in")
        }
        assert widths["attention_in"] == spec.num_attention_heads * spec.head_dim + 2 * kv
        assert widths["mlp_in"] == spec.intermediate_size * (2 if spec.gated_mlp else 1)
        assert [x.role for x in spec.linears].count("attention_out") == 1
        assert [x.role for x in spec.linears].count("mlp_out") == 1


def check_scalars(spec: ModelSpec, folder: str) -> None:
    config = AutoConfig.from_pretrained(folder).get_text_config()
    assert spec.max_position_embeddings == config.max_position_embeddings
    act = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    assert spec.hidden_act == getattr(config, "hidden_activation", act)
    assert spec.attn_logit_softcapping == (getattr(config, "attn_logit_softcapping", None))
    reads_caps = spec.model_type.startswith("gemma")
    assert spec.final_logit_softcapping == (getattr(config, "final_logit_softcapping", None) if reads_caps else None)
    reads_window = "sliding_window" in FAMILIES[spec.model_type].optional
    assert spec.sliding_window == (config.sliding_window if reads_window else None)
    reads_heads = "num_key_value_heads" in FAMILIES[spec.model_type].optional
    heads = config.num_key_value_heads if reads_heads else config.num_attention_heads
    assert spec.num_key_value_heads == heads


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shape_equals_meta_model(name: str) -> None:
    spec = read_model_spec(str(CONFIGS / name))
    assert spec.counted_from == "config"
    check_against_meta_model(spec, str(CONFIGS / name))
    check_scalars(spec, str(CONFIGS / name))


@pytest.mark.parametrize("name", TINY)
def test_tiny_shape_equals_meta_model(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, TINY[name])
    spec = read_model_spec(folder)
    assert spec.counted_from == "config"
    check_against_meta_model(spec, folder)
    check_scalars(spec, folder)


def test_every_family_is_tested() -> None:
    assert {config["model_type"] for config in TINY.values()} >= FAMILIES.keys() - {"gemma3_text"}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_family_is_counted_on_the_meta_device(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, UNKNOWN[name])
    spec = read_model_spec(folder)
    assert spec.counted_from == "meta model"
    if "cross" not in name:
        check_against_meta_model(spec, folder, roles=True)
    assert not {linear.role for linear in spec.linears} & {"other"}


# "ignores": keys that the family does not read, but that the general way of counting would.
@pytest.mark.parametrize("name", [name for name in TINY if "ignores" not in name])
def test_both_ways_of_counting_agree(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, TINY[name])
    by_config = read_model_spec(folder)
    monkeypatch.setattr("edgeft.models.spec.FAMILIES", {})
    by_model = read_model_spec(folder)
    assert by_model.counted_from == "meta model"
    differing = {"counted_from", "linears", "sliding_window", "final_logit_softcapping", "hidden_act"}
    assert by_model.model_dump(exclude=differing) == by_config.model_dump(exclude=differing)
    roles = {(x.name, x.in_features, x.out_features, x.has_bias, x.role) for x in by_config.linears}
    assert {(x.name, x.in_features, x.out_features, x.has_bias, x.role) for x in by_model.linears} == roles


@pytest.mark.parametrize("name", TOTALS)
def test_known_total(name: str) -> None:
    assert read_model_spec(str(CONFIGS / name)).total_parameters == TOTALS[name]


def test_every_config_has_a_published_total_and_a_source() -> None:
    """Each folder is a row of the table and each row a folder: dense and MoE, tied and untied, 0.1 to 72B."""
    assert sorted(TOTALS) == sorted(path.parent.name for path in CONFIGS.glob("*/config.json"))
    assert len(TOTALS) >= 28
    for line in (CONFIGS / "README.md").read_text().splitlines():
        if line.startswith("| ") and line.split(" | ")[0].removeprefix("| ") in TOTALS:
            source = line.split(" | ")[2].removesuffix(" |")
            assert re.fullmatch(r"\[([\w.-]+/[\w.-]+)\]\(https://huggingface\.co/\1\)", source), line


def test_roles_and_names_of_a_fused_family(tmp_path: Path) -> None:
    spec = read_model_spec(save(tmp_path, GPT2))
    rows = [(x.name, x.in_features, x.out_features, x.role) for x in spec.linears]
    assert rows == [
        ("c_attn", 48, 144, "attention_in"),
        ("attn.c_proj", 48, 48, "attention_out"),
        ("c_fc", 48, 192, "mlp_in"),
        ("mlp.c_proj", 192, 48, "mlp_out"),
    ]
    assert not spec.gated_mlp
    assert read_model_spec(str(CONFIGS / "phi-3-mini")).gated_mlp


def test_multimodal_config_is_read_as_its_text_part() -> None:
    spec = read_model_spec(str(CONFIGS / "gemma-3-4b"))
    assert (spec.model_type, spec.architecture) == ("gemma3_text", "Gemma3ForCausalLM")
    assert (spec.vocab_size, spec.num_attention_heads, spec.num_key_value_heads) == (262208, 8, 4)
    assert spec.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("extra", "dtype"),
    [
        ({}, "float32"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
    ],
)
def test_stored_dtype(extra: dict[str, str], dtype: str, tmp_path: Path) -> None:
    assert read_model_spec(save(tmp_path, LLAMA | extra)).dtype == dtype


def test_spec_survives_json() -> None:
    spec = read_model_spec(str(CONFIGS / "smollm2-135m"))
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


def refused(model: str) -> str:
    with pytest.raises(BadInput) as caught:
        read_model_spec(model)
    return str(caught.value)


def test_absent_folder(tmp_path: Path) -> None:
    hint = "\n\nhint: give the folder of a Hugging Face checkpoint (with config.json)"
    for model in (f"{tmp_path}/absent", "./absent", "build/t4/merged", "~/absent", "tests/absent"):
        assert refused(model) == f"{model}: no such folder{hint}"


def test_file_instead_of_folder(tmp_path: Path) -> None:
    save(tmp_path, LLAMA)
    path = tmp_path / "config.json"
    assert refused(str(path)) == f"{path}: is a file, not a folder\n\nhint: give the folder that holds it: {tmp_path}"


def test_folder_without_config(tmp_path: Path) -> None:
    hint = "give the folder of a Hugging Face checkpoint (with config.json)"
    assert refused(str(tmp_path)) == f"{tmp_path}: has no config.json\n\nhint: {hint}"


@pytest.mark.parametrize(
    ("base", "shown"), [("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"), (None, "an unnamed base")]
)
def test_adapter_folder(base: str | None, shown: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    hint = "give the base as the model, or merge the adapter into it first: edgeft merge FOLDER --base BASE"
    assert refused(str(tmp_path)) == f"{tmp_path}: is an adapter of {shown}, not a model\n\nhint: {hint}"


AGAIN = "\n\nhint: copy config.json again from where the model came from"
CAUSAL = (
    ", so not a causal language model\n\n"
    "hint: edgeft trains decoder-only models that predict the next token; give one of those"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{",
            "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)" + AGAIN,
        ),
        ("[]", "expected a JSON object, got list" + AGAIN),
        (
            "{}",
            'missing model_type\n\nhint: add the family, as in "model_type": "llama"; edgeft doctor FOLDER may know it',
        ),
        (
            {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2},
            "missing num_attention_heads\nmissing vocab_size" + AGAIN,
        ),
        ({"model_type": "gpt2", "n_embd": 48, "n_head": 4}, "missing n_layer\nmissing vocab_size" + AGAIN),
        (
            LLAMA | {"hidden_size": "64", "vocab_size": 0, "num_key_value_heads": True},
            "hidden_size: expected a positive whole number, got '64'\n"
            "vocab_size: expected a positive whole number, got 0\n"
            "num_key_value_heads: expected a positive whole number, got True" + AGAIN,
        ),
        (
            LLAMA | {"num_key_value_heads": 3},
            "hidden size 64, 4 heads and 3 key-value heads do not divide evenly" + AGAIN,
        ),
        ({"model_type": "gemma3", "text_config": 3}, "text_config: expected a JSON object, got int" + AGAIN),
        (LLAMA | {"hidden_act": 3}, "hidden_act: input should be a valid string, got 3"),
        (
            LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            (
                "is quantised (gptq); a merge needs the original-precision weights\n\n"
                "hint: give the checkpoint it was quantised from; "
                "edgeft doctor FOLDER says whether it can be unpacked"
            ),
        ),
        (
            {"model_type": "t5", "is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]},
            "t5 is an encoder-decoder" + CAUSAL,
        ),
        ({"model_type": "t5"}, "t5 is an encoder-decoder" + CAUSAL),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "bert is an encoder" + CAUSAL,
        ),
        (
            LLAMA | {"architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification is not a ...ForCausalLM" + CAUSAL,
        ),
        (
            {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 20},
            "MambaForCausalLM has no attention heads\n\nhint: edgeft plans attention models only",
        ),
        (
            LLAMA | {"model_type": "jamba", "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
            "its layers are of different kinds: JambaAttentionDecoderLayer, JambaMambaDecoderLayer\n\n"
            "hint: edgeft plans equal layers only",
        ),
    ],
)
def test_unusable_config(text: str | dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text if isinstance(text, str) else json.dumps(text))
    assert refused(str(tmp_path)) == f"{tmp_path / 'config.json'}: {message.replace('FOLDER', str(tmp_path))}"


def test_model_type_that_transformers_does_not_know(tmp_path: Path) -> None:
    message = refused(save(tmp_path, {"model_type": "lama", "architectures": ["LamaForCausalLM"]}))
    assert message.startswith(f"{tmp_path}/config.json: transformers cannot build this model: ")
    assert message.endswith("\n\nhint: known without transformers: " + ", ".join(FAMILIES))


def hub_error(kind: type[Exception]) -> Exception:
    """Hub errors want an HTTP response; the message is built without one here."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            huggingface_hub.errors.LocalEntryNotFoundError,
            (
                "no such folder, and the hub cannot be reached\n\n"
                "hint: go online, or give the folder of a model that is on this machine"
            ),
        ),
        (
            ConnectionError,
            (
                "no such folder, and the hub cannot be reached\n\n"
                "hint: go online, or give the folder of a model that is on this machine"
            ),
        ),
        (
            huggingface_hub.errors.RepositoryNotFoundError,
            (
                "no such folder, and no such model on the hub\n\n"
                "hint: check the spelling, or log in if it is private (hf auth login)"
            ),
        ),
        (
            huggingface_hub.errors.GatedRepoError,
            ("no such folder, and the hub model is gated\n\nhint: accept its licence there and log in (hf auth login)"),
        ),
        (
            huggingface_hub.errors.RemoteEntryNotFoundError,
            (
                "no such folder, and the hub model has no config.json\n\n"
                "hint: for an adapter or a GGUF file, give its base model"
            ),
        ),
    ],
)
def test_hub_id_that_cannot_be_read(error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise hub_error(error)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    for model in ("someone/model-1B", "somemodel"):
        assert refused(model) == f"{model}: {message}"
    shape = "configs/gpt2? (a shape to plan with, without weights)"
    assert refused("gpt2").endswith(shape) == ("cannot be reached" in message)


def test_hub_id_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, LLAMA)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda model, file, **_: f"{folder}/{file}")
    spec = read_model_spec("someone/model-1B")
    assert (spec.model, spec.hidden_size) == ("someone/model-1B", 64)


def test_known_family_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from edgeft.models.spec import read_model_spec; "
        f"read_model_spec({str(CONFIGS / 'llama-3.1-8b')!r}); "
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "[]\n"


def test_known_family_takes_milliseconds() -> None:
    start = time.perf_counter()
    read_model_spec(str(CONFIGS / "llama-3.1-8b"))
    assert time.perf_counter() - start < 0.1
