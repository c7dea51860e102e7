"""Forms of a model on a user's own rows: the numbers are those of an export's proof; what makes no pair is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from bundles import reseal
from tiny import ROWS, run, write_plan

import edgeft
from edgeft.data.tokenizer import TextTokenizer
from edgeft.errors import BadInput, MissingExtra
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.evaluation import forms_of
from edgeft.exporting.harness import InTorch, begin, harness_model, scored, split
from edgeft.models.checkpoint import load_plain


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: Path) -> Path:
    """The folder of a run on ROWS, judged by rows of its own that no other row repeats, up to its bundle."""
    folder = tmp_path_factory.mktemp("job")
    rows = [
        {"prompt": f"Package: own{i}\nSection:", "completion": f" {('libs', 'doc', 'python')[i % 3]}"} for i in range(9)
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = write_plan(
        folder, checkpoint_folder, epochs=6.0, learning_rate=1e-2, valid=str(folder / "own.jsonl"), eval_rows=9
    )
    run(plan, folder / "train")
    edgeft.export(edgeft.merge(folder / "train"), target="ort-int4")
    return folder


@pytest.fixture(scope="module")
def made(job: Path) -> Any:
    return edgeft.evaluate(job, data=job / "own.jsonl", out=job / "evaluation.json")


def test_the_scores_are_those_of_the_proof(made: Any, job: Path) -> None:
    """The same rows through the same two runners: not near, the same."""
    proof = edgeft.Bundle.read(job / "bundle" / "bundle.json").proof
    assert proof is not None and proof.scored_on == "validation"
    assert list(made.scores) == ["base", "merged", "ort-int4"]
    for name in ("merged", "ort-int4"):
        assert made.scores[name].marked == proof.scores[name]
    assert made.scores["base"].loss == pytest.approx(proof.scores["base"].loss, rel=1e-5)
    assert made.scores["base"].row_exact == proof.scores["base"].row_exact


def test_differences_are_those_of_the_rows(made: Any) -> None:
    pairs = {(each.before, each.after): each for each in made.pairs}
    assert list(pairs) == [("base", "merged"), ("merged", "ort-int4"), ("base", "ort-int4")]
    first, second = made.scores["base"], made.scores["merged"]
    by_hand = (sum(second.row_losses) - sum(first.row_losses)) / sum(first.row_tokens)
    learnt = pairs["base", "merged"].loss
    assert learnt.difference == pytest.approx(by_hand) and learnt.shown and learnt.high < 0
    text = str(made)
    assert "9 rows of own.jsonl" in text and "no difference shown" in text and "base" in text


def test_the_result_is_kept_and_is_one_json_object(made: Any, job: Path) -> None:
    from edgeft.api.results import Evaluation

    assert Evaluation.read(job / "evaluation.json").scores == made.scores
    assert made.data_sha256 and made.forms[2].kind == "bundle"


def test_a_merge_that_took_nothing_scores_as_the_base(job: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    """The planted fault: were a form read from anywhere but its folder, this would score as the fine-tune does."""
    shutil.copytree(job / "merged", tmp_path / "merged")
    shutil.copyfile(checkpoint_folder / "model.safetensors", tmp_path / "merged" / "model.safetensors")
    found = edgeft.evaluate(checkpoint_folder, tmp_path / "merged", job / "merged", data=job / "own.jsonl")
    names = list(found.scores)
    assert len(names) == 3 and names[2] == "merged 2"
    same, learnt = found.pairs[0].loss, found.pairs[1].loss
    assert same.difference == 0.0 and not same.shown and learnt.high < 0


def test_a_bundle_of_something_else_shows(job: Path, tmp_path: Path) -> None:
    """A bundle is scored by its own weights: those of the base, in the fine-tune's bundle, lose what was learnt."""
    base = edgeft.merge(job / "train", tmp_path / "merged", wise_alpha=0.0)
    other = edgeft.export(base, tmp_path / "bundle", target="ort-int4", train=job / "train")
    found = edgeft.evaluate(job / "merged", other, data=job / "own.jsonl")
    assert found.pairs[0].loss.low > 0


def test_what_cannot_be_scored_is_refused(job: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"needs rows or tasks, one of them"):
        edgeft.evaluate(job)
    with pytest.raises(BadInput, match=r"holds neither config\.json nor bundle\.json"):
        edgeft.evaluate(tmp_path, data=job / "own.jsonl")
    shutil.copytree(job / "bundle", tmp_path / "failed")
    reseal(tmp_path / "failed", lambda manifest: manifest.update(failed="parity ladder, rung 'merged'"))
    with pytest.raises(BadInput, match=r"failed its proof: parity ladder, rung 'merged'"):
        forms_of([tmp_path / "failed"])
    shutil.copytree(job / "merged", tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(
        BadInput, match=r"other: has another chat template than .*merged: their losses cannot be compared"
    ):
        edgeft.evaluate(job / "merged", tmp_path / "other", data=job / "own.jsonl")


def test_rows_without_a_prompt_have_a_loss_alone(job: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "Package: libx"}\n{"text": "Section: doc"}\n')
    found = edgeft.evaluate(job / "merged", job / "bundle", data=tmp_path / "texts.jsonl")
    assert [each.exact_match for each in found.scores.values()] == [None, None] and found.pairs[0].loss is not None


def test_rows_are_cut_to_what_every_form_can_read(job: Path, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "Package: lib " * 400}) + "\n")
    found = edgeft.evaluate(job / "merged", job / "bundle", data=tmp_path / "long.jsonl", max_length=64)
    assert found.cut_rows == 1 and found.scores["merged"].row_tokens[0] < 64


