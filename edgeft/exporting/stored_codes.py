"""Does a bundle hold the weights that were merged, rounded by its target's rule: code for code, scale for scale?

Read out of model.onnx itself, and with it the numbers that the graph computes with (graph_constants.py). What the
builder of ONNX Runtime GenAI names as its matmuls and tables is compared; what it computes with them is for the rung
that runs it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from edgeft.errors import BadInput
from edgeft.exporting.graph_constants import BLOCKS, JOINED, constant_problems
from edgeft.models.checkpoint import Checkpoint
from edgeft.models.headers import EMBEDDINGS, HEADS, blocks
from edgeft.models.metrics import Rung
from edgeft.targets.grid import Grid
from edgeft.targets.onnx_file import HEAD, MODEL
from edgeft.targets.rounding import grid_of, promoted_modules
from edgeft.targets.runtimes import runtime_of
from edgeft.targets.target import Target, to_nearest

PLACE = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)/MatMul(?:_Q\d)?")
TABLE = "/model/embed_tokens/"
SHOWN = 4
READ = {"codes": "codes", "scales": "scale", "zero points": "zero"}  # in this order: as a node reads them


class Held(NamedTuple):
    """One matrix of a bundle: the checkpoint's tensors whose rows it holds, and its initializers."""

    place: str
    names: tuple[str, ...]
    inputs: tuple[str, ...]
    bits: int
    transposed: bool


def stored_rung(bundle: Path, merged: Path, target: Target, *, tied: bool) -> Rung | None:
    """Every matrix of a bundle against its rounding, and the graph's numbers; None for a runtime with its own format.

    Calibrated ones are left to the rungs that run the bundle: their codes depend on rows, not on the weight alone.
    Raises BadInput for a bundle that cannot be read.
    """
    if not runtime_of(target).graph_is_read or target.method != "rtn":
        return None
    numbers, wrong_numbers = constant_problems(GraphFile(bundle), merged)
    weights, chosen = Checkpoint(merged), target.calibration != "none"
    target = to_nearest(target)
    promoted = promoted_modules(list(weights.owner), target) if target.weight_bits == 4 else set()
    file = GraphFile(bundle)
    problems, names = [], set()
    for held in file.matrices(weights, tied):
        if chosen and PLACE.match(held.place):
            continue
        names |= set(held.names)
        problem = _problem(file, held, weights, target, tied, promoted)
        problems += [f"{held.place}: {problem}"] if problem else []
    problems += wrong_numbers
    wrong = len(problems)
    left = sum(name not in names and len(weights.shape(name)) == 2 for name in weights.owner)
    rest = f"; {left} matrices are calibrated" if chosen else f"; {left} matrices go by other names there"
    return Rung(
        name="stored",
        against="merged",
        compared=f"{len(names)} matrices and {numbers} constants of {MODEL}{rest if left else ''}",
        tolerance="code for code and scale for scale" if target.weight_bits < 16 else "value for value",
        tensors=len(names),
        problems=tuple(problems[:SHOWN] + ([f"and {wrong - SHOWN} more"] if wrong > SHOWN else [])),
    )


class GraphFile:
    """model.onnx and its weights, which stay in their file."""

    def __init__(self, folder: Path) -> None:
        import onnx

        self.folder = folder
        try:
            graph = onnx.load(str(folder / MODEL), load_external_data=False).graph
        except Exception as problem:  # whatever protobuf raises for a damaged file
            raise BadInput(folder / MODEL, f"cannot be read: {problem}") from None
        self.nodes = list(graph.node)
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.behind = {  # a name that a cast or a transposition leads to: the initializer's
            node.output[0]: node.input[0] for node in self.nodes if node.op_type in ("Cast", "Transpose", "Reshape")
        }

    def read(self, name: str) -> numpy.ndarray[Any, Any]:
        """An initializer's values, as pages of its file; of 4 bits two in a byte, as they lie there."""
        from onnx import TensorProto, helper

        tensor = self.tensors[name if name in self.tensors else self.behind[name]]
        halves = tensor.data_type in (TensorProto.UINT4, TensorProto.INT4)
        kind = numpy.dtype(numpy.uint8) if halves else helper.tensor_dtype_to_np_dtype(tensor.data_type)
        external = {entry.key: entry.value for entry in tensor.external_data}
        values: numpy.ndarray[Any, Any]
        if int(external.get("length", 0)):
            path, count = self.folder / Path(external["location"]).name, int(external["length"]) // kind.itemsize
            values = numpy.memmap(path, kind, "r", int(external.get("offset", 0)), (count,))
        else:
            values = numpy.frombuffer(tensor.raw_data, dtype=kind)
        return values.reshape(tensor.dims[0], -1) if halves else values.reshape(tuple(tensor.dims))

    def matrices(self, weights: Checkpoint, tied: bool) -> Iterator[Held]:
        """The matrices whose place in the checkpoint is known by name."""
        for node in self.nodes:
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            quantised = node.op_type in ("MatMulNBits", "GatherBlockQuantized")
            if node.op_type in ("MatMul", "MatMulNBits"):
                names, inputs = _of_matmul(node.name, weights, tied), tuple(node.input[1:])
            elif node.name.startswith(TABLE) and node.op_type.startswith("Gather"):
                names = _ending(weights, EMBEDDINGS)
                inputs = (node.input[0], *node.input[2:])
                if tied or len(names) != 1:  # the head's own, through a reshape
                    continue
            else:
                continue
            known = bool(inputs) and (inputs[0] in self.tensors or self.behind.get(inputs[0]) in self.tensors)
            if names and known:
                bits = attributes.get("bits", 4) if quantised else 0
                yield Held(node.name, names, inputs, bits, not quantised and node.op_type == "MatMul")


