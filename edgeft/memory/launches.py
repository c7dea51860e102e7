"""How many kernels does a training step put on a GPU? Each costs the host time, which binds where they are small.

Nearly every operation of a step makes a tensor, and nearly every tensor takes a kernel: those of the tape are counted.
"""

from __future__ import annotations

import math
from collections import Counter

from edgeft.memory.dataflow import ends_bytes, layer_bytes
from edgeft.memory.operations import Way
from edgeft.memory.train_step import Workload, layer_places, lowest_trained, worst_sets
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import Training

INPUTS = 30  # of a micro-batch: its ids, positions, cosines, the embedding, the mean of its losses
CHUNK = 14  # of a chunk of the loss beyond the first
OPTIMIZER, TENSORS_AT_ONCE = 12, 30  # of a step: norm, clipping, AdamW; tensors that one fused kernel takes
# Host time of a product with a 4-bit matrix beyond its kernels', in launches: bitsandbytes' layers are Python. Fitted
# with a launch's own time on half of the runs of bench/gpu.py that launches bind; of the others a step's seconds are
# off by a factor of 1.17 on average (bench/results/cuda.json).
PACKED = 6


def launches(spec: ModelSpec, training: Training, work: Workload, kept_layers: int) -> float:
    """Kernels of one micro-batch, its loss as one chunk; under LISA of the set of layers that needs most.

    Products with 4-bit matrices count for what they take of the host.
    """
    training = worst_sets(spec, training)[0]
    if kept_layers != training.kept_layers:
        training = training.model_copy(update={"kept_layers": kept_layers})
    way = Way.of(spec, training, work.longest)
    places = Counter(layer_places(spec, training, work))
    layers = sum(times * layer_bytes(spec, way, *place).tensors for place, times in places.items())
    head = training.embedding if spec.tie_word_embeddings else training.head
    crossed = lowest_trained(spec, training) < spec.num_hidden_layers
    after = ends_bytes(spec, way, crossed, training.norm == "on", head == "on", spec.tie_word_embeddings, 1, 1)
    packed = 0.0
    if way.nf4:
        passes = sum(times * (1 + wants + recomputed) for (_, wants, _, recomputed), times in places.items())
        packed = PACKED * len(spec.linears) * passes
    return layers + after.tensors + INPUTS + packed


def loss_launches(training: Training, work: Workload) -> float:
    """Kernels of a micro-batch's loss beyond its first chunk."""
    tokens = training.micro_batch_size * work.longest_trained
    return CHUNK * max(0, math.ceil(tokens / training.loss_chunk_tokens) - 1)


def optimizer_launches(tensors: int) -> float:
    """Kernels of a step's end: the norm of the gradients, clipping, AdamW over so many tensors."""
    return OPTIMIZER * (1 + tensors / TENSORS_AT_ONCE)
