"""How does a run start above its frozen layers: their outputs made or found, checked, and their weights let go?"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path
from typing import Any

import torch

from edgeft.data.batches import make_batch
from edgeft.data.samples import Sample
from edgeft.engine import prefix_cache
from edgeft.engine.nf4_base import read_back
from edgeft.engine.prefix_cache import PrefixCache
from edgeft.errors import BadInput
from edgeft.machines import meter
from edgeft.memory import disk
from edgeft.models.boundary import Boundary, release_pages
from edgeft.models.evaluate import autocast
from edgeft.models.parts import Parts
from edgeft.planning.plan import Plan
from edgeft.progress import Progress
from edgeft.settings.job import Training
from edgeft.training.job_data import Data

# How far a token's states may be from those that were kept: other rows beside it change the order of sums. Those of
# another row, or of another layer, are about 1 away. Rounded to bf16 each number is at most 0.004 of itself away.
APART = {"cpu fp32 computed": 1e-3}
APART_ELSEWHERE = 5e-2


@dataclass
class FrozenPrefix:
    """What lies below the lowest layer that trains: its outputs on disk, and whether its weights are in memory."""

    training: Training
    folder: Path  # of the base
    model: Any
    device: torch.device
    boundary: Boundary
    cache: PrefixCache
    seconds: float  # of making the cache; 0 where it was there

    @classmethod
    def open(
        cls, plan: Plan, data: Data, model: Any, parts: Parts, folder: Path, device: torch.device, compute: torch.dtype,
        progress: Progress,
    ) -> FrozenPrefix:  # fmt: skip
        """The states of all of a run's rows, from an earlier run or made now.

        Raises BadInput for a model that cannot go on from them, and for states that are not what its layers give.
        """
        training = plan.training
        boundary = Boundary(parts, training.cached_layers)
        rows = rows_of(data, training)

        def outputs(samples: Sequence[Sample]) -> torch.Tensor:
            with autocast(device, compute):
                return boundary.reach(make_batch(samples).to(device).ids)

        groups = probes(rows, training.group_tokens)
        sound = [check_boundary(model, boundary, group, outputs, device, compute) for group in groups]
        width, computed = sound[0].shape[-1], sound[0].dtype
        dtype = torch.bfloat16 if training.cached_dtype == "bf16" else computed
        key = prefix_cache.key_of(folder, training, rows, device, dtype)
        place = prefix_cache.place_of(key)
        with prefix_cache.alone(place):
            seconds = find_or_make(place, key, rows, outputs, dtype, plan, progress)
        cache = PrefixCache(place, rows, width, dtype, computed)
        for group, states in zip(groups, sound, strict=True):
            check_states(cache, group, states, device, training)
        return cls(training, folder, model, device, boundary, cache, seconds)

    def above(self, parts: Parts) -> Parts:
        """The parts of a model that starts from the states that are kept."""
        return self.boundary.above(parts, lambda samples: self.cache.states(samples).to(self.device))

    def drop(self) -> None:
        """Let go of the weights below."""
        self.boundary.drop(self.model, release_pages)
        meter.give_back()

    def restore(self) -> None:
        """Make the model whole again, for tokens that are no row's own; nothing where it is."""
        if self.boundary.dropped:
            read_back(self.boundary.dropped, self.folder, self.training, self.device)
            self.boundary.dropped.clear()


def find_or_make(
    place: Path, key: prefix_cache.Key, rows: Sequence[Sample], outputs: Callable[[Sequence[Sample]], torch.Tensor],
    dtype: torch.dtype, plan: Plan, progress: Progress,
) -> float:  # fmt: skip
    """Seconds that making the states took; 0 where they were there, and are sound."""
    if place.exists():
        prefix_cache.check(place, key, rows)
        return 0.0
    disk.require(disk.prefix_disk(plan.spec, plan.training), place)
    tokens = plan.training.group_tokens
    return prefix_cache.make(place, key, rows, outputs, tokens, dtype, lambda done, n: progress("prefix", done, n, {}))


def rows_of(data: Data, training: Training) -> list[Sample]:
    """All rows that a run trains on or scores."""
    return [*data.train, *data.valid[: training.eval_rows], *data.stopping, *data.test]


def probes(rows: Sequence[Sample], tokens: int) -> list[list[Sample]]:
    """Rows that are computed both ways: the longest, one at random, the two shortest at once if `tokens` hold them."""
    pair = nsmallest(2, rows, key=len)
    groups = [[max(rows, key=len)], [random.Random(len(rows)).choice(rows)], pair]
    return groups if 2 * len(pair[-1]) <= tokens else groups[:2]


@torch.no_grad()
def check_boundary(
    model: Any, boundary: Boundary, samples: Sequence[Sample], outputs: Callable[[Sequence[Sample]], torch.Tensor],
    device: torch.device, compute: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The states of some samples. Raises BadInput where a model that starts from them gives what the whole does not.

    Layers that read more than the hidden states of those below (another layer's keys, the ids) or draw random numbers
    are found here: both ways compute the same products in the same order.
    """
    name, hint = type(model).__name__, "plan again with --set prefix_cache=false"
    ids = make_batch(samples).to(device).ids
    with autocast(device, compute):
        whole = boundary.body(input_ids=ids, use_cache=False).last_hidden_state
        states = outputs(samples)
        if not torch.equal(states, outputs(samples)):
            raise BadInput(name, f"its lowest {boundary.cut} layers give other outputs each time", hint)
        try:
            with boundary.given(states):
                above = boundary.body(input_ids=ids, use_cache=False).last_hidden_state
        except (RuntimeError, TypeError, AttributeError, IndexError, KeyError) as problem:
            raise BadInput(name, f"cannot go on from layer {boundary.cut}'s input: {problem}", hint) from problem
    if not torch.equal(whole, above):
        found = f"read more than the outputs of those below: {apart(above, whole):.2g} away from the whole model"
        raise BadInput(name, f"layers from {boundary.cut} on {found}", hint)
    return states


def check_states(
    cache: PrefixCache, samples: Sequence[Sample], states: torch.Tensor, device: torch.device, training: Training
) -> None:
    """Raise BadInput where what is kept of some samples is not what the layers give."""
    most = APART.get(f"{device.type} {training.compute_dtype} {training.cached_dtype}", APART_ELSEWHERE)
    for sample, kept, now in zip(samples, cache.states(samples), states.cpu(), strict=True):
        found = apart(kept[: len(sample)], now[: len(sample)])
        if not found <= most:
            problem = f"holds other outputs of row {cache.rows.index(sample)} than its layers give: {found:.2g} away"
            raise BadInput(cache.path.parent, problem, prefix_cache.AGAIN)


def apart(some: torch.Tensor, others: torch.Tensor) -> float:
    """The largest ||a - b|| / ||b|| of a token's states."""
    difference, size = (some.float() - others.float()).norm(dim=-1), others.float().norm(dim=-1)
    return float((difference / size.clamp_min(1e-6)).max())
