"""Which scales hold every key and value that rows of the training data put into a device's cache?

The rows go through the model as the bundle will hold it, rounded, a layer at a time (layer_walk.py). What a layer's
attention would keep is seen as it is handed to its cache: keys after their norm and rotary embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from edgeft.data.samples import Sample
from edgeft.errors import BadInput
from edgeft.exporting.calibrate import calibrated_changes
from edgeft.exporting.layer_walk import LayerWalk, chosen_rows
from edgeft.memory.stages import CACHE_TOKENS
from edgeft.models.cache_names import cache_argument
from edgeft.models.spec import ModelSpec
from edgeft.progress import Progress, silent
from edgeft.targets.codes import Codes
from edgeft.targets.kv_cache import CacheScales, longest_pairs, scales_of
from edgeft.targets.rounding import changes_of
from edgeft.targets.target import Target

WHERE = "KV cache of 8 bits"


class _Handed:
    """What an attention hands to its cache, in the place of one."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.keys, self.values = keys, values
        return keys, values


Samples = Callable[[], Sequence[Sample]]


def finder(
    merged: Path, target: Target, tuning: Samples, spec: ModelSpec, progress: Progress = silent
) -> Callable[[Codes | None], CacheScales] | None:
    """What finds the scales of a target's cache on rows of `tuning`, given calibrated codes; None where it has none."""
    if not target.has_cache_scales:
        return None
    return lambda codes: find_scales(merged, target, rows_for_scales(tuning(), spec), codes, progress)


def rows_for_scales(samples: Sequence[Sample], spec: ModelSpec) -> list[Sample]:
    """The first rows of the training data, CACHE_TOKENS at most, cut where a layer's window ends."""
    end = spec.sliding_window or None
    return [Sample(each.ids[:end], each.labels[:end], 0) for each in chosen_rows(samples, CACHE_TOKENS)]


def find_scales(
    merged: Path, target: Target, rows: Sequence[Sample], codes: Codes | None = None, progress: Progress = silent
) -> CacheScales:
    """The scales of every layer's keys and values, by the rows; `codes` are those of a calibrated target.

    Raises BadInput without rows, and for a layer that keeps nothing or zeros alone.
    """
    if not rows:
        raise BadInput(WHERE, "there are no rows to find scales on", "give training data with tokens to train on")
    walk = LayerWalk(merged)
    changes = changes_of(walk.model, target) if codes is None else calibrated_changes(walk.model, target, codes)

    def change(name: str, weight: torch.Tensor) -> None:
        if name in changes:
            changes[name](weight)

    walk.begin(rows, change)
    found, count = CacheScales([], []), len(walk.layers)
    for index in range(count):
        progress("calibrate the cache", index, count, {})
        keys, values = _reach(walk, index, change)
        found.keys.append(scales_of(keys, f"{WHERE}, keys of layer {index}"))
        found.values.append(scales_of(values, f"{WHERE}, values of layer {index}"))
    progress("calibrate the cache", count, count, {})
    return found


def _reach(walk: LayerWalk, index: int, change: Callable[[str, torch.Tensor], None]) -> tuple[Any, Any]:
    """What each channel of one layer's keys and values may reach, after the rows went through it."""
    handed, most = _Handed(), list[tuple[Any, Any]]()
    walk.enter(index)
    with torch.no_grad():
        for parameter in walk.layers[index].parameters():
            change(walk.names[id(parameter)], parameter.data)

    def after(batch: int) -> None:
        if not hasattr(handed, "keys"):
            raise BadInput(WHERE, f"layer {index} hands nothing to a cache", "export with --set kv_bits=32")
        keys, values = (_by_token(each, walk.batches[batch].real) for each in (handed.keys, handed.values))
        turns = walk.given[index][batch].get("position_embeddings")
        rotary = keys.shape[-1] if turns is None else turns[0].shape[-1]
        most.append((longest_pairs(keys, rotary), numpy.abs(values).max(axis=0).reshape(-1)))

    walk.leave(index, {cache_argument(walk.layers[index]): handed}, after)
    keys, values = zip(*most, strict=True)
    return numpy.max(keys, axis=0), numpy.max(values, axis=0)


def _by_token(kept: torch.Tensor, real: torch.Tensor) -> Any:
    """(rows, heads, tokens, head_dim) as (tokens, heads, head_dim) without padding."""
    return kept.transpose(1, 2).reshape(-1, kept.shape[1], kept.shape[3])[real].numpy()
