"""A bundle's answers beside those of training: the same rows, really decoded, with F1 in its table and report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny import run, write_plan

from edgeft.exporting.bundle import Bundle, Measurement, measurement_of
from edgeft.exporting.export import export
from edgeft.merging.merge import merge
from edgeft.merging.result import MergedCheckpoint
from edgeft.models.token_f1 import token_f1
from edgeft.planning.plan import Plan
from edgeft.progress import silent
from edgeft.reporting.bundle_tables import bundle_text
from edgeft.reporting.markdown import to_markdown
from edgeft.reporting.pages import to_html
from edgeft.reporting.read_run import read_run
from edgeft.reporting.summary import summarise
from edgeft.targets.target import load_target
from edgeft.training.result import TrainResult

ROWS = [{"prompt": f"Package: lib{i}\nSection:", "completion": f" section {i} of lib"} for i in range(40)]


@pytest.fixture(scope="module")
def line(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on free text and its bundle in fp32, which answers as the merged model does."""
    folder = tmp_path_factory.mktemp("free text")
    for name, rows in (("data", ROWS[:32]), ("valid", ROWS[32:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {name: str(folder / f"{name}.jsonl") for name in ("data", "valid")}
    path = write_plan(folder, checkpoint_folder, epochs=6.0, learning_rate=1e-2, eval_rows=8, **files)
    run(path, folder / "train")
    merge(folder / "train", folder / "merged", wise_alpha=1.0, progress=silent)
    export(folder / "merged", load_target("ort-fp32"), folder / "bundle", device=None, progress=silent)
    return folder


def read(line: Path) -> tuple[TrainResult, Bundle, Measurement]:
    here = measurement_of(line / "bundle")
    assert here is not None
    return TrainResult.read(line / "train" / "train.json"), Bundle.read(line / "bundle" / "bundle.json"), here


def test_the_bundle_answers_the_rows_of_training(line: Path) -> None:
    result, bundle, here = read(line)
    assert list(here.answers) == [each.tuned for each in result.samples] and len(here.answers) == 8
    assert bundle.proof is not None
    scores = bundle.proof.scores
    assert list(scores) == ["base", "fine-tuned", "merged", "ort-fp32"]
    each = [token_f1(sample.expected, answer) for sample, answer in zip(result.samples, here.answers, strict=True)]
    assert scores["ort-fp32"].f1 == pytest.approx(sum(each) / 8, abs=1e-4)
    assert here.rows["ort-fp32"].row_f1 == pytest.approx(each, abs=1e-4)
    assert scores["merged"].f1 == scores["ort-fp32"].f1 == result.valid.f1 and scores["base"].f1 is not None
    pairs = {(pair.before, pair.after): pair.f1 for pair in bundle.proof.pairs}
    same, gained = pairs["merged", "ort-fp32"], pairs["base", "ort-fp32"]
    assert same is not None and (same.difference, same.low, same.high) == (0, 0, 0) and not same.shown
    assert gained is not None and gained.difference == pytest.approx(scores["ort-fp32"].f1 - scores["base"].f1)


def test_they_are_in_the_table_and_the_report(line: Path) -> None:
    result, bundle, here = read(line)
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(bundle_text(bundle, MergedCheckpoint.read(line / "merged" / "merged.json"), here))
    text = console.export_text()
    assert "F1, 8 rows" in text and "F1, points" in text and "bundle" in text
    report = summarise(read_run(line / "plan.json"))
    assert report.task_score == "f1" and [each.bundle for each in report.samples] == list(here.answers)
    for page in (to_markdown(report), to_html(report)):
        assert "F1, 8 rows" in page and result.samples[0].tuned in page and "F1, points" in page


def test_only_answers_are_written_that_are_wanted(line: Path) -> None:
    """Rows that nobody asked for are not written; what is written changes no score, and none of it was trained on."""
    from edgeft.data.dataset import TextTokenizer
    from edgeft.exporting.artifact import ArtifactModel
    from edgeft.exporting.outputs import observe_artifact
    from edgeft.training.job_data import Data

    data, tokenizer = Data.read(Plan.read(line / "plan.json")), TextTokenizer(line / "merged")
    rows, artifact = data.valid[:4], ArtifactModel(line / "bundle")
    form = observe_artifact("artifact", artifact, rows, tokenizer, answers=slice(None), write=[0, 2])
    whole = observe_artifact("artifact", artifact, rows, tokenizer, answers=slice(None), write=range(4))
    result, _, _ = read(line)
    assert form.written == {n: result.samples[n].tuned for n in (0, 2)} and form.answers([0, 1]) == []
    assert form.exact == whole.exact and form.losses == whole.losses
    assert data.train[0].ids not in [row.ids for row in rows]
