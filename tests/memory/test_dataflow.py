"""Each layer's bytes as written down, against its operations as traced: transformers' own code, without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIGS, HALF, NF4, plan_of, save_model
from transformers import AutoConfig

from edgeft.memory import dataflow
from edgeft.memory.dataflow import layer_bytes, projections
from edgeft.memory.operations import Way
from edgeft.memory.train_step import Workload, step_terms
from edgeft.models.spec import read_model_spec
from edgeft.simulation import simulate

TOKENS = 40
PISSA = {"init": "pissa"}
FULL = {"tuner": "full", "embedding": "on", "norm": "on", "head": "on"}
WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, bf16": HALF,
    "NF4, bf16": {**NF4, "compute_dtype": "bf16"},
    "NF4, recomputed": {**NF4, "checkpointing": True},
    "LoRA, bf16, recomputed": {**HALF, "checkpointing": True},
    "DoRA": {"tuner": "dora"},
    "DoRA, recomputed": {"tuner": "dora", "checkpointing": True},
    "DoRA, bf16": {"tuner": "dora", **HALF},
    "DoRA, NF4, bf16": {"tuner": "dora", **NF4, "compute_dtype": "bf16"},
    "PiSSA, recomputed": {**PISSA, "checkpointing": True},
    "PiSSA, bf16": {**PISSA, **HALF},
    "IA3": {"tuner": "ia3"},
    "IA3, bf16, recomputed": {"tuner": "ia3", **HALF, "checkpointing": True},
    "AdaLoRA": {"tuner": "adalora"},
    "AdaLoRA, bf16, recomputed": {"tuner": "adalora", **HALF, "checkpointing": True},
    "AdaLoRA, NF4, bf16": {"tuner": "adalora", **NF4, "compute_dtype": "bf16"},
    "Hadamard": {"tuner": "h-adapter"},
    "Hadamard, bf16, recomputed": {"tuner": "h-adapter", **HALF, "checkpointing": True},
    "Hadamard, NF4, bf16": {"tuner": "h-adapter", **NF4, "compute_dtype": "bf16"},
    "adapters": {"tuner": "adapter"},
    "adapters, bf16, recomputed": {"tuner": "adapter", **HALF, "checkpointing": True},
    "adapters, NF4, bf16": {"tuner": "adapter", **NF4, "compute_dtype": "bf16"},
    "adapters beside the MLP": {"tuner": "adapter", "adapter_at": "parallel"},
    "adapters beside the MLP, bf16": {"tuner": "adapter", "adapter_at": "parallel", **HALF},
    "prefix": {"tuner": "prefix"},
    "prefix, bf16, recomputed": {"tuner": "prefix", **HALF, "checkpointing": True},
    "prefix, NF4, bf16": {"tuner": "prefix", **NF4, "compute_dtype": "bf16"},
    "full": FULL,
    "full, bf16, recomputed": {**FULL, **HALF, "checkpointing": True},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "granite": {}, "gemma": {}, "phi3": {}, "gpt_neox": {},
    "gemma2": {"query_pre_attn_scalar": 16}, "gemma3_text": {"layer_types": ["full_attention"] * 3},
    "gpt2": {"n_inner": 192}, "opt": {"ffn_dim": 192, "word_embed_proj_dim": 64},
}  # fmt: skip
ALIKE = ("qwen2", "qwen3", "granite", "gemma", "phi3", "opt")  # computed as one of the others, but for a detail
BATCHES = {"micro_batch_size": 1, "batch_size": 1}


@pytest.fixture
def every_height(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a layer tell all of its heights, in order, not only the highest."""
    monkeypatch.setattr(dataflow, "highest", tuple)
    layer_bytes.cache_clear()
    yield
    layer_bytes.cache_clear()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in ALIKE else kind for kind in FAMILIES]
)
def test_layers_keep_and_reach_what_is_traced(kind: str, tmp_path: Path, every_height: None) -> None:
    """The second of three layers: what it keeps, and how far it rises above its first operation, both ways."""
    spec = save_model(tmp_path, kind, num_hidden_layers=3, **FAMILIES[kind])
    config = AutoConfig.from_pretrained(tmp_path)
    ways = WAYS if kind == "llama" else {name: WAYS[name] for name in list(WAYS)[sum(map(ord, kind)) % 2 :: 2]}
    for name, way in ways.items():
        if "beside the MLP" in name and spec.family.inline_mlp:  # refused
            continue
        if "prefix" in name and spec.attn_logit_softcapping:  # refused
            continue
        training = plan_of(spec, range(3), micro_batch_size=1, batch_size=1, **way)
        trace = simulate._run(config, spec, training, Workload(TOKENS, 1)).trace
        found = layer_bytes(spec, Way.of(spec, training, TOKENS), "trained", True, False, training.checkpointing)

        def size(height: complex) -> float:
            return height.real * TOKENS + height.imag

        starts = [next(n for n, p in enumerate(trace.places) if p.layer == layer) for layer in (1, 2)]
        assert trace.live[starts[1]] - trace.live[starts[0]] == size(found.kept_forward), name
        made = {start for start, _, _ in trace.tensors}
        for phase, heights in (("forward", found.forward), ("backward", found.backward)):
            live = [trace.live[n] for n, p in enumerate(trace.places) if (p.phase, p.layer) == (phase, 1) and n in made]
            rises = max(map(size, heights)) - size(heights[0])
            assert max(live) - live[0] == rises, (name, phase)


