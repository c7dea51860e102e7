"""What the comparison with PEFT and Trainer says of runs whose numbers are known, planted faults included."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from tiny import BENCH

FILE = BENCH / "trainer.py"


@pytest.fixture(scope="module")
def trainer() -> Any:
    spec = importlib.util.spec_from_file_location("bench_trainer", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def took(seconds: float, size: int, losses: list[float]) -> dict[str, Any]:
    """A run with three slow steps before those of `seconds`."""
    ends = [0.0, 9.0, 18.0]
    while len(ends) < len(losses):
        ends.append(ends[-1] + seconds)
    return {"ends": ends, "busy": [2 * end for end in ends], "losses": losses, "bytes": size, "predicted_bytes": size}


def test_first_steps_are_left_out_and_the_worst_memory_counts(trainer: Any) -> None:
    losses = [3.0, 2.5, 2.0, 1.5, 1.2, 1.1]
    runs = {"edgeft": [took(0.8, 700, losses), took(0.8, 780, losses)], "trainer": [took(1.0, 1000, losses)] * 2}
    row = trainer.compare("case", runs, {"seconds": 0.9, "bytes": 0.8})
    assert (
        row["edgeft"]["seconds_per_step"] == 0.8
        and row["edgeft"]["cpu_seconds_per_step"] == 1.6
        and row["edgeft"]["peak_bytes"] == 780
    )
    assert row["ratios"] == {"seconds": 0.8, "bytes": 0.78} and row["met"] == {"seconds": True, "bytes": True}
    assert row["losses_agree"]


def test_a_slower_larger_or_other_training_is_said(trainer: Any) -> None:
    losses = [3.0, 2.5, 2.0, 1.5, 1.2, 1.1]
    other = [*losses[:-1], 1.11]
    row = trainer.compare(
        "case", {"edgeft": [took(0.95, 900, other)], "trainer": [took(1.0, 1000, losses)]},
        {"seconds": 0.9, "bytes": 0.8},
    )  # fmt: skip
    assert row["met"] == {"seconds": False, "bytes": False}
    assert not row["losses_agree"] and row["largest_loss_difference"] == pytest.approx(0.01)


def test_every_case_has_aims_and_enough_steps(trainer: Any) -> None:
    for case in trainer.CASES.values():
        assert case["steps"] > trainer.WARM_UP + 2 and set(case["aims"]) == {"seconds", "bytes"}
