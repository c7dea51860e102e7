"""Which kind of grid does a target keep each tensor of a checkpoint on? By its settings alone, without torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple

from edgeft.errors import BadInput
from edgeft.models.headers import EMBEDDINGS, HEADS
from edgeft.settings.job import Rounding
from edgeft.targets.matrices import GGUF_TYPES
from edgeft.targets.runtimes import runtime_of

# rtn: ONNX Runtime's neural_compressor port; mlas: its C++ kernel; gather: its rule for embedding tables; q: ggml's
Method = Literal["rtn", "mlas", "gather", "q_0", "q_1", "q8_0"]
POSITIONS = ("wpe.weight", "embed_positions.weight")  # tables of positions are added, not multiplied
NEAREST = "choose ort-int4, ort-int8 or ort-fp32"


class Kind(NamedTuple):
    """What makes a `grid.Grid`."""

    bits: Literal[4, 5, 8]
    block_size: int
    symmetric: bool
    method: Method


# ggml's types that are made of blocks of 32, by the names that GGUF gives them
GGML_KINDS: dict[str, Kind] = {
    "Q4_0": Kind(4, 32, True, "q_0"), "Q4_1": Kind(4, 32, False, "q_1"), "Q8_0": Kind(8, 32, True, "q8_0"),
    "Q5_0": Kind(5, 32, True, "q_0"), "Q5_1": Kind(5, 32, False, "q_1"),
}  # fmt: skip


def unknown_rounding(target: Rounding) -> str:
    """Why what a target makes of a weight does not follow from the weight alone, nothing where it does."""
    if target.calibration != "none":
        return "chooses its codes on training rows: what it makes of a weight is not known from the weight alone"
    if runtime_of(target).grids is None or target.method != "rtn" or target.weight_bits == 16:
        return "rounds in a way that is not computed here"
    return ""


def kind_of(
    name: str, shape: tuple[int, ...], target: Rounding, tied: bool, promoted: Collection[str] | None = None
) -> Kind | None:
    """The kind of grid that the export to `target` puts this tensor of a checkpoint on; None: kept in 16 or 32 bits.

    As `nbits` and `gguf_file` write: every matrix product, and tables that share the
    head's weights or that the target wants in few bits. `promoted` are the modules with 8 bits of a target that mixes
    them, by their names in the checkpoint. Raises BadInput for a target whose rounding only its runtime knows.
    """
    problem = unknown_rounding(target)
    if not problem and (target.mixed_layers or target.eight_bit) and promoted is None:
        problem = "rounds in a way that is not computed here"
    if problem:
        raise BadInput(f"target {target.name}", problem, NEAREST)
    if target.weight_bits == 32 or len(shape) != 2 or name.endswith(POSITIONS):
        return None
    of_table = name.endswith(EMBEDDINGS) and not tied
    bits: int = target.weight_bits
    if of_table:
        bits = target.embedding_bits
    elif name.endswith((*HEADS, *EMBEDDINGS)):
        bits = target.head_bits
    elif name.removesuffix(".weight") in (promoted or ()):
        bits = 8
    if runtime_of(target).grids == "ort":
        return ort_kind(target, bits, tied, table=of_table)
    return _ggml_kind(target, bits, shape)


def ort_kind(target: Rounding, bits: int, tied: bool, *, table: bool) -> Kind | None:
    """Of a matrix product, or of an embedding `table` that is not the head; None: kept in fp32.

    The rules are those of ONNX Runtime's quantiser, which knows one for graphs with an embedding that is rounded.
    """
    separate = not tied and target.embedding_bits == 4
    if table and not separate:
        return None
    method: Method = "gather" if table else "mlas" if separate else "rtn"
    assert bits in (4, 8)  # Target refuses a head of 32 bits on a body of fewer
    return Kind(8 if bits == 8 else 4, target.block_size, target.symmetric, method)


def _ggml_kind(target: Rounding, bits: int, shape: tuple[int, ...]) -> Kind | None:
    """None for rows that blocks of 32 do not divide: llama.cpp keeps them in fp16."""
    if bits >= 16 or shape[-1] % 32:
        return None
    return GGML_KINDS[GGUF_TYPES[bits, target.symmetric or bits == 8]]
