"""How many bytes of a base does one of several processes hold that has a part of every layer, and what is gathered?"""

from __future__ import annotations

from collections import Counter

from edgeft.memory.streamed import KEPT_BYTES, NF4_CODES, matrices
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import Training

ALIGNED = 64  # bytes that each weight begins at a multiple of, as PyTorch's allocators have it: for the same kernels


def uncut(training: Training) -> Training:
    """The same with all of the base in one place, as what comes after training has it."""
    return training.model_copy(update={"shard_base": False})


def cut_bytes(spec: ModelSpec, training: Training, parameters: int) -> int:
    """Bytes of a layer of so many parameters that the processes share out: all; of 4-bit weights codes, no scales."""
    if training.base_precision != "nf4":
        return KEPT_BYTES[training.base_precision] * parameters
    packed = matrices(spec)
    return int(NF4_CODES * packed) + KEPT_BYTES[training.compute_dtype] * (parameters - packed)


def part_bytes(spec: ModelSpec, training: Training, parameters: int) -> int:
    """Bytes of one process's part of a layer of so many parameters."""
    return -(-cut_bytes(spec, training, parameters) // (training.processes * ALIGNED)) * ALIGNED


def elsewhere_bytes(spec: ModelSpec, training: Training) -> int:
    """What of a base only other processes hold; 0 where each has all of it."""
    if not training.shard_base:
        return 0
    kinds = Counter(spec.layer_parameters).items()
    return sum(n * (cut_bytes(spec, training, size) - part_bytes(spec, training, size)) for size, n in kinds)


def gathered_bytes(spec: ModelSpec, training: Training) -> int:
    """Bytes of the two layers that are whole at a time; 0 where all are."""
    if not training.shard_base:
        return 0
    return sum(training.processes * part_bytes(spec, training, size) for size in sorted(spec.layer_parameters)[-2:])


def topmost_bytes(spec: ModelSpec, training: Training) -> int:
    """Bytes of the layer that is whole while there is a loss: no other comes after it. 0 where all are."""
    if not training.shard_base:
        return 0
    return training.processes * part_bytes(spec, training, spec.layer_parameters[-1])


def pass_bytes(spec: ModelSpec, training: Training, layers: float) -> float:
    """Bytes of so many layers that run once, which are gathered; 0 where all are there."""
    if not training.shard_base:
        return 0.0
    kinds = Counter(spec.layer_parameters).items()
    return layers * sum(n * cut_bytes(spec, training, size) for size, n in kinds) / spec.num_hidden_layers
