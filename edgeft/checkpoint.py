"""How does a standard Hugging Face folder come in and go out, one tensor at a time where memory counts?"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from edgeft import disk, process
from edgeft.artifacts import cache_folder, saving, sha256_file, sha256_json, staging
from edgeft.budget import MALLOC_ENVIRONMENT
from edgeft.errors import BadInput
from edgeft.model_spec import read_model_spec
from edgeft.settings import Training

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SHARD_BYTES = 4 * 2**30


class TensorFile:
    """One safetensors file read without mapping it into memory: mapped pages would count as this process's RSS."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > os.path.getsize(path):
                    raise ValueError("header is longer than the file")
                header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is no object")
        except FileNotFoundError:
            raise BadInput(
                path.parent, f"{path.name} is missing", "copy or download the whole checkpoint again"
            ) from None
        except (ValueError, struct.error) as problem:
            raise BadInput(path, f"is not a whole safetensors file: {problem}", "copy or download it again") from None
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.entries: dict[str, dict[str, Any]] = header
        self.start = 8 + length
        end = self.start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if os.path.getsize(path) != end:
            raise BadInput(path, f"is {os.path.getsize(path)} bytes long, its header says {end}", "copy it again")
        unknown = sorted({entry["dtype"] for entry in header.values()} - set(SAFETENSORS_DTYPES))
        if unknown:
            hint = "load it with transformers and save it in bfloat16"
            raise BadInput(path, f"holds tensors of a type that is not read here: {', '.join(unknown)}", hint)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name]["shape"])

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """One tensor, or a range of its rows, in memory of its own."""
        entry = self.entries[name]
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


class Checkpoint:
    """The weights of a folder, single-file or sharded, by tensor name. Raises BadInput for what cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = [TensorFile(path) for path in weight_files(folder)]
        self.owner = {name: file for file in self.files for name in file.entries}

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        return self.owner[name].read(name, rows)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.owner[name].shape(name)

    def itemsize(self, name: str) -> int:
        return SAFETENSORS_DTYPES[self.owner[name].entries[name]["dtype"]].itemsize

    def name_of(self, name: str) -> str:
        """The name in these files of a model's parameter: they may lack a leading "model." or have one more.

        Raises BadInput when no tensor, or more than one, has it.
        """
        if name in self.owner:
            return name
        found = [own for own in self.owner if name.endswith("." + own) or own.endswith("." + name)]
        if len(found) != 1:
            raise BadInput(self.folder, f"{name}: not in the checkpoint", "use the very base it was trained on")
        return found[0]

    def __contains__(self, name: str) -> bool:
        return name in self.owner


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder in order. Raises BadInput with what to do when there are none."""
    if (folder / "model.safetensors").is_file():  # before the index, as transformers does
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise BadInput(index, f"is not a shard index: {problem!r}") from None
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise BadInput(folder, "shards are missing: " + ", ".join(missing), "copy or download the whole checkpoint")
        return [folder / name for name in shards]
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        raise BadInput(folder, f"is an adapter of {base!r}, not a model", "give the base as --model, or merge it first")
    if list(folder.glob("pytorch_model*.bin")):
        hint = "convert it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        raise BadInput(folder, "holds pickled weights (pytorch_model.bin), only safetensors are read", hint)
    raise BadInput(folder, "holds no weights (model.safetensors)", "give a folder written by save_pretrained")