# lm-eval


class Fixed:
    """A form whose logits are a table's, whatever comes before."""

    context_tokens = 8
    table = numpy.random.default_rng(0).normal(size=(20, 20)).astype(numpy.float32)

    def logits(self, ids: list[int], first: int = 0) -> Any:
        return self.table[ids[first:]]

    def greedy(self, ids: list[int], max_new_tokens: int, eos_ids: Sequence[int]) -> list[int]:
        return [1, 2, 3][:max_new_tokens]


def test_a_continuation_has_the_log_probability_that_torch_gives() -> None:
    found, likely = scored(Fixed(), [3, 4], [5, 6])
    rows = torch.log_softmax(torch.from_numpy(Fixed.table), dim=-1)
    assert found == pytest.approx(float(rows[4, 5] + rows[5, 6]), rel=1e-6) and not likely
    best = [int(Fixed.table[4].argmax())]
    assert scored(Fixed(), [3, 4], best)[1]
    assert scored(Fixed(), list(range(12)), [5])[0] == pytest.approx(float(rows[11, 5]), rel=1e-6)  # the start is lost
    with pytest.raises(BadInput, match="longer than the context"):
        scored(Fixed(), [1], list(range(9)))


def test_white_space_at_the_border_belongs_to_what_follows(tokenizer_folder: Path) -> None:
    tokenizer = TextTokenizer(tokenizer_folder)
    whole = tokenizer.encode(["Package: x libs"])[0]
    for context, continuation in (("Package: x", " libs"), ("Package: x ", "libs")):
        before, after = split(tokenizer, context, continuation)
        assert [*before, *after] == [*tokenizer.prefix_ids, *whole] and tokenizer.decode(after) == " libs"
    assert split(tokenizer, "", "Package")[0] == begin(tokenizer)


def test_a_checkpoint_and_its_fp32_bundle_answer_tasks_alike(job: Path, tmp_path: Path) -> None:
    exported = edgeft.export(job / "merged", tmp_path / "bundle", target="ort-fp32", train=job / "train")
    tokenizer, forms = (
        TextTokenizer(job / "merged"),
        (InTorch(load_plain(job / "merged")), ArtifactModel(exported.folder)),
    )
    for row in ROWS[:3]:
        one, other = (scored(form, *split(tokenizer, row["prompt"], row["completion"])) for form in forms)
        assert one[0] == pytest.approx(other[0], abs=1e-3) and one[1] == other[1] and math.isfinite(one[0])


def test_tasks_without_lm_eval_are_exit_5(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeft.machines import extras

    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else object())
    with pytest.raises(MissingExtra, match=r"lm_eval: is not installed\n\nhint: pip install .*\[lm-eval\]"):
        edgeft.evaluate(job / "merged", tasks=["arc_easy"])


TASK = """task: sections
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: [" libs", " doc", " python"]
doc_to_target: answer
metric_list:
  - metric: acc
"""


def test_a_task_of_ones_own_is_asked_by_the_same_runner(job: Path, tmp_path: Path) -> None:
    """The share that lm-eval gives is the one counted by hand from each choice's log-probability."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install edgeft[lm-eval]")
    rows = [{"prompt": f"Package: own{i}\nSection:", "answer": i % 3} for i in range(6)]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sections.yaml").write_text(TASK.format(file=tmp_path / "rows.json"))
    found = edgeft.evaluate(job / "merged", job / "bundle", tasks=["sections"], task_folder=tmp_path)
    tokenizer, form = TextTokenizer(job / "merged"), ArtifactModel(job / "bundle")
    right = 0
    for row in rows:
        values = [scored(form, *split(tokenizer, str(row["prompt"]), c))[0] for c in (" libs", " doc", " python")]
        right += values.index(max(values)) == row["answer"]
    by_name = {form: {score.metric: score for score in scores} for form, scores in found.tasks.items()}
    assert by_name["bundle"]["acc"].value == pytest.approx(right / len(rows)) and by_name["bundle"]["acc"].samples == 6
    with pytest.raises(BadInput, match="lm-eval knows no nothing_like_it"):
        edgeft.evaluate(job / "merged", tasks=["nothing_like_it"])
    assert harness_model(form, tokenizer, lambda done, total: None) is not None
