"""A plan tried out: the same steps with random weights, measured, and refused where they say nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny import ROWS
from warm import edgeft


def verify(folder: Path, *pins: str, profile: str = "cpu-8gb", model: Path) -> subprocess.CompletedProcess[str]:
    settings = [part for pin in pins for part in ("--set", pin)]
    return edgeft("plan", "--model", model, "--profile", profile, "--verify", "--out", folder / "plan.json", *settings)


@pytest.mark.parametrize("pins", [("rank=4",), ("tuner=full", "layers=lisa", "active_layers=1", "base_precision=nf4")])
def test_a_plan_is_measured(pins: tuple[str, ...], checkpoint_folder: Path, tmp_path: Path) -> None:
    done = verify(tmp_path, *pins, "max_length=64", "batch_size=2", model=checkpoint_folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((tmp_path / "trial.json").read_text())
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert found["measured_bytes"] > 50 * 2**20 and found["measured_seconds_per_step"] > 0
    assert found["error"] == pytest.approx(found["predicted_bytes"] / found["measured_bytes"] - 1, abs=1e-5)
    assert found["predicted_bytes"] == next(p["expected_bytes"] for p in plan["phases"] if p["name"] == "train")
    assert "training, peak memory" in done.stdout


def test_a_plan_that_starts_above_its_frozen_layers_is_measured(checkpoint_folder: Path, tmp_path: Path) -> None:
    """Random weights give no row's outputs: zeros stand for them, of the same size."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pins = ("layers=sparse", "active_layers=1", "batch_size=2", "prefix_cache=true")
    settings = [part for pin in pins for part in ("--set", pin)]
    command = ("plan", "--model", checkpoint_folder, "--data", data, "--profile", "cpu-8gb", "--verify")
    done = edgeft(*command, "--out", tmp_path / "plan.json", *settings)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "plan.json").read_text())["training"]["cached_layers"] == 1
    assert json.loads((tmp_path / "trial.json").read_text())["measured_bytes"] > 50 * 2**20


def test_a_device_that_is_not_here_is_not_tried(checkpoint_folder: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    done = verify(tmp_path, profile="t4", model=checkpoint_folder)
    assert done.returncode == 1
    assert "--verify: needs cuda, which is not here" in done.stderr and "hint: plan with the profile" in done.stderr
