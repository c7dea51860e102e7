"""Is what a stage has written still what its inputs say? Content decides, not dates; nothing here imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeft.documents import sha256_file, sha256_json
from edgeft.errors import BadInput
from edgeft.models.headers import local_folder
from edgeft.models.identity import changed_files, changed_inputs, differences, model_inputs, sha256_of
from edgeft.progress import Say
from edgeft.settings.job import Job


def held(path: Path, input_sha256: str) -> dict[str, Any]:
    """A stage's JSON document, where it was made from this input; {} where it was not, or cannot be read."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return document if document["input_sha256"] == input_sha256 else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def same_training(folder: Path, train: dict[str, Any], say: Say) -> bool:
    """Whether a training's files, and what it was trained on, are still as recorded; else says what is not."""
    return _unchanged(folder, _inputs(train) + changed_files(train.get("files", {}), folder), say)


def same_merge(folder: Path, merged: dict[str, Any], say: Say) -> bool:
    """Whether a merged folder, and the base in it, are still as merged.json records; else says what is not."""
    lines = changed_files(merged.get("files", {}), folder)
    if "train" in merged:
        lines = _inputs(merged["train"]) + lines
    else:
        lines += differences(merged.get("inputs", {}), model_inputs(local_folder(merged["base"]), weights=True), {})
    return _unchanged(folder, lines, say)


def same_bundle(folder: Path, bundle: dict[str, Any], merged: Path, say: Say) -> bool:
    """Whether a bundle's files, the merged folder and what was trained on are still as recorded; else says what not."""
    recorded = json.loads((merged / "merged.json").read_text(encoding="utf-8"))
    files = {name: entry["sha256"] for name, entry in bundle["files"].items()}
    lines = [f"{name}: is not as it was written" for name, digest in files.items() if not _is(folder / name, digest)]
    return _unchanged(folder, lines, say) and "train" in recorded and same_merge(merged, recorded, say)


def merge_digest(trained: Path, base: str | None) -> str:
    """The hash of a merge's input: train.json, or every file of an adapter or checkpoint and the base's name."""
    if base is None and (trained / "train.json").is_file():
        return sha256_file(trained / "train.json")
    if base is None and not (trained / "adapter_config.json").is_file():
        raise BadInput(trained / "train.json", "no such file", "run edgeft train PLAN first, or name the --base")
    files = [path for pattern in ("*.safetensors", "*.bin", "*.json") for path in sorted(trained.glob(pattern))]
    return sha256_json([base, *map(sha256_file, files)])


def replaceable(out: Path, document: str) -> None:
    """Refuse to replace a folder that no stage wrote: it may be somebody's model."""
    if out.is_dir() and any(out.iterdir()) and not (out / document).is_file():
        raise BadInput(out, f"exists and holds no {document}: it will not be replaced", "give an empty or new --out")


def _inputs(train: dict[str, Any]) -> list[str]:
    return changed_inputs(train.get("inputs", {}), Job.model_validate(train["plan"]["job"]))


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


def _unchanged(folder: Path, lines: list[str], say: Say) -> bool:
    for line in lines:
        say(f"not up to date: {folder}: {line}")
    return not lines
