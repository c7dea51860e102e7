"""Progress as people see it: whole at eighty columns, in words, and a run that goes on says so."""

from __future__ import annotations

import ast
import io
from typing import Any

import pytest
from rich.console import Console
from tiny import ROOT

from edgeft.cli.screen import Reporter
from edgeft.progress import WORDS, in_words

NUMBERS = {
    "loss": 0.0836, "learning_rate": 3.3e-4, "tokens_per_second": 1315.0, "bytes_now": 507 * 2**20,
    "seconds_left": 3725.0, "valid_loss": 0.1234,
}  # fmt: skip


def drawn(width: int, *calls: tuple[str, int, int, dict[str, float]], terminal: bool = True) -> list[str]:
    """The lines that stand on a screen of so many columns behind these calls."""
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, legacy_windows=False)
    reporter = Reporter(console)
    reporter.budget_bytes = int(22.2 * 2**30)
    if not terminal:
        with reporter:
            for call in calls:
                reporter(*call)
        return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]
    for call in calls:
        reporter(*call)
    with console.capture() as capture:
        console.print(reporter.bar.get_renderable())
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_bar_and_all_its_numbers_are_whole(width: int) -> None:
    lines = drawn(width, ("train", 12068, 12068, NUMBERS))
    assert len(lines) == 2 and all(len(line.rstrip()) <= width for line in lines)
    assert lines[0].startswith("training ") and "12,068/12,068" in lines[0] and lines[0].rstrip().endswith("left")
    assert sum(mark in "\u2501\u2578\u257a" for mark in lines[0]) >= 20
    said = "loss 0.0836, validation 0.1234, lr 3.3e-04, 1,315 tok/s, 507 MiB of 22.2 GiB"
    assert lines[1].strip() == said and "\u2026" not in "".join(lines)


@pytest.mark.parametrize("stage", sorted(WORDS))
def test_every_stage_has_room_for_a_bar(stage: str) -> None:
    (line,) = drawn(80, (stage, 200, 200, {})) if stage != "resume" else [WORDS[stage] + "\u2501" * 20]
    assert WORDS[stage] in line and sum(mark in "\u2501\u2578\u257a" for mark in line) >= 20


def test_one_of_one_is_not_counted() -> None:
    (line,) = drawn(80, ("build", 0, 1, {}))
    assert line.startswith("building the bundle") and "0/1" not in line


def test_a_log_has_words_and_no_bar() -> None:
    lines = drawn(
        140, ("load", 0, 1, {}), ("train", 0, 30, {}), ("train", 1, 30, NUMBERS), ("train", 30, 30, NUMBERS),
        ("parity: trained", 0, 4, {}), ("done", 1, 1, {"seconds": 1.0}), terminal=False,
    )  # fmt: skip
    assert lines[:2] == ["loading the model", "training 0/30"]
    assert lines[2].startswith("training 30/30 loss 0.0836, validation 0.1234, ") and lines[2].endswith(
        ", 1 h 02 min left"
    )
    assert lines[3:] == ["checking the trained model 0/4"]


def test_a_log_has_no_line_for_each_turn_of_two_stages() -> None:
    """As where a run is validated after each step."""
    steps = [(stage, done, total, {}) for done in range(1, 9) for stage, total in (("train", 30), ("validate", 7))]
    assert drawn(140, *steps, terminal=False) == ["training 1/30", "validating 1/7"]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_that_goes_on_says_where(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
    with Reporter(console) as reporter:
        reporter("resume", 14, 30, {})
    assert "continues at step 15 of 30\n" in console.file.getvalue()  # type: ignore[attr-defined]


def stages() -> set[str]:
    """What edgeft's own code calls its stages: the first argument of every call of a progress."""
    found: set[str] = set()
    for path in (ROOT / "edgeft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name: Any = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in ("progress", "told", "score") and isinstance(node.args[0].value, str):
                    found.add(node.args[0].value)
    return found


def test_every_stage_has_its_words() -> None:
    found = stages()
    assert {"train", "parity: trained", "answers", "build"} <= found
    assert found - {"done"} <= WORDS.keys(), "edgeft/progress.py says how they read"


def test_a_stage_that_is_named_by_its_subject_reads_as_a_sentence() -> None:
    assert in_words("parity: cars") == "checking cars"
    assert in_words("repair: ort-int4, calibrated") == "trying ort-int4, calibrated"
    assert in_words("score layers by hidden") == "score layers by hidden"
