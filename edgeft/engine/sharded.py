"""How do several processes hold one frozen base: a part of every decoder layer each, put together when it computes?

A layer's weights lie behind one another as bytes, whatever their dtypes, cut into as many equal parts as there are
processes. When a layer runs, forwards or on the way back, its parts are gathered, those of the next one meanwhile, and
what neither needs is let go of. Nothing of a frozen base is ever reduced, and adapters are whole in every process, so
that steps are those of plain data parallel, bit for bit.

torch's fully_shard (FSDP2) is not used for it: it cuts each tensor by rows and copies what it has gathered, so that
three layers are there at its highest (measured between CPUs) and not two, puts tensors of its own kind in the place of
weights, reads 4-bit codes as numbers, and cannot keep in step a process that has fewer micro-batches than another.
What is gathered is compared with what the files held, each time: processes that gather different layers, or have lost
a byte, end instead of training on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeft.engine.ranks import Ranks
from edgeft.engine.tensor_by_tensor import check_held, empty_weights, fill, model_without_weights, nothing_like
from edgeft.errors import EdgeftError
from edgeft.memory.sharded import ALIGNED
from edgeft.models.boundary import Weight
from edgeft.models.checkpoint import Checkpoint
from edgeft.models.parts import find_parts
from edgeft.settings.job import Training

_AGAIN = "save the checkpoint again with save_pretrained, or plan with --set shard_base=false"


class CutLayer:
    """One layer's weights: the part that this process has, and room for all of them."""

    def __init__(self, weights: Sequence[nn.Parameter], ranks: Ranks) -> None:
        """Cut weights that are there; they are gone then."""
        self.ranks, self.weights = ranks, weights
        ends, end = list[int](), 0
        for weight in weights:
            ends.append(end)
            end += -(-weight.nbytes // ALIGNED) * ALIGNED
        part = -(-end // (ranks.size * ALIGNED)) * ALIGNED
        whole = torch.zeros(part * ranks.size, dtype=torch.uint8, device=weights[0].device)
        self.views, self.nothing = list[torch.Tensor](), list[torch.Tensor]()
        for weight, start in zip(weights, ends, strict=True):
            data = weight.data.contiguous()
            view = whole[start : start + data.nbytes].view(data.dtype).view(data.shape)
            view.copy_(data)
            self.views.append(view)
            self.nothing.append(nothing_like(data, data.device))
            weight.data = self.nothing[-1]
        self.whole, self.bytes = whole, whole.nbytes
        self.part = whole[ranks.rank * part : (ranks.rank + 1) * part].clone()
        self.sums = self._sums()
        self.arrives: Callable[[], None] | None = None
        self._empty()

    def _sums(self) -> torch.Tensor:
        """A number of each process's part, that another byte or another place changes."""
        return self.whole.data.view(torch.int64).view(self.ranks.size, -1).sum(1)

    def _empty(self) -> None:
        """Give the memory back. What autograd holds of it keeps its place, and finds the same bytes there again."""
        self.whole.untyped_storage().resize_(0)

    def start(self) -> None:
        """Begin to gather."""
        self.whole.untyped_storage().resize_(self.bytes)
        # .data: filling it is no change of what autograd has seen
        self.arrives = self.ranks.gather(self.part, self.whole.data)

    def arrive(self, wrong: torch.Tensor) -> None:
        """Have the weights there; `wrong` notes whose part is not what it was."""
        if self.arrives is None:
            return
        self.arrives()
        self.arrives = None
        wrong |= self._sums() != self.sums
        for weight, view in zip(self.weights, self.views, strict=True):
            weight.data = view

    def drop(self, wrong: torch.Tensor) -> None:
        """Let go of all but the own part. NaN stands in place of numbers: whoever reads them gets no healthy loss."""
        self.arrive(wrong)
        for weight, nothing in zip(self.weights, self.nothing, strict=True):
            weight.data = nothing
        self._empty()


class Shards:
    """Which layers of a base in parts are whole here: the one that runs, and the one that comes next."""

    def __init__(self, layers: Sequence[nn.Module], cut: list[CutLayer], training: Training, ranks: Ranks) -> None:
        self.layers, self.cut, self.ranks = layers, cut, ranks
        self.here, self.at = set[int](), -1
        self.leads = False  # this process computes alone, and says which layer it enters
        self.wrong = torch.zeros(len(cut), ranks.size, dtype=torch.bool, device=cut[0].part.device)
        for number, layer in enumerate(layers):
            kept = not training.recomputes(number, len(cut))
            layer.forward = self._layer(number, layer.forward, kept)  # type: ignore[method-assign]

    def _layer(self, number: int, forward: Callable[..., Any], kept: bool) -> Callable[..., Any]:
        """A layer that enters first; on the way back it does so when it is recomputed, or by its output's gradient."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter(number)
            found = forward(*args, **kwargs)
            output = found[0] if isinstance(found, tuple) else found
            if kept and output.requires_grad:
                output.register_hook(lambda _: self.enter(number))
            return found

        return run

    def enter(self, number: int) -> None:
        """Have a layer whole: forwards the next one is that above, on the way back that below."""
        if self.leads:
            self.ranks.say(number)
        up = number == 0 or number > self.at
        following, self.at = number + (1 if up else -1), number
        wanted = [n for n in (number, following) if 0 <= n < len(self.cut)]
        for gone in sorted(self.here.difference(wanted)):
            self.cut[gone].drop(self.wrong[gone])
        for coming in wanted:
            if coming not in self.here:
                self.cut[coming].start()
        self.here = set(wanted)
        self.cut[number].arrive(self.wrong[number])

    def accompany(self, micro_batches: Sequence[int]) -> None:
        """Hand parts on for as many of the others' micro-batches, forth and back, as this process has fewer.

        `micro_batches`: of each process. Raises EdgeftError as `check` does.
        """
        count = len(self.cut)
        lowest = next(n for n, layer in enumerate(self.layers) if any(p.requires_grad for p in layer.parameters()))
        for _ in range(max(micro_batches) - micro_batches[self.ranks.rank]):
            for number in (*range(count), *range(count - 1, lowest - 1, -1)):
                self.enter(number)
        self.check()

    @contextlib.contextmanager
    def by_first(self) -> Iterator[bool]:
        """Let the first process compute what is inside, whatever it is: the others hand their parts on meanwhile.

        Gives whether this is that process.
        """
        if not self.ranks.first:
            while (number := self.ranks.heard()) >= 0:
                self.enter(number)
            self.check()
            yield False
            return
        self.leads = True
        try:
            yield True
            self.check()
        finally:
            self.leads = False
            self.ranks.say(-1)

    def check(self) -> None:
        """Raise EdgeftError where something was gathered that the files did not hold."""
        for layer, rank in self.wrong.nonzero().tolist():
            problem = f"layer {layer} of the base, gathered from all processes, has other bytes than its file"
            hint = "start again; if it stays so, test that machine's memory and network"
            raise EdgeftError("train", f"{problem}: in the part of process {rank}", hint)


def shards_of(model: Any) -> Shards | None:
    """The parts of a model's base; None where each process has all of it."""
    return getattr(model, "edgeft_shards", None)


def check_gathered(model: Any) -> None:
    """Raise EdgeftError where layers of a base in parts were gathered otherwise than its files have them."""
    if (shards := shards_of(model)) is not None:
        shards.check()


def by_first(model: Any, ranks: Ranks) -> contextlib.AbstractContextManager[bool]:
    """Where the first process of a run computes alone: whether this is it. Of a base in parts all are needed."""
    shards = shards_of(model)
    return contextlib.nullcontext(ranks.first) if shards is None else shards.by_first()


def load_sharded(folder: Path, training: Training, device: torch.device, kept: torch.dtype, ranks: Ranks) -> Any:
    """The model of a folder with its layers cut, one read after another; all else in `kept`, in every process.

    It computes what a model does that has all of it. Raises BadInput for tensors that are not in the files as the model
    has them.
    """
    packed = training.base_precision == "nf4"
    model, files = model_without_weights(folder, kept, packed=packed), Checkpoint(folder, packed=packed)
    weights = list(empty_weights(model))
    check_held(files, weights, folder, "no layer can be cut", _AGAIN)
    layers = list(find_parts(model).layers)
    owner = {id(module): n for n, layer in enumerate(layers) for module in layer.modules()}
    of_layer: list[list[Weight]] = [[] for _ in layers]
    for weight in weights:
        if weight.key in weight.module._parameters and id(weight.module) in owner:
            of_layer[owner[id(weight.module)]].append(weight)
    inside = {id(weight) for each in of_layer for weight in each}
    fill((weight for weight in weights if id(weight) not in inside), files, device)
    model.tie_weights()
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = buffer if buffer is None else buffer.to(device)
    cut = []
    for each in of_layer:
        fill(each, files, device)
        cut.append(CutLayer([weight.module._parameters[weight.key] for weight in each], ranks))
    model.edgeft_shards = Shards(layers, cut, training, ranks)
    return model
