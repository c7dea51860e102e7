"""A base of which each process has a part: the very steps and scores of processes that have all of it each."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from several_processes import EMULATED, KILLED, plan_for, start, together, weights
from tiny import NF4, ROWS, qwen3_folder

from edgeft.engine.sharded import shards_of
from edgeft.exporting.outputs import load_as_trained, observe_model
from edgeft.planning.plan import Plan
from edgeft.training.job_data import Data
from edgeft.training.result import TrainResult
from edgeft.training.work import work_folder

# with micro-batches of one row, of five rows two processes have three and two of them
COMMON: dict[str, Any] = {"micro_batch_size": 1, "malloc": "tight", "max_steps": 6, "sample_answers": 2}
LISA = {"layers": "lisa", "active_layers": 1, "lisa_interval": 2, "lisa_schedule": "uniform"}
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"checkpointing": True, "kept_layers": 0},
    "fp32, nothing recomputed": {"checkpointing": False},
    "fp32, some recomputed": {"checkpointing": True, "kept_layers": 2},
    "bf16": {"profile": "l4-24gb", "base_precision": "bf16", "checkpointing": True, "kept_layers": 0},
    "bf16, nothing recomputed": {"profile": "l4-24gb", "base_precision": "bf16", "checkpointing": False},
    "fp16": {"profile": "t4", "base_precision": "fp16", "checkpointing": True, "kept_layers": 1},
    "nf4": {**NF4, "checkpointing": True, "kept_layers": 2},
    "nf4 in bf16": {**NF4, "profile": "l4-24gb", "checkpointing": False},
    "upper layers": {"layers": "sparse", "active_layers": 2, "checkpointing": True, "prefix_cache": False},
    "in turn": {**LISA, "checkpointing": True},
    "dora": {"tuner": "dora", "profile": "l4-24gb", "base_precision": "bf16", "checkpointing": True},
    "pissa": {"init": "pissa", "checkpointing": True},
    "adalora": {"tuner": "adalora", "checkpointing": True},
    "ia3": {"tuner": "ia3", "rank": None, "checkpointing": True},
    "h-adapter": {"tuner": "h-adapter", "rank": None, "checkpointing": True},
    "adapter": {"tuner": "adapter", "checkpointing": True},
    "prefix": {"tuner": "prefix", "rank": None, "prefix_tokens": 3, "checkpointing": True},
}
FAST = {"fp32", "bf16, nothing recomputed", "fp16", "nf4"}


@pytest.fixture(scope="module")
def model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_folder(tmp_path_factory.mktemp("qwen3"), tokenizer_folder, 4)


def carried_out(folder: Path, model: Path, count: int, faults: dict[int, str] | None = None, **settings: Any) -> Path:
    """What so many processes train by a plan; a GPU's plan in its own dtypes, on this CPU."""
    path = plan_for(folder, model, count, **COMMON | settings)
    emulated = EMULATED if "profile" in settings else ""
    together(count, path, folder / "train", {rank: emulated + (faults or {}).get(rank, "") for rank in range(count)})
    return folder / "train"


def assert_the_same(one: Path, other: Path) -> None:
    """Bit for bit: what was learnt, every step's loss, all scores and answers."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and a
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    found = [TrainResult.read(folder / "train.json") for folder in (one, other)]
    for name in ("loss_curve", "units", "base_valid", "valid", "samples", "skipped_steps", "micro_batches"):
        assert getattr(found[0], name) == getattr(found[1], name), name
    assert found[0].samples and found[0].deviations == found[1].deviations


def marked(way: str, count: int) -> Any:
    slow = way not in FAST or (count == 4 and way != "bf16, nothing recomputed")
    return pytest.param(way, count, marks=pytest.mark.slow if slow else (), id=f"{way}, {count}")


@pytest.mark.parametrize(
    ("way", "count"), [marked(way, 2) for way in WAYS] + [marked(way, 4) for way in WAYS if way in FAST]
)
def test_processes_with_parts_train_what_those_with_all_do(way: str, count: int, model: Path, tmp_path: Path) -> None:
    plain = carried_out(tmp_path / "plain", model, count, **WAYS[way])
    parts = carried_out(tmp_path / "parts", model, count, shard_base=True, **WAYS[way])
    ways = [Plan.read(folder.parent / "plan.json").training for folder in (plain, parts)]
    assert ways[1].shard_base and ways[0] == ways[1].model_copy(update={"shard_base": False})
    assert_the_same(plain, parts)
    assert not work_folder(parts).exists()


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes train that have all of the base each."""
    return carried_out(tmp_path_factory.mktemp("whole"), model, 2, **WAYS["fp32"])


