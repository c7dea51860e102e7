"""How does a standard Hugging Face folder come in and go out, one tensor at a time where memory counts?"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from edgeft.errors import BadInput
from edgeft.models import bottleneck, kv_prefix
from edgeft.models.headers import (
    BUFFER,
    HEADS,
    KV_PREFIX,
    LAYER,
    OTHER_TOWER,
    Header,
    check_tied,
    lies_beside,
    read_headers,
    refused,
    weight_files,
)
from edgeft.models.headers import DTYPES as TORCH_NAMES
from edgeft.models.headers import local_folder as local_folder  # those who load weights import both from here
from edgeft.models.parts import cap_scores

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in TORCH_NAMES.items()}
# What libraries say where a package with faster kernels is missing: no result depends on it.
KERNEL_ADVICE = re.compile(
    "falling back to its reference PyTorch implementation|fast path is not available|Failed to load CPU gemm_4bit"
)


class TensorFile(Header):
    """One safetensors file read without mapping it into memory: mapped pages would count as this process's RSS."""

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """One tensor, or a range of its rows, in memory of its own."""
        entry = self.entries[name]
        if entry.get("zeros"):
            return torch.zeros(entry["shape"], dtype=SAFETENSORS_DTYPES[entry["dtype"]])[rows]
        begin, end = entry["data_offsets"]
        shape = list(entry["shape"])
        if shape and rows != slice(None):
            first, last, _ = rows.indices(shape[0])
            row_bytes = (end - begin) // max(1, shape[0])
            begin, end = begin + first * row_bytes, begin + last * row_bytes
            shape[0] = last - first
        with open(self.path, "rb") as file:
            file.seek(self.start + begin)
            data = bytearray(end - begin)
            file.readinto(data)
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).view(shape)


class TensorFiles(TensorFile):
    """Several safetensors files in a folder read as one; no two of them hold a tensor of one name."""

    def __init__(self, folder: Path, paths: Iterable[Path]) -> None:
        self.path, self.metadata, self.start = folder, {}, 0
        self.owner = {name: file for file in map(TensorFile, paths) for name in file.entries}
        self.entries = {name: file.entries[name] for name, file in self.owner.items()}

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        return self.owner[name].read(name, rows)


CHANGED = "changed.safetensors"  # what was trained in place, whole tensors in fp32 under the model's names
PIECES = "changed-*.safetensors"  # the same, a file for each part of the model that had its turn


def read_changed(tuned: Path) -> TensorFile | None:
    """What was trained in place and left in a folder; None where nothing was."""
    if (tuned / CHANGED).is_file():
        return TensorFile(tuned / CHANGED)
    pieces = sorted(tuned.glob(PIECES))
    return TensorFiles(tuned, pieces) if pieces else None


