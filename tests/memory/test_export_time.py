"""What an export is planned to take, pass by pass, and what is left of it while it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIGS, plan_of, write_plan

from edgeft.api.results import Plan as Shown
from edgeft.cli.screen import time_left
from edgeft.data.scoring_groups import Size
from edgeft.machines.profile import Profile, load_profile
from edgeft.memory.export_time import (
    REHEARSAL_SECONDS,
    REHEARSAL_SECONDS_PER_PARAMETER,
    SHORT_SECONDS,
    START_SECONDS,
    Timed,
    export_seconds,
    reads_all,
    rehearsal_seconds,
    total_seconds,
)
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.planning.plan import Plan
from edgeft.progress import FACTOR, with_time_left
from edgeft.reporting.words import export_text
from edgeft.settings.job import Training
from edgeft.targets.target import load_target

VALID, TEST = [Size(60, 50, 10)] * 100, [Size(60, 50, 10)] * 1000


@pytest.fixture
def spec() -> ModelSpec:
    return read_model_spec(str(CONFIGS / "smollm2-135m"))


@pytest.fixture
def cpu() -> Profile:
    fields = {"matmul_tflops": {"fp32": 0.1}, "bandwidth_gb_per_second": 20.0, "cores": 2}
    return load_profile("cpu").model_copy(update=fields)


def training(spec: ModelSpec, **changes: Any) -> Training:
    return plan_of(spec, range(30), **({"rank": 16, "eval_rows": 200} | changes))


def seconds(found: tuple[Timed, ...]) -> dict[str, float]:
    return {each.stage: each.seconds for each in found}


def test_each_pass_is_counted_once(cpu: Profile, spec: ModelSpec) -> None:
    target = load_target("ort-int8")
    named = seconds(export_seconds(cpu, spec, training(spec), target, "ort-int8", [VALID]))
    assert list(named) == ["build", "parity: trained", "parity: merged", "parity: artifact"]
    climbed = seconds(export_seconds(cpu, spec, training(spec), target, "auto", [VALID]))
    assert {*climbed} - {*named} == {"repair: merged", "repair: ort-int8"}
    assert (
        climbed["parity: merged"] == 0.0 and climbed["repair: merged"] < START_SECONDS + named["parity: merged"]
    )  # none again
    more = seconds(export_seconds(cpu, spec, training(spec), target, "ort-int8", [VALID, TEST]))
    assert more["parity: trained"] == named["parity: trained"]  # which no test row is read for
    assert more["parity: artifact"] > 5 * named["parity: artifact"]
    rounded = seconds(export_seconds(cpu, spec, training(spec), load_target("ort-int4-calibrated"), "auto", [VALID]))
    assert rounded["calibrate"] > 10


def test_all_rows_are_read_where_that_is_short_and_where_nothing_is_known_some() -> None:
    named = {"stage": "parity: artifact", "passes": ""}
    short, long = (Timed(seconds=seconds, **named) for seconds in (SHORT_SECONDS, SHORT_SECONDS + 0.1))
    other = Timed(stage="parity: merged", seconds=1.0, passes="")
    assert reads_all([other, short]) and not reads_all([other, long]) and not reads_all([other]) and not reads_all([])


def test_a_slower_machine_takes_longer_and_a_host_that_is_not_known_is_not_guessed(
    cpu: Profile, spec: ModelSpec
) -> None:
    target, way = load_target("ort-int8"), training(spec)
    slow = cpu.model_copy(update={"matmul_tflops": {"fp32": 0.02}})
    fast, slower = (export_seconds(each, spec, way, target, "ort-int8", [VALID]) for each in (cpu, slow))
    assert total_seconds(slower) > 1.5 * total_seconds(fast)
    assert export_seconds(load_profile("t4"), spec, way, target, "ort-int8", [VALID]) == ()
    assert export_seconds(cpu, spec, way, target, "ort-int8", []) == ()


def test_fewer_rows_than_the_file_has_are_counted(cpu: Profile, spec: ModelSpec) -> None:
    target = load_target("ort-int8")
    all_of, few = (
        seconds(export_seconds(cpu, spec, training(spec, eval_rows=rows), target, "ort-int8", [VALID]))
        for rows in (200, 10)
    )
    assert few["parity: trained"] < all_of["parity: trained"] / 2


def told(calls: list[tuple[float, str, int, int]], planned: dict[str, float]) -> list[float]:
    """What is said to be left at each call (time, stage, done, total)."""
    found, times = list[float](), iter([each[0] for each in calls])
    progress = with_time_left(lambda *given: found.append(given[3]["seconds_left"]), planned, lambda: next(times))
    for _, stage, done, total in calls:
        progress(stage, done, total, {})
    return found


def test_what_is_left_follows_the_clock() -> None:
    planned = {"build": 10.0, "parity: merged": 20.0, "parity: artifact": 40.0}
    calls = [
        (0.0, "build", 0, 1),  # as planned: 70
        (20.0, "parity: merged", 0, 100),  # the build took twice as long: so may the others
        (30.0, "parity: merged", 50, 100),  # half of it in 10 s: as much again, and twice 40
        (40.0, "parity: artifact", 0, 100),  # 40 s for what was to take 30
        (80.0, "parity: artifact", 100, 100),
    ]
    assert told(calls, planned) == pytest.approx([70.0, 120.0, 90.0, 160 / 3, 0.0])
    assert time_left({"seconds_left": 90.0}).endswith("left")


def test_an_estimate_that_is_far_off_does_not_carry_the_others_away() -> None:
    planned = {"build": 1.0, "parity: merged": 20.0}
    assert told([(0.0, "build", 0, 1), (1000.0, "parity: merged", 0, 1)], planned)[1] == pytest.approx(20 * FACTOR)
    # a stage that nobody planned is no stage to come
    assert told([(0.0, "guesses", 0, 2), (6.0, "guesses", 1, 2)], planned) == pytest.approx([21.0, 27.0])


def test_nothing_planned_is_nothing_said() -> None:
    def progress(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        raise AssertionError

    assert with_time_left(progress, {}) is progress


@pytest.mark.parametrize(
    ("asked", "more"), [("ort-int8", ""), ("auto", "; more where ort-int8 fails and another is tried")]
)
def test_a_plan_says_it_in_one_line(cpu: Profile, spec: ModelSpec, asked: str, more: str) -> None:
    class Stages:
        target = load_target("ort-int8")
        export = export_seconds(cpu, spec, training(spec), target, asked, [VALID])

    line = export_text(Stages())  # type: ignore[arg-type]
    assert "at most" not in line and line.endswith(f"(estimate{more})")
    assert re.match(r"about .* where all rows are read, its proof .*: .* \d+ s, .*\)$", line)


def test_a_rehearsal_is_planned_by_the_layers_that_go_through_it(cpu: Profile, spec: ModelSpec) -> None:
    def planned(model: str, profile: Profile = cpu) -> float:
        return rehearsal_seconds(profile, read_model_spec(str(CONFIGS / model)), [VALID])

    deep, wide = planned("smollm2-135m"), planned("smollm2-1.7b")
    rest = spec.total_parameters - sum(spec.layer_parameters) + 2 * spec.layer_parameters[0]
    assert deep == pytest.approx(REHEARSAL_SECONDS + REHEARSAL_SECONDS_PER_PARAMETER * rest, abs=0.1)
    assert deep < wide < 200  # 0.3B of its 1.7B parameters
    assert planned("smollm2-135m", load_profile("t4")) == rehearsal_seconds(cpu, spec, []) == 0.0


def test_a_plan_says_what_its_rehearsal_takes(checkpoint_folder: Path, tmp_path: Path) -> None:
    plan = Plan.read(write_plan(tmp_path, checkpoint_folder))
    for seconds, told in ((20.5, True), (0.0, False)):
        made = plan.model_copy(update={"stages": plan.stages.model_copy(update={"rehearsal_seconds": seconds})})
        assert ("20.5 s (estimate) before the first step" in str(Shown.at(None, made))) is told
