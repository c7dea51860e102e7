"""One command ends with a proven bundle, does nothing twice, goes on after a kill and ends with its stage's code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import warm
from tiny import ROWS
from typer.testing import CliRunner

from edgeft.cli import app, jobs
from edgeft.documents import sha256_file
from edgeft.errors import BadInput, DoesNotFit
from edgeft.machines import processes

JOB = """\
model = {model}
data = "my rows.jsonl"
on = "cpu-8gb"
target = "ort-fp32"

[settings]
epochs = {epochs}
batch_size = 4
rank = 4
eval_rows = 4
"""


def make_job(folder: Path, model: Path, epochs: int = 1) -> Path:
    folder.mkdir()
    (folder / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "edgeft.toml").write_text(JOB.format(model=json.dumps(str(model)), epochs=epochs))
    return folder


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def carry_out(code: str, *arguments: object, environment: dict[str, str], quiet: bool = False) -> int:
    """As processes.carry_out, in a process that has imported already."""
    command = processes.command(code, *arguments)
    done = warm.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    sys.stderr.write(done.stderr)
    sys.stdout.write("" if quiet else done.stdout)
    return int(done.returncode)


def build(folder: Path, *arguments: object, stage: Any = carry_out) -> Any:
    """`edgeft build` in a folder, its stages by `stage`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(jobs.processes, "carry_out", stage)
        return CliRunner().invoke(app, ["build", *map(str, arguments)])


