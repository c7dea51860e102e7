"""The import rule: packages import downwards only, also inside of functions; planning and reporting need no torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import ROOT

PACKAGE = ROOT / "edgeft"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# | `name` | what is in it | torch |, from what everything stands on to what stands on everything
ROWS = re.findall(r"^\| `([^|]+)` \| [^|]+ \|([^|]*)\|$", CONTRIBUTING, re.MULTILINE)
HEIGHT = {name: height for height, (names, _) in enumerate(ROWS) for name in names.split("`, `")}
TORCH = ("torch", "transformers", "onnxruntime")


def modules() -> dict[str, Path]:
    """Every module by its dotted name after `edgeft.`."""
    files = [path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(what a file imports of edgeft, whether it is there when it runs: not for a type checker alone), lazy or not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    only_typed = {id(inner) for node in typed for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "edgeft":
            home = node.module.removeprefix("edgeft").removeprefix(".")
            for alias in node.names:
                whole = f"{home}.{alias.name}".removeprefix(".")
                yield (whole if whole in MODULES else home), id(node) not in only_typed


def place(module: str) -> str:
    """The row of the table a module belongs to: its package, or its own name."""
    return module.split(".")[0]


def test_every_package_is_in_the_table_and_the_table_names_no_other() -> None:
    assert set(HEIGHT) == {place(module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    for other, _ in imports(MODULES[module]):
        assert other, f"{module} imports from edgeft/__init__.py, which is for users"
        assert other in MODULES, f"{module} imports {other}, which is no module"
        assert HEIGHT[place(other)] <= HEIGHT[place(module)], f"{module} imports {other}, which stands above it"


def test_there_is_no_circle_of_files() -> None:
    graph = {name: {other for other, runs in imports(path) if runs} for name, path in MODULES.items()}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(graph) - done)}"
        done |= ready


def test_what_the_table_says_needs_no_torch_imports_none() -> None:
    free = [name for names, torch in ROWS for name in names.split("`, `") if not torch.strip()]
    assert {"cli", "data", "machines", "memory", "planning", "reporting"} <= set(free)
    named = [module for module in MODULES if place(module) in free and module not in WITH_TORCH]
    code = "import sys, importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(f'edgeft.{name}')\n"
    code += f"    bad = set({TORCH}) & set(sys.modules)\n    assert not bad, (name, bad)"
    done = subprocess.run([sys.executable, "-c", code, *named], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WITH_TORCH = set(re.findall(r"`([a-z_]+\.[a-z_]+)`", CONTRIBUTING[: CONTRIBUTING.index("## Which file")]))


def test_modules_that_are_said_to_need_torch_do() -> None:
    for module in WITH_TORCH:
        assert re.search(r"^import torch$", MODULES[module].read_text(encoding="utf-8"), re.MULTILINE), module


def test_files_that_a_change_is_sent_to_exist() -> None:
    table = CONTRIBUTING[CONTRIBUTING.index("## Which file") :]
    named = set(re.findall(r"`((?:edgeft|export|profiles|bench|tests|docs)/[\w./-]+)`", table))
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists(), name


def test_a_change_upwards_would_be_found(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from edgeft.reporting.words import shown\n    import edgeft\n")
    [(other, runs)] = imports(bad)
    assert runs and other == "reporting.words" and HEIGHT["reporting"] > HEIGHT["data"]


SIDEWAYS = re.compile(r"^\s*(?:from|import) (?:tests\.)?(?:test_|conftest)", re.MULTILINE)


def test_no_test_file_imports_another() -> None:
    """What several share lies in tests/tiny.py and its neighbours; fixtures lie in tests/conftest.py."""
    assert SIDEWAYS.search("import os\n    from test_train import ROWS\n") and SIDEWAYS.search(
        "from tests.test_a import b"
    )
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert [path.name for path in files if SIDEWAYS.search(path.read_text(encoding="utf-8"))] == []


def test_tests_that_code_and_pages_name_exist() -> None:
    """Each folder of tests is a package's, and comments lead to tests that are there."""
    assert {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")} <= {*HEIGHT, "tests"}
    places = [*PACKAGE.rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").glob("*.*")]
    named = {name for path in places for name in re.findall(r"\btests/[\w./]+\.py", path.read_text(errors="ignore"))}
    assert len(named) > 4
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
