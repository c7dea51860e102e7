"""One optimizer step: made again where fp16 overflows, stopped where gradients are not finite; settings that count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import killed_at, run

from edgeft.data.dataset import Sample
from edgeft.engine import loop
from edgeft.engine.loop import SKIPPED_IN_A_ROW, Run, make_run, make_scaler
from edgeft.engine.nf4_base import load_base
from edgeft.errors import EdgeftError
from edgeft.models.checkpoint import DTYPES
from edgeft.models.parts import find_parts
from edgeft.planning.plan import Plan
from edgeft.settings.job import Training

CPU = torch.device("cpu")
SAMPLES = [Sample(ids := list(range(5 + i, 21 + i)), ids, 1) for i in range(4)]
LISA = {"tuner": "full", "layers": "lisa", "active_layers": 1, "lisa_interval": 1}


@pytest.fixture
def started(plan_file: Any, checkpoint_folder: Path, tmp_path: Path) -> Any:
    """A run of a plan, in the plan's own dtypes on the CPU, before its first step."""

    def start(work: str = "work", **settings: Any) -> Run:
        training = Plan.read(plan_file(**settings)).training.model_copy(update={"device": "cpu", "optimizer": "adamw"})
        compute = DTYPES[training.compute_dtype]
        model = load_base(checkpoint_folder, training, CPU, compute)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        (tmp_path / work).mkdir(exist_ok=True)
        return make_run(training, CPU, compute, model, find_parts(model), checkpoint_folder, tmp_path / work)

    return start


FP16 = {"profile": "t4", "tuner": "lora", "base_precision": "fp16", "layers": "all", "max_steps": 9, "epochs": 5.0}


def overflow_above(made: Run, scale: float) -> None:
    """Let the gradients of one tensor overflow while the scale is larger, as fp16 does."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, float("inf")) if made.scaler.get_scale() > scale else gradient

    made.chosen[0][1].register_hook(hook)


@pytest.mark.parametrize("settings", [{}, {"layers": "lisa", "active_layers": 1, "lisa_interval": 1}])
def test_a_step_that_overflows_is_made_again_and_counts_once(settings: dict[str, Any], started: Any) -> None:
    made, plain = started(**{**FP16, **settings}), started("plain", **{**FP16, **settings})
    first = made.scaler.get_scale()
    overflow_above(made, first / 8)
    losses = [(made.train_step(SAMPLES), plain.train_step(SAMPLES)) for _ in range(2)]
    assert (made.skipped_steps, plain.skipped_steps) == (3, 0) and made.scaler.get_scale() <= first / 8
    for name in ("step", "tokens", "micro_batches", "padded_tokens"):
        assert getattr(made, name) == getattr(plain, name), name
    assert made.lisa is None or made.lisa.steps == plain.lisa.steps
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-3)
    # nothing is lost: the same updates as without an overflow, to fp16's rounding
    for (name, ours), (_, theirs) in zip(made.chosen, plain.chosen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=5e-4, msg=name)


def test_gradients_that_overflow_at_every_scale_are_an_error(started: Any) -> None:
    made = started(**FP16)
    before = {name: p.detach().clone() for name, p in made.chosen}
    overflow_above(made, 0.0)
    with pytest.raises(
        EdgeftError, match=rf"step 1 of 9, {SKIPPED_IN_A_ROW} times in a row.*\n\nhint: .*fp32"
    ) as caught:
        made.train_step(SAMPLES)
    assert caught.value.exit_code == 1 and (made.step, made.tokens, made.micro_batches) == (0, 0, 0)
    assert all(torch.equal(p, before[name]) for name, p in made.chosen)


def test_the_scale_of_a_short_run_starts_low(started: Any) -> None:
    training: Training = started(**FP16).training

    def scale(steps: int) -> float:
        return make_scaler(training.model_copy(update={"steps": steps}), CPU, torch.float16).get_scale()

    assert scale(9) == 2**10 and scale(100) == 2**13 and scale(100_000) == 2**16
    assert not make_scaler(training, CPU, torch.bfloat16).is_enabled()


def test_skipped_steps_are_recorded(plan_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `train`, a GPU's plan emulated on the CPU, and back from a checkpoint in the middle."""
    started_as = loop.make_scaler

    def overflowing(*args: Any) -> Any:
        scaler = started_as(*args)
        scaler._init_scale = 2.0**28  # an attribute of torch's own, set before the first use
        return scaler

    monkeypatch.setattr(loop, "make_scaler", overflowing)
    path = plan_file(**{**FP16, "max_steps": 3, "checkpoint_steps": 1})

    stop = killed_at(2)

    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "train", progress=stop, emulate=True)
    result = run(path, tmp_path / "train", emulate=True)
    assert result.resumed_at == (1,) and result.steps == 3 and result.skipped_steps >= 3
    assert result.valid.loss != result.base_valid.loss
    assert json.loads((tmp_path / "train" / "train.json").read_text())["skipped_steps"] == result.skipped_steps


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_gradients_that_are_not_finite_stop_the_run_at_that_step(value: str, started: Any) -> None:
    made = started()
    made.train_step(SAMPLES)
    before = {name: p.detach().clone() for name, p in made.chosen}
    made.chosen[-1][1].register_hook(lambda gradient: gradient * float(value))
    message = r"gradients are not finite at step 2 of .*: nothing was updated\n\nhint: plan"
    with pytest.raises(EdgeftError, match=message):
        made.train_step(SAMPLES)
    assert made.step == 1 and all(torch.equal(p, before[name]) for name, p in made.chosen)


