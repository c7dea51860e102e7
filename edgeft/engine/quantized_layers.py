"""What does a layer compute with while it trains for a target? Its weight as the bundle will hold it.

A product multiplies with Q(M): M is what a merge would store now, W0 + s B A or the weight that trains itself, rounded
to the checkpoint's dtype, and Q the nearest codes on the target's own grid, fitted to M anew (`targets.grid`). So the
codes of a forward pass are a function of the weights alone, and those of the merged artifact are the last ones. The
gradient passes straight through the rounding: what is asked for at M is what came to Q(M); the gradient at the input
is taken by Q(M). Between the passes codes are kept, a byte each, no rounded weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from edgeft.engine.fp32_layers import DenseTurns
from edgeft.engine.lisa import Named
from edgeft.errors import BadInput
from edgeft.memory.rounded import rows_at_once
from edgeft.models.checkpoint import Checkpoint
from edgeft.models.folding import folded
from edgeft.models.headers import blocks
from edgeft.models.parts import Parts
from edgeft.models.streamed import alter
from edgeft.settings.job import Training
from edgeft.targets.grid import Encoded, Grid
from edgeft.targets.rounding import grids_of_shapes


class LowRank(NamedTuple):
    """A low-rank change of a weight: scale * left @ right."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float


class KeptCodes(NamedTuple):
    """A rounded weight as its backward pass finds it: (rows, columns) in bytes, scales and all of each block."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    least: torch.Tensor | None

    @classmethod
    def empty(cls, weight: torch.Tensor, grid: Grid) -> KeptCodes:
        """Room for the codes of a weight."""
        rows, columns = weight.shape
        small = torch.int8 if grid.method == "q8_0" else torch.uint8
        shape = rows, -(-columns // grid.block_size)
        scale, zero, least = (torch.empty(shape, device=weight.device) if wanted else None
                              for wanted in (True, True, grid.method == "q_1"))  # fmt: skip
        assert scale is not None and zero is not None
        return cls(torch.empty(rows, columns, dtype=small, device=weight.device), scale, zero, least)

    def put(self, rows: slice, encoded: Encoded) -> None:
        """Keep some rows."""
        self.codes[rows], self.scale[rows], self.zero[rows] = encoded.codes, encoded.scale, encoded.zero
        if self.least is not None and encoded.least is not None:
            self.least[rows] = encoded.least

    def weight(self, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
        """The rounded weight again."""
        out = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        each = rows_at_once(out.shape[1])
        for first in range(0, len(out), each):
            self._decode(out[first : first + each], slice(first, first + each), grid)
        return out

    def _decode(self, out: torch.Tensor, rows: slice, grid: Grid) -> None:
        least = None if self.least is None else self.least[rows]
        parts = self.codes[rows].float(), self.scale[rows], self.zero[rows]
        out.copy_(Encoded(*parts, grid.block_size, grid.bits, least).weight())


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products in the dtype of what they multiply, as a merge makes them: no autocast, no TF32."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def round_into(
    out: torch.Tensor, weight: torch.Tensor, grid: Grid, stored: torch.dtype, change: LowRank | None = None,
    codes: KeptCodes | None = None,
) -> torch.Tensor:  # fmt: skip
    """`out` with Q(M) of a (rows, columns) weight in it, M in `stored` as `merging.merge.blend` makes it.

    `out` may be the weight itself; `codes` are filled where they are given.
    """
    for part in blocks(tuple(weight.shape)):
        _round_block(out[part], _merged(weight[part], part, change).to(stored), grid, codes, part.start)
    return out


def _merged(rows: torch.Tensor, part: slice, change: LowRank | None) -> torch.Tensor:
    if change is None:
        return rows.float()
    return folded(rows.float(), change.left[part].float(), change.right.float(), change.scale)


def _round_block(out: torch.Tensor, merged: torch.Tensor, grid: Grid, codes: KeptCodes | None, start: int) -> None:
    each = rows_at_once(merged.shape[1])
    for first in range(0, len(merged), each):
        last = min(first + each, len(merged))
        _round_rows(out[first:last], merged[first:last], grid, codes, slice(start + first, start + last))


def _round_rows(out: torch.Tensor, merged: torch.Tensor, grid: Grid, codes: KeptCodes | None, at: slice) -> None:
    encoded = grid.encode(merged.float())
    if codes is not None:
        codes.put(at, encoded)
    out.copy_(encoded.weight())


@dataclass(eq=False)
class Rounded:
    """Takes the place of a linear's or an embedding's forward pass: by the weight rounded, while it trains.

    One that does not train now has been rounded in place (`round_frozen`, `settle`).
    """

    module: Any
    grid: Grid
    stored: torch.dtype
    plain: Callable[..., Any]  # the module's own forward pass
    settled: bool = False

    @property
    def weight(self) -> nn.Parameter:
        """What is stored: the base's own of an adapted linear."""
        return getattr(self.module, "base_layer", self.module).weight  # type: ignore[no-any-return]

    @property
    def adapted(self) -> bool:
        """Whether an adapter changes the weight."""
        return hasattr(self.module, "base_layer")

    @property
    def trains(self) -> bool:
        """Whether the weight is not in its place yet."""
        return not self.settled and (self.adapted or self.weight.requires_grad)

    def change(self) -> LowRank | None:
        """What the adapter adds now."""
        if not self.adapted:
            return None
        left, right = self.module.lora_B["default"].weight, self.module.lora_A["default"].weight
        return LowRank(left.detach(), right.detach(), float(self.module.scaling["default"]))

    def shipped(self, dtype: torch.dtype, codes: KeptCodes | None = None) -> torch.Tensor:
        """Q(M) as a tensor of its own; its codes too where there is room for them."""
        weight = self.weight.detach()
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        return round_into(out, weight, self.grid, self.stored, self.change(), codes)

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = getattr(self.module, "base_layer", self.module)
        if not self.trains:
            return nn.functional.linear(x, base.weight, base.bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        factors = (None, None)
        if self.adapted:
            factors = self.module.lora_B["default"].weight, self.module.lora_A["default"].weight
        result: torch.Tensor = _Product.apply(x, base.weight, *factors, base.bias, self)  # type: ignore[no-untyped-call]
        return result

    def look_up(self, ids: torch.Tensor) -> Any:
        """Rows of a table, rounded row by row; of a table whose module does more with them, by the whole table."""
        if not self.trains:
            return self.plain(ids)
        if type(self.module) is not nn.Embedding:
            return torch.func.functional_call(self.module, {"weight": self.table()}, (ids,))
        found = self.plain(ids)
        rows = found.detach().flatten(0, -2)
        return _straight(found, lambda: round_into(torch.empty_like(rows), rows, self.grid, self.stored).view_as(found))

    def table(self) -> torch.Tensor:
        """The whole weight rounded, whose gradient is the weight's own."""
        return _straight(self.weight, lambda: self.shipped(self.weight.dtype)) if self.trains else self.weight

    def in_place(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What turns the stored weight into the rounded one, with what its adapter adds now."""
        change = self.change()

        def turn(weight: torch.Tensor) -> torch.Tensor:
            with exact_products(weight.device):
                return round_into(weight, weight, self.grid, self.stored, change)

        return turn


class _Product(torch.autograd.Function):
    """x Q(M)^T + b, which keeps x where the weight or its factors train, and codes where x wants a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, left: torch.Tensor | None,
                right: torch.Tensor | None, bias: torch.Tensor | None, rounded: Rounded) -> torch.Tensor:  # fmt: skip
        ctx.rounded = rounded
        codes = KeptCodes.empty(weight, rounded.grid) if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:4]) else None, *(codes or ()))
        with exact_products(x.device):
            return nn.functional.linear(x, rounded.shipped(x.dtype, codes), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,), (x, *codes), rounded = gradients, ctx.saved_tensors, ctx.rounded
        of_x, of_weight, of_left, _, of_bias, _ = ctx.needs_input_grad
        with exact_products(gradient.device):
            into = gradient @ KeptCodes(*codes).weight(rounded.grid, gradient.dtype) if of_x else None
            flat = gradient.flatten(0, -2)
            weight = _outer(flat, x).to(rounded.weight.dtype) if of_weight else None
            left, right = _of_factors(flat, x, rounded.change()) if of_left else (None, None)
            bias = flat.sum(0).to(rounded.module.bias.dtype) if of_bias else None
        return into, weight, left, right, bias, None


