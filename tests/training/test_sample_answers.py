"""Answers before and after training: of scored validation rows, what the models really write, planned and resumed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import killed_at, run, write_plan

from edgeft.errors import BadInput
from edgeft.exporting.outputs import load_as_trained
from edgeft.models.checkpoint import load_plain
from edgeft.models.intervals import paired_means
from edgeft.models.metrics import pair
from edgeft.models.token_f1 import token_f1
from edgeft.planning.plan import Plan
from edgeft.reporting.answers import end_of, without_common_end
from edgeft.reporting.terminal import plan_text, samples_table, train_text
from edgeft.training.job_data import Data
from edgeft.training.result import SampleAnswer, TrainResult

FREE = [{"prompt": f"Package: lib{i}\nSection:", "completion": f" section number {i} of lib"} for i in range(48)]
SETTINGS: dict[str, Any] = {"epochs": 4.0, "learning_rate": 1e-2, "eval_rows": 6}


def rows_file(folder: Path, name: str, rows: list[dict[str, str]]) -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def free(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """The plan of a job on free text, with validation and test rows of their own."""
    names = {"data": FREE[:32], "valid": FREE[32:42], "test": FREE[42:]}
    files = {role: rows_file(tmp_path, f"{role}.jsonl", rows) for role, rows in names.items()}
    return write_plan(tmp_path, checkpoint_folder, **SETTINGS, **files)


def by_generate(model: Any, data: Data, row: Any) -> str:
    """A row's answer by transformers alone, one row at a time."""
    ids = torch.tensor([row.prompt])
    most = len(row) - row.prompt_tokens + 1
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False,
        eos_token_id=data.tokenizer.stop_ids, pad_token_id=data.tokenizer.stop_ids[0],
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    stops = data.tokenizer.stop_ids
    end = next((at for at, token in enumerate(made) if token in stops), len(made))
    return data.tokenizer.spell(made[:end]).strip()


