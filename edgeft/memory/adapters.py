"""Which tensors does a projection with an adapter make, keep and hold? A function for each form of `engine.forms`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeft.memory.tape import Storage, Tape, Value
from edgeft.models.spec import Linear

if TYPE_CHECKING:
    from edgeft.memory.operations import Operations


def product(operations: Operations, x: Value, linear: Linear) -> Value:
    """W x + s B A x: one operation in fp32 (`engine.adapted_linear`), else as PEFT's layers compute it."""
    if not operations.half:
        return _added_in_place(operations, x, linear)
    result = operations.base(x, linear)
    if operations.way.nf4:
        result = operations.one(result, result.size, None)  # PEFT clones it
    return operations.add(result, operations.scaled(factors(operations, x, linear)))


def _added_in_place(operations: Operations, x: Value, linear: Linear) -> Value:
    """What is kept for the way back is kept first where the layer is recomputed, else last."""
    e, rank, inputs, outputs = operations.e, operations.way.rank, linear.in_features, linear.out_features
    first: list[Value] = []
    wants_input = x.node is not None

    def back(tape: Tape, kept: list[Storage], own: list[Storage], wanted: list[bool]) -> list[Storage | None]:
        kept = first.pop().taken(tape) if first else kept
        low = Storage(tape, e * rank)
        up = Storage(tape, 1j * e * outputs * rank) if wanted[2] else None
        down = Storage(tape, 1j * e * inputs * rank) if wanted[1] else None
        into = Storage(tape, e * inputs) if wants_input else None
        if wants_input:
            matrix = operations.dense(tape, linear, e)
            del matrix
        kept.clear()
        del low
        return [into, down, up]

    def through(tape: Tape, kept: list[Storage], own: list[Storage], wanted: list[bool]) -> list[Storage | None]:
        return [own.pop() if wanted[0] else None, None, None]

    tape = operations.tape
    low = Value(Storage(tape, e * rank), e * rank)
    weights = [operations.weight(rank * inputs), operations.weight(rank * outputs)]
    if tape.frame is None or not any(value.node for value in (x, *weights)):
        matrix = operations.dense(tape, linear, e)
        result = tape.run(e * outputs, [x, *weights], [x, low], back, saves_last=True)
    else:
        first.append(tape.run(0, [x, *weights], [x, low], through))
        matrix = operations.dense(tape, linear, e)
        result = tape.run(e * outputs, [first[0], *weights], [], back)
    del matrix
    return result


def factors(operations: Operations, x: Value, linear: Linear) -> Value:
    """B A x, each product an operation of PyTorch's."""
    rank = operations.way.rank
    down = linear.model_copy(update={"out_features": rank})
    up = linear.model_copy(update={"in_features": rank})
    first = operations.matmul(x, down, operations.weight(rank * linear.in_features, copied=True))
    return operations.matmul(first, up, operations.weight(rank * linear.out_features, copied=True))


def with_lengths(operations: Operations, x: Value, linear: Linear) -> Value:
    """g (W x + s B A x) with a gain for each output, as `edgeft.engine.dora` computes it."""
    gain = _gain(operations, linear)
    result = operations.base(x, linear)
    added = operations.scaled(factors(operations, x, linear))
    tuned = _times(operations, operations.add(result, added), gain, linear.out_features)
    del added
    if linear.has_bias:
        tuned = _shifted(operations, tuned, gain)
    return operations.narrowed(tuned) if result.size == tuned.size / 2 else tuned


def _gain(operations: Operations, linear: Linear) -> Value:
    """The trained lengths over those of the rows of W + s B A, which follow from products with A."""
    size = 4j * linear.out_features
    norms = _norms(operations, linear)

    def back(tape: Tape, kept: list[Storage], own: list[Storage], wanted: list[bool]) -> list[Storage | None]:
        return [Storage(tape, size)]

    return operations.tape.run(size, [operations.weight(0)], [Value(norms, size)], back)


def _norms(operations: Operations, linear: Linear) -> Storage:
    tape, rank, outputs = operations.tape, operations.way.rank, linear.out_features
    through = _through(operations, linear)
    gram = Storage(tape, 4j * rank * rank)
    crossed = Storage(tape, 4j * rank * outputs)
    del through, gram
    each = Storage(tape, 4j * rank * outputs)
    norms = Storage(tape, 4j * outputs)
    del each, crossed
    return norms


