"""Which tuner, in which layers, for how many rows? Every one on the example task, each at a learning rate of its own.

    make bench-methods [only='lora,prefix:all'] [sizes='100,1000']

Every tuner in all layers, in the two layers that gradients choose (sparse) and in two at a time (lisa); LoRA, DoRA and
adapters in two random layers beside. A learning rate is the one with the lowest loss on the 500 validation rows after
training on 1,000 rows, and serves the other sizes: the tuner's default and three times it are tried, then a third or
three times the best while that is the first or last. What was chosen so is scored once on the 1,000 test rows: exact
match, paired with full fine-tuning and with LoRA in all layers of the same size, and general loss, of package
descriptions, which no task is about. At 6,000 rows those five ways run whose validation loss at 1,000 is lowest, and
both that are compared with.

Each run is kept as soon as it ends: an interrupted bench goes on. Parts that have not run are named in the result.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import json
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from run import BASE, ROOT, SECTIONS, Kept, record, train, verb  # after the line above: torch reads it at import

from edgeft.data.dataset import read_samples
from edgeft.data.samples import Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.errors import EdgeftError
from edgeft.models.checkpoint import load_plain
from edgeft.models.evaluate import evaluate
from edgeft.models.headers import lies_beside
from edgeft.models.intervals import Interval, paired_losses, paired_rates, share
from edgeft.models.metrics import Metrics
from edgeft.models.parts import find_parts
from edgeft.reporting.sweep_charts import figure
from edgeft.settings.tuners import TUNERS

FOLDER = ROOT / "build" / "methods"
RANKED: dict[str, Any] = {"rank": 16}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"tuner": "full"},
    "lora": {"tuner": "lora", **RANKED},
    "lora_plus": {"tuner": "lora", "lora_plus": 16, **RANKED},
    "dora": {"tuner": "dora", **RANKED},
    "adalora": {"tuner": "adalora", **RANKED},
    "ia3": {"tuner": "ia3"},
    "h-adapter": {"tuner": "h-adapter"},
    "adapter": {"tuner": "adapter", **RANKED},
    "prefix": {"tuner": "prefix"},
    "prompt": {"tuner": "prompt"},
}
TWO: dict[str, Any] = {"active_layers": 2}
LAYERS: dict[str, dict[str, Any]] = {
    "all": {"layers": "all"},
    "sparse": {"layers": "sparse", "layer_score": "gradient", **TWO},
    "lisa": {"layers": "lisa", **TWO},
    "random": {"layers": "sparse", "layer_score": "random", **TWO},
}
CONTROLLED = ("lora", "dora", "adapter")  # in random layers too, and where layers are few with three seeds
FIRST = ("full, all", "lora, all")  # what the others are compared with
EPOCHS = {100: 10, 1000: 2, 6000: 1}
CHOSEN_AT, LARGE, BEST = 1000, 6000, 5
FIRST_FACTORS, MOST = (1.0, 3.0), 4  # times the tuner's own default; rates that are tried at most
GENERAL_ROWS, GENERAL_TOKENS = 100, 256
LOADING = threading.Lock()  # transformers changes torch's own functions while it loads


class Case(NamedTuple):
    """One run."""

    way: str  # "tuner, layers"
    rows: int
    seed: int = 0
    factor: float = 1.0  # of the learning rate

    @property
    def name(self) -> str:
        return f"{self.way}, {self.rows} rows, seed {self.seed}, rate x {self.factor:.3g}"

    @property
    def folder(self) -> Path:
        return FOLDER / self.name.replace(", ", "-").replace(" ", "_")

    @property
    def settings(self) -> dict[str, Any]:
        tuner, _, layers = self.way.partition(", ")
        row = TUNERS[METHODS[tuner]["tuner"]]
        rate = row.rate(json.loads((BASE / "config.json").read_text())["hidden_size"]) * self.factor
        more = {"learning_rate": float(f"{rate:.3g}"), "seed": self.seed, "epochs": EPOCHS[self.rows]}
        return {
            **METHODS[tuner],
            **LAYERS[layers],
            **more,
            "eval_rows": 500,
            "sample_answers": 0,
            "prefix_cache": "false",
        }


def ways() -> Iterator[str]:
    """Every tuner that there is in the layers that it goes with, those that others are compared with first."""
    for layers in LAYERS:
        for method, settings in METHODS.items():
            there = settings["tuner"] in TUNERS and (layers == "all" or method != "prompt")
            if there and (layers != "random" or method in CONTROLLED):
                yield f"{method}, {layers}"


def seeds(way: str, rows: int) -> range:
    """The seeds that a way runs with: three where a run is short, or where it is compared with random layers."""
    method, _, layers = way.partition(", ")
    controlled = method in CONTROLLED and layers in ("sparse", "random") and rows == CHOSEN_AT
    return range(3 if controlled or (layers == "all" and rows < CHOSEN_AT) else 1)


@functools.cache
def data_of(rows: int, seed: int) -> Path:
    """A file with so many training rows: the first, where a seed's rows are few those behind the last seed's."""
    lines = (SECTIONS / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    first = seed * rows % len(lines)
    out = FOLDER / f"train-{rows}-{first}.jsonl"
    out.write_text("".join(lines[first : first + rows]), encoding="utf-8")
    return out


@functools.cache
def scored_rows() -> tuple[TextTokenizer, list[Sample], list[Sample]]:
    """The tokenizer, the test rows and the general ones."""
    tokenizer = TextTokenizer(BASE)
    general = str(ROOT / "examples" / "debian-descriptions" / "valid.jsonl")
    return (
        tokenizer,
        read_samples(str(SECTIONS / "test.jsonl"), tokenizer, None),
        read_samples(general, tokenizer, GENERAL_TOKENS, GENERAL_ROWS),
    )


def scores(folder: Path) -> dict[str, Any]:
    """What a checkpoint makes of the test rows and of general text."""
    tokenizer, test, general = scored_rows()
    with LOADING:
        model = load_plain(folder)
    parts = find_parts(model)
    found = [evaluate(model, parts, rows, tokenizer, device=torch.device("cpu")) for rows in (test, general)]
    return {"test": found[0].model_dump(mode="json"), "general_loss": round(found[1].loss, 4)}


class Bench:
    """The runs that there are, and how another is made."""

    def __init__(self) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.kept, self.writing = Kept("methods"), threading.Lock()

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        with self.writing:
            self.kept.add(row)
        return row

    def trained(self, case: Case) -> dict[str, Any]:
        """A run with its validation loss; its folder stays, to be scored."""
        return self.kept.rows.get(case.name) or self.add(self.run(case))

    def run(self, case: Case) -> dict[str, Any]:
        shutil.rmtree(case.folder, ignore_errors=True)
        result = train(case.folder, case.settings, data=data_of(case.rows, case.seed), rehearsal=False)
        plan = result["plan"]
        device = next(phase for phase in plan["stages"]["phases"] if phase["where"] == "target")
        valid = Metrics.model_validate(result["valid"])
        print(f"{case.name:60} valid loss {valid.loss:.4f}  exact match {100 * (valid.exact_match or 0):.1f}%  "
              f"{result['seconds']:.0f} s", flush=True)  # fmt: skip
        return {
            "run": case.name, "settings": case.settings, "layers": plan["training"]["trained_layers"],
            "steps": result["steps"], "trained_parameters": result["trained_parameters"],
            "valid": valid.bare.model_dump(mode="json", exclude_defaults=True),
            "seconds": result["seconds"], "planned_seconds": plan["seconds"] + plan["scoring_seconds"],
            "train_peak_bytes": result["phase_peak_bytes"]["train"],
            "planned_train_bytes": next(p["expected_bytes"] for p in plan["phases"] if p["name"] == "train"),
            "measured_peak_bytes": result["measured_peak_bytes"], "planned_bytes": result["predicted_expected_bytes"],
            "planned_high_bytes": result["predicted_peak_bytes"],
            "target": plan["stages"]["target"]["name"], "planned_device_bytes": device["expected_bytes"],
            "saved_bytes": sum(path.stat().st_size for path in (case.folder / "train").glob("*.safetensors")),
        }  # fmt: skip

    def losses(self, way: str) -> dict[float, float]:
        """Validation loss by the factors of a way's learning rate that were tried, in their order."""
        cases = [Case(way, CHOSEN_AT, 0, 3.0**n) for n in range(-MOST, MOST)]
        return {
            case.factor: self.kept.rows[case.name]["valid"]["loss"] for case in cases if case.name in self.kept.rows
        }

    def chosen(self, way: str) -> float | None:
        """The factor of a way's learning rate; None where one is still to be tried."""
        tried = self.losses(way)
        return min(tried, key=lambda factor: tried[factor]) if tried and next_factor(tried) is None else None

    def choose(self, way: str) -> float:
        """Of a way's learning rates the one with the lowest validation loss."""
        while (factor := next_factor(self.losses(way))) is not None:
            self.trained(Case(way, CHOSEN_AT, 0, factor))
        losses = self.losses(way)
        best = min(losses, key=lambda factor: losses[factor])
        for factor in losses.keys() - {best}:
            shutil.rmtree(Case(way, CHOSEN_AT, 0, factor).folder, ignore_errors=True)
        return best

    def tested(self, case: Case) -> dict[str, Any]:
        """The scores of a run on the test rows, which only what was chosen is asked for."""
        name = f"test of {case.name}"
        if name in self.kept.rows:
            return self.kept.rows[name]
        self.trained(case)
        if not (case.folder / "train" / "train.json").is_file():  # left out by a bench that was interrupted
            self.run(case)
        merged = case.folder / "merged"
        verb("merge", str(case.folder / "train"), "--out", str(merged))
        beside = lies_beside(merged)
        row = {"run": name, **scores(merged), "beside_bytes": (merged / beside).stat().st_size if beside else 0}
        print(f"{name:60} exact match {100 * row['test']['exact_match']:.1f}%  general {row['general_loss']:.3f}",
              flush=True)  # fmt: skip
        shutil.rmtree(case.folder)
        return self.add(row)

    def base(self) -> dict[str, Any]:
        return self.kept.rows.get("base") or self.add({"run": "base", **scores(BASE)})

    def go_on(self, way: str, sizes: Sequence[int]) -> None:
        """`chain`; a run that fails ends its way alone, which the result then says has not run."""
        try:
            self.chain(way, sizes)
        except (subprocess.CalledProcessError, EdgeftError) as problem:
            print(f"{way}: {problem}", file=sys.stderr, flush=True)

    def chain(self, way: str, sizes: Sequence[int]) -> None:
        """A way's learning rate, and its runs of these sizes."""
        factor = self.choose(way)
        for rows in sizes:
            for seed in seeds(way, rows):
                self.tested(Case(way, rows, seed, factor))

    def test_of(self, way: str, rows: int, seed: int) -> dict[str, Any] | None:
        """A way's scores on the test rows, where there are any."""
        factor = self.chosen(way)
        return None if factor is None else self.kept.rows.get(f"test of {Case(way, rows, seed, factor).name}")

    def best_ways(self) -> list[str]:
        """The ways that run with most rows, by their validation loss; none before each has its learning rate."""
        free = [way for way in ways() if not way.endswith("random")]
        if None in map(self.chosen, free):
            return []
        best = sorted(free, key=lambda way: min(self.losses(way).values()))[:BEST]
        return [*FIRST, *(way for way in best if way not in FIRST)]


