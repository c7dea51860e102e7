"""Results of one job do not lie where another's are: folders by model, data and machine, and a guard before both."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT, ROWS, run

import edgeft
from edgeft.api.folders import job_folder, refuse_others_bundle, refuse_others_training
from edgeft.errors import BadInput
from edgeft.exporting.bundle import SBOM
from edgeft.exporting.export import made_from
from edgeft.exporting.sbom import bill_of_materials
from edgeft.merging.result import MergedCheckpoint
from edgeft.planning.plan import Plan
from edgeft.targets.target import load_target

CASES = [
    ("Qwen/Qwen2.5-1.5B-Instruct", "mine.jsonl", "t4", "Qwen2.5-1.5B-Instruct-mine-t4"),
    ("models/gpt2/", "a/my rows.jsonl.gz", "profiles/my card.toml", "gpt2-my_rows-my_card"),
    ("gpt2", "chats/train.jsonl", "8GiB", "gpt2-chats-8GiB"),
    ("gpt2", "other/chats/data.csv", "cpu-8gb:6GiB", "gpt2-chats-cpu-8gb-6GiB"),
    ("gpt2", "tatsu-lab/alpaca", "9.5GiB", "gpt2-alpaca-9.5GiB"),
    ("gpt2", "v1.2.parquet", "cpu", "gpt2-v1.2-cpu"),
]


@pytest.mark.parametrize(("model", "data", "machine", "name"), CASES)
def test_a_job_has_a_folder_of_its_own(model: str, data: str, machine: str, name: str) -> None:
    assert job_folder(model, data, machine) == Path("build") / name


def test_names_that_say_nothing_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "my project"
    project.mkdir()
    monkeypatch.chdir(project)
    assert job_folder(".", "train.jsonl", "t4").name == "my_project-my_project-t4"
    assert job_folder("gpt2", None, "t4").name == "gpt2-t4"
    assert job_folder("gpt2", "chats/*.jsonl", "t4").name == "gpt2-chats-t4"
    assert job_folder("gpt2", "a.jsonl#500 + b.jsonl#3x + org/c[prompt=q]", "t4").name == "gpt2-a+2-t4"
    (project / "a + b.jsonl").write_text("")
    assert job_folder("gpt2", "a + b.jsonl", "t4").name == "gpt2-a_+_b-t4"
    others = [job_folder(model, data, on) for model in ("a", "b") for data in ("c", "d") for on in ("t4", "cpu")]
    assert len(set(others)) == 8


def out_of_make(*variables: str) -> Path:
    shown = subprocess.run(
        ["make", "--dry-run", "plan", *variables], cwd=ROOT, capture_output=True, text=True, check=True
    )
    [command] = re.findall(r"^.*edgeft plan (?:.*\\\n)*.*$", shown.stdout, re.MULTILINE)
    words = shlex.split(command)
    return Path(words[words.index("--out") + 1]).parent


@pytest.mark.parametrize(("model", "data", "machine", "name"), CASES)
def test_make_names_the_same_folder(model: str, data: str, machine: str, name: str) -> None:
    assert out_of_make(f"model={model}", f"data={data}", f"profile={machine}") == Path("build") / name


def test_the_example_keeps_its_folder_in_make() -> None:
    assert out_of_make() == out_of_make("profile=cpu") == Path("build/cpu")
    assert out_of_make("profile=t4") == Path("build/t4")
    assert out_of_make("data=mine.jsonl") == Path("build/debian-tiny-mine-cpu")
    assert out_of_make("data=mine.jsonl", "out=build/chat") == Path("build/chat")


def rows_of(path: Path, count: int) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:count]))
    return str(path)


@pytest.fixture(scope="module")
def job(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a job whose results lie in `out`."""
    folder = tmp_path_factory.mktemp("job")
    pins = {"profile": "cpu-8gb", "batch_size": 8, "epochs": 1.0, "rank": 4, "eval_rows": 4}
    settings = {"model": str(checkpoint_folder), "data": rows_of(folder / "rows.jsonl", 36), **pins}
    edgeft.plan(out=folder / "out" / "plan.json", **settings)
    run(folder / "out" / "plan.json", folder / "out" / "train")
    return settings | {"out": folder / "out" / "plan.json"}


