"""A soft prompt on a device: the trained model's own answers, and proven to be all there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from beside import stopped_by
from bundles import to_the_device
from safetensors.torch import load_file, save_file
from tiny import run, write_plan

from edgeft.exporting.build import build_bundle
from edgeft.exporting.bundle import GoldenInput
from edgeft.exporting.rehearsal import go_through
from edgeft.merging.merge import merge
from edgeft.models.headers import KV_PREFIX
from edgeft.planning.plan import Plan
from edgeft.progress import silent
from edgeft.targets.target import load_target

FP32 = load_target("onnx-portable-fp32")
pytestmark = pytest.mark.targets  # make test-targets has optimum's environment
SETTINGS: dict[str, Any] = {
    "tuner": "prompt", "rank": None, "prefix_tokens": 5, "base_precision": "fp32", "target": FP32.name,
}  # fmt: skip


def test_the_device_says_what_the_trained_model_says(tmp_path: Path) -> None:
    to_the_device(tmp_path, **SETTINGS)


@pytest.fixture(scope="module")
def trained(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny model and its merge beside it. Not to be written to."""
    folder = tmp_path_factory.mktemp("prompt")
    run(write_plan(folder, checkpoint_folder, epochs=2.0, learning_rate=3e-2, **SETTINGS), folder / "train")
    merge(folder / "train", folder / "merged", wise_alpha=1.0, progress=silent)
    build_bundle(folder / "merged", FP32, folder / "bundle", prompts=[GoldenInput(text="Section:")], measure=False)
    return folder


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """By a token: the first is gone, the last is there twice."""
    dim = 2 if tensor.ndim == 4 else 0
    count = tensor.shape[dim]
    return tensor.index_select(dim, torch.tensor([*range(1, count), count - 1]))


def halved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 0.5


@pytest.mark.parametrize("fault", [shifted, halved])
@pytest.mark.parametrize(
    ("file", "rung"), [("train/adapter_model.safetensors", "'trained'"), (f"merged/{KV_PREFIX}", "'merged'")]
)
def test_the_ladder_stops_a_prompt_that_is_not_what_was_trained(
    fault: Callable[[torch.Tensor], torch.Tensor], file: str, rung: str, trained: Path, tmp_path: Path
) -> None:
    for name in ("train", "merged"):
        shutil.copytree(trained / name, tmp_path / name)
    assert stopped_by(tmp_path, trained / "bundle", FP32) == ""
    tensors = {name: fault(tensor).contiguous() for name, tensor in load_file(tmp_path / file).items()}
    save_file(tensors, tmp_path / file)
    assert rung in stopped_by(tmp_path, trained / "bundle", FP32)


def test_it_is_rehearsed(trained: Path, tmp_path: Path) -> None:
    held = go_through(Plan.read(trained / "plan.json"), FP32, tmp_path)
    assert not held.skipped and [rung.name for rung in held.rungs] == ["merged", "artifact"]