def next_factor(losses: Mapping[float, float]) -> float | None:
    """The factor to be tried next: the default, three times it, then one beyond the best while that is an end.

    None: no more.
    """
    for factor in FIRST_FACTORS:
        if factor not in losses:
            return factor
    best = min(losses, key=lambda factor: losses[factor])
    beyond = {min(losses): best / 3, max(losses): best * 3}
    return beyond.get(best) if len(losses) < MOST else None


def compared(test: dict[str, Any], reference: dict[str, Any] | None) -> dict[str, Any] | None:
    """A run's test scores less another's of the same rows: exact match and loss, paired, with 95% intervals."""
    if reference is None:
        return None
    bits = [[bit == "1" for bit in each["row_exact"]] for each in (reference, test)]
    losses = paired_losses(reference["row_losses"], test["row_losses"], test["row_tokens"])
    return {"exact_match": shown(paired_rates(*bits)), "loss": shown(losses)}


def shown(interval: Interval) -> dict[str, float]:
    return {name: round(value, 5) for name, value in interval._asdict().items()}


def rows_of(bench: Bench) -> list[dict[str, Any]]:
    """A row for each run that was scored on test rows, with what it is compared with."""
    cases = [(way, rows, seed) for way in ways() for rows in EPOCHS for seed in seeds(way, rows)]
    return [row_of(bench, *case, test) for case in cases if (test := bench.test_of(*case))]


