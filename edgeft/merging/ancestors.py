"""Which runs went before this one, where its base is itself what edgeft merged or repaired? (no torch)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeft.documents import sha256_file
from edgeft.merging.result import Ancestor
from edgeft.models.identity import changed_files

RECORDS = ("merged.json", "doctor.json")


def ancestors_of(folder: Path) -> tuple[tuple[Ancestor, ...], list[str]]:
    """(the records of a base and of the bases before it, the nearest first; what to say where they no longer hold)."""
    path = next((folder / name for name in RECORDS if (folder / name).is_file()), None)
    if path is None:
        return (), []
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before = tuple(Ancestor.model_validate(each) for each in told.get("ancestors", ()))
        own = Ancestor(record=path.name, made=_made(told), sha256={path.name: sha256_file(path)} | _sources(told))
        changed = changed_files(told.get("files", {}), folder)
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        return (), [f"{path} cannot be read, so what the base was made from is not recorded: {problem}"]
    if changed:
        return (), [f"the base is not what {path} says, so what it was made from is not recorded: {changed[0]}"]
    return (own, *before), []


def _made(told: dict[str, Any]) -> str:
    """How it came about, in a few words."""
    if "before" in told:
        return f"repaired: {told['before']['weights']}"
    share = "a share for each group of layers" if told.get("groups") else f"a share of {told['wise_alpha']:g}"
    return f"merged: {told['kind']}, {share}"


def _sources(told: dict[str, Any]) -> dict[str, str]:
    """The hashes of what it was made from, by name."""
    if "before" in told:
        return dict(told["sources"])
    run = told.get("train")
    found = (
        {"train.json": told["input_sha256"], "plan.json": run["input_sha256"]} | run["inputs"]
        if run
        else told["inputs"]
    )
    return {name: digest for name, digest in found.items() if digest}


def provenance_of(ancestors: tuple[Ancestor, ...]) -> dict[str, str]:
    """What a bundle says of them, in its own flat list: `ancestor 1` is the base, `ancestor 2` the base's."""
    found = {}
    for at, each in enumerate(ancestors, 1):
        found[f"ancestor {at}"] = each.made
        found |= {f"ancestor {at}: {name}": digest for name, digest in each.sha256.items()}
    return found
