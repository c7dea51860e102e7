"""A tiny checkpoint of each family and the bundles made of it: made once a process, to be copied before a change."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import CHAT_TEMPLATE, EXAMPLE, SECTIONS, run, write_plan
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from edgeft.data.dataset import TextTokenizer
from edgeft.exporting.build import build_bundle
from edgeft.exporting.bundle import Bundle, GoldenInput
from edgeft.exporting.export import export
from edgeft.exporting.outputs import load_tuned
from edgeft.merging.merge import merge
from edgeft.progress import silent
from edgeft.targets.target import Target, load_target
from edgeft.training.result import TrainResult

DATA = SECTIONS / "valid.jsonl"
ROWS = [json.loads(line)["prompt"] for line in DATA.read_text(encoding="utf-8").splitlines()[:400]]
PROMPTS = [
    GoldenInput(text=ROWS[0]),
    GoldenInput(text="Größe: naïve 12.5%\n\n  → ünïcode <|im_start|> x"),
    GoldenInput(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": ROWS[1]}]),
]


@functools.cache
def workplace() -> Path:
    """One folder for the process."""
    folder = Path(tempfile.mkdtemp(prefix="edgeft bundles "))  # a path with a space, throughout
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def save_tokenizer(folder: Path, words: int = 600) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(ROWS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "model_max_length": 1e30,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer.get_vocab_size()


@functools.cache
def checkpoint(tied: bool = True) -> Path:
    """A random two-layer Llama; weights large enough for logits with clear winners."""
    folder = workplace() / ("tied" if tied else "untied")
    if folder.exists():  # asked for in another way of writing it
        return folder
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=tied, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@functools.cache
def bundle(name: str) -> Path:
    """The bundle of the tied checkpoint for a shipped target. Copy it before changing anything."""
    out = workplace() / f"bundle {name}"
    build_bundle(
        checkpoint(), load_target(name), out, prompts=PROMPTS, device_memory_bytes=2**30,
        device_bandwidth_bytes_per_second=1e9, input_sha256="ab" * 32, provenance={"merged": "cd" * 32},
    )  # fmt: skip
    return out


def loose(target: Target) -> Target:
    """Random weights of a few steps say little."""
    changes: dict[str, Any] = {
        "min_top1_agreement": 0.0, "max_mean_kl_nats": 9.0, "max_loss_increase_nats": 9.0,
        "max_exact_match_drop_points": 100.0, "max_gain_lost": 1e9,
    }  # fmt: skip
    return target.model_copy(update={"parity": target.parity.model_copy(update=changes)})


@functools.cache
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32).eval()


def torch_logits(ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return reference()(torch.tensor([ids])).logits[0].numpy()


def some_ids(count: int) -> list[int]:
    ids = [token for row in TextTokenizer(checkpoint()).encode(ROWS) for token in row]
    return ids[:count]


def script(
    folder: Path, *arguments: str, stdin: str | None = None, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """run.py of a bundle as a device starts it: as a script, without edgeft on the path."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(folder / "run.py"), *arguments], input=stdin, capture_output=True, text=True,
        stdin=subprocess.DEVNULL if stdin is None else None, cwd=cwd, env=kept | environment, check=False,
    )  # fmt: skip


def ctrl_c_as_usual() -> None:
    """A shell lets what it runs in the background ignore Ctrl-C, and so do the tests that it runs there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change bundle.json and make all its hashes right again, as one who exchanges a file on purpose."""
    manifest = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    change(manifest)
    for name, entry in manifest["files"].items():
        raw = (folder / name).read_bytes()
        entry.update(sha256=hashlib.sha256(raw).hexdigest(), size_bytes=len(raw))
    seal(folder, manifest)


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write bundle.json with the right hash of its own, and those of files as given."""
    manifest["self_sha256"] = "0" * 64
    blank = json.dumps(manifest)
    sealed = blank.replace(
        '"self_sha256": "' + "0" * 64, '"self_sha256": "' + hashlib.sha256(blank.encode()).hexdigest()
    )
    (folder / "bundle.json").write_text(sealed, encoding="utf-8")


SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama3": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "head_dim": 16, "tie_word_embeddings": True},
    "qwen2 yarn": {"model_type": "qwen2", "head_dim": 16, "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False},
    "gemma": {"model_type": "gemma"},
    "gemma2": {"model_type": "gemma2", "sliding_window": 16, "query_pre_attn_scalar": 32},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 16, "query_pre_attn_scalar": 32,
               "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "phi3": {"model_type": "phi3", "head_dim": 16, "resid_pdrop": 0.0},
}  # fmt: skip


@functools.cache
def model_folder(kind: str) -> Path:
    folder = workplace() / f"gguf {kind}"
    folder.mkdir()
    given = SHAPE | {"vocab_size": save_tokenizer(folder)} | MODELS[kind]
    if kind == "phi3":
        given.pop("head_dim")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):  # not all ones or zeros
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def to_the_device(tmp_path: Path, target: str, **settings: Any) -> None:
    """Train, merge, export, and compare the bundle's answers with the live model's."""
    trained = tmp_path / "train"
    run(write_plan(tmp_path, EXAMPLE, target=target, max_steps=3, learning_rate=2e-3, **settings), trained)
    merge(trained, tmp_path / "merged", wise_alpha=1.0, progress=silent)
    export(tmp_path / "merged", load_target(target), tmp_path / "bundle", device=None, progress=silent)
    made = Bundle.read(tmp_path / "bundle" / "bundle.json")
    live = load_tuned(trained, TrainResult.read(trained / "train.json"))
    assert made.golden
    for entry in made.golden:
        ids = list(entry.ids)
        for _ in entry.greedy_ids:
            with torch.no_grad():
                ids.append(int(live(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert ids[len(entry.ids) :] == entry.greedy_ids
    assert len({token for entry in made.golden for token in entry.greedy_ids}) > 4