def test_they_are_what_base_and_tuned_model_write(free: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    result = run(free, tmp_path / "train")
    plan = result.plan
    assert (plan.task_score, plan.sample_answers) == ("f1", 30)
    data = Data.read(plan)
    assert [each.expected for each in result.samples] == [row["completion"].strip() for row in FREE[32:38]]
    assert [each.prompt for each in result.samples] == [row["prompt"] for row in FREE[32:38]]
    base, (tuned, _) = load_plain(checkpoint_folder), load_as_trained(tmp_path / "train", result)
    for model, name in ((base, "base"), (tuned, "tuned")):
        written = [by_generate(model, data, row) for row in data.valid[:6]]
        assert [getattr(each, name) for each in result.samples] == written
    assert len({each.tuned for each in result.samples} | {each.base for each in result.samples}) > 2


def test_f1_stands_beside_the_loss_with_its_interval(free: Path, tmp_path: Path) -> None:
    result = run(free, tmp_path / "train")
    for metrics, name in ((result.base_valid, "base"), (result.valid, "tuned")):
        each = [token_f1(sample.expected, getattr(sample, name)) for sample in result.samples]
        assert metrics.f1 == pytest.approx(sum(each) / 6, abs=1e-4) and metrics.f1_rows == 6
        assert metrics.row_f1 == pytest.approx(each, abs=1e-4)
    assert result.test is not None and result.base_test is not None and result.test.f1_rows == 6
    made = pair("base", result.base_valid, "fine-tuned", result.valid)
    assert made is not None and made.f1 is not None
    expected = paired_means(result.base_valid.row_f1, result.valid.row_f1)
    assert (made.f1.low, made.f1.high) == (expected.low, expected.high)
    text = shown(result, 80)
    assert "F1, 6" in text and ", F1 +" in text
    # the loss leads, exact match comes last
    assert text.index("loss") < text.index("F1, 6") < text.index("exact")


def shown(result: TrainResult, width: int) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(train_text(result))
    return console.export_text()


def test_labels_have_exact_match_and_ten_answers(plan_file: Any, tmp_path: Path) -> None:
    result = run(plan_file(**{**SETTINGS, "eval_rows": 4}), tmp_path / "train")
    assert (result.plan.task_score, result.plan.sample_answers) == ("exact_match", 10)
    assert result.valid.f1 is None and "F1" not in shown(result, 120)
    exact = [each.tuned == each.expected for each in result.samples]
    assert "".join("01"[right] for right in exact) == result.valid.row_exact
    falling = tuple((step, 4.0 if step <= 20 else 2.0) for step in range(1, 31))
    poor = result.valid.model_copy(update={"exact_match": 0.7})
    changes = {"loss_curve": falling, "valid": poor, "best_step": 0}
    text = shown(result.model_copy(update=changes), 200)
    assert f"by 50% from the middle third of the steps to the last: more may bring more (--set {more(result)})" in text
    for other in ({"valid": poor.model_copy(update={"exact_match": 1.0})}, {"loss_curve": falling[:10]}):
        assert "fell to the end" not in shown(result.model_copy(update={**changes, **other}), 200)


def more(result: TrainResult) -> str:
    job = result.plan.job
    return f"max_steps={2 * job.max_steps}" if job.max_steps else f"epochs={2 * job.epochs:g}"


@pytest.mark.parametrize("answers", ["labels", "regex: (libs|doc|python)"])
def test_held_answers_are_what_they_are_held_to(answers: str, plan_file: Any, tmp_path: Path) -> None:
    result = run(plan_file(answers=answers, **{**SETTINGS, "epochs": 1.0}), tmp_path / "train")
    assert result.samples and {each.base for each in result.samples} <= {"libs", "doc", "python"}
    exact = [each.tuned == each.expected for each in result.samples]
    assert "".join("01"[right] for right in exact) == result.valid.row_exact


def test_a_run_that_goes_on_has_the_base_answers_of_before(free: Path, tmp_path: Path) -> None:
    whole = run(free, tmp_path / "whole")
    plan = Plan.read(free)
    saved = plan.model_copy(update={"training": plan.training.model_copy(update={"checkpoint_steps": 3})})
    saved.write(free)
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(free, tmp_path / "train", progress=killed_at(5))
    result = run(free, tmp_path / "train", progress=lambda stage, *_: seen.append(stage))
    assert result.samples == whole.samples and len(result.samples) == 6
    assert seen.count("answers") == 2 and "base on valid" not in seen  # of the trained model alone
    assert seen.count("resume") == 1 and result.resumed_at == (3,)


def test_none_are_written_where_none_are_wanted(checkpoint_folder: Path, tmp_path: Path) -> None:
    data = rows_file(tmp_path, "free.jsonl", FREE)
    path = write_plan(tmp_path, checkpoint_folder, data=data, sample_answers=0, **SETTINGS)
    seen: set[str] = set()
    result = run(path, tmp_path / "train", progress=lambda stage, *_: seen.add(stage))
    assert result.samples == () and "answers" not in seen and result.valid.f1 is None
    plan = result.plan
    assert (plan.task_score, plan.sample_answers, plan.answering_seconds) == ("f1", 0, 0.0)
    assert "to write out" not in text_of(plan)


def text_of(plan: Plan) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(plan_text(plan))
    return console.export_text()


def test_a_plan_counts_their_seconds_and_bytes(checkpoint_folder: Path, tmp_path: Path) -> None:
    data = rows_file(tmp_path, "free.jsonl", [
        {"prompt": f"{i}. " + "Package: lib\n" * 5, "completion": f" {i} " + "many words of an answer " * 5}
        for i in range(48)
    ])  # fmt: skip
    plans = [
        Plan.read(write_plan(tmp_path, checkpoint_folder, data=data, valid=data, sample_answers=count, eval_rows=48))
        for count in (0, 4, 40)
    ]
    assert 0 == plans[0].answering_seconds < plans[1].answering_seconds < plans[2].answering_seconds
    assert "to write out 40 of their answers" in text_of(plans[2])
    evaluate = [next(phase for phase in plan.phases if phase.name == "evaluate") for plan in plans]
    assert evaluate[0].expected_bytes <= evaluate[1].expected_bytes <= evaluate[2].expected_bytes
    assert len({phase.high_bytes for phase in evaluate}) == 1, "the most that answers can take was planned before"


@pytest.mark.parametrize("way", [{"stream_layers": True}, {"shard_base": True, "processes": 2}], ids=["files", "parts"])
def test_layers_that_are_not_whole_here_write_none_unless_asked(
    way: dict[str, Any], checkpoint_folder: Path, tmp_path: Path
) -> None:
    how = {"data": rows_file(tmp_path, "free.jsonl", FREE), **way}
    assert Plan.read(write_plan(tmp_path, checkpoint_folder, **how)).sample_answers == 0
    assert Plan.read(write_plan(tmp_path, checkpoint_folder, sample_answers=2, **how)).sample_answers == 2


def test_layers_that_were_left_out_are_there_to_write(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs of frozen layers are of the rows' own tokens: what is written runs through the whole model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = rows_file(tmp_path, "free.jsonl", FREE)
    results = [
        run(
            write_plan(
                tmp_path, checkpoint_folder, data=data, layers="sparse", trained_layers="1", prefix_cache=kept,
                **SETTINGS,
            ),
            tmp_path / f"train{kept}",
        )
        for kept in (True, False)
    ]  # fmt: skip
    assert results[0].plan.training.cached_layers == 1
    assert [each.base for each in results[0].samples] == [each.base for each in results[1].samples]
    assert [each.tuned for each in results[0].samples] == [each.tuned for each in results[1].samples]


def test_a_count_is_a_count(plan_file: Any) -> None:
    with pytest.raises(BadInput, match="sample_answers: input should be greater than or equal to 0"):
        plan_file(sample_answers=-1)


def test_a_table_fits_eighty_columns() -> None:
    samples = [
        SampleAnswer(prompt="long prompt " * 20 + "\nSection:", expected="one\ntwo", base="x " * 400, tuned="one two"),
        SampleAnswer(prompt="short", expected="[red]", base="", tuned="[red]"),
    ]  # fmt: skip
    for bundle in ([], ["[red]", "one\ntwo"]):
        console = Console(record=True, width=80, file=io.StringIO())
        console.print(samples_table(samples, bundle))
        lines = console.export_text().splitlines()
        assert len(lines) == 4 and all(len(line) <= 80 for line in lines)
        assert "...pt long prompt Section:" in lines[2] and "one two" in lines[2] and "[red]" in lines[3]
        assert lines[3].startswith("=" if not bundle else " ")
    assert "bundle" in lines[1]


def test_what_all_prompts_end_with_is_left_out() -> None:
    end = "<|im_end|>\n<|im_start|>assistant\n"
    asked = [f"<|im_start|>user\n{words} the light{end}" for words in ("dim", "turn on", "turn off")]
    assert [each[-9:] for each in without_common_end(asked)] == ["the light"] * 3
    assert end_of(without_common_end(asked)[1]).endswith("user turn on the light")
    assert without_common_end([f"Name: {name}\nSection:" for name in "ab"]) == ["Name: a", "Name: b"]
    assert without_common_end(["one light", "other light"]) == ["one light", "other light"]  # no word is cut
    assert without_common_end([asked[0]]) == [asked[0]] and without_common_end([end, end]) == [end, end]
    assert without_common_end(["", "a"]) == ["", "a"] and without_common_end([]) == []


def test_at_most_ten_are_shown() -> None:
    samples = [SampleAnswer(prompt=f"{i}", expected="a", base="b", tuned="a") for i in range(30)]
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(samples_table(samples))
    lines = console.export_text().splitlines()
    assert len(lines) == 12 and "10 of the scored validation rows, 30 are in train.json" in lines[0]
