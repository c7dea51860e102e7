"""LISA: the schedule is a pure function, what leaves is forgotten (or parked), and only what was visited moves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeft.engine.lisa import Lisa, draw, state_bytes
from edgeft.errors import BadInput, EdgeftError
from edgeft.models.parts import find_parts, units

POOL = tuple(f"layer {i}" for i in range(7))


def test_a_cycle_brings_each_unit_once_a_round() -> None:
    rounds = [[draw(POOL, 3, "cycle", (), 5, 3 * r + i) for i in range(3)] for r in range(4)]
    for one in rounds:
        assert sorted(unit for drawn in one for unit in drawn) == sorted(POOL)
        assert [len(drawn) for drawn in one] == [3, 3, 1]
    assert len({tuple(one) for one in rounds}) == 4, "every round is shuffled anew"


def test_uniform_draws_are_uniform_and_repeatable() -> None:
    draws = [draw(POOL, 2, "uniform", (), 1, i) for i in range(3500)]
    assert draws == [draw(POOL, 2, "uniform", (), 1, i) for i in range(3500)]
    counts = Counter(unit for drawn in draws for unit in drawn)
    assert all(abs(count - 1000) < 110 for count in counts.values()), counts  # 4 standard deviations of 26.7
    assert draws != [draw(POOL, 2, "uniform", (), 2, i) for i in range(3500)]


def test_weighted_draws_follow_the_weights() -> None:
    weights = (1.0, 1.0, 2.0, 4.0, 1.0, 1.0, 1e-6)
    counts = Counter(draw(POOL, 1, "weighted", weights, 0, i)[0] for i in range(5000))
    assert counts["layer 3"] / 5000 == pytest.approx(0.4, abs=0.03)
    assert counts["layer 2"] / 5000 == pytest.approx(0.2, abs=0.03)
    assert counts["layer 6"] == 0


def test_drawing_leaves_the_global_random_state_alone() -> None:
    import random

    before = random.getstate()
    draw(POOL, 2, "uniform", (), 0, 3)
    draw(POOL, 2, "cycle", (), 0, 3)
    assert random.getstate() == before


SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "gemma2": SMALL,
    "gemma3_text": {**SMALL, "sliding_window": 16},
    "phi3": SMALL,
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64, "eos_token_id": 1},
    "gpt_neox": {**SMALL, "tie_word_embeddings": True},
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 5, "n_head": 4},
    "glm": SMALL,
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "t5": {
        "decoder_start_token_id": 0,
        "vocab_size": 64,
        "d_model": 32,
        "d_ff": 64,
        "d_kv": 8,
        "num_layers": 3,
        "num_heads": 4,
    },
    "bert": {**SMALL},
}


def tiny(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(kind, **FAMILIES[kind])
    auto: Any = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForMaskedLM}.get(kind, AutoModelForCausalLM)
    torch.manual_seed(0)
    return auto.from_config(config).eval()


def rotation(model: Any, **options: Any) -> Lisa:
    found = units(model, find_parts(model))
    pool = tuple(unit for unit in found if "layer " in unit)
    return Lisa(found, pool, **{"count": 2, "interval": 3, **options})


def train(model: Any, lisa: Lisa, steps: int, first: int = 0, optimizer: Any = None) -> Any:
    """A plain loop, any loss the model itself has, any optimizer: nothing of edgeft but Lisa."""
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for _, p in lisa.parameters()], lr=1e-2)
    for step in range(first, first + steps):
        lisa.begin_step(step, optimizer)
        ids = torch.randint(2, 60, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        frozen = [n for n, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
        assert not frozen
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


@pytest.mark.parametrize("kind", FAMILIES)
def test_only_visited_units_change_and_optimizer_memory_stays(kind: str) -> None:
    model = tiny(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lisa = rotation(model, schedule="cycle", seed=3)
    lisa.start()
    optimizer = train(model, lisa, 5)  # two intervals: one unit or more stays unvisited
    visited, unvisited = set(lisa.steps), set(lisa.units) - set(lisa.steps)
    assert len(visited) == 4 and unvisited
    for unit, entries in lisa.units.items():
        moved = [not torch.equal(p, before[name]) for name, p in entries]
        if unit in visited:
            assert any(moved) and sum(moved) >= len(moved) / 2, unit
        else:
            assert not any(moved), f"{unit} was never drawn"
    active = [p for _, p in lisa.parameters()]
    assert {id(p) for p in optimizer.state} == {id(p) for p in active}
    assert state_bytes(optimizer) == sum(2 * p.nbytes for p in active if p in optimizer.state)


def test_optimizer_bytes_are_the_same_at_every_switch() -> None:
    model = tiny("llama")
    lisa = rotation(model, schedule="uniform")
    lisa.start()
    optimizer = train(model, lisa, 30)
    sizes = {*lisa.optimizer_bytes, state_bytes(optimizer)}
    per_layer = sum(p.nbytes for _, p in lisa.units["layer 0"])
    assert len(lisa.optimizer_bytes) >= 6 and sizes == {2 * 2 * per_layer}


def test_nothing_below_the_lowest_trained_layer_sees_autograd() -> None:
    model = tiny("llama")
    parts = find_parts(model)
    lisa = rotation(model, schedule="uniform", count=1, interval=1, seed=4)
    lisa.start()
    seen: list[bool] = []
    for layer in parts.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    optimizer = torch.optim.AdamW([p for _, p in lisa.parameters()])
    for step in range(6):
        lisa.begin_step(step, optimizer)
        seen.clear()
        model(input_ids=torch.tensor([[3, 4, 5]]))
        lowest = int(lisa.active[0].split()[1])
        assert seen == [i >= lowest for i in range(5)]


def test_switching_inside_gradient_accumulation_is_refused() -> None:
    model = tiny("llama")
    lisa = rotation(model, interval=1)
    lisa.start()
    optimizer = torch.optim.AdamW([p for _, p in lisa.parameters()])
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    with pytest.raises(EdgeftError, match="lisa: layers would switch at step 1 while gradients are accumulating"):
        lisa.begin_step(1, optimizer)


def test_there_is_no_extra_switch_at_the_start() -> None:
    model = tiny("llama")
    lisa = rotation(model, interval=4)
    lisa.start()
    optimizer = torch.optim.AdamW([p for _, p in lisa.parameters()])
    assert [lisa.begin_step(step, optimizer) for step in range(9)] == [step in (4, 8) for step in range(9)]


def test_a_parked_state_comes_back_and_a_dropped_one_does_not(tmp_path: Path) -> None:
    model = tiny("llama")
    found: dict[str, dict[str, Any]] = {}
    for state in ("park", "drop"):
        lisa = rotation(model, count=5, interval=1, state=state, folder=tmp_path / state)
        lisa.pool, lisa.count = lisa.pool[:2], 1  # two layers in turn
        lisa.start()
        optimizer = torch.optim.AdamW([p for _, p in lisa.parameters()], lr=1e-3)
        history = []
        for step in range(8):
            lisa.begin_step(step, optimizer)
            model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            history.append((lisa.active[0], float(next(iter(optimizer.state.values()))["step"])))
        found[state] = {unit: [count for name, count in history if name == unit] for unit, _ in history}
    for counts in found["park"].values():
        assert counts == [1.0, 2.0, 3.0, 4.0]
    assert all(
        count <= 2.0 for counts in found["drop"].values() for count in counts
    )  # twice in a row over a round's end


@pytest.mark.parametrize("schedule", ["uniform", "cycle"])
def test_going_on_from_a_state_is_going_on(schedule: str, tmp_path: Path) -> None:
    """Stopped in the middle of an interval, in another process as it were: bit for bit the same weights."""
    whole = tiny("llama")
    lisa = rotation(whole, schedule=schedule, state="park", folder=tmp_path / "whole")
    lisa.start()
    train(whole, lisa, 14)

    first = tiny("llama")
    lisa = rotation(first, schedule=schedule, state="park", folder=tmp_path / "first")
    lisa.start()
    optimizer = train(first, lisa, 8)
    kept = {name: p.detach().clone() for name, p in lisa.in_memory()}
    lisa.save_files(tmp_path / "files")
    state, moments = lisa.state_dict(), optimizer.state_dict()

    second = tiny("llama")
    again = rotation(second, schedule=schedule, state="park", folder=tmp_path / "second")
    again.start(8, state, tmp_path / "files")
    with torch.no_grad():
        for name, parameter in again.in_memory():
            parameter.copy_(kept[name])
    optimizer = torch.optim.AdamW([p for _, p in again.parameters()], lr=1e-2)
    optimizer.load_state_dict(moments)
    train(second, again, 6, first=8, optimizer=optimizer)
    for (name, expected), (_, value) in zip(whole.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(expected, value), name


def test_a_checkpoint_of_another_schedule_is_refused() -> None:
    model = tiny("llama")
    lisa = rotation(model)
    lisa.start()
    state = lisa.state_dict()
    with pytest.raises(EdgeftError, match=r"lisa: the checkpoint trained .* the plan"):
        rotation(tiny("llama"), seed=9).start(1, {**state, "seed": 0})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"count": 0}, "0 of 5 units every 3 steps cannot be drawn"),
        ({"count": 6}, "6 of 5 units every 3 steps cannot be drawn"),
        ({"interval": 0}, "2 of 5 units every 0 steps cannot be drawn"),
        ({"always": ("tail",)}, "units tail are not in the model"),
        ({"schedule": "weighted"}, "weighted draws need a positive weight for each of 5 units"),
        ({"schedule": "weighted", "weights": (1.0, 1.0, 0.0, 1.0, 1.0)}, "need a positive weight"),
        ({"state": "park"}, "parked optimizer states need a folder"),
    ],
)
def test_rotations_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        rotation(tiny("llama"), **options)


def test_rotating_and_always_on_ends() -> None:
    model = tiny("llama")
    found = units(model, find_parts(model))
    layers = tuple(unit for unit in found if unit.startswith("layer"))
    lisa = Lisa(found, (*layers, "embedding"), count=2, interval=1, always=("norm",))
    lisa.start()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = train(model, lisa, 9)
    assert lisa.steps["norm"] == 9 and lisa.steps["embedding"] == 3
    assert not torch.equal(before["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert torch.equal(before["lm_head.weight"], model.lm_head.weight)
    assert optimizer.state[model.model.norm.weight]["step"] == 9
