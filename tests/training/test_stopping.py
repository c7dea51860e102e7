"""A run that stops early: at the step that its losses say, with the best one's parameters, resumed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROWS, killed_at, run, write_plan

from edgeft.data.samples import validation_rows
from edgeft.engine.loop import Run
from edgeft.errors import BadInput
from edgeft.exporting.outputs import load_as_trained
from edgeft.machines import meter
from edgeft.machines.pool import Pool
from edgeft.models.evaluate import evaluate
from edgeft.models.parts import find_parts
from edgeft.planning.plan import Plan
from edgeft.reporting.words import kept_step
from edgeft.settings.job import Training
from edgeft.training.job_data import Data
from edgeft.training.result import TrainResult
from edgeft.training.stopping import Stopping
from edgeft.training.train import work_folder

CPU = torch.device("cpu")
# a rate at which the tiny model soon gets worse again
SETTINGS: dict[str, Any] = {
    "tuner": "lora", "layers": "all", "base_precision": "fp32", "learning_rate": 0.3, "epochs": 6.0, "patience": 2,
    "valid_steps": 2, "eval_rows": 6, "checkpoint_steps": 3,
}  # fmt: skip


@pytest.fixture
def valid(tmp_path: Path) -> str:
    path = tmp_path / "valid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::3]))
    return str(path)


def test_it_ends_after_so_many_validations_without_a_lower_loss(
    checkpoint_folder: Path, tmp_path: Path, valid: str
) -> None:
    """Each loss is that of a run which ends there, on rows that nothing else is scored on."""
    path = write_plan(tmp_path, checkpoint_folder, valid=valid, **SETTINGS)
    result = run(path, tmp_path / "train")
    losses, steps = dict(result.validations), [step for step, _ in result.validations]
    assert steps == list(range(2, result.steps + 1, 2)) and result.steps < result.plan.training.steps
    assert losses[result.best_step] == min(losses.values()) and result.steps == result.best_step + 2 * 2
    data = Data.read(result.plan)
    texts = [[list(sample.ids) for sample in rows] for rows in (data.stopping, data.valid)]
    assert (len(texts[0]), len(texts[1])) == (6, 6) and not any(row in texts[1] for row in texts[0])
    model, compute = load_as_trained(tmp_path / "train", result)
    found = evaluate(model, find_parts(model), data.stopping, data.tokenizer, device=CPU, compute=compute)
    assert found.loss == pytest.approx(losses[result.best_step], abs=2e-6)  # what is written is the best step
    scored = evaluate(model, find_parts(model), data.valid, data.tokenizer, device=CPU, compute=compute)
    assert scored.loss == pytest.approx(result.valid.loss, rel=1e-6)
    assert not work_folder(tmp_path / "train").exists()
    (said,) = kept_step(result)
    assert (
        said.startswith(f"kept: step {result.best_step}, loss {losses[result.best_step]:.4f} of rows")
        and "ended" in said
    )


def test_its_memory_is_measured_from_what_a_step_leaves(
    checkpoint_folder: Path, tmp_path: Path, valid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's freed memory is given back, within the limit of the phase, before the mark of the highest is set."""
    events, scored = list[str](), Stopping.validate

    def noted(event: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            events.append(event)
            return function(*given)

        return call

    monkeypatch.setattr(meter, "reset_peak", noted("mark", meter.reset_peak))
    monkeypatch.setattr(Pool, "give_back", noted("given back", Pool.give_back))
    monkeypatch.setattr(Stopping, "validate", noted("validated", scored))
    result = run(write_plan(tmp_path, checkpoint_folder, valid=valid, **SETTINGS), tmp_path / "train")
    places = [place for place, event in enumerate(events) if event == "validated"]
    assert len(places) == len(result.validations) and all(
        events[at - 2 : at] == ["given back", "mark"] for at in places
    )


MORE: dict[str, dict[str, Any]] = {
    "all": {},
    "lisa": {"layers": "lisa", "active_layers": 1, "lisa_interval": 2},
    "upper": {"layers": "sparse", "trained_layers": "1", "prefix_cache": True},
}


@pytest.mark.parametrize("layers", MORE)
def test_stopped_and_resumed_ends_bit_for_bit_the_same(
    layers: str, checkpoint_folder: Path, tmp_path: Path, valid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a better step than the checkpoint's; what had its turn after the best step is as it began."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_plan(tmp_path, checkpoint_folder, valid=valid, **{**SETTINGS, **MORE[layers]})
    whole = run(path, tmp_path / "whole")

    stop = killed_at(5)

    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "stopped", progress=stop)
    assert list(work_folder(tmp_path / "stopped").glob("best-*"))
    resumed = run(path, tmp_path / "stopped")
    assert resumed.resumed_at == (3,) and resumed.validations == whole.validations
    assert (resumed.steps, resumed.best_step, resumed.valid) == (whole.steps, whole.best_step, whole.valid)
    expected, found = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("whole", "stopped"))
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


