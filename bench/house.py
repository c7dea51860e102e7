"""How easily does one find the right file? Counts of edgeft's source now, and as it was at another commit.

    make bench-house      # or: python bench/house.py COMMIT

Places that know a tuner, a runtime or a family are functions and tables outside of tests whose code names one of them.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FLAT = "e32d271f8f"  # the last commit before packages
KNOWS = {
    "tuner": {"lora", "full", "lora_A", "lora_B"},
    "runtime": {"ort-genai", "onnxruntime", "llama.cpp"},
    "family": {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "gpt2",
               "gpt_neox", "opt", "bloom"},
}  # fmt: skip
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def depth(node: ast.AST) -> int:
    """How many blocks lie in one another below a node; an elif is no deeper than its if."""
    most = 0
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, Function | ast.ClassDef):
                chained = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)
                most = max(most, depth(child) + (isinstance(child, BLOCKS) and not chained))
    return most


def modules(package: Path) -> dict[str, Path]:
    """Every file of the package by its dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def needs(tree: ast.AST, names: dict[str, Path]) -> set[str]:
    """The files that one imports when it runs, inside of functions too."""
    typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in typed for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in skipped:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in names else node.module for name in whole}
    return found & set(names)


def circles(graph: dict[str, set[str]]) -> int:
    """Files that are part of a circle of imports: those that can reach themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        queue = list(graph[start])
        while queue:
            if (name := queue.pop()) not in seen:
                seen.add(name)
                queue += graph[name]
        return seen

    return sum(name in reached(name) for name in graph)


def known_in(tree: ast.Module, words: set[str]) -> int:
    """Top-level definitions of a file, methods apart, whose strings are one of these words, or hold a tensor's."""

    def strings(node: ast.AST) -> Iterator[str]:
        bodies = [each.body for each in ast.walk(node) if isinstance(each, Function | ast.ClassDef)]
        docs = {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}
        for inner in ast.walk(node):
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and id(inner) not in docs:
                yield inner.value

    parts: list[ast.stmt] = []
    for node in tree.body:
        parts += node.body if isinstance(node, ast.ClassDef) else [node]

    def said(part: ast.stmt, text: str) -> bool:
        if text == "full" and "tuner" not in ast.unparse(part).lower():
            return False  # a grade of the reports has that name too
        return text in words or any(f".{word}." in text for word in words)

    return sum(any(said(part, text) for text in strings(part)) for part in parts)


def count(root: Path) -> dict[str, Any]:
    """The counts of one tree."""
    package = root / "edgeft"
    names = modules(package)
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in names.items()}
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in names.items()}
    functions = {f"{name}.{node.name}": node for name, tree in trees.items() for node in ast.walk(tree)
                 if isinstance(node, Function)}  # fmt: skip
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions.items()}
    public = [node for name, node in functions.items() if not node.name.startswith("_")]
    known = {kind: {name: found for name, tree in trees.items() if (found := known_in(tree, words))}
             for kind, words in KNOWS.items()}  # fmt: skip
    top = [path for path in package.iterdir() if path.name not in ("__pycache__", "schemas", "templates")]
    deep = {name: depth(node) for name, node in functions.items()}
    longest_file, longest_function = max(lines, key=lambda n: lines[n]), max(lengths, key=lambda n: lengths[n])
    deepest = max(deep, key=lambda n: deep[n])
    return {
        "files": len(names),
        "lines": sum(lines.values()),
        "median_lines_of_a_file": statistics.median(lines.values()),
        "entries_at_the_top": len(top),
        "longest_file": [longest_file, lines[longest_file]],
        "files_over_400_lines": sum(size > 400 for size in lines.values()),
        "longest_function": [longest_function, lengths[longest_function]],
        "functions_over_60_lines": sum(size > 60 for size in lengths.values()),
        "deepest_nesting": deep[deepest],
        "deepest_function": deepest,
        "files_in_circles": circles({name: needs(tree, names) for name, tree in trees.items()}),
        "definitions_that_know": {kind: sum(found.values()) for kind, found in known.items()},
        "files_that_know": {kind: len(found) for kind, found in known.items()},
        "share_of_public_functions_with_docstrings":
            round(sum(ast.get_docstring(node) is not None for node in public) / len(public), 3),
    }  # fmt: skip


def at(commit: str, folder: Path) -> Path:
    """The tree of a commit, unpacked."""
    archive = subprocess.run(["git", "archive", commit, "edgeft"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", nargs="?", default=FLAT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        before = count(at(options.commit, Path(scratch)))
    from run import record  # of the library that is counted: a count alone needs none of it

    now = count(ROOT)
    for name in now:
        print(f"{name:45} {before[name]!s:>60}  ->  {now[name]}")
    record("house", {"commit_before": options.commit, "before": before, "now": now})


if __name__ == "__main__":
    main()
