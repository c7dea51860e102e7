"""Does the first screen say the verdict, what is needed, used and given up, and after a run its quality?"""

from __future__ import annotations

import json

import pytest
from reports import devices, finished_run, metrics, plan_of, plan_summary, proof, run_summary, train_of
from tiny import CONFIGS

from edgeft.errors import DoesNotFit
from edgeft.reporting.card import headline, plan_card, refusal_card, run_card
from edgeft.reporting.markdown import to_markdown
from edgeft.reporting.matrix import find_profiles, make_matrix
from edgeft.reporting.read_run import Run
from edgeft.reporting.summary import Summary, summarise
from edgeft.reporting.words import DAYS, LONG_SECONDS, behind, cell_text, verdict
from edgeft.units import GIB


def facts(report: Summary) -> dict[str, str]:
    return {fact.name: fact.value for fact in report.card.facts}


def test_a_plan_that_fits() -> None:
    report = plan_summary("qwen2.5-1.5b")
    card = report.card
    assert (card.state, card.title, card.mark) == ("fits", "FITS", "\N{CHECK MARK}")
    assert card.said == "qwen2.5-1.5b (1.54B parameters) can be fine-tuned on t4: FP16 LoRA r64, all 28 layers."
    assert (card.need_bytes, card.uses_bytes, card.limit_bytes) == (
        report.need_bytes, report.peak_bytes, report.budget_bytes
    )  # fmt: skip
    assert card.need_bytes is not None and card.uses_bytes is not None
    assert card.need_bytes < card.uses_bytes <= card.limit_bytes and card.need_note.endswith("% time")
    assert {"time", "bundle"} <= facts(report).keys() and not card.hints


def test_no_profiles_description_is_pasted_into_a_sentence() -> None:
    report = plan_summary()
    for text in (*report.headline, report.card.said):
        assert report.profile.description not in text


def test_a_plan_whose_export_needs_another_machine() -> None:
    report = plan_summary(profile="rtx4060-8gb", device="raspberrypi5-8gb", stream_layers=False)
    card = report.card
    assert card.state == "elsewhere" and card.title.startswith("FITS, ") and card.title.endswith("EXPORT ELSEWHERE")
    assert any("main memory" in hint and "rtx4060-8gb has 16.0 GiB" in hint for hint in card.hints)
    assert any("layers train" in line or "instead of 64" in line for line in card.gave_up)
    assert "points of quality" in card.gave_up[0]
    assert "on raspberrypi5-8gb" in facts(report)
    assert sum(stage.over for stage in report.later_stages) >= 1


def test_what_fits_nowhere_says_what_would() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan_of("llama-3.1-70b", stream_layers=False)
    card = refusal_card(caught.value, "models/llama-3.1-70b", 70_553_706_496, "t4", 14 * GIB)
    assert (card.state, card.title) == ("no", "DOES NOT FIT")
    assert card.need_bytes is not None and card.need_bytes > card.limit_bytes and card.hints
    assert headline(card)[0].startswith("\N{BALLOT X} DOES NOT FIT. llama-3.1-70b (70.6B parameters) cannot be")


def test_the_best_way_gives_up_nothing() -> None:
    assert plan_summary("smollm2-135m", "rtx4090-24gb", max_length=128).card.gave_up == ()


def test_a_run_is_told_in_the_past_and_quality_comes_first() -> None:
    report = run_summary()
    card = report.card
    assert (card.state, card.title) == ("done", "TRAINED AND PROVEN")
    assert card.said == "smollm2-135m (135M parameters) was fine-tuned on cpu-16gb: FP32 LoRA r64, all 30 layers."
    assert [(fact.name, fact.value) for fact in card.facts] == [
        ("exact match", "77.4%"), ("ort-int4 equals trained", "passed"), ("bundle", "97.0 MiB"),
        ("time", "4 min 04 s"),
    ]  # fmt: skip
    assert [fact.note for fact in card.facts[:3]] == [
        "on 1,000 test rows; the base: 0.0%", "rounding: no difference shown", "context 2,048 tokens, 61 tok/s here"
    ]  # fmt: skip
    assert card.uses_note == "at most, measured"
    text = " ".join(report.headline)
    assert "can be" not in text and "estimated" not in text and "77.4% (on 1,000 test rows; the base: 0.0%)" in text
    assert to_markdown(report).splitlines()[2:5:2] == list(report.headline)


