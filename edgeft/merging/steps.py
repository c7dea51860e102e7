"""What does a fine-tune do to the rows of a tensor? A change is a step from a reader of W0 to one of Wft."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgeft.models.folding import folded, lengths
from edgeft.models.headers import blocks

# a range of a tensor's rows, fp32; a step turns the reader of W0 into the reader of Wft, given the number of rows
Rows = Callable[[slice], torch.Tensor]
Step = Callable[[Rows, int], Rows]


def replaced_by(tensor: torch.Tensor) -> Step:
    """A tensor whose new value is at hand."""
    return lambda rows, count: lambda part: tensor[part]


def low_rank(
    factors: Callable[[], tuple[torch.Tensor, torch.Tensor]], scale: float,
    magnitude: Callable[[], torch.Tensor] | None, *, unit_is_row: bool,
) -> Step:  # fmt: skip
    """W0 + scale L R with L (rows, r) and R (r, columns); DoRA scales each unit to its magnitude: m W / ||W||.

    A unit is a row, or a column (Conv1D, embeddings), whose norm takes one pass over all rows.
    """

    def step(rows: Rows, count: int) -> Rows:
        left, right = factors()

        def added(part: slice) -> torch.Tensor:
            return folded(rows(part), left[part], right, scale)

        if magnitude is None:
            return added
        wanted = magnitude()
        if unit_is_row:

            def by_row(part: slice) -> torch.Tensor:
                weight = added(part)
                return weight.mul_((wanted[part] / lengths(weight))[:, None])

            return by_row
        squares = torch.zeros(right.shape[1], dtype=torch.float64)
        for part in blocks((count, right.shape[1])):
            squares += added(part).square_().sum(dim=0, dtype=torch.float64)
        factor = wanted / squares.sqrt().float()
        return lambda part: added(part).mul_(factor)

    return step


def shift(by: Callable[[], torch.Tensor]) -> Step:
    """A bias plus a vector."""

    def step(rows: Rows, count: int) -> Rows:
        vector = by()
        return lambda part: rows(part) + vector[part]

    return step


def multiply(by: Callable[[], torch.Tensor], axis: int) -> Step:
    """IA3: every row (axis 0) or column (axis 1) times its own factor."""

    def step(rows: Rows, count: int) -> Rows:
        vector = by()

        def scaled(part: slice) -> torch.Tensor:
            block = rows(part)
            if axis == 1:
                return block * vector
            return block * vector[part].reshape(-1, *[1] * (block.ndim - 1))

        return scaled

    return step


def rows_replaced(indices: list[int], values: Callable[[], torch.Tensor]) -> Step:
    """Trained tokens: these rows have new values, all others keep theirs."""

    def step(rows: Rows, count: int) -> Rows:
        trained = values()

        def replaced(part: slice) -> torch.Tensor:
            block = rows(part).clone()
            for index, row in zip(indices, trained, strict=True):
                if part.start <= index < part.stop:
                    block[index - part.start] = row
            return block

        return replaced

    return step
