"""The planner as one page that runs in a browser: make planner-page writes build/report/planner.html.

The page holds Python (the npm package pyodide), pydantic and jinja2 (their wheels), edgeft's own files and the shapes
of examples/configs, each once. What is downloaded is named here with its hash, and kept in build/planner.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import get_args

from run import CONFIGS, ROOT

from edgeft.documents import versions
from edgeft.reporting.pages import environment
from edgeft.reporting.planning_page import Answer, Request, answer, choices
from edgeft.settings.job import Precision

PYODIDE = "314.0.7"
PYODIDE_SHA256 = "66b7949e5a0cba2250b586d7e368bf12fb482800748d182c4618254b685ffaa0"
RUNTIME = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")
PLATFORM = ("--platform", "pyemscripten_2026_0_wasm32", "--platform", "manylinux2014_x86_64", "--python-version",
            "3.14", "--implementation", "cp", "--abi", "cp314", "--abi", "none", "--only-binary", ":all:")  # fmt: skip
FIRST = Request(model="llama-3.1-8b", machine="rtx4060-8gb")  # what the page shows before its planner has started
TEMPLATES = ROOT / "edgeft" / "reporting" / "templates"


def pyodide(folder: Path) -> dict[str, bytes]:
    """The files of the npm package that run Python."""
    archive = folder / f"pyodide-{PYODIDE}.tgz"
    if not archive.is_file():
        subprocess.run(["npm", "pack", "--silent", f"pyodide@{PYODIDE}"], cwd=folder, check=True, stdout=sys.stderr)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != PYODIDE_SHA256:
        raise SystemExit(f"{archive}: sha256 is {found}, expected {PYODIDE_SHA256}")
    with tarfile.open(archive) as held:
        return {name: held.extractfile(f"package/{name}").read() for name in RUNTIME}  # type: ignore[union-attr]


def wheels(folder: Path) -> list[Path]:
    """The wheels of what the planner imports, for the browser's Python: those here already, or downloaded."""
    wanted = ROOT / "bench" / "planner-wheels.txt"
    hashes = set(re.findall(r"--hash=sha256:(\w+)", wanted.read_text(encoding="utf-8")))
    if not hashes <= set(_by_hash(folder)):
        quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            *quiet,
            *PLATFORM,
            "--dest",
            folder,
            "--requirement",
            wanted,
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return sorted(path for found, path in _by_hash(folder).items() if found in hashes)


def _by_hash(folder: Path) -> dict[str, Path]:
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in folder.glob("*.whl")}


def planner(found: list[Path]) -> bytes:
    """A zip of those packages and edgeft's own files."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:

        def add(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data)

        for wheel in found:
            with zipfile.ZipFile(wheel) as one:
                for name in one.namelist():
                    if name.endswith((".py", ".so")) and "markupsafe/_speedups" not in name:
                        add(name, one.read(name))
        own = [*ROOT.glob("edgeft/**/*.py"), *ROOT.glob("edgeft/planning/*.json"), *TEMPLATES.glob("*.j2"),
               *ROOT.glob("profiles/*.toml"), *ROOT.glob("export/*"), *CONFIGS.glob("*/config.json")]  # fmt: skip
        for path in sorted(own):
            add(path.relative_to(ROOT).as_posix(), path.read_bytes())
    return held.getvalue()


def packed(data: bytes) -> str:
    """As text of a page; the same data gives the same text."""
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()


def page(folder: Path) -> str:
    """The whole page."""
    parts = {name: packed(data) for name, data in pyodide(folder).items()}
    parts["planner.zip"] = packed(planner(wheels(folder)))
    size = sum(map(len, parts.values()))
    first = Answer.model_validate_json(answer(FIRST.model_dump_json(), CONFIGS))
    return environment().get_template("planner.html.j2").render(
        report={"versions": {"edgeft": versions()["edgeft"]}}, choices=choices(CONFIGS), first=FIRST, answer=first,
        precisions=get_args(Precision), megabytes=round(size / 1e6), pyodide=PYODIDE,
        parts={"worker": (TEMPLATES / "planner_worker.js").read_text(encoding="utf-8"), **parts},
        script=(TEMPLATES / "planner.js").read_text(encoding="utf-8"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "report" / "planner.html")
    out = parser.parse_args().out
    folder = ROOT / "build" / "planner"
    folder.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(folder), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
