"""What does a model compute once its weights are on the grids of a target?"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch

from edgeft.errors import BadInput
from edgeft.models.headers import blocks
from edgeft.models.streamed import Alteration, alter
from edgeft.settings.job import Rounding
from edgeft.targets.grid import Grid
from edgeft.targets.kinds import kind_of, ort_kind
from edgeft.targets.runtimes import runtime_of
from edgeft.targets.target import Target, eight_bit_modules


def grid_of(
    name: str, shape: tuple[int, ...], target: Rounding, tied: bool, promoted: Collection[str] | None = None
) -> Grid | None:
    """The grid that the export to `target` puts this tensor of a checkpoint on; None: kept in 16 or 32 bits.

    Raises BadInput as `kinds.kind_of` does.
    """
    kind = kind_of(name, shape, target, tied, promoted)
    return None if kind is None else Grid(*kind)


def ort_grid(target: Rounding, bits: int, tied: bool, *, table: bool) -> Grid | None:
    """Of a matrix product, or of an embedding `table` that is not the head; None: kept in fp32."""
    kind = ort_kind(target, bits, tied, table=table)
    return None if kind is None else Grid(*kind)


def round_(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The weight itself, each value replaced by what the runtime will compute with; by blocks of rows."""
    for part in blocks(tuple(weight.shape)):
        weight[part] = grid.encode(weight[part].float()).weight().to(weight.dtype)
    return weight


def round_model(model: Any, target: Target) -> int:
    """Round every weight of a torch model as the export to `target` would; how many tensors that were.

    Its logits are then the artifact's, but for the 8-bit activations of accuracy level 4 and the order of sums.
    """
    grids = grids_of(model, target)
    for name, grid in grids.items():
        alter(model, name, partial(round_, grid=grid))
    return len(grids)


def round_as_target(model: Any, target: Target) -> int:
    """Round a model's weights as the target does; how many tensors that were: 0 where torch does not know how."""
    changes = changes_of(model, target)
    for name, change in changes.items():
        alter(model, name, change)
    return len(changes)


def changes_of(model: Any, target: Target) -> dict[str, Alteration]:
    """What the target makes of each weight of a torch model, by its name; nothing where torch does not know that."""
    if runtime_of(target).casts_half and target.weight_bits == 16:
        halves = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
        return dict.fromkeys(halves, lambda weight: weight.copy_(weight.half()))
    try:
        grids = grids_of(model, target) if target.weight_bits < 16 else {}
    except BadInput:  # a target whose rounding is its runtime's alone
        return {}
    return {name: partial(round_, grid=grid) for name, grid in grids.items()}


def grids_of(model: Any, target: Rounding) -> dict[str, Grid]:
    """The grid of each parameter of a torch model that has one in the target, by its name."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return grids_of_shapes(shapes, target, tied)


def grids_of_shapes(shapes: Mapping[str, tuple[int, ...]], target: Rounding, tied: bool) -> dict[str, Grid]:
    """The same by the names and shapes of all parameters."""
    promoted = promoted_modules(shapes, target)
    found = {name: grid_of(name, shape, target, tied, promoted) for name, shape in shapes.items()}
    return {name: grid for name, grid in found.items() if grid is not None}


def promoted_modules(parameters: Collection[str], target: Rounding) -> set[str]:
    """Which modules of a checkpoint get 8 bits in a target that mixes them, by the names of its parameters."""
    inside: dict[str, tuple[str, str]] = {}
    for name in parameters:
        found = re.fullmatch(r".*layers\.(\d+)\..*?([a-z_]+_proj)\.weight", name)
        if found:
            inside[name.removesuffix(".weight")] = found[1], found[2]
    layers = 1 + max((int(layer) for layer, _ in inside.values()), default=-1)
    projections = tuple(dict.fromkeys(projection for _, projection in inside.values()))
    eight = set(eight_bit_modules(target, layers, projections))
    return {name for name, (layer, projection) in inside.items() if f"layers.{layer}.{projection}" in eight}
