"""How does a report become files? One HTML page that needs nothing else, the same as Markdown, and the data as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.documents import saving
from edgeft.machines.profile import Profile
from edgeft.memory.timing import DATASHEET_SHARES, MEASURED_SHARES
from edgeft.reporting import bars, charts
from edgeft.reporting.answers import in_a_line, pair_cells, pair_head, score_cells, score_head
from edgeft.reporting.glossary import words_of
from edgeft.reporting.label_words import BIN_HEAD, CERTAIN_HEAD, answers_lines, bin_rows, calibration_of, certain_rows
from edgeft.reporting.markdown import approximate, to_markdown
from edgeft.reporting.matrix import Grade, Matrix, ModelRow
from edgeft.reporting.palette import FAMILIES
from edgeft.reporting.summary import Summary
from edgeft.reporting.words import (
    BEHIND,
    DAYS,
    DEVICE_MARKS,
    ELSEWHERE,
    MARKS,
    MAY_EXCEED,
    SYMBOLS,
    amount,
    attempt_cells,
    behind,
    bundles_of,
    cell_text,
    difference_text,
    grouped,
    rung_cells,
    show_pace,
    show_rate,
    signed,
    symbol,
)
from edgeft.settings.job import Job
from edgeft.units import show_bytes, show_count, show_seconds

if TYPE_CHECKING:
    import jinja2

TAGS = re.compile(r"<style>.*?</style>|<[^>]*>", re.DOTALL)
KINDS: dict[Grade, str] = {"full": "full", "4-bit": "four-bit", "reduced": "reduced", "none": "none"}  # CSS classes
USEFUL_CONTEXT = 1024  # tokens: less is no device for a chat or a document
FAST = 5  # tokens a second: about the speed of reading


def write_report(report: Summary | Matrix, out: Path) -> list[Path]:
    """`out` as HTML, and beside it the same as .md and .json: their paths. The same report gives the same bytes."""
    texts = {".html": to_html(report), ".md": to_markdown(report), ".json": report.model_dump_json(indent=1) + "\n"}
    made = []
    with saving(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            path = out.with_suffix(suffix)
            path.write_text(text, encoding="utf-8")
            made.append(path)
    return made


def to_html(report: Summary | Matrix) -> str:
    """The page: styles and figures inside it, no script, no address."""
    values = _matrix_values(report) if isinstance(report, Matrix) else _summary_values(report)
    name = "matrix.html.j2" if isinstance(report, Matrix) else "summary.html.j2"
    page = environment().get_template(name)
    said = TAGS.sub(" ", page.render(report=report, **values))
    text = page.render(report=report, words_used=words_of(said), **values)
    return "\n".join(line for line in text.splitlines() if line.strip()) + "\n"


def _summary_values(report: Summary) -> dict[str, Any]:
    """What the template shows besides the summary itself: where each piece of a figure lies."""
    memories = memories_of(report.profile)
    return {
        "name": Path(report.model).name or report.model,
        "looks": FAMILIES,
        "device_marks": [*DEVICE_MARKS.items(), (MAY_EXCEED, BEHIND[MAY_EXCEED])],
        "bars": bars.groups(report.stages, memories),
        "later": bars.groups(report.later_stages, memories),
        "ways": charts.frontier(report.options, report.budget_bytes),
        "timeline": charts.timeline(report.timeline, report.budget_bytes) if report.timeline else None,
        "peak": charts.peak_of(report.timeline) if report.timeline else "",
        "loss": charts.loss_curve(report.loss_curve, report.validations) if len(report.loss_curve) > 2 else None,
    }


def memories_of(profile: Profile) -> dict[str, str]:
    """What a page calls the memory that a phase takes."""
    own = {"cpu": "In main memory", "cuda": "On the GPU", "mps": "On the chip"}[profile.device]
    return {"device": own, "host": "In main memory", "target": "On the device that runs the result"}


def environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": show_bytes, "count": show_count, "seconds": show_seconds, "pace": show_pace, "amount": amount,
        "rate": show_rate,
        "symbol": symbol, "cell_text": cell_text, "behind": behind,
        "signed": signed,
        "grouped": grouped,
        "answer": lambda value: {"True": "yes", "False": "no"}.get(value, value),
        "signed_bytes": lambda value: ("+" if value > 0 else "") + show_bytes(value),
        "rung_cells": rung_cells,
        "attempt": attempt_cells,
        "answers_lines": answers_lines, "calibration": calibration_of,
        "certain_table": lambda made: (CERTAIN_HEAD, certain_rows(made)),
        "bin_table": lambda made: (BIN_HEAD, bin_rows(made)),
        "difference": difference_text,
        "score_head": score_head, "score_cells": score_cells, "pair_head": pair_head, "pair_cells": pair_cells,
        "in_a_line": in_a_line,
        "words": lambda value: value.replace("_", " "),
    }  # fmt: skip
    return environment


def _matrix_values(matrix: Matrix) -> dict[str, Any]:
    """What the template shows besides the cells themselves."""
    trainable = [model for model in matrix.models if any(cell.fits for cell in model.training)]
    every = {machine.name: machine for machine in (*matrix.training_machines, *matrix.devices)}
    return {
        "title": "Which models fit which machines",
        "batch": Job.model_fields["batch_size"].default,
        "kinds": KINDS,
        "marks": [
            *((KINDS[grade], SYMBOLS[grade], said) for grade, said in MARKS.items()),
            *(("", mark, BEHIND[mark]) for mark in (ELSEWHERE, DAYS)),
        ],
        "device_marks": [
            *(
                (kind, mark, said)
                for kind, (mark, said) in zip(("runs", "tight", "none"), DEVICE_MARKS.items(), strict=True)
            ),
            ("tight", MAY_EXCEED, BEHIND[MAY_EXCEED]),
        ],
        "bundles": bundles_of(matrix),
        "machines": [largest_trained(matrix, i) for i in range(len(matrix.training_machines))],
        "devices": [largest_run(matrix, i) for i in range(len(matrix.devices))],
        "smallest": [smallest_machine(model) for model in matrix.models],
        "counts": {
            "trainable": len(trainable),
            "shippable": sum(any(cell.fits for cell in model.devices) for model in trainable),
        },
        "shares": [round(100 * share) for share in (*DATASHEET_SHARES, *MEASURED_SHARES)],
        "useful": USEFUL_CONTEXT,
        "fast": FAST,
        "approximate": list(approximate(matrix).items()),
        "every_machine": sorted(every.values(), key=lambda machine: (machine.budget_bytes, machine.name)),
    }


def _largest(models: Iterable[ModelRow]) -> ModelRow | None:
    return max(models, key=lambda model: model.parameters or 0, default=None)


def largest_trained(matrix: Matrix, machine: int) -> dict[str, Any]:
    """The largest model of each grade on one machine, and how many fit."""
    rows = [(model, model.training[machine].grade) for model in matrix.models if model.training]
    grades: tuple[Grade, ...] = ("full", "4-bit", "reduced")
    return {
        "machine": matrix.training_machines[machine],
        "largest": [_largest(model for model, grade in rows if grade == wanted) for wanted in grades],
        "fits": sum(grade != "none" for _, grade in rows),
    }


def largest_run(matrix: Matrix, device: int) -> dict[str, Any]:
    """The largest model that one device runs with a useful context, and the largest at a reader's speed."""
    rows = [(model, model.devices[device]) for model in matrix.models if model.devices]
    able = [(model, cell) for model, cell in rows if cell.fits and (cell.context_tokens or 0) >= USEFUL_CONTEXT]
    return {
        "machine": matrix.devices[device],
        "largest": [
            _largest(model for model, _ in able),
            _largest(model for model, cell in able if (cell.tokens_per_second_bound or 0) >= FAST),
        ],
        "fits": sum(cell.fits for _, cell in rows),
    }


def smallest_machine(model: ModelRow) -> dict[str, Any]:
    """For one model the first machine that trains it, the first that does so in full, the fastest; the first device.

    Machines stand in the order of their memory. `why`: no device runs it, and they all give the same reason.
    """
    able = [cell for cell in model.training if cell.seconds_per_million_tokens]
    reasons = {cell.problem for cell in model.devices if not cell.fits and cell.need_bytes is None}
    return {
        "model": model,
        "first": next((cell for cell in model.training if cell.fits), None),
        "best": next((cell for cell in model.training if cell.grade == "full"), None),
        "fastest": min(able, key=lambda cell: cell.seconds_per_million_tokens or 0, default=None),
        "device": next((cell for cell in model.devices if cell.fits), None),
        "why": reasons.pop() if len(reasons) == 1 else "",
    }
