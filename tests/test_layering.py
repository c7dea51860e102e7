"""The import rule: planning needs no torch, and nothing inside imports from the package's front door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "edgeft"
PLANNING = (
    "headers", "identity",
    "errors", "families", "units", "settings", "artifacts", "profile", "machine", "target", "model_spec", "memory",
    "candidates", "timing", "costs", "explain", "planner", "stages", "host", "footprint", "disk", "budget",
    "simulation", "depth", "tape", "operations", "dataflow", "groups",
    "report", "data", "rows", "conversation", "samples", "tokenizer", "scores", "scoring", "importance_plot", "runner",
    "bundle", "sbom", "sign", "matrix", "records",
    "summary", "wording", "figures", "pages", "markdown", "schema", "cli",
)  # fmt: skip


@pytest.mark.parametrize("module", PLANNING)
def test_planning_half_imports_no_torch(module: str) -> None:
    heavy = "{'torch', 'transformers', 'onnxruntime'}"
    code = f"import sys, edgeft.{module}; bad = {heavy} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_imports_from_the_front_door() -> None:
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "edgeft":
                names = {alias.name for alias in node.names}
                assert names <= {p.stem for p in PACKAGE.glob("*.py")}, f"{path.name} imports {names} from edgeft"


def test_no_import_cycle_at_import_time() -> None:
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.glob("*.py"):
        found = set()
        for node in ast.parse(path.read_text()).body:  # top level only: lazy imports are how a verb stays light
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("edgeft"):
                found |= {a.name for a in node.names} if node.module == "edgeft" else {node.module.split(".")[1]}
        graph[path.stem] = found
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name, needs in graph.items() if name not in done and needs & set(graph) <= done}
        assert ready, f"a cycle among {sorted(set(graph) - done)}"
        done |= ready
