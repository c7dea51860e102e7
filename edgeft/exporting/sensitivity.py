"""What does rounding each tensor alone cost a model's answers? All tensors from a few passes over each row.

To second order, KL(p || q) where logits move by d is d' (diag(p) - pp') d / 2 (the Fisher information in a direction).
Its square root is applied to random signs, so that one way back through the model from them gives, for every tensor at
once, a number whose mean square is twice what moving that tensor alone costs (Hutchinson's estimator). Rounding
one after the other, which this replaces, reads all rows 210 times at 135M (bench/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from edgeft.data.samples import Sample
from edgeft.exporting.row_logits import trained_at
from edgeft.models.parts import find_parts

PROBES = 4  # random signs a row: of 32 rows, an eighth of what a tensor costs is chance
MOVE_BYTES = 2  # of a weight: what rounding moves it by is kept in bf16


def costs(
    model: Any, moves: Mapping[str, torch.Tensor], rows: Sequence[Sample], progress: Callable[[int, int], None]
) -> dict[str, float]:
    """Mean KL in nats per trained token that each parameter of an fp32 model costs, moved alone, to second order.

    `moves` are by the parameters' names, each of its shape. The same rows give the same numbers.
    """
    parameters = dict(model.named_parameters())
    squares, tokens = dict.fromkeys(moves, 0.0), 0
    signs = torch.Generator().manual_seed(0)
    with _watched(parameters, moves, squares), _recomputed(model):
        for done, row in enumerate(rows):
            progress(done, len(rows))
            at = trained_at(row)
            tokens += len(at)
            for spread in _probes(_logits(model, row, at), signs):
                spread.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    progress(len(rows), len(rows))
    return {name: square / (2 * PROBES * max(1, tokens)) for name, square in squares.items()}


def _logits(model: Any, row: Sample, at: Sequence[int]) -> torch.Tensor:
    """(positions, V) in fp32 at the places before a row's trained tokens."""
    found = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, list(at)]
    return found.float()  # type: ignore[no-any-return]


def _probes(logits: torch.Tensor, signs: torch.Generator) -> Iterator[torch.Tensor]:
    """Scalars whose gradients by the logits have diag(p) - pp' as covariance: what a draw of answers has."""
    with torch.no_grad():
        p = logits.softmax(-1)
        root = p.sqrt()
    for _ in range(PROBES):
        sign = torch.randint(0, 2, logits.shape, generator=signs).mul_(2).sub_(1)
        noise = root * sign
        noise -= p * noise.sum(-1, keepdim=True)
        yield (logits * noise).sum()


@contextmanager
def _watched(
    parameters: Mapping[str, Any], moves: Mapping[str, torch.Tensor], squares: dict[str, float]
) -> Iterator[None]:
    """Add the square of (gradient . move) of each tensor whenever a way back is done with it; keep no gradient."""

    def watch(name: str) -> Callable[[Any], None]:
        def see(parameter: Any) -> None:
            squares[name] += float((parameter.grad * moves[name]).sum()) ** 2
            parameter.grad = None

        return see

    trains = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in moves)
    hooks = [parameters[name].register_post_accumulate_grad_hook(watch(name)) for name in moves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(trains[name])


@contextmanager
def _recomputed(model: Any) -> Iterator[None]:
    """Keep what goes into each decoder layer alone: a long row's activations take more than the model."""
    layers = list(find_parts(model).layers)

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **given: checkpoint(forward, *args, use_reentrant=False, **given)

    for layer in layers:
        layer.forward = again(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
