"""Each rung of the ladder by itself: what it compares, what passes, and nothing is compared with itself."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import PROMPTS, bundle, checkpoint, reference, some_ids
from tiny import ROWS, run
from transformers import AutoModelForCausalLM

from edgeft.data.dataset import IGNORED, Sample, TextTokenizer
from edgeft.exporting import artifact_answers, outputs
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.artifact_answers import cannot_match
from edgeft.exporting.bundle import Bundle
from edgeft.exporting.outputs import (
    is_original,
    load_as_trained,
    observe_artifact,
    observe_model,
    trained_settings,
)
from edgeft.exporting.stored_codes import GraphFile, stored_rung
from edgeft.exporting.trained_rung import trained_rung
from edgeft.merging.merge import merge
from edgeft.merging.merged_tensors import merged_rung
from edgeft.models.checkpoint import Checkpoint
from edgeft.models.layer_shares import Shares
from edgeft.models.metrics import Metrics
from edgeft.planning.plan import make_plan
from edgeft.progress import silent
from edgeft.settings.job import make_job
from edgeft.targets.target import load_target
from edgeft.training.job_data import Data
from edgeft.training.result import TrainResult


def sample(ids: list[int], answer: int) -> Sample:
    labels = [IGNORED] * (len(ids) - answer) + ids[len(ids) - answer :]
    return Sample(ids, labels, len(ids) - answer)


def rows(count: int = 6) -> list[Sample]:
    ids = some_ids(400)
    return [sample(ids[20 * i : 20 * i + 12 + i], 3 + i % 2) for i in range(count)]


def test_one_pass_gives_the_losses_of_torch() -> None:
    """Against transformers' own loss, a row at a time."""
    model, given = reference(), rows()
    form = observe_model("form", model, given, group_tokens=64)
    for number, each in enumerate(given):
        with torch.no_grad():
            labels = torch.tensor([each.labels])
            own = float(model(input_ids=torch.tensor([each.ids]), labels=labels).loss) * form.tokens[number]
        assert form.losses[number] == pytest.approx(own, rel=1e-4)
    assert form.log_probabilities.shape == (sum(form.tokens), model.config.vocab_size)
    assert form.loss == pytest.approx(sum(form.losses) / sum(form.tokens))


def test_an_artifact_is_followed_as_it_is_decoded() -> None:
    """Row's own answers: the model's greedy one, a wrong one, and one that goes wrong at its end."""
    model, tokenizer = ArtifactModel(bundle("ort-fp32")), TextTokenizer(checkpoint())
    prompt = some_ids(14)
    right = model._runner.greedy(prompt, 5, [])
    given = [sample([*prompt, *right, 0], 6), sample([*prompt, 7, 8, 9, 0], 4), sample([*prompt, *right[:3], 9, 0], 5)]
    for each in given:
        first = each.prompt_tokens - 1
        parts = list[Any]()
        answer = model.follow(each.ids, first, each.prompt_tokens, 8, [0], parts.append)
        logits = np.concatenate(parts)
        expected = model._runner.logits(each.ids)[first:-1]
        assert logits.shape == expected.shape
        assert abs(logits - expected).max() < 1e-3
        assert answer == model._runner.greedy(prompt, 8, [0])
    seen = observe_artifact("artifact", model, given, tokenizer)
    torch_form = observe_model("torch", AutoModelForCausalLM.from_pretrained(checkpoint()).eval(), given)
    assert seen.losses == pytest.approx(torch_form.losses, abs=1e-3) and seen.exact == ()


def test_a_row_whose_earlier_answer_is_trained_is_followed_from_there() -> None:
    model, ids = ArtifactModel(bundle("ort-fp32")), some_ids(20)
    expected = model._runner.logits(ids)
    for first in (0, 3, 12):  # also where the very first token is answered
        parts = list[Any]()
        model.follow(ids, first, 14, 8, [0], parts.append)
        assert abs(np.concatenate(parts) - expected[first:-1]).max() < 1e-3


def test_a_row_that_is_followed_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt, other = ArtifactModel(bundle("ort-fp32")), some_ids(14), some_ids(30)[16:]
    right = model._runner.greedy(prompt, 4, [])
    model._runner.kept = None
    session = type(model._runner.engine.start(4))
    append, asked = session.append, list[int]()

    def counted(self: Any, ids: list[int], every: bool = False) -> Any:
        asked.append(len(ids))
        return append(self, ids, every)

    monkeypatch.setattr(session, "append", counted)
    model.follow([*prompt, *right, 0], 13, 14, 5, [0], lambda rows: None)
    assert asked == [14, 1, 1, 1, 1]  # the prompt, and each token of the answer
    asked.clear()
    model.follow([*prompt, 7, 8, 0], 13, 14, 5, [0], lambda rows: None, lambda made: True)
    # decoding ends at once where it cannot match, and the row's own answer is read behind the prompt, of which all but
    # two tokens are those that the cache still has of the last row
    assert asked == [2, 2]
    asked.clear()
    model.follow([*other, *right[:2], 7, 8, 0], 13, 14, 5, [0], lambda rows: None)
    assert asked[0] == 14 and max(asked[1:]) <= 4  # it is forgotten to where it left the row's own tokens


