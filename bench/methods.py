"""Which tuner, in which layers, for how many rows? Every one on the example task, each at a learning rate of its own.

    make bench-methods [only='lora,prefix:all'] [sizes='100,1000']
    make bench-methods-time
    make bench-methods-smollm2

Every tuner in all layers, in the two layers that gradients choose (sparse) and in two at a time (lisa); LoRA, DoRA and
adapters in two random layers beside. A learning rate is the one with the lowest loss on the 500 validation rows after
training on 1,000 rows, and serves the other sizes: the tuner's default and three times it are tried, then a third or
three times the best while that is the first or last. What was chosen so is scored once on the 1,000 test rows: exact
match, and general loss, of package descriptions, which no task is about. Ways are compared with LoRA and full
fine-tuning in all layers of the same size, and with their own tuner in all and in random layers: paired over the test
rows, the intervals widened by what seeds change (`compared/scores.py`). At 6,000 rows those five ways run whose
validation loss at 1,000 is lowest, and both that all are compared with; the same with 300 rows on SmolLM2-135M-Instruct
(`--model smollm2`, `compared/real.py`). Seconds are measured apart, on a quiet machine (`--time`, `compared/time.py`).

Each run is kept as soon as it ends: an interrupted bench goes on. Parts that have not run are named in the result. Once
all have, what the planner goes by is written from it (edgeft/planning/evidence.json), and what docs/methods.md says.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from compared.evidence import write_evidence
from compared.page import write_page
from compared.plot import plot
from compared.real import smollm2
from compared.runs import Bench, comparisons, rates_of, rows_of, spreads_of
from compared.scores import Spread
from compared.time import time_ways
from compared.ways import CHOSEN_AT, EXAMPLE, FIRST, LARGE, RANK, named, ways
from run import AT_START, ROOT, SECTIONS, record  # after the line above: torch reads it at import

from edgeft.errors import EdgeftError
from edgeft.models.metrics import Metrics
from edgeft.models.spec import read_model_spec

RESULTS = ROOT / "bench" / "results"
Spreads = dict[str, dict[int, Spread]]


def part_of(bench: Bench, way: str, rows: int) -> str:
    """Whether a way has run at a size."""
    if rows == LARGE and way not in bench.best_ways() and not bench.tests(way, rows):
        return "left out: not one of the best at fewer rows"
    return said(len(bench.tests(way, rows)), len(bench.of.seeds(way, rows)))


def said(done: int, wanted: int) -> str:
    return "has run" if done == wanted else f"has not run: {done} of {wanted} seeds have"


def measured_on(bench: Bench, model: str, task: str) -> dict[str, Any]:
    """What a bench's scores say something of."""
    spec = read_model_spec(str(bench.of.base))
    count = spec.num_hidden_layers
    return {
        "model": model, "parameters": spec.total_parameters, "layers": count, "task": task, "rank": RANK,
        "test_rows": bench.base()["test"]["rows"],
        "shares": {kind: round(active / count, 4) for kind, active in bench.of.active.items() if kind != "random"},
    }  # fmt: skip


def scores(bench: Bench, spreads: Spreads) -> dict[str, Any]:
    """The runs of one model, and how far they are apart."""
    base = bench.base()
    return {
        "epochs": bench.of.epochs,
        "base": {"test": Metrics.model_validate(base["test"]).marked.model_dump(mode="json", exclude_defaults=True),
                 "general_loss": base["general_loss"]},
        "seeds": {score: {rows: spread._asdict() for rows, spread in sizes.items() if spread.own}
                  for score, sizes in spreads.items()},
        "rows": rows_of(bench), "comparisons": comparisons(bench, spreads),
    }  # fmt: skip


def of_example(bench: Bench) -> dict[str, Any]:
    """The result of the runs on the example that there are."""
    parts = {f"{way}, {size} rows": part_of(bench, way, size) for way in ways() for size in bench.of.epochs}
    return {
        "environment": AT_START, "parts": parts, "measured_on": measured_on(bench, "debian-tiny", SECTIONS.name),
        "best": bench.best_ways(),
        "rates": {way: rates_of(bench, way) for way in ways() if bench.chosen(way) is not None},
        **scores(bench, spreads_of(bench)),
    }  # fmt: skip