def local_folder(model: str) -> Path:
    """The folder of a model: itself, or the hub's snapshot when online. Raises BadInput."""
    if Path(model).is_dir():
        return Path(model)
    if Path(model).is_absolute() or model.count("/") > 1 or model.startswith("."):
        raise BadInput(model, "no such model folder", "give a folder with config.json, or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except Exception as problem:  # huggingface_hub raises many kinds: offline, gated, unknown
        hint = "check the name and the network, or download it once and give the folder"
        raise BadInput(model, f"is no folder and could not be fetched as a hub model: {problem}", hint) from None


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
        index = {"metadata": {"total_size": size_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def copy_side_files(source: Path, out: Path) -> None:
    """Copy config, tokenizer and template, everything of a checkpoint that is no weight."""
    for path in sorted(source.iterdir()):
        small = path.suffix in (".json", ".jinja", ".model", ".txt") and not path.name.endswith(".index.json")
        if path.is_file() and small and path.name not in ("pretraining.json", "trainer_state.json"):
            shutil.copyfile(path, out / path.name)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars and advice while it loads: progress is ours to show."""
    import transformers

    logger = logging.getLogger("transformers")
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


def load_plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A causal LM of a folder by plain transformers, on the CPU, in eval mode. Raises BadInput."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
            raise BadInput(folder, f"cannot be loaded by transformers: {problem}") from None
    model.config.use_cache = False
    return model.eval()


def load_base(folder: Path, training: Training, device: torch.device, compute: torch.dtype) -> Any:
    """The base model as the plan keeps it: dense in base_precision, or NF4 with double quantisation.

    Quantising costs tens of seconds per 100M parameters on a CPU, so the NF4 model is kept on disk under the hash of
    its weights and loaded from there next time.
    """
    if training.base_precision != "nf4":
        # a half-precision base on a device that cannot compute in it is held in the compute dtype instead
        dense = DTYPES[training.base_precision] if compute.itemsize == 2 else compute
        return load_plain(folder, dense).to(device)
    cached = quantised_folder(folder)
    if not (cached / "model.safetensors").is_file() and not (cached / "model.safetensors.index.json").is_file():
        disk.require(disk.nf4_disk(read_model_spec(str(folder)), training), cached)
        # in a process of its own: what quantising leaves in the heap would count against training
        code = "import sys, pathlib; from edgeft.checkpoint import quantise; quantise(*map(pathlib.Path, sys.argv[1:]))"
        # large matrices would fragment its heap to twice the size
        done = process.run(code, folder, cached, environment=MALLOC_ENVIRONMENT)
        if done.returncode:
            reason = process.reason(done.returncode, done.stderr)
            raise BadInput(folder, f"cannot be quantised to NF4: {reason}", "use another --set base_precision")
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(
            cached, dtype=compute, device_map={"": device}, local_files_only=True
        )
    model.config.use_cache = False
    model.eval()
    compute_in(model, compute)
    return model


def compute_in(model: Any, compute: torch.dtype) -> None:
    """Make a 4-bit model compute in one dtype, forth and back, as plans count on: what is dense is kept in it too.

    transformers leaves what was not quantised in the dtype it was stored in: an fp32 checkpoint would hold more than
    planned, a bf16 one not run at all in fp32. Every tensor is copied: one that stays mapped keeps all pages of its
    file resident that loading has touched.
    """
    for parameter in model.parameters():
        dtype = compute if parameter.is_floating_point() else parameter.dtype
        parameter.data = parameter.data.to(dtype, copy=True)
        state = getattr(parameter, "quant_state", None)
        for part in (state, state.state2) if state is not None else ():
            for name, value in vars(part).items():
                if isinstance(value, torch.Tensor):
                    setattr(part, name, value.clone())
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            _compute_in(module, compute)


def _compute_in(linear: Any, compute: torch.dtype) -> None:
    """Let a 4-bit Linear multiply in `compute`, with a backward pass.

    In eval mode bitsandbytes packs the weights for its AVX512-BF16 kernel, which has none: every layer below would get
    no gradient, and nothing would say so. Its backward pass unpacks to the dtype that was quantised.
    """
    linear.compute_dtype, linear.compute_type_is_set = compute, True
    if getattr(linear.weight, "quant_state", None) is not None:
        linear.weight.quant_state.dtype = compute
    linear.train()


def make_nf4(linear: Any, compute: torch.dtype) -> Any:
    """A Linear's 4-bit form (NF4, double quantisation), frozen, as `load_base` has them."""
    from bitsandbytes import nn

    kinds: Any = nn
    made = kinds.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=compute, compress_statistics=True,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    weight = linear.weight.detach()
    made.weight = kinds.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
    ).to(weight.device)
    made.bias, made.source_cls = linear.bias, linear.source_cls
    _compute_in(made, compute)
    return made


def join_files(files: Iterable[Path], out: Path) -> None:
    """One safetensors file with the tensors of several, copied one at a time."""
    sources = [TensorFile(path) for path in files]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for source in sources:
        for name, entry in source.entries.items():
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            header[name] = {**entry, "data_offsets": [offset, offset + size]}
            offset += size
    with open(out, "wb") as writer:
        write_header(writer, header)
        for source in sources:
            for name in source.entries:
                writer.write(source.read(name).contiguous().view(-1).view(torch.uint8).numpy().data)


def write_header(writer: BinaryIO, header: dict[str, Any]) -> None:
    """The start of a safetensors file: the header's length, then its JSON, padded to a multiple of 8 bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writer.write(struct.pack("<Q", len(text)))
    writer.write(text)


def weights_sha256(folder: Path) -> str:
    """One digest of all weight files of a checkpoint; changes with any byte of them."""
    return sha256_json([sha256_file(path) for path in weight_files(folder)])


def quantised_folder(folder: Path) -> Path:
    """Where the NF4 form of these very weights and this config is kept."""
    key = hashlib.sha256((weights_sha256(folder) + sha256_file(folder / "config.json")).encode()).hexdigest()
    return cache_folder() / "nf4" / key[:24]


def quantise(folder: Path, out: Path) -> None:
    """Write the NF4 form of a checkpoint to `out`, whole or not at all."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits_and_bytes: Any = BitsAndBytesConfig
    config = bits_and_bytes(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with quiet_transformers(), saving(out), staging(out) as temporary:
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map={"": "cpu"}, dtype="auto", local_files_only=True
        )
        model.save_pretrained(temporary)
