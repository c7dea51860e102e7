"""How is one way of training run, scored and kept, and what became of those that have run?"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from run import ROOT, Kept, train, verb

from compared.scores import SCORES, Spread, Test, apart, nearest_spread, spread_of
from compared.ways import BEST, CHOSEN_AT, CONTROLLED, FIRST, Case, Setting, split, ways
from edgeft.data.dataset import read_samples
from edgeft.data.samples import Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.errors import EdgeftError
from edgeft.models.checkpoint import load_plain
from edgeft.models.evaluate import evaluate
from edgeft.models.headers import lies_beside
from edgeft.models.intervals import share
from edgeft.models.metrics import Metrics
from edgeft.models.parts import find_parts

FIRST_FACTORS, MOST = (1.0, 3.0), 4  # times the tuner's own default; rates that are tried at most
GENERAL = ROOT / "examples" / "debian-descriptions" / "valid.jsonl"
GENERAL_ROWS, GENERAL_TOKENS = 100, 256
LOADING = threading.Lock()  # transformers changes torch's own functions while it loads
BESIDE_OTHERS = ("seconds", "planned_seconds")  # of rows that an earlier bench kept: measured beside other work


class Scored(NamedTuple):
    """What a checkpoint is scored on."""

    tokenizer: TextTokenizer
    test: list[Sample]
    general: list[Sample]

    @classmethod
    def of(cls, setting: Setting) -> Scored:
        tokenizer = TextTokenizer(setting.base)
        general = read_samples(str(GENERAL), tokenizer, GENERAL_TOKENS, GENERAL_ROWS)
        return cls(tokenizer, read_samples(str(setting.test), tokenizer, None), general)


class Bench:
    """The runs that there are on one model and task, and how another is made."""

    def __init__(self, of: Setting, name: str, factors: Mapping[str, float] | None = None) -> None:
        """`factors`: of learning rates that were chosen elsewhere."""
        of.folder.mkdir(parents=True, exist_ok=True)
        self.of, self.kept, self.writing, self.factors = of, Kept(name), threading.Lock(), factors
        self.scored: Scored | None = None

    def scores(self, folder: Path) -> dict[str, Any]:
        """What a checkpoint makes of the test rows and of general text."""
        with LOADING:
            self.scored = on = self.scored or Scored.of(self.of)
            model = load_plain(folder)
        parts, cpu = find_parts(model), torch.device("cpu")
        test, general = (evaluate(model, parts, rows, on.tokenizer, device=cpu) for rows in (on.test, on.general))
        return {"test": test.model_dump(mode="json"), "general_loss": round(general.loss, 4)}

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        with self.writing:
            self.kept.add(row)
        return row

    def trained(self, case: Case) -> dict[str, Any]:
        """A run with its validation loss; its folder stays, to be scored."""
        return self.kept.rows.get(case.name) or self.add(self.run(case))

    def run(self, case: Case) -> dict[str, Any]:
        shutil.rmtree(case.folder, ignore_errors=True)
        data = self.of.data(case.rows, case.seed)
        result = train(case.folder, case.settings, model=self.of.base, data=data, valid=self.of.valid, rehearsal=False)
        plan = result["plan"]
        device = next(phase for phase in plan["stages"]["phases"] if phase["where"] == "target")
        valid = Metrics.model_validate(result["valid"])
        print(f"{case.name:60} valid loss {valid.loss:.4f}  exact match {100 * (valid.exact_match or 0):.1f}%",
              flush=True)  # fmt: skip
        return {
            "run": case.name, "settings": case.settings, "layers": plan["training"]["trained_layers"],
            "steps": result["steps"], "trained_parameters": result["trained_parameters"],
            "valid": valid.bare.model_dump(mode="json", exclude_defaults=True),
            "train_peak_bytes": result["phase_peak_bytes"]["train"],
            "planned_train_bytes": next(p["expected_bytes"] for p in plan["phases"] if p["name"] == "train"),
            "measured_peak_bytes": result["measured_peak_bytes"], "planned_bytes": result["predicted_expected_bytes"],
            "planned_high_bytes": result["predicted_peak_bytes"],
            "target": plan["stages"]["target"]["name"], "planned_device_bytes": device["expected_bytes"],
            "saved_bytes": sum(path.stat().st_size for path in (case.folder / "train").glob("*.safetensors")),
        }  # fmt: skip

    def losses(self, way: str) -> dict[float, float]:
        """Validation loss by the factors of a way's learning rate that were tried, in their order."""
        cases = [self.case(way, CHOSEN_AT, 0, 3.0**n) for n in range(-MOST, MOST)]
        return {
            case.factor: self.kept.rows[case.name]["valid"]["loss"] for case in cases if case.name in self.kept.rows
        }

    def chosen(self, way: str) -> float | None:
        """The factor of a way's learning rate; None where one is still to be tried."""
        if self.factors is not None:
            return self.factors.get(way)
        tried = self.losses(way)
        return min(tried, key=lambda factor: tried[factor]) if tried and next_factor(tried) is None else None

    def choose(self, way: str) -> float:
        """Of a way's learning rates the one with the lowest validation loss."""
        if self.factors is not None:
            return self.factors[way]
        while (factor := next_factor(self.losses(way))) is not None:
            self.trained(self.case(way, CHOSEN_AT, 0, factor))
        losses = self.losses(way)
        best = min(losses, key=lambda factor: losses[factor])
        for factor in losses.keys() - {best}:
            shutil.rmtree(self.case(way, CHOSEN_AT, 0, factor).folder, ignore_errors=True)
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
        row = {"run": name, **self.scores(merged), "beside_bytes": (merged / beside).stat().st_size if beside else 0}
        print(f"{name:60} exact match {100 * row['test']['exact_match']:.1f}%  general {row['general_loss']:.3f}",
              flush=True)  # fmt: skip
        shutil.rmtree(case.folder)
        return self.add(row)

    def base(self) -> dict[str, Any]:
        return self.kept.rows.get("base") or self.add({"run": "base", **self.scores(self.of.base)})

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
            for seed in self.of.seeds(way, rows):
                self.tested(self.case(way, rows, seed, factor))

    def case(self, way: str, rows: int, seed: int, factor: float) -> Case:
        return Case(way, rows, seed, factor, self.of)

    def tests(self, way: str, rows: int) -> dict[int, Test]:
        """A way's scores on the test rows, by the seeds that there are."""
        factor = self.chosen(way)
        names = {} if factor is None else {
            seed: f"test of {self.case(way, rows, seed, factor).name}" for seed in self.of.seeds(way, rows)
        }  # fmt: skip
        return {seed: self.kept.rows[name]["test"] for seed, name in names.items() if name in self.kept.rows}

    def best_ways(self) -> list[str]:
        """The ways that run with most rows, by their validation loss: of those that have their learning rate."""
        known = [way for way in ways() if split(way)[1] != "random" and self.chosen(way) is not None]
        best = sorted(known, key=lambda way: min(self.losses(way).values()))[:BEST]
        return [*FIRST, *(way for way in best if way not in FIRST)] if known else []


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


