"""Which tests start no process, load no runtime and train nothing? `pytest --fast` runs them alone.

A test is left out where what it uses, by itself or through helpers and fixtures of its file, comes from one of HEAVY.
That is read from its source; what it might miss fails: a test under --fast that starts a process is an error.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

HEAVY = (
    "subprocess", "multiprocessing", "edgeft.machines.processes", "warm", "several_processes", "bundles",
    "environments", "runtimes", "onnxruntime", "onnxruntime_genai", "llama_cpp", "tiny.run", "beside.others_merge",
    "edgeft.training.train", "edgeft.training.importance", "edgeft.engine.nf4_base", "edgeft.engine.loop",
    "edgeft.simulation", "edgeft.merging.merge", "edgeft.merging.sweep", "edgeft.exporting", "edgeft.api",
)  # fmt: skip
LIGHT = ("edgeft.exporting.parity", "edgeft.exporting.outputs", "edgeft.exporting.choose_target")
# A fixture of conftest.py, whose other ones write a tiny checkpoint at most; and what `import edgeft` gives.
FOUND = {"merged_folder", "edgeft.train", "edgeft.merge", "edgeft.export", "edgeft.run", "edgeft.verify"}


def imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(name in the file, whole name) of everything that is imported in or below a node."""
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            yield from ((alias.asname or alias.name.split(".")[0], alias.name) for alias in each.names)
        elif isinstance(each, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{each.module}.{alias.name}") for alias in each.names)


def is_heavy(name: str) -> bool:
    def within(places: tuple[str, ...]) -> bool:
        return any(name == place or name.startswith(f"{place}.") for place in places)

    return within(HEAVY) and not within(LIGHT)


def used(node: ast.AST) -> set[str]:
    """The names that a function or a constant uses: variables, and fixtures, which are its arguments."""
    names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    names |= {ast.unparse(each) for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    return names | {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}


@functools.cache
def heavy_names(path: Path) -> frozenset[str]:
    """The functions, fixtures and constants of a test file that come to something heavy."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    defined = {node.name: node for node in tree.body if isinstance(node, kinds)}
    found = FOUND | {name for node in tree.body if not isinstance(node, kinds) for name, whole in imported(node)
                        if is_heavy(whole)}  # fmt: skip
    found |= {name for name, node in defined.items() if any(is_heavy(whole) for _, whole in imported(node))}
    while more := {name for name, node in defined.items() if name not in found and used(node) & found}:
        found |= more
    return frozenset(found)


def light_tests(path: Path) -> set[str]:
    """The tests of a file that come to nothing heavy."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    return named - heavy_names(path)
