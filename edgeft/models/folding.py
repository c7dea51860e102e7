"""What is a weight with a low-rank change folded in? One sum in one order, for the merge and for what trains for it."""

from __future__ import annotations

import torch


def folded(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale L R, in fp32: weight (rows, columns), left (rows, r), right (r, columns).

    The bits are the same for any part of the rows and any number of threads: one sum over r for each value.
    """
    return torch.addmm(weight, left, right, alpha=scale)
