"""Are torch's answers held to labels the most probable ones, by few passes, and which answers can be labels at all?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeft.data.dataset import TextTokenizer, measure, read_samples, report_data
from edgeft.data.labels import MOST_LABELS, Label, labels_file, labels_line, make_labels, tree_size, unknown_answers
from edgeft.data.samples import Sample
from edgeft.data.scoring_groups import Size, scoring, searched
from edgeft.engine.label_scores import LabelRows, whole_scores
from edgeft.errors import BadInput
from edgeft.exporting.row_logits import row_logits
from edgeft.models.checkpoint import load_plain
from edgeft.models.evaluate import evaluate
from edgeft.models.parts import find_parts

CPU = torch.device("cpu")
ANSWERS = [" lib", " libdevel", " doc", " python", " perl", " x11"]


def rows_of(count: int, answers: list[str] = ANSWERS) -> list[dict[str, str]]:
    return [
        {"prompt": f"Package: lib{number}-dev\nSection:", "completion": answers[number % len(answers)]}
        for number in range(count)
    ]


def labels_of(path: Path, tokenizer: TextTokenizer) -> tuple[Label, ...]:
    answers = measure(str(path), tokenizer).asked
    return make_labels(answers, range(len(answers.asked)), tokenizer, str(path))


@pytest.fixture
def tokenizer(checkpoint_folder: Path) -> TextTokenizer:
    return TextTokenizer(checkpoint_folder)


def sharp_model(folder: Path, scale: float) -> Any:
    """The checkpoint with a head that decides: its logits would be nearly equal."""
    model = load_plain(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def by_hand(model: Any, rows: list[Sample], labels: tuple[Label, ...]) -> torch.Tensor:
    """(rows, labels): the sum over a label's tokens, by the model's own logits of one padded batch."""
    pairs = [(row, label) for row in rows for label in labels]
    width = max(row.prompt_tokens + len(label.ids) for row, label in pairs)
    padded = [([*row.prompt, *label.ids] + [0] * width)[:width] for row, label in pairs]
    with torch.no_grad():
        found = torch.log_softmax(model(torch.tensor(padded)).logits.double(), -1)
    sums = [
        sum(float(found[number, row.prompt_tokens - 1 + at, token]) for at, token in enumerate(label.ids))
        for number, (row, label) in enumerate(pairs)
    ]
    return torch.tensor(sums, dtype=torch.float64).reshape(len(rows), len(labels))


@pytest.mark.parametrize(("scale", "chunk_tokens"), [(1.0, 1024), (30.0, 3), (200.0, 1024)])
def test_a_row_is_exact_where_its_label_is_the_most_probable(
    scale: float, chunk_tokens: int, checkpoint_folder: Path, tokenizer: TextTokenizer, write_rows: Any
) -> None:
    path = write_rows("rows.jsonl", rows_of(30))
    labels, rows = labels_of(path, tokenizer), read_samples(str(path), tokenizer, None)[:12]
    model = sharp_model(checkpoint_folder, scale)
    scores = by_hand(model, rows, labels)
    held = LabelRows(labels, rows, tokenizer)
    found = evaluate(
        model, find_parts(model), rows, tokenizer, device=CPU, held=held, chunk_tokens=chunk_tokens, group_tokens=100
    )
    assert [held.chosen(row) for row in rows] == scores.argmax(dim=1).tolist()
    right = [held.labels.texts[held.chosen(row)] == ANSWERS[number % 6].strip() for number, row in enumerate(rows)]
    assert found.row_exact == "".join("01"[each] for each in right)
    for row, each in zip(rows, scores, strict=True):
        assert held.searches[id(row)].found[0][0] == pytest.approx(float(each.max()), abs=1e-4)
    assert held.passes < len(rows) * (len(held.labels.children) - 1)
    free = evaluate(model, find_parts(model), rows, tokenizer, device=CPU)
    assert found.row_losses == pytest.approx(free.row_losses, abs=1e-4)


def test_the_referee_sums_over_each_labels_tokens(
    checkpoint_folder: Path, tokenizer: TextTokenizer, write_rows: Any
) -> None:
    path = write_rows("rows.jsonl", rows_of(30))
    labels, rows = labels_of(path, tokenizer), read_samples(str(path), tokenizer, None)[:3]
    model = sharp_model(checkpoint_folder, 30.0)
    parts = find_parts(model)
    made = whole_scores(labels, rows, lambda some: row_logits(model, parts, some, torch.float32, 200))
    torch.testing.assert_close(made, by_hand(model, rows, labels), atol=1e-4, rtol=0)


def test_a_row_that_asks_for_something_else_is_never_exact(
    checkpoint_folder: Path, tokenizer: TextTokenizer, write_rows: Any
) -> None:
    labels = labels_of(write_rows("rows.jsonl", rows_of(30)), tokenizer)
    rows = read_samples(str(write_rows("test.jsonl", rows_of(4, [" games"]))), tokenizer, None)
    model = load_plain(checkpoint_folder)
    held = LabelRows(labels, rows, tokenizer, most_tokens=12)
    assert evaluate(model, find_parts(model), rows, tokenizer, device=CPU, held=held).exact_match == 0.0


def test_labels_are_the_distinct_completions_of_the_training_rows(tokenizer: TextTokenizer, write_rows: Any) -> None:
    path = write_rows("rows.jsonl", rows_of(31))
    answers = measure(str(path), tokenizer).asked
    labels = make_labels(answers, range(31), tokenizer, "rows")
    assert [label.text for label in labels] == [answer.strip() for answer in ANSWERS]
    assert [label.rows for label in labels] == [6, 5, 5, 5, 5, 5]
    for label, text in zip(labels, ANSWERS, strict=True):
        assert list(label.ids) == [*tokenizer.encode([text])[0], tokenizer.eos_id]
    assert "one of 6 labels" in labels_line(labels) and labels_file(labels).count('"text"') == 6
    held_out = make_labels(answers, range(0, 30, 2), tokenizer, "rows")  # those of every second row
    assert [label.text for label in held_out] == ["lib", "doc", "perl"]


def test_a_plan_counts_scored_rows_that_ask_for_no_label(tokenizer: TextTokenizer, write_rows: Any) -> None:
    """Else they are wrong for ever, and nobody is told why."""
    trained = measure(str(write_rows("train.jsonl", rows_of(30))), tokenizer).asked
    labels = make_labels(trained, range(30), tokenizer, "rows")
    assert not unknown_answers(trained, range(30), labels, tokenizer, "rows")
    others = [*rows_of(6), *({"prompt": "Package: x", "completion": f" strange{n}"} for n in range(2))]
    scored = measure(str(write_rows("test.jsonl", others)), tokenizer).asked
    (line,) = unknown_answers(scored, range(8), labels, tokenizer, "test")
    assert line == "test: 2 of 8 rows ask for what is no label, they are scored as wrong"
    assert not unknown_answers(scored, range(6), labels, tokenizer, "test")
    scored.too_many = True
    (line,) = unknown_answers(scored, range(8), labels, tokenizer, "test")
    assert line == "test: more than 1,000 different answers are asked for, 6 are labels"


def test_a_label_takes_its_share_of_a_line_whatever_is_in_it() -> None:
    line = labels_line([Label(text=text, ids=(1, 2), rows=1) for text in ("two\nlines", "word " * 50, "caf\u00e9")])
    assert "('two\\nlines', word word" in line and "..., caf\u00e9, ...)" in line and len(line) < 200


def test_a_chats_labels_end_with_its_templates_end(tokenizer: TextTokenizer, write_rows: Any) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Section of lib{number}?"},
                {"role": "assistant", "content": ("libs", "doc")[number % 2]},
            ]
        }
        for number in range(12)
    ]
    labels = labels_of(write_rows("chat.jsonl", rows), tokenizer)
    assert [label.text for label in labels] == ["libs", "doc"]
    end = tokenizer.encode(["<|im_end|>"])[0][0]
    assert all(label.ids[-1] == end and end not in label.ids[:-1] for label in labels)


@pytest.mark.parametrize(
    ("completions", "problem"),
    [
        ([" lib"], "ask for 1 answer: there is nothing to choose"),
        ([f" lib{number}" for number in range(20)], "30 rows ask for 20 different answers: labels are at most half"),
        ([" lib", "lib "], "' lib' and 'lib ' differ in white space or special tokens alone"),
        ([" lib", " "], "an answer is empty: ' '"),
    ],
)
def test_answers_that_no_device_can_be_held_to_are_refused(
    completions: list[str], problem: str, tokenizer: TextTokenizer, write_rows: Any
) -> None:
    path = write_rows("rows.jsonl", rows_of(30, completions))
    with pytest.raises(BadInput, match=problem) as refused:
        labels_of(path, tokenizer)
    assert "answers=free" in refused.value.hint


def test_labels_that_tokenise_alike_are_refused(checkpoint_folder: Path, tmp_path: Path, write_rows: Any) -> None:
    folder = tmp_path / "lower"
    shutil.copytree(checkpoint_folder, folder)
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(document | {"normalizer": {"type": "Lowercase"}}))
    path = write_rows("rows.jsonl", rows_of(30, [" lib", " LIB", " doc"]))
    assert len(labels_of(path, TextTokenizer(checkpoint_folder))) == 3
    with pytest.raises(BadInput, match="' LIB' and ' lib' tokenise alike: the model cannot tell them apart"):
        labels_of(path, TextTokenizer(folder))


def test_ten_thousand_labels_are_refused(tokenizer: TextTokenizer, write_rows: Any) -> None:
    path = write_rows("rows.jsonl", rows_of(10_000, [f" lib{number}" for number in range(10_000)]))
    with pytest.raises(BadInput, match=f"more than {MOST_LABELS:,} different answers"):
        labels_of(path, tokenizer)
    assert not measure(str(path), tokenizer).asked.offer


def test_an_answer_that_max_length_cuts_is_refused(tokenizer: TextTokenizer, write_rows: Any) -> None:
    path = write_rows("rows.jsonl", rows_of(30, [" lib", " " + "doc" * 30]))
    answers = measure(str(path), tokenizer, max_length=20).asked
    with pytest.raises(BadInput, match=r"15 of 30 rows have no whole answer: .* max_length cuts it"):
        make_labels(answers, range(30), tokenizer, "rows")
    texts = measure(str(write_rows("texts.jsonl", [{"text": f"line {i}"} for i in range(30)])), tokenizer).asked
    with pytest.raises(BadInput, match="30 of 30 rows have no whole answer") as caught:
        make_labels(texts, range(30), tokenizer, "texts")
    assert caught.value.hint.startswith("say what is asked and answered, as in --columns prompt=text,completion=label")


def test_labels_are_offered_where_rows_ask_for_few_answers(tokenizer: TextTokenizer, write_rows: Any) -> None:
    few, many = (
        write_rows("few.jsonl", rows_of(60)),
        write_rows("many.jsonl", rows_of(60, [f" l{n}" for n in range(30)])),
    )
    assert report_data(str(few), tokenizer).offer.startswith(
        "60 rows ask for 6 different answers: --set answers=labels"
    )
    assert report_data(str(many), tokenizer).offer == ""
    texts = write_rows("texts.jsonl", [{"text": "Section: lib"}] * 60)
    assert report_data(str(texts), tokenizer).offer == ""


def test_searching_is_priced_in_groups_of_its_own_and_generates_nothing() -> None:
    files = [[Size(30, 27, 3), Size(40, 36, 4), Size(20, 18, 2)]]
    plain = scoring(files, 64)
    found = searched(plain, files, longest=9, nodes=20)
    assert plain.answers is not None and found.answers is None
    assert found.tokens > plain.tokens and found.trained_tokens == plain.trained_tokens + 30  # half of the tree
    assert max(shape.rows * shape.tokens for shape in found.shapes) == 64
    assert searched(scoring([[Size(30, 0, 29)]], 64), [[Size(30, 0, 29)]], 9, 20).tokens == 30
    labels = [Label(text=str(ids), ids=ids, rows=1) for ids in ((1, 0), (1, 2, 0), (3, 0))]
    assert tree_size(labels) == (3, 4)
