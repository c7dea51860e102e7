"""A run that learnt nothing says so last, and what of what was asked for may be why; one that learnt does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reports import finished_run, plan_of, train_of
from rich.console import Console
from tiny import EXAMPLE

from edgeft.cli import next_steps
from edgeft.models.metrics import Metrics
from edgeft.planning.own_choice import own_choice
from edgeft.reporting.bundle_tables import bundle_text
from edgeft.reporting.learnt import has_learnt, loss_that_stays, nothing_learnt
from edgeft.reporting.terminal import train_text
from edgeft.training.result import TrainResult

MODEL, MACHINE = "smollm2-135m", "cpu-16gb"
SLOW: dict[str, Any] = {"learning_rate": 1e-5, "rank": 8, "max_steps": 3, "target_modules": "q_proj,v_proj",
                        "lora_alpha": 2, "lora_scale": "plain"}  # fmt: skip


def rows(right: int, of: int, loss: float, spread: float = 0.1) -> Metrics:
    """Scores with each row's own: the first `right` of them exact."""
    losses = tuple(10 * loss + spread * (-1) ** i for i in range(of))
    return Metrics(rows=of, loss=loss, perplexity=2.718**loss, exact_match=right / of, row_losses=losses,
                   row_tokens=(10,) * of, row_exact="1" * right + "0" * (of - right))  # fmt: skip


def result(before: Metrics, after: Metrics, task: str = "exact_match", **settings: Any) -> TrainResult:
    plan = plan_of(MODEL, MACHINE, **settings).model_copy(update={"task_score": task})
    scores = {"base_valid": before, "valid": after, "base_test": None, "test": None}
    return train_of(plan, **{name: found and found.model_dump() for name, found in scores.items()})


def test_it_names_what_was_asked_for_beside_what_a_plan_takes_by_itself() -> None:
    asked = result(rows(0, 60, 2.0), rows(0, 60, 1.9), **SLOW)
    first, *_, last = nothing_learnt(asked)
    assert "nothing was learnt that 60 scored rows show: exact match 0.0% before, 0.0% after" in first
    own = plan_of(MODEL, MACHINE).training  # the very plan without them
    for name, here, best in (
        ("learning_rate", "1e-05", f"{own.learning_rate:g}"), ("rank", "8", own.rank), ("steps", "3", own.steps),
        ("target_modules", "q_proj,v_proj", ",".join(own.target_modules)), ("of", "0.25", f"{own.adapter_scale:.3g}"),
    ):  # fmt: skip
        assert f"{name} {here} (edgeft's own choice: {best})" in last
    assert "a larger one" in last and not has_learnt(asked)


def test_where_another_tuner_would_be_taken_its_settings_are_the_answer() -> None:
    """A rank asks for LoRA; a model so small would train whole, at a rate of its own and without any rank."""
    base = rows(0, 60, 2.0)
    plan = plan_of(str(EXAMPLE), MACHINE, rank=16, learning_rate=1e-5).model_copy(update={"task_score": "exact_match"})
    scores = dict.fromkeys(("base_valid", "valid"), base.model_dump()) | dict.fromkeys(("base_test", "test"))
    last = nothing_learnt(train_of(plan, **scores))[-1]
    own = plan_of(str(EXAMPLE), MACHINE).training
    assert own.tuner == "full" and "tuner lora (edgeft's own choice: full)" in last
    assert f"learning_rate 1e-05 (edgeft's own choice: {own.learning_rate:g})" in last and "rank" not in last


def test_what_a_plan_takes_by_itself_is_found_without_the_data() -> None:
    for settings in (SLOW, {"tuner": "full"}, {"layers": "lisa", "active_layers": 1}, {"tuner": "prefix"}):
        assert own_choice(plan_of(MODEL, MACHINE, **settings)) == plan_of(MODEL, MACHINE).training


def test_where_nothing_was_asked_for_the_base_is_named() -> None:
    [first, last] = nothing_learnt(result(rows(0, 60, 2.0), rows(0, 60, 2.0)))
    assert "WARNING" in first and "edgeft's own choice: more rows or epochs" in last and "asked for" not in last
    [_, last] = nothing_learnt(result(rows(0, 60, 2.0), rows(0, 60, 2.0), rank=64))  # asked for, and the same
    assert "asked for" not in last


@pytest.mark.parametrize(
    ("before", "after", "task", "learnt"),
    [
        (rows(0, 60, 2.0), rows(30, 60, 0.4), "exact_match", True),
        (rows(30, 60, 0.4), rows(31, 60, 0.4), "exact_match", False),  # the interval covers zero
        (rows(30, 60, 0.4), rows(10, 60, 0.9), "exact_match", False),  # worse
        (rows(59, 60, 0.4), rows(59, 60, 0.4), "exact_match", True),  # nothing was left to learn
        (rows(60, 60, 0.4), rows(0, 60, 4.0), "exact_match", False),  # and all of it was lost
        (rows(0, 60, 2.0), rows(0, 60, 0.4), "f1", True),  # free text: the loss leads
        (rows(0, 60, 2.0), rows(0, 60, 2.0, spread=0.4), "f1", False),
        (rows(0, 60, 2.0), rows(0, 60, 2.3), "loss", False),
    ],
)
def test_the_rows_decide_by_the_score_that_leads(before: Metrics, after: Metrics, task: str, learnt: bool) -> None:
    found = result(before, after, task)
    assert has_learnt(found) is learnt and bool(nothing_learnt(found)) is not learnt


def test_few_rows_ask_for_more_of_them() -> None:
    for right, of, told in ((3, 11, True), (0, 11, True), (3, 60, False)):
        said = nothing_learnt(result(rows(1, of, 2.0), rows(right, of, 1.0)))
        assert any("--valid FILE with 50 or more" in line for line in said) is told


def test_a_loss_that_stays_though_answers_are_right_is_explained() -> None:
    """As in a run of the example on chats: 4.07 nats in each row, whatever its length, all of them right."""
    base = rows(0, 60, 2.0)
    for after, told in (
        (rows(60, 60, 0.407), True),  # 4.07 nats in each row of ten tokens
        (rows(60, 60, 0.407, spread=4.0), False),  # some rows have next to none
        (rows(60, 60, 0.05), False),
        (rows(40, 60, 0.407), False),  # wrong answers may cost as much
    ):
        found = result(base, after)
        assert bool(loss_that_stays(found)) is told and (not told or "keeps 3.97 nats" in loss_that_stays(found)[0])


def test_a_run_and_a_bundle_end_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run()
    assert run.merged is not None and run.bundle is not None
    poor = result(rows(0, 60, 2.0), rows(0, 60, 2.0), **SLOW)
    for train, told in ((poor, True), (run.merged.train, False)):
        merged = run.merged.model_copy(update={"train": train})
        for text in (train_text(train), bundle_text(run.bundle, merged, run.here)):
            console = Console(width=2000)
            with console.capture() as shown:
                console.print(text)
            assert ("nothing was learnt" in shown.get()) is told
            assert ("asked for were" in shown.get().rstrip().splitlines()[-1]) is told
        next_steps.after_export(run.bundle, Path("bundle"), learnt=not told)
        assert ("copy this folder" in capsys.readouterr().err) is not told
