"""Tables and lines at 80 columns: every word and every number of their cells is there whole, and no line is wider."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
from reports import finished_run, metrics
from rich.console import Console, Group, RenderableType
from tiny import CONFIGS

from edgeft.exporting.result import Evaluation
from edgeft.machines.profile import list_profiles
from edgeft.models.discover import discover
from edgeft.models.metrics import Difference, Pair
from edgeft.planning.plan import make_plan
from edgeft.reporting.bundle_tables import bundle_text, evaluation_text
from edgeft.reporting.explain import explain_text
from edgeft.reporting.listings import named_text, profiles_text, settings_text
from edgeft.reporting.tables import Line, ScreenTable
from edgeft.reporting.terminal import layers_text, plan_text, train_text
from edgeft.settings.job import make_job
from edgeft.targets.target import list_targets

WIDTHS = (80, 100, 140)
PARTED = re.compile(r"\d\n +(GiB|MiB|KiB|s|min|h|points|nats|tok/s|tokens)\b")  # a number and its unit on two lines
PLANS: list[dict[str, Any]] = [
    {"model": "qwen2.5-1.5b", "profile": "t4", "device": "raspberrypi5-8gb"},
    {"model": "llama-3.1-70b", "profile": "t4"},
    {"model": "deepseek-r1-distill-qwen-1.5b", "profile": "rtx4060-8gb", "device": "android-8gb",
     "target": "ort-int4-calibrated"},
    {"model": "gemma-2-9b", "profile": "t4"},
    {"model": "gpt2", "profile": "cpu-8gb", "target": "onnx-portable-int8", "layers": "lisa"},
]  # fmt: skip


def shown(text: RenderableType, width: int) -> list[str]:
    console = Console(width=width, highlight=False, no_color=True)
    with console.capture() as caught:
        console.print(text)
    return caught.get().splitlines()


def tables_in(text: RenderableType) -> Iterable[ScreenTable]:
    if isinstance(text, Group):
        for each in text.renderables:
            yield from tables_in(each)
    elif isinstance(text, ScreenTable):
        yield text


def words(text: str) -> list[str]:
    return text.split()


def check(text: RenderableType, width: int) -> None:
    """Every word of every cell stands in the lines, no line is too wide, and no number is parted from its unit."""
    found = list(tables_in(text))
    assert found
    for table in found:
        lines = [line for line, _ in table.lines(width)]
        assert all(len(line) <= width for line in lines), "\n".join(lines)
        there = words(" ".join(lines).replace(";", " "))
        for cell in (*table.columns, table.title, *(cell for row in table.rows for cell in row)):
            missing = [word for word in words(cell.replace(";", " ")) if word not in there and word != "-"]
            assert not missing or cell in table.columns, f"{missing} of {cell!r} in\n" + "\n".join(lines)
        assert not PARTED.search("\n".join(line.rstrip() for line in lines))
    assert all(len(line) <= width for line in shown(text, width))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("asked", PLANS, ids=lambda asked: str(asked["model"]))
def test_a_plan_and_its_explanation(asked: dict[str, Any], width: int) -> None:
    job = make_job(**{**asked, "model": str(CONFIGS / asked["model"])})
    plan = make_plan(job, compare_tuners=True)
    check(plan_text(plan), width)
    check(explain_text(plan), width)


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_listed(width: int) -> None:
    check(profiles_text(list_profiles()), width)
    check(settings_text(), width)
    check(named_text("target", {target.name: target.description for target in list_targets()}), width)
    check(layers_text(discover(str(CONFIGS / "mixtral-8x7b"))), width)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_run_a_bundle_and_an_evaluation(width: int) -> None:
    run = finished_run()
    assert run.train is not None and run.bundle is not None
    check(train_text(run.train), width)
    check(bundle_text(run.bundle, run.merged, run.here), width)
    change = Difference(difference=-6.4936, low=-6.9189, high=-6.0683)
    scores = {name: metrics(0.4, 1.0) for name in ("base", "fine-tuned", "ort-int4-calibrated")}
    pair = Pair(before="fine-tuned", after="ort-int4-calibrated", loss=change, exact_match=change, f1=change)
    check(
        evaluation_text(
            Evaluation.model_construct(scores=scores, pairs=(pair,), tasks={}, data="test.jsonl", cut_rows=0)
        ),
        width,
    )


def test_what_has_no_room_goes_below_its_row_in_the_order_that_is_said() -> None:
    table = ScreenTable("name", "first", "second", "why", prose=["why"], below={"why": "", "first": "by"})
    table.add_row("raspberrypi5-8gb", "12.5 GiB", "-0.0123 (-0.5 to +0.4)", "a reason of several words that is long")
    table.add_row("t4", "-", "-", "")
    wide, middle, narrow = ([line.rstrip() for line, _ in table.lines(width)] for width in (120, 60, 42))
    assert "reason of several" in wide[3] and len(wide) == 6
    assert middle[3] == " raspberrypi5-8gb   12.5 GiB   -0.0123 (-0.5 to +0.4)"
    assert middle[4] == "    a reason of several words that is long" and middle[5].startswith(" t4 ")
    assert narrow[3] == " raspberrypi5-8gb  -0.0123 (-0.5 to +0.4)"
    below = " ".join(each.strip() for each in narrow[4:6])
    assert below == "by 12.5 GiB; a reason of several words that is long"


def test_a_line_goes_on_indented_and_keeps_a_number_with_its_unit() -> None:
    text = "  - loss in chunks of 256 tokens instead of logits of 4096 tokens at once: 3.48 GiB less"
    first, second = shown(Line(text, "    "), 80)
    assert first.endswith("at once:") and second == "    3.48 GiB less"


def test_each_size_of_a_bundle_says_what_it_is_of() -> None:
    """Weights in a plan, a whole bundle as it is predicted, all files of one that is there: each has its name."""
    run = finished_run()
    assert run.bundle is not None
    planned = " ".join(shown(plan_text(run.plan), 140))
    assert re.search(r"bundle +\S+: about [\d.]+ MiB of weights, context", planned)
    built = " ".join(shown(bundle_text(run.bundle, run.merged, run.here), 140))
    assert "bundle, predicted" in built and "ort-int4: 97.0 MiB with all files, context" in built
