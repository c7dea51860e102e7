"""Which score suits a task: one rule, for labels, short answers, free text and text without prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import EXAMPLE, SECTIONS

from edgeft.data.dataset import TextTokenizer, measure
from edgeft.data.scoring_groups import sampled
from edgeft.data.task_score import LABEL_TOKENS, TaskScore, rows_written, task_score

LONG = " ".join(["word"] * 40)
ROWS: dict[str, tuple[TaskScore, list[dict[str, Any]]]] = {
    "the same few": ("exact_match", [{"prompt": f"q{i}", "completion": ("yes", "no")[i % 2]} for i in range(20)]),
    "all different": ("f1", [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in range(20)]),
    "each twice": ("f1", [{"prompt": f"q{i}", "completion": f"label {i % 10}"} for i in range(20)]),
    "the same few, but long": ("f1", [{"prompt": f"q{i}", "completion": LONG + str(i % 2)} for i in range(20)]),
    "always one": ("f1", [{"prompt": f"q{i}", "completion": "yes"} for i in range(20)]),
    "nothing is asked": ("loss", [{"text": f"some text {i}"} for i in range(20)]),
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_rule(kind: str, tokenizer_folder: Path, write_rows: Any) -> None:
    wanted, rows = ROWS[kind]
    found = measure(str(write_rows("rows.jsonl", rows)), TextTokenizer(tokenizer_folder))
    assert task_score(found.sizes, found.asked, held_to_labels=False) == wanted
    held: TaskScore = "loss" if wanted == "loss" else "exact_match"
    assert task_score(found.sizes, found.asked, held_to_labels=True) == held


def test_a_label_has_at_most_so_many_tokens(tokenizer_folder: Path, write_rows: Any) -> None:
    tokenizer = TextTokenizer(tokenizer_folder)
    for letters in range(1, 60):
        rows = [{"prompt": f"q{i}", "completion": "qz" * letters + "xy"[i % 2]} for i in range(12)]
        found = measure(str(write_rows(f"{letters}.jsonl", rows)), tokenizer)
        tokens = max(map(len, found.asked.found))
        score = task_score(found.sizes, found.asked, held_to_labels=False)
        assert score == ("exact_match" if tokens <= LABEL_TOKENS else "f1")
    assert tokens > LABEL_TOKENS


def test_the_example_has_labels() -> None:
    found = measure(str(SECTIONS / "train.jsonl#600"), TextTokenizer(EXAMPLE))
    assert task_score(found.sizes, found.asked, held_to_labels=False) == "exact_match"


def test_rows_whose_answers_are_written_out() -> None:
    assert [rows_written(score, None) for score in ("exact_match", "f1", "loss")] == [10, 30, 0]
    assert [rows_written(score, 4) for score in ("exact_match", "f1", "loss")] == [4, 4, 0]
    assert rows_written("f1", 0) == 0


def test_rows_are_spread_evenly_and_always_the_same() -> None:
    assert sampled(100, 10) == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert sampled(3, 10) == [0, 1, 2] and sampled(0, 10) == [] and sampled(5, 0) == []
    assert len(set(sampled(199, 30))) == 30