class Checkpoint:
    """The weights of a folder, single-file or sharded, by tensor name. Raises BadInput for what cannot be read."""

    def __init__(self, folder: Path, *, packed: bool = False) -> None:
        """`packed`: the 4-bit form of one, which no user gives."""
        self.folder = folder
        self.files = [TensorFile(path) for path in weight_files(folder)] if packed else read_headers(folder, TensorFile)
        self.owner = {name: file for file in self.files for name in file.entries}

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        return self.owner[name].read(name, rows)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.owner[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return SAFETENSORS_DTYPES[self.owner[name].entries[name]["dtype"]]

    def itemsize(self, name: str) -> int:
        return self.dtype(name).itemsize

    def find(self, name: str) -> str | None:
        """The name in these files of a model's parameter; None when no tensor, or more than one, has it.

        They may lack a leading "model." or have one more, and call the head by another family's name.
        """
        if name in self.owner:
            return name
        found = [own for own in self.owner if name.endswith("." + own) or own.endswith("." + name)]
        if not found and name.endswith(HEADS) and not LAYER.fullmatch(name):
            found = [own for own in self.owner if own.endswith(HEADS) and not LAYER.fullmatch(own)]
        return found[0] if len(found) == 1 else None

    def name_of(self, name: str) -> str:
        """`find`, but raises BadInput where there is no such tensor."""
        found = self.find(name)
        if found is None:
            raise BadInput(self.folder, f"{name}: not in the checkpoint", "use the very base it was trained on")
        return found

    def give_zeros(self, name: str, weight: str, outputs: int) -> None:
        """Let the files have one more tensor: a zero for each output of a weight, beside it and of its dtype."""
        file = self.owner[weight]
        file.entries[name] = file.entries[weight] | {"shape": [outputs], "zeros": True}
        self.owner[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self.owner


def write_checkpoint(
    source: Checkpoint,
    out: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, int, int]]:
    """Write `source`'s tensors through `change` into `out`, one at a time; yields (name, done, total) after each.

    Shard names, order and metadata stay as in the source. `dtype` replaces the floating dtype of every tensor.
    """
    done, total, size_bytes, weight_map = 0, len(source.owner), 0, {}
    for file in source.files:
        header: dict[str, Any] = {"__metadata__": file.metadata or {"format": "pt"}}
        offset = 0
        order = sorted(file.entries, key=lambda name: file.entries[name]["data_offsets"][0])
        for name in order:
            entry = file.entries[name]
            old = SAFETENSORS_DTYPES[entry["dtype"]]
            new = dtype if dtype is not None and old.is_floating_point else old
            size = int(torch.Size(entry["shape"]).numel()) * new.itemsize
            code = next(code for code, kind in SAFETENSORS_DTYPES.items() if kind is new)
            header[name] = {"dtype": code, "shape": entry["shape"], "data_offsets": [offset, offset + size]}
            offset += size
        size_bytes += offset
        with open(out / file.path.name, "wb") as writer:
            write_header(writer, header)
            for name in order:
                tensor = change(name, file.read(name))
                code = header[name]["dtype"]
                tensor = tensor.detach().to(SAFETENSORS_DTYPES[code]).contiguous()
                if list(tensor.shape) != header[name]["shape"]:
                    raise BadInput(name, f"changed its shape from {header[name]['shape']} to {list(tensor.shape)}")
                writer.write(tensor.view(-1).view(torch.uint8).numpy().data)
                del tensor  # before the next one is read
                weight_map[name] = file.path.name
                done += 1
                yield name, done, total
            writer.flush()
            os.fsync(writer.fileno())
    if [file.path.name for file in source.files] != ["model.safetensors"]:  # one shard needs its index as well
        write_index(out, weight_map, total_size=size_bytes)


def write_index(folder: Path, weight_map: dict[str, str], **metadata: int) -> None:
    """Which file of a sharded checkpoint has which tensor."""
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def copy_side_files(source: Path, out: Path) -> None:
    """Copy config, tokenizer and template, everything of a checkpoint that is no weight."""
    for path in sorted(source.iterdir()):
        small = path.suffix in (".json", ".jinja", ".model", ".txt") and not path.name.endswith(".index.json")
        if path.is_file() and small and path.name not in ("pretraining.json", "trainer_state.json", "doctor.json"):
            shutil.copyfile(path, out / path.name)


def _is_no_kernel_advice(record: logging.LogRecord) -> bool:
    return not KERNEL_ADVICE.search(record.getMessage())


for _name in ("transformers.integrations.hub_kernels", "bitsandbytes.backends.cpu.ops"):  # before they are imported
    logging.getLogger(_name).addFilter(_is_no_kernel_advice)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars and advice while it loads: progress is ours to show.

    What a model says at its first forward pass about missing kernels (KERNEL_ADVICE) is dropped for good.
    """
    import transformers

    logger = logging.getLogger("transformers")
    for handler in logger.handlers:
        handler.addFilter(_is_no_kernel_advice)
    level = logger.level
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_whole(folder: Path, **how: Any) -> Any:
    """A causal LM of a folder by plain transformers, every weight from its files. Raises BadInput.

    transformers gives random values to what it does not find, and leaves out what it does not know, with a warning at
    most: here both are refused, by name.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **how
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
            raise BadInput(folder, f"cannot be loaded by transformers: {problem}") from None
    model, report = loaded
    check_loaded(folder, report)
    model.config.use_cache = False
    cap_scores(model)
    return model.eval()


def check_loaded(folder: Path, report: dict[str, Any]) -> None:
    """Raise BadInput naming every tensor that transformers' loading report says was not loaded."""
    problems = [f"{name}: missing" for name in sorted(report["missing_keys"])]
    problems += [
        f"{name}: {tuple(stored)} in the files, {tuple(wanted)} in the model"
        for name, stored, wanted in sorted(report["mismatched_keys"])
    ]
    problems += [
        f"{name}: no weight of this model"
        for name in sorted(report["unexpected_keys"])
        if not BUFFER.search(name) and not OTHER_TOWER.search(name)
    ]
    problems += map(str, report.get("error_msgs") or ())
    if problems:
        hint = "copy or download the whole checkpoint again, config.json and weights of one model"
        raise refused(folder, "does not hold the model of its config.json", problems, hint)


def load_plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A causal LM of a folder, on the CPU, in eval mode, with the adapters that lie beside its weights, in fp32.

    Raises BadInput for what `load_whole` refuses, and for adapters of another model.
    """
    headers = read_headers(folder, Header)
    model = load_whole(folder, dtype=dtype)
    if (name := lies_beside(folder)) is not None:
        kept = TensorFile(folder / name)
        hang = kv_prefix.hang_kept if name == KV_PREFIX else bottleneck.hang_kept
        hang(model, {name: kept.read(name) for name in kept.entries}, kept.path)
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        check_tied(folder, headers)
    return model


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file, written a tensor at a time: nothing is copied but what lies on another device."""
    names = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    with open(path, "wb") as writer:
        write_header(writer, header)
        for tensor in tensors.values():
            writer.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def write_header(writer: BinaryIO, header: dict[str, Any]) -> None:
    """The start of a safetensors file: the header's length, then its JSON, padded to a multiple of 8 bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writer.write(struct.pack("<Q", len(text)))
    writer.write(text)