def rows_of(bench: Bench) -> list[dict[str, Any]]:
    """A row for each run that was scored on test rows: what it took and reached."""
    return [
        row_of(bench, way, rows, seed) for way in ways() for rows in bench.of.epochs for seed in bench.tests(way, rows)
    ]


def row_of(bench: Bench, way: str, rows: int, seed: int) -> dict[str, Any]:
    case = bench.case(way, rows, seed, bench.chosen(way) or 1.0)
    run = {name: value for name, value in bench.kept.rows[case.name].items() if name not in BESIDE_OTHERS}
    test = bench.kept.rows[f"test of {case.name}"]
    metrics = Metrics.model_validate(test["test"])
    interval = share(metrics.row_exact.count("1"), metrics.rows)
    return {
        "way": way, "rows": rows, "seed": seed, "rate_factor": round(case.factor, 3), **run,
        "test": metrics.marked.model_dump(mode="json", exclude_defaults=True),
        "exact_match_interval": [round(interval.low, 4), round(interval.high, 4)],
        "general_loss": test["general_loss"], "beside_bytes": test["beside_bytes"],
    }  # fmt: skip


def spreads_of(bench: Bench) -> dict[str, dict[int, Spread]]:
    """For each score, by the rows that were trained on, how far ways are from seed to seed."""
    tests = {rows: {way: bench.tests(way, rows) for way in ways()} for rows in bench.of.epochs}
    return {
        score: {
            rows: spread_of({way: {seed: test[score] for seed, test in each.items()} for way, each in of_ways.items()})
            for rows, of_ways in tests.items()
        }
        for score in SCORES
    }


def comparisons(bench: Bench, spreads: Mapping[str, Mapping[int, Spread]]) -> list[dict[str, Any]]:
    """Each way beside those that all are compared with, and beside its own tuner in all and in random layers."""
    found = []
    for rows in bench.of.epochs:
        here = {score: nearest_spread(sizes, rows) for score, sizes in spreads.items()}
        for way in ways():
            for other in compared_with(way):
                deviations = {score: (spread.of(way), spread.of(other)) for score, spread in here.items()}
                difference = apart(bench.tests(way, rows), bench.tests(other, rows), deviations)
                if difference is not None:
                    found.append({"way": way, "against": other, "rows": rows, **difference})
    return found


def compared_with(way: str) -> list[str]:
    """The ways that a way is compared with."""
    method, layers = split(way)
    own = [] if layers == "all" else [f"{method}, all"]
    controls = [f"{method}, random"] if layers == "sparse" and method in CONTROLLED else []
    return [other for other in dict.fromkeys([*FIRST, *own, *controls]) if other != way]


def rates_of(bench: Bench, way: str) -> dict[str, Any]:
    """The learning rates that were tried for a way, the validation loss of each, and whether the best is an end."""
    losses = bench.losses(way)
    rates = {bench.case(way, CHOSEN_AT, 0, factor).settings["learning_rate"]: loss for factor, loss in losses.items()}
    best, factor = min(rates, key=lambda rate: rates[rate]), min(losses, key=lambda factor: losses[factor])
    table = {f"{rate:g}": round(loss, 4) for rate, loss in rates.items()}
    return {"valid_loss": table, "best": best, "factor": factor, "best_is_an_end": best in (min(rates), max(rates))}
