"""Two layers of the real model go the whole way before training: what would fail later fails now, by name."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ROWS
from warm import edgeft

from edgeft.errors import BadInput, ParityFailed
from edgeft.exporting import rehearsal
from edgeft.exporting.rehearsal import FILE, ROUNDED_ALIKE, first_layers, go_through, key_of, rehearse
from edgeft.exporting.small_model import CannotCut, count_layers, cut
from edgeft.machines.limits import Limit
from edgeft.models.checkpoint import Checkpoint, load_plain
from edgeft.models.spec import read_model_spec
from edgeft.planning.plan import Plan, make_plan
from edgeft.reporting.words import rehearsal_line
from edgeft.settings.job import make_job
from edgeft.targets.runtimes import RUNTIMES
from edgeft.targets.target import Target, load_target
from edgeft.training.result import Rehearsal

FP32, INT4 = load_target("ort-fp32"), load_target("ort-int4")


def llama(folder: Path, tokenizer_folder: Path, shard: str = "1GB", **changes: Any) -> Path:
    """A Llama of four layers with random weights and the tiny tokenizer, in shards where asked."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def four_layers(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("four"), tokenizer_folder)


def plan_of(model: Path, folder: Path, rows: list[Any] | None = None, **settings: Any) -> Plan:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    pins = {"batch_size": 4, "max_steps": 2, "rank": 4, "eval_rows": 4, **settings}
    return make_plan(make_job(model=str(model), data=str(data), profile="cpu-8gb", **pins))


def test_an_excerpt_is_the_first_layers_bit_for_bit(tokenizer_folder: Path, tmp_path: Path) -> None:
    source, out = llama(tmp_path / "source", tokenizer_folder, "100KB"), tmp_path / "out"
    out.mkdir()
    assert len(Checkpoint(source).files) > 2
    assert cut(source, out) == 2
    whole, part = Checkpoint(source), Checkpoint(out)
    later = ("model.layers.2.", "model.layers.3.")
    assert set(part.owner) == {name for name in whole.owner if not name.startswith(later)}
    assert all(torch.equal(part.read(name), whole.read(name)) for name in part.owner)
    # its hidden states are those of the whole model, below what was cut
    ids, models = torch.tensor([[5, 6, 7]]), [load_plain(folder) for folder in (source, out)]
    hooked: list[torch.Tensor] = []
    models[0].model.layers[1].register_forward_hook(lambda module, inputs, output: hooked.append(output))
    models[1].model.layers[1].register_forward_hook(lambda module, inputs, output: hooked.append(output))
    with torch.no_grad():
        for model in models:
            model(input_ids=ids)
    assert torch.equal(hooked[0], hooked[1])
    assert read_model_spec(str(out)).total_parameters == sum(torch.Size(part.shape(n)).numel() for n in part.owner)
    counted = first_layers(read_model_spec(str(source)), 2)
    assert counted.total_parameters == read_model_spec(str(out)).total_parameters


def gemma3(folder: Path, layers: int) -> Path:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, layer_types=["sliding_attention"] * (layers - 1) + ["full_attention"],
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_layers_of_several_kinds_are_all_shown_or_it_is_said(tmp_path: Path) -> None:
    source, out = gemma3(tmp_path / "six", 6), tmp_path / "out"
    out.mkdir()
    assert cut(source, out) == 6 and load_plain(out).config.layer_types[-1] == "full_attention"
    with pytest.raises(CannotCut, match=r"its 9 layers are of 2 kinds, which the first 8 do not show"):
        count_layers(gemma3(tmp_path / "nine", 9))


def test_names_without_numbered_layers_are_not_cut(four_layers: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(four_layers, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name.replace(".layers.", ".layers_"): t for name, t in tensors.items()}, other / "model.safetensors")
    with pytest.raises(CannotCut, match="no 4 layers are numbered in its tensors' names"):
        count_layers(other)


@pytest.mark.parametrize("settings", [{}, {"tuner": "full"}, {"layers": "lisa", "active_layers": 1}])
def test_every_kind_of_change_goes_the_whole_way(settings: dict[str, Any], four_layers: Path, tmp_path: Path) -> None:
    made = go_through(plan_of(four_layers, tmp_path, **settings), FP32, tmp_path)
    assert (made.target, made.skipped, made.layers) == ("ort-fp32", "", 2)
    assert [rung.name for rung in made.rungs] == ["merged", "stored", "artifact"]
    assert all(rung.problems == () for rung in made.rungs) and (made.rungs[-1].mean_kl_nats or 0) < 1e-5
    assert made.generated_tokens > 0
    changed = Checkpoint(tmp_path / "merged"), Checkpoint(tmp_path / "base")
    moved = {name for name in changed[0].owner if not torch.equal(*(c.read(name) for c in changed))}
    assert any("layers.0." in name for name in moved) and any("layers.1." in name for name in moved)


