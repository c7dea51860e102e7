"""Are the closed form's bytes of a step that starts above frozen layers those of the step itself, counted and run?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FULL, NF4, plan_of, save_model, second_step_peak

from edgeft.data.samples import Sample
from edgeft.engine.loop import Run
from edgeft.engine.trainable import apply_tuner
from edgeft.memory import train_step
from edgeft.memory.phases import phases
from edgeft.models.boundary import Boundary
from edgeft.models.checkpoint import load_plain
from edgeft.models.parts import find_parts
from edgeft.simulation.simulate import simulate

CPU = torch.device("cpu")
TOKENS = 192
WORK = train_step.Workload(TOKENS, 40)
TOP = {"layers": "sparse", "cached_layers": 4, "cached_tokens": 1000, "max_length": TOKENS, "max_trained": 40}
SHAPE = {"num_hidden_layers": 6, "max_position_embeddings": 256}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: family, what is changed of the shape, of the plan
    "LoRA": ("llama", {}, {}),
    "LoRA, tied": ("llama", {"tie_word_embeddings": True}, {}),
    "LoRA, recomputed, again": ("llama", {}, {"checkpointing": True, "batch_size": 8}),
    "LoRA, recomputed but for one": ("llama", {}, {"checkpointing": True, "kept_layers": 1}),
    "LoRA, bf16": ("llama", {}, {"base_precision": "bf16", "compute_dtype": "bf16"}),
    "whole layers, norm and head": ("llama", {}, {**FULL, "embedding": "off"}),
    "whole layers, again": ("qwen3", {}, {**FULL, "embedding": "off", "norm": "off", "head": "off", "batch_size": 8}),
    "LoRA on NF4": ("llama", {}, NF4),
    "whole layers on NF4": ("llama", {}, {**FULL, **NF4, "embedding": "off", "norm": "off", "head": "off"}),
    "GPT-2": ("gpt2", {"n_embd": 64, "n_layer": 6, "n_head": 4, "n_positions": 256}, {}),
    "NeoX": ("gpt_neox", {}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_closed_form_equals_the_simulated_step(name: str, tmp_path: Path) -> None:
    kind, shape, changes = CASES[name]
    spec = save_model(tmp_path, kind, **{**SHAPE, **shape})
    training = plan_of(spec, range(4, 6), **{**TOP, **changes})
    closed = sum(term.bytes for term in train_step.step_terms(spec, training, WORK))
    assert closed == pytest.approx(simulate(spec, training, WORK).live_peak_bytes, rel=0.01)
    without = training.model_copy(update={"cached_layers": 0})
    assert closed < sum(term.bytes for term in train_step.step_terms(spec, without, WORK))


@pytest.mark.parametrize("name", ["LoRA", "whole layers, norm and head", "LoRA, recomputed, again"])
def test_closed_form_equals_counted_bytes(name: str, tmp_path: Path) -> None:
    kind, shape, changes = CASES[name]
    spec = save_model(tmp_path, kind, **{**SHAPE, **shape})
    training = plan_of(spec, range(4, 6), **{**TOP, **changes})
    model = load_plain(tmp_path)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parts = find_parts(model)
    boundary = Boundary(parts, 4)
    boundary.reach(torch.zeros(1, 1, dtype=torch.int64))
    boundary.drop(model)
    above = boundary.above(parts, lambda samples: torch.randn(len(samples), TOKENS, 64))
    run = Run(training, CPU, torch.float32, model, above, apply_tuner(model, above, training))
    labels = [-100] * (TOKENS - 40) + [5] * 40
    samples = [Sample(list(range(TOKENS)), labels, 1)] * training.batch_size
    peak = second_step_peak(run, samples)
    closed = sum(term.bytes for term in train_step.step_terms(spec, training, WORK))
    assert closed == pytest.approx(peak, rel=0.005)


def test_the_states_are_made_with_the_whole_model_in_memory(tmp_path: Path) -> None:
    spec = save_model(tmp_path, **SHAPE)
    training = plan_of(spec, range(4, 6), **TOP)
    found = {phase.name: phase for phase in phases(spec, training, WORK, baseline_bytes=1000)}
    assert list(found) == ["load", "prefix", "evaluate", "train"]
    weights = {name: next(t.bytes for t in found[name].terms if t.name == "weights") for name in found}
    below = 4 * (sum(spec.layer_parameters[:4]) + spec.embedding_parameters)
    assert weights["prefix"] == weights["evaluate"] == weights["load"] == weights["train"] + below
    plain = training.model_copy(update={"cached_layers": 0, "cached_tokens": 0})
    assert [phase.name for phase in phases(spec, plain, WORK, baseline_bytes=1000)] == ["load", "evaluate", "train"]
