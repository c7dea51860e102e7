"""Does one temperature make labels' probabilities right, on rows that it was not fitted on, and is that shown?"""

from __future__ import annotations

import numpy as np
import pytest

from edgeft.data.labels import NO_LABEL
from edgeft.exporting.answers import Answers, Calibration
from edgeft.exporting.label_calibration import (
    Judged,
    best_temperature,
    calibrate,
    certainty,
    choose_threshold,
    fit_temperature,
    known_enough,
    log_loss,
    most_certain,
)
from edgeft.machines.runner import runner_module
from edgeft.reporting.label_words import answers_lines, bin_rows, certain_rows


def drawn(count: int, overconfident: float, seed: int) -> list[Judged]:
    """Rows whose right label is drawn by softmax(true scores); what the model says is so many times as sharp."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        true = random.normal(size=10) * 2.0
        shares = np.exp(true - true.max())
        right = int(random.choice(10, p=shares / shares.sum()))
        said = true * overconfident
        said = said - np.log(np.exp(said).sum())
        order = np.argsort(-said)
        rows.append(Judged(said[order], int(np.nonzero(order == right)[0][0])))
    return rows


@pytest.mark.parametrize("overconfident", [0.5, 1.0, 3.0])
def test_the_fitted_temperature_is_the_one_that_was_hidden(overconfident: float) -> None:
    assert fit_temperature(drawn(1500, overconfident, 1)) == pytest.approx(overconfident, rel=0.1)


@pytest.mark.parametrize("overconfident", [0.5, 3.0])
@pytest.mark.parametrize("tested", [True, False])
def test_log_loss_of_other_rows_falls(overconfident: float, tested: bool) -> None:
    test = drawn(400, overconfident, 3) if tested else []
    temperature, made = calibrate(drawn(200, overconfident, 2), test)
    assert made is not None and made.change is not None
    assert made.log_loss < made.log_loss_plain and made.change.high < 0
    assert made.rows == (400 if tested else 200) and ("test rows" in made.compared) == tested
    assert temperature == pytest.approx(overconfident, rel=0.3)
    for each in made.bins:
        if each.rows >= 40:
            assert each.right == pytest.approx(each.probability, abs=0.2)
    shares = [each.right for each in made.certain]
    assert [each.share for each in made.certain] == [0.25, 0.5, 0.75, 1.0] and shares == sorted(shares, reverse=True)
    assert sum(each.rows for each in made.bins) == made.rows


def test_probabilities_that_are_right_stay_nearly_as_they_are() -> None:
    assert best_temperature(drawn(300, 1.0, 5)) == pytest.approx(1.0, abs=0.15)


def test_a_temperature_that_does_not_help_other_rows_is_not_taken() -> None:
    """Two halves that ask for opposite temperatures: each one's fit makes the other worse."""
    sure, unsure = Judged(np.array([0.0, -3.0]), 0), Judged(np.array([0.0, -3.0]), 1)
    mixed = Judged(np.array([0.0, -3.0]), 0)
    rows = [each for number in range(60) for each in (sure, unsure if number % 2 else mixed)]
    assert fit_temperature(rows) != 1.0 and best_temperature(rows) == 1.0


def test_few_rows_and_rows_without_a_label_say_nothing() -> None:
    assert fit_temperature(drawn(19, 3.0, 1)) == 1.0
    assert calibrate(drawn(39, 3.0, 1), [])[1] is None
    strangers = [Judged(np.array([0.0, -1.0]), NO_LABEL)] * 30
    rows = drawn(400, 3.0, 7)
    assert fit_temperature([*rows, *strangers]) == fit_temperature(rows)
    assert not strangers[0].is_right


def test_the_log_loss_and_the_certainty_are_those_of_a_softmax() -> None:
    row = Judged(np.log([0.6, 0.3, 0.1]), 1)
    assert log_loss(row, 1.0) == pytest.approx(-np.log(0.3)) and certainty(row, 1.0) == pytest.approx(0.6)
    flat = np.array([0.6, 0.3, 0.1]) ** 0.5
    assert log_loss(row, 2.0) == pytest.approx(-np.log(flat[1] / flat.sum()))
    assert certainty(row, 2.0) == pytest.approx(flat[0] / flat.sum())


def test_a_threshold_is_the_lowest_from_which_on_enough_is_right() -> None:
    sure = [Judged(np.log([0.955, 0.045]), 0)] * 30
    unsure = [Judged(np.log([0.605, 0.395]), number % 2) for number in range(20)]
    assert choose_threshold([*sure, *unsure], 1.0) == pytest.approx(0.61)
    assert choose_threshold(sure, 1.0) == 0.0 and choose_threshold(unsure, 1.0) == 1.0


def test_a_suggestion_is_judged_on_rows_that_it_was_not_chosen_on() -> None:
    test = drawn(400, 1.0, 9)
    temperature, made = calibrate(drawn(200, 1.0, 2), test)
    assert made is not None and made.threshold is not None
    given = [row.is_right for row in test if certainty(row, temperature) >= made.threshold.min_probability]
    assert made.threshold.answered == len(given) / 400 and made.threshold.right == pytest.approx(np.mean(given))
    assert 0.8 < made.threshold.right < 1 and 0 < made.threshold.answered < 1
    _, alone = calibrate(drawn(200, 1.0, 2), [])
    assert alone is not None and alone.threshold is not None and alone.threshold.right != made.threshold.right


def test_most_certain_takes_the_most_certain() -> None:
    certain, right = np.array([0.1, 0.9, 0.5, 0.8]), np.array([False, True, False, True])
    assert most_certain(certain, right, 0.5).right == 1.0 and most_certain(certain, right, 1.0).right == 0.5


def test_a_search_for_calibration_ends_with_the_right_label_in_it() -> None:
    run = runner_module()
    labels = run.Labels(["a", "b", "c"], [[1, 0], [2, 0], [3, 4, 0]])
    search = run.LabelSearch(labels)
    search.expand(search.next(), 0.0, np.log([0.9, 0.05, 0.05]))
    assert not known_enough(0)(search)  # open: 0.05 of a prefix whose label is not known yet
    enough = known_enough(2)
    while search.open and not enough(search):
        score, prefix = -search.open[0][0], search.next()
        search.expand(prefix, score, [-0.001] * len(labels.children[prefix]))
    assert 2 in [number for _, number in search.found]


def test_what_answers_are_worth_is_said() -> None:
    _, made = calibrate(drawn(200, 3.0, 2), drawn(400, 3.0, 3))
    assert made is not None and made.threshold is not None
    answers = Answers(file="labels.json", labels=10, temperature=3.0, calibration=made)
    lines = answers_lines(answers)
    assert (
        "one of 10 labels" in lines[0] and "temperature 3, fitted on 200 validation rows; on 400 test rows" in lines[1]
    )
    assert f"suggested: --min-probability {made.threshold.min_probability:g}" in lines[2]
    assert len(list(bin_rows(made))) == len(made.bins)
    assert [row[0] for row in certain_rows(made)] == ["quarter", "half", "three quarters", "all"]
    none = answers.model_copy(update={"calibration": None})
    assert "not calibrated" in answers_lines(none)[1]
    assert "no --min-probability" in answers_lines(
        answers.model_copy(update={"calibration": made.model_copy(update={"threshold": None})})
    )[2]  # fmt: skip
    assert Calibration.model_validate_json(made.model_dump_json()) == made
