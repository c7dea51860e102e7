"""How large will a bundle be, and what does its device need to run it? No torch, no weights: a config is enough."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from edgeft.documents import Strict
from edgeft.errors import DoesNotFit
from edgeft.models.spec import Linear, ModelSpec
from edgeft.targets.runner import runner_module
from edgeft.targets.target import Bits, Target, eight_bit_modules
from edgeft.units import MIB, show_bytes

LimitedBy = Literal["model", "target", "device memory"]

# What run.py holds besides the other terms, and that per layer: Python, numpy, the runtime and its graph. Measured
# (onnxruntime-genai 0.18 and llama-cpp-python 0.3.36, Linux) on bundles of 5.8M and 135M parameters, 8 and 30 layers,
# up to 600 tokens; six for ONNX Runtime (4, 8 and 32 bits).
RUNTIME_BYTES: dict[str, tuple[int, int]] = {
    "ort-genai": (76_000_000, 600_000), "llama.cpp": (57_000_000, 200_000), "onnxruntime": (76_000_000, 300_000),
}  # fmt: skip
# A portable graph's attention: the scores of one prefill pass, masked, as shares and as the product's input.
SCORES_AT_ONCE = 3
LLAMA_BYTES_PER_WORD = 150  # a vocabulary's words, in llama.cpp's tables
# The head's weights are held again, packed for its kernel; a tied one once more, for the embedding's lookup.
# In fp32, and in fp16 that becomes fp32 on loading, only the lookup's transposed copy is made.
HEAD_COPIES_QUANTISED, HEAD_COPIES_FP32 = 2, 1
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
SMALLEST_CONTEXT = 128  # a device that cannot hold this many tokens does not run the model


class Weights(NamedTuple):
    """Bytes of a model's weights as the runtime holds them: all, the output head's, and what every new token reads."""

    stored_bytes: int
    head_bytes: int
    bytes_per_token: int


class Predicted(Strict):
    """Memory of `run.py` on the device with a full context, and the most tokens/s its memory allows."""

    weights_bytes: int = Field(description="weights as stored, and the copies the runtime makes of the head's")
    kv_cache_bytes: int = Field(
        description="2 x layers x kv heads x head_dim x 4 (llama.cpp: 2, onnxruntime: 8) x context"
    )
    logits_bytes: int = Field(description="vocabulary x 4, of the last token (onnxruntime: of one pass)")
    scores_bytes: int = Field(default=0, description="onnxruntime: 3 x heads x tokens of one pass x context x 4")
    runtime_bytes: int = Field(description="Python, numpy and the runtime, as measured")
    memory_bytes: int = Field(description="the sum of these")
    device_memory_bytes: int | None = Field(description="what the device has for it")
    tokens_per_second_bound: float | None = Field(description="bandwidth / weight bytes per token")


def kv_cache_bytes_per_token(spec: ModelSpec, target: Target) -> int:
    """2 x layers x kv heads x head_dim x 4, keys and values in fp32; llama.cpp keeps them in fp16.

    A portable graph reads the old cache and writes a new one: twice.
    """
    itemsize = {"llama.cpp": 2, "ort-genai": 4, "onnxruntime": 8}[target.runtime]
    return 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * itemsize


def scores_bytes_per_token(spec: ModelSpec, target: Target) -> int:
    """Of attention scores, for each token of the context: a portable graph makes those of a whole prefill pass."""
    if target.runtime != "onnxruntime":
        return 0
    return SCORES_AT_ONCE * spec.num_attention_heads * int(runner_module().PREFILL_TOKENS) * 4


def predict(
    spec: ModelSpec,
    target: Target,
    weights: Weights,
    context_tokens: int,
    device_memory_bytes: int | None = None,
    bandwidth_bytes_per_second: float | None = None,
) -> Predicted:
    """Peak memory of run.py with that context in use = weights + head copies + KV cache + logits + runtime.

    An fp32 embedding that is not tied is mapped from its file and hardly read: this counts it in full.
    """
    portable = target.runtime == "onnxruntime"  # a tied table is looked up as it is stored
    copies = HEAD_COPIES_FP32 if target.weight_bits >= 16 or portable else HEAD_COPIES_QUANTISED
    held = weights.stored_bytes + copies * weights.head_bytes
    llama = target.runtime == "llama.cpp"
    runtime, per_layer = RUNTIME_BYTES[target.runtime]
    if llama:
        # the file is mapped; 4-bit matrices are rearranged into a copy for the processor's instructions
        held = weights.stored_bytes + (weights.bytes_per_token - weights.head_bytes if target.weight_bits == 4 else 0)
        runtime += LLAMA_BYTES_PER_WORD * spec.vocab_size
    tokens = min(runner_module().PREFILL_TOKENS, context_tokens)
    if portable and target.weight_bits == 8:
        tokens *= 2  # the head's sums as integers, and scaled
    parts = {
        "weights_bytes": held,
        "kv_cache_bytes": context_tokens * kv_cache_bytes_per_token(spec, target),
        # plain onnxruntime's graph gives those of every position
        "logits_bytes": spec.vocab_size * 4 * (tokens if target.runtime == "onnxruntime" else 1),
        "scores_bytes": context_tokens * scores_bytes_per_token(spec, target),
        "runtime_bytes": runtime + per_layer * spec.num_hidden_layers,
    }
    bandwidth = bandwidth_bytes_per_second
    return Predicted(
        **parts,
        memory_bytes=sum(parts.values()),
        device_memory_bytes=device_memory_bytes,
        tokens_per_second_bound=bandwidth / weights.bytes_per_token if bandwidth else None,
    )


def choose_context(
    spec: ModelSpec, target: Target, weights: Weights, device_memory_bytes: int | None
) -> tuple[int, LimitedBy]:
    """The longest context that model, target and memory allow, and what limits it. Raises DoesNotFit."""
    limits: dict[LimitedBy, int] = {"target": target.context_tokens}
    if spec.max_position_embeddings is not None and spec.max_position_embeddings <= target.context_tokens:
        limits = {"model": spec.max_position_embeddings}
    if device_memory_bytes is not None:
        smallest = min(SMALLEST_CONTEXT, *limits.values())
        need = predict(spec, target, weights, smallest).memory_bytes
        if need > device_memory_bytes:
            problem = f"needs {show_bytes(need)} for a context of {smallest} tokens, the device has "
            hint = "choose a target with fewer bits (ort-int4), or a smaller model"
            raise DoesNotFit("bundle", problem + show_bytes(device_memory_bytes), hint)
        fixed = predict(spec, target, weights, runner_module().PREFILL_TOKENS)
        room = device_memory_bytes - fixed.memory_bytes + fixed.kv_cache_bytes + fixed.scores_bytes
        each = kv_cache_bytes_per_token(spec, target) + scores_bytes_per_token(spec, target)
        limits["device memory"] = max(smallest, room // each)
    limited_by = min(limits, key=lambda key: limits[key])
    return limits[limited_by], limited_by


def bundle_weights(spec: ModelSpec, target: Target) -> Weights:
    """What the export's runtime will hold, from the config alone: blocks of codes, scales, zero points, and vectors.

    An fp16 ONNX file counts as fp32, which it becomes on loading. Of an ONNX file with tables of positions in it.
    """
    table = Linear(name="", in_features=spec.hidden_size, out_features=spec.vocab_size, has_bias=False, role="other")
    dense = 4 * (spec.total_parameters - linear_weights(spec) - spec.embedding_parameters - spec.head_parameters)
    tied = spec.tie_word_embeddings
    if target.runtime == "onnxruntime":
        head, positions = output_bytes(table, target.head_bits), 0
        embedding = 0 if tied else 4 * spec.embedding_parameters
    elif target.runtime == "llama.cpp":
        head = gguf_bytes(table, "Q6_K" if target.method == "k_quant" else _gguf_type(target.head_bits, target))
        name = f"Q{target.weight_bits}_K" if target.method == "k_quant" else _gguf_type(target.embedding_bits, target)
        embedding, positions = 0 if tied else gguf_bytes(table, name), 0
    else:
        head = int(quantised_bytes(table, target.head_bits, target))
        embedding = 0 if tied else int(quantised_bytes(table, target.embedding_bits, target))
        positions = 4 * rotary_elements(spec)
    read = layers_bytes(spec, target) + head + dense
    return Weights(read + embedding + positions, head, read)


def layers_bytes(spec: ModelSpec, target: Target) -> int:
    """Bytes of all decoder layers' projections in the target."""
    names = tuple(linear.name for linear in spec.linears)
    promoted = set(eight_bit_modules(target, spec.num_hidden_layers, names))
    total = 0
    for layer in range(spec.num_hidden_layers):
        for linear in spec.linears:
            bits: Bits = 8 if f"layers.{layer}.{linear.name}" in promoted else target.weight_bits
            if target.runtime == "onnxruntime":
                total += output_bytes(linear, bits)
            elif target.runtime == "ort-genai":
                total += int(quantised_bytes(linear, bits, target))
            elif target.method == "k_quant":
                total += gguf_bytes(linear, _k_quant_type(linear, layer, spec.num_hidden_layers, target))
            else:
                total += gguf_bytes(linear, _gguf_type(bits, target))
    return total


def _gguf_type(bits: Bits, target: Target) -> str:
    return f"F{bits}" if bits >= 16 else GGUF_TYPES[bits, target.symmetric or bits == 8]


def _k_quant_type(linear: Linear, layer: int, layers: int, target: Target) -> str:
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
