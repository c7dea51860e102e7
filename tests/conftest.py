"""Shared fixtures: a tiny real tokenizer and checkpoint, plans and a merge of it, and a writer of data files."""

from __future__ import annotations

import csv
import functools
import gc
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
from fast import heavy_names, light_tests
from tiny import CHAT_TEMPLATE, SECTIONS, WriteRows, run, write_plan

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


LIMIT_SECONDS = 300  # of one test; a slow one has twelve times as many


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="only tests that start no process, load no runtime, train nothing"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    fast = config.getoption("--fast") and collection_path.match("test_*.py")
    return True if fast and not light_tests(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        left = [item for item in items if getattr(item, "originalname", item.name) in heavy_names(item.path)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def within_limit(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that takes too long for a machine as busy as this one is, and what it waits for with it."""
    seconds = LIMIT_SECONDS * (12 if item.get_closest_marker("slow") else 1)

    start = time.monotonic()

    def late(number: int, frame: Any) -> None:
        shared = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # with how many others a core is shared
        if (left := seconds * shared - (time.monotonic() - start)) > 0:
            signal.setitimer(signal.ITIMER_REAL, left)
        else:
            pytest.fail(f"took more than {seconds * shared:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_frozen = 0  # of this process's modules, how many a collection need not look at


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logstart() -> None:
    """Leave what was imported out of collections: a look at it takes a third of a second, and a run asks for two."""
    global _frozen
    if len(sys.modules) > _frozen + 50:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


if hasattr(signal, "SIGALRM"):
    pytest_runtest_setup = pytest_runtest_call = pytest.hookimpl(wrapper=True)(within_limit)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer trained on the example data, with ChatML's special tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    with open(SECTIONS / "valid.jsonl", encoding="utf-8") as lines:
        texts = [" ".join(json.loads(line).values()) for line in lines]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with grouped-query attention and its tokenizer, as save_pretrained writes them."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Writes rows to tmp_path/name (.jsonl, .jsonl.gz, .csv) and gives its path; a str is a line as it is."""

    def write(name: str, rows: Iterable[Any]) -> Path:
        path = tmp_path / name
        if name.endswith(".csv"):
            rows = list(rows)
            with open(path, "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                for row in rows:
                    cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
                    writer.writerow(cells)
            return path
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


@pytest.fixture
def plan_file(checkpoint_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the plan of a job on ROWS and gives its path."""
    return functools.partial(write_plan, tmp_path, checkpoint_folder)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints of `peft_models.base_model` by their kind."""
    from peft_models import base_model

    folder = tmp_path_factory.mktemp("bases")
    for kind in ("llama", "tied", "gpt2"):
        base_model(kind).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in ("llama", "tied", "gpt2")}


@pytest.fixture(scope="session")
def merged_folder(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: Path) -> Path:
    """The merge of a trained adapter on the tiny untied model, beside its run, plan and rows. Not to be written to."""
    from edgeft.merging.merge import merge
    from edgeft.progress import silent

    folder = tmp_path_factory.mktemp("promotion")
    run(write_plan(folder, checkpoint_folder, epochs=8.0, learning_rate=1e-2), folder / "train")
    merge(folder / "train", folder / "merged", wise_alpha=1.0, progress=silent)
    return folder / "merged"


@pytest.fixture(autouse=True)
def children(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of edgeft are forked from one that has imported, see tests/warm.py; fast tests start none."""
    if request.config.getoption("--fast"):
        monkeypatch.setattr(subprocess.Popen, "__init__", started)
    elif request.node.get_closest_marker("cold") is None:
        import warm

        for name in warm.STARTING:
            monkeypatch.setattr(f"{name}.subprocess", warm.subprocess_for())


def started(self: Any, command: Any, *arguments: Any, **options: Any) -> None:
    pytest.fail(f"a fast test started a process: {command}")