def of_smollm2(result: dict[str, Any], jobs: int) -> dict[str, Any]:
    """The best ways of a result on the real model: what is left of its runs, and their scores."""
    factors = {way: rates["factor"] for way, rates in result["rates"].items()}
    bench = Bench(smollm2(), "methods-smollm2", factors)
    (rows,) = bench.of.epochs
    bench.base()
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda way: bench.go_on(way, [rows]), result["best"]))
    parts = {f"{way}, {rows} rows": said(len(bench.tests(way, rows)), len(bench.of.seeds(way, rows)))
             for way in result["best"]}  # fmt: skip
    on = measured_on(bench, "SmolLM2-135M-Instruct", f"{SECTIONS.name} as chats")
    return {"environment": AT_START, "parts": parts, "measured_on": on, **scores(bench, recorded_spreads(result))}


def recorded_spreads(result: dict[str, Any]) -> Spreads:
    """What seeds move on the example: one run a way says nothing of it."""
    return {
        score: {int(rows): Spread(**spread) for rows, spread in sizes.items()}
        for score, sizes in result["seeds"].items()
    }


class Parts:
    """What runs of their own make: each in a file in build/, so that the runs on the example can be recorded later."""

    names = ("time", "smollm2")

    def file(self, name: str) -> Path:
        return ROOT / "build" / f"bench-methods-{name}.json"

    def keep(self, name: str, part: dict[str, Any]) -> None:
        self.file(name).write_text(json.dumps(part), encoding="utf-8")

    def found(self, recorded: dict[str, Any]) -> dict[str, Any]:
        """Each part as it was made here last, or as it is recorded."""
        made = {name: json.loads(self.file(name).read_text()) for name in self.names if self.file(name).is_file()}
        return {name: recorded[name] for name in self.names if name in recorded} | made


def recorded() -> dict[str, Any]:
    """The result that is recorded; an older kind of it is none."""
    path = RESULTS / "methods.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found if "comparisons" in found else {}


def write(result: dict[str, Any], partial: bool) -> bool:
    """Record a result with the parts that there are, and what is made of it; whether all of it has run."""
    whole = result | Parts().found(recorded())
    record("methods", whole)
    plot(whole, RESULTS / "methods.svg")
    for part, said in result["parts"].items():
        print(f"{part:36} {said}")
    left = sum(said.startswith("has not") for said in result["parts"].values())
    if left and not partial:
        print(f"parts that have not run: {left}. What the planner goes by, and docs/methods.md, stay as they are")
        return False
    write_evidence(whole)
    write_page(whole)
    return not left


def run_example(bench: Bench, only: str, sizes: Sequence[int], jobs: int) -> None:
    """What is left to be run of the ways that `only` names."""
    bench.base()
    wanted, fewer = [way for way in ways() if named(way, only)], [size for size in sizes if size != LARGE]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda way: bench.go_on(way, fewer), wanted if fewer else ()))
        large = [way for way in bench.best_ways() if named(way, only)] if LARGE in sizes else []
        list(pool.map(lambda way: bench.go_on(way, [LARGE]), large))


def layers_of(result: dict[str, Any]) -> dict[str, list[int]]:
    """Which layers each way's run chose at the size that learning rates are chosen at."""
    return {row["way"]: row["layers"] for row in result["rows"] if (row["rows"], row["seed"]) == (CHOSEN_AT, 0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="methods, as in lora,prefix:all; every one when left out")
    parser.add_argument("--rows", default="100,1000,6000", help="sizes of the training data")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--record", action="store_true", help="run nothing: write the runs and parts that there are")
    parser.add_argument(
        "--partial", action="store_true", help="let the planner and docs go by a bench that has not ended"
    )
    parser.add_argument("--time", action="store_true", help="measure seconds of a step alone, beside no other work")
    parser.add_argument("--model", choices=[EXAMPLE.name, "smollm2"], default=EXAMPLE.name, help="whose runs")
    options = parser.parse_args()
    bench, parts = Bench(EXAMPLE, "methods"), Parts()
    apart = options.time or options.model != EXAMPLE.name
    if not options.record and not apart:
        run_example(bench, options.only, sorted(int(size) for size in options.rows.split(",")), options.jobs)
    result = of_example(bench) if bench.losses(FIRST[0]) else recorded()
    if not result:
        raise SystemExit("there are no runs on the example yet: make bench-methods")
    if options.time:
        parts.keep("time", {"environment": AT_START, **time_ways(layers_of(result))})
    if options.model != EXAMPLE.name:
        try:
            parts.keep("smollm2", of_smollm2(result, options.jobs))
        except EdgeftError as problem:
            raise SystemExit(str(problem)) from None
    if write(result, options.partial) and not options.record and not apart:
        bench.kept.path.unlink()


if __name__ == "__main__":
    main()
