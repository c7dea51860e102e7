"""How do a layer's keys and values become 8 bits in ONNX Runtime's cache: with which scales, and which codes?

A code is round(value / scale), half to even, within -128 and 127; each channel of each layer has a scale of its own,
found from rows of the training data. Keys are cached after the rotary embedding has turned them: channels d and
d + rotary / 2 of a head are turned as a pair, whose length no position changes. So a key's channel may reach its
pair's length at some position, and its scale holds that: rows are short where a context is long.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from edgeft.documents import saving
from edgeft.errors import BadInput
from edgeft.targets.onnx_file import read_graph, read_vector

CODES = 127  # on either side of 0
ATTENTION = "GroupQueryAttention"
SCALE_INPUTS = slice(12, 14)  # of that operator: of keys, of values
QUANTISED = ("k_quant_type", "v_quant_type", "kv_cache_bit_width")  # its attributes

Channels = numpy.ndarray[Any, numpy.dtype[numpy.float32]]


class CacheScales(NamedTuple):
    """A scale for each channel (heads x head_dim), by layer."""

    keys: list[Channels]
    values: list[Channels]

    @property
    def sha256(self) -> str:
        """Of all scales as fp32, a layer's keys before its values."""
        digest = hashlib.sha256()
        for pair in zip(self.keys, self.values, strict=True):
            for each in pair:
                digest.update(each.astype("<f4").tobytes())
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        """As the builder of onnxruntime-genai reads them. Raises BadInput for a scale that is none."""
        self.check(path)
        keys, values = ([each.tolist() for each in side] for side in self)
        with saving(path):
            path.write_text(json.dumps({"scales": {"k_scales": keys, "v_scales": values}}), encoding="utf-8")

    def check(self, where: object) -> None:
        """Nothing. Raises BadInput naming the first scale that is not above 0."""
        for what, layers in (("key", self.keys), ("value", self.values)):
            for layer, scales in enumerate(layers):
                wrong = numpy.flatnonzero(~(numpy.isfinite(scales) & (scales > 0)))
                if len(wrong):
                    problem = f"layer {layer}: the scale of {what} channel {wrong[0]} must be above 0, "
                    raise BadInput(where, f"{problem}got {scales[wrong[0]]:g}", "export with --set kv_bits=32")


def longest_pairs(keys: Channels, rotary: int) -> Channels:
    """What each channel of keys (tokens, heads, head_dim) may reach at any position: (heads x head_dim,).

    `rotary`: how many of a head's first channels are turned; the others stay as they are.
    """
    half, reach = rotary // 2, numpy.abs(keys)
    pairs = numpy.hypot(keys[..., :half], keys[..., half:rotary])
    reach[..., :half] = reach[..., half:rotary] = pairs
    return reach.max(axis=0).reshape(-1)  # type: ignore[no-any-return]


def scales_of(reach: Channels, where: str) -> Channels:
    """The scale of each channel that may reach so much; one that stayed 0 takes the median of its layer's others.

    Raises BadInput where all stayed 0.
    """
    scales = (reach / CODES).astype(numpy.float32)
    used = scales[scales > 0]
    if not len(used):
        raise BadInput(where, "every channel stayed 0 on the rows of the training data", "export with kv_bits=32")
    scales[scales == 0] = numpy.median(used)
    return scales


def codes_of(values: Channels, scales: Channels) -> Any:
    """Keys or values (heads, tokens, head_dim) as the runtime keeps them, in int8."""
    each = scales.reshape(len(values), 1, -1)
    return numpy.clip(numpy.rint(values / each), -CODES - 1, CODES).astype(numpy.int8)


def attentions(graph: Any) -> list[Any]:
    """The operators that keep keys and values, a layer each, in the order in which they compute."""
    return [node for node in graph.node if node.op_type == ATTENTION]


def stored_scales(folder: Path) -> CacheScales | None:
    """The scales that a folder's graph holds; None where its cache is not of 8 bits."""
    graph = read_graph(folder).graph
    names = [tuple(node.input[SCALE_INPUTS]) for node in attentions(graph)]
    if not names or any(len(pair) < 2 or not all(pair) for pair in names):
        return None
    held = {each.name: each for each in graph.initializer}
    return CacheScales(*([read_vector(folder, held[name]) for name in side] for side in zip(*names, strict=True)))


def with_full_cache(model: Any) -> Any:
    """The graph itself, its keys and values now kept in fp32: what one of 8 bits is compared with."""
    from onnx import TensorProto

    for node in attentions(model.graph):
        kept = [attribute for attribute in node.attribute if attribute.name not in QUANTISED]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.input[SCALE_INPUTS] = ["" for _ in node.input[SCALE_INPUTS]]
        while node.input and not node.input[-1]:
            node.input.pop()
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return model


def rotary_channels(graph: Any, head_dim: int) -> int:
    """How many of a head's channels a graph turns, by its table of cosines: a column for each pair."""
    tables: Sequence[Any] = [each for each in graph.initializer if each.name.startswith("cos_cache")]
    return 2 * int(tables[0].dims[-1]) if tables else head_dim
