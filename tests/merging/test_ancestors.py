"""Is what a base was made from still known after the next run, and the run after that, in the bundle's manifest?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from broken_folders import pickled, trainer
from tiny import FULL, run, write_plan

from edgeft.api import doctoring
from edgeft.documents import sha256_file
from edgeft.exporting import export as exports
from edgeft.merging.ancestors import ancestors_of
from edgeft.merging.merge import merge
from edgeft.models.doctor.diagnose import diagnose
from edgeft.progress import silent
from edgeft.targets.target import load_target


def next_run(place: Path, base: Path, **settings: Any) -> Path:
    """Train on a base and merge: the merged folder."""
    place.mkdir()
    run(write_plan(place, base, learning_rate=1e-3, **settings), place / "train")
    merge(place / "train", place / "merged", wise_alpha=1.0, progress=silent)
    return place / "merged"


@pytest.fixture(scope="module")
def chain(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Full, then LoRA, then LoRA again, each on the merge before it; the first on a folder that was repaired."""
    place = tmp_path_factory.mktemp("chain")
    pickled()(checkpoint_folder, place / "bin")
    doctoring.repair(place / "bin", place / "repaired")
    full = next_run(place / "full", place / "repaired", **FULL)
    return [place / "repaired", full, first := next_run(place / "lora", full), next_run(place / "again", first)]


def test_a_bundle_names_every_run_before(chain: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repaired, full, first, last = chain
    given: dict[str, Any] = {}
    monkeypatch.setattr(exports, "build_bundle", lambda *_, **named: given.update(named))
    exports.export(last, load_target("ort-int4"), tmp_path / "bundle", device=None, progress=silent)
    found = given["provenance"]
    assert found["ancestor 1"] == "merged: LORA, a share of 1" and found["ancestor 2"].startswith("merged: ")
    assert found["ancestor 1: merged.json"] == sha256_file(first / "merged.json")
    assert found["ancestor 1: train.json"] == sha256_file(first.parent / "train" / "train.json")
    assert found["ancestor 1: plan.json"] == sha256_file(first.parent / "plan.json")
    assert found["ancestor 2: merged.json"] == sha256_file(full / "merged.json")
    assert found["ancestor 2: training data"] == sha256_file(full.parent / "rows.jsonl")
    assert found["ancestor 3"] == "repaired: pickled weights"
    assert found["ancestor 3: doctor.json"] == sha256_file(repaired / "doctor.json")
    assert found["ancestor 3: pytorch_model.bin"] == sha256_file(repaired.parent / "bin" / "pytorch_model.bin")
    assert not any(name.startswith("ancestor 4") for name in found)
    assert diagnose(last).verdict == "usable" and diagnose(last).kind.endswith("by edgeft merge")


def test_a_base_that_was_changed_since_is_not_said_to_be_what_it_was(chain: list[Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(chain[1], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    ancestors, said = ancestors_of(folder)
    assert not ancestors and "the base is not what" in said[0] and "config.json" in said[0]


def test_a_checkpoint_of_other_trainers_is_a_base(checkpoint_folder: Path, tmp_path: Path) -> None:
    """What Trainer leaves where it knows the tokenizer; LLaMA-Factory, which is Trainer, writes more beside it."""
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    trainer(checkpoint_folder, folder, AutoTokenizer.from_pretrained(checkpoint_folder))
    for name in ("all_results.json", "train_results.json", "trainer_log.jsonl", "README.md", "Modelfile"):
        (folder / name).write_text("{}")
    found = diagnose(folder)
    assert found.verdict == "usable" and found.kind == "a model in safetensors, by Trainer"
    assert any("states of a run lie beside the weights (optimizer.pt" in each.problem for each in found.findings)
    merged = next_run(tmp_path / "lora", folder)
    assert diagnose(merged).verdict == "usable" and not json.loads((merged / "merged.json").read_text())["ancestors"]
