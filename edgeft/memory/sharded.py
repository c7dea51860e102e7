"""How many bytes of a base does one of several processes hold that has a part of every layer, and what is gathered?"""

from __future__ import annotations

from edgeft.memory.streamed import KEPT_BYTES, NF4_CODES, matrices
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import Training

ALIGNED = 64  # bytes that each weight begins at a multiple of, as PyTorch's allocators have it: for the same kernels


def uncut(training: Training) -> Training:
    """The same with all of the base in one place, as what comes after training has it."""
    return training.model_copy(update={"shard_base": False})


def cut_bytes(spec: ModelSpec, training: Training, layer: int) -> int:
    """Bytes of one layer that the processes share out among them: all weights; of 4-bit ones the codes, no scales."""
    parameters = spec.layer_parameters[layer]
    if training.base_precision != "nf4":
        return KEPT_BYTES[training.base_precision] * parameters
    packed = matrices(spec)
    return int(NF4_CODES * packed) + KEPT_BYTES[training.compute_dtype] * (parameters - packed)


def part_bytes(spec: ModelSpec, training: Training, layer: int) -> int:
    """Bytes of one process's part of a layer."""
    return -(-cut_bytes(spec, training, layer) // (training.processes * ALIGNED)) * ALIGNED


def elsewhere_bytes(spec: ModelSpec, training: Training) -> int:
    """What of a base only other processes hold; 0 where each has all of it."""
    if not training.shard_base:
        return 0
    return sum(cut_bytes(spec, training, n) - part_bytes(spec, training, n) for n in range(spec.num_hidden_layers))


def gathered_bytes(spec: ModelSpec, training: Training) -> int:
    """Bytes of the two layers that are whole at a time; 0 where all are."""
    if not training.shard_base:
        return 0
    sizes = sorted(part_bytes(spec, training, n) * training.processes for n in range(spec.num_hidden_layers))
    return sum(sizes[-2:])


def pass_bytes(spec: ModelSpec, training: Training, layers: float) -> float:
    """Bytes of so many layers that run once, which are gathered; 0 where all are there."""
    each = sum(cut_bytes(spec, training, n) for n in range(spec.num_hidden_layers)) / spec.num_hidden_layers
    return each * layers if training.shard_base else 0.0