def _through(operations: Operations, linear: Linear) -> Storage:
    """A W^T in fp32, of a base in the compute dtype."""
    tape, rank, e = operations.tape, operations.way.rank, operations.e
    inputs, outputs = linear.in_features, linear.out_features
    copy = Storage(tape, 1j * e * rank * inputs) if e != 4 else None
    found = Storage(tape, 1j * e * rank * outputs, silently=operations.way.nf4)
    if operations.way.nf4:
        tape.heights.append(tape.live + 1j * e * inputs * outputs + 4j * -(-inputs * outputs // 64))
    wide = Storage(tape, 4j * rank * outputs) if e != 4 else found
    del copy
    return wide


def _times(operations: Operations, x: Value, gain: Value, outputs: int) -> Value:
    """x times a number in fp32 for each output, in fp32."""
    first, vector, wide = x.size, 4j * outputs, 4 * outputs

    def back(tape: Tape, kept: list[Storage], own: list[Storage], wanted: list[bool]) -> list[Storage | None]:
        summed = Storage(tape, wide) if wanted[1] else None
        into = Storage(tape, wide) if wanted[0] else None
        kept.clear()
        if into is not None and first != wide:
            into = Storage(tape, first)
        total = Storage(tape, vector) if wanted[1] else None
        del summed
        return [into, total]

    saved = [x] if gain.node or not x.node else []
    return operations.tape.run(wide, [x, gain], [*saved, gain] if x.node else saved, back)


def _shifted(operations: Operations, x: Value, gain: Value) -> Value:
    """x + (1 - g) b."""
    vector = gain.size
    shift = operations.one(operations.one(gain, vector, vector), vector, vector, saves_constant=True)
    return _moved(operations, x, shift, vector)


def _moved(operations: Operations, x: Value, shift: Value, vector: complex) -> Value:
    """x + b, for a b that takes a gradient."""

    def back(tape: Tape, kept: list[Storage], own: list[Storage], wanted: list[bool]) -> list[Storage | None]:
        total = Storage(tape, vector) if wanted[1] else None
        return [own.pop(), total]

    return operations.tape.run(x.size, [x, shift], [], back)


def less_start(operations: Operations, x: Value, linear: Linear) -> Value:
    """W x + s (B A x - B0 A0 x), as `edgeft.engine.pissa` computes it."""
    result = operations.base(x, linear)
    return operations.add(result, operations.scaled(_difference(operations, x, linear)))


def _difference(operations: Operations, x: Value, linear: Linear) -> Value:
    product, rank = factors(operations, x, linear), operations.way.rank
    down, up = (linear.model_copy(update={width: rank}) for width in ("out_features", "in_features"))
    return operations.add(product, _frozen(operations, _frozen(operations, x, down), up))


def _frozen(operations: Operations, x: Value, linear: Linear) -> Value:
    """A product with fp32 numbers that do not train: autocast copies them each time, and the copy is kept."""
    tape, e, inputs, outputs = operations.tape, operations.e, linear.in_features, linear.out_features
    if e == 4:
        return operations.matmul(x, linear, None)
    if x.size == 4 * inputs:
        x = operations.narrowed(x)
    copy = Value(Storage(tape, 1j * e * inputs * outputs), 1j * e * inputs * outputs)

    def back(tape: Tape, kept: list[Storage], own: list[Storage], wanted: list[bool]) -> list[Storage | None]:
        return [Storage(tape, e * inputs, viewed=True)]

    return tape.run(e * outputs, [x], [copy], back)


def with_scales(operations: Operations, x: Value, linear: Linear) -> Value:
    """l * W x, or W (l * x), as `edgeft.engine.ia3` computes it."""
    if linear.role == "mlp_out":
        return operations.base(_scaled(operations, x, linear.in_features), linear)
    return _scaled(operations, operations.base(x, linear), linear.out_features)


def triplets(operations: Operations, x: Value, linear: Linear) -> Value:
    """W x + s P (L Q x), as `edgeft.engine.adalora` computes it."""
    rank, result = operations.way.rank, operations.base(x, linear)
    down, up = (linear.model_copy(update={width: rank}) for width in ("out_features", "in_features"))
    low = operations.matmul(x, down, operations.weight(rank * linear.in_features, copied=True))
    low = _scaled(operations, low, rank)
    return operations.add(result, operations.scaled(
        operations.matmul(low, up, operations.weight(rank * linear.out_features, copied=True))))  # fmt: skip


def hadamard(operations: Operations, x: Value, linear: Linear) -> Value:
    """w * W x + b, as `edgeft.engine.hadamard` computes it."""
    result, outputs = operations.base(x, linear), linear.out_features
    # one expression, as there: a name would hold on to the product
    moved = _moved(
        operations, _times(operations, result, operations.weight(0), outputs), operations.weight(0), 4j * outputs
    )
    return operations.narrowed(moved) if result.size == moved.size / 2 else moved


def _scaled(operations: Operations, x: Value, width: int) -> Value:
    scaled = _times(operations, x, operations.weight(0), width)
    return operations.narrowed(scaled) if x.size == scaled.size / 2 else scaled


def after(operations: Operations, x: Value, linear: Linear) -> Value:
    """y + W_up GELU(W_down y) of y = W x, as `edgeft.models.bottleneck` computes it."""
    result = operations.base(x, linear)
    return operations.add(result, bottleneck(operations, result, linear))


def bottleneck(operations: Operations, x: Value, linear: Linear) -> Value:
    """W_up GELU(W_down x), as wide as a projection's output."""
    rank, width = operations.way.rank, linear.out_features
    down = linear.model_copy(update={"in_features": width, "out_features": rank})
    up = linear.model_copy(update={"in_features": rank, "out_features": width})
    low = operations.e * rank
    # one expression, as there: a name would hold on to what it stands for
    return operations.matmul(
        operations.one(
            operations.matmul(x, down, operations.weight(rank * width, copied=True)), low, low, saved=True
        ), up, operations.weight(rank * width, copied=True)
    )  # fmt: skip


def beside(operations: Operations, x: Value, linear: Linear) -> Value:
    """The projection that ends an MLP: what lies beside that is added to its result."""
    return operations.base(x, linear)


AROUND = {"beside": bottleneck}  # what is added to an MLP's output, of its input
FORMS = {
    "after": after,
    "beside": beside,
    "hadamard": hadamard,
    "product": product,
    "less": less_start,
    "lengths": with_lengths,
    "scales": with_scales,
    "triplets": triplets,
}
