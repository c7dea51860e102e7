"""What are the numbers of a weight that a quantiser packed? Each in fp32, then rounded once to the model's dtype.

GPTQ (arXiv 2210.17323) and AWQ (2306.00978) as AutoGPTQ and AutoAWQ store them, bitsandbytes by its own code, MLX's
affine mode, FP8 with one scale, a scale a row or a block, compressed-tensors without zero points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from edgeft.models.checkpoint import SAFETENSORS_DTYPES
from edgeft.models.doctor.quantised import Piece
from edgeft.models.doctor.stores import Store

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in a word of each column, at 4 bits
ROW_SCALE = 1 / 127  # bitsandbytes' int8: a row's largest value is 127


def make(store: Store, piece: Piece) -> torch.Tensor:
    """One tensor of the repaired model."""
    parts = {role: store.read(name) for role, name in piece.parts.items()}
    if piece.how == "copy":
        return parts[""]
    return UNPACK[piece.how](parts, piece.settings).to(SAFETENSORS_DTYPES[piece.dtype])


def codes(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """The codes in words of 32 bits, lowest bits first, along an axis."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    words = words.view(torch.int32) if words.dtype != torch.int32 else words
    mask = 2**bits - 1
    if axis == 0:
        found: torch.Tensor = (words[:, None, :] >> shifts[None, :, None]) & mask
        return found.flatten(0, 1)
    found = (words[:, :, None] >> shifts) & mask
    return found.flatten(1, 2)


def gptq(parts: Tensors, settings: dict[str, Any]) -> torch.Tensor:
    """(codes - zeros) scales, a group of input features at a time; stored zeros are one less, but in version 2."""
    bits = int(settings["bits"])
    stored = codes(parts["qweight"], bits, 0)
    scales = parts["scales"].float()
    zeros = codes(parts["qzeros"], bits, 1)[:, : scales.shape[1]]
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & (2**bits - 1)
    size = -(-stored.shape[0] // scales.shape[0])
    group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(stored.shape[0]) // size
    return ((stored - zeros[group]).float() * scales[group]).T.contiguous()


def awq(parts: Tensors, settings: dict[str, Any]) -> torch.Tensor:
    """(codes - zeros) scales; eight columns of a word in an order of their own."""
    bits = int(settings["bits"])
    stored, zeros = (_in_order(codes(parts[role], bits, 1), bits) for role in ("qweight", "qzeros"))
    size = stored.shape[0] // zeros.shape[0]
    spread = (zeros.repeat_interleave(size, 0), parts["scales"].float().repeat_interleave(size, 0))
    return ((stored - spread[0]).float() * spread[1]).T.contiguous()


def _in_order(found: torch.Tensor, bits: int) -> torch.Tensor:
    return found.view(found.shape[0], -1, 32 // bits)[:, :, list(AWQ_ORDER)].flatten(1) if bits == 4 else found


def bitsandbytes_4(parts: Tensors, settings: dict[str, Any]) -> torch.Tensor:
    """By bitsandbytes itself, in the dtype it was quantised from."""
    import bitsandbytes.functional as bnb

    stats = {role.removeprefix("weight."): tensor for role, tensor in parts.items() if role != "weight"}
    state = bnb.QuantState.from_dict(stats, device=torch.device("cpu"))
    dense: torch.Tensor = bnb.dequantize_4bit(parts["weight"], state)
    return dense.view(tuple(settings["shape"]))


def bitsandbytes_8(parts: Tensors, settings: dict[str, Any]) -> torch.Tensor:
    return parts["weight"].float() * parts["SCB"].float()[:, None] * ROW_SCALE


def mlx(parts: Tensors, settings: dict[str, Any]) -> torch.Tensor:
    """codes scales + biases, a group of input features at a time."""
    stored = codes(parts["weight"], int(settings["bits"]), 1).float()
    return stored * _wide(parts["scales"], stored) + _wide(parts["biases"], stored)


def _wide(scales: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """A value for every input feature, of one for each group of them."""
    wide: torch.Tensor = scales.float().repeat_interleave(stored.shape[1] // scales.shape[1], 1)
    return wide


def compressed(parts: Tensors, settings: dict[str, Any]) -> torch.Tensor:
    """Signed codes, stored from 0, times their group's scale."""
    bits = int(settings["bits"])
    stored = (codes(parts["weight_packed"], bits, 1) - (1 << (bits - 1))).float()
    return stored * _wide(parts["weight_scale"], stored)


def scaled(parts: Tensors, settings: dict[str, Any]) -> torch.Tensor:
    """One scale for the whole weight, for each row, or for each group of a row."""
    stored, scales = parts["weight"].float(), parts["weight_scale"]
    if scales.ndim < 2:
        scales = scales.reshape(-1, 1)
    if (zeros := parts.get("weight_zero_point")) is not None:
        stored = stored - _wide(zeros.reshape(scales.shape), stored)
    return stored * _wide(scales, stored)


def blocks(parts: Tensors, settings: dict[str, Any]) -> torch.Tensor:
    """A scale for each block of rows and columns, those at the edges smaller; or one for all."""
    stored, scales = parts["weight"].float(), parts["weight_scale_inv"].float()
    if scales.ndim < 2:
        return stored * scales
    rows, columns = settings.get("weight_block_size") or (128, 128)
    spread = scales.repeat_interleave(rows, 0)[: stored.shape[0]].repeat_interleave(columns, 1)[:, : stored.shape[1]]
    dense: torch.Tensor = stored * spread
    return dense


UNPACK: dict[str, Callable[[Tensors, dict[str, Any]], torch.Tensor]] = {
    "gptq": gptq, "awq": awq, "nf4": bitsandbytes_4, "int8": bitsandbytes_8, "mlx": mlx, "compressed": compressed,
    "scaled": scaled, "blocks": blocks,
}  # fmt: skip
