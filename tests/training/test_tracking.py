"""Trackers really run, in a process of their own: every step and the scores once, whatever becomes of the tracker."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import killed_at

import edgeft
from edgeft.errors import BadInput, MissingExtra
from edgeft.planning.plan import Plan
from edgeft.training import tracking
from edgeft.training.step_log import StepRecord
from edgeft.training.tracking import TRACKERS, Tracker, check_trackers, config_of

# A tracker of a user's own, by accelerate's class: it writes down what it is told.
OWN = """
import json, os
from pathlib import Path
from accelerate.tracking import GeneralTracker

class Recorded(GeneralTracker):
    name, requires_logging_directory = "recorded", True

    def __init__(self, project, place):
        super().__init__()
        self.file = open(Path(place) / "recorded.jsonl", "w")
        self.say("project", project)

    @property
    def tracker(self):
        return self.file

    def say(self, kind, value):
        print("a tracker may print")
        self.file.write(json.dumps([kind, value]) + "\\n")
        self.file.flush()

    def store_init_configuration(self, values):
        self.say("config", values)
        self.say("process", os.getpid())

    def log(self, values, step=None, **_):
        self.say("step", [step, values])

    def finish(self):
        self.say("finish", None)

class Dies(Recorded):
    def log(self, values, step=None, **_):
        os._exit(3)

class Hangs(Recorded):
    def log(self, values, step=None, **_):
        import time
        time.sleep(1000)

class Refuses(Recorded):
    def store_init_configuration(self, values):
        raise ValueError("api_key is not configured")

class Waits(Recorded):
    def store_init_configuration(self, values):
        import time
        time.sleep(1000)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "ours.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return "ours"


def recorded(place: Path) -> list[tuple[str, Any]]:
    return [tuple(json.loads(line)) for line in (place / "recorded.jsonl").read_text().splitlines()]


def record(step: int, **more: Any) -> StepRecord:
    return StepRecord(
        step=step, loss=2.5, learning_rate=1e-4, tokens=10 * step, seconds=0.5, memory_bytes=2**20, **more
    )


def test_a_run_that_is_stopped_is_told_whole_each_time(own: str, plan_file: Any, tmp_path: Path) -> None:
    path = plan_file(epochs=2.0, checkpoint_steps=3)
    said: list[str] = []
    options: dict[str, Any] = {"rehearsal": False, "track": [f"{own}:Recorded"], "say": said.append}
    with pytest.raises(KeyboardInterrupt):
        edgeft.train(path, tmp_path / "train", progress=killed_at(5), **options)
    assert recorded(tmp_path / "tracking")[-1] == ("finish", None)
    result = edgeft.train(path, tmp_path / "train", **options)
    told = recorded(tmp_path / "tracking")
    steps = [value for kind, value in told if kind == "step"]
    losses = [(at, values["loss"]) for at, values in steps[:-1]]
    assert losses == list(result.loss_curve) and {"learning_rate", "tokens", "seconds"} <= steps[0][1].keys()
    at, scores = steps[-1]
    assert at == result.steps and scores["valid_loss_tuned"] == result.valid.loss
    assert scores["valid_exact_match_base"] == result.base_valid.exact_match
    assert [kind for kind, _ in told[:3]] == ["project", "config", "process"] and told[-1] == ("finish", None)
    assert told[1][1]["rank"] == 4 and told[1][1]["model"] == result.plan.job.model
    assert f"tracking with {own}:Recorded in {tmp_path / 'tracking'}" in "\n".join(said)
    assert "a tracker may print" in (tmp_path / "tracking" / "tracker.log").read_text()


def test_one_that_dies_or_hangs_stops_nothing(
    own: str, plan_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "SECONDS_TO_END", 0.2)
    for name, why in (("Dies", "exit code 3"), ("Hangs", "had not ended after 0 seconds")):
        said: list[str] = []
        result = edgeft.train(
            plan_file(seed=len(name)), tmp_path / name, rehearsal=False, track=[f"{own}:{name}"], say=said.append
        )
        assert result.steps == result.plan.training.steps
        (warning,) = [line for line in said if line.startswith("WARNING: tracking ended early")]
        assert why in warning


def test_a_step_is_not_held_up_by_a_full_pipe(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SECONDS_TO_END", 0.2)
    tracker = Tracker([f"{own}:Hangs"], tmp_path, {})
    started = time.monotonic()
    for step in range(1, 5001):  # far more than a pipe holds
        tracker.step(record(step))
    assert tracker.lines.qsize() > 1000 and time.monotonic() - started < 60
    assert "had not ended" in tracker.end()


def test_one_that_cannot_begin_is_an_error_before_anything_runs(own: str, plan_file: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--track ours:Refuses: ValueError: api_key is not configured"):
        edgeft.train(plan_file(), tmp_path / "train", rehearsal=False, track=[f"{own}:Refuses"])
    assert not (tmp_path / ".train.work").exists()
    with pytest.raises(BadInput, match="--track ours:Missing: AttributeError"):
        edgeft.train(plan_file(), tmp_path / "train", rehearsal=False, track=[f"{own}:Missing"])


def test_one_that_waits_for_ever_at_its_start_is_an_error_too(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "SECONDS_TO_START", 0.2)
    with pytest.raises(BadInput, match=r"(?s)had not started after 0 seconds.*tracker\.log"):
        Tracker([f"{own}:Waits"], tmp_path / "tracking", {})


def test_names_are_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="--track: unknown tracker 'tensorbord'\n\nhint: did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    with pytest.raises(BadInput, match="--track: no module 'nowhere' for nowhere:Class"):
        check_trackers(["nowhere:Class"])
    monkeypatch.setattr(tracking, "_is_there", lambda module: module == "tensorboardX")
    with pytest.raises(MissingExtra, match="--track wandb: is not installed\n\nhint: pip install wandb") as problem:
        check_trackers(["tensorboard", "wandb"])
    assert problem.value.exit_code == 5


def test_names_are_those_that_accelerate_has() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)


def test_a_config_is_of_plain_values(plan_file: Any) -> None:
    found = config_of(Plan.read(plan_file()))
    assert found["tuner"] == "lora" and all(isinstance(value, str | int | float | bool) for value in found.values())
