"""Models whose layers stay in their files say what whole ones say, bit for bit, whatever is done to their weights."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import checkpoint, some_ids
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from edgeft.models.checkpoint import load_plain
from edgeft.models.parts import find_parts
from edgeft.models.streamed import alter, load_streamed
from edgeft.targets.rounding import round_model
from edgeft.targets.target import load_target

INT4 = load_target("ort-int4")
IDS = torch.tensor([some_ids(30)])


def stored(folder: Path, dtype: torch.dtype, tied: bool = True) -> Path:
    load_plain(checkpoint(tied), dtype).save_pretrained(shutil.copytree(checkpoint(tied), folder))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_streamed_model_says_what_a_whole_one_does(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    folder = stored(tmp_path / "m", dtype, tied)
    whole, streamed = load_plain(folder), load_streamed(folder)
    assert torch.equal(logits(whole), logits(streamed))
    assert round_model(whole, INT4) == round_model(streamed, INT4) == 2 * 7 + (1 if tied else 2)
    assert torch.equal(logits(whole), logits(streamed))
    assert torch.equal(logits(whole), logits(streamed))  # what was rounded was not the file
    name = "model.layers.1.mlp.up_proj.weight"
    for model in (whole, streamed):
        alter(model, name, partial(torch.Tensor.mul_, other=1.5))
    assert torch.equal(logits(whole), logits(streamed))
    assert torch.equal(load_plain(folder, dtype).get_parameter(name), streamed.get_parameter(name))


def test_between_passes_layers_and_a_table_of_its_own_take_no_memory_of_theirs(tmp_path: Path) -> None:
    model = load_streamed(stored(tmp_path / "m", torch.bfloat16, tied=False))
    held: list[set[torch.dtype]] = []
    find_parts(model).layers[1].mlp.register_forward_pre_hook(
        lambda *_: held.append({each.dtype for each in find_parts(model).layers[0].parameters()})
    )
    logits(model)
    assert held == [{torch.bfloat16}]
    in_fp32 = {name for name, each in model.named_parameters() if each.dtype == torch.float32}
    assert in_fp32 == {"lm_head.weight", "model.norm.weight"}


def test_a_layer_that_fails_leaves_its_weights_in_the_file(tmp_path: Path) -> None:
    model = load_streamed(stored(tmp_path / "m", torch.bfloat16))
    layer = find_parts(model).layers[0]
    handle = layer.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    assert {each.dtype for each in layer.parameters()} == {torch.bfloat16}
    handle.remove()
    assert torch.equal(logits(model), logits(load_plain(tmp_path / "m")))


def test_other_families_too(tmp_path: Path) -> None:
    """An embedding that scales what it looks up, two kinds of layers, learnt positions, fused matrices."""
    small = {"vocab_size": 600, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    gemma = Gemma2Config(**small, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=16, sliding_window=8)  # fmt: skip
    gpt2 = GPT2Config(**small, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    for model in (Gemma2ForCausalLM(gemma), GPT2LMHeadModel(gpt2)):
        folder = tmp_path / type(model).__name__
        model.to(torch.bfloat16).save_pretrained(folder)
        assert torch.equal(logits(load_plain(folder)), logits(load_streamed(folder))), folder.name
