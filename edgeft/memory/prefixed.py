"""Which tensors does attention to keys and values before the text make and hold? As `edgeft.models.kv_prefix` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeft.memory.tape import Storage, Tape, Value
from edgeft.settings.tuners import TUNERS

if TYPE_CHECKING:
    from edgeft.memory.operations import Operations


def attend(operations: Operations, query: Value, key: Value, value: Value, *, masked: bool = False) -> Value:
    """Attention to the prefix and the text; without a mask with as many empty queries before it."""
    spec, way, text = operations.spec, operations.way, query.size
    key, value = before(operations, key), before(operations, value)
    if masked:
        return operations.one(operations.attend(query, key, value, masked=True), text, None)
    repeats = spec.num_attention_heads > spec.num_key_value_heads and not way.flash
    if repeats:
        key, value = operations.repeated(key), operations.repeated(value)
    query = operations.one(query, longer(operations, text), text)
    if narrows := operations.half and text == 4 * spec.num_attention_heads * spec.head_dim:  # autocast's copies
        query, key, value = operations.narrowed(query), operations.narrowed(key), operations.narrowed(value)
    result = _kernel(operations, query, key, value)
    text = text / 2 if narrows else text
    return operations.one(operations.view(result, result.size, text), text, None)


def longer(operations: Operations, size: complex) -> complex:
    """Bytes of a tensor of the text with the prefix's tokens before it."""
    return size + 1j * size.real * operations.way.past


def before(operations: Operations, text: Value) -> Value:
    """A prefix's keys, or values, with the text's behind them."""
    way, spec = operations.way, operations.spec
    width = spec.num_key_value_heads * spec.head_dim
    elements, itemsize = way.prefix_tokens * width, text.size.real / width
    own = operations.weight(elements)
    if itemsize != 4 and not TUNERS[way.tuner].embedded:  # a prompt's have the text's dtype
        own = operations.one(own, 1j * itemsize * elements, 4j * elements)
    shared = 1j * itemsize * elements

    def back(tape: Tape, kept: list[Storage], gradient: list[Storage], wanted: list[bool]) -> list[Storage | None]:
        return [gradient[0] if want else None for want in wanted]  # views of it

    own = operations.view(own, shared)  # for every row; the gradient is their sum
    return operations.tape.run(longer(operations, text.size), [own, text], [], back)


def _kernel(operations: Operations, query: Value, key: Value, value: Value) -> Value:
    sizes = [query.size, key.size, value.size]

    def back(tape: Tape, kept: list[Storage], own: list[Storage], wanted: list[bool]) -> list[Storage | None]:
        return [Storage(tape, size, silently=n < 2) for n, size in enumerate(sizes)]

    lse = longer(operations, 4 * operations.spec.num_attention_heads)
    saved = [query, key, value]
    return operations.tape.run(sizes[0], saved, saved, back, saves_result=True, beside=lse)
