"""A run whose memory ran out goes on from its last step in less, and ends where it would have ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import WriteRows, run
from typer.testing import CliRunner

from edgeft.cli import app
from edgeft.documents import sha256_file
from edgeft.engine.loop import Run
from edgeft.errors import BadInput, DoesNotFit
from edgeft.planning.plan import MEMORY_ALONE, Plan, smaller_plan
from edgeft.training.result import TrainResult
from edgeft.training.step_down import less, step_down, taken
from edgeft.training.work import work_folder

LORA = {"tuner": "lora", "rank": 4, "base_precision": "fp32", "max_steps": 4, "epochs": 2.0, "batch_size": 16,
        "max_length": 200}  # fmt: skip
KEPT = {"micro_batch_size": 16, "checkpointing": False, "malloc": "fast", "loss_chunk_tokens": 1024}
LISA = {"tuner": "full", "layers": "lisa", "active_layers": 1, "lisa_interval": 2, "rank": None}


@pytest.fixture
def planned(plan_file: Callable[..., Path], write_rows: WriteRows) -> Callable[..., Path]:
    """Plans of rows so long that their number at a time is what a step takes."""
    rows = [{"text": " ".join(f"lib{i * n}" for n in range(90))} for i in range(40)]
    data = str(write_rows("long.jsonl", rows))
    return lambda **how: plan_file(**{**LORA, **KEPT, "data": data, **how})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def runs_out(monkeypatch: pytest.MonkeyPatch, at: int, *, updating: bool = False) -> None:
    """Let memory run out in step `at`: with its gradients half made, or while parameters are updated."""
    gradients, update = Run._gradients, Run._update

    def no_memory(self: Run, *rest: Any) -> Any:
        made = gradients(self, *rest)
        if self.step == at and not updating:
            raise MemoryError
        return made

    def half_updated(self: Run) -> bool:
        if self.step == at and updating:
            self.updating = True
            self.chosen[0][1].data.fill_(float("nan"))
            raise MemoryError
        return update(self)

    monkeypatch.setattr(Run, "_gradients", no_memory)
    monkeypatch.setattr(Run, "_update", half_updated)


@pytest.mark.parametrize("how", [{}, LISA])
def test_it_ends_where_it_would_have_ended(
    how: dict[str, Any], planned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = planned(**how), tmp_path / "train"
    whole = run(path, tmp_path / "whole")
    with monkeypatch.context() as patched:
        runs_out(patched, at=3)
        with pytest.raises(DoesNotFit, match="the same command with --smaller goes on from the last step"):
            run(path, out)
    done = CliRunner().invoke(app, ["train", str(path), "--out", str(out), "--no-rehearsal", "--smaller"])
    assert done.exit_code == 0, done.output
    assert "going on in a smaller way" in done.stderr and "not as planned: " in done.stdout
    result = TrainResult.read(out / "train.json")
    assert result.resumed_at == (3,) and result.steps == 4
    changed = {d.what for d in result.deviations} - {"peak memory"}  # of a process that ran other tests before
    assert changed and changed <= set(MEMORY_ALONE)
    assert result.training.model_copy(update={n: getattr(result.plan.training, n) for n in MEMORY_ALONE}) == (
        result.plan.training
    )
    assert result.predicted_peak_bytes < whole.predicted_peak_bytes
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(out)[name], value, rtol=1e-3, atol=1e-5)


def test_parameters_between_two_steps_are_not_kept(
    planned: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = planned(checkpoint_steps=2), tmp_path / "train"
    with monkeypatch.context() as patched:
        runs_out(patched, at=3, updating=True)
        with pytest.raises(DoesNotFit):
            run(path, out)
    assert [folder.name for folder in work_folder(out).glob("step-*")] == ["step-00000002"]
    assert all(value.isfinite().all() for value in weights(work_folder(out) / "step-00000002").values())


def test_each_is_smaller_until_none_is(planned: Callable[..., Path], tmp_path: Path) -> None:
    path, work = planned(), tmp_path / ".train.work"
    plan, digest = Plan.read(path), sha256_file(path)
    peaks = [plan.peak_bytes]
    with pytest.raises(DoesNotFit, match="--smaller: no way of training the same needs at most"):
        for _ in range(20):
            peaks.append(step_down(work, plan, digest).peak_bytes)
    assert len(peaks) > 1 and all(after < before for before, after in pairwise(peaks))
    assert taken(work, plan, digest).plan.peak_bytes == peaks[-1]
    assert taken(work, plan, digest).plan.budget_bytes == plan.budget_bytes
    assert taken(work, plan, "another plan's").plan is plan
    (work / "smaller.json").write_text("{")
    with pytest.raises(BadInput, match="is not what was written there"):
        taken(work, plan, digest)


def test_nothing_that_it_computes_is_another(planned: Callable[..., Path]) -> None:
    plan = Plan.read(planned())
    smaller = smaller_plan(plan, less(plan))
    assert smaller.training != plan.training
    before, after = (json.loads(each.training.model_dump_json()) for each in (plan, smaller))
    assert {name for name in before if before[name] != after[name]} <= set(MEMORY_ALONE)
