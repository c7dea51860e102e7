"""How many bytes does a matrix of a model take in each format that a bundle may have?"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from edgeft.models.spec import Linear, ModelSpec
from edgeft.settings.job import Bits
from edgeft.units import MIB

if TYPE_CHECKING:
    from edgeft.targets.target import Target

# (bits, symmetric) -> a GGUF type of blocks of 32; fp16 and fp32 have no scales to be symmetric about
GGUF_TYPES = {
    (4, True): "Q4_0", (4, False): "Q4_1", (5, True): "Q5_0", (5, False): "Q5_1", (8, True): "Q8_0",
}  # fmt: skip
# GGUF type -> (weights, bytes) of a block
GGUF_BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24),
    "Q8_0": (32, 34), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
GGUF_ROWS_BYTES = 64 * MIB  # of a matrix quantised at once, in fp32


class Weights(NamedTuple):
    """Bytes of a model's weights as the runtime holds them: all, the output head's, and what every new token reads."""

    stored_bytes: int
    head_bytes: int
    bytes_per_token: int


def table_of(spec: ModelSpec) -> Linear:
    """The embedding or the head: vocabulary x hidden size."""
    return Linear(name="", in_features=spec.hidden_size, out_features=spec.vocab_size, has_bias=False, role="other")


def gguf_type(bits: Bits, target: Target) -> str:
    return f"F{bits}" if bits >= 16 else GGUF_TYPES[bits, target.symmetric or bits == 8]


def k_quant_type(linear: Linear, layer: int, layers: int, target: Target) -> str:
    """llama.cpp's mixes: 6 bits for value and down projections of the first and last eighth, every third between."""
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    sensitive = linear.name in ("v_proj", "qkv_proj", "down_proj") and more
    return "Q6_K" if sensitive else f"Q{target.weight_bits}_K"


def gguf_bytes(linear: Linear, name: str) -> int:
    """Bytes of one matrix as a GGUF type; rows that its blocks do not divide get the type llama.cpp falls back to."""
    if linear.in_features % GGUF_BLOCKS[name][0]:
        name = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}.get(name, "F16")
    if linear.in_features % GGUF_BLOCKS[name][0]:
        name = "F16"
    block, size = GGUF_BLOCKS[name]
    return linear.in_features * linear.out_features // block * size


def quantised_bytes(linear: Linear, bits: int, target: Target) -> int:
    """Bytes of one matrix: each output's weights in blocks along the input, the last one padded."""
    if bits >= 16:
        return 4 * linear.in_features * linear.out_features
    blocks = -(-linear.in_features // target.block_size)
    zeros = 0 if target.symmetric else -(-blocks * bits // 8)
    return linear.out_features * (blocks * target.block_size * bits // 8 + 4 * blocks + zeros)


def output_bytes(linear: Linear, bits: int) -> int:
    """Bytes of one matrix in fp32, or in 8 bits with a scale (fp32) and a zero point for each output."""
    return linear.out_features * (4 * linear.in_features if bits == 32 else linear.in_features + 5)


def linear_weights(spec: ModelSpec) -> int:
    """Elements of all decoder layers' projections."""
    return sum(linear.in_features * linear.out_features for linear in spec.linears) * spec.num_hidden_layers


def rotary_elements(spec: ModelSpec) -> int:
    """Cosines and sines for half the head's width at every position."""
    return (spec.max_position_embeddings or 0) * spec.head_dim