def test_a_llamas_operations_are_the_traced_ones_one_by_one(tmp_path: Path, every_height: None) -> None:
    """In the third of four layers: what lies below it still holds the rotary tables."""
    spec = save_model(tmp_path, num_hidden_layers=4)
    config = AutoConfig.from_pretrained(tmp_path)
    dora, ia3 = {"tuner": "dora"}, {"tuner": "ia3"}
    after, beside = ({"tuner": "adapter", "adapter_at": where} for where in ("both", "parallel"))
    adalora = {"tuner": "adalora"}
    prefix, hadamard = {"tuner": "prefix"}, {"tuner": "h-adapter"}
    for way in ({}, {**NF4, "compute_dtype": "bf16"}, {"checkpointing": True}, {**FULL, "checkpointing": True},
                dora, {**dora, **HALF}, {**dora, **NF4}, {**dora, "checkpointing": True},
                ia3, {**ia3, **HALF}, {**ia3, **NF4}, {**ia3, "checkpointing": True},
                after, {**after, **HALF}, {**after, **NF4, "compute_dtype": "bf16"}, {**after, "checkpointing": True},
                beside, {**beside, **HALF}, {**beside, **NF4}, {**beside, "checkpointing": True},
                adalora, {**adalora, **HALF}, {**adalora, **NF4}, {**adalora, "checkpointing": True},
                hadamard, {**hadamard, **HALF}, {**hadamard, **NF4}, {**hadamard, "checkpointing": True},
                prefix, {**prefix, **HALF}, {**prefix, **NF4}, {**prefix, "checkpointing": True},
                PISSA, {**PISSA, **HALF}, {**PISSA, **NF4}, {**PISSA, "checkpointing": True}):  # fmt: skip
        training = plan_of(spec, range(4), micro_batch_size=1, batch_size=1, **way)
        trace = simulate._run(config, spec, training, Workload(TOKENS, 1)).trace
        found = layer_bytes(spec, Way.of(spec, training, TOKENS), "trained", True, False, training.checkpointing)
        made = {start for start, _, _ in trace.tensors}
        for phase, heights in (("forward", found.forward), ("backward", found.backward)):
            live = [trace.live[n] for n, p in enumerate(trace.places) if (p.phase, p.layer) == (phase, 2) and n in made]
            sizes = [height.real * TOKENS + height.imag for height in heights]
            assert [a - live[0] for a in live] == [b - sizes[0] for b in sizes], (way, phase)


@pytest.mark.parametrize(
    "adapter", [{}, PISSA, *({"tuner": name} for name in ("dora", "adalora", "ia3", "h-adapter", "adapter", "prefix"))]
)
def test_adapters_that_rest_compute_and_keep_less(adapter: dict[str, Any], tmp_path: Path, every_height: None) -> None:
    """LISA's other layers, operation by operation: above the lowest that trains gradients pass, below none does."""
    spec = save_model(tmp_path, num_hidden_layers=4)
    config = AutoConfig.from_pretrained(tmp_path)
    for trained, wants in (((0, 1, 3), True), ((3,), False)):
        for more in ({}, HALF, {"checkpointing": True}) if wants else ({}, {**NF4, "compute_dtype": "bf16"}):
            training = plan_of(spec, range(4), micro_batch_size=1, batch_size=1, **adapter, **more)
            rest = tuple({*range(4)} - {*trained})
            training = training.model_copy(update={"trained_layers": trained, "resting_layers": rest})
            trace = simulate._run(config, spec, training, Workload(TOKENS, 1)).trace
            found = layer_bytes(spec, Way.of(spec, training, TOKENS), "resting", wants, False, training.checkpointing)
            assert bool(found.backward) == wants and not found.gradients
            made = {start for start, _, _ in trace.tensors}
            for phase, heights in (("forward", found.forward), ("backward", found.backward)):
                live = [trace.live[n] for n, p in enumerate(trace.places)
                        if (p.phase, p.layer) == (phase, 2) and n in made]  # fmt: skip
                sizes = [height.real * TOKENS + height.imag for height in heights]
                assert [a - live[0] for a in live] == [b - sizes[0] for b in sizes], (more, phase)


def test_experts_are_taken_for_a_llamas_mlp() -> None:
    spec = read_model_spec(str(CONFIGS / "mixtral-8x7b"))
    found = projections(spec)
    assert [len(linears) for linears in found.values()] == [3, 1, 2, 1]
    assert found["mlp_out"][0].in_features == spec.intermediate_size
    training = plan_of(spec, range(32), **HALF)
    assert sum(term.bytes for term in step_terms(spec, training, Workload(64, 63))) > 2 * spec.total_parameters


def test_a_window_masks_the_layers_that_have_one() -> None:
    spec = read_model_spec(str(CONFIGS / "gemma-3-1b"))
    assert [dataflow.is_masked(spec, n, 1024) for n in range(7)] == [True] * 5 + [False, True]
    assert not dataflow.is_masked(spec, 0, 100)
    training = plan_of(spec, range(26), **HALF)
    wide, narrow = (
        sum(t.bytes for t in step_terms(spec.model_copy(update={"sliding_window": n}), training, Workload(1024, 9)))
        for n in (2048, 512)
    )
    assert narrow - wide > 22 * 2 * 2 * 1024**2  # a number for each pair of tokens, in each layer, for each sample
