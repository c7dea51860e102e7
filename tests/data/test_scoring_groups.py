"""Groups that are scored together: within their limit, and within what a plan prices, for any rows and any choice."""

from __future__ import annotations

import random

import pytest

from edgeft.data.scoring_groups import Size, by_answer, by_length, scoring


def random_sizes(draw: random.Random, count: int) -> list[Size]:
    found = []
    for _ in range(count):
        prompt, answer = draw.choice([1, 8, 100, 900]), draw.choice([1, 3, 40, 400])
        found.append(Size(prompt + answer, draw.randint(1, prompt), answer))
    return found


@pytest.mark.parametrize("seed", range(30))
def test_any_choice_of_rows_is_answered_within_what_is_priced(seed: int) -> None:
    draw = random.Random(seed)
    sizes, tokens = random_sizes(draw, draw.randint(1, 60)), draw.choice([64, 1024, 4096])
    answers = scoring([sizes], tokens).answers
    assert answers is not None
    for _ in range(10):
        some = draw.sample(sizes, draw.randint(1, len(sizes)))
        groups = list(by_answer(some, tokens))
        assert sorted(i for group in groups for i in group) == list(range(len(some)))
        for group in groups:
            prompt, new = max(some[i].prompt for i in group), max(some[i].new for i in group)
            assert len(group) == 1 or len(group) * (prompt + new + 1) <= tokens
            assert len(group) * (prompt + new) <= answers.tokens
            assert len(group) * prompt <= answers.prompt_tokens or len(group) > 1
            assert prompt <= answers.longest_prompt and len(group) <= answers.rows


def test_one_long_answer_beside_short_ones_does_not_widen_their_group() -> None:
    """42 rows of 20 tokens beside one answer of 257: together they would hold 42 x 276 tokens."""
    sizes = [Size(20, 15, 5)] * 42 + [Size(272, 15, 257)]
    groups = list(by_answer(sizes, 1024))
    assert [42] in groups
    assert max(len(g) * (15 + max(sizes[i].new for i in g)) for g in groups) <= 1024
    found = scoring([sizes], 1024)
    assert found.answers is not None and found.answers.tokens == 1024


@pytest.mark.parametrize("seed", range(10))
def test_losses_are_computed_within_the_limit_and_counted_once(seed: int) -> None:
    draw = random.Random(seed)
    sizes, tokens = random_sizes(draw, 40), 1024
    groups = list(by_length(sizes, tokens))
    widths = [len(group) * max(sizes[i].tokens for i in group) for group in groups]
    assert all(width <= tokens or len(group) == 1 for width, group in zip(widths, groups, strict=True))
    found = scoring([sizes, sizes], tokens)
    assert found.tokens == 2 * sum(widths) and found.rows == 80
    assert max(shape.rows * shape.tokens for shape in found.shapes) == max(widths)


def test_what_is_not_asked_generates_nothing() -> None:
    assert scoring([[Size(30, 0, 29)] * 4], 64).answers is None
    assert Size(300, 40, 260).new == 256 and Size(50, 40, 10).new == 11
    assert Size(50, 40, 10).cut(30) == Size(30, 20, 10) and Size(50, 0, 49).cut(30) == Size(30, 0, 30)
