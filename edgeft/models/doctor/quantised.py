"""Which weights of a folder are packed by a quantiser, and what shape has each without that? (no torch)"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeft.models.headers import DTYPES, FLOATING

Shape = tuple[int, ...]
Entries = Mapping[str, dict[str, Any]]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A tensor as it is to be written: `how` it is made of the tensors of the files, which `parts` names by role."""

    shape: Shape
    dtype: str  # safetensors' code
    how: str = "copy"
    parts: dict[str, str] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Packing:
    """One way to pack a linear's weight into several tensors of its module."""

    how: str
    words: str
    needs: dict[str, tuple[str, ...]]  # role: dtypes it may have
    may: tuple[str, ...]
    shape: Callable[[dict[str, Shape], Settings], Shape]
    methods: tuple[str, ...] = ()  # quant_method in config.json; none: any


def _of_rows(role: str, axis: int) -> Callable[[dict[str, Shape], Settings], Shape]:
    """The shape of a weight (out, in) whose codes lie in words of 32 bits along an axis of `role`'s."""

    def shape(shapes: dict[str, Shape], settings: Settings) -> Shape:
        sizes = list(shapes[role])
        sizes[axis] = sizes[axis] * 32 // (settings.get("bits", 4) or 32)
        return tuple(sizes) if role in ("weight", "weight_packed") else tuple(sizes[::-1])

    return shape


def _same(shapes: dict[str, Shape], settings: Settings) -> Shape:
    return shapes["weight"]


def _told(shapes: dict[str, Shape], settings: Settings) -> Shape:
    return tuple(settings.get("shape") or ())


INT32, F8, ANY = ("I32", "U32"), ("F8_E4M3", "F8_E5M2"), FLOATING
NF4 = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
PACKINGS = (
    Packing("awq", "AWQ", {"qweight": INT32, "qzeros": INT32, "scales": ANY}, (), _of_rows("qweight", 1), ("awq",)),
    Packing("gptq", "GPTQ", {"qweight": INT32, "qzeros": INT32, "scales": ANY}, ("g_idx",), _of_rows("qweight", 0),
            ("gptq", "auto-round", "intel/auto-round")),
    Packing("nf4", "bitsandbytes, 4 bits", {"weight": ("U8",), "weight.absmax": (*ANY, "U8"), "weight.quant_map": ANY},
            (*NF4, "weight.nested_absmax", "weight.nested_quant_map"), _told),
    Packing("int8", "bitsandbytes, 8 bits", {"weight": ("I8",), "SCB": ANY}, ("weight_format",), _same),
    Packing("mlx", "MLX", {"weight": ("U32",), "scales": ANY, "biases": ANY}, (), _of_rows("weight", 1)),
    Packing("compressed", "compressed-tensors, packed", {"weight_packed": ("I32",), "weight_scale": ANY},
            ("weight_shape", "weight_zero_point", "weight_g_idx", "input_scale"), _of_rows("weight_packed", 1)),
    Packing("scaled", "8 bits with a scale", {"weight": (*F8, "I8"), "weight_scale": ANY},
            ("input_scale", "weight_zero_point"), _same),
    Packing("blocks", "FP8 with a scale for each block", {"weight": F8, "weight_scale_inv": ANY},
            ("input_scale", "activation_scale"), _same),
)  # fmt: skip
WORDS = {packing.how: packing.words for packing in PACKINGS}
ROLES = sorted({role for packing in PACKINGS for role in (*packing.needs, *packing.may)}, key=len, reverse=True)


def settings_of(config: Mapping[str, Any]) -> Settings:
    """What config.json says of how weights are packed, under one name each; {} where it says nothing."""
    said = config.get("quantization_config") or config.get("quantization")
    if not said or not isinstance(said, dict):
        return {"quant_method": str(said)} if said else {}
    told = dict(said)
    if isinstance(
        groups := told.get("config_groups"), dict
    ):  # compressed-tensors: one group for all linears, or none of it is known
        found = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        weights = [each for each in found if isinstance(each, dict)]
        told |= {"bits": weights[0].get("num_bits", 4), "group_size": weights[0].get("group_size"),
                 "groups": len(weights)} if weights else {}  # fmt: skip
    bits = told.get("bits") or told.get("w_bit") or 4
    return told | {"bits": bits if type(bits) is int and 1 <= bits <= 32 else 0}


