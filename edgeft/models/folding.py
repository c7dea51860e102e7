"""What is a weight with a change folded in? One sum in one order, for the merge and for what trains for it."""

from __future__ import annotations

import torch

SUMMED_AT_ONCE = 2**18  # weights whose fp64 form exists at a time


def folded(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale L R, in fp32: weight (rows, columns), left (rows, r), right (r, columns).

    The bits are the same for any part of the rows and any number of threads: one sum over r for each value.
    """
    return torch.addmm(weight, left, right, alpha=scale)


def lengths(weight: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """||w|| of the weights of each output, in fp32: of rows, or of columns where the matrix is inputs x outputs."""
    if not transposed:
        at_once = max(1, SUMMED_AT_ONCE // weight.shape[1])
        norm = torch.linalg.vector_norm
        return torch.cat([norm(rows, dim=1, dtype=torch.float64).float() for rows in torch.split(weight, at_once)])
    squares = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in torch.split(weight, max(1, SUMMED_AT_ONCE // weight.shape[1])):
        squares += rows.double().square().sum(dim=0)
    return squares.sqrt().float()
