"""How do matrices that lie in files come to a device, in the background, and leave it again?

While a layer computes, a thread copies the next one's matrices piece by piece into one of two pinned buffers, and from
there, in a stream of their own, into memory of the device that is asked for anew. What computes waits for the whole
layer. A matrix that is there is a parameter of its own, which is given up when its layer is left and never written to
again: whoever still holds it, as autograd does, reads the very same bytes. Only the pinned buffers are filled again,
each once its copy has ended. A module whose matrix is not there has no number, or no scales: who reads it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from edgeft.engine.adapted_linear import STORED
from edgeft.engine.tensor_by_tensor import nothing_like
from edgeft.machines import pages
from edgeft.memory.streamed import ALIGNED, PIECE_BYTES


@dataclass(frozen=True, eq=False)
class Span:
    """Where a matrix lies in a mapped file, and who computes with it as long as `own`, or a copy for it, is theirs."""

    module: Any
    own: Any
    mapped: torch.Tensor
    scales: Any = None  # of 4 bits, bitsandbytes' state

    @property
    def used(self) -> bool:
        weight = self.module._parameters.get("weight")
        return weight is self.own or getattr(weight, "stands_for", None) is self.own


class InPlace:
    """What a CPU that stands for a device does of what `Stream` does: everything at once, when it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def buffer(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def send(self, into: torch.Tensor, piece: torch.Tensor) -> None:
        into.copy_(piece)

    def sent(self) -> Any:
        return None

    def computed(self) -> Any:
        return None

    def finish(self, mark: Any) -> None:
        pass

    def wait(self, mark: Any, memory: torch.Tensor) -> None:
        pass


class Stream:
    """Copies to a GPU in the order in which they are asked for, beside what computes there."""

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda
        self.device, self.stream = device, cuda.Stream(device)

    def buffer(self, size: int) -> torch.Tensor:
        """Memory of the host that the device reads while the host does something else."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def memory(self, size: int) -> torch.Tensor:
        """Bytes of the device that nobody else has: of what this stream frees only what nobody computes with still."""
        with torch.cuda.stream(self.stream):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def send(self, into: torch.Tensor, piece: torch.Tensor) -> None:
        """Copy a pinned piece, after all that was sent before, and go on at once."""
        with torch.cuda.stream(self.stream):
            into.copy_(piece, non_blocking=True)

    def sent(self) -> torch.cuda.Event:
        """A mark behind all that was sent so far."""
        return self._mark(self.stream)

    def computed(self) -> torch.cuda.Event:
        """A mark behind all that was given to the device to compute so far."""
        return self._mark(torch.cuda.current_stream(self.device))

    def _mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        cuda: Any = torch.cuda
        event: torch.cuda.Event = cuda.Event(blocking=True)
        event.record(stream)
        return event

    def finish(self, mark: torch.cuda.Event | None) -> None:
        """Let this thread wait until the device has come to a mark."""
        if mark is not None:
            mark.synchronize()

    def wait(self, mark: torch.cuda.Event, memory: torch.Tensor) -> None:
        """Let what computes next wait for a mark; `memory` is not given to others before that has been computed."""
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(mark)
        memory.record_stream(computing)


@dataclass(eq=False)
class Arriving:
    """A layer's matrices on the device, and the mark behind the last copy."""

    memory: torch.Tensor
    matrices: list[torch.Tensor]
    mark: Any
    shown: bool = False


class Copies:
    """Layers of a model on a device: the one that computes is there, and the one that comes next is arriving."""

    def __init__(self, device: torch.device, stream: Any = None) -> None:
        self.device = device
        self.stream = stream or (Stream(device) if device.type == "cuda" else InPlace(device))
        self.buffers = [self.stream.buffer(PIECE_BYTES) for _ in range(2)]
        self.marks: list[Any] = [None, None]  # behind the last copy out of each
        self.turn = 0
        self.there: dict[int, Arriving] = {}

    def absent(self, mapped: torch.Tensor) -> torch.Tensor:
        """What a module has in place of a matrix that is not on the device."""
        return nothing_like(mapped, self.device)

    def span(self, linear: Any, mapped: torch.Tensor) -> Span:
        """A module's matrix that lies in a file, and is not there yet."""
        own = linear._parameters["weight"]
        span = Span(linear, own, mapped, getattr(own, "quant_state", None))
        self._hide(span)
        if span.scales is not None:
            linear.forward = partial(_multiply, linear, linear.forward)
        elif hasattr(linear, STORED):
            linear.forward = partial(_recall, linear, linear.forward)
        return span

    def computed(self) -> Any:
        """A mark behind all that was given to the device to compute so far."""
        return self.stream.computed()

    def read(self, number: int, spans: Sequence[Span], before: Any) -> None:
        """Send a layer's matrices to the device, once what was computed up to a mark has left it room."""
        if number in self.there:
            return
        self.stream.finish(before)
        used = [span.mapped if span.used else span.mapped.new_empty(0) for span in spans]
        ends = [0]
        for mapped in used:
            ends.append(ends[-1] + -(-mapped.nbytes // ALIGNED) * ALIGNED)
        memory, matrices = self.stream.memory(ends[-1]), list[torch.Tensor]()
        for mapped, begin in zip(used, ends, strict=False):
            into = memory[begin : begin + mapped.nbytes]
            self._send(mapped.reshape(-1).view(torch.uint8), into)
            matrices.append(into.view(mapped.dtype).view(mapped.shape))
        self.there[number] = Arriving(memory, matrices, self.stream.sent())

    def _send(self, mapped: torch.Tensor, into: torch.Tensor) -> None:
        for begin in range(0, len(mapped), PIECE_BYTES):
            piece, self.turn = mapped[begin : begin + PIECE_BYTES], 1 - self.turn
            buffer = self.buffers[self.turn][: len(piece)]
            self.stream.finish(self.marks[self.turn])
            pages.read(piece.data_ptr(), len(piece))
            buffer.copy_(piece)
            pages.release(piece.data_ptr(), len(piece))
            self.stream.send(into[begin : begin + len(piece)], buffer)
            self.marks[self.turn] = self.stream.sent()

    def show(self, number: int, spans: Sequence[Span], before: Any) -> None:
        """Let a layer's modules have their matrices, which what computes next waits for."""
        self.read(number, spans, before)
        found = self.there[number]
        if found.shown:
            return
        self.stream.wait(found.mark, found.memory)
        found.shown = True
        for span, matrix in zip(spans, found.matrices, strict=True):
            if span.used:
                self._put(span, matrix)

    def _put(self, span: Span, matrix: torch.Tensor) -> None:
        if hasattr(span.module, STORED):
            setattr(span.module, STORED, matrix)
            return
        if span.scales is None:
            weight: Any = nn.Parameter(matrix, requires_grad=False)
        else:
            weight, span.module.quant_state = _packed(matrix, span), span.scales
        weight.stands_for = span.own
        span.module._parameters["weight"] = weight

    def _hide(self, span: Span) -> None:
        if hasattr(span.module, STORED):
            setattr(span.module, STORED, self.absent(span.mapped))
            return
        if span.scales is not None:
            span.own.quant_state = span.module.quant_state = None
        span.module._parameters["weight"] = span.own

    def drop(self, number: int, spans: Sequence[Span]) -> None:
        """Give a layer's memory up; whoever holds a matrix still has it."""
        for span in spans:
            if span.used:
                self._hide(span)
        self.there.pop(number, None)


def _packed(codes: torch.Tensor, span: Span) -> Any:
    """Codes of a 4-bit matrix as the parameter that its module computes with."""
    own, scales = span.own, span.scales
    return type(own)(
        codes, requires_grad=False, quant_state=scales, blocksize=own.blocksize,
        compress_statistics=own.compress_statistics, quant_type=own.quant_type, quant_storage=own.quant_storage,
        module=span.module, bnb_quantized=True,
    )  # fmt: skip


def _multiply(linear: Any, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What a 4-bit module gives, without its codes on autograd's context: see `_Packed`."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return forward(x)
    compute, bias = linear.compute_dtype, linear.bias
    made = _Packed.apply(x.to(compute), linear.weight, None if bias is None else bias.to(compute))  # type: ignore[no-untyped-call]
    return made.to(x.dtype)  # type: ignore[no-any-return]


class _Packed(torch.autograd.Function):
    """bitsandbytes' product of x with a 4-bit matrix, whose codes are saved as recomputation saves things.

    Its own keeps them on the context of the first forward pass: every layer's would stay on the device.
    """

    @staticmethod
    def forward(context: Any, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        from bitsandbytes.autograd._functions import matmul_4bit

        context.save_for_backward(weight)
        context.scales = weight.quant_state
        return matmul_4bit(x, weight, quant_state=context.scales, bias=bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        from bitsandbytes.functional import dequantize_4bit

        (codes,) = context.saved_tensors
        dense: torch.Tensor = dequantize_4bit(codes.data.view(-1, 1), context.scales)
        return torch.matmul(gradient, dense.to(gradient.dtype)), None, None


def _recall(linear: Any, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What a module gives that casts its matrix, which is there again when its gradient is asked for."""
    made, stored = forward(x), getattr(linear, STORED, None)
    if stored is None or not (torch.is_grad_enabled() and made.requires_grad):
        return made
    return _Recalled.apply(made, stored)  # type: ignore[no-any-return, no-untyped-call]


class _Recalled(torch.autograd.Function):
    """A product as it is. Its gradient asks first for what is saved here, and so for its layer to be recomputed."""

    @staticmethod
    def forward(context: Any, made: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(stored)
        return made.view_as(made)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        context.saved_tensors  # noqa: B018
        return gradient, None
