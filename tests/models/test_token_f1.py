"""F1 of words: what SQuAD's own script gives, and what stands in scores."""

from __future__ import annotations

import collections
import random
import re
import string

import pytest

from edgeft.models.intervals import paired_means, student
from edgeft.models.metrics import Metrics, pair
from edgeft.models.token_f1 import token_f1, with_f1, words


def normalize_answer(s: str) -> str:
    """SQuAD's evaluate-v2.0.py, as it is published."""

    def remove_articles(text: str) -> str:
        regex = re.compile(r"\b(a|an|the)\b", re.UNICODE)
        return re.sub(regex, " ", text)

    def white_space_fix(text: str) -> str:
        return " ".join(text.split())

    def remove_punc(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return white_space_fix(remove_articles(remove_punc(s.lower())))


def get_tokens(s: str) -> list[str]:
    return normalize_answer(s).split() if s else []


def compute_f1(a_gold: str, a_pred: str) -> float:
    gold_toks = get_tokens(a_gold)
    pred_toks = get_tokens(a_pred)
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(pred_toks)
    recall = 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


CASES = ["", "the", "A cat.", "the cat sat on the mat", "cats", "THE Cat, sat!", "an answer; it's 4.5", "mat mat mat",
         "Ångström über naïve", "\n\ttab  and   space ", "(x) = y", "猫 が 座る"]  # fmt: skip


@pytest.mark.parametrize("expected", CASES)
def test_it_is_squads(expected: str) -> None:
    for given in CASES:
        assert token_f1(expected, given) == pytest.approx(compute_f1(expected, given))


def test_it_is_squads_on_any_words() -> None:
    draw = random.Random(0)
    letters = ["the", "a", "an", "cat", "sat", "x.", "y,", "4", "Z", "  ", "-"]
    for _ in range(300):
        one, other = (" ".join(draw.choices(letters, k=draw.randint(0, 8))) for _ in range(2))
        assert token_f1(one, other) == pytest.approx(compute_f1(one, other))


def test_words_of_an_answer() -> None:
    assert words("The cat's, a DOG!") == ["cats", "dog"]
    assert token_f1("libs", "libs") == 1.0 and token_f1("one two", "two three") == pytest.approx(0.5)


def scores(**more: object) -> Metrics:
    return Metrics(rows=3, loss=1.0, perplexity=2.7, exact_match=0.0, row_losses=(1.0, 1.0, 1.0),
                   row_tokens=(1, 1, 1), row_exact="000", **more)  # type: ignore[arg-type]  # fmt: skip


def test_scores_hold_the_mean_and_each_row() -> None:
    found = with_f1(scores(), [("one two", "one two"), ("one two", "two three"), ("one", "four")])
    assert (found.f1, found.f1_rows, found.row_f1) == (0.5, 3, (1.0, 0.5, 0.0))
    assert with_f1(scores(), []) == scores() and found.marked.row_f1 == () and found.marked.f1_rows == 3


def test_a_pair_has_its_interval_where_both_were_written() -> None:
    first = with_f1(scores(), [("one", "two")] * 3)
    second = with_f1(scores(), [("one", "one"), ("one", "one"), ("one", "two")])
    made = pair("base", first, "fine-tuned", second)
    assert made is not None and made.f1 is not None
    assert made.f1.difference == pytest.approx(2 / 3) and not made.f1.shown
    half = student(2) * (1 / 3) ** 0.5 / 3**0.5  # s of 1, 1, 0 is 0.577
    assert made.f1.high - made.f1.difference == pytest.approx(half, rel=1e-3)
    less = pair("base", scores(), "fine-tuned", second)
    assert less is not None and less.f1 is None


def test_means_of_rows_that_all_change_alike_are_sure() -> None:
    assert paired_means([0.1, 0.2, 0.3], [0.3, 0.4, 0.5]).low == pytest.approx(0.2)
    with pytest.raises(ValueError, match="no pairs"):
        paired_means([0.1], [0.1, 0.2])
