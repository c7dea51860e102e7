"""What is alive while operations run forwards and then backwards, when each tensor is only a number of bytes?

A miniature of autograd in plain Python. Operations written down as a model runs them, with what each keeps for the
backward pass, give the bytes of every moment; tensors are freed when nothing refers to them, as everywhere in Python.

A size is a complex number: the real part is bytes per token of the micro-batch, the imaginary part bytes whatever the
tokens. Sums of sizes are exact, and one run serves every micro-batch.
"""

from __future__ import annotations

import contextlib
import heapq
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


class Tape:
    """The bytes alive now and after every operation so far, and what autograd would know."""

    def __init__(self, *, keeps_gradients: bool = True) -> None:
        self.live = 0j
        self.heights: list[complex] = []
        self.keeps_gradients = keeps_gradients  # in the first micro-batch; later ones add to what is there
        self.gradients: list[Storage] = []
        self.body: int | None = None  # the heights up to this one belong to the model's own code; None: all do
        self.waiting: list[Storage] = []  # gradients of a weight that is used elsewhere, too
        self.casts: list[Storage] = []  # autocast's copies of weights, kept until it ends
        self.frame: Frame | None = None  # of the checkpointed function that runs now
        self.made = 0  # tensors so far
        self._number = 0

    def run(self, size: complex, inputs: Sequence[Value], saved: Sequence[Value], back: Backward, *,
            saves_result: bool = False, saves_last: bool = False, beside: complex = 0,
            hidden: complex = 0) -> Value:  # fmt: skip
        """The result of an operation on `inputs` that keeps `saved` for its backward pass where one will come.

        `beside` is a second result that only the backward pass needs; `hidden` is held only while the operation runs.
        PyTorch's own keep what they need before they compute, one written in Python once it is done: `saves_last`.
        """
        wanted = any(value.node for value in inputs)
        kept, slots = [], range(0)
        if wanted:
            kept = [value.storage for value in saved]
            if self.frame is not None and not saves_last:
                slots, kept = self.frame.keep(kept), []
        result = Value(Storage(self, size, silently=bool(beside or hidden or not size)), size)
        results = [result.storage] if saves_result else []
        if beside:
            results.append(Storage(self, beside))
        if hidden:
            self.heights.append(self.live + hidden)
        if wanted:
            if self.frame is None:
                kept += results
            elif saves_last:
                slots, kept = self.frame.keep(kept + results), []
            elif results:
                slots = range(slots.start, self.frame.keep(results).stop)
            self._number += 1
            result.node = Node(self._number, [value.node for value in inputs], kept, back, self.frame, slots)
        return result

    def view(self, value: Value, back: Backward, size: complex | None = None, *, count: int = 1) -> list[Value]:
        """The storage of a value seen otherwise, by `count` values whose gradients come to `back` together."""
        node = None
        if value.node:
            self._number += 1
            node = Node(self._number, [value.node], [], back, collects=count > 1)
        return [Value(value.storage, value.size if size is None else size, node) for _ in range(count)]

    def backward(self, value: list[Value], gradient: list[Storage]) -> None:
        """Run backwards from a value with its gradient; both lists are emptied, so that nothing holds on to them."""
        root = value.pop().node
        assert root is not None
        found, waiting = [root], {id(root): 0}
        for node in found:
            for below in node.inputs:
                if below is None:
                    continue
                if id(below) not in waiting:
                    found.append(below)
                    waiting[id(below)] = 0
                waiting[id(below)] += 1
        root.gradients.append(gradient.pop())
        ready = [root]
        del found, root
        while ready:
            node = heapq.heappop(ready)
            results = node.evaluate(self)
            for n, below in enumerate(node.inputs):
                if below is None:
                    continue
                result, results[n] = results[n], None
                if result is not None:
                    below.receive(self, result)
                del result
                waiting[id(below)] -= 1
                if not waiting[id(below)]:
                    heapq.heappush(ready, below)


class Storage:
    """Bytes that are alive as long as this object is; a gradient that is a view of a tensor says so."""

    __slots__ = ("size", "tape", "viewed")

    def __init__(self, tape: Tape, size: complex, *, silently: bool = False, viewed: bool = False) -> None:
        self.tape, self.size, self.viewed = tape, size, viewed
        tape.live += size
        tape.made += 1
        if not silently:
            tape.heights.append(tape.live)

    def __del__(self) -> None:
        self.tape.live -= self.size


