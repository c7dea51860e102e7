"""What does a soft prompt hold that a model reads once, before the rows of a micro-batch? As `models.soft_prompt` does.

Its layers keep what any layer keeps through which a gradient passes, of the prompt's tokens alone; the topmost one what
its keys and values are made of. They wait for the gradients that all rows have of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from edgeft.memory.dataflow import DecoderLayer, stream_bytes
from edgeft.memory.operations import Way
from edgeft.memory.tape import Storage, Tape, Value, boundary
from edgeft.models.spec import ModelSpec
from edgeft.targets.matrices import linear_weights


class Read(NamedTuple):
    """Bytes: of what is kept while rows are computed, of their gradients of keys and values, and the highest then."""

    kept: float
    backward: float


class _Reading(DecoderLayer):
    """A layer that keeps its keys and values."""

    pair: tuple[Value, ...] = ()

    def attended(self, query: Value, key: Value, value: Value) -> Value:
        self.pair = key, value
        return super().attended(query, key, value)


@lru_cache(maxsize=512)
def read_bytes(spec: ModelSpec, way: Way) -> Read:
    """Of a prompt that all layers read."""
    tokens, size = way.prefix_tokens, stream_bytes(spec, way)
    alone = replace(way, prefix_tokens=0, past=0)
    through, last = (_kept(spec, alone, topmost, tokens) for topmost in (False, True))
    own = 0 if way.itemsize == 4 and _as_it_is(spec) else size * tokens  # else the first layer reads the parameter
    turned = spec.family.rotary_share * spec.head_dim if spec.family.rotates else 0
    kept = (spec.num_hidden_layers - 1) * through.kept + last.kept + own - size * tokens
    kept += 2 * way.itemsize * turned * tokens  # rotary tables
    return Read(kept, through.backward)


def reading_bytes(spec: ModelSpec) -> int:
    """Bytes of a model that reads a soft prompt: a layer in fp32, and the table where it is the head too."""
    table = spec.vocab_size * spec.hidden_size if spec.tie_word_embeddings else 0
    return 4 * (linear_weights(spec) // spec.num_hidden_layers + table + spec.other_parameters)


def _as_it_is(spec: ModelSpec) -> bool:
    """Whether the first layer reads the embeddings themselves, not what the model's code makes of them."""
    return spec.family.rotates and not spec.family.scales_residual  # which scales its embeddings too


def _kept(spec: ModelSpec, way: Way, topmost: bool, tokens: int) -> Read:
    """What one layer leaves behind, its input among it, and the highest moment of its way back."""
    tape, size = Tape(keeps_gradients=False), stream_bytes(spec, way)
    node, _ = boundary()
    x = [Value(Storage(tape, size, silently=True), size, node)]
    layer = _Reading(tape, spec, way, False, False)
    result = [layer(x[0])]
    x.clear()
    pair = layer.pair
    if topmost:
        result.clear()
        tape.casts.clear()
        return Read(_at(tape.live, tokens), 0.0)
    tape.casts.clear()
    kept = tape.live - size
    tape.heights = []
    tape.backward(result, [Storage(tape, size, silently=True)])
    del pair
    return Read(_at(kept, tokens), max(_at(height, tokens) for height in tape.heights))


def _at(size: complex, tokens: int) -> float:
    return size.real * tokens + size.imag