def test_a_best_file_that_is_gone_is_named(checkpoint_folder: Path, tmp_path: Path, valid: str) -> None:
    path = write_plan(tmp_path, checkpoint_folder, valid=valid, **SETTINGS)

    stop = killed_at(4)

    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "train", progress=stop)
    for file in work_folder(tmp_path / "train").glob("best-*"):
        file.unlink()
    with pytest.raises(BadInput, match=r"best-0000000\d\.safetensors: is gone.*\n\nhint: start over: remove"):
        run(path, tmp_path / "train")


def stopping(tmp_path: Path, plan_file: Any, **settings: Any) -> Stopping:
    training = Plan.read(plan_file(patience=2, valid_steps=1, **settings)).training
    return Stopping(training, [], tmp_path)


def test_equal_losses_are_no_lower_one(tmp_path: Path, plan_file: Any) -> None:
    found = stopping(tmp_path, plan_file)
    for step, loss, best, ends in [(1, 3.0, 1, False), (2, 2.0, 2, False), (3, 2.0, 2, False), (4, 2.5, 2, True)]:
        found.losses.append((step, loss))
        assert (found.best, found.ends) == (best, ends)


def test_the_last_step_is_validated_too(tmp_path: Path, plan_file: Any) -> None:
    found = stopping(tmp_path, plan_file)
    training: Training = found.training.model_copy(update={"valid_steps": 4, "steps": 9})
    found.training = training
    assert [step for step in range(1, 10) if found.due(step)] == [4, 8, 9]


def test_no_patience_validates_nothing(tmp_path: Path, plan_file: Any) -> None:
    plan = Plan.read(plan_file())
    assert (plan.training.patience, plan.training.valid_steps) == (0, 0)
    assert not any(Stopping(plan.training, [], tmp_path).due(step) for step in range(1, 9))
    assert "validate" not in {phase.name for phase in plan.phases}


def test_a_plan_counts_states_disk_and_the_most_seconds(plan_file: Any) -> None:
    plain, plan = (Plan.read(plan_file(tuner="lora", layers="all", base_precision="fp32", epochs=3000.0, **more))
                   for more in ({}, {"patience": 3, "valid_steps": 2}))  # fmt: skip
    names = [phase.name for phase in plan.phases]
    assert names.index("validate") == names.index("evaluate") + 1 < names.index("train")
    terms = {term.name: term.bytes for phase in plan.phases if phase.name == "validate" for term in phase.terms}
    assert terms["optimizer"] == 2 * terms["adapters"]
    disk = [next(each for each in found.stages.disk if each.stage == "train") for found in (plain, plan)]
    result = disk[0].kept_bytes
    assert disk[1].peak_bytes - disk[0].peak_bytes == 2 * result and disk[1].kept_bytes == result
    assert plan.seconds > plain.seconds and plan.seconds_per_step == plain.seconds_per_step
    assert any(note.startswith("patience: validated every 2 steps on every second") for note in plan.notes)


def test_rows_that_stop_a_run_do_not_score_it() -> None:
    assert validation_rows(list(range(9)), 3, 3) == ([0, 2, 4, 6, 8], [1, 3, 5])
    assert validation_rows(list(range(9)), None, 3) == (list(range(9)), [])
    with pytest.raises(BadInput, match="patience: 1 validation row cannot both stop a run and score it"):
        validation_rows([1], 1, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"valid_steps": 3}, "valid_steps: says how often a run is validated, but none is\n\nhint: add --set patience"),
        (
            {"patience": 2, "tuner": "full", "layers": "lisa", "base_precision": "nf4"},
            "patience: layers that train in turn at full rank lie in files, .*\n\nhint: use tuner=lora",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(settings: dict[str, Any], message: str, plan_file: Any) -> None:
    with pytest.raises(BadInput, match=message):
        plan_file(**settings)


def test_a_best_step_that_is_left_out_is_found(
    checkpoint_folder: Path, tmp_path: Path, valid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the last step's parameters under the best one's record; what is written scores otherwise."""

    def last(self: Stopping, run: Run) -> None:
        return None

    monkeypatch.setattr(Stopping, "take_best", last)
    result = run(write_plan(tmp_path, checkpoint_folder, valid=valid, **SETTINGS), tmp_path / "train")
    data = Data.read(TrainResult.read(tmp_path / "train" / "train.json").plan)
    model, compute = load_as_trained(tmp_path / "train", result)
    found = evaluate(model, find_parts(model), data.stopping, data.tokenizer, device=CPU, compute=compute)
    assert found.loss != pytest.approx(dict(result.validations)[result.best_step], abs=1e-3)