def _outer(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient at a weight: sum over tokens of d x^T."""
    return gradient.T @ x.flatten(0, -2)


def _of_factors(gradient: torch.Tensor, x: torch.Tensor, change: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """Those at the factors of M = W0 + s L R, from G = d^T x at M: s G R^T and s L^T G, G itself never made."""
    flat = x.flatten(0, -2)
    left = gradient.T @ (flat @ change.right.T.to(x.dtype))
    right = (gradient @ change.left.to(x.dtype)).T @ flat
    return left.float().mul_(change.scale), right.float().mul_(change.scale)


class _Straight(torch.autograd.Function):
    """What `make` gives, as if it were the first argument itself."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        with exact_products(value.device):
            return make()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return *gradients, None


def _straight(value: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    return _Straight.apply(value, make)  # type: ignore[no-any-return, no-untyped-call]


def grids_here(model: nn.Module, parts: Parts, training: Training) -> dict[str, tuple[str, Grid]]:
    """(the name in the model now, the grid) of each weight that the target rounds, by its name in the checkpoint."""
    assert training.quantize_aware is not None
    named = {plain_name(name): name for name, _ in model.named_parameters() if name.endswith(".weight")}
    named = {plain: name for plain, name in named.items() if ".lora_" not in name}
    shapes = {plain: tuple(model.get_parameter(name).shape) for plain, name in named.items()}
    grids = grids_of_shapes(shapes, training.quantize_aware, parts.tied)
    return {plain: (named[plain], grid) for plain, grid in grids.items()}


def plain_name(name: str) -> str:
    """A parameter's name before an adapter was hung on its module."""
    return name.replace(".base_layer.", ".")


def stored_in(training: Training) -> torch.dtype:
    """The dtype that the merge will store."""
    return getattr(torch, training.stored_dtype)  # type: ignore[no-any-return]


def train_rounded(model: nn.Module, parts: Parts, training: Training) -> None:
    """Let every module whose weight may train compute with it rounded; a trained head says so to the loss."""
    for plain, (_, grid) in grids_here(model, parts, training).items():
        module: Any = model.get_submodule(plain.removesuffix(".weight"))
        if training.adapts and not hasattr(module, "base_layer"):
            continue
        shared = parts.tied and module is parts.embedding
        for place in (module, parts.head) if shared else (module,):
            rounded = Rounded(place, grid, stored_in(training), place.forward)
            place.forward = rounded.look_up if isinstance(place, nn.Embedding) else rounded
            place.rounded = rounded


def rounded_modules(model: nn.Module) -> Iterator[Rounded]:
    """Every one that `train_rounded` has made; a tied table's is two."""
    for module in model.modules():
        if isinstance(found := getattr(module, "rounded", None), Rounded):
            yield found


@torch.no_grad()
def round_frozen(model: nn.Module, parts: Parts, training: Training) -> None:
    """Round in place, once, every weight that the target rounds and that does not train now."""
    stored = stored_in(training)
    for name, grid in grids_here(model, parts, training).values():
        if not model.get_parameter(name).requires_grad and ".base_layer." not in name:
            alter(model, name, lambda weight, grid=grid: round_into(weight, weight, grid, stored))  # type: ignore[misc]


def settle(model: nn.Module) -> None:
    """Put what trained in its place as it will be shipped: from here on the model is the one that is scored."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    for rounded in rounded_modules(model):
        name = names.pop(id(rounded.weight), None)  # a tied one is met twice
        if name is not None and rounded.trains:
            alter(model, name, rounded.in_place())
        rounded.settled = True


def check_stored(base: Checkpoint, model: nn.Module, parts: Parts, training: Training) -> None:
    """Raise BadInput where a weight that is to be rounded is not stored in the dtype that the plan counts on."""
    for plain in grids_here(model, parts, training):
        name = base.name_of(plain)
        stored = str(base.read(name, slice(0, 1)).dtype).removeprefix("torch.")
        if stored != training.stored_dtype:
            problem = f"{name} is stored in {stored}, the most of it in {training.stored_dtype}"
            raise BadInput("quantize_aware", f"{problem}: which codes a merge will have is not known", "leave it off")


class RoundedTurns(DenseTurns):
    """`DenseTurns` for a target: what leaves goes back rounded as it will be shipped, what enters comes unrounded."""

    def __init__(self, model: nn.Module, parts: Parts, training: Training, *args: Any) -> None:
        super().__init__(model, parts, *args)
        self.grids = {name: grid for name, (_, grid) in grids_here(model, parts, training).items()}
        self.stored = stored_in(training)

    def enter(self, unit: str) -> Named:
        """As `DenseTurns.enter`; an end's own values come back too."""
        with torch.no_grad():
            for name, parameter in self.ends.get(unit, ()):
                parameter.copy_(self._read(unit, name))
        return super().enter(unit)

    def leave(self, unit: str) -> Named:
        """As `DenseTurns.leave`, then rounded."""
        return self._round(super().leave(unit))

    def restore(self, unit: str) -> Named:
        """As `DenseTurns.restore`, then rounded."""
        return self._round(super().restore(unit))

    def _round(self, named: Named) -> Named:
        with torch.no_grad():
            for name, parameter in named:
                if name in self.grids:
                    round_into(parameter.data, parameter.data, self.grids[name], self.stored)
        return named