def test_a_record_stays_beside_the_run_and_is_not_made_twice(four_layers: Path, tmp_path: Path) -> None:
    plan, work = plan_of(four_layers, tmp_path), tmp_path / ".train.work"
    made = rehearse(plan, INT4, work, "digest")
    assert made.layers == 2 and made.seconds > 0 and made.predicted_peak_bytes > made.measured_peak_bytes > 0
    again = rehearse(plan, INT4, work, "digest")
    assert Rehearsal.read(work / FILE) == made == again.model_copy(update={"kept": False}) and again.kept
    assert rehearsal_line(again) == f"{rehearsal_line(made)}, kept from before the run was stopped"
    assert [path.name for path in work.iterdir()] == [FILE]  # nothing of the excerpt is left
    (work / "plan.sha256").write_text("digest")
    (work / "step-1").mkdir()
    assert rehearse(plan, FP32, work, "digest").skipped == "the run goes on from a checkpoint"


def test_one_rehearsal_serves_runs_that_differ_in_pace_alone(
    four_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rehearsal, "LEAST_SECONDS", 0.0)
    gone = list[Target]()
    made = rehearsal._in_a_process

    def counted(plan: Plan, target: Target, scratch: Path) -> Rehearsal:
        gone.append(target)
        return made(plan, target, scratch)

    monkeypatch.setattr(rehearsal, "_in_a_process", counted)

    def run(name: str, target: Target = INT4, **settings: Any) -> Rehearsal:
        return rehearse(plan_of(four_layers, tmp_path, **settings), target, tmp_path / name, name)

    first = run("first")
    assert first.earlier == "" and len(gone) == 1
    (kept,) = (tmp_path / "edgeft" / "rehearsals").iterdir()
    again = run("again", learning_rate=1e-4, max_steps=3, batch_size=2)
    assert again == first.model_copy(update={"input_sha256": again.input_sha256, "earlier": str(kept)})
    assert len(gone) == 1 and str(kept) in rehearsal_line(again)
    for name, other in (("rank", {"rank": 8}), ("tuner", {"tuner": "full"}), ("target", {"target": FP32})):
        assert run(name, **other).earlier == "", name
    monkeypatch.setattr(rehearsal, "versions", lambda: {"onnxruntime": "another"})
    assert run("version").earlier == ""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    changed = first.rungs[0].model_copy(update={"problems": ("it failed",)})
    for text in ("no json", first.model_copy(update={"rungs": (changed, *first.rungs[1:])}).model_dump_json()):
        kept.write_text(text)
        assert run("damaged" + str(len(text))).earlier == ""


def test_another_base_is_rehearsed_for_itself(four_layers: Path, tmp_path: Path) -> None:
    """By the bytes of its weights, wherever it lies."""
    model = tmp_path / "model"
    shutil.copytree(four_layers, model)
    plan = plan_of(model, tmp_path)
    before = key_of(plan, INT4)
    with next(model.glob("*.safetensors")).open("r+b") as opened:
        opened.seek(-4, 2)
        opened.write(b"\x01\x02\x03\x3c")
    after = key_of(plan, INT4)
    assert before["base"] != after["base"] and {**before, "base": after["base"]} == after


