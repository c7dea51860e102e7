"""Which tensors does a file of torch.save hold, and where, without running anything that stands in it? (no torch)

A pickle is a program. This reader knows how tensors, containers and numbers are built; every other class that is named
becomes a `Stub`, which keeps what it was given and does nothing: DeepSpeed's own objects are no obstacle either.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgeft.errors import BadInput
from edgeft.models.headers import DTYPE_BYTES, DTYPES

if TYPE_CHECKING:
    import torch

CODES = {name: code for code, name in DTYPES.items()}  # torch's name of a dtype: safetensors' code
STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
    "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip
PLAIN: tuple[type, ...] = (set, frozenset, list, dict, tuple, int, float, bool, str, bytes, bytearray, complex, slice)
# where files keep the weights that they have beside other things
INSIDE = ("module", "state_dict", "model_state_dict", "model", "weights", "params")
WRITTEN_BEFORE = "was written by torch before 1.6"


class Stub:
    """Stands for an object of a class that is not known here. Nothing of it runs."""

    named = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any, **_: Any) -> Stub:
        made = object.__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *arguments: Any, **_: Any) -> Stub:
        return type(self)(*arguments)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


@dataclass(frozen=True)
class Storage:
    """Bytes of one file that tensors share."""

    dtype: str
    key: str


@dataclass(frozen=True)
class Stored:
    """One tensor, as a file describes it: where it begins in its storage counts elements, not bytes."""

    storage: Storage
    dtype: str  # safetensors' code
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    reader: Reader = field(repr=False, compare=False)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def entry(self) -> dict[str, Any]:
        """As a safetensors header would have it, from 0."""
        return {"dtype": self.dtype, "shape": list(self.shape),
                "data_offsets": [0, self.elements * DTYPE_BYTES[self.dtype]]}  # fmt: skip

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """The tensor, or `count` of its elements from `first`, flat, of one that is contiguous."""
        return self.reader.read(self, first, count)


class _Unpickler(pickle.Unpickler):
    """Builds what `PLAIN` and the tables below know; a class that is none of these is a Stub."""

    def __init__(self, file: IO[bytes], reader: Reader | None) -> None:
        super().__init__(file)
        self.reader = reader

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) < 3 or pid[0] != "storage":
            raise pickle.UnpicklingError("a piece that is no storage")
        dtype, key = pid[1], str(pid[2])
        return Storage(dtype if isinstance(dtype, str) else "U8", key)

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and (own := next((p for p in PLAIN if p.__name__ == name), None)):
            return own
        builders: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("collections", "defaultdict"): defaultdict,
            ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
            ("torch", "Size"): tuple,
            ("torch", "device"): lambda *told: str(told),
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
            ("torch._tensor", "_rebuild_from_type_v2"): lambda build, kind, given, state: build(*given),
        }
        if (module, name) in builders:
            return builders[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in CODES:
            return CODES[name]
        if module.startswith("pathlib"):
            return lambda *parts: "/".join(parts)
        return type(name, (Stub,), {"named": f"{module}.{name}"})

    def _tensor(self, storage: Storage, offset: int, shape: Any, stride: Any, *_: Any) -> Stored:
        if self.reader is None:
            raise pickle.UnpicklingError("a tensor where none can be")
        if not all(type(n) is int and n >= 0 for n in (*shape, *stride, offset)) or len(shape) != len(stride):
            raise pickle.UnpicklingError("a tensor without a shape")
        return Stored(storage, storage.dtype, tuple(shape), tuple(stride), offset, self.reader)


def unpickle(file: IO[bytes], reader: Reader | None, path: Path) -> Any:
    """What a pickle holds, with stubs for classes that are not known. Raises BadInput."""
    try:
        return _Unpickler(file, reader).load()
    except Exception as problem:  # a damaged or hostile pickle may raise anything
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        raise BadInput(path, f"cannot be read: {reason:.200}", "copy or download it again") from None


class Reader:
    """One file of torch.save, read a tensor at a time: `tree` is what was saved, with `Stored` for tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self.parts = {info.filename: info for info in archive.infolist()}
                program = next((name for name in self.parts if name.endswith("data.pkl")), None)
                if program is None:
                    raise BadInput(path, "is no file of torch.save: it has no data.pkl", "copy or download it again")
                self.root = program[: -len("data.pkl")]
                order = self.parts.get(self.root + "byteorder")
                if order is not None and archive.read(order) != b"little":
                    raise BadInput(path, "was written on a big-endian machine", "save it again on another one")
                with archive.open(program) as file:
                    self.tree = unpickle(file, self, path)
        except OSError as problem:
            raise BadInput(path, f"cannot be read: {problem.strerror}") from None
        except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError, zlib.error):
            raise BadInput(path, *_no_archive(path)) from None

    def read(self, stored: Stored, first: int = 0, count: int | None = None) -> torch.Tensor:
        """A tensor in memory of its own. Raises BadInput for a file that is shorter than it says."""
        import torch

        size, dtype = DTYPE_BYTES[stored.dtype], getattr(torch, DTYPES[stored.dtype])
        shape, stride = stored.shape, stored.stride
        if count is not None:
            shape, stride = (count,), (1,)
        extent = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0
        data = self._bytes(stored.storage.key, size * (stored.offset + first), size * extent)
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).as_strided(shape, stride).contiguous()

    def _bytes(self, key: str, begin: int, length: int) -> bytearray:
        info = self.parts.get(f"{self.root}data/{key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED or begin + length > info.file_size:
            raise BadInput(self.path, f"its storage {key} is not whole", "copy or download it again")
        data = bytearray(length)
        with open(self.path, "rb") as file:
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            file.seek(info.header_offset + 30 + name + extra + begin)
            if file.readinto(data) != length:
                raise BadInput(self.path, f"its storage {key} is not whole", "copy or download it again")
        return data


def _no_archive(path: Path) -> tuple[str, str]:
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith((b"\x80\x02\x8a\x0al\xfc\x9c", b"\x80\x02}", b"\x80\x02c")):
        again = "torch.save(torch.load(FILE, weights_only=True), FILE) with torch of today"
        return WRITTEN_BEFORE, f"save it again: {again}"
    return "is no whole file of torch.save", "copy or download it again"


def state_dict(tree: Any) -> dict[str, Stored]:
    """The tensors of a file by name: of what it holds itself, or of a model that lies in it beside other things."""
    if not isinstance(tree, dict):
        return {}
    found = {str(name): value for name, value in tree.items() if isinstance(value, Stored)}
    inside = next((tree[name] for name in INSIDE if isinstance(tree.get(name), dict)), None)
    deeper = state_dict(inside) if inside is not None else {}
    return deeper if len(deeper) > len(found) else found
