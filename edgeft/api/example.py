"""Which model and rows does everybody have who has edgeft, and where are they to lie?"""

from __future__ import annotations

import shutil
from pathlib import Path

from edgeft.documents import shipped_folder, staging
from edgeft.errors import BadInput

MODEL, SHAPES, SOURCES = "model", "shapes", "SOURCES.md"
ROWS = ("train", "valid", "test")


def example(out: str | Path) -> Path:
    """A folder with a small base model, the rows of a task for it, and the shapes of 46 models to plan for.

    The model has 5.8M parameters; the task is the section of a Debian package. Both come with edgeft, so that the whole
    line runs without a network. One that is there already is left as it is. Raises BadInput where `out` holds something
    else.
    """
    folder, source = Path(out), shipped_folder("examples")
    if (folder / SOURCES).is_file() and (folder / MODEL / "config.json").is_file():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(folder, "exists: nothing of it will be replaced", "give an empty or new folder")
    with staging(folder) as made:
        shutil.copytree(source / "debian-tiny", made / MODEL)
        shutil.copytree(source / "configs", made / SHAPES)
        for name in ROWS:
            shutil.copyfile(source / "debian-sections" / f"{name}.jsonl", made / f"{name}.jsonl")
        shutil.copyfile(source / SOURCES, made / SOURCES)
    return folder
