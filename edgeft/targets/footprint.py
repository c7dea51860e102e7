"""How large will a bundle be, and what does its device need to run it? No torch, no weights: a config is enough."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Literal

import pydantic
from pydantic import Field

from edgeft.documents import Strict, invalid
from edgeft.errors import BadInput, DoesNotFit
from edgeft.machines.runner import runner_module
from edgeft.models.spec import Linear, ModelSpec
from edgeft.settings.job import AUTO, Bits
from edgeft.targets.matrices import Weights, linear_weights
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
    logits_bytes: int = Field(
        description="vocabulary x 4, of the last token (onnxruntime-genai: of the last 8 too; onnxruntime: of one pass)"
    )
    scores_bytes: int = Field(default=0, description="onnxruntime: 3 x heads x tokens of one pass x context x 4")
    runtime_bytes: int = Field(description="Python, numpy and the runtime, as measured")
    memory_bytes: int = Field(description="the sum of these")
    device_memory_bytes: int | None = Field(description="what the device has for it")
    tokens_per_second_bound: float | None = Field(description="bandwidth / weight bytes per token")


def kv_cache_bytes_per_token(spec: ModelSpec, target: Target) -> int:
    """2 x layers x kv heads x head_dim x 4, keys and values in fp32; llama.cpp keeps them in fp16.

    A portable graph reads the old cache and writes a new one: twice. With `kv_bits` 8 it is a byte, in llama.cpp 34/32.
    """
    return spec.num_hidden_layers * _bytes_per_layer(spec, target)


def _bytes_per_layer(spec: ModelSpec, target: Target) -> int:
    runtime = runtime_of(target)
    itemsize = runtime.cache8_itemsize if target.kv_bits == 8 else runtime.cache_itemsize
    return int(2 * spec.num_key_value_heads * spec.head_dim * itemsize)


def kv_cache_bytes(spec: ModelSpec, target: Target, context_tokens: int) -> int:
    """Of all layers with so many tokens; where the runtime can, a windowed layer keeps its window and a few more."""
    full, slack, every = spec.num_hidden_layers, runtime_of(target).window_slack, spec.family.window_every
    kept = context_tokens
    if slack is not None and every and spec.sliding_window:
        full, kept = full // every, min(context_tokens, spec.sliding_window + slack)
    tokens = full * context_tokens + (spec.num_hidden_layers - full) * kept
    return tokens * _bytes_per_layer(spec, target)


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
    *,
    before: int = 0,
) -> Predicted:
    """Peak memory of run.py with that context in use = weights + head copies + KV cache + logits + runtime.

    `before`: tokens of a prefix, whose keys and values lie before the context.

    An fp32 embedding that is not tied is mapped from its file and hardly read: this counts it in full.
    """
    runtime = runtime_of(target)
    tokens = min(runner_module().PREFILL_TOKENS, context_tokens) if runtime.every_position else 1
    if runtime.widened_proof:
        tokens += runner_module().LAST_POSITIONS  # of which guesses are checked
    if runtime.every_position and target.weight_bits == 8:
        tokens *= 2  # the head's sums as integers, and scaled
    process = runtime.process_bytes + runtime.layer_bytes * spec.num_hidden_layers
    parts = {
        "weights_bytes": runtime.held_bytes(weights, target),
        "kv_cache_bytes": kv_cache_bytes(spec, target, before + context_tokens),
        "logits_bytes": spec.vocab_size * 4 * tokens,
        "scores_bytes": (before + context_tokens) * scores_bytes_per_token(spec, target),
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
    spec: ModelSpec, target: Target, weights: Weights, device_memory_bytes: int | None, before: int = 0
) -> tuple[int, LimitedBy]:
    """The longest context that model, target and memory allow, and what limits it. Raises DoesNotFit.

    `before`: tokens of a prefix, which take the first of the model's positions and room in its cache.
    """
    limits: dict[LimitedBy, int] = {"target": target.context_tokens}
    if spec.max_position_embeddings is not None and spec.max_position_embeddings - before <= target.context_tokens:
        limits = {"model": spec.max_position_embeddings - before}
    if device_memory_bytes is not None:
        smallest = min(SMALLEST_CONTEXT, *limits.values())
        need = predict(spec, target, weights, smallest, before=before).memory_bytes
        if need > device_memory_bytes:
            problem = f"needs {show_bytes(need)} for a context of {smallest} tokens, the device has "
            fewer = "choose a target with fewer bits (ort-int4), or " if target.weight_bits > 4 else "choose "
            hint = fewer + "a smaller model; --for another device, or none, plans the training alone"
            raise DoesNotFit("bundle", problem + show_bytes(device_memory_bytes), hint)
        most = min(limits.values())
        fits = bisect.bisect_right(
            range(smallest, most + 1),
            device_memory_bytes,
            key=lambda tokens: predict(spec, target, weights, tokens, before=before).memory_bytes,
        )
        if smallest + fits - 1 < most:
            return smallest + fits - 1, "device memory"
    limited_by = min(limits, key=lambda key: limits[key])
    return limits[limited_by], limited_by


def choose_cache(target: Target, spec: ModelSpec, asked: int | str, device_memory_bytes: int | None) -> Target:
    """The target with a KV cache of the bits asked for; auto: 8 where the device would hold less context else.

    What the target's own file says is kept. Raises BadInput for bits that its runtime, or the model, cannot have.
    """
    if asked != AUTO or target.kv_bits is not None:
        return with_kv_bits(target, spec, target.kv_bits if asked == AUTO else asked)
    if device_memory_bytes is None:
        return target
    try:
        small = with_kv_bits(target, spec, 8)
    except BadInput:
        return target
    own, of_8 = (_context_on(spec, each, device_memory_bytes) for each in (target, small))
    return small if of_8 > own else target


def _context_on(spec: ModelSpec, target: Target, device_memory_bytes: int) -> int:
    try:
        return choose_context(spec, target, bundle_weights(spec, target), device_memory_bytes)[0]
    except DoesNotFit:
        return 0


def with_kv_bits(target: Target, spec: ModelSpec, bits: int | str | None) -> Target:
    """The target with these bits of each key and value. Raises BadInput as `choose_cache` does."""
    where, block = f"target {target.name}", runtime_of(target).cache8_block
    if bits == 8 and spec.head_dim % block:
        problem = f"kv_bits 8 are blocks of {block} there, this model's heads are of {spec.head_dim}"
        raise BadInput(where, problem, "leave kv_bits out, or choose an ort- target")
    try:
        return Target.model_validate(target.model_dump() | {"kv_bits": bits})
    except pydantic.ValidationError as problem:
        raise invalid(where, problem, Target) from None


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
