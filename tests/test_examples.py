"""examples/action fails what does not fit and writes the summary; the notebooks run, and are what their texts say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from tiny import CONFIGS, EXAMPLE, EXAMPLES, SECTIONS

ACTION, NOTEBOOKS = EXAMPLES / "action", EXAMPLES / "notebooks"


def plan(folder: Path, **inputs: str) -> tuple[subprocess.CompletedProcess[str], str, str]:
    """(the action's script as the runner starts it, the job's summary, its outputs)."""
    summary, outputs = folder / "summary.md", folder / "outputs"
    for path in (summary, outputs):
        path.write_text("")
    environment = os.environ | {"GITHUB_STEP_SUMMARY": str(summary), "GITHUB_OUTPUT": str(outputs)} | inputs
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", str(ACTION / "plan.sh")], capture_output=True, text=True, env=environment, cwd=folder
    )
    return done, summary.read_text(encoding="utf-8"), outputs.read_text()


def test_a_plan_that_fits_passes_with_its_report(tmp_path: Path) -> None:
    done, summary, outputs = plan(
        tmp_path,
        MODEL=str(EXAMPLE),
        ON="cpu-16gb",
        DATA=str(SECTIONS / "valid.jsonl"),
        SETTINGS="rank=8\n\nepochs=1\n",
    )
    assert done.returncode == 0, done.stderr
    assert outputs == "fits=true\n" and summary.startswith("# debian-tiny on cpu-16gb") and "rank 8" in done.stdout
    assert not (tmp_path / "build").exists() and "::error" not in done.stdout


def test_a_plan_that_does_not_fit_fails_with_exit_3(tmp_path: Path) -> None:
    done, summary, outputs = plan(tmp_path, MODEL=str(CONFIGS / "llama-3.1-70b"), MEMORY="3GiB")
    assert done.returncode == 3 and outputs == "fits=false\n"
    assert summary.startswith("# This fine-tune does not fit\n\n    edgeft: ")
    [line] = [line for line in done.stdout.splitlines() if line.startswith("::error")]
    assert line.startswith("::error title=This fine-tune does not fit::") and "GiB" in line


def test_strict_and_a_time_limit_are_inputs_too(tmp_path: Path) -> None:
    large = {"MODEL": str(CONFIGS / "qwen2.5-14b"), "ON": "laptop-16gb", "SETTINGS": "base_precision=fp32\nrank=64"}
    done, summary, outputs = plan(tmp_path, **large)
    assert done.returncode == 0 and outputs == "fits=true\n" and "EXPORT ELSEWHERE" in summary
    done, summary, outputs = plan(tmp_path, **large, STRICT="true")
    assert done.returncode == 3 and outputs == "fits=false\n"
    assert summary.startswith("# This fine-tune does not fit in every stage") and "EXPORT ELSEWHERE" in summary
    done, summary, outputs = plan(tmp_path, **large, MAX_SECONDS="3600")
    assert done.returncode == 3 and outputs == "fits=false\n" and "nothing ends within" in summary
    assert plan(tmp_path, **large, STRICT="yes")[0].returncode == 2


def test_the_action_can_be_copied_as_it_is() -> None:
    """No placeholder is left, and what it installs is found beside it or by name."""
    text = (ACTION / "action.yml").read_text(encoding="utf-8")
    assert not re.search(r"OWNER|REPOSITORY|YOUR", text)
    install = yaml.safe_load(text)["runs"]["steps"][0]["run"]
    asked = f'python() {{ echo "$@"; }}\n{install}'
    for place, package, wanted in (
        (ACTION, "", f"{ACTION}/../.."), ("/nowhere/.github/actions/fits", "", "edgeft"),
        (ACTION, "mine.whl", "mine.whl"),
    ):  # fmt: skip
        done = subprocess.run(
            ["bash", "-e", "-c", asked], capture_output=True, text=True, check=True,
            env={"PATH": os.environ["PATH"], "GITHUB_ACTION_PATH": str(place), "PACKAGE": package},
        )  # fmt: skip
        assert done.stdout.split()[-1] == wanted


def test_what_cannot_be_planned_says_that(tmp_path: Path) -> None:
    done, summary, outputs = plan(tmp_path, MODEL=str(EXAMPLE), ON="cpu-16gb", SETTINGS="no_such=1")
    assert done.returncode == 1 and outputs == "" and "could not be planned" in summary


def test_the_action_passes_its_inputs_as_variables_alone() -> None:
    """Text of a pull request that is put into a script would be run."""
    made = yaml.safe_load((ACTION / "action.yml").read_text(encoding="utf-8"))
    steps = made["runs"]["steps"]
    assert made["runs"]["using"] == "composite" and all("${{" not in step["run"] for step in steps)
    used = {value for step in steps for value in step["env"].values()}
    assert used == {f"${{{{ inputs.{name} }}}}" for name in made["inputs"]}
    assert (ACTION.parent.parent / "pyproject.toml").is_file()  # two folders above the action is what is installed
    script = (ACTION / "plan.sh").read_text(encoding="utf-8")
    assert all(re.search(rf"\b({name}|{name.lower().replace('_', '-')})\b", script) for name in steps[1]["env"])


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_notebooks", NOTEBOOKS / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_notebooks_are_what_their_texts_say(maker: ModuleType) -> None:
    """After a change of a text: python examples/notebooks/make.py"""
    assert len(maker.TEXTS) == 2
    for path in maker.TEXTS:
        kept = path.with_suffix(".ipynb").read_text(encoding="utf-8")
        assert kept == maker.notebook(path.read_text(encoding="utf-8"))
        found = json.loads(kept)
        assert found["nbformat"] == 4 and {cell["cell_type"] for cell in found["cells"]} == {"code", "markdown"}
        assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])


RUN = """
import ast, json, sys
space = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] != "code":
        continue
    body = ast.parse("".join(cell["source"])).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), space)
    if last is not None:
        shown = eval(compile(ast.Expression(last.value), "cell", "eval"), space)
        print("shown:", shown._repr_html_() if hasattr(shown, "_repr_html_") else shown)
"""


def run_cells(name: str, folder: Path) -> str:
    """What the code cells of a notebook print and show, one after the other in one process."""
    command = [sys.executable, "-P", "-c", RUN, str(NOTEBOOKS / name)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.cold
def test_the_notebook_that_plans_runs(tmp_path: Path) -> None:
    shown = run_cells("plan_for_hardware.ipynb", tmp_path)
    assert "shown: <pre>verdict" in shown and "shown: <table><tr><th>model</th><th>rtx4060-8gb</th>" in shown
    assert "qwen2.5-32b    does not fit." in shown and "llama-3.2-1b" in shown


@pytest.mark.slow
def test_the_notebook_that_tunes_runs(tmp_path: Path) -> None:
    shown = run_cells("tune_to_bundle.ipynb", tmp_path)
    assert (
        "60 rows of test.jsonl" in shown and "ort-int4" in shown and (tmp_path / "edgeft-notebook" / "bundle").is_dir()
    )
