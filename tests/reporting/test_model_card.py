"""A model's card: valid on the hub, filled from what was recorded, and never over what a person wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import edgeft
from edgeft.merging.result import MergedCheckpoint
from edgeft.models import identity
from edgeft.reporting import model_card as cards
from edgeft.reporting.model_card import adapter_card, is_sealed, merged_card, write_card
from edgeft.training.result import TrainResult


def header(text: str) -> dict[str, Any]:
    """The metadata, by YAML itself."""
    assert text.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


@pytest.fixture
def merged(merged_folder: Path) -> MergedCheckpoint:
    return MergedCheckpoint.read(merged_folder / "merged.json")


def test_the_card_says_what_was_recorded_and_no_path(merged_folder: Path, merged: MergedCheckpoint) -> None:
    text = merged_card(merged_folder, merged)
    result = merged.train
    assert header(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["edgeft", "lora"],
    }
    assert ModelCard(text).data.library_name == "transformers"
    assert f"{result.base_valid.loss:.4f}" in text and f"{result.valid.loss:.4f}" in text
    assert "LoRA rank 4 in 2 of 2 layers" in text and "rows.jsonl" in text and result.base_sha256[:12] in text
    assert result.inputs["training data"][:12] in text
    assert str(merged_folder.parent) not in text and "The base states no licence" in text


def test_hub_names_and_licences_are_the_hubs_own(
    merged_folder: Path, merged: MergedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "cached_folder", lambda model: Path("somewhere"))
    monkeypatch.setattr(cards, "model_licence", lambda folder: "Apache-2.0")
    job = merged.train.plan.job.model_copy(update={"model": "org/base", "data": "org/rows"})
    plan = merged.train.plan.model_copy(update={"job": job})
    inputs = {role: digest for role, digest in merged.train.inputs.items() if role != identity.DATA[0]}
    known = merged.model_copy(update={"train": merged.train.model_copy(update={"plan": plan, "inputs": inputs})})
    found = header(merged_card(merged_folder, known))
    assert found["base_model"] == "org/base" and found["base_model_relation"] == "finetune"
    assert found["license"] == "apache-2.0" and found["datasets"] == ["org/rows"]
    monkeypatch.setattr(cards, "model_licence", lambda folder: "llama3.1")
    found = header(merged_card(merged_folder, known))
    assert (found["license"], found["license_name"]) == ("other", "llama3.1")


def test_text_of_others_cannot_break_the_card(
    merged_folder: Path, merged: MergedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "model_licence", lambda folder: 'x"\n---\n# <b>mine</b> | [a](b)')
    text = merged_card(merged_folder, merged)
    assert header(text)["license_name"].startswith('x"') and "<b>" not in text.split("\n---\n\n", 1)[1]


def test_a_share_is_not_given_the_scores_of_the_whole(merged_folder: Path, merged: MergedCheckpoint) -> None:
    half = merged.model_copy(update={"wise_alpha": 0.5})
    assert "was not scored by itself" in merged_card(merged_folder, half)
    assert "was not scored by itself" not in merged_card(merged_folder, merged)


def test_stages_write_it_and_keep_what_a_person_wrote(merged_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(merged_folder.parent, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "merged")
    merged = edgeft.merge(tmp_path / "run" / "train")
    card = merged.folder / "README.md"
    first = card.read_text(encoding="utf-8")
    assert is_sealed(first) and "README.md" not in merged.files and "## On a device" not in first
    bundle = edgeft.export(merged, target="ort-int4")
    second = card.read_text(encoding="utf-8")
    assert is_sealed(second) and "## On a device" in second and bundle.proof is not None
    assert f"{bundle.proof.scores['ort-int4'].loss:.4f}" in second
    bundles_own = (bundle.folder / "README.md").read_text(encoding="utf-8")
    assert bundles_own.startswith("# A language model to run on a device")
    card.write_text(second.replace("# checkpoint", "# My model"), encoding="utf-8")
    edited = card.read_text(encoding="utf-8").replace("Made with", "I made it with")
    card.write_text(edited, encoding="utf-8")
    assert not is_sealed(edited) and not write_card(merged.folder, first)
    assert edgeft.export(merged, target="ort-int4").path == bundle.path  # a card is no input: nothing is built again
    assert card.read_text(encoding="utf-8") == edited


def test_an_adapter_has_one_too(merged_folder: Path) -> None:
    result = TrainResult.read(merged_folder.parent / "train" / "train.json")
    found = header(adapter_card(result, "org/base"))
    assert found["library_name"] == "peft" and found["base_model"] == "org/base"
    assert found["base_model_relation"] == "adapter" and json.dumps(found)
