"""How does a report read as Markdown? The page's tables without its figures, for a pull request or a wiki."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from edgeft.machines.profile import Profile
from edgeft.reporting.answers import ANSWER_SHOWN, in_a_line, pair_cells, pair_head, score_cells, score_head
from edgeft.reporting.label_words import BIN_HEAD, CERTAIN_HEAD, answers_lines, bin_rows, calibration_of, certain_rows
from edgeft.reporting.matrix import DeviceCell, Matrix, ModelRow, TrainingCell
from edgeft.reporting.summary import Summary
from edgeft.reporting.words import (
    DEVICE_MARKS,
    GIVEN_BACK,
    MARKS,
    SYMBOLS,
    amount,
    attempt_cells,
    bundles_of,
    cell_text,
    grouped,
    signed,
    symbol,
)
from edgeft.units import show_bytes, show_count, show_seconds


def to_markdown(report: Summary | Matrix) -> str:
    """The report as Markdown; the same report gives the same text."""
    blocks = _matrix(report) if isinstance(report, Matrix) else _summary(report)
    made = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return "\n\n".join([*blocks, f"Made with {made}."]) + "\n"


def escape(text: str) -> str:
    """Text for a Markdown table: no tag, no column and no link of its own."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{letter}" if letter in "|[]*_`\\" else letter for letter in plain)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table whose cells are escaped here; `numbers` are the columns on the right."""
    marks = ["---:" if i in numbers else "---" for i in range(len(head))]
    lines = [[escape(cell) for cell in head], marks, *([escape(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _summary(report: Summary) -> list[str]:
    name = escape(Path(report.model).name or report.model)
    blocks = [f"# {name} on {escape(report.profile.name)}", *map(escape, report.headline)]
    if report.kind == "plan":
        facts = [f"{fact.name}: {fact.value}" + (f" ({fact.note})" if fact.note else "") for fact in report.card.facts]
        blocks.append(_list([*facts, *report.card.hints]))
    for section in (_compared, _memory, _way, _options, _quality, _answers, _repair, _devices, _notes, _terms):
        blocks += section(report)
    return blocks


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _compared(report: Summary) -> list[str]:
    rows = [
        (
            row.what,
            ("at most " if row.bound else "") + amount(row.predicted, row.unit),
            amount(row.measured, row.unit),
            f"{100 * row.measured / row.predicted:.0f}% of the bound" if row.bound else f"{signed(100 * row.error)}%",
        )
        for row in report.compared
    ]
    head = ("what", "predicted", "measured", "difference")
    return ["## Predicted and measured", _table(head, rows, (1, 2, 3))] if rows else []


def _memory(report: Summary) -> list[str]:
    rows = [
        (
            stage.title,
            show_bytes(stage.expected_bytes),
            ("\N{BALLOT X} " if stage.over else "") + show_bytes(stage.high_bytes) + ("*" if stage.by_pages else ""),
            show_bytes(stage.limit_bytes) if stage.limit_bytes is not None else "-",
            show_bytes(stage.measured_bytes) if stage.measured_bytes is not None else "-",
        )
        for stage in (*report.stages, *report.later_stages)
    ]
    disk = [(d.stage, d.where, show_bytes(d.peak_bytes), show_bytes(d.kept_bytes)) for d in report.disk]
    return [
        "## Memory in each phase",
        _table(("phase", "expected", "high", "limit", "measured"), rows, (1, 2, 3, 4)),
        *([rf"\* {GIVEN_BACK}"] if any(stage.by_pages for stage in (*report.stages, *report.later_stages)) else []),
        "## Disk",
        _table(("stage", "where", "at most", "stays"), disk, (2, 3)),
    ]


def _way(report: Summary) -> list[str]:
    """How it trains, what that gave up, and what each choice saves."""
    blocks = ["## How it trains", _table(("", ""), [(setting.name, setting.text) for setting in report.settings])]
    blocks += ["## Given up to fit", _list(report.card.gave_up) or "Nothing: the best way that is known fits."]
    if report.savings:
        saved = [(saving.choice, saving.instead_of, show_bytes(saving.bytes)) for saving in report.savings]
        blocks.append(_table(("choice", "instead of", "saves"), saved, (2,)))
    return blocks


def _options(report: Summary) -> list[str]:
    rows = [
        (
            ("chosen: " if option.chosen else "") + option.text,
            f"{option.quality_cost:.1f}",
            show_bytes(option.high_bytes),
            show_seconds(option.seconds_per_step),
            "yes" if option.fits else "no",
        )
        for option in report.options
        if option.frontier
    ]
    title = f"## The best of {report.looked_at:,} ways for each amount of memory"
    return [title, _table(("way", "points given up", "memory", "a step", "fits"), rows, (1, 2, 3))]


def _quality(report: Summary) -> list[str]:
    blocks = []
    if report.scores:
        scores = score_head(each.metrics for each in report.scores)
        rows = [(each.metrics.named(each.name), *score_cells(each.metrics, scores)) for each in report.scores]
        head = (f"model, {report.scores[0].metrics.rows} {report.scored_on} rows", *scores)
        blocks += ["## How good it is", _table(head, rows, range(1, len(head)))]
    if report.pairs:
        scores = pair_head(report.pairs)
        changes = [(each.before, each.after, *pair_cells(each, scores)) for each in report.pairs]
        head = ("from", "to", *(f"{name}, 95% interval" for name in scores))
        blocks.append(_table(head, changes, range(2, len(head))))
    if report.samples:
        forms = ("base", "tuned", *(["bundle"] if any(each.bundle for each in report.samples) else []))
        answers = [
            (in_a_line(each.prompt[-ANSWER_SHOWN:]), in_a_line(each.expected),
             *(in_a_line(getattr(each, form)) for form in forms))
            for each in report.samples
        ]  # fmt: skip
        head = ("end of the prompt", "expected", "base", "fine-tuned", "bundle")[: 2 + len(forms)]
        blocks += ["Answers to some of the scored validation rows:", _table(head, answers)]
    return blocks


def _answers(report: Summary) -> list[str]:
    if not report.answers:
        return []
    blocks = ["## What its answers are worth", _list(answers_lines(report.answers))]
    if made := calibration_of(report.answers):
        blocks += [_table(CERTAIN_HEAD, certain_rows(made), (1, 2)), _table(BIN_HEAD, bin_rows(made), (1, 2, 3))]
    return blocks


def _repair(report: Summary) -> list[str]:
    if not report.repair:
        return []
    head = ("artifact", "bundle, predicted", "loss, 95% interval", "exact match, points, 95% interval", "")
    rows = [attempt_cells(each) for each in report.repair.attempts]
    said = f"Against the merged model on {report.repair.compared}."
    return ["## What was considered for the device", said, _table(head, rows, (1, 2, 3))]


def _devices(report: Summary) -> list[str]:
    cells = [(cell.machine, f"{symbol(cell)} {cell_text(cell)}") for cell in report.devices]
    return (
        ["## Where the result can run", _table(("device", f"as a bundle of {report.target}"), cells)] if cells else []
    )


def _notes(report: Summary) -> list[str]:
    return ["## Notes", _list(report.notes)] if report.notes else []


def _terms(report: Summary) -> list[str]:
    stages = (*report.stages, *report.later_stages)
    terms = [(s.title, t.name, show_bytes(t.bytes), grouped(t.formula)) for s in stages for t in s.terms]
    return ["## Every term", _table(("phase", "term", "memory", "how it is counted"), terms, (2,))]


def _matrix(report: Matrix) -> list[str]:
    pinned = "".join(f", {escape(key)}={escape(value)}" for key, value in report.settings.items())
    blocks = [
        "# Which models fit which machines",
        f"Training is planned for samples of {report.max_length:,} tokens{pinned}. {escape(bundles_of(report))}",
    ]
    if report.training_machines:
        rows = [_row(model, model.training, len(report.training_machines)) for model in report.models]
        legend = _legend({SYMBOLS[grade]: said for grade, said in MARKS.items()})
        blocks += ["## Fine-tuning", legend, _table(_head(report.training_machines), rows, (1,))]
    if report.devices:
        rows = [_row(model, model.devices, len(report.devices)) for model in report.models]
        blocks += ["## Running", _legend(DEVICE_MARKS), _table(_head(report.devices), rows, (1,))]
    lines = ["Memory is the high estimate of training, the expected one of a bundle; times and speeds are estimates."]
    lines += [f"- {escape(text)}: {escape(', '.join(names))}" for text, names in approximate(report).items()]
    return [*blocks, "\n".join(lines)]


def _legend(marks: Mapping[str, str]) -> str:
    return "; ".join(f"{mark} {escape(said)}" for mark, said in marks.items()) + "."


def _head(machines: Sequence[Profile]) -> list[str]:
    return ["model", "parameters", *(f"{m.name}, {show_bytes(m.budget_bytes)}" for m in machines)]


def _row(model: ModelRow, cells: Sequence[TrainingCell] | Sequence[DeviceCell], count: int) -> list[str]:
    size = show_count(model.parameters) if model.parameters else "-"
    if model.problem:
        return [model.name, size, f"? cannot be planned: {model.problem}", *[""] * (count - 1)]
    return [model.name, size, *(f"{symbol(cell)} {cell_text(cell)}" for cell in cells)]


def approximate(report: Matrix) -> dict[str, list[str]]:
    """Why some predictions are rougher: each reason with the models it holds for."""
    found: dict[str, list[str]] = {}
    for model in report.models:
        if model.approximate:
            found.setdefault(model.approximate, []).append(model.name)
    return found
