"""How does a model compute, and train, whose frozen layers stay in their files?

The matrices of its layers are pages of mapped files: base safetensors, the codes of their NF4 form, or what a layer
learnt when it had its turn (`engine.fp32_layers`). When a layer runs, forwards or recomputed on the way back, a thread
reads the next one, and what neither needs is given back. A CPU computes with the pages themselves, another device with
copies (`engine.copies`). No matrix's memory is ever filled anew: whoever still holds one, as autograd's contexts do,
reads the very same bytes, so that a mistake here costs memory or time and never a gradient. What is kept in another
dtype than it is stored in is cast when it multiplies, as 4-bit weights are unpacked: inside of what is recomputed.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeft.engine.adapted_linear import STORED, dense_weight
from edgeft.engine.copies import Copies, Span
from edgeft.engine.tensor_by_tensor import check_held, empty_weights, fill, fill_packed, model_without_weights
from edgeft.errors import BadInput
from edgeft.machines import pages
from edgeft.models.boundary import Weight
from edgeft.models.checkpoint import SAFETENSORS_DTYPES, Checkpoint, TensorFile
from edgeft.models.parts import find_parts, is_linear
from edgeft.settings.job import Training


class Pages:
    """Layers of a model on a CPU: matrices are pages of files, there or not, and always what the files hold."""

    device = torch.device("cpu")

    def absent(self, mapped: torch.Tensor) -> torch.Tensor:
        """What a module has in place of a matrix that was not read yet: its pages."""
        return mapped

    def span(self, linear: Any, mapped: torch.Tensor) -> Span:
        """A module's matrix that lies in a file."""
        return Span(linear, linear._parameters["weight"], mapped)

    def computed(self) -> None:
        """Nothing: a CPU has computed what it was given."""

    def read(self, number: int, spans: Sequence[Span], before: None) -> None:
        """Make a layer's pages resident."""
        for span in spans:
            if span.used:
                pages.read(span.mapped.data_ptr(), span.mapped.nbytes)

    def show(self, number: int, spans: Sequence[Span], before: None) -> None:
        """Nothing: what is not resident is read when it is looked at."""

    def drop(self, number: int, spans: Sequence[Span]) -> None:
        """Give a layer's pages back."""
        for span in spans:
            if span.used:
                pages.release(span.mapped.data_ptr(), span.mapped.nbytes)


