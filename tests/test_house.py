"""Does the source stay easy to read: short functions and files, little nesting, no circle? As bench/house.py counts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tiny import BENCH, ROOT

AIMS = {"functions_over_60_lines": 0, "files_over_400_lines": 0, "deepest_nesting": 4, "files_in_circles": 0,
        "entries_at_the_top": 22}  # fmt: skip
DEEP = """def deep(rows):
    for row in rows:
        if row:
            with row:
                while row:
                    if row.left:
                        return row
"""


@pytest.fixture(scope="module")
def house() -> Any:
    spec = importlib.util.spec_from_file_location("bench_house", BENCH / "house.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missed(counts: dict[str, Any]) -> set[str]:
    return {name for name, most in AIMS.items() if counts[name] > most}


def test_the_source_keeps_to_its_aims(house: Any) -> None:
    counts = house.count(ROOT)
    places = {name: counts[name] for name in ("longest_function", "longest_file", "deepest_function")}
    assert not missed(counts), f"missed: {missed(counts)}; look at {places}"


@pytest.mark.parametrize(("files", "named"), [
    ({"a.py": "def long():\n" + "    x = 1\n" * 60}, {"functions_over_60_lines"}),
    ({"a.py": "def short():\n" + "    x = 1\n" * 59}, set()),
    ({"a.py": "x = 1\n" * 401}, {"files_over_400_lines"}),
    ({"a.py": DEEP}, {"deepest_nesting"}),
    ({"a.py": "from edgeft.b import y\n", "b.py": "def f():\n    from edgeft.a import x\n"}, {"files_in_circles"}),
    ({f"m{n}.py": "x = 1\n" for n in range(23)}, {"entries_at_the_top"}),
])  # fmt: skip
def test_what_drifts_is_counted(house: Any, tmp_path: Path, files: dict[str, str], named: set[str]) -> None:
    package = tmp_path / "edgeft"
    package.mkdir()
    for name, text in {"one.py": "def f():\n    return 1\n", **files}.items():
        (package / name).write_text(text, encoding="utf-8")
    assert missed(house.count(tmp_path)) == named
