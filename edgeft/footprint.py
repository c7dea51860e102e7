"""How large will a bundle be, and what does its device need to run it? No torch, no weights: a config is enough."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from edgeft.artifacts import Strict
from edgeft.errors import DoesNotFit
from edgeft.model_spec import Linear, ModelSpec
from edgeft.runner import runner_module
from edgeft.target import Target
from edgeft.units import show_bytes

LimitedBy = Literal["model", "target", "device memory"]

# Python, numpy, ONNX Runtime and its graph: what run.py holds besides the other terms. Measured
# (onnxruntime-genai 0.18, Linux) on six bundles, 5.8M and 135M parameters of 8 and 30 layers, 4, 8 and 32
# bits, up to 600 tokens.
RUNTIME_BYTES, RUNTIME_BYTES_PER_LAYER = 76_000_000, 600_000
# The head's weights are held again, packed for its kernel; a tied one once more, for the embedding's lookup.
# In fp32 only the lookup's transposed copy is made.
HEAD_COPIES_QUANTISED, HEAD_COPIES_FP32 = 2, 1
SMALLEST_CONTEXT = 128  # a device that cannot hold this many tokens does not run the model


class Weights(NamedTuple):
    """Bytes of an ONNX file's weights: all, the output head's, and what every new token reads."""

    stored_bytes: int
    head_bytes: int
    bytes_per_token: int


class Predicted(Strict):
    """Memory of `run.py` on the device with a full context, and the most tokens/s its memory allows."""

    weights_bytes: int = Field(description="weights as stored, and the copies the runtime makes of the head's")
    kv_cache_bytes: int = Field(description="2 x layers x kv heads x head_dim x 4 x context")
    logits_bytes: int = Field(description="vocabulary x 4 x tokens of one prefill pass")
    runtime_bytes: int = Field(description="Python, numpy and ONNX Runtime, as measured")
    memory_bytes: int = Field(description="the sum of these")
    device_memory_bytes: int | None = Field(description="what the device has for it")
    tokens_per_second_bound: float | None = Field(description="bandwidth / weight bytes per token")


def kv_cache_bytes_per_token(spec: ModelSpec) -> int:
    """2 x layers x kv heads x head_dim x 4: keys and values in fp32, as the CPU kernels keep them."""
    return 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * 4


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
    copies = HEAD_COPIES_FP32 if target.weight_bits == 32 else HEAD_COPIES_QUANTISED
    parts = {
        "weights_bytes": weights.stored_bytes + copies * weights.head_bytes,
        "kv_cache_bytes": context_tokens * kv_cache_bytes_per_token(spec),
        "logits_bytes": spec.vocab_size * 4 * min(runner_module().PREFILL_TOKENS, context_tokens),
        "runtime_bytes": RUNTIME_BYTES + RUNTIME_BYTES_PER_LAYER * spec.num_hidden_layers,
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
        room = device_memory_bytes - fixed.memory_bytes + fixed.kv_cache_bytes
        limits["device memory"] = max(smallest, room // kv_cache_bytes_per_token(spec))
    limited_by = min(limits, key=lambda key: limits[key])
    return limits[limited_by], limited_by


def bundle_weights(spec: ModelSpec, target: Target) -> Weights:
    """What the export will store, from the config alone: codes, fp32 scales and packed zero points per block."""
    layers = (
        sum(quantised_bytes(linear, target.weight_bits, target) for linear in spec.linears) * spec.num_hidden_layers
    )
    table = Linear(name="", in_features=spec.hidden_size, out_features=spec.vocab_size, has_bias=False, role="other")
    head = quantised_bytes(table, target.head_bits, target)
    embedding = 0 if spec.tie_word_embeddings else quantised_bytes(table, target.embedding_bits, target)
    dense = spec.total_parameters - linear_weights(spec) - spec.embedding_parameters - spec.head_parameters
    read = layers + head + 4 * dense
    return Weights(int(read + embedding + 4 * rotary_elements(spec)), int(head), int(read))


def quantised_bytes(linear: Linear, bits: int, target: Target) -> int:
    """Bytes of one matrix: each output's weights in blocks along the input, the last one padded."""
    if bits == 32:
        return 4 * linear.in_features * linear.out_features
    blocks = -(-linear.in_features // target.block_size)
    zeros = 0 if target.symmetric else -(-blocks * bits // 8)
    return linear.out_features * (blocks * target.block_size * bits // 8 + 4 * blocks + zeros)


def linear_weights(spec: ModelSpec) -> int:
    """Elements of all decoder layers' projections."""
    return sum(linear.in_features * linear.out_features for linear in spec.linears) * spec.num_hidden_layers


def rotary_elements(spec: ModelSpec) -> int:
    """Cosines and sines for half the head's width at every position."""
    return (spec.max_position_embeddings or 0) * spec.head_dim
