"""A Python environment as pip would make it: edgeft as its wheel lays it out, and what some of its extras ask for.

What is installed here is linked into it, nothing is fetched.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from tiny import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(extras: Sequence[str]) -> Iterator[Requirement]:
    """What pyproject.toml asks for, with these extras and those that they name."""
    project = PROJECT["project"]
    yield from map(Requirement, project["dependencies"])
    for extra in extras:
        for requirement in map(Requirement, project["optional-dependencies"][extra]):
            if requirement.name == "edgeft":
                yield from requirements(sorted(requirement.extras))
            else:
                yield requirement


def closure(extras: Sequence[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions that pip would install, by name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(requirements(extras))
    while waiting:
        wanted = waiting.pop()
        name = wanted.name.lower().replace("_", "-")
        if name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        found[name] = importlib.metadata.distribution(wanted.name)
        waiting += map(Requirement, found[name].requires or ())
    return found


def environment(folder: Path, extras: Sequence[str] = ()) -> Path:
    """The interpreter of a new environment in `folder`."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    for distribution in closure(extras).values():
        for name in {path.parts[0] for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__")}:
            place = packages / name
            if not place.exists():
                os.symlink(Path(str(distribution.locate_file(name))).resolve(), place)
    lay_out(packages)
    return python


def lay_out(packages: Path) -> None:
    """edgeft in a folder of packages, as its wheel holds it."""
    shutil.copytree(ROOT / "edgeft", packages / "edgeft", ignore=shutil.ignore_patterns("__pycache__"))
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, place in wheel["force-include"].items():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copyfile
        (packages / place).parent.mkdir(exist_ok=True)
        copy(ROOT / source, packages / place)
    about = packages / f"edgeft-{PROJECT['project']['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: edgeft\nVersion: {PROJECT['project']['version']}\n")


def edgeft(python: Path, *arguments: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command of edgeft in an environment, as a user of it alone has it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(python), "-m", "edgeft", *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        env=kept | variables, check=False,
    )  # fmt: skip


if __name__ == "__main__":  # python tests/environments.py FOLDER EXTRA...: to try one by hand
    print(environment(Path(sys.argv[1]), sys.argv[2:]))