@pytest.fixture(scope="module")
def built(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a space in its name, where `edgeft build` ran, and what it said."""
    folder = make_job(tmp_path_factory.mktemp("jobs") / "a job", checkpoint_folder)
    done = build(folder)
    assert done.exit_code == 0, f"{done.output}\n{done.exception}"
    return folder, done


def results(folder: Path) -> Path:
    [found] = (folder / "build").iterdir()
    return found


def test_it_ends_with_a_proven_bundle(built: tuple[Path, Any], checkpoint_folder: Path) -> None:
    folder, done = built
    assert results(folder).name == f"{checkpoint_folder.name}-my_rows-cpu-8gb"
    bundle = json.loads((results(folder) / "bundle" / "bundle.json").read_text())
    assert [rung["problems"] for rung in bundle["proof"]["rungs"]] == [[]] * 4
    plan = json.loads((results(folder) / "plan.json").read_text())
    assert plan["job_file_sha256"] == sha256_file(folder / "edgeft.toml")
    assert done.stderr.count("next") == 0 and done.stderr.count("run it: ") == 1 and "job: edgeft.toml" in done.stderr
    assert done.stdout.startswith("verdict") and "parity, by validation rows" in done.stdout


def test_a_second_time_it_does_nothing(built: tuple[Path, Any]) -> None:
    folder, _ = built
    before = times(folder)
    done = build(folder, "--json")
    assert done.exit_code == 0 and done.stderr.count("is up to date") == 4 and times(folder) == before
    assert json.loads(done.stdout)["target"]["name"] == "ort-fp32"


def test_only_what_is_missing_or_changed_is_made(built: tuple[Path, Any]) -> None:
    folder, _ = built
    before = times(folder)
    for file in (results(folder) / "bundle").iterdir():
        file.unlink()
    (results(folder) / "bundle").rmdir()
    assert build(folder).exit_code == 0
    after = times(folder)
    assert after.keys() == before.keys()
    assert {Path(name).parts[2] for name in after if after[name] != before[name]} == {"bundle", "bundle.measured.json"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with the one that started it")
def test_killed_in_a_stage_it_goes_on(checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = make_job(tmp_path / "a job", checkpoint_folder, epochs=40)
    command = [sys.executable, "-m", "edgeft", "build", "--set", "checkpoint_steps=5"]
    running = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: list(folder.glob("build/*/.train.work/step-*")))
    [child] = children_of(running.pid)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    until(lambda: not alive(child))
    assert not list(folder.glob("build/*/train"))
    done = warm.edgeft("build", "--set", "checkpoint_steps=5", code=0, cwd=folder)
    assert "is up to date" in done.stderr.splitlines()[1] and (results(folder) / "bundle" / "bundle.json").is_file()
    assert json.loads((results(folder) / "train" / "train.json").read_text())["resumed_at"]


def until(what: Any) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# Without a stage that runs


@pytest.fixture
def stages() -> dict[str, Any]:
    """What was started, and with which code each ends."""
    seen: dict[str, Any] = {"run": [], "codes": {}}

    def stage(code: str, verb: str, *arguments: object, environment: dict[str, str], quiet: bool = False) -> int:
        seen["run"].append((verb, [str(word) for word in arguments], environment, quiet))
        return int(seen["codes"].get(verb, 0))

    seen["stage"] = stage
    return seen


def test_stages_follow_one_another(checkpoint_folder: Path, tmp_path: Path, stages: dict[str, Any]) -> None:
    folder = make_job(tmp_path / "job", checkpoint_folder)
    assert build(folder, "--wise-alpha", "0.5", "--out", "to here", stage=stages["stage"]).exit_code == 0
    assert [(verb, words) for verb, words, _, _ in stages["run"]] == [
        ("train", ["to here/plan.json", "--out", "to here/train"]),
        ("merge", ["to here/train", "--wise-alpha", "0.5", "--out", "to here/merged"]),
        ("export", ["to here/merged", "--out", "to here/bundle"]),
    ]
    assert [environment.get("EDGEFT_NEXT") for _, _, environment, _ in stages["run"]] == ["0", "0", None]
    stages["run"].clear()
    own = ("--track", f"{__name__}:Own", "--track", f"{__name__}:Other")  # a name is looked for before anything runs
    assert build(folder, *own, stage=stages["stage"]).exit_code == 0
    assert stages["run"][0][1][-4:] == list(own) and all(own[1] not in run[1] for run in stages["run"][1:])
    stages["run"].clear()
    text = (folder / "edgeft.toml").read_text()
    (folder / "edgeft.toml").write_text(f'track = "{own[1]}"\n{text}')
    assert build(folder, stage=stages["stage"]).exit_code == 0
    assert stages["run"][0][1][-2:] == list(own[:2])
    (folder / "edgeft.toml").write_text(text)
    stages["run"].clear()
    unknown = build(folder, "--track", "tensorbord", stage=stages["stage"]).exception
    assert isinstance(unknown, BadInput) and "tensorboard" in unknown.hint and stages["run"] == []
    assert build(folder, "--json", stage=stages["stage"]).stdout == ""  # the export's
    assert [quiet for *_, quiet in stages["run"]] == [True, True, False] and "--json" in stages["run"][2][1]


@pytest.mark.parametrize(("code", "ends"), [(1, 1), (3, 3), (4, 4), (5, 5), (130, 130), (-9, 137)])
@pytest.mark.parametrize("verb", ["train", "merge", "export"])
def test_it_ends_with_the_code_of_its_stage(
    checkpoint_folder: Path, tmp_path: Path, stages: dict[str, Any], verb: str, code: int, ends: int
) -> None:
    stages["codes"] = {verb: code}
    done = build(make_job(tmp_path / "job", checkpoint_folder), "--json", stage=stages["stage"])
    assert done.exit_code == ends and stages["run"][-1][0] == verb
    assert f"build ended in {verb}: the same command goes on from there" in done.stderr


def test_what_cannot_be_planned_starts_nothing(checkpoint_folder: Path, tmp_path: Path, stages: dict[str, Any]) -> None:
    folder = make_job(tmp_path / "job", checkpoint_folder)
    assert isinstance(build(folder, "--max-memory", "10MiB", stage=stages["stage"]).exception, DoesNotFit)
    assert build(tmp_path, stage=stages["stage"]).exit_code == 2  # no job file there, no model
    no_data = build(tmp_path, checkpoint_folder, stage=stages["stage"]).exception
    assert isinstance(no_data, BadInput) and "there is no training data" in str(no_data)
    several = build(folder, "--set", "processes=2", stage=stages["stage"]).exception
    assert isinstance(several, BadInput) and "torchrun" in several.problem
    (folder / "edgeft.toml").write_text("model = ")
    broken = build(folder, stage=stages["stage"]).exception
    assert isinstance(broken, BadInput) and broken.where == "edgeft.toml"
    assert stages["run"] == []


def test_another_job_does_not_go_into_its_folder(built: tuple[Path, Any], stages: dict[str, Any]) -> None:
    folder, _ = built
    refused = build(folder, "--on", "cpu-16gb", "--out", results(folder), stage=stages["stage"]).exception
    assert isinstance(refused, BadInput) and "holds the results of another job" in refused.problem
    assert stages["run"] == []
