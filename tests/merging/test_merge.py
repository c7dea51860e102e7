"""Wise-FT: exact at both ends, right in between, streamed, and refused where it cannot be right."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, run, write_plan

from edgeft.data.dataset import TextTokenizer
from edgeft.errors import BadInput
from edgeft.merging.merge import base_of, merge
from edgeft.merging.result import MergedCheckpoint, MergedForeign
from edgeft.models.checkpoint import load_plain
from edgeft.models.evaluate import evaluate
from edgeft.models.parts import find_parts
from edgeft.progress import silent


@pytest.fixture(scope="module", params=["lora", "full"])
def trained(request: Any, checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of each tuner for all tests here. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    run(write_plan(folder, checkpoint_folder, tuner=request.param, epochs=2.0, learning_rate=5e-3), folder / "train")
    return folder / "train"


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
    from edgeft.training.job_data import Data

    merged = merge(trained, tmp_path / "merged", wise_alpha=1.0, progress=silent)
    data = Data.read(merged.train.plan)
    model = load_plain(tmp_path / "merged")
    scores = evaluate(model, find_parts(model), data.valid[:4], data.tokenizer, device=torch.device("cpu"))
    assert scores.loss == pytest.approx(merged.train.valid.loss, rel=1e-5)
    assert MergedCheckpoint.read(tmp_path / "merged" / "merged.json") == merged


def test_half_precision_tied_and_sharded_base(plan_file: Any, checkpoint_folder: Path, tmp_path: Path) -> None:
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
    from edgeft.planning.plan import Plan, make_plan

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


def test_another_base_is_refused_with_every_shape(plan_file: Any, tmp_path: Path) -> None:
    trained = tmp_path / "train"
    run(plan_file(max_steps=1), trained)
    adapter = load_file(trained / "adapter_model.safetensors")
    wrong = {name: torch.zeros(t.shape[0], t.shape[1] + 1) if "lora_A" in name else t for name, t in adapter.items()}
    save_file(wrong, trained / "adapter_model.safetensors")
    with pytest.raises(BadInput) as caught:
        merge(trained, tmp_path / "merged", wise_alpha=1.0, progress=silent, base=base_of(trained))
    assert "does not fit the base:\nmodel.layers.0." in str(caught.value)
    assert "q_proj.weight: (64, 65) in the fine-tune, (64, 64) in the base" in str(caught.value)
    assert not (tmp_path / "merged").exists()


MEASURE = """
import sys, pathlib
import torch, transformers, edgeft.merging.merge as m
from edgeft.machines import meter
from edgeft.models.checkpoint import Checkpoint
import edgeft.models.spec
edgeft.models.spec.check_weights = lambda folder, spec: None  # a few tensors stand for the model's
meter.control_malloc()
base, tuned, out, alpha = *map(pathlib.Path, sys.argv[1:4]), float(sys.argv[4])
before = meter.rss_bytes()
made = m.merge(tuned, out, wise_alpha=alpha, progress=lambda *_: None, base=str(base))
source = Checkpoint(base)
largest = max(torch.Size(source.shape(n)).numel() * source.itemsize(n) for n in source.owner)
print(largest, made.measured_peak_bytes - before, made.predicted_peak_bytes - before)
"""


def big(folder: Path, rows: int, shards: int, kind: str) -> tuple[Path, Path]:
    """(base in several shards of one [rows, 1024] fp32 tensor each, what changes every one of them)."""
    config = json.loads((CONFIGS / "llama-3.1-8b" / "config.json").read_text())
    base, tuned = folder / "base", folder / kind
    for path in (base, tuned):
        path.mkdir(parents=True, exist_ok=True)
    (base / "config.json").write_text(json.dumps(config))
    names = ["model.embed_tokens"] + [f"model.layers.{i}.mlp.up_proj" for i in range(shards - 1)]
    for i, name in enumerate(names):
        if not (base / f"model-{i}.safetensors").exists():
            save_file({name + ".weight": torch.randn(rows, 1024)}, base / f"model-{i}.safetensors")
    weight_map = {name + ".weight": f"model-{i}.safetensors" for i, name in enumerate(names)}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if kind == "changed":
        for i, name in enumerate(names):  # one file would be built in memory here
            save_file({name + ".weight": torch.randn(rows, 1024)}, tuned / f"model-{i}.safetensors")
        (tuned / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        dora = kind == "dora"
        options = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "use_dora": dora}
        (tuned / "adapter_config.json").write_text(json.dumps(options))
        tensors = {}
        for name in names:
            a, b = ("lora_embedding_A", "lora_embedding_B") if "embed" in name else ("lora_A.weight", "lora_B.weight")
            inner, outer = (rows, 1024) if "embed" in name else (1024, rows)
            tensors |= {f"base_model.model.{name}.{a}": torch.randn(8, inner)}
            tensors |= {f"base_model.model.{name}.{b}": torch.randn(outer, 8)}
            tensors |= {f"base_model.model.{name}.lora_magnitude_vector": torch.ones(outer)} if dora else {}
        save_file(tensors, tuned / "adapter_model.safetensors")
    return base, tuned


@pytest.mark.parametrize(
    "rows, shards",
    [(8192, 2), pytest.param(51200, 4, marks=pytest.mark.slow)],
    ids=["64 MiB", "800 MiB"],
)
def test_a_merge_holds_at_most_three_of_the_largest_tensors(rows: int, shards: int, tmp_path: Path) -> None:
    for kind, alpha in (("changed", 0.5), ("dora", 1.0)):
        base, tuned = big(tmp_path, rows, shards, kind)
        command = [sys.executable, "-c", MEASURE, base, tuned, tmp_path / "out", str(alpha)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        largest, measured, predicted = map(int, done.stdout.split())
        assert largest == rows * 4096
        assert largest <= measured <= min(3 * largest, 1.1 * predicted)
        shutil.rmtree(tmp_path / "out")


# what the fine-tune's own folder says


def adapter(base: Path, out: Path, **config: Any) -> Path:
    """A PEFT adapter folder with a random LoRA change of every q_proj."""
    import peft

    settings = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **config}
    peft.get_peft_model(load_plain(base), peft.LoraConfig(**settings)).save_pretrained(str(out))
    return out


def merged_with(tuned: Path, base: Path, out: Path) -> MergedForeign:
    made = merge(tuned, out, wise_alpha=1.0, progress=silent, base=str(base))
    assert isinstance(made, MergedForeign)
    return made


def test_a_fine_tunes_own_template_and_end_tokens_are_kept(checkpoint_folder: Path, tmp_path: Path) -> None:
    tuned = adapter(checkpoint_folder, tmp_path / "adapter")
    (tuned / "chat_template.jinja").write_text("NEW {{ messages }}")
    (tuned / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    shutil.copyfile(checkpoint_folder / "tokenizer.json", tuned / "tokenizer.json")
    made = merged_with(tuned, checkpoint_folder, tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "NEW {{ messages }}"
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text()) == {"eos_token_id": [0, 2]}
    told = "from the fine-tune's own folder, other than the base's: chat_template.jinja, generation_config.json"
    assert made.notes == (told,)


def test_a_template_inside_the_fine_tunes_tokenizer_is_not_hidden_by_the_bases_file(
    checkpoint_folder: Path, tmp_path: Path
) -> None:
    tuned = adapter(checkpoint_folder, tmp_path / "adapter")
    config = json.loads((checkpoint_folder / "tokenizer_config.json").read_text())
    (tuned / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "NEW {{ messages }}"}))
    merged_with(tuned, checkpoint_folder, tmp_path / "merged")
    assert TextTokenizer(tmp_path / "merged").template_text == "NEW {{ messages }}"


def test_end_tokens_of_a_fine_tuned_checkpoint_are_kept(checkpoint_folder: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(checkpoint_folder, tuned)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    (tuned / "generation_config.json").unlink(missing_ok=True)
    made = merged_with(tuned, checkpoint_folder, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["eos_token_id"] == 2
    assert any("config.json's" in note for note in made.notes)


def test_an_adapter_of_another_base_is_said(checkpoint_folder: Path, tmp_path: Path) -> None:
    tuned = adapter(checkpoint_folder, tmp_path / "adapter")
    assert merged_with(tuned, checkpoint_folder, tmp_path / "same").notes == ()
    shutil.copytree(checkpoint_folder, tmp_path / "copy")
    assert merged_with(tuned, tmp_path / "copy", tmp_path / "copied").notes == ()  # the same weights elsewhere
    config = json.loads((tuned / "adapter_config.json").read_text())
    named = config | {"base_model_name_or_path": "someone/stage1-merged"}
    (tuned / "adapter_config.json").write_text(json.dumps(named))
    note = f"the adapter names another base: someone/stage1-merged; it was merged into {checkpoint_folder}"
    assert merged_with(tuned, checkpoint_folder, tmp_path / "other").notes == (note,)
    snapshot = tmp_path / "models--someone--stage1-merged" / "snapshots" / "abc"
    shutil.copytree(checkpoint_folder, snapshot)
    assert merged_with(tuned, snapshot, tmp_path / "hub").notes == ()


def test_a_change_of_nothing_is_said(checkpoint_folder: Path, tmp_path: Path) -> None:
    tuned = adapter(checkpoint_folder, tmp_path / "adapter", init_lora_weights=True)
    made = merged_with(tuned, checkpoint_folder, tmp_path / "merged")
    assert made.notes == ("nothing was changed: the fine-tune is the base, bit for bit",)
    assert all(torch.equal(weights(checkpoint_folder)[n], t) for n, t in weights(tmp_path / "merged").items())


@pytest.fixture
def tied(checkpoint_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tied"
    shutil.copytree(checkpoint_folder, folder)
    tensors = weights(folder)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


@pytest.mark.parametrize("moved", [False, True])
def test_an_embedding_stored_unchanged_stays_tied(moved: bool, tied: Path, tmp_path: Path) -> None:
    tuned = adapter(tied, tmp_path / "adapter")
    tensors = load_file(tuned / "adapter_model.safetensors")
    embedding = weights(tied)["model.embed_tokens.weight"] + float(moved)
    tensors["base_model.model.model.embed_tokens.weight"] = embedding
    save_file(tensors, tuned / "adapter_model.safetensors", {"format": "pt"})
    made = merged_with(tuned, tied, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is not moved and made.untied_head is moved
    assert ("lm_head.weight" in weights(tmp_path / "merged")) is moved


def test_a_tied_fine_tune_whose_head_alone_moved_is_untied(tied: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(tied, tuned)
    tensors = weights(tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    merged_with(tuned, tied, tmp_path / "merged")
    merged = weights(tmp_path / "merged")
    assert torch.equal(merged["lm_head.weight"], tensors["lm_head.weight"])
    assert torch.equal(merged["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])


def test_an_adapter_for_layers_that_the_base_has_not_is_refused(checkpoint_folder: Path, tmp_path: Path) -> None:
    tuned = adapter(checkpoint_folder, tmp_path / "adapter")
    tensors = load_file(tuned / "adapter_model.safetensors")
    more = {name.replace("layers.1", "layers.7"): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | more, tuned / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"model\.layers\.7\.self_attn\.q_proj\.weight: not in the base"):
        merged_with(tuned, checkpoint_folder, tmp_path / "merged")
