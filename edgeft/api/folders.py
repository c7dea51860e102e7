"""Where do a job's results lie when nobody says, and whose are those that lie there already?"""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path
from typing import Any

from edgeft.data.sources import places
from edgeft.errors import BadInput
from edgeft.machines.sized import sized
from edgeft.models.identity import DATA, SMALL_FILES, Inputs
from edgeft.planning.plan import Plan
from edgeft.training.work import work_folder

BUILD = Path("build")
EVERYBODYS = ("train", "training", "data", "rows")  # a file of such a name is told apart by its folder
ENDING = re.compile(r"(\.(jsonl|json|csv|parquet))?(\.gz)?$")
STAGES = ("train", "merged", "bundle")


def job_folder(model: str, data: str | None, profile: str) -> Path:
    """`build/MODEL-DATA-MACHINE`, without DATA where there is none. The Makefile names the same folder (`own`)."""
    parts = [_last(Path(model)), *([_of_data(data)] if data else []), _of_machine(profile)]
    return BUILD / "-".join(re.sub(r"[^\w.+-]", "_", part) for part in parts)


def _last(path: Path) -> str:
    return path.name if path.name not in ("", "..") else path.resolve().name


def _of_data(source: str) -> str:
    """The first file's name, its folder's where the name says nothing, and how many others there are."""
    first, *others = places(source)
    path = Path(first)
    name = ENDING.sub("", _last(path))
    if name in EVERYBODYS or glob.has_magic(name):
        name = _last(path.parent) or name
    return name + (f"+{len(others)}" if others else "")


def _of_machine(profile: str) -> str:
    asked = sized(profile)
    base = asked.base if asked else profile
    name = Path(base).stem if base.endswith(".toml") else base
    return "-".join(part for part in (name, asked.size if asked else "") if part)


def refuse_others_plan(plan_file: Path, made: Plan) -> None:
    """Raise BadInput where a plan would replace another job's, which has results beside it."""
    folder = plan_file.parent
    begun = [place for name in STAGES for place in (folder / name, work_folder(folder / name)) if place.exists()]
    if begun:
        _refuse_others(_json(plan_file), folder, made)


def refuse_others_training(folder: Path, made: Plan) -> None:
    """Raise BadInput where a training would replace another job's."""
    _refuse_others(_json(folder / "train.json").get("plan") or {}, folder, made)


def _refuse_others(recorded: dict[str, Any], folder: Path, made: Plan) -> None:
    job = recorded.get("job")
    if not job or _same_job(recorded, made):
        return
    there = f"{job.get('model')} on {job.get('data') or 'no data'} for {recorded.get('profile', {}).get('name')}"
    hint = "choose another folder with --out (make: out=...), or remove this one"
    raise BadInput(folder, f"holds the results of another job: {there}", hint)


def _same_job(recorded: dict[str, Any], made: Plan) -> bool:
    """Whether two plans are of one job: the same machine, and model and data of the same name or content."""
    job, inputs = recorded["job"], recorded.get("inputs", {})
    if recorded.get("profile", {}).get("name") != made.profile.name:
        return False
    same_model = job.get("model") == made.job.model or _equal(inputs, made.inputs, SMALL_FILES)
    return same_model and (job.get("data") == made.job.data or _equal(inputs, made.inputs, DATA[:1]))


def _equal(recorded: dict[str, str], now: Inputs, roles: tuple[str, ...]) -> bool:
    held, found = ({role: each[role] for role in roles if role in each} for each in (recorded, now))
    return bool(held) and held == found


def _json(path: Path) -> dict[str, Any]:
    """A document that may be of another version; {} where there is none that can be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
