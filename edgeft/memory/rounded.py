"""What do products hold whose weight is rounded each time? As `edgeft.engine.quantized_layers` computes them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from edgeft.memory.tape import Storage, Tape, Value
from edgeft.models.headers import blocks
from edgeft.models.spec import Linear, ModelSpec
from edgeft.settings.job import Rounding, Training
from edgeft.targets.kinds import Kind, Method, kind_of

if TYPE_CHECKING:
    from edgeft.memory.operations import Operations

ROUNDED_AT_ONCE = 2**16  # weights: what rounding them takes stays in a processor's cache
# what encoding and decoding hold at most, for each weight and each block, beside the weights (tests: counted)
HEIGHTS: dict[Method, tuple[int, int]] = {
    "rtn": (20, 12), "mlas": (21, 8), "q_0": (12, 12), "q_1": (12, 16), "q8_0": (21, 8),
}  # fmt: skip


def rows_at_once(columns: int) -> int:
    """How many rows of a weight are rounded at a time."""
    return max(1, ROUNDED_AT_ONCE // columns)


def rounding_bytes(kind: Kind, rows: int, columns: int, *, held: int, stored: int, adapted: bool) -> int:
    """The most that rounding a (rows, columns) weight holds beside it and its result.

    `held` and `stored` are bytes of a weight as training keeps it and as a merge writes it.
    """
    first = next(blocks((rows, columns)))
    together: int = first.stop - first.start
    block = together * columns
    sums = block * ((4 if held == 2 else 0) + 4) if adapted else 0  # W0 in fp32, and with its change
    copied = stored * block if stored < 4 or adapted else 0
    narrowing = copied + (4 * block if adapted and stored < 4 else 0)
    few = min(rows_at_once(columns), together)
    count = few * -(-columns // kind.block_size)
    each, per_block = HEIGHTS[kind.method]
    encoding = (4 * few * columns if stored < 4 else 0) + each * count * kind.block_size + per_block * count
    return max(sums, narrowing, copied + encoding)


def codes_bytes(kind: Kind, rows: int, columns: int) -> int:
    """What is kept of a rounded weight for the backward pass: a byte each, and fp32 numbers of each block."""
    return rows * columns + (12 if kind.method == "q_1" else 8) * rows * -(-columns // kind.block_size)


def decoding_bytes(kind: Kind, rows: int, columns: int) -> int:
    """The most that making the weight of its codes holds beside both."""
    few = min(rows_at_once(columns), rows)
    return 4 * few * (columns + -(-columns // kind.block_size) * kind.block_size)


@lru_cache(maxsize=64)
def matrix_kinds(spec: ModelSpec, target: Rounding) -> tuple[tuple[str, Kind], ...]:
    """The kind of grid of each projection of a layer; promoted ones count as the others."""
    found = [
        (linear.name, kind_of(f"{linear.name}.weight", (linear.out_features, linear.in_features), target,
                              spec.tie_word_embeddings, ()))
        for linear in spec.linears if linear.role != "other"
    ]  # fmt: skip
    return tuple((name, kind) for name, kind in found if kind is not None)


@lru_cache(maxsize=64)
def head_kind(spec: ModelSpec, target: Rounding) -> Kind | None:
    """The kind of grid of the output head."""
    name = "embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight"
    return kind_of(name, (spec.vocab_size, spec.hidden_size), target, spec.tie_word_embeddings, ())


def rounds(spec: ModelSpec, training: Training) -> tuple[tuple[tuple[str, Kind], ...], Kind | None, int, int]:
    """(kinds of the projections, of the head, bytes of a weight as it is kept, as it is stored)."""
    target = training.quantize_aware
    if target is None:
        return (), None, 4, 4
    held = 2 if training.base_precision in ("bf16", "fp16") and training.adapts else 4
    stored = 4 if training.stored_dtype == "float32" else 2
    return matrix_kinds(spec, target), head_kind(spec, target), held, stored


def rounded_product(operations: Operations, x: Value, linear: Linear, kind: Kind) -> Value:
    """A projection by its weight rounded, whose codes are kept where the backward pass needs it again."""
    e, inputs, outputs, way = operations.e, linear.in_features, linear.out_features, operations.way
    full, half = operations.full, operations.half
    if half and x.size == 4 * inputs:
        x = operations.narrowed(x)
    more = rounding_bytes(kind, outputs, inputs, held=way.held, stored=way.stored, adapted=not full)
    matrices = [operations.weight(0)] if full else [operations.weight(0), operations.weight(0)]
    biases = [operations.weight(0)] if linear.has_bias and operations.full_vectors else []

    def made(tape: Tape, more: int) -> Storage:
        matrix = Storage(tape, 1j * e * inputs * outputs)
        tape.heights.append(tape.live + 1j * more)
        return matrix

    def back(tape: Tape, kept: list[Storage], own: list[Storage], wanted: list[bool]) -> list[Storage | None]:
        into = None
        if wanted[0]:
            matrix = made(tape, decoding_bytes(kind, outputs, inputs))
            into = Storage(tape, e * inputs, viewed=True)
            del matrix
        if full:
            found = [Storage(tape, 1j * e * inputs * outputs)]
        else:
            found = [_factor(tape, e, way.rank, a, b) for a, b in ((inputs, outputs), (outputs, inputs))]
        if half:
            found = [Storage(tape, 2 * each.size) for each in found]
        return [into, *found, *(Storage(tape, 1j * e * outputs) for _ in biases)]

    tape, size = operations.tape, 1j * codes_bytes(kind, outputs, inputs)
    codes = [Value(Storage(tape, size), size)] if x.node else []
    matrix = made(tape, more)
    result = Storage(tape, e * outputs)  # a product says what it keeps when it is done
    del matrix, result
    return tape.run(e * outputs, [x, *matrices, *biases], [x, *codes], back)


def _factor(tape: Tape, e: int, rank: int, inner: int, outer: int) -> Storage:
    """The gradient of one factor, by what came through the other."""
    copy = Storage(tape, 1j * e * rank * inner) if e == 2 else None
    low = Storage(tape, e * rank)
    del copy
    found = Storage(tape, 1j * e * rank * outer)
    del low
    return found


def rounded_table(operations: Operations) -> Storage:
    """A head that trains, as the loss multiplies with it."""
    tape, spec, kind = operations.tape, operations.spec, operations.way.head
    assert kind is not None
    table = Storage(tape, 1j * operations.e * spec.embedding_parameters, silently=True)
    more = rounding_bytes(
        kind, spec.vocab_size, spec.hidden_size, held=4, stored=operations.way.stored, adapted=False
    )  # fmt: skip
    tape.heights.append(tape.live + 1j * more)
    return table