def moved(made: Run, steps: int = 2) -> dict[str, torch.Tensor]:
    for _ in range(steps):
        made.train_step(SAMPLES)
    return {name: p.detach().clone() for name, p in made.chosen}


def test_weight_decay_is_for_matrices_alone(started: Any) -> None:
    made = started(tuner="full", layers="all", weight_decay=0.5, learning_rate=0.1)
    for _, parameter in made.chosen:
        parameter.register_hook(torch.zeros_like)
    before = {name: p.detach().clone() for name, p in made.chosen}
    rate = loop.learning_rate(made.training, 0)
    for name, after in moved(made, 1).items():
        decays = after.ndim > 1 and "embed_tokens" not in name
        assert torch.equal(after, before[name]) != decays, name
        if decays:
            torch.testing.assert_close(after, before[name] * (1 - 0.5 * rate), rtol=1e-5, atol=1e-7)


def test_weight_decay_follows_the_layers_that_take_turns(started: Any) -> None:
    made = started(**LISA, weight_decay=0.5, norm="on")
    for step in range(4):
        made.train_step(SAMPLES)
        decayed, rest = (group["params"] for group in made.optimizer.param_groups)
        assert {p.ndim for p in decayed} == {2} and {p.ndim for p in rest} == {1}, step
        assert {id(p) for p in (*decayed, *rest)} == {id(p) for _, p in made.chosen}
        assert [group["weight_decay"] for group in made.optimizer.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize("setting", [{"weight_decay": 0.5}, {"max_grad_norm": 1e-6}, {"lora_alpha": 64.0}])
def test_a_setting_leaves_its_mark(setting: dict[str, Any], started: Any) -> None:
    fixed = {"tuner": "lora", "layers": "all", "learning_rate": 0.01}
    plain, other = moved(started(**fixed)), moved(started(**{**fixed, **setting}))
    assert any(not torch.allclose(plain[name], other[name], rtol=1e-4, atol=1e-6) for name in plain)


def test_gradients_are_clipped_to_the_norm_that_was_set(started: Any) -> None:
    made, seen = started(tuner="full", layers="all", max_grad_norm=1e-3), []
    step = made.optimizer.step

    def watch(*args: Any, **options: Any) -> Any:
        seen.append(float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for _, p in made.chosen]))))
        return step(*args, **options)

    made.optimizer.step = watch
    made.train_step(SAMPLES)
    assert seen == [pytest.approx(1e-3, rel=1e-2)]


def test_so_many_rows_are_scored_as_were_asked_for(plan_file: Any, tmp_path: Path) -> None:
    for rows in (1, 2):
        result = run(plan_file(max_steps=1, eval_rows=rows), tmp_path / str(rows))
        assert (result.base_valid.rows, result.valid.rows) == (rows, rows)
