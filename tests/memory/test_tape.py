"""The miniature of autograd: which bytes are alive at each operation, by hand."""

from __future__ import annotations

import random

import pytest

from edgeft.memory.dataflow import highest
from edgeft.memory.tape import Backward, Frame, Storage, Tape, Value, boundary, parameter


def gives(*sizes: complex | None) -> Backward:
    """A backward pass that makes a tensor of each size, or hands its own gradient on where None."""

    def back(tape: Tape, kept: list[Storage], own: list[Storage], wanted: list[bool]) -> list[Storage | None]:
        return [own[0] if size is None else Storage(tape, size) for size in sizes]

    return back


def entry(tape: Tape, size: complex) -> tuple[Value, list[Storage]]:
    node, held = boundary()
    return Value(Storage(tape, size, silently=True), size, node), held


def test_saved_tensors_live_until_their_operation_ran_backwards() -> None:
    tape = Tape()
    x, held = entry(tape, 1)
    y = tape.run(10, [x], [x], gives(1))
    del x
    z = tape.run(100, [y], [y], gives(10))
    del y
    assert tape.heights == [11, 111] and tape.live == 111
    out = [z]
    del z
    out[0].storage = gradient = Storage(tape, 100, silently=True)
    tape.heights.clear()
    both = [gradient]
    del gradient
    tape.backward(out, both)
    # own 100 + saved 11 + new 10; then own 10 + saved 1 + new 1; the entry's gradient is left
    assert tape.heights == [121, 12] and tape.live == 1 and [s.size for s in held] == [1]


def test_what_nothing_wants_is_freed_at_once() -> None:
    tape = Tape()
    x = Value(Storage(tape, 1, silently=True), 1)
    y = tape.run(10, [x], [x], gives(1), beside=1000)
    assert y.node is None and tape.heights == [1011] and tape.live == 11
    y = tape.run(5, [y], [y], gives(10), hidden=500)
    assert tape.heights == [1011, 516] and tape.live == 6
    del x, y
    assert tape.live == 0


@pytest.mark.parametrize(("why_not", "heights"), [("", [16, 24]), ("a view", [16, 24, 24]), ("shared", [16, 24, 24])])
def test_two_gradients_meet(why_not: str, heights: list[int]) -> None:
    """In place where nobody else has the first one: else the sum is a third tensor."""
    tape, others = Tape(), []

    def back(tape: Tape, kept: list[Storage], own: list[Storage], wanted: list[bool]) -> list[Storage | None]:
        made = Storage(tape, 8, viewed=why_not == "a view")
        others.extend([made] if why_not == "shared" else [])
        return [made]

    x, held = entry(tape, 8)
    a, b = tape.run(8, [x], [], back), tape.run(8, [x], [], back)
    out = [tape.run(8, [a, b], [], gives(None, None))]
    del a, b, x
    out[0].storage = Storage(tape, 8, silently=True)
    tape.heights.clear()
    tape.backward(out, [out[0].storage])
    # the shared gradient with b's new one; a's new one in its place when b's is there; the sum
    assert tape.heights == heights and len(held) == 1 and tape.live == 8 * (1 + len(others))


def test_a_weights_gradient_is_kept_once_and_added_later() -> None:
    for keeps, left in ((True, 7), (False, 0)):
        tape = Tape(keeps_gradients=keeps)
        weight = Value(Storage(tape, 0, silently=True), 0, parameter())
        x = Value(Storage(tape, 3, silently=True), 3)
        out = [tape.run(5, [x, weight], [x], gives(None, 7))]
        del x, weight
        out[0].storage = Storage(tape, 5, silently=True)
        tape.backward(out, [out[0].storage])
        assert tape.live == left == sum(storage.size for storage in tape.gradients)


def test_parts_of_a_result_give_their_gradients_together() -> None:
    tape = Tape()
    x, held = entry(tape, 6)
    first, second = tape.view(x, gives(6), 3, count=2)
    out = [tape.run(1, [first, second], [first, second], gives(3, 3))]
    del first, second, x
    assert tape.live == 7  # one storage under both
    out[0].storage = Storage(tape, 1, silently=True)
    tape.heights.clear()
    tape.backward(out, [out[0].storage])
    assert tape.heights == [10, 13, 12] and [s.size for s in held] == [6]


def test_recomputation_keeps_the_input_and_stops_at_the_last_thing_saved() -> None:
    tape = Tape()
    x, _ = entry(tape, 1)
    made: list[str] = []

    def layer(value: Value) -> Value:
        made.append("first")
        middle = tape.run(10, [value], [value], gives(1))
        made.append("second")
        result = tape.run(100, [middle], [middle], gives(10))
        made.append("third")
        return tape.run(100, [result], [], gives(100))

    tape.frame = Frame(lambda value=x: layer(value))  # type: ignore[misc]
    out = [layer(x)]
    tape.frame = None
    del x
    assert tape.live == 101 and made == ["first", "second", "third"]  # the input and the result, nothing between
    out[0].storage = Storage(tape, 100, silently=True)
    tape.heights.clear()
    tape.backward(out, [out[0].storage])
    assert made[3:] == ["first", "second"]
    # the third hands on a new gradient (100 + 100 + 1), the first runs again (+ 10), then backwards as ever
    assert tape.heights == [201, 111, 121, 12] and tape.live == 1


def test_the_highest_sizes_are_those_of_every_number_of_tokens() -> None:
    draw = random.Random(0)
    sizes = [complex(draw.randint(0, 50), draw.randint(0, 10_000)) for _ in range(200)]
    kept = highest(sizes)
    assert len(kept) < 20
    for tokens in (0, 1, 7, 50, 300, 10_000):
        assert max(s.real * tokens + s.imag for s in kept) == max(s.real * tokens + s.imag for s in sizes)
