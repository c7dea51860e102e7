"""The step log: each step once, in order, whatever a kill has left behind; validation losses where they were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import ROWS, killed_at, run, write_plan

from edgeft.errors import EdgeftError
from edgeft.training.step_log import STEPS, StepLog, StepRecord, Watch, read_steps
from edgeft.training.work import work_folder

SETTINGS: dict[str, Any] = {"epochs": 3.0, "checkpoint_steps": 3, "patience": 20, "valid_steps": 2, "eval_rows": 6}


def record(step: int, **more: Any) -> StepRecord:
    return StepRecord(
        step=step, loss=2.5, learning_rate=1e-4, tokens=10 * step, seconds=0.5, memory_bytes=2**20, **more
    )


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / STEPS).read_text().splitlines()]


@pytest.fixture
def plan(checkpoint_folder: Path, tmp_path: Path) -> Path:
    valid = tmp_path / "valid.jsonl"
    valid.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::3]))
    return write_plan(tmp_path, checkpoint_folder, valid=str(valid), **SETTINGS)


def test_a_run_leaves_a_line_for_each_step(plan: Path, tmp_path: Path) -> None:
    result = run(plan, tmp_path / "train")
    found = list(read_steps(tmp_path / "train" / STEPS))
    assert [each.step for each in found] == list(range(1, result.steps + 1))
    assert [(each.step, each.loss) for each in found] == list(result.loss_curve)
    assert [(each.step, each.valid_loss) for each in found if each.valid_loss is not None] == list(result.validations)
    assert found[-1].tokens == result.trained_tokens and all(each.memory_bytes > 2**20 for each in found)
    assert sorted(each.seconds for each in found) == [each.seconds for each in found]
    assert result.validations and STEPS not in result.files  # no stage reads it


def test_a_killed_run_that_goes_on_has_each_step_once(plan: Path, tmp_path: Path) -> None:
    whole = run(plan, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "train", progress=killed_at(9))
    with open(work_folder(tmp_path / "train") / STEPS, "a") as torn:
        torn.write('{"step": 9, "lo')
    assert run(plan, tmp_path / "train").resumed_at == (6,)
    assert steps_of(tmp_path / "train") == list(range(1, whole.steps + 1))
    for ours, theirs in zip(*(read_steps(tmp_path / name / STEPS) for name in ("train", "whole")), strict=True):
        assert (ours.loss, ours.valid_loss, ours.tokens) == (theirs.loss, theirs.valid_loss, theirs.tokens)


def test_a_log_that_is_only_added_to_would_be_seen(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: what a checkpoint does not know of stays in the file."""

    def begin(self: StepLog, work: Path, step: int, *, writes: bool, watch: Watch) -> None:
        self.path, self.writes, self.watch = work / STEPS, writes, watch

    monkeypatch.setattr(StepLog, "__init__", begin)
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "train", progress=killed_at(9))
    result = run(plan, tmp_path / "train")
    assert steps_of(tmp_path / "train") != list(range(1, result.steps + 1))


def test_lines_behind_a_checkpoint_and_torn_ones_are_dropped(tmp_path: Path) -> None:
    log = StepLog(tmp_path, 0)
    for step in (1, 2, 3, 4):
        log.add(record(step, **({"valid_loss": 1.5} if step == 2 else {})))
    log.sync()
    with open(log.path, "a") as torn:
        torn.write('{"step": 5, "loss": 1')
    StepLog(tmp_path, 3).add(record(4))
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert [each.valid_loss for each in read_steps(log.path)] == [None, 1.5, None, None]
    assert steps_of(StepLog(tmp_path, 0).path.parent) == []


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path: Path) -> None:
    log = StepLog(tmp_path, 0, writes=False)
    log.add(record(1))
    log.sync()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    log = StepLog(tmp_path, 0)
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(EdgeftError, match=r"steps\.jsonl: cannot write: Is a directory"):
        log.add(record(1))