def row_of(bench: Bench, way: str, rows: int, seed: int, test: dict[str, Any]) -> dict[str, Any]:
    """What a run took and reached."""
    factor = bench.chosen(way) or 1.0
    others = {one: bench.test_of(one, rows, seed) for one in FIRST if one != way}
    metrics = Metrics.model_validate(test["test"])
    interval = share(metrics.row_exact.count("1"), metrics.rows)
    return {
        "way": way, "rows": rows, "seed": seed, "rate_factor": round(factor, 3),
        **bench.kept.rows[Case(way, rows, seed, factor).name],
        "test": metrics.marked.model_dump(mode="json", exclude_defaults=True),
        "exact_match_interval": [round(interval.low, 4), round(interval.high, 4)],
        "general_loss": test["general_loss"], "beside_bytes": test["beside_bytes"],
        **{f"less {one}": compared(test["test"], other and other["test"]) for one, other in others.items()},
    }  # fmt: skip


def rates_of(bench: Bench, way: str) -> dict[str, Any]:
    """The learning rates that were tried for a way, the validation loss of each, and whether the best is an end."""
    losses = bench.losses(way)
    rates = {Case(way, CHOSEN_AT, 0, factor).settings["learning_rate"]: loss for factor, loss in losses.items()}
    best = min(rates, key=lambda rate: rates[rate])
    table = {f"{rate:g}": round(loss, 4) for rate, loss in rates.items()}
    return {"valid_loss": table, "best": best, "best_is_an_end": best in (min(rates), max(rates))}