def _split(name: str) -> tuple[str, str]:
    """(module, role); of a name that has no packed role, what is before the last dot and behind it."""
    role = next((role for role in ROLES if name.endswith("." + role)), name.rpartition(".")[2])
    return name[: -len(role) - 1], role


def plan_pieces(entries: Entries, config: Mapping[str, Any], told: Callable[[str], Settings]) -> dict[str, Piece]:
    """Every tensor by its name without packing. `entries` by plain names; `told` reads what a quantiser left in one."""
    modules: dict[str, dict[str, str]] = {}
    for name in entries:
        module, role = _split(name)
        modules.setdefault(module, {})[role] = name
    settings, dtype = {"bits": 4} | settings_of(config), dtype_of(config, entries)
    pieces: dict[str, Piece] = {}
    for module, roles in modules.items():
        packing = next((each for each in PACKINGS if _is(each, roles, entries, settings)), None)
        taken = {r: n for r, n in roles.items() if packing and r in (*packing.needs, *packing.may)}
        if packing is not None:
            own = settings | _override(settings, module)
            state = next((told(roles[role]) for role in NF4 if role in roles), {})
            shapes = {role: tuple(entries[name]["shape"]) for role, name in taken.items()}
            shape = packing.shape(shapes, own | state)
            pieces[f"{module}.weight"] = Piece(shape, dtype, packing.how, taken, own | state)
        for name in roles.values():
            if name not in taken.values():
                pieces[name] = Piece(tuple(entries[name]["shape"]), entries[name]["dtype"], parts={"": name})
    return pieces


def _is(packing: Packing, roles: dict[str, str], entries: Entries, settings: Settings) -> bool:
    if not all(role in roles and entries[roles[role]]["dtype"] in kinds for role, kinds in packing.needs.items()):
        return False
    return not packing.methods or settings.get("quant_method") in packing.methods


def _override(settings: Settings, module: str) -> Settings:
    """MLX gives single modules bits of their own."""
    own = settings.get(module)
    return own if isinstance(own, dict) else {}


def dtype_of(config: Mapping[str, Any], entries: Entries) -> str:
    """The dtype that a model computes in beside packed weights: config.json's, or what the other tensors have."""
    told = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    code = next((code for code, name in DTYPES.items() if name == told), "")
    if code in FLOATING:
        return code
    sizes = {code: 0 for code in FLOATING}
    for name, entry in entries.items():
        if entry["dtype"] in FLOATING and name.endswith((".weight", ".scales")):
            sizes[entry["dtype"]] += math.prod(entry["shape"])
    return max(sizes, key=lambda code: sizes[code])


def cannot_unpack(piece: Piece) -> str:
    """Why a packed tensor cannot be read here; empty where it can."""
    bits, settings = int(piece.settings.get("bits", 4)), piece.settings
    if piece.how in ("gptq", "awq", "compressed", "mlx") and bits not in (2, 4, 8):
        return f"{bits} bits"
    if piece.how == "awq" and str(settings.get("version", "gemm")).lower() != "gemm":
        return f"AWQ's {settings['version']} layout"
    if piece.how == "gptq" and str(settings.get("checkpoint_format", "gptq")) not in ("gptq", "gptq_v2"):
        return f"GPTQ's {settings['checkpoint_format']} layout"
    if piece.how == "mlx" and settings.get("mode", "affine") != "affine":
        return f"MLX's {settings['mode']} mode"
    if piece.how in ("compressed", "scaled") and settings.get("groups", 1) > 1:
        return "several groups of settings"
    if piece.how == "compressed" and ({"weight_zero_point", "weight_g_idx"} & piece.parts.keys()):
        return "packed zero points or an order of its own"
    return "" if piece.shape and all(piece.shape) else "no shape in the files"
