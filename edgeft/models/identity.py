"""Are the files that a stage reads the very ones that its record names? (no torch: `edgeft plan` hashes too)

A record's `inputs` give the sha256 of each input by its role: the base's weights and small files, the data.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from edgeft.data.sources import digest
from edgeft.documents import cache_folder, sha256_file, sha256_json
from edgeft.errors import BadInput
from edgeft.models.headers import local_folder, weight_files
from edgeft.settings.job import Job

Inputs = dict[str, str]

WEIGHTS = "base weights"
# of a checkpoint, what decides how text becomes tokens, what is computed and where an answer ends; each is a role
SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "special_tokens_map.json", "chat_template.jinja")  # fmt: skip
DATA = ("training data", "validation data", "test data")
CACHED_BYTES = 2**20  # smaller files are hashed faster than looked up
SETTLED_SECONDS = 2.0  # a younger file may change again within one tick of its file system's clock
SHOWN = 12  # digits of a hash in a message


def sha256_of(path: Path) -> str:
    """`sha256_file`, for large files out of a cache: read again when size, times or inode are others."""
    known = path.stat()
    if known.st_size < CACHED_BYTES:
        return sha256_file(path)
    key = [known.st_size, known.st_mtime_ns, known.st_ctime_ns, known.st_ino, known.st_dev]
    kept = cache_folder() / "sha256" / f"{sha256_json(str(path.resolve()))[:24]}.json"
    try:
        held = json.loads(kept.read_text())
        if held["key"] == key and len(held["sha256"]) == 64:
            return str(held["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never hashed, or no longer readable
    digest, after = sha256_file(path), path.stat()
    unchanged = (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == tuple(key[:3])
    if unchanged and time.time() - max(after.st_mtime, after.st_ctime) > SETTLED_SECONDS:
        _keep(kept, json.dumps({"key": key, "sha256": digest, "path": str(path)}))
    return digest


def _keep(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:  # no cache, then: it is hashed again next time
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def weights_sha256(folder: Path) -> str:
    """One digest of all weight files of a checkpoint; changes with any byte of them."""
    return sha256_json([sha256_of(path) for path in weight_files(folder)])


def model_inputs(folder: Path, *, weights: bool) -> Inputs:
    """The hashes of a checkpoint folder's small files by name and, when asked for, of its weights."""
    found = {name: sha256_file(folder / name) for name in SMALL_FILES if (folder / name).is_file()}
    return found | ({WEIGHTS: weights_sha256(folder)} if weights else {})


def data_inputs(job: Job) -> Inputs:
    """The hashes of a job's data files by role; a hub dataset has none."""
    named = dict(zip(DATA, (job.data, job.valid, job.test), strict=True))
    found = {role: digest(source, sha256_of) for role, source in named.items() if source}
    return {role: sha256 for role, sha256 in found.items() if sha256}


def cached_folder(model: str) -> Path | None:
    """The folder of a model without asking the hub: itself, or the snapshot that was fetched last; None without one."""
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json")
    except Exception:  # no hub id: whoever reads the model says what is wrong with it
        return None
    return Path(found).parent if isinstance(found, str) else None


def differences(recorded: Mapping[str, str], now: Mapping[str, str], places: Mapping[str, Path]) -> list[str]:
    """A line for every role whose hash is another one, is gone or is new; `places` are the files to name."""
    lines = []
    for role in sorted(recorded.keys() | now.keys()):
        was, found = recorded.get(role), now.get(role)
        if was != found:
            what = f"is {found[:SHOWN]}" if found else "is gone"
            how = f"was {was[:SHOWN]} (sha256), {what}" if was else "was not there, now is"
            place = places.get(role)
            lines.append(f"{role}{f' ({place})' if place and place.name != role else ''}: {how}")
    return lines


def changed_inputs(recorded: Mapping[str, str], job: Job, *, data: bool = True) -> list[str]:
    """What of a job's inputs is no longer as recorded. Weights are looked at where they were recorded.

    Raises BadInput where the model is gone.
    """
    folder = local_folder(job.model)
    now = model_inputs(folder, weights=WEIGHTS in recorded) | (data_inputs(job) if data else {})
    held = {role: digest for role, digest in recorded.items() if data or role not in DATA}
    return differences(held, now, _places(job, folder))


def _places(job: Job, folder: Path) -> dict[str, Path]:
    named = dict(zip(DATA, (job.data, job.valid, job.test), strict=True))
    places = {role: Path(source) for role, source in named.items() if source}
    return places | {WEIGHTS: folder} | {name: folder / name for name in SMALL_FILES}


def check_inputs(recorded: Mapping[str, str], job: Job, what: str, hint: str, *, data: bool = True) -> None:
    """Raise BadInput naming every input of a job that is no longer what `what` was made from."""
    lines = changed_inputs(recorded, job, data=data)
    if lines:
        raise changed(what, lines, hint)


def changed(what: str, lines: list[str], hint: str) -> BadInput:
    """The error for inputs that are not the recorded ones."""
    return BadInput(what, "was made from other files than are there now\n" + "\n".join(lines), hint)


def written_files(folder: Path, *others: str) -> Inputs:
    """The hashes of what a stage wrote, by name, to be recorded in the first of `others`, which have none."""
    return {
        path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name not in others
    }


def changed_files(recorded: Mapping[str, str], folder: Path) -> list[str]:
    """What of a stage's folder is no longer as it was written. A file beside them counts where it would be read."""
    read = {*SMALL_FILES, *(path.name for path in folder.glob("*.safetensors*"))}
    names = [name for name in sorted(recorded.keys() | read) if (folder / name).is_file()]
    now = {name: sha256_of(folder / name) for name in names}
    return differences(recorded, now, {})


def check_files(recorded: Mapping[str, str], folder: Path, command: str) -> None:
    """Raise BadInput naming every file of a stage's folder that was changed after it was written."""
    lines = changed_files(recorded, folder)
    if lines:
        problem = "is not as it was written: files were changed afterwards\n" + "\n".join(lines)
        raise BadInput(folder, problem, f"make it again: {command}")