def part_of(bench: Bench, way: str, rows: int) -> str:
    """Whether a way has run at a size."""
    best = bench.best_ways()
    if rows == LARGE and not best:
        return "has not run: the best at fewer rows are not known yet"
    if rows == LARGE and way not in best:
        return "left out: not one of the best at fewer rows"
    done = [bench.test_of(way, rows, seed) is not None for seed in seeds(way, rows)]
    return "has run" if all(done) else f"has not run: {sum(done)} of {len(done)} seeds have"


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Exact match of each way at each size with its interval; and against the memory that training took."""
    names = [way for way in ways() if any(row["way"] == way for row in rows)]
    with figure(out, 10, 1.6 + 0.22 * len(names)) as made:
        left, right = made.subplots(1, 2)
        for nth, size in enumerate(EPOCHS):
            own = [row for row in rows if row["rows"] == size and row["seed"] == 0]
            places = [names.index(row["way"]) + 0.25 * (nth - 1) for row in own]
            match = [100 * row["test"]["exact_match"] for row in own]
            reach = [[abs(100 * row["exact_match_interval"][end] - 100 * row["test"]["exact_match"]) for row in own]
                     for end in (0, 1)]  # fmt: skip
            left.errorbar(match, places, xerr=reach, fmt="o", markersize=3, linewidth=0.8, label=f"{size:,} rows")
        left.set_yticks(range(len(names)), names, fontsize=7)
        left.invert_yaxis()
        left.set_xlabel("exact match on 1,000 test rows, % (95% interval)")
        left.legend(frameon=False, fontsize=7)
        for nth, layers in enumerate(LAYERS):
            own = [r for r in rows if r["way"].endswith(f", {layers}") and r["rows"] == CHOSEN_AT and r["seed"] == 0]
            at = [(row["train_peak_bytes"] / 2**20, 100 * row["test"]["exact_match"]) for row in own]
            right.plot(*zip(*at, strict=True), "osv."[nth], markersize=4, label=layers) if at else None
            for row, place in zip(own, at, strict=True):
                right.annotate(
                    row["way"].partition(",")[0], place, fontsize=6, xytext=(3, 2), textcoords="offset points"
                )
        right.set(xlabel=f"training peak at {CHOSEN_AT:,} rows, MiB", ylabel="exact match, %")
        right.legend(frameon=False, fontsize=7)


def write(bench: Bench) -> bool:
    """Record what there is; whether that is all."""
    rows, base = rows_of(bench), bench.base()
    parts = {f"{way}, {size} rows": part_of(bench, way, size) for way in ways() for size in EPOCHS}
    groups = {way: [row["test"]["exact_match"] for row in rows if (row["way"], row["rows"]) == (way, CHOSEN_AT)]
              for way in ways()}  # fmt: skip
    record("methods", {
        "epochs": EPOCHS, "parts": parts, "rates": {way: rates_of(bench, way) for way in ways() if bench.losses(way)},
        "base": {"test": Metrics.model_validate(base["test"]).marked.model_dump(mode="json", exclude_defaults=True),
                 "general_loss": base["general_loss"]},
        "seeds": {way: {"mean": round(statistics.fmean(own), 4), "deviation": round(statistics.stdev(own), 4)}
                  for way, own in groups.items() if len(own) > 1},
        "rows": rows,
    })  # fmt: skip
    plot(rows, ROOT / "bench" / "results" / "methods.svg")
    for part, said in parts.items():
        print(f"{part:36} {said}")
    return not any(said.startswith("has not") for said in parts.values())


def named(way: str, only: str) -> bool:
    """Whether `--only` names a way: `lora` in any layers, or `lora:sparse`."""
    method, _, layers = way.partition(", ")
    return not only or any(each.strip() in (method, f"{method}:{layers}") for each in only.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="methods, as in lora,prefix:all; every one when left out")
    parser.add_argument("--rows", default="100,1000,6000", help="sizes of the training data")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--record", action="store_true", help="run nothing: write the runs that there are")
    options = parser.parse_args()
    bench, sizes = Bench(), sorted(int(size) for size in options.rows.split(","))
    if not options.record:
        bench.base()
        wanted = [way for way in ways() if named(way, options.only)]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda way: bench.go_on(way, [size for size in sizes if size != LARGE]), wanted))
            large = [way for way in bench.best_ways() if named(way, options.only)] if LARGE in sizes else []
            list(pool.map(lambda way: bench.go_on(way, [LARGE]), large))
    if write(bench):
        bench.kept.path.unlink()


if __name__ == "__main__":
    main()
