"""Which codes lose least of what a layer's outputs see on rows of the training data?

Each matrix by a rule of compensation.py, weighed by X'X of its inputs X. The first decoder layer first, each one's
inputs made by layers that are rounded already; a layer's codes go to disk before the next one starts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from edgeft.data.samples import Sample
from edgeft.errors import BadInput
from edgeft.exporting.compensation import Rule, damped, inverse_factor, least_change
from edgeft.exporting.input_weights import weigh
from edgeft.exporting.layer_walk import LayerWalk, chosen_rows
from edgeft.merging.change import find_tensor
from edgeft.models.checkpoint import Checkpoint
from edgeft.models.parts import is_linear
from edgeft.models.streamed import Alteration, alter
from edgeft.progress import Progress, silent
from edgeft.targets.codes import Codes
from edgeft.targets.grid import Encoded, Grid
from edgeft.targets.rounding import grids_of, round_
from edgeft.targets.target import Target, to_nearest


def calibrate(
    merged: Path, target: Target, samples: Sequence[Sample], folder: Path, progress: Progress = silent,
    rule: Rule = least_change,
) -> Codes:  # fmt: skip
    """Calibrated codes of every matrix of the decoder layers, by a rule, or what inputs count, written into `folder`.

    The same folder, target and rows give the same codes on the same kind of processor with as many threads. Raises
    BadInput for rows that hold nothing, and as `rounding.grid_of` does.
    """
    rows = chosen_rows(samples)
    if not rows:
        raise BadInput("calibration", "there are no rows to calibrate on", "give training data with tokens to train on")
    if target.calibration == "imatrix":
        return weigh(merged, rows, folder, progress)
    walk = _Walk(merged, target, rows, Codes(folder), rule)
    count = len(walk.layers)
    for index in range(count):
        progress("calibrate", index, count, {})
        walk.step(index)
    progress("calibrate", count, count, {})
    return walk.codes


class _Walk(LayerWalk):
    """A merged model in its files, rounded up to some layer, and what goes into that layer for each batch of rows.

    Of its weights, only those of one layer are in memory, in fp32.
    """

    def __init__(
        self, merged: Path, target: Target, rows: Sequence[Sample], codes: Codes, rule: Rule = least_change
    ) -> None:
        super().__init__(merged)
        self.codes, self.checkpoint, self.rule = codes, Checkpoint(merged), rule
        grids = grids_of(self.model, to_nearest(target))
        self.grids = {key: grids[name] for key, name in self.names.items() if name in grids and key in self.last}
        self.begin(rows, lambda name, weight: round_(weight, grids[name]) if name in grids else None)

    @torch.no_grad()
    def step(self, index: int) -> None:
        """Round one layer, write its codes, and send every batch through it."""
        found = dict[str, Encoded]()
        self.enter(index)
        for linears in self._groups(index):
            gram = damped(self._gram(index, linears[0]))
            factor = inverse_factor(gram)
            for grid, members in groupby(linears, key=lambda linear: self.grids[id(linear.weight)]):
                found |= self._round(list(members), gram, factor, grid)
        self.codes.write(f"layer-{index:04}", found)
        self.leave(index)

    def _groups(self, index: int) -> list[list[Any]]:
        """The linears of a layer that are rounded, in the order in which they compute, by what they read."""
        seen: list[tuple[Any, Any]] = []

        def note(linear: Any, arguments: Any) -> None:
            seen.append((linear, arguments[0]))

        layer = self.layers[index]
        linears = [each for each in layer.modules() if is_linear(each) and id(each.weight) in self.grids]
        hooks = [linear.register_forward_pre_hook(note) for linear in linears]
        smallest = min(range(len(self.states)), key=lambda at: self.states[at].numel())
        layer(self.states[smallest], **self.given[index][smallest])
        for hook in hooks:
            hook.remove()
        groups: list[list[Any]] = []
        for at, (linear, read) in enumerate(seen):
            if at and read is seen[at - 1][1]:
                groups[-1].append(linear)
            else:
                groups.append([linear])
        return groups

    def _gram(self, index: int, linear: Any) -> torch.Tensor:
        """X'X over the tokens of all rows, of what this linear reads while those before it are rounded."""
        total = torch.zeros(linear.in_features, linear.in_features)
        kept = torch.empty(0)

        def see(_: Any, arguments: Any) -> None:
            read = arguments[0].reshape(-1, linear.in_features)[kept]
            total.addmm_(read.T, read)
            raise _Seen

        hook = linear.register_forward_pre_hook(see)
        for at, state in enumerate(self.states):
            kept = self.batches[at].real
            with contextlib.suppress(_Seen):
                self.layers[index](state, **self.given[index][at])
        hook.remove()
        return total

    def _round(self, linears: list[Any], gram: torch.Tensor, factor: torch.Tensor, grid: Grid) -> dict[str, Encoded]:
        """The codes of linears that read the same, on one grid; the linears then hold what these decode to."""
        heights = [linear.weight.shape[0] for linear in linears]
        whole = self.rule(torch.cat([linear.weight.data for linear in linears]), gram, factor, grid)
        found, first = {}, 0
        for linear, height in zip(linears, heights, strict=True):
            part = whole.rows(slice(first, first + height))
            linear.weight.copy_(part.weight())
            stored = find_tensor(self.checkpoint, self.names[id(linear.weight)])
            assert stored is not None  # matrices of decoder layers are tied to nothing
            found[stored], first = part, first + height
        return found


def put_codes(model: Any, target: Target, codes: Codes) -> int:
    """Give a torch model of the checkpoint the weights of its calibrated bundle; how many tensors those are."""
    changes = calibrated_changes(model, target, codes)
    for name, change in changes.items():
        alter(model, name, change)
    return len(changes)


def calibrated_changes(model: Any, target: Target, codes: Codes) -> dict[str, Alteration]:
    """What becomes of each weight of a torch model in its calibrated bundle, by its name."""
    by_name = {stored.rpartition("layers.")[2]: stored for stored in codes}
    found: dict[str, Alteration] = {}
    for name, grid in grids_of(model, to_nearest(target)).items():
        stored = by_name.get(name.rpartition("layers.")[2])
        found[name] = partial(round_, grid=grid) if stored is None else partial(_decode, codes, stored)
    return found


def _decode(codes: Codes, stored: str, weight: torch.Tensor) -> None:
    weight.copy_(codes.read(stored).weight())


class _Seen(Exception):
    """What was wanted of a layer's forward pass has been seen."""
