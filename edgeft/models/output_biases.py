"""Which models have a place for a vector that is added to what attention gives: a bias of its output projection?

Some have one, some get one by a key of their config, which gives query, key and value a bias too: those are zeros. The
rest have none, and no weight there could hold the vector.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from edgeft.models.headers import LAYER
from edgeft.models.spec import ModelSpec


def holds_shift(spec: ModelSpec) -> bool:
    """Whether a model's attention output has a bias, or its config can give it one."""
    return spec.counted_from == "config" and (_has_one(spec) or bias_key(spec) is not None)


def _has_one(spec: ModelSpec) -> bool:
    return any(linear.has_bias for linear in spec.linears if linear.role == "attention_out")


def bias_key(spec: ModelSpec) -> str | None:
    """The key of the config that gives a model without one a bias of attention's output; None where there is none."""
    keys = [row[3] for row in spec.family.linears if row[4] == "attention_out"]
    return next((key for key in keys if isinstance(key, str) and not _has_one(spec)), None)


def _given(spec: ModelSpec) -> list[str]:
    """The projections of a layer to which that key gives a bias."""
    key = bias_key(spec)
    return [row[0] for row in spec.family.linears if key is not None and row[3] == key]


def absent_biases(spec: ModelSpec, tensors: Iterable[str]) -> dict[str, str]:
    """The biases that a checkpoint of these tensors lacks and that key gives it, each with its weight's name."""
    ends = tuple(f".{name}.weight" for name in _given(spec))
    found = [name for name in tensors if ends and name.endswith(ends) and LAYER.fullmatch(name)]
    return {f"{name.removesuffix('weight')}bias": name for name in found}


def with_biases(spec: ModelSpec) -> ModelSpec:
    """The spec of a merge in which attention's outputs have biases."""
    given = _given(spec)
    linears = tuple(linear.model_copy(update={"has_bias": linear.has_bias or linear.name in given})
                    for linear in spec.linears)  # fmt: skip
    more = sum(linear.out_features for linear in spec.linears if linear.name in given)
    layers = tuple(size + more for size in spec.layer_parameters)
    total = spec.total_parameters + more * len(layers)
    return spec.model_copy(update={"linears": linears, "layer_parameters": layers, "total_parameters": total})


def give_biases(folder: Path, spec: ModelSpec) -> None:
    """Say in config.json that attention has biases."""
    path, key = folder / "config.json", bias_key(spec)
    config = json.loads(path.read_text(encoding="utf-8"))
    (config.get("text_config") or config)[key] = True
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