def test_what_was_trained_is_proven_with_all_of_the_base_in_one_process(model: Path, tmp_path: Path) -> None:
    out = carried_out(tmp_path, model, 2, shard_base=True, learning_rate=1e-3, **WAYS["fp32"])
    result = TrainResult.read(out / "train.json")
    tuned, compute = load_as_trained(out, result)
    assert shards_of(tuned) is None and all(p.isfinite().all() for p in tuned.parameters())
    rows = Data.read(result.plan).valid[: result.plan.training.eval_rows]
    form = observe_model("trained", tuned, rows, compute=compute, group_tokens=result.plan.training.group_tokens)
    assert form.loss == pytest.approx(result.valid.loss, abs=1e-5) != pytest.approx(result.base_valid.loss, abs=1e-3)


@pytest.fixture
def parts(model: Path, tmp_path: Path) -> Path:
    """The plan of two processes that have a part each."""
    return plan_for(tmp_path, model, 2, **COMMON | WAYS["fp32"], shard_base=True)


# Faults of one process, each after what it read was cut
ANOTHER_BYTE = """
from edgeft.engine import sharded
begin = sharded.Shards.__init__
def changed(self, layers, cut, *rest):
    cut[2].part[100] += 1
    begin(self, layers, cut, *rest)
sharded.Shards.__init__ = changed
"""
ANOTHERS_LAYER = """
from edgeft.engine import sharded
begin = sharded.Shards.__init__
def changed(self, layers, cut, *rest):
    cut[1].part, cut[2].part = cut[2].part, cut[1].part
    begin(self, layers, cut, *rest)
sharded.Shards.__init__ = changed
"""
LATER = """
from edgeft.engine import sharded
entered = sharded.Shards.accompany
def changed(self, counts):
    entered(self, counts)
    self.cut[2].part[100] += 1
sharded.Shards.accompany = changed
"""
GATHERS_NOTHING = """
ranks.Ranks.gather = lambda self, part, whole: lambda: None
"""
HAS_NOTHING = """
from edgeft.engine import sharded
sharded.CutLayer.start = lambda self: None
"""
FAULTS = {
    "a byte of a part is another": ({1: ANOTHER_BYTE}, "layer 2 of the base, gathered from all processes, has other "),
    "a part is of another layer": ({1: ANOTHERS_LAYER}, "layer 1 of the base, gathered from all processes, has other "),
    "a byte is lost on the way": ({1: LATER}, "layer 2 of the base, gathered from all processes, has other bytes"),
    "nothing is gathered": ({0: GATHERS_NOTHING, 1: GATHERS_NOTHING}, "layer 0 of the base, gathered from all"),
    "layers are not there": ({0: HAS_NOTHING, 1: HAS_NOTHING}, "the loss of base on valid is nan"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_the_base_is_never_trained_on(fault: str, parts: Path, tmp_path: Path) -> None:
    faults, problem = FAULTS[fault]
    done = start(2, parts, tmp_path / "train", faults)
    said = "".join(one.stderr for one in done)
    assert {one.returncode for one in done} == {1} and problem in said, said
    assert ("in the part of process 1" in said) == (list(faults) == [1])
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_process_ends_the_others_and_the_same_command_goes_on(
    rank: int, whole: Path, parts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "train"
    done = start(2, parts, out, {rank: KILLED.format(at=4)})
    assert done[rank].returncode == -signal.SIGKILL and done[1 - rank].returncode == 1
    assert rank == 0 or "train: another of 2 processes ended" in done[0].stderr
    if rank == 0:  # which writes checkpoints, and had written none
        assert not any(work_folder(out).glob("step-*"))
    assert bool(together(2, parts, out).resumed_at) == (rank == 1)
    assert_the_same(whole, out)


WHILE_SCORING = """
import os, signal
from edgeft.training import scoring
score = scoring.Scorer.score
def killed(self, name, samples):
    os.kill(os.getpid(), signal.SIGKILL)
scoring.Scorer.score = killed
"""


def test_the_first_one_ends_while_the_others_hand_their_parts_on(whole: Path, parts: Path, tmp_path: Path) -> None:
    done = start(2, parts, tmp_path / "train", {0: WHILE_SCORING})
    assert [one.returncode for one in done] == [-signal.SIGKILL, 1]
    together(2, parts, tmp_path / "train")
    assert_the_same(whole, tmp_path / "train")


def test_validations_are_those_of_processes_with_all(model: Path, tmp_path: Path) -> None:
    """Where one process alone computes, in the middle of training, and a run that goes on after a step."""
    valid = tmp_path / "valid.jsonl"
    valid.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::3]))
    how = {**WAYS["fp32"], "patience": 3, "valid_steps": 2, "valid": str(valid), "eval_rows": 6, "checkpoint_steps": 3}
    plain = carried_out(tmp_path / "plain", model, 2, **how)
    path, out = plan_for(tmp_path / "parts", model, 2, **COMMON | how, shard_base=True), tmp_path / "parts" / "train"
    assert any(one.returncode for one in start(2, path, out, {1: KILLED.format(at=4)}))
    found = together(2, path, out)
    assert found.resumed_at and found.validations == TrainResult.read(plain / "train.json").validations
    assert_the_same(plain, out)
