"""Which tensors does a folder keep, in whichever form, and how is one of them read? Looking needs no torch."""

from __future__ import annotations

import io
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeft.errors import BadInput
from edgeft.models.doctor.kinds import INDEX, Form, Listing
from edgeft.models.doctor.pickles import Reader, Stored, Stub, state_dict, unpickle
from edgeft.models.doctor.zero import ZeroStore
from edgeft.models.headers import AGAIN, DTYPE_BYTES, Header, is_buffer, shard_map

if TYPE_CHECKING:
    import torch

Entry = dict[str, Any]  # dtype, shape and data_offsets, as in a safetensors header
# what a run keeps beside its model
OPTIMIZER = re.compile(r"(^|\.)(optimizers?|optim|lr_schedulers?|schedulers?|dataloader|train_state|rng)(\.|$)")


class Store(Protocol):
    """Tensors by their names in the files."""

    entries: dict[str, Entry]
    files: list[Path]
    faults: list[tuple[str, list[str]]]  # (what is wrong with the files themselves, names)

    def read(self, name: str) -> torch.Tensor: ...


class SafeStore:
    """Safetensors files, also where no index or a wrong one says which they are."""

    def __init__(self, folder: Path, paths: list[Path], index: dict[str, str] | None) -> None:
        self.files, self.faults = paths, list[tuple[str, list[str]]]()
        headers = [Header(path) for path in paths]
        self.owner: dict[str, Header] = {}
        twice: list[str] = []
        copies: list[str] = []
        for header in headers:
            for name in header.entries:
                first = self.owner.setdefault(name, header)
                if first is not header:
                    line = f"{name}: in {first.path.name} and in {header.path.name}"
                    (copies if _same(first, header, name) else twice).append(line)
        self.entries = {name: header.entries[name] for name, header in self.owner.items()}
        self.formats = {header.metadata.get("format", "") for header in headers}
        self.faults += [(code, lines) for code, lines in (("twice", twice), ("copies", copies)) if lines]
        told = {name: header.path.name for name, header in self.owner.items()}
        if index is not None and index != told:
            lies = [f"{name}: {index.get(name, 'not in the index')}, lies in {told.get(name, 'no file')}"
                    for name in sorted(index.keys() | told.keys()) if index.get(name) != told.get(name)]  # fmt: skip
            self.faults.append(("index", lies))

    def raw(self, name: str) -> bytes:
        """The bytes of one small tensor."""
        header = self.owner[name]
        begin, end = header.entries[name]["data_offsets"]
        with open(header.path, "rb") as file:
            file.seek(header.start + begin)
            return file.read(end - begin)

    def read(self, name: str) -> torch.Tensor:
        from edgeft.models.checkpoint import TensorFile

        return TensorFile(self.owner[name].path).read(name)


def _same(one: Header, other: Header, name: str) -> bool:
    ours, theirs = one.entries[name], other.entries[name]
    if any(ours[key] != theirs[key] for key in ("dtype", "shape")):
        return False
    return all(a == b for a, b in zip(one.blocks(name), other.blocks(name), strict=True))


def open_safe(listing: Listing, form: Form) -> SafeStore:
    """The files that an index names and those that lie there; one file goes before an index, as in transformers."""
    folder, found = listing.folder, [folder_name for folder_name in listing.find(form.marks, form.unless)]
    if "model.safetensors" in found:
        return SafeStore(folder, [folder / "model.safetensors"], None)
    shards = [name for name in found if name.endswith(".safetensors")]
    index = shard_map(folder / INDEX) if INDEX in found else None
    named = sorted(set(index.values())) if index is not None else []
    missing = [name for name in named if name not in shards]
    total = {int(match[1]) for name in shards if (match := re.search(r"-of-(\d+)\.safetensors$", name))}
    if index is None and total and len(shards) < max(total):
        missing = [f"{max(total) - len(shards)} of {max(total)}"]
    if missing:
        raise BadInput(folder, "shards are missing: " + ", ".join(missing), "copy or download the whole checkpoint")
    store = SafeStore(folder, [folder / name for name in shards], index)
    if index is None and form.name == "safetensors":
        store.faults.append(("no index", [INDEX]))
    return store


class PickleStore:
    """Files of torch.save, one or several."""

    def __init__(self, paths: list[Path]) -> None:
        self.files, self.faults = paths, list[tuple[str, list[str]]]()
        self.tensors: dict[str, Stored] = {}
        for path in paths:
            self.tensors |= state_dict(Reader(path).tree)
        if not self.tensors:
            raise BadInput(paths[0], "holds no tensors by name", "give the file that has the model's state_dict")
        self.entries = {name: stored.entry for name, stored in self.tensors.items() if not OPTIMIZER.search(name)}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].read()

    def shared(self, name: str, other: str) -> bool:
        """Whether two names are one tensor in the file."""
        return self.tensors[name] == self.tensors[other] and self.tensors[name].reader is self.tensors[other].reader


def open_pickle(listing: Listing, form: Form) -> PickleStore:
    folder, found = listing.folder, listing.find(form.marks, form.unless)
    index = next((name for name in found if name.endswith(".index.json")), None)
    if index is not None and "pytorch_model.bin" not in found:
        named = sorted(set(shard_map(folder / index).values()))
        missing = [name for name in named if name not in found]
        if missing:
            raise BadInput(folder, "shards are missing: " + ", ".join(missing), AGAIN)
        return PickleStore([folder / name for name in named])
    files = [name for name in found if not name.endswith(".json")]
    whole = [name for name in files if name == "pytorch_model.bin"] or files
    if form.name == "named pickle" and len(whole) > 1:
        raise BadInput(
            folder, f"holds {len(whole)} pickled files: {', '.join(whole[:4])}", "leave the model's alone there"
        )
    return PickleStore([folder / name for name in whole])


