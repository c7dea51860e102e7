"""What does docs/methods.md say of bench/results/methods.json? Tables and sentences, all of them from the record.

What the planner recommends is what it says itself, by the evidence that was written from the same record.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from run import ROOT

from compared.evidence import grouped, in_points
from compared.ways import CHOSEN_AT, CONTROLLED, EPOCHS, EXAMPLE, REFERENCE, split, ways
from edgeft.planning.evidence import Comparison
from edgeft.planning.plan import Plan, make_plan
from edgeft.reporting.words import method_text
from edgeft.settings.job import make_job

PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- from bench/results/methods.json, by bench/methods.py --record -->", "<!-- to here -->"
PLANNED_FOR, MACHINE = (300, 1000, 6000), "cpu-8gb"
MIB = 2**20
Result = Mapping[str, Any]


def write_page(result: Result, page: Path = PAGE) -> None:
    """Put what the record says between the page's two marks."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has lost the marks that what is recorded stands between: {BEGIN} and {END}")
    page.write_text(before + BEGIN + "\n\n" + said(result) + "\n\n" + END + after, encoding="utf-8")


def said(result: Result) -> str:
    """All that stands between the marks."""
    parts = [table(result), *sentences(result)]
    if "smollm2" in result:
        parts += [of_real_model(result["smollm2"])]
    return "\n\n".join([*parts, recommended()])


def wrapped(text: str, width: int = 120) -> str:
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