class Window:
    """Which layers' matrices are here: those of the layer that runs, and of the one that comes next."""

    def __init__(self, layers: Sequence[nn.Module], spans: list[list[Span]], files: Maps, way: Pages | Copies) -> None:
        self.spans, self.files, self.way, self.here = spans, files, way, set[int]()
        self.at = -1
        self.reader = ThreadPoolExecutor(1, "edgeft-layers")
        self.reading: Future[None] | None = None
        for number, layer in enumerate(layers):
            layer.forward = self._layer(number, layer.forward)  # type: ignore[method-assign]

    def _layer(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter(number)
            return forward(*args, **kwargs)

        return run

    def enter(self, number: int) -> None:
        """Let a layer run: forwards the next one is that above, when layers are recomputed that below."""
        if self.reading is not None:
            self.reading.result()
        up = number == 0 or number > self.at
        following, self.at = number + (1 if up else -1), number
        wanted, way = {number, following} & set(range(len(self.spans))), self.way
        for gone in self.here - wanted:
            way.drop(gone, self.spans[gone])
        self.here, before = wanted, way.computed()
        way.show(number, self.spans[number], before)
        more = following in wanted
        self.reading = self.reader.submit(way.read, following, self.spans[following], before) if more else None

    def let_go(self, number: int) -> None:
        """Know no more of a layer's matrices, which is about to have them in memory."""
        self.leave()
        self.spans[number] = []

    def give(self, number: int, file: TensorFile, linears: Mapping[str, Any]) -> None:
        """Let a layer's matrices, by their names in a file that holds what they hold, lie there.

        The file is mapped anew: under its name may have lain another, whose pages show what the layer was before.
        """
        self.let_go(number)
        maps = Maps()
        for name, linear in linears.items():
            mapped = maps.tensor(file, name)
            linear._parameters["weight"].data = self.way.absent(mapped)
            self.spans[number].append(self.way.span(linear, mapped))

    def leave(self) -> None:
        """Give everything back, as before something else needs the memory."""
        if self.reading is not None:
            self.reading.result()
        for gone in self.here:
            self.way.drop(gone, self.spans[gone])
        self.here, self.reading = set(), None


class Maps:
    """Tensors of safetensors files as pages of them, which nobody can write to."""

    def __init__(self) -> None:
        self.maps: dict[Path, mmap.mmap] = {}

    def tensor(self, file: TensorFile, name: str) -> torch.Tensor:
        """One tensor; raises BadInput where it lies so that no processor could read its numbers in place."""
        entry = file.entries[name]
        begin, end = entry["data_offsets"]
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        if (file.start + begin) % dtype.itemsize:
            raise BadInput(file.path, f"{name}: lies at no multiple of {dtype.itemsize} bytes", _AGAIN)
        if file.path not in self.maps:
            with open(file.path, "rb") as opened:
                self.maps[file.path] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot be written to is what is wanted
            flat = torch.frombuffer(
                self.maps[file.path], dtype=dtype, offset=file.start + begin, count=(end - begin) // dtype.itemsize
            )
        return flat.view(entry["shape"])


_AGAIN = "save the checkpoint again with save_pretrained, or plan with --set stream_layers=false"


def way_of(device: torch.device) -> Pages | Copies:
    """How layers in files come to a device."""
    return Pages() if device.type == "cpu" else Copies(device)


def load_streamed(folder: Path, training: Training, kept: torch.dtype, device: torch.device) -> Any:
    """The model of a folder, on a device, whose layers' matrices stay in its files; all else in `kept`.

    An embedding that neither trains nor is the head too has its rows read as they are asked.

    It computes what a model does that holds them in `kept`, or packed in 4 bits. Raises BadInput for tensors that are
    not in the files as the model has them.
    """
    packed = training.base_precision == "nf4"
    model, files = model_without_weights(folder, kept, packed=packed), Checkpoint(folder, packed=packed)
    weights = list(empty_weights(model))
    check_held(files, weights, folder, "no layer can stay there", _AGAIN)
    parts = find_parts(model)
    layers = list(parts.layers)
    owner = {id(module): n for n, layer in enumerate(layers) for module in layer.modules() if is_linear(module)}
    streamed = [weight for weight in weights if id(weight.module) in owner and weight.key == "weight"]
    table = [] if parts.tied or training.embedding != "off" else [w for w in weights if w.module is parts.embedding]
    there = {weight.name for weight in (*streamed, *table)}
    fill((weight for weight in weights if weight.name not in there), files, device)
    maps, spans, way = Maps(), [list[Span]() for _ in layers], way_of(device)
    for weight in table:
        name = files.name_of(weight.name)
        rows_as_asked(weight.module, maps.tensor(files.owner[name], name), kept, device)
    for weight in streamed:
        name = files.name_of(weight.name)
        mapped = maps.tensor(files.owner[name], name)
        _give(weight, way.absent(mapped), files, name, kept)
        spans[owner[id(weight.module)]].append(way.span(weight.module, mapped))
    model.tie_weights()
    for module in model.modules():
        module._buffers.update({key: made.to(device) for key, made in module._buffers.items() if made is not None})
    model.edgeft_window = Window(layers, spans, maps, way)
    return model


def _give(weight: Weight, held: torch.Tensor, files: Checkpoint, name: str, kept: torch.dtype) -> None:
    """A linear module's matrix as it lies in the file: itself, its codes, or what is cast when it multiplies."""
    linear = weight.module
    if weight.packed:
        fill_packed(linear, files, name, held.device, held)
    elif held.dtype == kept:
        linear._parameters["weight"] = nn.Parameter(held, requires_grad=False)
    else:
        cast_on_use(linear, held, kept)


def cast_on_use(linear: Any, held: torch.Tensor, kept: torch.dtype) -> None:
    """Let a module multiply with what it has in a file in another dtype. Its own weight is no number, and takes none:

    whoever reads that by mistake gets no healthy loss.
    """
    nothing = torch.full((), float("nan"), dtype=kept, device=held.device).expand(held.shape)
    own = linear._parameters["weight"] = nn.Parameter(nothing, requires_grad=False)
    setattr(linear, STORED, held)
    forward = linear.forward

    def run(x: torch.Tensor) -> torch.Tensor:
        if linear.weight is not own:  # the layer trains now
            return forward(x)  # type: ignore[no-any-return]
        return _Cast.apply(x, linear, kept)  # type: ignore[no-any-return, no-untyped-call]

    linear.forward = run


def rows_as_asked(table: Any, mapped: torch.Tensor, kept: torch.dtype, device: torch.device) -> None:
    """Let an embedding look rows up in its file, on the host, and give the pages back at once.

    It computes with those rows alone as it would with all of them, in its own way (Gemma's multiplies them).
    """
    nothing = torch.full((), float("nan"), dtype=kept, device=device).expand(mapped.shape)
    own = table._parameters["weight"] = nn.Parameter(nothing, requires_grad=False)
    forward, padding = table.forward, table.padding_idx

    def run(ids: torch.Tensor) -> torch.Tensor:
        wanted, places = torch.unique(ids, return_inverse=True)
        rows = nn.functional.embedding(wanted.cpu(), mapped).to(kept).to(device)
        pages.release(mapped.data_ptr(), mapped.nbytes)
        table._parameters["weight"], table.padding_idx = nn.Parameter(rows, requires_grad=False), None
        try:
            found: torch.Tensor = forward(places)
            return found
        finally:
            table._parameters["weight"], table.padding_idx = own, padding

    table.forward = run


class _Cast(torch.autograd.Function):
    """x W^T + b with a frozen W that is cast for the product, forth and back, and not kept between."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, linear: nn.Module, kept: torch.dtype) -> torch.Tensor:
        context.linear, context.kept = linear, kept
        bias: Any = linear.bias
        return nn.functional.linear(x, dense_weight(linear, kept), bias)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        if not context.needs_input_grad[0]:
            return None, None, None
        weight = dense_weight(context.linear, context.kept)
        rows = gradient.reshape(-1, weight.shape[0]) @ weight
        return rows.view(*gradient.shape[:-1], weight.shape[1]), None, None
