"""Which rows does a form of a model answer before its gate is decided, and what is said of them?"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from bundles import checkpoint, reference, some_ids

from edgeft.data.dataset import IGNORED, Sample, TextTokenizer
from edgeft.exporting.drawn_rows import Drawing, both
from edgeft.exporting.form import Form, first
from edgeft.exporting.outputs import observe_drawn, observe_model
from edgeft.exporting.parity import Gain, compare, drawn_for, exact_match_problem
from edgeft.models.drawing import LEVEL
from edgeft.models.metrics import Metrics, exact_interval, on_the_same_rows, pair
from edgeft.targets.target import load_target

TOLERANCE = load_target("ort-int4").parity
TABLE = torch.log_softmax(torch.zeros(3, 4), -1)
EVERY = slice(None)


def form(losses: list[float], exact: list[bool] | None = None, name: str = "merged") -> Form:
    return Form(name, TABLE, tuple(losses), (1,) * len(losses), tuple(exact or ()))


def read(drawing: Drawing, losses: list[float], exact: list[bool]) -> Form:
    """The form that a drawing leaves of all rows."""
    numbers = list[int]()
    for number in drawing.each():
        numbers.append(number)
        drawing.see(number, losses[number], exact[number])
    kept = sorted(numbers)
    assert len(kept) == len(set(kept))  # none twice
    seen = set(kept)
    return Form(
        "artifact", TABLE, tuple(loss if i in seen else 0.0 for i, loss in enumerate(losses)),
        tuple(int(i in seen) for i in range(len(losses))), tuple(right and i in seen for i, right in enumerate(exact)),
        drawn=() if len(kept) == len(losses) else tuple(kept),
    )  # fmt: skip


def problems(before: Form, losses: list[float], exact: list[bool]) -> tuple[list[str], Form]:
    """What the gate says of a form on the rows that it draws."""
    drawing = drawn_for(before.tokens, TOLERANCE, Gain(0.0, shown=False), gate=len(losses), scored=EVERY)
    drawing.follows(before)
    made = read(drawing, losses, exact)
    lost = exact_match_problem(before, made, TOLERANCE, EVERY)
    return [*compare(before, made, TOLERANCE).problems, *([lost] if lost else [])], made


def test_a_good_form_passes_on_a_part_of_the_rows_and_says_so() -> None:
    before = form([1.0] * 1000, [True] * 1000)
    found, made = problems(before, [1.001] * 1000, [True] * 1000)
    assert found == [] and 64 < len(made.drawn) < 500
    assert compare(before, made, TOLERANCE).compared == f"{len(made.drawn)} of 1000 rows, 3 positions"
    assert made.loss == pytest.approx(1.001)
    whole = form([1.001] * 1000, [True] * 1000)
    assert compare(before, whole, TOLERANCE).compared == "1000 rows, 3 positions"


@pytest.mark.parametrize("planted", ["loss", "answers"])
def test_a_planted_fault_fails_whichever_rows_it_is_in(planted: str) -> None:
    draw = random.Random(3)
    before = form([1.0] * 400, [True] * 400)
    for _ in range(20):
        bad = set(draw.sample(range(400), 80))
        losses = [2.0 if planted == "loss" and i in bad else 1.0 for i in range(400)]
        exact = [not (planted == "answers" and i in bad) for i in range(400)]
        found, made = problems(before, losses, exact)
        assert len(found) == 1 and made.drawn  # known before all are read


def test_forms_that_all_rows_would_fail_by_one_answer_pass_no_more_often_than_the_level() -> None:
    draw, passed, trials = random.Random(5), 0, 300
    before = form([1.0] * 400, [True] * 400)
    for _ in range(trials):
        lost = set(draw.sample(range(400), 9))  # 8 are 2 points
        found, _ = problems(before, [1.0] * 400, [i not in lost for i in range(400)])
        passed += not found
    assert passed / trials <= LEVEL + 3 * (LEVEL / trials) ** 0.5


def test_rows_of_the_loss_and_those_that_are_scored_may_be_others() -> None:
    before = form([1.0] * 700, [True] * 700)
    drawing = Drawing(before.tokens, 0.05, 2.0, gate=200, scored=slice(200, None), taken=[*range(64), 690])
    made = read(drawing.follows(before), [1.0] * 700, [True] * 700)
    counts = len(made.read(slice(200))), len(made.read(slice(200, None)))
    assert 64 < counts[0] < 200 and 1 < counts[1] < 500 and 690 in made.drawn
    assert len(first(made, 200).read()) == counts[0]
    assert first(made, 200).loss == pytest.approx(1.0)


def sample(ids: list[int], answer: int) -> Sample:
    return Sample(ids, [IGNORED] * (len(ids) - answer) + ids[len(ids) - answer :], len(ids) - answer)


def test_torch_says_of_drawn_rows_what_it_says_of_them_among_all() -> None:
    ids, tokenizer = some_ids(3000), TextTokenizer(checkpoint())
    rows = [sample(ids[14 * i : 14 * i + 12], 3) for i in range(200)]
    model: Any = type(reference()).from_pretrained(checkpoint()).eval()
    whole = observe_model("merged", model, rows, tokenizer, answers=EVERY)
    drawing = drawn_for(whole.tokens, TOLERANCE, Gain(0.0, shown=False), gate=200, scored=EVERY)
    made = observe_drawn("rounded", model, rows, tokenizer, drawing.follows(whole))
    before, after = both(whole, made)
    assert made.drawn and 64 < len(made.drawn) < 200
    assert after.losses == pytest.approx(before.losses, abs=1e-4) and after.exact == before.exact
    assert torch.allclose(made.log_probabilities, whole.log_probabilities, atol=1e-4)
    with torch.no_grad():  # the planted fault: a model that says something else
        model.lm_head.weight.copy_(model.lm_head.weight[torch.randperm(len(model.lm_head.weight))])
    bad = observe_drawn("rounded", model, rows, tokenizer, drawn_for(
        whole.tokens, TOLERANCE, Gain(0.0, shown=False), gate=200, scored=EVERY
    ).follows(whole))  # fmt: skip
    assert compare(whole, bad, TOLERANCE).problems


def metrics_of(rows: list[int], exact: str, of_rows: int = 0) -> Metrics:
    count = len(rows)
    return Metrics(
        rows=count, loss=1.0, perplexity=2.0, exact_match=exact.count("1") / count, row_losses=tuple(map(float, rows)),
        row_tokens=(1,) * count, row_exact=exact, drawn=tuple(rows) if of_rows else (), of_rows=of_rows,
    )  # fmt: skip


def test_scores_are_paired_on_the_rows_that_both_forms_have_read() -> None:
    whole, part = metrics_of([0, 1, 2, 3, 4, 5], "110100"), metrics_of([1, 3, 5], "111", of_rows=6)
    both_of = on_the_same_rows(whole, part)
    assert both_of is not None and both_of[0].row_losses == both_of[1].row_losses == (1.0, 3.0, 5.0)
    assert exact_interval(*both_of).difference == pytest.approx(1 / 3)
    found = pair("merged", whole, "ort-int4", part)
    assert found is not None and found.loss is not None and found.loss.difference == 0.0
    assert found.exact_match is not None and found.exact_match.difference == pytest.approx(1 / 3)
    assert part.named("ort-int4") == "ort-int4, 3 of 6 rows" and whole.named("merged") == "merged"
    assert on_the_same_rows(metrics_of([0, 1], "11"), part) is None  # of other rows altogether