def table(result: Result) -> str:
    """A row a way: exact match at each size, what it is to LoRA in all layers, memory, time, what the device holds."""
    runs, seconds = grouped(result["rows"]), times(result)
    head = ["way", *(f"{size:,} rows" for size in EPOCHS), f"to `{REFERENCE}`", "training peak", "step", "device"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for way in ways():
        if not any((way, size) in runs for size in EPOCHS):
            continue
        size = CHOSEN_AT if (way, CHOSEN_AT) in runs else min(size for size in EPOCHS if (way, size) in runs)
        row = runs[way, size][0]
        cells = [f"`{way}`", *(percent(runs.get((way, each), ())) for each in EPOCHS)]
        cells += [difference(result, way, REFERENCE, CHOSEN_AT) or "", f"{row['train_peak_bytes'] / MIB:.0f} MiB"]
        cells += [seconds.get(way, ""), f"{row['planned_device_bytes'] / MIB:.0f} MiB"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def times(result: Result) -> dict[str, str]:
    """Seconds of a step as times LoRA's, where they were measured."""
    rows = result.get("time", {}).get("rows", ())
    return {row["way"]: f"{row['of_lora_in_all_layers']['median']:.2f}" for row in rows}


def percent(own: Sequence[Result]) -> str:
    return f"{statistics.fmean(100 * run['test']['exact_match'] for run in own):.1f}" if own else ""


def compared(result: Result, way: str, other: str, rows: int) -> Result | None:
    asked = (way, other, rows)
    return next((c for c in result["comparisons"] if (c["way"], c["against"], c["rows"]) == asked), None)


def difference(result: Result, way: str, other: str, rows: int) -> str:
    """Points of exact match between two ways; empty where they were not compared."""
    found = compared(result, way, other, rows)
    if found is None:
        return ""
    points = {name: 100 * value for name, value in found["exact_match"].items()}
    return f"{points['difference']:+.1f} [{points['low']:+.1f}, {points['high']:+.1f}]"


def shown(found: Result) -> int:
    """1: better, -1: worse, 0: no difference is shown, as the planner has it."""
    lost = Comparison.model_validate(in_points(found)).lost
    return (lost < 0) - (lost > 0)


def sentences(result: Result) -> Iterator[str]:
    """What follows from the table."""
    runs = grouped(result["rows"])
    for size in EPOCHS:
        if (REFERENCE, size) in runs:
            yield wrapped(when(result, runs, size))
    yield wrapped(few_layers(result))
    yield wrapped(chosen_layers(result))
    yield wrapped(rates(result))


def when(result: Result, runs: Mapping[tuple[str, int], Any], size: int) -> str:
    """Of the ways that are not shown to be worse than LoRA in all layers the one with least memory, and the fastest."""
    verdicts = {way: shown(found) for way, rows in runs if rows == size and way != REFERENCE
                if (found := compared(result, way, REFERENCE, size)) is not None}  # fmt: skip
    good = [REFERENCE, *(way for way, verdict in verdicts.items() if verdict >= 0 and split(way)[1] != "random")]
    peak = min(good, key=lambda way: max(run["train_peak_bytes"] for run in runs[way, size]))
    small = min(good, key=lambda way: runs[way, size][0]["saved_bytes"])
    better, same = ([f"`{way}`" for way in good[1:] if verdicts[way] == verdict] for verdict in (1, 0))
    text = f"**{size:,} rows.** Better than `{REFERENCE}`: {', '.join(better) or 'nothing'}. No difference is shown: "
    text += f"{', '.join(same) or 'nowhere'}. The rest is worse. So take `{peak}` where memory is short"
    if seconds := {way: float(value) for way, value in times(result).items() if way in good}:
        text += f", `{min(seconds, key=lambda way: seconds[way])}` where time is"
    saved = runs[small, size][0]["saved_bytes"] / 1024
    return text + f", `{small}` where many fine-tunes are kept ({saved:,.0f} KiB each)."


def few_layers(result: Result) -> str:
    """What a tuner gives up in few layers, at the size that all ran at."""
    found = []
    for way in ways():
        method, layers = split(way)
        own = compared(result, way, f"{method}, all", CHOSEN_AT) if layers in ("sparse", "lisa") else None
        if own is not None:
            found.append(f"`{way}` {difference(result, way, f'{method}, all', CHOSEN_AT)}"
                         + (", worse" if shown(own) < 0 else ", better" if shown(own) > 0 else ""))  # fmt: skip
    on, active = result["measured_on"], EXAMPLE.active["sparse"]
    text = (
        f"{active} of {on['layers']} layers instead of all, {CHOSEN_AT:,} rows (worse or better where exact match or "
    )
    return text + f"loss shows it beyond test rows and seeds): {'; '.join(found) or 'not run yet'}."


def chosen_layers(result: Result) -> str:
    """Whether the layers that gradients choose beat random ones."""
    found = []
    for method in CONTROLLED:
        own = compared(result, f"{method}, sparse", f"{method}, random", CHOSEN_AT)
        if own is not None:
            verdict = {1: "better", 0: "not worse: no difference is shown", -1: "worse"}[shown(own)]
            points = difference(result, f"{method}, sparse", f"{method}, random", CHOSEN_AT)
            found.append(f"`{method}` {points}, {verdict} ({own['seeds']} seeds)")
    return f"Layers chosen by gradients against random ones, {CHOSEN_AT:,} rows: {'; '.join(found) or 'not run yet'}."


def rates(result: Result) -> str:
    """Which learning rate each tuner took in all layers, as times its default."""
    by = {split(way)[0]: each for way, each in result["rates"].items() if split(way)[1] == "all"}
    own = [f"{method} {each['factor']:.2g}" + (" (an end of what was tried)" if each["best_is_an_end"] else "")
           for method, each in by.items()]  # fmt: skip
    return f"Learning rates with the lowest validation loss, as times each tuner's default: {', '.join(own)}."


def of_real_model(part: Result) -> str:
    """The real model's table."""
    runs, (size,) = grouped(part["rows"]), map(int, part["epochs"])
    on = part["measured_on"]
    head = [f"{on['model']}, {size} rows, {on['test_rows']} test rows", "exact match", f"to `{REFERENCE}`", "peak"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (way, _), own in runs.items():
        peak = max(run["train_peak_bytes"] for run in own) / MIB
        points = difference(part, way, REFERENCE, size)
        lines.append(f"| `{way}` | {percent(own)} | {points} | {peak:,.0f} MiB |")
    return "\n".join(lines)


def recommended() -> str:
    """What the planner takes for so many rows of the example, and why, in its own words."""
    lines = [f"| rows | `edgeft plan examples/debian-tiny --on {MACHINE}` trains | why |", "|---|---|---|"]
    for rows in PLANNED_FOR:
        plan = planned(rows)
        why = [note for note in plan.notes if note.startswith("full fine-tuning against LoRA")]
        lines.append(f"| {rows:,} | {method_text(plan)} | {' '.join(why)} |")
    return "\n".join(lines)


def planned(rows: int) -> Plan:
    data = {"data": str(EXAMPLE.data(rows, 0)), "valid": str(EXAMPLE.valid)}
    return make_plan(make_job(model=str(EXAMPLE.base), profile=MACHINE, **data))