class DcpStore:
    """torch.distributed.checkpoint: `.metadata` says which piece of which tensor lies where in which file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults = folder, list[tuple[str, list[str]]]()
        path = folder / ".metadata"
        if not path.is_file():
            raise BadInput(folder, ".metadata is missing: nothing else says what the shards hold", AGAIN)
        with open(path, "rb") as file:
            told = _state(unpickle(file, None, path))
        keys, tensors = told.get("planner_data") or {}, told.get("state_dict_metadata") or {}
        self.names: dict[str, str] = {}  # in the model: in the files
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[str, list[tuple[tuple[int, ...], dict[str, Any]]]] = {}
        self.entries: dict[str, Entry] = {}
        for fqn, kept in tensors.items():
            if "chunks" in _state(kept) and not OPTIMIZER.search(fqn):
                self._add(fqn, _model_name(fqn, keys), _state(kept))
        for index, info in (told.get("storage_data") or {}).items():
            where = _state(index)
            self.pieces.setdefault(where["fqn"], []).append((tuple(where.get("offset") or ()), _state(info)))
        self.files = [path, *sorted({folder / str(info["relative_path"]) for name in self.names.values()
                                     for _, info in self.pieces.get(name, ())})]  # fmt: skip
        missing = [file.name for file in self.files if not file.is_file() or file.parent != folder]
        if missing:
            raise BadInput(folder, "shards are missing: " + ", ".join(missing), AGAIN)

    def _add(self, fqn: str, name: str, kept: dict[str, Any]) -> None:
        properties, shape = kept["properties"].state, tuple(kept["size"])
        dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        self.names[name], self.shapes[fqn] = fqn, shape
        self.entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, size]}

    def read(self, name: str) -> torch.Tensor:
        import torch

        fqn = self.names[name]
        out, filled = None, 0
        for offset, info in self.pieces.get(fqn, ()):
            if info.get("transform_descriptors"):
                raise BadInput(self.folder, f"{name} is compressed: {info['transform_descriptors']}", "save it plain")
            piece = self._piece(info, self.shapes[fqn])
            if out is None:
                out = torch.empty(self.shapes[fqn], dtype=piece.dtype)
            place = [(at, at + n) for at, n in zip(offset or (0,) * piece.ndim, piece.shape, strict=True)]
            if any(end > size for (_, end), size in zip(place, out.shape, strict=True)):
                raise BadInput(self.folder, f"{name}: a piece lies beyond its shape {tuple(out.shape)}", AGAIN)
            out[tuple(slice(*each) for each in place)] = piece
            filled += piece.numel()
        if out is None or filled < out.numel():
            raise BadInput(self.folder, f"{name} is not whole in the shards", AGAIN)
        return out

    def _piece(self, info: dict[str, Any], whole: tuple[int, ...]) -> torch.Tensor:
        """One piece of a tensor, which torch reads without running anything. Raises BadInput for a damaged one."""
        import torch

        path = self.folder / str(info["relative_path"])
        try:
            with open(path, "rb") as file:
                file.seek(info["offset"])
                piece = torch.load(io.BytesIO(file.read(info["length"])), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, TypeError, pickle.UnpicklingError) as problem:
            raise BadInput(path, f"cannot be read: {str(problem).splitlines()[0]:.200}", AGAIN) from None
        if not isinstance(piece, torch.Tensor) or piece.ndim != len(whole):
            raise BadInput(path, "holds something else than its .metadata says", AGAIN)
        return piece


def _state(stub: Any) -> dict[str, Any]:
    state = stub.state if isinstance(stub, Stub) else None
    return state if isinstance(state, dict) else {}


def _model_name(fqn: str, keys: Any) -> str:
    """A tensor's key in the model's own state_dict: the last of the keys that led to it."""
    path = keys.get(fqn) if isinstance(keys, dict) else None
    return str(path[-1]) if isinstance(path, tuple | list) and path and isinstance(path[-1], str) else fqn


def open_dcp(listing: Listing, form: Form) -> DcpStore:
    """Of several folders with shards that of the model, not that of its optimizer."""
    places = {name.rpartition("/")[0] for name in listing.find(form.marks)}
    own = sorted((place for place in places if "optim" not in place), key=lambda place: ("model" not in place, place))
    if not own:
        raise BadInput(listing.folder, "holds shards of an optimizer alone", "give the folder of the model's shards")
    return DcpStore(listing.folder / own[0])


OPEN: dict[str, Callable[[Listing, Form], Store]] = {
    "safetensors": open_safe,
    "pickle": open_pickle,
    "dcp": open_dcp,
    "zero": lambda listing, form: ZeroStore.open(listing, form),
}


def weights_of(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Without the buffers that a model makes for itself."""
    return {name: entry for name, entry in entries.items() if not is_buffer(name, tuple(entry["shape"]))}


def small_json(data: bytes) -> dict[str, Any]:
    """What a quantiser wrote as JSON into a tensor of bytes."""
    try:
        value = json.loads(data.decode("utf-8"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def empty_tensors(entries: dict[str, Entry]) -> Iterator[str]:
    """Tensors of no elements: what ZeRO's third stage leaves where the weights were never gathered."""
    return (f"{name}: {tuple(entry['shape'])}" for name, entry in entries.items() if not math.prod(entry["shape"]))