def test_answers_read_in_one_pass_are_judged_as_decoded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right ones, wrong ones, one that stops early, and one that spells the same text in other tokens."""
    model, tokenizer = ArtifactModel(bundle("ort-fp32")), TextTokenizer(checkpoint())
    given = list[Sample]()
    for number in range(40):
        prompt = some_ids(400)[7 * number : 7 * number + 9]
        right = model._runner.greedy(prompt, 4, [])
        wrong = [*right[: number % 4], 9, *right[number % 4 + 1 :]]
        given += [sample([*prompt, *right], 4), sample([*prompt, *wrong], 4)]
    decoded = observe_artifact("artifact", model, given[:64], tokenizer, answers=slice(None))
    monkeypatch.setattr(outputs, "PARITY_PROMPTS", 2)
    kinds = Counter[bool | None]()
    judged = artifact_answers.judge

    def counted(*asked: Any) -> bool | None:
        found = judged(*asked)
        kinds[found] += 1
        return found

    monkeypatch.setattr(artifact_answers, "judge", counted)
    read = observe_artifact("artifact", model, given[:64], tokenizer, answers=slice(None))
    assert read.exact == decoded.exact and 20 <= sum(read.exact) < 64
    assert read.losses == pytest.approx(decoded.losses, abs=1e-4)
    assert kinds[True] and kinds[False] and kinds.total() == 62
    monkeypatch.setattr(artifact_answers, "judge", lambda *asked: None)  # where all are open, all are decoded
    assert observe_artifact("artifact", model, given[:64], tokenizer, answers=slice(None)).exact == decoded.exact
    monkeypatch.setattr(model, "greedy", lambda *asked: [])
    assert sum(observe_artifact("artifact", model, given[:64], tokenizer, answers=slice(None)).exact) <= 2


def test_exactness_of_a_torch_form_is_that_of_decoding(checkpoint_folder: Path, write_rows: Any) -> None:
    from edgeft.models.evaluate import evaluate
    from edgeft.models.parts import find_parts

    tokenizer = TextTokenizer(checkpoint())
    model = AutoModelForCausalLM.from_pretrained(checkpoint()).eval()
    prompt = some_ids(14)
    made = list(prompt)
    for _ in range(4):
        with torch.no_grad():
            made.append(int(model(torch.tensor([made])).logits[0, -1].argmax()))
    given = [sample(made, 4), sample([*prompt, 7, 8, 9], 3), sample([*made[:-1], 9], 4)]
    form = observe_model("form", model, given, tokenizer, answers=slice(None))
    own = evaluate(model, find_parts(model), given, tokenizer, device=torch.device("cpu"))
    mine = form.metrics(given, tokenizer)
    assert mine.exact_match == own.exact_match and mine.row_exact == own.row_exact
    assert own.row_tokens == mine.row_tokens and own.row_losses == pytest.approx(form.losses, rel=1e-5)


def test_when_an_answer_can_no_longer_match() -> None:
    tokenizer = TextTokenizer(checkpoint())
    ids = tokenizer.encode(["Section: libs and more"])[0]
    row = Sample(ids, list(ids), 2)
    assert not cannot_match(tokenizer, row, [])
    assert not cannot_match(tokenizer, row, ids[2:4])
    assert not cannot_match(tokenizer, row, ids[2:])
    assert cannot_match(tokenizer, row, [*ids[2:], *ids[2:4]])
    assert cannot_match(tokenizer, row, ids[3:5])


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {}, "lora on nf4": {"base_precision": "nf4"},
    "sparse on nf4": {"tuner": "full", "layers": "sparse", "active_layers": 1, "base_precision": "nf4"},
    "lisa on nf4": {"tuner": "full", "layers": "lisa", "active_layers": 1, "base_precision": "nf4"},
    "lisa on nf4, ends in turn": {
        "tuner": "full", "layers": "lisa", "active_layers": 1, "base_precision": "nf4", "embedding": "on",
        "norm": "rotate",
    },
    "full, all ends": {"tuner": "full", "embedding": "on", "norm": "on"},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_the_model_as_trained_gives_train_jsons_score(name: str, checkpoint_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {"batch_size": 4, "epochs": 3.0, "rank": 4, "learning_rate": 1e-2, "eval_rows": 4} | SETTINGS[name]
    make_plan(make_job(model=str(checkpoint_folder), data=str(data), profile="cpu-8gb", **values)).write(
        tmp_path / "plan.json"
    )
    result = run(tmp_path / "plan.json", tmp_path / "train")
    valid = Data.read(result.plan, train=False).valid[:4]
    model, compute = load_as_trained(tmp_path / "train", result)
    given = observe_model("trained", model, valid, compute=compute, group_tokens=result.plan.training.group_tokens)
    assert trained_rung(given, result.valid, compute, "cpu").problems == ()
    assert given.loss == pytest.approx(result.valid.loss, abs=1e-5)
    training, dtype, _ = trained_settings(result)
    assert is_original(training, dtype) == ("nf4" not in name)
    for shares in (Shares(), Shares(rest=0.3)):
        merge(tmp_path / "train", tmp_path / "merged", wise_alpha=shares, progress=silent)
        rung = merged_rung(checkpoint_folder, tmp_path / "train", tmp_path / "merged", training, shares)
        assert rung.problems == () and rung.tensors == 21
        other = Shares(rest=shares.rest - 0.001)
        assert merged_rung(checkpoint_folder, tmp_path / "train", tmp_path / "merged", training, other).problems


def test_rows_of_a_proof_need_no_training_row(checkpoint_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    job = make_job(model=str(checkpoint_folder), data=str(tmp_path / "rows.jsonl"), profile="cpu-8gb", eval_rows=4)
    plan = make_plan(job)
    every, some = Data.read(plan), Data.read(plan, train=False)
    assert some.valid == every.valid and some.train == [] and some.test == every.test


@pytest.mark.parametrize("name", ["ort-int4", "ort-int4-mixed", "ort-int8", "ort-fp16", "ort-fp32"])
def test_every_matrix_of_a_bundle_is_the_rounded_one(name: str) -> None:
    rung = stored_rung(bundle(name), checkpoint(), load_target(name), tied=True)
    assert rung is not None and rung.problems == () and rung.tensors == 2 * 7 + 1
    other = load_target("ort-int8" if name != "ort-int8" else "ort-int4")
    wrong = stored_rung(bundle(name), checkpoint(), other, tied=True)
    assert wrong is not None and wrong.problems
    assert stored_rung(bundle(name), checkpoint(), load_target("gguf-q4_0"), tied=True) is None


@pytest.mark.parametrize("name", ["ort-int4", "ort-int8", "ort-fp32"])
def test_a_bundle_is_compared_some_rows_at_a_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of 8B has two GiB in fp32, and its rounding works in fp64."""
    made, target, held = tmp_path / "bundle", load_target(name), list[int]()
    shutil.copytree(bundle(name), made)
    read = Checkpoint.read

    def counted(weights: Checkpoint, tensor: str, rows: slice = slice(None)) -> torch.Tensor:
        found = read(weights, tensor, rows)
        held.append(found.numel())
        return found

    monkeypatch.setattr(Checkpoint, "read", counted)
    monkeypatch.setattr("edgeft.models.headers.BLOCK_BYTES", most := 4 * 1024)
    right = stored_rung(made, checkpoint(), target, tied=True)
    assert right is not None and right.problems == () and max(held) <= most // 4 < len(held) * max(held)
    file = GraphFile(made)
    codes = file.tensors[next(file.matrices(Checkpoint(checkpoint()), True)).inputs[0]]
    place = {entry.key: entry.value for entry in codes.external_data}
    with open(made / place["location"], "r+b") as data:  # a bit of the last row
        data.seek(int(place["offset"]) + int(place["length"]) - 1)
        last = data.read(1)[0]
        data.seek(-1, io.SEEK_CUR)
        data.write(bytes([last ^ 1]))
    wrong = stored_rung(made, checkpoint(), target, tied=True)
    assert wrong is not None and len(wrong.problems) == 1 and ": 1 of " in wrong.problems[0]


def test_golden_vectors_say_by_how_much_each_token_led_and_where() -> None:
    made = Bundle.read(bundle("ort-int4") / "bundle.json")
    model = ArtifactModel(bundle("ort-int4"))
    assert len(made.golden) == len(PROMPTS) and any(golden.margins for golden in made.golden)
    for golden in made.golden:
        assert len(golden.margins) == len(golden.greedy_ids)
        ids = list(golden.ids)
        for token, margin in zip(golden.greedy_ids, golden.margins, strict=True):
            second, best = sorted(model.logits(ids)[-1])[-2:]
            assert margin == pytest.approx(best - second, abs=1e-3)
            ids.append(token)
    assert made.environment is not None and made.environment.cpu
    assert made.environment.runtime.startswith("onnxruntime-genai 0.") and "onnxruntime 1." in made.environment.runtime
    assert made.stop_ids == TextTokenizer(checkpoint()).stop_ids == model._runner.eos_ids


def test_an_older_result_without_rows_is_still_read() -> None:
    plain = Metrics.model_validate({"rows": 2, "loss": 1.0, "perplexity": 2.7, "exact_match": None})
    assert plain == plain.bare and TrainResult.model_fields["valid"].annotation is Metrics
