"""Wise-FT: exact at both ends, right in between, streamed, and refused where it cannot be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import plan_file, run, silent  # noqa: F401  (a fixture)

from edgeft.checkpoint import load_plain
from edgeft.errors import BadInput
from edgeft.merge import MergedCheckpoint, merge


@pytest.fixture(params=["lora", "full"])
def trained(request: Any, plan_file: Any, tmp_path: Path) -> Path:  # noqa: F811
    run(plan_file(tuner=request.param, epochs=2.0, learning_rate=5e-3), tmp_path / "train")
    return tmp_path / "train"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_alpha_0_is_the_base_to_the_byte(trained: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    merge(trained, tmp_path / "merged", wise_alpha=0.0, progress=silent)
    base, merged = weights(checkpoint_folder), weights(tmp_path / "merged")
    assert base.keys() == merged.keys()
    assert all(torch.equal(base[name], merged[name]) for name in base)


def test_alpha_1_is_the_fine_tuned_model_and_half_is_the_mean(
    trained: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    base = weights(checkpoint_folder)
    merge(trained, tmp_path / "one", wise_alpha=1.0, progress=silent)
    merge(trained, tmp_path / "half", wise_alpha=0.5, progress=silent)
    one, half = weights(tmp_path / "one"), weights(tmp_path / "half")
    if (trained / "changed.safetensors").exists():
        changed = load_file(trained / "changed.safetensors")
        assert all(torch.equal(one[name], changed[name]) for name in changed)
    else:  # W0 + alpha / sqrt(r) * B A
        adapter = load_file(trained / "adapter_model.safetensors")
        config = json.loads((trained / "adapter_config.json").read_text())
        for name, a in adapter.items():
            if name.endswith("lora_A.weight"):
                target = name.removeprefix("base_model.model.").replace(".lora_A", "")
                expected = base[target] + config["lora_alpha"] / config["r"] ** 0.5 * (
                    adapter[name.replace("_A", "_B")] @ a
                )
                torch.testing.assert_close(one[target], expected, rtol=1e-6, atol=1e-7)
    moved = [name for name in base if not torch.equal(base[name], one[name])]
    assert moved
    for name in moved:
        torch.testing.assert_close(half[name], (base[name] + one[name]) / 2, rtol=1e-5, atol=1e-7)


def test_merged_model_gives_the_trained_loss(trained: Path, tmp_path: Path) -> None:
    from edgeft.parity import score_model
    from edgeft.train import Data

    merged = merge(trained, tmp_path / "merged", wise_alpha=1.0, progress=silent)
    data = Data.read(merged.train.plan)
    scores = score_model(load_plain(tmp_path / "merged"), data.valid[:4], data.tokenizer, lambda done, total: None)
    assert scores.loss == pytest.approx(merged.train.valid.loss, rel=1e-5)
    assert MergedCheckpoint.read(tmp_path / "merged" / "merged.json") == merged


def test_half_precision_tied_and_sharded_base(plan_file: Any, checkpoint_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """A bf16 base in several shards with tied embeddings stays so, and loads in plain transformers."""
    model = load_plain(checkpoint_folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    base = tmp_path / "tied base"
    model.to(torch.bfloat16).save_pretrained(base, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_bytes((checkpoint_folder / name).read_bytes())
    assert len(list(base.glob("*.safetensors"))) > 1
    path = plan_file(tuner="full", max_steps=3)
    text = path.read_text().replace(str(checkpoint_folder), str(base))
    path.write_text(text)
    from edgeft.planner import Plan, make_plan

    make_plan(Plan.read(path).job).write(path)
    run(path, tmp_path / "train")
    merged = merge(tmp_path / "train", tmp_path / "merged", wise_alpha=0.5, progress=silent)
    assert merged.dtype == "bfloat16" and merged.changed_tensors == merged.tensors
    assert {p.name for p in (tmp_path / "merged").glob("*.safetensors")} == {p.name for p in base.glob("*.safetensors")}
    loaded = load_plain(tmp_path / "merged", torch.bfloat16)
    assert loaded.get_input_embeddings().weight.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()


@pytest.mark.parametrize("wise_alpha", [-0.1, 1.5])
def test_alpha_out_of_range(wise_alpha: float, trained: Path, tmp_path: Path) -> None:
    message = rf"--wise-alpha: must be from 0 \(base\) to 1 \(fine-tuned\), got {wise_alpha}"
    with pytest.raises(BadInput, match=message):
        merge(trained, tmp_path / "merged", wise_alpha=wise_alpha, progress=silent)


def test_another_base_is_refused_with_every_shape(plan_file: Any, tmp_path: Path) -> None:  # noqa: F811
    trained = tmp_path / "train"
    run(plan_file(max_steps=1), trained)
    adapter = load_file(trained / "adapter_model.safetensors")
    wrong = {name: torch.zeros(t.shape[0], t.shape[1] + 1) if "lora_A" in name else t for name, t in adapter.items()}
    save_file(wrong, trained / "adapter_model.safetensors")
    with pytest.raises(BadInput) as caught:
        merge(trained, tmp_path / "merged", wise_alpha=1.0, progress=silent)
    assert "does not fit the base:\nmodel.layers.0." in str(caught.value)
    assert "q_proj.weight: (64, 65) in the fine-tune, (64, 64) in the base" in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_cannot_be_merged_is_refused(plan_file: Any, tmp_path: Path) -> None:  # noqa: F811
    trained = tmp_path / "train"
    run(plan_file(max_steps=1), trained)
    config = json.loads((trained / "adapter_config.json").read_text())
    (trained / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(
        BadInput, match="is an adapter that cannot be merged: use_dora\n\nhint: use plain LoRA or rsLoRA"
    ):
        merge(trained, tmp_path / "merged", wise_alpha=1.0, progress=silent)
