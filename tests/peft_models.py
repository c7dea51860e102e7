"""A live PEFT model of every kind of adapter, on tiny bases of three kinds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edgeft.models.checkpoint import load_plain

IDS = torch.arange(3, 60).reshape(3, 19)


def base_model(kind: str) -> Any:
    """A tiny model with random weights and biases: llama (untied), tied (a tied llama) or gpt2 (Conv1D, tied)."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, bos_token_id=0, eos_token_id=0,
                tie_word_embeddings=kind == "tied",
            )
        )  # fmt: skip
    shaken(model)
    return model.eval()


def shaken(model: torch.nn.Module, names: Callable[[str], bool] = lambda name: True, by: float = 0.3) -> None:
    """Move every parameter whose name fits by noise, so that a change is anywhere and large."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names(name):
                parameter += by * torch.randn(parameter.shape, generator=generator)


def _lora(**options: Any) -> Any:
    from peft import LoraConfig

    targets = options.pop("target_modules", ["q_proj", "v_proj", "down_proj", "c_attn", "c_fc"])
    return LoraConfig(r=options.pop("r", 3), lora_alpha=options.pop("lora_alpha", 5), target_modules=targets, **options)


def _other(name: str, **options: Any) -> Any:
    import peft

    return getattr(peft, name)(**options)


PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.v_proj": 5}, "alpha_pattern": {r"layers\.\d\.mlp\.down_proj": 11}}


EMBEDDED = {"target_modules": ["embed_tokens", "q_proj"]}


IA3 = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


# case: (base, adapter config); every parameter that trains is shaken, so that no part may be left out
TUNERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora": ("llama", _lora),
    "rslora": ("llama", lambda: _lora(use_rslora=True)),
    "patterns": ("llama", lambda: _lora(**PATTERNS)),
    "patterns rslora": ("llama", lambda: _lora(use_rslora=True, **PATTERNS)),
    "lora bias": ("llama", lambda: _lora(target_modules=["q_proj", "v_proj"], lora_bias=True)),
    "biases of all": ("llama", lambda: _lora(bias="all")),
    "biases of lora": ("gpt2", lambda: _lora(bias="lora_only")),
    "dora": ("llama", lambda: _lora(use_dora=True)),
    "dora rslora patterns": ("llama", lambda: _lora(use_dora=True, use_rslora=True, **PATTERNS)),
    "lora of embedding": ("llama", lambda: _lora(**EMBEDDED)),
    "dora of embedding": ("llama", lambda: _lora(use_dora=True, **EMBEDDED)),
    "lora of head": ("llama", lambda: _lora(target_modules=["lm_head", "up_proj"])),
    "mica": ("llama", lambda: _lora(init_lora_weights="mica")),
    "adalora": ("llama", lambda: _other("AdaLoraConfig", init_r=4, target_modules=["q_proj", "o_proj"], total_step=9)),
    "ia3": ("llama", lambda: _other("IA3Config", **IA3)),
    "tokens": ("llama", lambda: _lora(trainable_token_indices=[1, 95, 7])),
    "only tokens": ("llama", lambda: _other(
        "TrainableTokensConfig", token_indices=[0, 9], target_modules=["embed_tokens"])),
    "modules saved": ("llama", lambda: _lora(modules_to_save=["lm_head", "embed_tokens", "norm", "up_proj"])),
    "tied: lora": ("tied", _lora),
    "tied: tokens": ("tied", lambda: _lora(trainable_token_indices=[1, 95, 7])),
    "tied: lora of embedding": ("tied", lambda: _lora(**EMBEDDED)),
    "tied: lora of head": ("tied", lambda: _lora(target_modules=["lm_head", "q_proj"])),
    "tied: lora of both": ("tied", lambda: _lora(ensure_weight_tying=True, **EMBEDDED)),
    "tied: embedding saved": ("tied", lambda: _lora(modules_to_save=["embed_tokens"])),
    "tied: head saved": ("tied", lambda: _lora(modules_to_save=["lm_head"])),
    "tied: both saved as one": ("tied", lambda: _lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "gpt2: lora": ("gpt2", lambda: _lora(fan_in_fan_out=True)),
    "gpt2: square": ("gpt2", lambda: _lora(target_modules=["attn.c_proj"], fan_in_fan_out=True)),
    "gpt2: dora": ("gpt2", lambda: _lora(use_dora=True, fan_in_fan_out=True)),
    "gpt2: lora of head": ("gpt2", lambda: _lora(target_modules=["lm_head", "c_attn"])),
    "gpt2: embedding saved": ("gpt2", lambda: _lora(modules_to_save=["wte"], fan_in_fan_out=True)),
    "gpt2: adalora": ("gpt2", lambda: _other(
        "AdaLoraConfig", init_r=4, target_modules=["c_attn"], total_step=9, fan_in_fan_out=True)),
    "gpt2: ia3": ("gpt2", lambda: _other(
        "IA3Config", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True)),
}  # fmt: skip


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LOHA": ("LoHaConfig", {"r": 2}),
    "LOKR": ("LoKrConfig", {"r": 2}),
    "OFT": ("OFTConfig", {"oft_block_size": 8}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "VERA": ("VeraConfig", {"r": 4}),
    "HRA": ("HRAConfig", {"r": 4}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 20}),
    "LN_TUNING": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    "MISS": ("MissConfig", {"r": 4}),
    "C3A": ("C3AConfig", {"block_size": 16}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 20}),
    "SHIRA": ("ShiraConfig", {"r": 2}),
    "DELORA": ("DeloraConfig", {"r": 4}),
    "RANDLORA": ("RandLoraConfig", {"r": 4}),
    "VBLORA": ("VBLoRAConfig", {"r": 4, "num_vectors": 24, "vector_length": 8}),
    "ROAD": ("RoadConfig", {"group_size": 16}),
}


def peft_model(case: str, folder: Path, inject: bool = False) -> Any:
    """A live PEFT model of the case on the base in `folder`, everything that trains moved away from its start."""
    from peft import get_peft_model, inject_adapter_in_model

    config = TUNERS[case][1]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        model: Any = load_plain(folder)
        model = inject_adapter_in_model(config, model) if inject else get_peft_model(model, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    shaken(model, lambda name: name in trained and "lora_magnitude" not in name and "ranknum" not in name)
    shaken(model, lambda name: "lora_magnitude" in name, by=0.05)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return output
