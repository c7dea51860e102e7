"""Ranks that go while they train: as PEFT's own allocator takes them, and what is left is what was asked for."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.adalora import AdaLoraModel, RankAllocator
from safetensors.torch import load_file
from tiny import run

from edgeft.data.dataset import Sample
from edgeft.engine import adalora
from edgeft.engine.adalora import Pruning, schedule
from edgeft.engine.loop import Run, make_run
from edgeft.engine.nf4_base import load_base
from edgeft.errors import BadInput
from edgeft.memory import train_step
from edgeft.models.parts import find_parts
from edgeft.planning.plan import Plan

CPU = torch.device("cpu")
SAMPLES = [Sample(ids := list(range(5 + i, 21 + i)), ids, 1) for i in range(4)]
SETTINGS: dict[str, Any] = {
    "tuner": "adalora", "rank": 6, "target_rank": 2, "layers": "all", "base_precision": "fp32", "learning_rate": 0.02,
    "max_steps": 20, "epochs": 9.0,
}  # fmt: skip


@pytest.fixture
def started(plan_file: Any, checkpoint_folder: Path, tmp_path: Path) -> Run:
    training = Plan.read(plan_file(**SETTINGS)).training
    model = load_base(checkpoint_folder, training, CPU, torch.float32).requires_grad_(False)
    (tmp_path / "work").mkdir()
    return make_run(training, CPU, torch.float32, model, find_parts(model), checkpoint_folder, tmp_path / "work")


def numbers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_E" in name}


def test_ranks_go_as_pefts_allocator_takes_them(started: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step: PEFT's code on a twin that has the same numbers and gradients leaves the same triplets."""
    twin = copy.deepcopy(started.model)
    config = adalora._config(started.model, started.parts, started.training)
    theirs: Any = SimpleNamespace(
        peft_config={"default": config}, trainable_adapter_name="default", model=twin,
        rankallocator=RankAllocator(twin, config, "default"),
    )  # fmt: skip
    own, left = Pruning.allocate, []

    def both(self: Pruning, step: int) -> None:
        for (_, mine), (_, other) in zip(started.model.named_parameters(), twin.named_parameters(), strict=True):
            other.data.copy_(mine.data)
            other.grad = None if mine.grad is None else mine.grad.clone()
        AdaLoraModel.update_and_allocate(theirs, step)
        own(self, step)
        found, expected = numbers(started.model), numbers(twin)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        left.append(sum(int(tensor.count_nonzero()) for tensor in found.values()))

    monkeypatch.setattr(Pruning, "allocate", both)
    for _ in range(started.training.steps):
        started.train_step(SAMPLES)
    modules = len(numbers(started.model))
    first, last, _ = schedule(started.training)
    assert left[first - 1] == 6 * modules and left[last - 1] == left[-1] == 2 * modules
    assert left[first:last] == sorted(left[first:last], reverse=True) and len(set(left)) > 5
    each = {name: int(tensor.count_nonzero()) for name, tensor in numbers(started.model).items()}
    assert len(set(each.values())) > 1  # some matrices keep more than others


def test_the_term_that_keeps_directions_apart_has_its_gradient(started: Run) -> None:
    """Of 0.5 mean ||Q Q^T - 1||, ||P^T P - 1||, as autograd finds it of PEFT's own lines."""
    started._gradients(SAMPLES)
    found = {name: p for name, p in started.chosen if "lora_E" not in name}
    before = {name: p.grad.clone() for name, p in found.items() if p.grad is not None}
    assert started.pruning is not None and len(before) == len(found)
    started.pruning.straighten()
    term = torch.zeros(())
    copies = {name: p.detach().double().requires_grad_() for name, p in found.items()}
    for name, p in copies.items():
        product = p @ p.T if "lora_A" in name else p.T @ p
        term = term + torch.norm(product - torch.eye(len(product), dtype=p.dtype), p="fro")
    (0.5 * term / len(copies)).backward()
    for name, p in found.items():
        wanted = copies[name].grad
        assert p.grad is not None and wanted is not None
        torch.testing.assert_close((p.grad - before[name]).double(), wanted, rtol=1e-3, atol=1e-6)


def test_what_is_written_has_the_ranks_that_are_left(plan_file: Any, tmp_path: Path) -> None:
    result = run(plan_file(**SETTINGS), tmp_path / "train")
    saved = load_file(tmp_path / "train" / "adapter_model.safetensors")
    left = [int(tensor.count_nonzero()) for name, tensor in saved.items() if name.endswith("lora_E")]
    assert sum(left) == 2 * len(left) and result.training.target_rank == 2


def test_a_plan_counts_how_much_each_number_matters(plan_file: Any) -> None:
    """In fp32: two smoothed numbers for each that trains, a mark for each triplet, PEFT's rank of each matrix."""
    plan = Plan.read(plan_file(**SETTINGS))
    training, spec = plan.training, plan.spec
    trained = train_step.trained_parameters(spec, training)
    modules = len(training.target_modules) * spec.num_hidden_layers
    assert train_step.adapter_bytes(spec, training) == 4 * (3 * trained + (6 + 1) * modules)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tuner": "lora", "target_rank": 2}, "target_rank: lora keeps every rank\n\nhint: use tuner=adalora"),
        ({"target_rank": 7}, "target_rank: 7, but ranks begin at 6 and only go\n\nhint: at most 6"),
        ({"lora_scale": "plain"}, "lora_scale: adalora divides lora_alpha by its first rank"),
        ({"quantize_aware": True}, "quantize_aware: adalora changes a weight by more than"),
        ({"init": "pissa"}, "init: adalora has nothing that could begin as pissa does"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(settings: dict[str, Any], message: str, plan_file: Any) -> None:
    with pytest.raises(BadInput, match=message):
        plan_file(**{**SETTINGS, **settings})


def test_half_of_the_first_rank_is_left_where_nothing_is_said(plan_file: Any) -> None:
    assert Plan.read(plan_file(**{**SETTINGS, "target_rank": None})).training.target_rank == 3
