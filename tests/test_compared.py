"""What bench/methods.py makes of its runs: differences, what the planner goes by, what docs/methods.md says, times."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
from tiny import BENCH, ROOT

RECORD: dict[str, Any] = json.loads((BENCH / "results" / "methods.json").read_text(encoding="utf-8"))
PAGE = ROOT / "docs" / "methods.md"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import methods

    return methods


def answers(seed: int, right: float, rows: int = 400) -> dict[str, Any]:
    """Scores of a run whose rows are right by chance, the same rows first."""
    draw, order = random.Random(seed), random.Random(0)
    hard = [order.random() for _ in range(rows)]
    bits = "".join("01"[0.9 * each + 0.1 * draw.random() < right] for each in hard)
    losses = [2.0 - 1.9 * int(bit) + 0.1 * draw.random() for bit in bits]
    return {"row_exact": bits, "row_losses": losses, "row_tokens": [2] * rows, "loss": sum(losses) / rows / 2,
            "exact_match": bits.count("1") / rows}  # fmt: skip


def test_what_seeds_move_is_told_from_what_they_move_all_by_and_from_an_outlier(bench: Any) -> None:
    from compared.scores import UNKNOWN, nearest_spread, spread_of

    def of(table: Any) -> Any:
        return spread_of({f"way {n}": dict(enumerate(row)) for n, row in enumerate(table)})

    table = numpy.random.default_rng(3).normal(size=(301, 3))
    found = of(table)
    assert found.typical == pytest.approx(1.0, abs=0.08)  # what was drawn
    moved = table + numpy.array([0.0, 5.0, -3.0])  # other training rows a seed: no difference between ways
    assert of(moved).own == pytest.approx(found.own)
    wild = numpy.concatenate([table, [[0.0, 300.0, -200.0]]])
    assert of(wild).typical == pytest.approx(found.typical, rel=0.02)
    assert of(wild).of("way 301") > 100 and of(wild).of("way 7") == pytest.approx(found.of("way 7"), rel=0.02)
    assert found.of("one seed alone") == found.typical
    alone = of(table[:1])
    assert alone.own["way 0"] == pytest.approx(statistics.stdev(table[0]) * ((1 + 1 / (8 / 9) ** 3) / 2) ** 0.5)
    assert spread_of({"a": {0: 1.0}, "b": {0: 2.0}}) == spread_of({}) == UNKNOWN
    sizes = {100: found, 1000: UNKNOWN, 6000: alone}
    assert nearest_spread(sizes, 1000) is alone and nearest_spread(sizes, 200) is found


def test_a_difference_knows_its_rows_and_its_seeds(bench: Any) -> None:
    from compared.scores import apart

    none = dict.fromkeys(("exact_match", "loss"), (0.0, 0.0))
    ours, theirs = ({seed: answers(10 * seed + k, right) for seed in range(3)} for k, right in ((1, 0.7), (2, 0.6)))
    found = apart(ours, theirs, none)
    rates = [statistics.fmean(run["exact_match"] for run in side.values()) for side in (ours, theirs)]
    match = found["exact_match"]
    assert found["seeds"] == 3 and match["difference"] == pytest.approx(rates[0] - rates[1], abs=1e-5)
    assert match["low"] > 0 and found["loss"]["high"] < 0
    wide = apart(ours, theirs, {**none, "exact_match": (0.1, 0.2)})["exact_match"]
    assert wide["low"] < 0 < wide["high"] and wide["difference"] == match["difference"]
    (one,) = [apart({0: ours[0]}, {0: theirs[0]}, {**none, "exact_match": (0.1, 0.2)})["exact_match"]]
    assert one["high"] - one["low"] > wide["high"] - wide["low"]  # three seeds say more than one
    assert apart({0: ours[0]}, {1: theirs[1]}, none) is None
    same = apart(ours, ours, none)["exact_match"]
    assert (same["low"], same["difference"], same["high"]) == (0, 0, 0)


def test_rows_that_an_earlier_bench_kept_lose_what_was_timed_beside_other_work(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from compared import runs as methods_runs
    from compared.ways import EXAMPLE, Case

    monkeypatch.setattr("run.ROOT", tmp_path)
    of = EXAMPLE._replace(folder=tmp_path)
    made = methods_runs.Bench(of, "methods", {"full, all": 1.0})
    case = Case("full, all", 1000, 0, 1.0, of)
    made.kept.add({"run": case.name, "layers": [0], "seconds": 9.0, "planned_seconds": 3.0, "train_peak_bytes": 5})
    scores = {"rows": 400, "perplexity": 2.0, **answers(1, 0.5)}
    made.kept.add({"run": f"test of {case.name}", "test": scores, "general_loss": 5.0, "beside_bytes": 0})
    (row,) = methods_runs.rows_of(made)
    assert row["train_peak_bytes"] == 5 and not {"seconds", "planned_seconds"} & row.keys()


def test_no_row_of_the_record_was_timed_beside_other_work() -> None:
    assert RECORD["rows"] and not any({"seconds", "planned_seconds"} & row.keys() for row in RECORD["rows"])


def test_nothing_is_timed_beside_other_work(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from compared import time as methods_time

    monkeypatch.setattr(methods_time, "work_of_others", lambda: 0.4)
    with pytest.raises(SystemExit, match=r"other work takes 0\.40 of a core: wait until it takes less than 0\.1"):
        methods_time.time_ways({})


def test_ways_are_timed_on_the_same_rows_and_on_the_layers_that_they_chose(bench: Any) -> None:
    from compared import time as methods_time
    from compared.ways import Case

    plan = methods_time.plan_of(Case("dora, sparse", 1000), (2, 5))
    assert plan.training.trained_layers == (2, 5) and plan.training.tuner == "dora"
    rows = list(range(1000))
    assert methods_time.batches(plan.training, rows)[1] == rows[16:32]
    own = [methods_time.Timed((2.0, 3.0, 9.0), 0.0), methods_time.Timed((1.0, 1.0, 1.0), 0.0)]
    reference = [methods_time.Timed((1.5, 1.5, 1.5), 0.0), methods_time.Timed((2.0, 2.0, 2.0), 0.0)]
    row = methods_time.row_of("dora, sparse", own, reference)
    assert row["seconds_per_step"] == {"median": 2.0, "lowest": 1.0, "highest": 3.0}
    assert row["of_lora_in_all_layers"] == {"median": 1.25, "lowest": 0.5, "highest": 2.0}


def test_the_planner_goes_by_the_record(bench: Any) -> None:
    from compared.evidence import evidence, lines_of

    from edgeft.planning.evidence import FILE

    assert FILE.read_text(encoding="utf-8") == lines_of(evidence(RECORD)) + "\n"
    other = copy.deepcopy(RECORD)
    own = next(each for each in other["comparisons"] if each["against"] == "lora, all")
    own["exact_match"]["difference"] += 0.01
    assert lines_of(evidence(other)) != lines_of(evidence(RECORD))
    assert json.loads(lines_of(evidence(RECORD))) == json.loads(json.dumps(evidence(RECORD)))


def test_the_page_says_what_the_record_says(bench: Any, tmp_path: Path) -> None:
    from compared import page as methods_page

    text = PAGE.read_text(encoding="utf-8")
    between = text.partition(methods_page.BEGIN)[2].partition(methods_page.END)[0].strip()
    assert between == methods_page.said(RECORD)
    copied = tmp_path / "methods.md"
    copied.write_text(text.replace(between, "nothing"), encoding="utf-8")
    methods_page.write_page(RECORD, copied)
    assert copied.read_text(encoding="utf-8") == text
    copied.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit, match="has lost the marks"):
        methods_page.write_page(RECORD, copied)


def test_another_number_of_the_record_would_be_another_page(bench: Any) -> None:
    from compared import page as methods_page

    for change in (
        lambda record: record["rows"][0]["test"].update(exact_match=0.123),
        lambda record: next(row for row in record["rows"] if row["rows"] == 1000).update(train_peak_bytes=2**40),
        lambda record: next(c for c in record["comparisons"] if c["rows"] == 1000)["exact_match"].update(low=-0.5),
        lambda record: next(iter(record["rates"].values())).update(factor=27.0),
    ):
        other = copy.deepcopy(RECORD)
        change(other)
        parts = [[methods_page.table(each), *methods_page.sentences(each)] for each in (RECORD, other)]
        assert parts[0] != parts[1]


def test_a_bench_that_has_not_ended_leaves_planner_and_page_alone(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("write_evidence", "write_page"):
        monkeypatch.setattr(bench, name, lambda *_: pytest.fail("written"))
    monkeypatch.setattr(bench, "record", lambda *_: None)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "recorded", dict)
    assert bench.write(RECORD | {"parts": {"full, all, 100 rows": "has run", "dora, all, 100 rows": "has not run: 0"}},
                       partial=False) is False  # fmt: skip
    assert "parts that have not run: 1. What the planner goes by, and docs" in capsys.readouterr().out
    assert (tmp_path / "methods.svg").is_file()


def test_the_real_model_is_a_study_of_its_own(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its runs are those of the best ways, at the factors of the learning rates that were chosen on the example."""
    from compared import page as methods_page
    from compared import runs as methods_runs
    from compared.evidence import evidence
    from compared.ways import EXAMPLE

    from edgeft.planning.evidence import Evidence

    ran = []

    def tested(self: Any, case: Any) -> None:
        ran.append((case.way, case.factor, case.settings["batch_size"]))
        seed = len(case.way)
        self.add({"run": case.name, "train_peak_bytes": 2**30})
        scores = {"rows": 400, "perplexity": 2.0, **answers(seed, 0.5 if case.way == "full, all" else 0.8)}
        self.add({"run": f"test of {case.name}", "test": scores, "general_loss": 5.0, "beside_bytes": 0})

    monkeypatch.setattr("run.ROOT", tmp_path)
    of = EXAMPLE._replace(epochs={300: 2}, folder=tmp_path, seeds=lambda way, rows: range(1), more={"batch_size": 8})
    monkeypatch.setattr(bench, "smollm2", lambda: of)
    monkeypatch.setattr(methods_runs.Bench, "tested", tested)
    base = {"test": {"rows": 400, "perplexity": 1.0, **answers(9, 0.0)}, "general_loss": 4.0}
    monkeypatch.setattr(methods_runs.Bench, "base", lambda self: base)
    part = bench.of_smollm2(RECORD, 1)
    assert ran == [(way, RECORD["rates"][way]["factor"], 8) for way in RECORD["best"]]
    assert set(part["parts"].values()) == {"has run"}
    study = Evidence.model_validate(evidence(RECORD | {"smollm2": part})).studies[1]
    assert (study.model, study.test_rows) == ("SmolLM2-135M-Instruct", 400)
    (full,) = [each for each in study.comparisons if each.way == "full, all"]
    assert full.rows == 300 and full.shown and full.lost == -full.points.difference > 20
    table = methods_page.of_real_model(part)
    assert all(f"| `{way}` |" in table for way in RECORD["best"]) and "1,024 MiB" in table


def test_the_planner_of_a_page_has_what_it_goes_by(bench: Any, tmp_path: Path) -> None:
    """Its own files alone, as the browser's Python finds them, plan as they do here."""
    import planner_page

    with zipfile.ZipFile(io.BytesIO(planner_page.planner([]))) as archive:
        archive.extractall(tmp_path)
    code = (
        "import edgeft; from edgeft.planning.plan import make_plan; from edgeft.settings.job import make_job; "
        "job = make_job(model='examples/configs/smollm2-135m', profile='cpu-8gb', max_length=64); "
        "plan = make_plan(job, compare_tuners=True); "
        "print(edgeft.__file__, sum(row.measured is not None for row in plan.tuners))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    file, measured = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path) and int(measured) > 1
