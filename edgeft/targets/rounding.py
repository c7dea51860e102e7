"""Which grid does a target keep each tensor of a checkpoint on, and what does a model compute once it is there?"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial
from typing import Any

import torch

from edgeft.errors import BadInput
from edgeft.models.headers import EMBEDDINGS, HEADS, blocks
from edgeft.models.streamed import alter
from edgeft.targets.grid import GGML, Grid, Method
from edgeft.targets.matrices import GGUF_TYPES
from edgeft.targets.runtimes import runtime_of
from edgeft.targets.target import Target, eight_bit_modules

POSITIONS = ("wpe.weight", "embed_positions.weight")  # tables of positions are added, not multiplied


def grid_of(
    name: str, shape: tuple[int, ...], target: Target, tied: bool, promoted: Collection[str] | None = None
) -> Grid | None:
    """The grid that the export to `target` puts this tensor of a checkpoint on; None: kept in 16 or 32 bits.

    As `nbits` and `gguf_file` write: every matrix product, and tables that share the
    head's weights or that the target wants in few bits. `promoted` are the modules with 8 bits of a target that mixes
    them, by their names in the checkpoint. Raises BadInput for a target whose rounding only its runtime knows.
    """
    mixed = (target.mixed_layers or target.eight_bit) and promoted is None
    if target.calibration != "none":
        problem = "chooses its codes on training rows: what it makes of a weight is not known from the weight alone"
        raise BadInput(f"target {target.name}", problem, "choose ort-int4, ort-int8 or ort-fp32")
    grids = runtime_of(target).grids
    if grids is None or target.method != "rtn" or mixed or target.weight_bits == 16:
        problem = "rounds in a way that is not computed here"
        raise BadInput(f"target {target.name}", problem, "choose ort-int4, ort-int8 or ort-fp32")
    if target.weight_bits == 32 or len(shape) != 2 or name.endswith(POSITIONS):
        return None
    of_table = name.endswith(EMBEDDINGS) and not tied
    bits: int = target.weight_bits
    if of_table:
        bits = target.embedding_bits
    elif name.endswith((*HEADS, *EMBEDDINGS)):
        bits = target.head_bits
    elif name.removesuffix(".weight") in (promoted or ()):
        bits = 8
    return ort_grid(target, bits, tied, table=of_table) if grids == "ort" else _ggml_grid(target, bits, shape)


def ort_grid(target: Target, bits: int, tied: bool, *, table: bool) -> Grid | None:
    """Of a matrix product, or of an embedding `table` that is not the head; None: kept in fp32.

    The rules are those of ONNX Runtime's quantiser, which knows one for graphs with an embedding that is rounded.
    """
    separate = not tied and target.embedding_bits == 4
    if table and not separate:
        return None
    method: Method = "gather" if table else "mlas" if separate else "rtn"
    assert bits in (4, 8)  # Target refuses a head of 32 bits on a body of fewer
    return Grid(8 if bits == 8 else 4, target.block_size, target.symmetric, method)


def _ggml_grid(target: Target, bits: int, shape: tuple[int, ...]) -> Grid | None:
    """None for rows that blocks of 32 do not divide: llama.cpp keeps them in fp16."""
    if bits >= 16 or shape[-1] % 32:
        return None
    return GGML[GGUF_TYPES[bits, target.symmetric or bits == 8]]


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


def grids_of(model: Any, target: Target) -> dict[str, Grid]:
    """The grid of each parameter of a torch model that has one in the target, by its name."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    promoted = promoted_modules(shapes, target)
    found = {name: grid_of(name, shape, target, tied, promoted) for name, shape in shapes.items()}
    return {name: grid for name, grid in found.items() if grid is not None}


def promoted_modules(parameters: Collection[str], target: Target) -> set[str]:
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