def test_a_run_without_a_bundle_and_without_answers() -> None:
    plan = plan_of("smollm2-135m", "cpu-16gb")
    scores = {name: metrics(None, loss) for name, loss in (("base_test", 3.0), ("test", 2.0))}
    card = run_card(Run(plan, train_of(plan, **scores)))
    assert (card.title, card.facts[0].name, card.facts[0].value) == ("TRAINED", "loss", "2.000")
    assert "on 1,000 test rows; the base: 3.000" in card.facts[0].note and "were estimated" in card.facts[-1].note


def test_free_text_is_told_by_its_loss_with_f1_beside_it() -> None:
    """An exact match of nearly nothing says nothing of free text, and must not lead."""
    plan = plan_of("smollm2-135m", "cpu-16gb").model_copy(update={"task_score": "f1"})
    words = {"base_test": {"f1": 0.031, "f1_rows": 30}, "test": {"f1": 0.452, "f1_rows": 30}}
    scores = {
        name: metrics(0.01, loss).model_copy(update=words[name]) for name, loss in (("base_test", 3.0), ("test", 2.0))
    }
    fact = run_card(Run(plan, train_of(plan, **scores))).facts[0]
    assert (fact.name, fact.value) == ("loss", "2.000")
    assert fact.note.endswith("less is better; F1 of words 45.2% on 30 rows, the base 3.1%")


def test_a_bundle_that_is_not_what_was_trained() -> None:
    for changes in ({"proof": proof("top-1 agreement 0.5")}, {"failed": "mean KL of 0.4 nats"}):
        card = run_card(finished_run(**changes))
        assert (card.state, card.title) == ("failed", "NOT WHAT WAS TRAINED")
        assert card.facts[1].value == "failed"


def test_a_run_on_another_device_keeps_the_plans_memory() -> None:
    run = finished_run()
    moved = [{"what": "device", "planned": "cuda", "done": "cpu"}]
    card = run_card(run._replace(train=train_of(run.plan, deviations=moved)))
    assert card.uses_bytes == run.plan.peak_bytes and "another device" in card.said


def test_the_card_is_in_the_json_and_comes_back() -> None:
    report = summarise(Run(plan_of()), devices())
    assert json.loads(report.model_dump_json())["card"]["title"] == report.card.title
    assert Summary.model_validate_json(report.model_dump_json()).card == report.card
    assert plan_card(plan_of()).facts[-1].name == "bundle"


@pytest.mark.parametrize(("model", "long"), [("llama-3.1-70b", True), ("qwen2.5-1.5b", False)])
def test_what_takes_days_is_no_plain_fit(model: str, long: bool) -> None:
    """In the verdict, on the card, in the matrix and its Markdown: who decides on hardware reads one of them."""
    plan = plan_of(model, "t4")
    [cell] = make_matrix([(model, str(CONFIGS / model))], find_profiles("t4")).models[0].training
    assert (plan.seconds > LONG_SECONDS) is long and cell.seconds == plan.seconds
    card, days = plan_card(plan), f"{plan.seconds / 86400:.1f} days"
    assert (f"training takes {days} for the rows that are assumed" in verdict(plan)) is long
    assert (card.title.endswith(", TAKES DAYS") and any(days in hint for hint in card.hints)) is long
    assert (DAYS in behind(cell)) is long and (f"{days} of training" in cell_text(cell)) is long
    said = plan.model_copy(update={"seconds": LONG_SECONDS})  # a day is none
    assert "days" not in verdict(said) and "days" in verdict(said.model_copy(update={"seconds": LONG_SECONDS + 1}))
