"""Steps that see rounded weights: simulated, real and closed form hold the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FULL, HALF, plan_of, save_model
from transformers import AutoConfig

from edgeft.machines.meter import LiveBytes
from edgeft.memory import dataflow, rounded
from edgeft.memory.dataflow import layer_bytes
from edgeft.memory.operations import Way
from edgeft.memory.rounded import HEIGHTS
from edgeft.memory.train_step import Workload, step_terms
from edgeft.models.spec import ModelSpec
from edgeft.simulation import simulate as simulate_module
from edgeft.simulation.simulate import simulate
from edgeft.targets.grid import Grid
from edgeft.targets.kinds import Kind
from edgeft.targets.target import load_target

KINDS = [Kind(4, 32, False, "rtn"), Kind(8, 32, False, "rtn"), Kind(4, 32, True, "mlas"), Kind(4, 32, True, "q_0"),
         Kind(4, 32, False, "q_1"), Kind(8, 32, True, "q8_0")]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rows, columns", [(64, 256), (7, 96), (3, 100)])
def test_rounding_holds_what_is_written_down(kind: Kind, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    live = LiveBytes()
    live.count(weight)
    with live:
        Grid(*kind).encode(weight).weight()
    blocks = rows * -(-columns // kind.block_size)
    each, per_block = HEIGHTS[kind.method]
    assert live.peak_bytes - weight.nbytes == each * blocks * kind.block_size + per_block * blocks


def aware(spec: ModelSpec, trained: range, target: str = "ort-int4", **changes: Any) -> Any:
    changes |= {"quantize_aware": load_target(target).rounding, "stored_dtype": spec.dtype}
    return plan_of(spec, trained, **changes)


ALL, TOP = range(2), range(1, 2)
WAYS: dict[str, tuple[range, int, dict[str, Any]]] = {
    "LoRA": (ALL, 47, {}),
    "LoRA, two micro-batches": (ALL, 47, {"batch_size": 4}),
    "LoRA, top layer": (TOP, 5, {}),
    "LoRA, recomputed": (ALL, 47, {"checkpointing": True, "batch_size": 4}),
    "LoRA, attention only": (ALL, 47, {"target_modules": ("q_proj", "v_proj")}),
    "LoRA, q4_0": (ALL, 47, {"target": "gguf-q4_0"}),
    "full": (ALL, 47, FULL),
    "full, two micro-batches": (ALL, 47, {**FULL, "batch_size": 4}),
    "full, recomputed": (ALL, 5, {**FULL, "checkpointing": True}),
    "sparse": (TOP, 47, {"tuner": "full", "layers": "sparse"}),
    "LoRA, bf16": (ALL, 47, HALF),
    "LoRA, bf16, recomputed": (ALL, 47, {**HALF, "checkpointing": True, "batch_size": 4}),
    "sparse on bf16": (TOP, 47, {"tuner": "full", "layers": "sparse", **HALF}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_closed_form_is_the_simulated_step(way: str, tmp_path: Path) -> None:
    layers, trained, changes = WAYS[way]
    spec = save_model(tmp_path)
    stored = "bfloat16" if "bf16" in way else "float32"
    training = aware(spec, layers, **changes).model_copy(update={"stored_dtype": stored})
    work = Workload(48, trained)
    closed = sum(term.bytes for term in step_terms(spec, training, work))
    assert closed == pytest.approx(simulate(spec, training, work).live_peak_bytes, rel=0.003)


@pytest.fixture
def every_height(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a layer tell all of its heights, in order, not only the highest."""
    monkeypatch.setattr(dataflow, "highest", tuple)
    layer_bytes.cache_clear()
    yield
    layer_bytes.cache_clear()


@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_layers_keep_and_reach_what_is_traced(kind: str, tmp_path: Path, every_height: None) -> None:
    """The second of three layers, to the byte: what it keeps, how far it rises both ways."""
    spec = save_model(tmp_path, kind, num_hidden_layers=3)
    config = AutoConfig.from_pretrained(tmp_path)
    for way in ("LoRA", "LoRA, recomputed", "LoRA, q4_0", "full", "full, recomputed", "LoRA, bf16"):
        changes = {**WAYS[way][2], "micro_batch_size": 1, "batch_size": 1}
        stored = "bfloat16" if "bf16" in way else "float32"
        training = aware(spec, range(3), **changes).model_copy(update={"stored_dtype": stored})
        trace = simulate_module._run(config, spec, training, Workload(40, 1)).trace
        found = layer_bytes(spec, Way.of(spec, training, 40), "trained", True, False, training.checkpointing)
        starts = [next(n for n, p in enumerate(trace.places) if p.layer == layer) for layer in (1, 2)]
        assert trace.live[starts[1]] - trace.live[starts[0]] == size_of(found.kept_forward), way
        made = {start for start, _, _ in trace.tensors}
        for phase, heights in (("forward", found.forward), ("backward", found.backward)):
            live = [trace.live[n] for n, p in enumerate(trace.places) if (p.phase, p.layer) == (phase, 1) and n in made]
            assert max(live) - live[0] == max(map(size_of, heights)) - size_of(heights[0]), (way, phase)


def size_of(height: complex) -> float:
    return height.real * 40 + height.imag


def test_what_is_written_down_less_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, work = save_model(tmp_path), Workload(48, 47)
    training = aware(spec, ALL)
    monkeypatch.setattr(rounded, "rounding_bytes", lambda *args, **kwargs: 0)
    layer_bytes.cache_clear()
    closed = sum(term.bytes for term in step_terms(spec, training, work))
    layer_bytes.cache_clear()
    assert closed < 0.95 * simulate(spec, training, work).live_peak_bytes
