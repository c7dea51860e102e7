"""A proof whose models keep their layers in their files gives the rungs of one that holds them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import EXAMPLE

from edgeft.exporting import export as export_module
from edgeft.exporting.export import export, loader
from edgeft.machines.limits import Limit
from edgeft.machines.profile import load_profile
from edgeft.memory import stages
from edgeft.memory.train_step import Workload
from edgeft.merging.merge import verify_merged
from edgeft.models import streamed
from edgeft.models.checkpoint import load_plain
from edgeft.models.spec import read_model_spec
from edgeft.models.streamed import load_streamed
from edgeft.planning.costs import Question
from edgeft.planning.plan import make_plan
from edgeft.progress import silent
from edgeft.settings.job import make_job
from edgeft.targets.target import Target, load_target
from edgeft.units import GIB

CONFIGS = EXAMPLE.parent / "configs"


def loose(target: Target) -> Target:
    """Random weights of a few steps say little."""
    changes: dict[str, Any] = {
        "min_top1_agreement": 0.0, "max_mean_kl_nats": 9.0, "max_loss_increase_nats": 9.0,
        "max_exact_match_drop_points": 100.0, "max_gain_lost": 1e9,
    }  # fmt: skip
    return target.model_copy(update={"parity": target.parity.model_copy(update=changes)})


def test_rungs_scores_and_bytes_are_those_of_whole_models(
    merged_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, used = loose(load_target("ort-int4")), list[str]()
    alter = streamed._Stream._enter

    def seen(self: Any, weights: Any) -> None:
        used.append("layer")
        alter(self, weights)

    monkeypatch.setattr(streamed._Stream, "_enter", seen)
    whole = export(merged_folder, target, tmp_path / "whole", device=None, progress=silent)
    assert not used
    monkeypatch.setattr(export_module, "loader", lambda plan, target: load_streamed)
    by_layer = export(merged_folder, target, tmp_path / "streamed", device=None, progress=silent)
    assert used and by_layer.proof == whole.proof and by_layer.files == whole.files


def test_layers_stay_in_their_files_where_whole_models_have_no_room(
    merged_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, target = verify_merged(merged_folder)[0].train.plan, load_target("ort-int4")
    assert loader(plan, target) is load_plain
    proof = export_module.proof_phase(plan, target)
    small = Limit(proof.high_bytes - stages.file_bytes(proof) - 1, "a test")
    monkeypatch.setattr(export_module, "memory_limit", lambda: small)
    assert loader(plan, target) is load_streamed


def test_an_8b_model_is_proven_in_16_gib() -> None:
    spec, job = read_model_spec(str(CONFIGS / "llama-3.1-8b")), make_job(model=str(CONFIGS / "llama-3.1-8b"))
    question = Question(job, load_profile("t4"), spec, None, Workload(512, 512), 8 * 2**20, 14 * GIB)
    training = make_plan(make_job(model=job.model, profile="t4", max_length=512)).training
    for name in ("ort-int4", "ort-int4-calibrated"):
        whole = stages.prove(question, training, load_target(name), None)
        fits = stages.prove(question, training, load_target(name), 16 * GIB)
        assert stages.streams(fits) and not stages.streams(whole)
        assert fits.high_bytes - stages.file_bytes(fits) < 16 * GIB < whole.high_bytes - stages.file_bytes(whole)
