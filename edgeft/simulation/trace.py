"""Where in a training step does each operation run, and what is alive then?"""

from __future__ import annotations

import bisect
from collections import Counter
from typing import Any

import torch
from torch import nn

from edgeft.machines.meter import LiveBytes, as_unwatched, hidden_bytes
from edgeft.memory.depth import Place
from edgeft.models.parts import Parts

NO_NUMBER = 2**63  # autograd numbers its nodes as they are made; those that only accumulate have the highest number


class Trace(LiveBytes):  # type: ignore[no-untyped-call]
    """LiveBytes that remembers for each operation where it ran and what was alive, and for each tensor its life."""

    def __init__(self, micro_batches: int, unit: int) -> None:
        super().__init__()
        self.micro_batches, self.unit = micro_batches, unit
        self.micro_batch = -1
        self.places: list[Place] = []
        self.live: list[int] = []
        self.tensors: list[list[Any]] = []  # first event, event before which it is freed, what it is
        self._stack: list[tuple[int | None, str]] = []
        self._marks: list[int] = []  # autograd's sequence number at each change of the part that runs, and that part
        self._parts: list[tuple[int | None, str]] = []
        self._operation = "weight"
        self._place = Place("forward", 0, None, "model")
        self._went_back = False

    def watch(self, model: nn.Module, parts: Parts) -> None:
        """Notice which part of the model runs: each decoder layer's modules, and what lies outside of the layers."""
        for name, module in model.named_modules():
            if name.startswith(parts.layers_path + "."):
                index, _, inner = name.removeprefix(parts.layers_path + ".").partition(".")
                if inner.count(".") == 0:
                    self._watch(module, (int(index), inner))
            elif not any(module.children()):
                self._watch(module, (None, name.rpartition(".")[2]))

    def _watch(self, module: nn.Module, part: tuple[int | None, str]) -> None:
        def enter(*_: Any) -> None:
            self._stack.append(part)
            self._mark()

        def leave(*_: Any) -> None:
            self._stack.pop()
            self._mark()

        module.register_forward_pre_hook(enter)
        # recomputation ends a forward pass by an exception as soon as it has what it wants
        module.register_forward_hook(leave, always_call=True)

    def _mark(self) -> None:
        self._marks.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._parts.append(self._stack[-1] if self._stack else (None, "loss"))

    def begin(self) -> None:
        """The next micro-batch starts."""
        self.micro_batch, self._went_back = self.micro_batch + 1, False

    def _where(self) -> Place:
        """Where the operation that runs now belongs."""
        if torch._C._current_graph_task_id() == -1:
            if self._went_back and self.micro_batch == self.micro_batches - 1:
                return Place("optimizer", self.micro_batch, None, "optimizer")
            layer, part = self._stack[-1] if self._stack else (None, "loss")
            return Place("forward", self.micro_batch, layer, part)
        self._went_back = True
        if self._stack:  # recomputation
            layer, part = self._stack[-1]
            return Place("backward", self.micro_batch, layer, part)
        number = torch._C._current_autograd_node()._sequence_nr()  # type: ignore[attr-defined]
        if number >= NO_NUMBER:  # a parameter takes its gradient right after the operation that made it
            return self._place._replace(phase="backward")
        at = bisect.bisect_right(self._marks, number) - 1
        layer, part = self._parts[at] if at >= 0 else (None, "model")
        return Place("backward", self.micro_batch, layer, part)

    def count_as(self, what: str, tensors: Any) -> int:
        """The bytes of what is there before the step."""
        before, self._operation = self.live_bytes, what
        self.count(tensors)
        return self.live_bytes - before

    def born(self, tensor: torch.Tensor, size: int) -> tuple[int, ...]:
        size = -(-size // self.unit) * self.unit
        kind = (self._operation, self._place.part, self._place.layer is not None, tuple(tensor.shape),
                str(tensor.dtype).removeprefix("torch."), size)  # fmt: skip
        self.tensors.append([len(self.live), None, kind])
        self.live_bytes += size
        return size, len(self.tensors) - 1

    def forget(self, size: int, number: int = 0) -> None:
        self.live_bytes -= size
        self.tensors[number][1] = len(self.live)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:  # a value is read: whatever it is, it is fine
            return True if args[0].dtype == torch.bool else 1.0 if args[0].dtype.is_floating_point else 1
        if function.namespace == "prim":  # a question, for the device say
            return function(*args, **(kwargs or {}))
        self._place, self._operation = self._where(), function._opname
        result = as_unwatched(function, args)(*args, **(kwargs or {}))
        self.count(result)
        self.places.append(self._place)
        self.live.append(self.live_bytes + hidden_bytes(function, args))
        return result

    def alive(self, event: int) -> Counter[tuple[Any, ...]]:
        """The tensors alive at an event, by kind."""
        return Counter(kind for start, end, kind in self.tensors if start <= event and (end is None or end > event))
