"""The gate by forms made by hand: each of its checks fails alone, a tie does not, and one answer is no evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from bundles import checkpoint
from tiny import plan_of

from edgeft.errors import ParityFailed, QualityLost
from edgeft.exporting.form import Form
from edgeft.exporting.parity import (
    ALIKE,
    HINTS,
    UNKNOWN,
    Gain,
    allowed_loss,
    check,
    compare,
    exact_match_problem,
    first,
)
from edgeft.exporting.trained_rung import rows_again, trained_rung
from edgeft.memory.stages import PARITY_PROMPTS
from edgeft.models.metrics import Metrics, Rung, of_some_rows, pair
from edgeft.models.spec import read_model_spec
from edgeft.targets.target import Tolerance, load_target

GATE = Tolerance(
    min_top1_agreement=0.9, max_mean_kl_nats=0.1, max_loss_increase_nats=0.05, max_gain_lost=0.1,
    max_exact_match_drop_points=2.0,
)  # fmt: skip
SURE, OTHER = (0.54, 0.45, 0.01), (0.45, 0.54, 0.01)  # 0.18 nats apart: the choice of the first is a choice
NEAR, TURNED = (0.51, 0.48, 0.01), (0.48, 0.51, 0.01)  # 0.06 nats apart: a tie
FIRM, VAGUE = (0.90, 0.09, 0.01), (0.50, 0.40, 0.10)  # the same choice, 0.37 nats of KL


def of(*chances: Sequence[float], loss: float = 1.0, rows: int = 10, right: int = 0, name: str = "artifact") -> Form:
    """A form of a model of three tokens: the chances of each position, one loss for all rows, how many are exact."""
    exact = tuple(row < right for row in range(rows))
    return Form(name, torch.tensor(chances).log(), (loss,) * rows, (1,) * rows, exact)


def problems(before: Form, after: Form, tolerance: Tolerance = GATE) -> list[str]:
    """What the gate says of a form, exact answers included: the first words of each."""
    said = [*compare(before, after, tolerance).problems, exact_match_problem(before, after, tolerance, slice(None))]
    return [" ".join(text.split()[:2]) for text in said if text]


def test_a_form_passes_against_itself() -> None:
    for chances in (SURE, NEAR, FIRM):
        assert problems(of(*[chances] * 10, right=7), of(*[chances] * 10, right=7)) == []


def test_the_choice_of_a_token_fails_alone() -> None:
    before = of(*[SURE] * 10)
    assert problems(before, of(*[OTHER] * 2, *[SURE] * 8)) == ["top-1 agreement"]
    rung = compare(before, of(*[OTHER] * 2, *[SURE] * 8), GATE)
    assert rung.top1_agreement == rung.top1_or_tie == pytest.approx(0.8)


def test_a_tie_is_no_other_choice() -> None:
    rung = compare(of(*[NEAR] * 10), of(*[TURNED] * 10), GATE)
    assert (rung.top1_agreement, rung.top1_or_tie, rung.problems) == (0.0, 1.0, ())
    # a tie is one of the first form's making: what it clearly prefers is not changed into a tie by the second
    assert problems(of(*[SURE] * 10), of(*[TURNED] * 10)) == ["top-1 agreement"]


def test_one_position_is_no_evidence() -> None:
    strict = GATE.model_copy(update={"min_top1_agreement": 0.999})
    assert problems(of(*[SURE] * 10), of(OTHER, *[SURE] * 9), strict) == []
    assert problems(of(*[SURE] * 10), of(OTHER, OTHER, *[SURE] * 8), strict) == ["top-1 agreement"]


def test_the_distribution_fails_alone() -> None:
    assert problems(of(*[FIRM] * 10), of(*[VAGUE] * 10)) == ["mean KL"]
    rung = compare(of(*[FIRM] * 10), of(*[VAGUE] * 10), GATE)
    by_hand = sum(p * math.log(p / q) for p, q in zip(FIRM, VAGUE, strict=True))
    assert rung.mean_kl_nats == pytest.approx(by_hand, rel=1e-5) and rung.problems[0].endswith("at most 1e-01")
    assert problems(of(*[FIRM] * 10), of(*[VAGUE] * 2, *[FIRM] * 8)) == []  # it is the mean that counts: 0.074


def test_the_loss_fails_alone() -> None:
    before = of(*[SURE] * 10)
    assert problems(before, of(*[SURE] * 10, loss=1.06)) == ["loss 1.0000"]
    assert problems(before, of(*[SURE] * 10, loss=1.04)) == []
    assert problems(before, of(*[SURE] * 10, loss=0.2)) == []  # to be better is no fault


def test_exact_answers_fail_alone_and_one_is_no_evidence() -> None:
    def many(rows: int, right: int) -> Form:
        return of(*[SURE] * 10, rows=rows, right=right)

    assert problems(many(200, 100), many(200, 95)) == ["exact match"]  # 2.5 points
    assert problems(many(200, 100), many(200, 96)) == []
    assert problems(many(10, 5), many(10, 4)) == []  # 10 points, one prompt
    assert problems(many(10, 5), many(10, 3)) == ["exact match"]
    assert problems(many(10, 5), many(10, 9)) == []
    asked_of_one = Form("artifact", many(10, 5).log_probabilities, (1.0,) * 10, (1,) * 10)
    assert problems(many(10, 5), asked_of_one) == []  # where answers were not asked for, none was lost


@pytest.mark.parametrize("broken", [of(*[(math.nan,) * 3] * 10), of(*[SURE] * 10, loss=math.nan)])
def test_what_is_no_number_never_passes(broken: Form) -> None:
    assert problems(of(*[SURE] * 10), broken)


def test_every_check_that_fails_is_named_at_once() -> None:
    after = of(*[(0.05, 0.90, 0.05)] * 10, loss=2.0, right=1)
    assert problems(of(*[FIRM] * 10, right=9), after) == ["top-1 agreement", "mean KL", "loss 1.0000", "exact match"]


def test_what_a_failed_rung_raises_says_whose_fault_it_may_be() -> None:
    rung = compare(of(*[SURE] * 10, name="merged"), of(*[SURE] * 10, loss=9.0), GATE)
    with pytest.raises(QualityLost, match=r"rung 'artifact' against 'merged': loss 1\.0000 to 9\.0000"):
        check(rung)
    for name, against, hint in (("artifact", "rounded", "rounded"), ("trained", "train.json", "trained")):
        with pytest.raises(ParityFailed) as caught:
            check(Rung(name=name, against=against, compared="", tolerance="", problems=("one", "two")))
        assert HINTS[hint] in str(caught.value) and not isinstance(caught.value, QualityLost)
        assert "one\ntwo" in str(caught.value)
    good = compare(of(SURE, name="merged"), of(SURE), GATE)
    assert check(good) is good


def test_the_first_rows_of_a_form_have_their_own_loss() -> None:
    whole = Form("f", torch.zeros(2, 3), (1.0, 3.0, 8.0), (1, 1, 2), (True, False, True))
    assert first(whole, 2).loss == 2.0 and first(whole, 2).exact == (True, False) and whole.loss == 3.0


def scored(form: Form) -> Metrics:
    count = len(form.losses)
    return Metrics(
        rows=count, loss=form.loss, perplexity=1.0, exact_match=None, row_losses=form.losses, row_tokens=form.tokens
    )


def form(loss: float, spread: float, rows: int = 20) -> Form:
    table = torch.log_softmax(torch.eye(8) * 5, dim=-1)
    return Form("form", table, tuple(loss + spread * (i % 2) for i in range(rows)), (1,) * rows)


def test_the_quality_gate_is_a_share_of_what_was_gained_and_no_more_than_its_bound() -> None:
    int4 = load_target("ort-int4").parity
    assert allowed_loss(int4, Gain(0.5, shown=True))[0] == pytest.approx(0.5 * int4.max_gain_lost)
    assert allowed_loss(int4, Gain(6.4, shown=True))[0] == int4.max_loss_increase_nats
    assert allowed_loss(int4, UNKNOWN)[0] == int4.max_loss_increase_nats
    before = form(1.0, 0.1)
    lost = compare(before, form(1.04, 0.1), int4, Gain(0.5, shown=True))
    assert "of the 0.5 nats that the fine-tune gained" in lost.problems[0] and lost.loss_change is not None
    assert lost.loss_change.shown and lost.loss_change.difference == pytest.approx(0.04)
    assert not compare(before, form(1.04, 0.1), int4, Gain(1.0, shown=True)).problems


def answered(lost: int, won: int, loss: float) -> Form:
    """A form of 300 rows: of the first 150, which the merged model answers, it loses some, and wins others."""
    table = torch.log_softmax(torch.eye(8) * 5, dim=-1)
    exact = tuple(lost <= row < 150 + won for row in range(300))
    return Form("form", table, tuple(loss + 0.1 * (row % 2) for row in range(300)), (1,) * 300, exact)


@pytest.mark.parametrize("target", ["ort-int4", "ort-int4-calibrated", "ort-int4-mixed", "gguf-q4_0", "gguf-q4_k_m"])
def test_the_gate_of_4_bits_refuses_what_rounding_to_nearest_cost_a_real_model(target: str) -> None:
    """As measured on a 135M model: 14 points of exact match and 0.258 nats; calibrated 1.0 point and 0.032 nats."""
    tolerance, gain = load_target(target).parity, Gain(4.0, shown=True)
    merged, nearest, calibrated = answered(0, 0, 1.0), answered(58, 16, 1.258), answered(12, 9, 1.032)
    assert compare(merged, nearest, tolerance, gain).problems
    assert not compare(merged, calibrated, tolerance, gain).problems
    refused = exact_match_problem(merged, nearest, tolerance, slice(None))
    assert refused == "exact match falls by 14.0 points (95% interval 8.5 to 19.3), at most 2"
    assert exact_match_problem(merged, calibrated, tolerance, slice(None)) == ""


def test_a_gain_is_shown_by_the_rows_or_not_at_all() -> None:
    def metrics(*losses: float) -> Metrics:
        count = len(losses)
        return Metrics(
            rows=count, loss=sum(losses) / count, perplexity=1.0, exact_match=None, row_losses=losses,
            row_tokens=(1,) * count,
        )  # fmt: skip

    assert Gain.of(metrics(3.0, 3.1, 2.9), metrics(1.0, 1.2, 1.1)).shown
    assert not Gain.of(metrics(3.0, 1.0, 2.0), metrics(1.0, 2.9, 2.0)).shown
    assert Gain.of(metrics(3.0, 3.0).bare, metrics(1.0, 1.0).bare) == Gain(2.0, shown=True)
    found = pair("a", metrics(3.0, 3.1, 2.9), "b", metrics(1.0, 1.2, 1.1))
    assert found is not None and found.loss is not None and found.loss.high < 0 and found.exact_match is None
    assert pair("a", metrics(3.0, 3.1).bare, "b", metrics(1.0, 1.2)) is None


def test_ties_are_told_apart_from_agreement() -> None:
    near = torch.tensor([[1.0, 0.95, -5.0], [2.0, 0.0, -5.0]])
    other = torch.tensor([[0.95, 1.0, -5.0], [2.0, 0.0, -5.0]])
    forms = [Form("f", torch.log_softmax(t, dim=-1), (1.0, 1.0), (1, 1)) for t in (near, other)]
    rung = compare(*forms, ALIKE)
    assert (rung.top1_agreement, rung.top1_or_tie) == (0.5, 1.0)


def test_rows_that_are_scored_again_are_some_at_random_beside_unrounded_weights() -> None:
    spec, recorded = read_model_spec(str(checkpoint())), scored(form(1.0, 0.1, 100))
    plain, rounded = (plan_of(spec, range(2), base_precision=each) for each in ("fp32", "nf4"))
    some = rows_again(plain, recorded, 100)
    assert len(some) == PARITY_PROMPTS and some == sorted(set(some)) and some != list(range(PARITY_PROMPTS))
    assert rows_again(rounded, recorded, 100) == rows_again(plain, recorded.bare, 100) == list(range(100))
    assert of_some_rows(recorded, some).rows == len(of_some_rows(recorded, some).row_losses) == PARITY_PROMPTS


def test_a_score_that_is_not_reproduced_names_rows() -> None:
    recorded = scored(form(1.0, 0.1))
    assert not trained_rung(form(1.0, 0.1), recorded, torch.float32, "cpu").problems
    apart = form(1.0, 0.1)
    moved = Form("f", apart.log_probabilities, (1.4, *apart.losses[1:-1], apart.losses[-1] - 0.4), apart.tokens)
    assert moved.loss == pytest.approx(apart.loss)  # the mean says nothing
    problems = trained_rung(moved, recorded, torch.float32, "cpu").problems
    assert problems == ("2 of 20 rows differ, by up to 0.4 nats a token",)
    on_gpu = trained_rung(form(1.01, 0.1), recorded, torch.float32, "cuda")
    assert not on_gpu.problems and "trained on cuda, compared on the CPU" in on_gpu.tolerance
    assert "is computed" not in on_gpu.tolerance
