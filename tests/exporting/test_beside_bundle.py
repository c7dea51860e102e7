"""Adapters beside the weights on a device: nodes of the graph, the model's own answers, and proven to be all there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from beside import stopped_by
from bundles import to_the_device
from safetensors.torch import load_file, save_file
from tiny import run, write_plan

from edgeft.errors import ParityFailed
from edgeft.exporting.build import build_bundle
from edgeft.exporting.export import export
from edgeft.exporting.rehearsal import go_through
from edgeft.memory.train_step import beside
from edgeft.merging.merge import merge
from edgeft.merging.result import MergedCheckpoint
from edgeft.models.headers import BOTTLENECKS
from edgeft.planning.plan import Plan
from edgeft.progress import silent
from edgeft.targets import optimum_script
from edgeft.targets.footprint import bundle_weights
from edgeft.targets.portable_onnx import read_weights
from edgeft.targets.target import load_target

FP32, INT8 = load_target("onnx-portable-fp32"), load_target("onnx-portable-int8")
pytestmark = pytest.mark.targets  # make test-targets has optimum's environment
SETTINGS: dict[str, Any] = {"tuner": "adapter", "layers": "all", "base_precision": "fp32", "target": FP32.name}


@pytest.mark.parametrize("at", ["both", "parallel"])
def test_the_device_says_what_the_trained_model_says(at: str, tmp_path: Path) -> None:
    to_the_device(tmp_path, **SETTINGS, adapter_at=at)


@pytest.fixture(scope="module")
def trained(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny model and its merge beside it. Not to be written to."""
    folder = tmp_path_factory.mktemp("beside")
    run(write_plan(folder, checkpoint_folder, epochs=2.0, learning_rate=1e-2, **SETTINGS), folder / "train")
    merge(folder / "train", folder / "merged", wise_alpha=1.0, progress=silent)
    return folder


@pytest.fixture(scope="module")
def bundle(trained: Path) -> Path:
    build_bundle(trained / "merged", FP32, trained / "bundle", prompts=[], measure=False)
    return trained / "bundle"


def halve(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: tensor / 2 if "up.weight" in name else tensor for name, tensor in tensors.items()}, file)


def drop(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: tensor * 0 if "up.weight" in name else tensor for name, tensor in tensors.items()}, file)


@pytest.mark.parametrize("fault", [halve, drop])
@pytest.mark.parametrize(
    ("file", "rung"),
    [("train/adapter_model.safetensors", "'trained'"), (f"merged/{BOTTLENECKS}", "'merged'")],
)
def test_the_ladder_stops_an_adapter_that_is_not_what_was_trained(
    fault: Any, file: str, rung: str, trained: Path, bundle: Path, tmp_path: Path
) -> None:
    for name in ("train", "merged"):
        shutil.copytree(trained / name, tmp_path / name)
    assert stopped_by(tmp_path, bundle, FP32) == ""
    fault(tmp_path / file)
    assert rung in stopped_by(tmp_path, bundle, FP32)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_ladder_stops_a_graph_whose_adapters_are_gone_or_halved(
    share: float, trained: Path, tmp_path: Path
) -> None:
    merge(trained / "train", tmp_path / "merged", wise_alpha=share, progress=silent)
    build_bundle(tmp_path / "merged", FP32, tmp_path / "bundle", prompts=[], measure=False)
    assert "'artifact' against 'merged'" in stopped_by(trained, tmp_path / "bundle", FP32)


def test_eight_bits_are_as_many_as_planned(trained: Path, tmp_path: Path) -> None:
    made = export(trained / "merged", INT8, tmp_path / "bundle", device=None, progress=silent)
    plan = MergedCheckpoint.read(trained / "merged" / "merged.json").train.plan
    assert made.proof is not None
    found, planned = (
        read_weights(tmp_path / "bundle"),
        bundle_weights(plan.spec, INT8, beside(plan.spec, plan.training)),
    )
    assert abs(found.stored_bytes - planned.stored_bytes) <= 4 * plan.spec.hidden_size * 5  # norms that are all ones


def test_a_rehearsal_finds_an_exporter_that_leaves_them_out(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.read(trained / "plan.json")
    for name in ("right", "wrong"):
        (tmp_path / name).mkdir()
    held = go_through(plan, FP32, tmp_path / "right")
    assert not held.skipped and [rung.name for rung in held.rungs] == ["merged", "artifact"]
    script = Path(optimum_script.__file__).read_text(encoding="utf-8")
    (tmp_path / "other.py").write_text(script.replace("made + parts(", "made + 0 * parts("), encoding="utf-8")
    monkeypatch.setattr(optimum_script, "__file__", str(tmp_path / "other.py"))
    with pytest.raises(ParityFailed, match="rung 'artifact' against 'merged'"):
        go_through(plan, FP32, tmp_path / "wrong")