def _of_matmul(node: str, weights: Checkpoint, tied: bool) -> tuple[str, ...]:
    """The checkpoint's tensors of a matmul, in the order of its outputs; () where the names do not say."""
    if node.startswith(HEAD):
        found = _ending(weights, HEADS)
        return found or (_ending(weights, EMBEDDINGS) if tied else ())
    match = PLACE.fullmatch(node)
    if match is None:
        return ()
    layer, block, leaf = match.groups()
    whole = f"layers.{layer}.{BLOCKS[block]}.{leaf}.weight"
    names = _ending(weights, (whole,))
    if not names and leaf in JOINED:
        parts = [_ending(weights, (whole.replace(leaf, part),)) for part in JOINED[leaf]]
        names = tuple(name for part in parts for name in part) if all(len(part) == 1 for part in parts) else ()
    return names


def _ending(weights: Checkpoint, ends: tuple[str, ...]) -> tuple[str, ...]:
    found = tuple(name for name in weights.owner if name.endswith(ends))
    return found if len(found) == 1 else ()


def _problem(
    file: GraphFile, held: Held, weights: Checkpoint, target: Target, tied: bool, promoted: set[str]
) -> str:  # fmt: skip
    """What is wrong with one matrix of a bundle, or nothing."""
    if not held.bits and held.transposed and target.weight_bits < 16:
        return f"is not rounded, the target has {target.weight_bits} bits"
    if not held.bits:
        return _values_differ(file, held, weights, half=target.weight_bits == 16)
    grid = grid_of(held.names[0], tuple(weights.shape(held.names[0])), target, tied, promoted)
    if grid is None or grid.bits != held.bits:
        return f"has {held.bits} bits, the target {grid.bits if grid else 'none'}"
    return _codes_differ(file, held, weights, grid)


def _shape(weights: Checkpoint, names: Sequence[str]) -> tuple[int, int]:
    """Of the matrix whose rows lie in these tensors."""
    return sum(weights.shape(name)[0] for name in names), weights.shape(names[0])[1]


def _parts(weights: Checkpoint, names: Sequence[str]) -> Iterator[tuple[slice, torch.Tensor]]:
    """(which rows, their values in fp32) of that matrix, a few at a time."""
    first = 0
    for name in names:
        for part in blocks(weights.shape(name)):
            yield slice(first + part.start, first + part.stop), weights.read(name, part).float()
        first += weights.shape(name)[0]


def _values_differ(file: GraphFile, held: Held, weights: Checkpoint, *, half: bool) -> str:
    """How many values of a matrix that is not rounded are not the checkpoint's."""
    values, shape, wrong = file.read(held.inputs[0]), _shape(weights, held.names), 0
    if values.shape != (shape[::-1] if held.transposed else shape):
        return f"shape {values.shape}, merged {shape[::-1] if held.transposed else shape}"
    rows = values.T if held.transposed else values
    for part, expected in _parts(weights, held.names):
        given = torch.from_numpy(numpy.array(rows[part]))
        wrong += int((given != (expected.half() if half else expected)).sum())
    return f"{wrong} of {values.size} values are others" if wrong else ""


def _codes_differ(file: GraphFile, held: Held, weights: Checkpoint, grid: Grid) -> str:
    """Which of codes, scales and zero points are not the rule's."""
    rows = _shape(weights, held.names)[0]
    stored = [file.read(name) for name in held.inputs if name]
    if bad := [name for name, each in zip(held.inputs, stored, strict=False) if each.size % rows]:
        return f"{', '.join(bad)}: not for {rows} rows"
    parts = dict(zip(READ, (each.reshape(rows, -1) for each in stored), strict=False))
    wrong, total = Counter[str](), Counter[str]()
    for which, matrix in _parts(weights, held.names):
        expected = grid.encode(matrix)
        for what, part in parts.items():
            wanted: torch.Tensor = getattr(expected, READ[what])
            found = part[which] if what == "scales" else _unpacked(part[which], grid.bits)[:, : wanted.shape[1]]
            if found.shape != wanted.shape:
                return f"{what} of {found.shape[1]} to a row, expected {wanted.shape[1]}"
            wrong[what] += int((torch.from_numpy(found.astype(numpy.float32)) != wanted).sum())
            total[what] += wanted.numel()
    return ", ".join(f"{wrong[what]} of {total[what]} {what} are others" for what in parts if wrong[what])


def _unpacked(packed: numpy.ndarray[Any, Any], bits: int) -> numpy.ndarray[Any, Any]:
    """A code in each place of some rows: two of 4 bits lie in a byte, the lower half first."""
    packed = packed.view(numpy.uint8) if packed.dtype.kind == "i" else packed
    return numpy.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1) if bits == 4 else packed
