"""Is a run whose layers stay in their files the resident one from plan to result, and does it go on bit for bit?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import asked_to_stop_at, qwen3_folder, run, write_plan
from torch import equal

from edgeft.exporting.outputs import load_as_trained, observe_model
from edgeft.planning.plan import Plan
from edgeft.progress import silent
from edgeft.training.job_data import Data

WAY = {"tuner": "lora", "checkpointing": True, "kept_layers": 0, "malloc": "tight", "micro_batch_size": 2}


@pytest.fixture
def planned(checkpoint_folder: Path, tmp_path: Path) -> Any:
    model = qwen3_folder(tmp_path / "model", checkpoint_folder, 4)

    def make(name: str, **settings: Any) -> Path:
        (tmp_path / name).mkdir()
        return write_plan(tmp_path / name, model, **{**WAY, **settings})

    return make


def adapters(out: Path) -> dict[str, Any]:
    return load_file(out / "adapter_model.safetensors")


def test_scores_losses_and_adapters_are_those_of_the_resident_run(planned: Any, tmp_path: Path) -> None:
    """Also where the run was stopped half way."""
    plain = run(planned("plain"), tmp_path / "plain" / "train")
    path = planned("streamed", stream_layers=True)
    made = Plan.read(path)
    assert made.training.stream_layers and "stay in their files" in " ".join(made.notes)

    stop = asked_to_stop_at(5)

    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "streamed" / "train", progress=stop)
    streamed = run(path, tmp_path / "streamed" / "train", progress=silent)
    assert streamed.resumed_at in ((5,), (6,))
    assert streamed.loss_curve == plain.loss_curve
    assert (streamed.base_valid, streamed.valid) == (plain.base_valid, plain.valid)
    ours, theirs = adapters(tmp_path / "streamed" / "train"), adapters(tmp_path / "plain" / "train")
    assert ours.keys() == theirs.keys() and all(equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "streamed" / "train" / "train.json").read_text())["plan"]["training"]["stream_layers"]


LISA = {"tuner": "full", "layers": "lisa", "active_layers": 1, "lisa_interval": 2}
LOADED: dict[str, dict[str, Any]] = {
    "dora": {"tuner": "dora"}, "sparse": {"tuner": "full", "layers": "sparse", "active_layers": 1}, "lisa": LISA,
    "lisa-nf4": {**LISA, "base_precision": "nf4"},
}  # fmt: skip


@pytest.mark.parametrize("way", LOADED)
def test_what_was_trained_is_loaded_again_as_it_was_scored(way: str, planned: Any, tmp_path: Path) -> None:
    """By the proof of an export, which reads layers as training did: lengths of rows, layers that train densely."""
    result = run(planned(way, stream_layers=True, **LOADED[way]), tmp_path / way / "train")
    model, compute = load_as_trained(tmp_path / way / "train", result)
    resting = [any(span.used for span in spans) for spans in model.edgeft_window.spans]
    dense = 1 if result.plan.training.densely else 0  # layers that trained before are pages of their files again
    assert resting.count(False) == dense and not list((tmp_path / way).glob("edgeft-*"))
    rows = Data.read(result.plan).valid[: result.plan.training.eval_rows]
    form = observe_model("trained", model, rows, compute=compute, group_tokens=result.plan.training.group_tokens)
    assert form.loss == pytest.approx(result.valid.loss, abs=1e-5) != pytest.approx(result.base_valid.loss, abs=1e-3)
