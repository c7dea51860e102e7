"""Which samples form which optimizer step, in which order, and which of them run at once? (padded, never packed)"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch

from edgeft.data.samples import IGNORED, Sample

GROUP_STEPS = 50  # samples of this many steps are sorted by length together: little padding, yet a random order


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right to (B, S); `positions` (N) index the flat (B*S) tokens whose next token is trained.

    Attention is causal, so padding on the right changes nothing to its left, and no mask is needed: no sample sees
    another, and attention keeps its fastest kernel.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.ids.to(device), self.positions.to(device), self.targets.to(device))


def make_batch(samples: Sequence[Sample]) -> Batch:
    """Samples as one right-padded batch; padding is id 0 and never trained on."""
    width = max(len(sample) for sample in samples)
    ids = numpy.zeros((len(samples), width), numpy.int64)
    following = numpy.full((len(samples), width), IGNORED, numpy.int64)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = sample.packed_ids
        following[row, : len(sample) - 1] = numpy.asarray(sample.packed_labels)[1:]
    flat = following.reshape(-1)
    positions = numpy.flatnonzero(flat != IGNORED)
    return Batch(*map(torch.from_numpy, (ids, positions, flat[positions])))


def micro_batches(
    samples: Sequence[Sample], size: int, max_tokens: int, max_trained_tokens: int, before: int = 0
) -> Iterator[list[Sample]]:
    """The samples of one step in groups that run at once, longest first: `size` samples, or more where they are short.

    Each group but one of `size` samples has at most `max_tokens` padded and `max_trained_tokens` trained tokens: what
    `size` of the longest samples have, so that no group needs more memory than was planned. `before`: tokens of a
    prefix, which each sample has as well, and `max_tokens` counts.
    """
    group: list[Sample] = []
    trained = 0
    for sample in sorted(samples, key=lambda sample: -len(sample)):
        trained += sample.trained_tokens
        padded = (len(group[0]) + before) * (len(group) + 1) if group else 0
        if len(group) >= size and (padded > max_tokens or trained > max_trained_tokens):
            yield group
            group, trained = [], sample.trained_tokens
        group.append(sample)
    if group:
        yield group


def shares(samples: Sequence[Sample], processes: int) -> list[list[Sample]]:
    """The samples of one step as each of several processes computes them: long and short ones dealt out evenly."""
    if processes == 1:
        return [list(samples)]
    longest_first = sorted(samples, key=lambda sample: -len(sample))
    return [longest_first[rank::processes] for rank in range(processes)]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    return -(-rows // batch_size)


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Sample indices of each step of one epoch: a pure function of its arguments, each sample exactly once.

    The second step of the first epoch holds the longest sample, among as many as any: it is the first to run beside
    optimizer states, so that if memory runs out, it does so at once.
    """
    generator = random.Random(f"order {seed} {epoch}")
    shuffled = list(range(len(lengths)))
    generator.shuffle(shuffled)
    steps: list[list[int]] = []
    for start in range(0, len(shuffled), batch_size * GROUP_STEPS):
        group = sorted(shuffled[start : start + batch_size * GROUP_STEPS], key=lambda i: lengths[i])
        short = len(group) % batch_size  # the incomplete step takes the shortest, so that the longest fill a whole one
        steps += [group[:short]] if short else []
        steps += [group[i : i + batch_size] for i in range(short, len(group), batch_size)]
    generator.shuffle(steps)
    if epoch == 0 and len(steps) > 1:
        longest = max(range(len(steps)), key=lambda i: (max(lengths[j] for j in steps[i]), len(steps[i])))
        steps[1], steps[longest] = steps[longest], steps[1]
    return steps
