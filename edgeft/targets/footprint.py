"""How large will a bundle be, and what does its device need to run it? No torch, no weights: a config is enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from edgeft.documents import Strict
from edgeft.errors import DoesNotFit
from edgeft.models.spec import Linear, ModelSpec
from edgeft.settings.job import Bits
from edgeft.targets.matrices import Weights, linear_weights
from edgeft.targets.runner import runner_module
from edgeft.targets.runtimes import runtime_of
from edgeft.targets.target import Target, eight_bit_modules
from edgeft.units import show_bytes

LimitedBy = Literal["model", "target", "device memory"]

SMALLEST_CONTEXT = 128  # a device that cannot hold this many tokens does not run the model


class Predicted(Strict):
    """Memory of `run.py` on the device with a full context, and the most tokens/s its memory allows."""

    weights_bytes: int = Field(description="weights as stored, and the copies the runtime makes of the head's")
    kv_cache_bytes: int = Field(
        description="2 x layers x kv heads x head_dim x 4 (llama.cpp: 2, onnxruntime: 8; of 8 bits: 1) x context"
    )
    logits_bytes: int = Field(description="vocabulary x 4, of the last token (onnxruntime: of one pass)")
    scores_bytes: int = Field(default=0, description="onnxruntime: 3 x heads x tokens of one pass x context x 4")
    runtime_bytes: int = Field(description="Python, numpy and the runtime, as measured")
    memory_bytes: int = Field(description="the sum of these")
    device_memory_bytes: int | None = Field(description="what the device has for it")
    tokens_per_second_bound: float | None = Field(description="bandwidth / weight bytes per token")


def kv_cache_bytes_per_token(spec: ModelSpec, target: Target) -> int:
    """2 x layers x kv heads x head_dim x 4, keys and values in fp32; llama.cpp keeps them in fp16.

    A portable graph reads the old cache and writes a new one: twice. With `kv_bits` 8 it is a byte, in llama.cpp 34/32.
    """
    runtime = runtime_of(target)
    itemsize = runtime.cache8_itemsize if target.kv_bits == 8 else runtime.cache_itemsize
    return int(2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * itemsize)


def scores_bytes_per_token(spec: ModelSpec, target: Target) -> int:
    """Of attention scores, for each token of the context: a portable graph makes those of a whole prefill pass."""
    return runtime_of(target).scores_at_once * spec.num_attention_heads * int(runner_module().PREFILL_TOKENS) * 4


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
    runtime = runtime_of(target)
    tokens = min(runner_module().PREFILL_TOKENS, context_tokens) if runtime.every_position else 1
    if runtime.every_position and target.weight_bits == 8:
        tokens *= 2  # the head's sums as integers, and scaled
    process = runtime.process_bytes + runtime.layer_bytes * spec.num_hidden_layers
    parts = {
        "weights_bytes": runtime.held_bytes(weights, target),
        "kv_cache_bytes": context_tokens * kv_cache_bytes_per_token(spec, target),
        "logits_bytes": spec.vocab_size * 4 * tokens,
        "scores_bytes": context_tokens * scores_bytes_per_token(spec, target),
        "runtime_bytes": process + runtime.word_bytes * spec.vocab_size,
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


def bundle_weights(spec: ModelSpec, target: Target, beside: Sequence[Linear] = ()) -> Weights:
    """What the export's runtime will hold, from the config alone: blocks of codes, scales, zero points, and vectors.

    `beside`: projections of adapters that lie beside the model's own.
    """
    dense = 4 * (spec.total_parameters - linear_weights(spec) - spec.embedding_parameters - spec.head_parameters)
    runtime, count = runtime_of(target), spec.num_hidden_layers
    head, embedding, positions = runtime.tables(spec, target)
    more = sum(runtime.matrix_bytes(linear, target.weight_bits, target, 0, count) for linear in beside)
    read = layers_bytes(spec, target) + more + head + dense
    return Weights(read + embedding + positions, head, read)


def layers_bytes(spec: ModelSpec, target: Target) -> int:
    """Bytes of all decoder layers' projections in the target."""
    names, count = tuple(linear.name for linear in spec.linears), spec.num_hidden_layers
    promoted, size = set(eight_bit_modules(target, count, names)), runtime_of(target).matrix_bytes
    total = 0
    for layer in range(count):
        for linear in spec.linears:
            bits: Bits = 8 if f"layers.{layer}.{linear.name}" in promoted else target.weight_bits
            total += size(linear, bits, target, layer, count)
    return total