def failing(case: str, four_layers: Path, tmp_path: Path, tokenizer_folder: Path) -> tuple[Plan, str]:
    """(plan, message) of what would have failed only after training."""
    model = tmp_path / "model"
    if case == "architecture":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=400, n_embd=32, n_layer=3, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=0
        )
        GPT2LMHeadModel(config).save_pretrained(model)
        for path in tokenizer_folder.iterdir():
            shutil.copyfile(path, model / path.name)
        return plan_of(model, tmp_path, max_length=32), "onnxruntime-genai cannot build this architecture: "
    shutil.copytree(four_layers, model)
    if case == "template":
        template = (model / "chat_template.jinja").read_text()
        (model / "chat_template.jinja").write_text(
            template.replace("message['content']", "message['content'].swapcase()")
        )
        chat = [{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]}] * 24
        return plan_of(model, tmp_path, chat), "chat template: the runtime cannot render it: "
    assert case == "tokenizer"
    content = json.loads((model / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[aeiou]"}, "content": "x"}
    (model / "tokenizer.json").write_text(json.dumps(content))
    return plan_of(model, tmp_path), "tokenizer: the runtime encodes "


@pytest.mark.parametrize("case", ["architecture", "template", "tokenizer"])
def test_what_would_fail_after_training_fails_before(
    case: str, four_layers: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    plan, message = failing(case, four_layers, tmp_path, tokenizer_folder)
    with pytest.raises((BadInput, ParityFailed), match=message) as caught:
        go_through(plan, INT4, tmp_path)
    if case == "architecture":
        with pytest.raises(BadInput) as passed_on:
            rehearse(plan, INT4, tmp_path / "work", "digest")
        model = tmp_path / "model"
        assert str(passed_on.value).startswith(f"rehearsal for ort-int4: {model}: {message}")
        assert passed_on.value.problem == caught.value.problem.replace(str(tmp_path / "merged"), str(model))
        hint = "name another target (edgeft train --target), or train all the same with --no-rehearsal"
        assert passed_on.value.hint == f"{caught.value.hint}; {hint}"
        assert not (tmp_path / "work" / FILE).exists()


def test_an_artifact_that_computes_something_else_is_found(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention without rotary positions, as a runtime that does not know a model's kind of them would compute."""
    from edgeft.targets import ort

    model = llama(tmp_path / "model", tokenizer_folder, initializer_range=0.2)
    plan, scratch = plan_of(model, tmp_path), [tmp_path / name for name in ("right", "wrong")]
    for folder in scratch:
        folder.mkdir()
    rung = go_through(plan, INT4, scratch[0]).rungs[-2]
    assert rung.against == "rounded" and rung.mean_kl_nats is not None
    assert rung.mean_kl_nats < 0.2 * ROUNDED_ALIKE.max_mean_kl_nats
    real = ort.build_model

    def elsewhere(merged: Path, *rest: Any) -> int:
        other = merged.with_name("elsewhere")
        shutil.copytree(merged, other)
        config = json.loads((other / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 1.0
        (other / "config.json").write_text(json.dumps(config))
        return real(other, *rest)

    monkeypatch.setattr(ort, "build_model", elsewhere)
    with pytest.raises(ParityFailed, match=r"rung 'stored' against 'merged': cos_cache: "):
        go_through(plan, INT4, scratch[1])


def test_what_cannot_be_rehearsed_here_is_said(
    four_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(four_layers, tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(RUNTIMES, INT4.runtime, replace(RUNTIMES[INT4.runtime], module="no_such_module"))
        assert go_through(plan, INT4, tmp_path).skipped == "onnxruntime-genai is not installed here"
    with monkeypatch.context() as patch:
        patch.setattr(rehearsal, "memory_limit", lambda: Limit(2**20, "ulimit -v of 1.00 MiB"))
        found = go_through(plan, INT4, tmp_path).skipped
        assert found.startswith("it may need ") and found.endswith("1.00 MiB can be had (ulimit -v of 1.00 MiB)")
    small = plan.model_copy(update={"budget_bytes": 2**28})
    assert go_through(small, INT4, tmp_path).skipped.endswith("the budget is 256 MiB")
    with monkeypatch.context() as patch:
        patch.setattr("edgeft.memory.disk.free_bytes", lambda folder: 2**20)
        assert go_through(plan, INT4, tmp_path).skipped.endswith("of disk, 1.00 MiB are free")


def test_a_process_that_dies_is_reported(four_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BadInput, match=r"rehearsal for ort-int4: its process: the process ended:"):
        rehearse(plan_of(four_layers, tmp_path), INT4, tmp_path / "work", "digest")


def test_the_verb_rehearses_first_and_train_json_says_what_came_of_it(four_layers: Path, tmp_path: Path) -> None:
    plan_of(four_layers, tmp_path).write(tmp_path / "plan.json")
    train = ("train", tmp_path / "plan.json")
    done = edgeft(*train, "--target", "ort-fp32", code=0)
    said = "rehearsed: 2 layers went from merge to ort-fp32 and answered, in "
    assert said in done.stderr and said in done.stdout
    assert json.loads((tmp_path / "train" / "train.json").read_text())["rehearsal"]["layers"] == 2
    skipped = edgeft(*train, "--no-rehearsal", "--out", tmp_path / "other", code=0)
    assert "not rehearsed: not asked for" in skipped.stdout
    assert json.loads((tmp_path / "other" / "train.json").read_text())["rehearsal"]["skipped"] == "not asked for"
