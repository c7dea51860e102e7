"""How do the matrices of a builder's fp32 graph become a runtime's blocks of codes, one matrix at a time?

onnxruntime-genai's builder writes a graph in fp32 tensor by tensor; its own quantiser holds the whole graph at once,
several times. Here a matrix is read from the builder's file, rounded on its target's grid, or given its calibrated
codes, and written; its node becomes a MatMulNBits or a GatherBlockQuantized. Nodes and bytes are those that the
builder's quantiser makes (tests/targets/test_nbits.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

from edgeft.errors import BadInput, EdgeftError
from edgeft.models.headers import blocks
from edgeft.targets.grid import Encoded, Grid, joined
from edgeft.targets.onnx_file import HEAD, Stored, Values, forget, read_graph, rewrite
from edgeft.targets.rounding import ort_grid

if TYPE_CHECKING:
    from edgeft.targets.target import Target

DOMAIN = "com.microsoft"

Known = Mapping[str, Callable[[], Encoded]]  # calibrated codes by the builder's name of a matmul, without "/MatMul"


class Matrix(NamedTuple):
    """An initializer of the graph that is rounded: by which rule, and whose codes are known."""

    grid: Grid
    table: bool  # (words, width), as embeddings are looked up; otherwise (inputs, outputs)
    codes: Callable[[], Encoded] | None


def quantise(folder: Path, target: Target, promoted: Collection[str] = (), known: Known | None = None) -> None:
    """Round the graph in `folder` on the grids of `target`; `promoted`: names of the matmuls that get 8 bits.

    `known` are codes that were calibrated: a matmul of the layers then takes those, and it is an error where some lack,
    fit none or have another size. Raises EdgeftError for them, BadInput for weights in a node that is unknown here.
    """
    model = read_graph(folder)
    edit = _Edit(model.graph, target, promoted, known)
    nodes = [made for node in model.graph.node for made in edit.node(node)]
    if known is not None and edit.unused:
        raise EdgeftError(folder, f"the builder's graph has no {sorted(edit.unused)[0]}")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    forget(model.graph, edit.forgotten)
    rewrite(folder, model, edit.tensor)


class _Edit:
    """The graph's nodes and tensors as they become; matrices are found by the nodes that read them."""

    def __init__(self, graph: Any, target: Target, promoted: Collection[str], known: Known | None) -> None:
        self.target, self.promoted, self.known = target, set(promoted), known
        self.shapes = {each.name: tuple(each.dims) for each in graph.initializer if each.external_data}
        self.tables = {each.output[0]: each for each in graph.node if each.op_type == "Transpose"}
        self.tied = any(each.input[0] in self.shapes for each in self.tables.values())
        self.matrices: dict[str, Matrix] = {}
        self.unused = set(known or ())
        self.forgotten: set[str] = set()  # values that are no more
        for node in graph.node:
            if node.op_type == "MatMul" and node.input[1] in self.shapes:
                codes = self._codes(node.name)
                self.matrices[node.input[1]] = Matrix(self.grid(node.name), False, codes)

    def grid(self, matmul: str) -> Grid:
        """Of a matrix product, by its name."""
        bits = 8 if matmul in self.promoted else self.target.weight_bits
        grid = ort_grid(self.target, self.target.head_bits if matmul.startswith(HEAD) else bits, self.tied, table=False)
        assert grid is not None
        return grid

    def _codes(self, matmul: str) -> Callable[[], Encoded] | None:
        """What was calibrated for a matmul of the layers. Raises EdgeftError where that lacks."""
        if self.known is None or "/layers." not in matmul:
            return None
        place = matmul.removesuffix("/MatMul")
        parts = [place]
        if place.endswith("/qkv_proj") and place not in self.known:  # three that the builder joins
            parts = [f"{place.removesuffix('qkv_proj')}{part}_proj" for part in "qkv"]
        for part in parts:
            if part not in self.known:
                raise EdgeftError(matmul, f"there are no codes for {part}")
        self.unused -= set(parts)
        return functools.partial(_joined, [self.known[part] for part in parts])

    def node(self, node: Any) -> list[Any]:
        """What takes the place of a node."""
        if node.op_type == "MatMul" and node.input[1] in self.matrices:
            return [self._matmul(node)]
        if node.op_type == "Transpose" and node.input[0] in self.matrices:
            return []  # the table is looked up in the head's codes
        if node.op_type == "Gather" and node.input[0] in self.tables:
            return self._tied(node, self.tables[node.input[0]].input[0])
        if node.op_type == "Gather" and len(self.shapes.get(node.input[0], ())) == 2:
            return [self._table(node)]
        if node.op_type in ("MoE", "Gemm", "Conv") and set(node.input) & set(self.shapes):
            raise BadInput(node.name, f"its weights are read by a {node.op_type}, which is not rounded here")
        return [node]

    def _matmul(self, node: Any) -> Any:
        from onnx import helper

        grid, (inputs, outputs) = self.matrices[node.input[1]].grid, self.shapes[node.input[1]]
        level: dict[str, Any] = {"accuracy_level": self.target.accuracy_level} if self.target.accuracy_level else {}
        return helper.make_node(
            "MatMulNBits", [node.input[0], *_names(node.input[1], grid)], list(node.output),
            name=f"{node.name}_Q{grid.bits}", domain=DOMAIN, K=inputs, N=outputs, bits=grid.bits,
            block_size=grid.block_size, **level,
        )  # fmt: skip

    def _tied(self, node: Any, head: str) -> list[Any]:
        """A lookup in the head's codes, whose last blocks are filled with zeros that a slice takes off."""
        from onnx import helper

        grid, (width, words) = self.matrices[head].grid, self.shapes[head]
        base = node.name.rpartition("/")[0]
        padded = -(-width // grid.block_size) * grid.block_size
        codes, *rest = _names(head, grid)
        flat, found = f"{base}/Reshape/output_0", node.output[0] if padded == width else f"{base}/padded"
        self.forgotten |= {node.input[0]}
        shape = _constant(f"{base}/Reshape/shape", [words, padded * grid.bits // 8])
        made = [
            shape,
            helper.make_node("Reshape", [codes, shape.output[0]], [flat], name=f"{base}/Reshape"),
            helper.make_node(
                "GatherBlockQuantized", [flat, node.input[1], *rest], [found], name=f"{base}/GatherBlockQuantized",
                domain=DOMAIN, bits=grid.bits, block_size=grid.block_size, gather_axis=0, quantize_axis=1,
            ),
        ]  # fmt: skip
        if padded != width:
            bounds = [_constant(f"{base}/Slice/{name}", [at]) for name, at in (("from", 0), ("to", width), ("of", -1))]
            inputs = [found, *(each.output[0] for each in bounds)]
            made += [*bounds, helper.make_node("Slice", inputs, [node.output[0]], name=f"{base}/Slice")]
        return made

    def _table(self, node: Any) -> Any:
        """A lookup in an embedding of its own, where the target rounds it."""
        from onnx import helper

        grid = ort_grid(self.target, self.target.embedding_bits, self.tied, table=True)
        if grid is None:
            return node
        self.matrices[node.input[0]] = Matrix(grid, True, None)
        codes, *rest = _names(node.input[0], grid)
        return helper.make_node(
            "GatherBlockQuantized", [codes, node.input[1], *rest], list(node.output), name=f"{node.name}_Q{grid.bits}",
            domain=DOMAIN, block_size=grid.block_size, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def tensor(self, tensor: Any, values: Values) -> list[Stored] | None:
        """What an initializer becomes; None: it stays."""
        matrix = self.matrices.get(tensor.name)
        if matrix is None:
            return None
        return _table_of(tensor.name, matrix, values) if matrix.table else _blocks_of(tensor.name, matrix, values)


def _names(weight: str, grid: Grid) -> list[str]:
    """Codes, scales and, where blocks have them, zero points of a weight."""
    names = [f"{weight}_Q{grid.bits}", f"{weight}_scales", f"{weight}_zero_points"]
    return names[: 2 if grid.symmetric else 3]


def _blocks_of(name: str, matrix: Matrix, values: Values) -> list[Stored]:
    """What MatMulNBits reads: codes (outputs, blocks, bytes of a block), scales and zero points (outputs, blocks)."""
    from onnx import TensorProto

    grid, (inputs, outputs) = matrix.grid, values.shape
    count = -(-inputs // grid.block_size)
    scales, zeros = list[bytes](), list[bytes]()

    def codes() -> Iterator[bytes]:
        for part in _encoded(matrix, values.T):
            made, scale, zero = packed(part)
            scales.append(scale)
            zeros.append(zero)
            yield made

    stored = (  # in this order: scales and zero points are there when all codes have been written
        (TensorProto.UINT8, (outputs, count, grid.block_size * grid.bits // 8), codes()),
        (TensorProto.FLOAT, (outputs, count), scales),
        (TensorProto.UINT8, (outputs, -(-count * grid.bits // 8)), zeros),
    )
    return [Stored(each, *rest) for each, rest in zip(_names(name, grid), stored, strict=False)]


def packed(encoded: Encoded) -> tuple[bytes, bytes, bytes]:
    """What a MatMulNBits node reads: codes in blocks, fp32 scales, zero points; of 4 bits the first of two is lower."""
    columns, count = encoded.codes.shape[1], encoded.scale.shape[1]
    zero: Any = encoded.zero.numpy().astype(numpy.uint8)
    codes: Any = numpy.repeat(zero, encoded.block_size, axis=1)  # a last block that is not full is filled with zeros
    codes[:, :columns] = encoded.codes.numpy().astype(numpy.uint8)
    scale = encoded.scale.numpy().astype("<f4")
    if encoded.bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
        zero = numpy.pad(zero, ((0, 0), (0, count % 2)))
        zero = zero[:, ::2] | zero[:, 1::2] << 4
    return codes.tobytes(), scale.tobytes(), zero.tobytes()


def _table_of(name: str, matrix: Matrix, values: Values) -> list[Stored]:
    """What GatherBlockQuantized reads of 4 bits: codes (words, width), scales and zero points (words, blocks)."""
    from onnx import TensorProto

    words, width = values.shape
    count = -(-width // matrix.grid.block_size)
    scales, kept = list[bytes](), list[Any]()

    def codes() -> Iterator[bytes]:
        for part in _encoded(matrix, values):
            scales.append(part.scale.numpy().astype("<f4").tobytes())
            kept.append(part.zero.numpy().astype(numpy.uint8))
            yield _nibbles(part.codes.numpy().astype(numpy.uint8))

    def zeros() -> Iterator[bytes]:
        yield _nibbles(numpy.concatenate(kept))

    stored = (
        (TensorProto.UINT4, (words, width), codes()), (TensorProto.FLOAT, (words, count), scales),
        (TensorProto.UINT4, (words, count), zeros()),
    )  # fmt: skip
    return [Stored(each, *rest) for each, rest in zip(_names(name, matrix.grid), stored, strict=False)]


def _nibbles(values: Any) -> bytes:
    """Two values in a byte, the first the lower half, in the order in which they lie."""
    flat = values.reshape(-1)
    flat = numpy.pad(flat, (0, len(flat) % 2))
    return (flat[::2] | flat[1::2] << 4).tobytes()  # type: ignore[no-any-return]


def _encoded(matrix: Matrix, rows: Values) -> Iterator[Encoded]:
    """The codes of a matrix (outputs, inputs), some outputs at a time. Raises EdgeftError for codes of another size."""
    if matrix.codes is None:
        for part in blocks(rows.shape):
            yield matrix.grid.encode(torch.from_numpy(numpy.array(rows[part], order="C")))
        return
    whole = matrix.codes()
    if tuple(whole.codes.shape) != rows.shape or whole.bits != matrix.grid.bits:
        given = f"{whole.bits} bits of {tuple(whole.codes.shape)}"
        raise EdgeftError("codes", f"are {given}, the graph's matrix is {matrix.grid.bits} bits of {rows.shape}")
    yield whole


def _joined(parts: list[Callable[[], Encoded]]) -> Encoded:
    return joined([part() for part in parts])


def _constant(name: str, values: list[int]) -> Any:
    from onnx import TensorProto, helper

    tensor = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
    return helper.make_node("Constant", [], [name], name=f"{name}/node", value=tensor)
