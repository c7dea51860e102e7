"""Where do a job's results lie when nobody says, and whose are those that lie there already?"""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from edgeft.data.sources import names, places
from edgeft.errors import BadInput
from edgeft.exporting.bundle import SBOM
from edgeft.exporting.sbom import BASE
from edgeft.machines.sized import sized
from edgeft.models.identity import DATA, SMALL_FILES, WEIGHTS, Inputs
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
        _refuse_others(folder, _of_plan(_json(plan_file)), _of_made(made))


def refuse_others_training(folder: Path, made: Plan) -> None:
    """Raise BadInput where a training would replace another job's."""
    _refuse_others(folder, _of_plan(_json(folder / "train.json").get("plan") or {}), _of_made(made))


def refuse_others_merge(folder: Path, trained: Path, base: str | None) -> None:
    """Raise BadInput where a merge would replace another job's."""
    train = {} if base is not None else _json(trained / "train.json")
    made = _of_plan(train.get("plan") or {}, train.get("inputs")) or _of_others(str(trained))
    _refuse_others(folder, _of_merge(_json(folder / "merged.json")), made)


def refuse_others_bundle(folder: Path, merged: Path) -> None:
    """Raise BadInput where a bundle would replace one of another model or other data, by their names or content."""
    held, made = _of_bundle(folder), _of_merge(_json(merged / "merged.json"))
    if held is None or made is None:
        return
    named = made._replace(model=_last(Path(made.model or "")), data=names(made.data) if made.data else None)
    _refuse_others(folder, held, named._replace(machine=held.machine))


class _Job(NamedTuple):
    """Whose results lie in a folder: model, data and machine by name, and the hashes of what was read."""

    model: str | None
    data: str | None
    machine: str
    inputs: Inputs


def _of_made(plan: Plan) -> _Job:
    return _Job(plan.job.model, plan.job.data, plan.profile.name, plan.inputs)


def _of_plan(plan: dict[str, Any], inputs: Inputs | None = None) -> _Job | None:
    """A plan's as it is in a document, which may be of another version."""
    job = plan.get("job") or {}
    machine = (plan.get("profile") or {}).get("name", "")
    return _Job(job.get("model"), job.get("data"), machine, inputs or plan.get("inputs", {})) if job else None


def _of_merge(merged: dict[str, Any]) -> _Job | None:
    train = merged.get("train") or {}
    foreign = _of_others(merged["tuned"]) if "tuned" in merged else None
    return _of_plan(train.get("plan") or {}, train.get("inputs")) or foreign


def _of_others(tuned: str) -> _Job:
    """Of what edgeft did not train: the folder that it lies in."""
    return _Job(str(Path(tuned).resolve()), None, "", {})


def _of_bundle(folder: Path) -> _Job | None:
    """A bundle's: names by its bill of materials, which knows no machine, hashes by its manifest."""
    manifest, bill = _json(folder / "bundle.json"), _json(folder / SBOM)
    roles = {each["value"]: entry["name"] for entry in bill.get("components", ()) for each in entry["properties"]}
    return _Job(roles.get(BASE), roles.get(DATA[0]), "", manifest.get("provenance", {})) if manifest else None


def _refuse_others(folder: Path, held: _Job | None, made: _Job | None) -> None:
    if held is None or made is None or _same(held, made):
        return
    there = f"{held.model} on {held.data or 'no data'}" + (f" for {held.machine}" if held.machine else "")
    hint = "choose another folder with --out (make: out=...), or remove this one"
    raise BadInput(folder, f"holds the results of another job: {there}", hint)


def _same(held: _Job, made: _Job) -> bool:
    """Whether results are of one job: the same machine, and model and data of the same name or content."""
    same_model = held.model == made.model or _equal(held.inputs, made.inputs, (WEIGHTS,))
    if WEIGHTS not in held.inputs:
        same_model = same_model or _equal(held.inputs, made.inputs, SMALL_FILES)
    same_data = held.data == made.data or _equal(held.inputs, made.inputs, DATA[:1])
    return held.machine == made.machine and same_model and same_data


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
