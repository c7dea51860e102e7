"""Which outputs of a model's frozen layers are on disk, for which rows, and are they what those layers give?

One file of states, row after row without padding, in the dtype that the model computes them in, or rounded to bf16. It
lies in the cache folder under the hash of all that made it, so that other ranks, seeds and learning rates start from it
too. Rows are read by their place in the file, not mapped: mapped pages would count as this process's memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from edgeft.data.samples import Sample
from edgeft.documents import Artifact, cache_folder, saving, sha256_file, sha256_json, staging, unused, versions
from edgeft.errors import BadInput
from edgeft.models.evaluate import by_length
from edgeft.models.identity import SHOWN, WEIGHTS, sha256_of, weights_sha256
from edgeft.settings.job import Training

FORM = 1  # of the file: another number where the same inputs would be kept otherwise
STATES, RECORD = "states.bin", "prefix.json"
PACKAGES = ("edgeft", "torch", "transformers", "bitsandbytes")  # whose code computes the states
AGAIN = "remove this folder and run the same command again: it is made anew"

Key = dict[str, str]  # what made a cache, by what it is


class Record(Artifact):
    """prefix.json: what the states beside it were made from, and how they must look."""

    key: Key
    rows: int
    tokens: int
    bytes: int
    sha256: str
    seconds: float


def key_of(folder: Path, training: Training, rows: Sequence[Sample], device: torch.device, dtype: torch.dtype) -> Key:
    """All that the states depend on. Tokenizer, template and length are in the rows' ids."""
    code = versions(PACKAGES)
    return {
        "form": str(FORM),
        WEIGHTS: weights_sha256(folder),
        "config.json": sha256_file(folder / "config.json"),
        "rows": rows_sha256(rows),
        "layers": str(training.cached_layers),
        "base precision": training.base_precision,
        "computed in": training.compute_dtype,
        "kept in": str(dtype).removeprefix("torch."),
        "device": device.type,
        **{name: code[name] for name in PACKAGES if name in code},
    }  # fmt: skip


def rows_sha256(rows: Sequence[Sample]) -> str:
    """One digest of the tokens of all rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row.packed_ids.tobytes())
    return digest.hexdigest()


def place_of(key: Key) -> Path:
    """Where the states of a key are kept."""
    return cache_folder() / "prefix" / sha256_json(key)[:24]


class PrefixCache:
    """The states of some rows, in the order of a file that holds them in `dtype`, read a batch at a time."""

    def __init__(
        self, folder: Path, rows: Sequence[Sample], width: int, dtype: torch.dtype, computed: torch.dtype
    ) -> None:
        self.path, self.rows, self.width = folder / STATES, list(rows), width
        self.dtype, self.computed = dtype, computed
        ends = itertools.accumulate((len(row) for row in rows), initial=0)
        self.starts = {id(row): start for row, start in zip(rows, ends, strict=False)}
        self.row_bytes = width * dtype.itemsize  # of one token
        self.file = os.open(self.path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)

    def states(self, samples: Sequence[Sample]) -> torch.Tensor:
        """(B, S, h) of samples, each one of the rows, padded with zeros on the right, as a layer gives them."""
        found = torch.zeros(len(samples), max(map(len, samples)), self.width, dtype=self.dtype)
        for sample, state in zip(samples, found, strict=True):
            wanted = state[: len(sample)].view(torch.uint8).view(-1).numpy()
            if os.preadv(self.file, [wanted], self.starts[id(sample)] * self.row_bytes) != wanted.nbytes:
                raise BadInput(self.path, "was cut short while it was read", AGAIN)
        return found.to(self.computed)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process makes these states: runs that begin at once, as of a sweep, make them once."""
    with saving(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
            with contextlib.suppress(ImportError):  # not on Windows
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)  # it goes with the process, however that ends
            yield


def make(
    folder: Path, key: Key, rows: Sequence[Sample], outputs: Callable[[Sequence[Sample]], torch.Tensor],
    group_tokens: int, dtype: torch.dtype, progress: Callable[[int, int], None],
) -> float:  # fmt: skip
    """Write the states of `rows` in `dtype` to `folder`, whole or not at all, in so many seconds.

    `outputs` gives (B, S, h) of samples.
    """
    started, done = time.monotonic(), 0
    starts = dict(zip(map(id, rows), itertools.accumulate(map(len, rows), initial=0), strict=False))
    tokens, size = sum(map(len, rows)), 0
    forget_unused(folder.parent)
    with saving(folder), staging(folder) as temporary:
        with open(temporary / STATES, "wb") as file:
            for group in by_length(rows, group_tokens):
                states = outputs(group).to(dtype).cpu()
                if not size:
                    size = tokens * states.shape[-1] * states.element_size()
                    reserve(file.fileno(), size)
                for sample, state in zip(group, states, strict=True):
                    data = state[: len(sample)].contiguous().view(torch.uint8).view(-1).numpy()
                    os.pwrite(file.fileno(), data, starts[id(sample)] * (size // tokens))
                done += len(group)
                progress(done, len(rows))
            os.fsync(file.fileno())
        digest, seconds = sha256_of(temporary / STATES), round(time.monotonic() - started, 2)
        record = Record(
            versions=versions(), key=key, rows=len(rows), tokens=tokens, bytes=size, sha256=digest, seconds=seconds
        )
        record.write(temporary / RECORD)
    return seconds


def forget_unused(folder: Path) -> None:
    """Remove states that no run has started from for long."""
    for record in unused(folder, f"*/{RECORD}"):
        shutil.rmtree(record.parent, ignore_errors=True)
        folder.joinpath(f".{record.parent.name}.lock").unlink(missing_ok=True)


def reserve(file: int, size: int) -> None:
    """Take the room of a file at once: a full disk says so before anything was computed for it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)


def check(folder: Path, key: Key, rows: Sequence[Sample]) -> None:
    """Raise BadInput for a cache that is not whole, was changed, or was made of something else than `key` names.

    One that is sound counts as used now.
    """
    try:
        record = Record.read(folder / RECORD)
    except BadInput as problem:
        raise BadInput(folder, f"{RECORD} {problem.problem}: these states are nobody's", AGAIN) from None
    lines = [
        f"{name}: {record.key.get(name, 'nothing'):.{SHOWN}}, not {key.get(name, 'nothing'):.{SHOWN}}"
        for name in dict.fromkeys((*key, *record.key))
        if record.key.get(name) != key.get(name)
    ]
    if lines:
        raise BadInput(folder, "holds layers' outputs that were made from something else\n" + "\n".join(lines), AGAIN)
    size = (folder / STATES).stat().st_size if (folder / STATES).is_file() else 0
    if size != record.bytes or record.tokens != sum(map(len, rows)):
        raise BadInput(folder, f"is not whole: {STATES} has {size} bytes, {record.bytes} were written", AGAIN)
    if sha256_of(folder / STATES) != record.sha256:
        raise BadInput(folder, f"is not as it was written: {STATES} was changed afterwards", AGAIN)
    os.utime(folder / RECORD)
