"""What a GPU's runs took is what edgeft plans of them, from configs and settings alone."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import pytest
from tiny import BENCH, CONFIGS, EXAMPLE

from edgeft.machines.profile import Profile, load_profile
from edgeft.memory import phases, timing
from edgeft.memory.train_step import Workload
from edgeft.models.spec import read_model_spec
from edgeft.settings.job import Training
from edgeft.units import MIB

RECORD = json.loads((BENCH / "results" / "cuda.json").read_text())
ROWS = [row for row in RECORD["rows"] if "training" in row and "reserved_bytes" in row]


def spec_of(row: dict[str, Any]) -> Any:
    return read_model_spec(str(EXAMPLE if row["model"] == EXAMPLE.name else CONFIGS / row["model"]))


def planned(row: dict[str, Any]) -> tuple[int, int, int]:
    """(what is alive, what is expected to be reserved, what is promised) of a step."""
    training = Training.model_validate(row["training"])
    work = Workload(training.max_length, training.max_trained)
    found = phases.phases(spec_of(row), training, work, baseline_bytes=0, capability=9.0)
    step = next(phase for phase in found if phase.name == "train")
    alive = sum(term.bytes for term in step.terms if term.name != "reserved")
    return alive, step.expected_bytes, max(phase.high_bytes for phase in found)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["run"])
def test_a_run_is_planned_as_it_was_measured(row: dict[str, Any]) -> None:
    alive, expected, high = planned(row)
    assert row["reserved_bytes"] <= high
    if row["training"].get("layers") == "lisa":  # a few steps need not draw the layers that need most
        assert row["allocated_bytes"] - MIB <= alive * 1.005 and alive <= 1.06 * row["allocated_bytes"]
        return
    assert alive == pytest.approx(row["allocated_bytes"], rel=0.005, abs=4 * MIB)
    assert expected == pytest.approx(row["reserved_bytes"], rel=0.055, abs=32 * MIB)


@pytest.fixture
def h100() -> Profile:
    return load_profile("rtx4090-24gb").model_copy(update={
        "compute_capability": 9.0, "bandwidth_gb_per_second": 3350.0,
        "matmul_tflops": {"fp32": 495.0, "fp16": 989.0, "bf16": 989.0},
    })  # fmt: skip


def seconds(row: dict[str, Any], profile: Profile) -> float:
    spec, training = spec_of(row), Training.model_validate(row["training"])
    work = Workload(training.max_length, training.max_trained)
    return timing.seconds_per_step(profile, training, work, timing.count(spec, training, work, training.kept_layers))


def typical_factor(profile: Profile) -> float:
    """How far the estimates of all rows are from what was measured, on average."""
    apart = [abs(math.log(seconds(row, profile) / row["seconds_per_step"])) for row in ROWS]
    return math.exp(statistics.fmean(apart))


def test_seconds_are_those_of_the_device_or_of_its_host(h100: Profile) -> None:
    assert typical_factor(h100) < 1.2
    assert typical_factor(h100.model_copy(update={"launch_microseconds": 0.01})) > 3  # without launches


def test_launches_are_those_that_were_counted() -> None:
    """Of one micro-batch's kernels, beside those of the optimizer: within 15% of what the profiler saw."""
    cases = {row["run"]: row for row in ROWS}
    counted = [row for row in RECORD["rows"] if "kernels" in row and "NF4" not in row["run"]]
    assert len(counted) >= 4
    for row in counted:
        case = cases[row["run"].removesuffix(": kernels")]
        training = Training.model_validate(case["training"])
        work = Workload(training.max_length, training.max_trained)
        found = timing.count(spec_of(case), training, work, training.kept_layers).launches
        assert found == pytest.approx(row["kernels"], rel=0.15), row["run"]
