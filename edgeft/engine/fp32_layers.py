"""How does a layer of a 4-bit or half-precision base train at full rank in fp32, and how does it go back?

The layer that trains is made dense from the *original* weights plus what it learnt before. When it leaves, what it
learnt is kept as it is, in fp32, in a file of its own, and the layer re-enters the base in the base's precision. The
change is never rounded: only the copy that other layers train beside is. Embedding, norm and head are fp32 already
where they train (a plan that computes in half precision trains none): they are only kept in files like the layers.

Where the base's layers stay in their files (`engine.streaming`), so does one that has had its turn: in that very file
where the base is kept in fp32, else in one beside it that has its matrices as the base has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeft.documents import saving
from edgeft.engine.adapted_linear import STORED
from edgeft.engine.lisa import Named, link
from edgeft.engine.nf4_base import make_nf4
from edgeft.engine.streaming import Window
from edgeft.models.checkpoint import PIECES, Checkpoint, TensorFile, write_tensors
from edgeft.models.parts import Parts, is_linear


class DenseTurns:
    """`edgeft.engine.lisa.Turns` over the decoder layers, and the `ends`, of a base in NF4, bf16, fp16 or in its files.

    Only matrices turn fp32 and train where the compute dtype is half: an fp32 norm would make the whole residual
    stream fp32. In fp32 compute every parameter of the layer trains.
    """

    writes = True  # of several processes one does, which all read

    @staticmethod
    def wait() -> None:
        """Go on once the process that writes has come here (`engine.ranks`)."""

    def __init__(
        self, model: nn.Module, parts: Parts, base: Checkpoint, folder: Path, compute: torch.dtype,
        ends: Mapping[str, Named] | None = None,
    ) -> None:  # fmt: skip
        self.ends = ends or {}
        self.layers, self.path, self.device = parts.layers, parts.layers_path, next(model.parameters()).device
        self.base, self.folder, self.compute = base, folder, compute
        self.window: Window | None = getattr(model, "edgeft_window", None)  # of layers that stay in their files

    def file(self, unit: str) -> Path:
        """Where what a layer learnt is kept between its turns."""
        return self.folder / f"{unit}.safetensors"

    def _layer(self, unit: str) -> tuple[str, nn.Module]:
        index = _number(unit)
        return f"{self.path}.{index}.", self.layers[index]

    def _read(self, unit: str, name: str) -> torch.Tensor:
        """A parameter of the layer in fp32: as it was left, or the base's own."""
        path = self.file(unit)
        if path.is_file():
            kept = TensorFile(path)
            if name in kept.entries:
                return kept.read(name)
        return self.base.read(self.base.name_of(name)).float()

    def enter(self, unit: str) -> Named:
        """Make the layer's parameters dense fp32 ones that train; (name, parameter) of each."""
        if unit in self.ends:
            return self._let(unit, True)
        prefix, layer = self._layer(unit)
        if self.window is not None:
            self.window.let_go(_number(unit))

        def value(place: str, key: str, old: torch.Tensor, transposed: bool) -> torch.Tensor:
            found = self._read(unit, f"{prefix}{place}.{key}" if place else f"{prefix}{key}")
            return (found.T.contiguous() if transposed else found).to(self.device)

        return [(prefix + name, parameter) for name, parameter in make_dense(layer, self.compute, value)]

    def _let(self, unit: str, train: bool) -> Named:
        for _, parameter in self.ends[unit]:
            parameter.requires_grad_(train)
        return list(self.ends[unit])

    def _learnt(self, unit: str) -> dict[str, torch.Tensor]:
        """What a unit learnt, in fp32 under the base's names."""
        if unit in self.ends:
            return {name: p.detach().cpu() for name, p in self.ends[unit]}
        prefix, layer = self._layer(unit)
        transposed = {f"{place}.weight" for place, m in layer.named_modules() if getattr(m, "transposed", False)}
        return {
            prefix + key: (p.detach().T if key in transposed else p.detach()).cpu().contiguous()
            for key, p in layer.named_parameters()
            if p.dtype == torch.float32
        }

    def keep(self, unit: str) -> Path:
        """Write what the unit learnt, in fp32 under the base's names, to its file."""
        from safetensors.torch import save_file

        if not self.writes:
            return self.file(unit)
        trained = self._learnt(unit)
        with saving(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".{unit}.tmp"
            save_file(trained, temporary, metadata={"format": "pt"})
            temporary.replace(self.file(unit))
        return self.file(unit)

    def hand_over(self, training: Iterable[str], visited: Iterable[str], out: Path) -> None:
        """Put the files of all units that trained into a folder of results, once those that train now are kept."""
        for unit in training:
            self.keep(unit)
        for unit in visited:
            link(self.file(unit), out / piece_of(unit))

    def leave(self, unit: str) -> Named:
        """Keep what the layer learnt in its file and put the layer back in the base's precision."""
        self.keep(unit)
        return self._let(unit, False) if unit in self.ends else self._requantise(unit)

    def restore(self, unit: str) -> Named:
        """Put a unit whose file exists back as `leave` once did: a layer in the base's precision."""
        if unit in self.ends:
            with torch.no_grad():
                for name, parameter in self.ends[unit]:
                    parameter.copy_(self._read(unit, name))
            return self._let(unit, False)
        self.enter(unit)
        return self._requantise(unit)

    def _requantise(self, unit: str) -> Named:
        prefix, layer = self._layer(unit)
        for place, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear) and getattr(module, "was_nf4", False):
                layer.set_submodule(place, make_nf4(module, self.compute))
                continue
            for key, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dtype == torch.float32 != self.compute and parameter.ndim > 1:
                    setattr(module, key, nn.Parameter(parameter.detach().to(self.compute), requires_grad=False))
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        if self.window is not None:
            self._stay(unit, self.window)
        return [(prefix + key, parameter) for key, parameter in layer.named_parameters()]

    def _stay(self, unit: str, window: Window) -> None:
        """Let the matrices of a layer that is back in the base's precision be pages of a file.

        That of 4 bits or half precision can be made again from what the layer learnt: no checkpoint has it. It is not
        written into: whoever still looked at the one before would read on in that.
        """
        prefix, layer = self._layer(unit)
        own: dict[str, Any] = {f"{prefix}{at}.weight": m for at, m in layer.named_modules() if is_linear(m)}
        path = self.file(unit)
        if any(linear.weight.dtype != torch.float32 for linear in own.values()):
            path = self.folder / f".{unit}.pages"
            self._write_pages(path, {name: linear.weight for name, linear in own.items()})
        self.wait()
        window.give(_number(unit), TensorFile(path), own)

    def _write_pages(self, path: Path, matrices: Mapping[str, torch.Tensor]) -> None:
        if not self.writes:
            return
        with saving(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            write_tensors(path, matrices)


def piece_of(unit: str) -> str:
    """The name that a folder of results has for what a unit learnt."""
    return PIECES.replace("*", unit.replace(" ", "-"))


def _number(unit: str) -> int:
    return int(unit.removeprefix("layer "))


def make_dense(
    layer: nn.Module, compute: torch.dtype, value: Callable[[str, str, torch.Tensor, bool], torch.Tensor]
) -> Named:
    """Give a layer dense parameters that train, each `value(place, key, old, transposed)`; (name, parameter)."""
    named: Named = []
    for place, module in list(layer.named_modules()):
        if type(module).__name__ == "Linear4bit":
            packed, module = module, _dense_of(module)
            layer.set_submodule(place, module)
            packed.weight = packed.quant_state = None  # it is in a circle, and its codes would wait for a collection
        for key, old in list(module.named_parameters(recurse=False)):
            if old.ndim > 1 or compute == torch.float32:
                transposed = key == "weight" and bool(getattr(module, "transposed", False))
                parameter = nn.Parameter(value(place, key, old, transposed))
                setattr(module, key, parameter)
                module.__dict__.pop(STORED, None)  # what lies in a file is its weight no more
                named.append((f"{place}.{key}" if place else key, parameter))
    return named


def _dense_of(module: Any) -> nn.Linear:
    """An empty Linear of a 4-bit one's shape and bias; it remembers what it was."""
    with torch.device("meta"):
        linear: Any = nn.Linear(module.in_features, module.out_features, bias=False)
    linear.bias = module.bias
    linear.was_nf4, linear.source_cls = True, module.source_cls
    linear.transposed = module.source_cls.__name__ == "Conv1D"
    return linear  # type: ignore[no-any-return]