@pytest.mark.parametrize("what", ["model", "data", "profile"])
def test_another_job_does_not_replace_a_plan_with_results(
    job: dict[str, Any], what: str, checkpoint_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in checkpoint_folder.glob("*.json*"):
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    values = {"model": str(other), "data": rows_of(tmp_path / "other.jsonl", 20), "profile": "cpu-16gb"}
    before = job["out"].read_bytes()
    with pytest.raises(BadInput, match="holds the results of another job: ") as refused:
        edgeft.plan(**{**job, what: values[what]})
    assert refused.value.where == str(job["out"].parent) and "--out" in refused.value.hint
    assert job["model"] in refused.value.problem and job["data"] in refused.value.problem
    assert job["out"].read_bytes() == before
    made = edgeft.plan(**{**job, what: values[what], "out": tmp_path / "elsewhere" / "plan.json"})
    with pytest.raises(BadInput, match="holds the results of another job"):
        edgeft.train(made, job["out"].parent / "train", rehearsal=False)
    assert json.loads((job["out"].parent / "train" / "train.json").read_text())["plan"]["profile"]["name"] == "cpu-8gb"


def test_a_run_that_has_not_ended_is_a_result_too(job: dict[str, Any], tmp_path: Path) -> None:
    settings = job | {"out": tmp_path / "plan.json"}
    edgeft.plan(**settings)
    other = {**settings, "data": rows_of(tmp_path / "other.jsonl", 20)}
    edgeft.plan(**other)  # nothing is lost
    edgeft.plan(**settings)
    (tmp_path / ".train.work").mkdir()
    with pytest.raises(BadInput, match="holds the results of another job"):
        edgeft.plan(**other)


def test_the_same_job_with_other_settings_is_no_other_job(job: dict[str, Any], tmp_path: Path) -> None:
    before, rows = job["out"].read_bytes(), Path(job["data"]).read_bytes()
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(rows)
    try:
        assert edgeft.plan(**job, seed=3).job.seed == 3
        assert edgeft.plan(**{**job, "data": str(moved)}).job.data == str(moved)  # by its content
        edgeft.plan(**job)
        Path(job["data"]).write_bytes(rows + rows)
        grown = edgeft.plan(**job)  # by its name
        assert grown.lengths is not None and grown.lengths.rows == 72
    finally:
        Path(job["data"]).write_bytes(rows)
        job["out"].write_bytes(before)


@pytest.fixture(scope="module")
def merged_jobs(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two jobs on other data, trained and merged."""
    folder = tmp_path_factory.mktemp("other")
    edgeft.plan(**{**job, "data": rows_of(folder / "others.jsonl", 20), "out": folder / "plan.json"})
    run(folder / "plan.json", folder / "train")
    places = [job["out"].parent, folder]
    for place in places:
        edgeft.merge(place / "train")
    return places


def test_a_merge_does_not_replace_another_jobs(merged_jobs: list[Path], tmp_path: Path) -> None:
    one, other = merged_jobs
    before = (one / "merged" / "merged.json").read_bytes()
    with pytest.raises(BadInput, match=r"holds the results of another job: .*rows\.jsonl for cpu-8gb") as refused:
        edgeft.merge(other / "train", one / "merged")
    assert "--out" in refused.value.hint and (one / "merged" / "merged.json").read_bytes() == before
    edgeft.merge(one / "train", tmp_path / "shared")
    edgeft.merge(one / "train", tmp_path / "shared", wise_alpha=0.5)  # the same job may
    with pytest.raises(BadInput, match="another job"):
        edgeft.merge(one / "train", tmp_path / "shared", base=json.loads(before)["train"]["plan"]["job"]["model"])


def as_bundle(merged: Path, folder: Path) -> None:
    """What an export leaves for whoever comes next: manifest and bill of materials."""
    folder.mkdir()
    train = MergedCheckpoint.read(merged / "merged.json").train
    (folder / "bundle.json").write_text(json.dumps({"provenance": {"training data": train.inputs["training data"]}}))
    (folder / SBOM).write_text(bill_of_materials({}, made_from(train, merged), load_target("ort-int4")))


def test_an_export_does_not_replace_another_jobs_bundle(merged_jobs: list[Path], tmp_path: Path) -> None:
    one, other = (place / "merged" for place in merged_jobs)
    as_bundle(one, tmp_path / "bundle")
    with pytest.raises(BadInput, match=r"holds the results of another job: \S+ on rows\.jsonl\n"):
        edgeft.export(other, tmp_path / "bundle", target="ort-fp32")
    refuse_others_bundle(tmp_path / "bundle", one)
    bill = (tmp_path / "bundle" / SBOM).read_text()
    (tmp_path / "bundle" / SBOM).write_text(bill.replace("rows.jsonl", "moved.jsonl"))
    refuse_others_bundle(tmp_path / "bundle", one)  # by its content
    (tmp_path / "bundle" / "bundle.json").write_text('{"provenance": {"training data": "grown"}}')
    (tmp_path / "bundle" / SBOM).write_text(bill)
    refuse_others_bundle(tmp_path / "bundle", one)  # by its name
    (tmp_path / "bundle" / SBOM).write_text("")
    with pytest.raises(BadInput, match="another job"):
        refuse_others_bundle(tmp_path / "bundle", one)


def test_documents_that_cannot_be_read_are_nobodys(plan_file: Callable[..., Path], tmp_path: Path) -> None:
    made = Plan.read(plan_file())
    for text in ("", "[1]", "{}", '{"plan": {}}', '{"plan": {"job": null}}'):
        (tmp_path / "train.json").write_text(text)
        refuse_others_training(tmp_path, made)
