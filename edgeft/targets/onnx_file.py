"""How is a graph read without its weights, and its data file written again tensor by tensor? No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from edgeft.documents import saving
from edgeft.models.headers import BLOCK_BYTES

MODEL = "model.onnx"
DATA = f"{MODEL}.data"
HEAD = "/lm_head/MatMul"  # how the builder's name of the head's matmul begins
ALIGNED = 64  # bytes, of each tensor in its file

Values = Any  # a numpy array of fp32 on a file


class Stored(NamedTuple):
    """A tensor as it will lie in the data file; its bytes come in pieces."""

    name: str
    type: int
    dims: tuple[int, ...]
    pieces: Iterable[bytes]


def read_graph(folder: Path) -> Any:
    """The ONNX model of a folder without its weights."""
    import onnx

    return onnx.load(str(folder / MODEL), load_external_data=False)


def write_graph(folder: Path, model: Any) -> None:
    """Put the graph in its place; its data file stays."""
    with saving(folder):
        (folder / MODEL).write_bytes(model.SerializeToString(deterministic=True))


def forget(graph: Any, names: set[str]) -> None:
    """Leave out what the graph says of the shapes of values that are no more."""
    kept = [value for value in graph.value_info if value.name not in names]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def rewrite(folder: Path, model: Any, change: Callable[[Any, Values], list[Stored] | None]) -> None:
    """Write model.onnx and its data file again, each tensor of the file as `change` has it; None: as it is.

    `change` is given the tensor and its values, of an fp32 one, as an array on the file.
    """
    from onnx import TensorProto

    data, new = folder / DATA, folder / f"{DATA}.new"
    kept = []
    with saving(folder), open(new, "wb") as out:
        for tensor in model.graph.initializer:
            if not tensor.external_data:
                kept.append(tensor)
                continue
            external = {entry.key: entry.value for entry in tensor.external_data}
            first, length = int(external.get("offset", 0)), int(external["length"])
            values = None
            if tensor.data_type == TensorProto.FLOAT:
                values = numpy.memmap(data, "<f4", "r", first, tuple(tensor.dims))
            made = change(tensor, values)
            if made is None:
                made = [Stored(tensor.name, tensor.data_type, tuple(tensor.dims), _piecewise(data, first, length))]
            kept += [_write(out, data.name, each) for each in made]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
    write_graph(folder, model)
    with saving(folder):
        new.replace(data)


def _write(out: Any, location: str, stored: Stored) -> Any:
    """A tensor's bytes at the end of a file, and the tensor that points to them."""
    from onnx import TensorProto

    out.write(b"\0" * (-out.tell() % ALIGNED))
    first = out.tell()
    for piece in stored.pieces:
        out.write(piece)
    tensor = TensorProto(name=stored.name, data_type=stored.type, dims=stored.dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", first), ("length", out.tell() - first)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def read_vector(folder: Path, tensor: Any) -> Any:
    """The fp32 values of a small tensor, which lies in the graph or in its data file."""
    if not tensor.external_data:
        return numpy.frombuffer(tensor.raw_data, "<f4")
    external = {entry.key: entry.value for entry in tensor.external_data}
    first, length = int(external.get("offset", 0)), int(external["length"])
    return numpy.fromfile(folder / external["location"], "<f4", length // 4, offset=first)


def _piecewise(path: Path, first: int, length: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(first)
        for at in range(0, length, BLOCK_BYTES):
            yield file.read(min(BLOCK_BYTES, length - at))
