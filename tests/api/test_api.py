"""From Python: each stage does nothing twice, knows where it lies, and reads as the command line prints it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import EXAMPLES

import edgeft
from edgeft.errors import BadInput, ParityFailed
from edgeft.planning.plan import Plan as PlanDocument

ROWS = [{"prompt": f"Package: lib{i}\nSection:", "completion": f" {('libs', 'doc')[i % 2]}"} for i in range(24)]


@pytest.fixture
def job(checkpoint_folder: Path, write_rows: Any) -> dict[str, Any]:
    data = str(write_rows("rows.jsonl", ROWS))
    return {"model": str(checkpoint_folder), "data": data, "profile": "cpu-8gb", "rank": 4, "batch_size": 4,
            "max_steps": 2, "eval_rows": 2}  # fmt: skip


def test_plan_train_merge(job: dict[str, Any], tmp_path: Path) -> None:
    out, said = tmp_path / "a folder" / "plan.json", list[str]()
    plan = edgeft.plan(out=out, say=said.append, **job)
    assert plan.path == out and PlanDocument.read(out) == PlanDocument.model_validate(plan.model_dump())
    assert "LoRA" in str(plan) and "<pre>" in plan._repr_html_()
    assert edgeft.plan(out=out, say=said.append, **job) == plan and said == [f"{out} is up to date"]
    trained = edgeft.train(plan, rehearsal=False)
    assert trained.folder == out.parent / "train" and trained.steps == 2 and "exact match" in str(trained)
    before = (trained.path).stat().st_mtime_ns
    assert edgeft.train(out, rehearsal=False, say=said.append) == trained and "up to date" in said[-1]
    assert trained.path.stat().st_mtime_ns == before
    merged = edgeft.merge(trained, wise_alpha=0.5)
    assert merged.wise_alpha == 0.5 and merged.folder == out.parent / "merged"
    assert edgeft.merge(trained.folder, wise_alpha="0.5", say=said.append) == merged and "up to date" in said[-1]
    assert edgeft.merge(trained, wise_alpha=1).wise_alpha == 1.0
    assert {path.suffix for path in edgeft.report(plan)} == {".html", ".md", ".json"}


def test_a_plan_in_no_file_is_written_beside_what_it_trains(job: dict[str, Any], tmp_path: Path) -> None:
    plan = edgeft.plan(**job)
    with pytest.raises(BadInput, match="the plan lies in no file"):
        edgeft.train(plan)
    with pytest.raises(BadInput, match="lies in no file"):
        _ = plan.folder
    trained = edgeft.train(plan, tmp_path / "run" / "train", rehearsal=False)
    assert PlanDocument.read(tmp_path / "run" / "plan.json").training == plan.training
    assert edgeft.train(plan, tmp_path / "run" / "train", rehearsal=False) == trained


def test_a_changed_plan_is_not_taken_for_the_one_in_its_file(job: dict[str, Any], tmp_path: Path) -> None:
    plan = edgeft.plan(out=tmp_path / "plan.json", **job)
    other = plan.model_copy(update={"training": plan.training.model_copy(update={"steps": 1})})
    trained = edgeft.train(other, tmp_path / "other" / "train", rehearsal=False)
    assert trained.steps == 1 and PlanDocument.read(tmp_path / "plan.json").training.steps == 2


def test_errors_are_those_of_the_command_line(job: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no_such: extra inputs are not permitted|unknown key 'no_such'"):
        edgeft.plan(**job, no_such=1)
    with pytest.raises(BadInput, match=r"train\.json: no such file"):
        edgeft.merge(tmp_path)
    with pytest.raises(BadInput, match=r"bundle\.json: no such file"):
        edgeft.run(tmp_path, "hello")
    (tmp_path / "bundle.json").write_text("{}")
    with pytest.raises((ParityFailed, edgeft.errors.EdgeftError)):
        edgeft.verify(tmp_path)


def test_importing_costs_nothing_and_names_are_there() -> None:
    code = "import sys, json, edgeft; bad = {'torch', 'pydantic', 'rich'} & set(sys.modules); "
    code += "print(json.dumps([sorted(bad), all(hasattr(edgeft, name) for name in edgeft.__all__ if name != 'wise')]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], True]
    assert (Path(edgeft.__file__).parent / "py.typed").is_file()


def example(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_six_models_names_them_all() -> None:
    lines = example("six_models.py").splitlines()
    assert len(lines) == 6 and all("GiB" in line for line in lines)


@pytest.mark.slow
def test_the_examples_of_the_line_and_of_a_share(tmp_path: Path) -> None:
    assert "ort-int4" in example("line.py", tmp_path)
    assert "taken: " in example("share.py", tmp_path)
