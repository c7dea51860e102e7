"""What a user has who installed a part of edgeft: it works, and each verb that needs more says so in one line."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bundles import bundle
from environments import PROJECT, closure, edgeft, environment
from tiny import CONFIGS

from edgeft.cli import app
from edgeft.errors import MissingExtra
from edgeft.machines import extras
from edgeft.machines.extras import PARTS, WITHIN, install_line, installed, need

pytestmark = pytest.mark.cold


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with edgeft's own dependencies alone."""
    return environment(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture(scope="module")
def given(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, its plan, and folders of stages whose records are empty: nobody is to get as far as reading them."""
    folder = tmp_path_factory.mktemp("given")
    assert edgeft(bare, "example", "example", cwd=folder).returncode == 0
    done = edgeft(bare, "plan", "example/model", "--data", "example", "--on", "cpu-16gb", "--out", "planned/plan.json",
                  cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "train").mkdir()
    (folder / "train" / "train.json").write_text("{}")
    shutil.copytree(folder / "example" / "model", folder / "merged")
    (folder / "merged" / "merged.json").write_text('{"train": null}')
    shutil.copytree(bundle("ort-int4"), folder / "bundle")
    for name in ("gpt2", "mixtral-8x7b"):  # torch is asked about the second one alone
        shutil.copytree(folder / "example" / "shapes" / name, folder / "few" / name)
    (folder / "rows.parquet").write_bytes(b"PAR1")
    return folder


# each verb with what it works without, and with the part that it needs
WORKS = {
    "example": ["another"],
    "doctor": ["example/model"],
    "plan": ["example/shapes/llama-3.1-8b", "--on", "t4", "--out", "-"],
    "init": ["example/model", "--data", "example", "--on", "cpu-16gb", "--file", "job.toml"],
    "data": ["example/train.jsonl", "--model", "example/model"],
    "report": ["planned/plan.json"],
    "report --models": ["--models", "few", "--out", "matrix.html"],
    "show": ["profiles"],
}
NEEDS = [
    ("plan example/model --on cpu --out -", "train"),
    ("plan example/model --on t4 --simulate --out -", "train"),
    ("plan example/model --on cpu-16gb --verify --out verified.json", "train"),
    ("build example/model --data example --on cpu-16gb --out built", "export"),
    ("train planned/plan.json", "train"),
    ("merge train", "train"),
    ("survival merged", "train"),
    ("export merged --target ort-int4", "export"),
    ("adapters one=train", "export"),
    ("eval example/model --data example/test.jsonl", "export"),
    ("sign bundle --new-key key", "sign"),
    ("data rows.parquet --model example/model", "data"),
    ("data org/rows --model example/model", "data"),
    ("show layers example/model", "train"),
]
NEEDS_OTHERS = {  # what no extra brings: a bundle's runtime, as its own run.py names it, and Debian's tools
    "run": (["bundle", "x"], "hint: pip install onnxruntime-genai"),
    "verify": (["bundle"], "hint: pip install onnxruntime-genai"),
    "arm64": ([], "dpkg: there is no dpkg here"),
}


def test_every_verb_is_tried() -> None:
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert verbs == {line.split()[0] for line in [*WORKS, *NEEDS_OTHERS, *(line for line, _ in NEEDS), "push"]}


@pytest.mark.parametrize("verb", WORKS)
def test_verbs_that_need_nothing_more(verb: str, bare: Path, given: Path) -> None:
    done = edgeft(bare, verb.split()[0], *WORKS[verb], cwd=given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(("line", "part"), NEEDS)
def test_a_missing_part_is_exit_5_and_the_line_that_installs_it(line: str, part: str, bare: Path, given: Path) -> None:
    done = edgeft(bare, *line.split(), cwd=given)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    *_, problem, empty, hint = done.stderr.splitlines()
    assert problem.startswith("edgeft: ") and not empty
    assert hint.startswith(f"hint: pip install 'edgeft[{part}]'")


@pytest.mark.parametrize("verb", NEEDS_OTHERS)
def test_what_no_extra_brings_is_named_too(verb: str, bare: Path, given: Path, tmp_path: Path) -> None:
    arguments, said = NEEDS_OTHERS[verb]
    done = edgeft(bare, verb, *arguments, cwd=given, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 5 and "Traceback" not in done.stderr, done.stderr
    assert said in done.stderr + done.stdout


def test_what_only_torch_can_count_is_a_cell_that_says_so(bare: Path, given: Path) -> None:
    done = edgeft(bare, "report", "--models", "few", "--on", "t4", "--out", "two.html", cwd=given)
    assert done.returncode == 0, done.stderr
    text = (given / "two.md").read_text(encoding="utf-8")
    assert "torch is not installed" in text or "torch: is not installed" in text


def test_a_push_needs_nothing_more(bare: Path, given: Path) -> None:
    done = edgeft(bare, "push", "bundle", "me/model", cwd=given)
    assert done.returncode == 4 and "was never proven" in done.stderr, done.stderr


def test_every_part_has_the_modules_that_its_extra_brings() -> None:
    """A package that is added to pyproject.toml and not to PARTS would end in a traceback where it is missing."""
    named = PROJECT["project"]["optional-dependencies"]
    modules: dict[str, list[str]] = {}
    for module, names in importlib.metadata.packages_distributions().items():
        for name in names:
            modules.setdefault(name.lower().replace("_", "-"), []).append(module)
    base = set(closure([]))
    for part, known in PARTS.items():
        for line in named[part]:
            name = line.split(">=")[0]
            if name.startswith("edgeft["):
                assert name == f"edgeft[{','.join(WITHIN[part])}]"
            elif name in modules:
                assert name not in base and set(modules[name]) & set(known), f"{name} of {part}"
    assert set(PARTS) | {"all", "dev", "autoround"} == set(named)


def test_the_example_is_the_one_of_the_repository(given: Path) -> None:
    folder = given / "example"
    assert len((folder / "train.jsonl").read_text(encoding="utf-8").splitlines()) == 6000
    assert {path.name for path in (folder / "shapes").iterdir()} == {path.name for path in CONFIGS.iterdir()}
    plan = json.loads((given / "planned" / "plan.json").read_text(encoding="utf-8"))
    assert plan["spec"]["total_parameters"] > 5_000_000 and plan["lengths"]["rows"] == 6000


def test_an_example_replaces_nothing(bare: Path, given: Path) -> None:
    assert edgeft(bare, "example", "example", cwd=given).returncode == 0  # it is there
    done = edgeft(bare, "example", "merged", cwd=given)
    assert done.returncode == 1 and "exists: nothing of it will be replaced" in done.stderr


@pytest.mark.slow
def test_the_part_that_trains_is_enough_to_train_and_merge(given: Path, tmp_path: Path) -> None:
    """The rehearsal says that it cannot go as far as the bundle; an export asks for the rest."""
    python = environment(tmp_path / "venv", ["train"])
    here = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    settings = [f"--set={each}" for each in ("max_steps=2", "eval_rows=8", "batch_size=4")]
    rows = given / "example" / "valid.jsonl"
    done = edgeft(python, "plan", given / "example" / "model", "--data", rows, "--on", "cpu-16gb", *settings,
                  "--out", "plan.json", cwd=tmp_path, **here)  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = edgeft(python, "train", "plan.json", cwd=tmp_path, **here)
    assert done.returncode == 0, done.stderr
    assert "is not installed here" in done.stderr
    assert edgeft(python, "merge", "train", cwd=tmp_path, **here).returncode == 0
    done = edgeft(python, "export", "merged", "--target", "ort-int4", cwd=tmp_path, **here)
    assert done.returncode == 5 and done.stderr.endswith("hint: pip install 'edgeft[export]'\n"), done.stderr


ORIGINS: list[tuple[dict[str, Any] | None, str]] = [
    (None, "pip install 'edgeft[train]'"),
    ({"url": "file:///x/a%20b", "dir_info": {"editable": True}}, "pip install --editable '/x/a b[train]'"),
    ({"url": "file:///x/edgeft", "dir_info": {}}, "pip install '/x/edgeft[train]'"),
    ({"url": "file:///x/edgeft-1-any.whl", "archive_info": {}}, "pip install '/x/edgeft-1-any.whl[train]'"),
    ({"url": "https://x/e.whl", "archive_info": {}}, "pip install 'edgeft[train] @ https://x/e.whl'"),
    (
        {"url": "https://x/e.git", "vcs_info": {"vcs": "git", "requested_revision": "v1", "commit_id": "a"}},
        "pip install 'edgeft[train] @ git+https://x/e.git@v1'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("origin", "line"), ORIGINS)
def test_a_part_comes_from_where_edgeft_came(
    origin: dict[str, Any] | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told:
        def read_text(self, name: str) -> str | None:
            return json.dumps(origin) if origin and name == "direct_url.json" else None

    monkeypatch.setattr(extras.importlib.metadata, "distribution", lambda name: Told())
    assert install_line("train") == line


def test_a_module_of_nobody_stays_what_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="nobody"), installed():
        raise ModuleNotFoundError("No module named 'nobody'", name="nobody")
    with pytest.raises(MissingExtra, match=r"^onnx: is not installed\n\nhint: pip install .*\[export\]"), installed():
        raise ModuleNotFoundError("No module named 'onnx.helper'", name="onnx.helper")


def test_what_a_verb_needs_as_a_whole_is_installed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtra, match=r"torch: is not installed\n\nhint: .*\[export\]"), installed("export"):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"torch: is not installed\n\nhint: .*\[export\]"):
        need("export")
