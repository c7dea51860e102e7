"""A sweep measures what merges and exports would be, chooses by its rules, and leaves its curve in merged.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import TUNERS, logits, peft_model
from tiny import ROWS, run
from typer.testing import CliRunner

from edgeft.cli import app
from edgeft.errors import BadInput
from edgeft.merging.merge import merge
from edgeft.merging.result import MergedCheckpoint
from edgeft.merging.sweep import Line, choose, general_samples, golden_section, pareto, sweep
from edgeft.models.checkpoint import load_plain
from edgeft.models.evaluate import evaluate
from edgeft.models.layer_shares import Shares
from edgeft.models.metrics import Metrics, Sweep, SweepPoint
from edgeft.models.parts import find_parts
from edgeft.progress import silent
from edgeft.reporting.sweep_charts import plot_sweep
from edgeft.targets.rounding import round_model
from edgeft.targets.target import load_target
from edgeft.training.job_data import Data

INT4 = load_target("ort-int4")
TEXTS = [{"text": f"lib{i} is a library of the {name}"} for i, name in enumerate(("sea", "land", "air", "sky"))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: Path) -> Path:
    """A trained adapter of the tiny model, its rows beside it."""

    from edgeft.planning.plan import make_plan
    from edgeft.settings.job import make_job

    folder = tmp_path_factory.mktemp("sweep")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    pins: dict[str, Any] = {"epochs": 8.0, "learning_rate": 1e-2, "batch_size": 4, "rank": 4, "eval_rows": 4}
    job = make_job(model=str(checkpoint_folder), data=str(folder / "rows.jsonl"), profile="cpu-8gb", **pins)
    make_plan(job).write(folder / "plan.json")
    run(folder / "plan.json", folder / "train")
    return folder / "train"


def test_a_point_is_the_merge_and_the_export_at_that_share(trained: Path, tmp_path: Path) -> None:
    texts = str(trained.parent / "texts.jsonl")
    found = sweep(trained, INT4, select="fixed", wise_alpha=0.35, general=texts)
    assert [point.wise_alpha for point in found.points] == sorted({*[round(i / 10, 1) for i in range(11)], 0.35})
    assert (found.wise_alpha, found.why) == (0.35, "as given")
    assert found.task_rows == "2 validation rows" and found.general_rows == f"4 rows of {texts}"
    merged = merge(trained, tmp_path / "merged", wise_alpha=0.35, progress=silent, sweep=found)
    assert isinstance(merged, MergedCheckpoint)
    assert MergedCheckpoint.read(tmp_path / "merged" / "merged.json").sweep == found
    data = Data.read(merged.train.plan)
    general = general_samples(texts, data.tokenizer, 4)
    point = next(point for point in found.points if point.wise_alpha == 0.35)
    model = load_plain(tmp_path / "merged")

    def same(metrics: Metrics | None, samples: Sequence[Any]) -> bool:
        found = evaluate(model, find_parts(model), samples, data.tokenizer, device=torch.device("cpu"))
        assert metrics is not None and metrics == metrics.bare  # no rows in merged.json
        return metrics.loss == pytest.approx(found.loss, rel=1e-6) and metrics.exact_match == found.exact_match

    assert same(point.task, data.valid[:4]) and same(point.general, general)
    assert round_model(model, INT4) > 0
    assert same(point.rounded_task, data.valid[:4]) and same(point.rounded_general, general)
    assert found.points[0].task.loss == pytest.approx(merged.train.base_valid.loss, rel=1e-5)
    assert found.points[-1].task.loss == pytest.approx(merged.train.valid.loss, rel=1e-5)
    exact = sweep(trained, load_target("ort-fp32"), select="best", golden=True)
    assert all(point.rounded_task is None and point.general is None for point in exact.points)
    assert {0.0, 0.382, 0.618, 1.0} <= {point.wise_alpha for point in exact.points}


@pytest.mark.parametrize("case", ["tied: lora of head", "tied: embedding saved", "gpt2: dora", "gpt2: lora of head"])
def test_the_line_of_an_untied_or_transposed_model(
    case: str,
    bases: dict[str, Path],
    tmp_path: Path,
) -> None:
    base = bases[TUNERS[case][0]]
    peft_model(case, base).save_pretrained(tmp_path / "adapter")
    line = Line(tmp_path / "adapter", base, tied=True)
    for share in (1.0, 0.4, 0.0):
        merge(tmp_path / "adapter", tmp_path / "out", wise_alpha=share, progress=silent, base=str(base))
        line.move_to(Shares(rest=share))
        assert torch.equal(logits(line.model), logits(load_plain(tmp_path / "out")))


def point(share: float, loss: float, exact: float | None, general: float | None = None, rows: int = 100) -> SweepPoint:
    def metrics(loss: float, exact: float | None) -> Metrics:
        right = round(rows * (exact or 0.0))
        marks = "1" * right + "0" * (rows - right) if exact is not None else ""  # who is right here is right there
        return Metrics(rows=rows, loss=loss, perplexity=math.exp(loss), exact_match=exact, row_exact=marks)

    worse = metrics(loss + 9, 0.0)  # before rounding: must not count
    text = metrics(general, None) if general is not None else None
    return SweepPoint(
        wise_alpha=share, task=worse, general=worse, rounded_task=metrics(loss, exact), rounded_general=text
    )


def test_rules_of_choice() -> None:
    curve = [
        point(0.0, 6.0, 0.0, 3.00), point(0.4, 0.6, 0.70, 3.08), point(0.6, 0.4, 0.79, 3.4),
        point(0.8, 0.3, 0.80, 3.9), point(1.0, 0.5, 0.82, 5.0),
    ]  # fmt: skip
    assert (
        choose(curve, "best", 1.0, 0.1)[0] == 0.6
    )  # three rows fewer than the best show no difference, and general text suffers least
    why = choose(curve, "best", 1.0, 0.1)[1]
    assert why == "lowest general loss of 3 whose rows show no difference in exact match from the best (95% interval)"
    alone = [point(p.wise_alpha, *(p.shipped[0].loss, p.shipped[0].exact_match)) for p in curve]
    assert choose(alone, "best", 1.0, 0.1)[0] == 0.8  # no general text: the lowest loss
    assert choose(curve, "bounded", 1.0, 0.1)[0] == 0.4
    assert choose(curve, "bounded", 1.0, 0.01) == (
        0.0,
        "lowest general loss of 1 whose rows show no difference in exact match from the best (95% interval), general "
        "loss at most 0.01 nats over the base's (1 of 5 shares)",
    )
    assert choose(curve, "fixed", 0.123, 0.1) == (0.123, "as given")
    texts = [point(share, loss, None, 3.0) for share, loss in ((0.0, 3.0), (0.5, 2.0), (1.0, 2.1))]
    assert choose(texts, "best", 1.0, 0.1) == (0.5, "lowest loss")
    assert pareto(curve) == (0.0, 0.4, 0.6, 0.8)
    assert pareto(alone) == (0.8,)


def test_rows_too_few_to_show_anything_choose_no_other_than_the_best() -> None:
    few = [point(0.0, 6.0, 0.25, 3.0, rows=4), point(0.5, 0.6, 0.5, 3.1, rows=4), point(1.0, 0.5, 0.75, 5.0, rows=4)]
    assert choose(few, "best", 1.0, 0.1)[0] == 1.0
    many = [point(p.wise_alpha, p.shipped[0].loss, p.shipped[0].exact_match, 3 + p.wise_alpha, rows=400) for p in few]
    assert choose(many, "best", 1.0, 0.1)[0] == 1.0  # a difference is shown: general text has no say


def test_golden_section_finds_a_valley_in_few_steps() -> None:
    for low in (0.0, 0.2, 0.55, 0.9, 1.0):
        asked: list[float] = []

        def loss(share: float, low: float = low, asked: list[float] = asked) -> float:
            asked.append(share)
            return (share - low) ** 2

        assert golden_section(loss, 10) == pytest.approx(low, abs=0.618**10 + 0.003)
        assert len(asked) == 11 and len(set(asked)) >= 10
    # a bound that large shares break: the best allowed share lies at its edge
    assert golden_section(lambda share: -share if share <= 0.3 else math.inf, 12) == pytest.approx(0.3, abs=0.02)


def test_verb_skips_what_is_measured_and_measures_what_is_asked(trained: Path, tmp_path: Path) -> None:
    texts, out = trained.parent / "texts.jsonl", tmp_path / "merged"

    def edgeft(*arguments: object, code: int = 0) -> Any:
        done = CliRunner().invoke(app, ["merge", str(trained), "--out", str(out), *map(str, arguments)])
        assert done.exit_code == code, (done.output, done.exception)
        return done

    done = edgeft("--sweep", "--golden", "--general", texts, "--plot", tmp_path / "a.svg", "--json")
    made = json.loads(done.stdout)
    assert made["sweep"]["select"] == "best" and made["wise_alpha"] == made["sweep"]["wise_alpha"]
    found = Sweep.model_validate(made["sweep"])
    plot_sweep(found, tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes() and b"loss on general text, nats per token" in drawn
    assert "is up to date" in edgeft("--sweep", "--golden", "--general", texts).stderr
    texts.write_text(texts.read_text() + json.dumps({"text": "one more"}) + "\n")
    assert "up to date" not in edgeft("--sweep", "--golden", "--general", texts).stderr
    edgeft("--wise-alpha", 0.25)
    assert MergedCheckpoint.read(out / "merged.json").sweep is None
    for arguments, message in (
        (("--sweep", "--select", "bounded"), "needs general text to bound the loss on\n\nhint: name text"),
        (("--sweep", "--select", "most"), "--select: must be best, bounded or fixed, got 'most'"),
        (("--select", "best"), "belong to a sweep\n\nhint: add --sweep"),
        (("--sweep", "--base", "x"), "--sweep: needs the validation rows of `edgeft train`"),
    ):
        done = CliRunner().invoke(app, ["merge", str(trained), "--out", str(out), *arguments])
        assert isinstance(done.exception, BadInput) and message in str(done.exception)
    assert MergedCheckpoint.read(out / "merged.json").wise_alpha == 0.25