# (tape, what was saved, a list with the gradient of the result, which inputs want one) -> gradients of the inputs
Backward = Callable[[Tape, list[Storage], list[Storage], list[bool]], "list[Storage | None]"]


@dataclass(eq=False, slots=True)
class Node:
    """One operation on the way back; `number` says when it was made: later ones run first."""

    number: float
    inputs: list[Node | None]
    saved: list[Storage]
    run: Backward
    frame: Frame | None = None
    slots: range = range(0)
    gradients: list[Storage] = field(default_factory=list)
    collects: bool = False  # gradients of several parts of the result come one by one, and stay apart

    def receive(self, tape: Tape, gradient: Storage) -> None:
        """Take a gradient, or add it to the one that is there.

        Autograd adds in place if nothing else knows of that one or of its storage; else the sum is a third tensor.
        """
        if not self.gradients or self.collects:
            self.gradients.append(gradient)
        elif self.gradients[0].viewed or sys.getrefcount(self.gradients[0]) > 2:
            self.gradients = [Storage(tape, gradient.size)]

    def evaluate(self, tape: Tape) -> list[Storage | None]:
        """The gradients of the inputs; what was saved and the own gradient are let go."""
        kept = list(self.saved) if self.frame is None else self.frame.take(tape, self.slots)
        own, self.gradients = self.gradients, []
        results = self.run(tape, kept, own, [node is not None for node in self.inputs])
        self.saved, self.frame = [], None
        return results

    def __lt__(self, other: Node) -> bool:
        return self.number > other.number


def parameter(number: float = float("inf")) -> Node:
    """Where a trained weight's gradient ends: kept, or added to the one of an earlier micro-batch."""

    def take(tape: Tape, saved: list[Storage], gradient: list[Storage], wanted: list[bool]) -> list[Storage | None]:
        if tape.keeps_gradients:
            tape.gradients.append(gradient.pop())
        return []

    return Node(number, [], [], take)


def boundary() -> tuple[Node, list[Storage]]:
    """Where a layer's input wants its gradient, and the list that will hold it."""
    held: list[Storage] = []

    def take(tape: Tape, saved: list[Storage], gradient: list[Storage], wanted: list[bool]) -> list[Storage | None]:
        held.append(gradient.pop())
        return []

    return Node(-1, [], [], take), held


@dataclass(eq=False, slots=True)
class Value:
    """A tensor: the storage it is all or part of, its own bytes, and where its gradient goes (None: nowhere)."""

    storage: Storage
    size: complex
    node: Node | None = None

    def taken(self, tape: Tape) -> list[Storage]:
        """What the operation that made it saved, for another one's way back."""
        assert self.node is not None and self.node.frame is not None
        slots, self.node.slots = self.node.slots, range(0)
        return self.node.frame.take(tape, slots)


class _Enough(Exception):
    """Everything that was saved in the forward pass has been computed again."""


@dataclass(eq=False)
class Frame:
    """A function run under activation checkpointing: it keeps its inputs, counts what it would save, and runs again.

    The second run stops at the last thing it has to save, as PyTorch's does.
    """

    function: Callable[[], object]
    count: int = 0
    again: list[Storage | None] | None = None

    def keep(self, storages: list[Storage]) -> range:
        if self.again is None:
            self.count += len(storages)
            return range(self.count - len(storages), self.count)
        self.again += storages
        if len(self.again) >= self.count:
            raise _Enough
        return range(0)

    def take(self, tape: Tape, slots: range) -> list[Storage]:
        """What a node saved, after running the function again where that has not happened yet."""
        if not slots:
            return []
        if self.again is None:
            self.again = []
            frame, tape.frame, casts, tape.casts = tape.frame, self, tape.casts, []
            with contextlib.suppress(_Enough):
                self.function()
            tape.frame, tape.casts = frame, casts
        taken = [self.again[n] for n in slots]
        for n in slots:
            self.again[n] = None
        return [storage for storage in taken if storage is not None]
