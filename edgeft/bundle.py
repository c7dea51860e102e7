"""What is in a bundle, where did it come from, and what does it need on the device? (data only, no torch, no onnx)"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal, NamedTuple

import pydantic
from pydantic import Field

from edgeft.artifacts import Artifact, Strict, saving
from edgeft.errors import DoesNotFit
from edgeft.model_spec import ModelSpec
from edgeft.runner import runner_module
from edgeft.scores import Proof
from edgeft.target import Target
from edgeft.units import show_bytes

MANIFEST = "bundle.json"
PromptFormat = Literal["plain", "chat"]
LimitedBy = Literal["model", "target", "device memory"]

SMALLEST_CONTEXT = 128  # a device that cannot hold this many tokens does not run the model

# Python, numpy, ONNX Runtime and its graph: what run.py holds besides the other terms. Measured
# (onnxruntime-genai 0.18, Linux) on six bundles, 5.8M and 135M parameters of 8 and 30 layers, 4, 8 and 32
# bits, up to 600 tokens.
RUNTIME_BYTES, RUNTIME_BYTES_PER_LAYER = 76_000_000, 600_000
# The head's weights are held again, packed for its kernel; a tied one once more, for the embedding's lookup.
# In fp32 only the lookup's transposed copy is made.
HEAD_COPIES_QUANTISED, HEAD_COPIES_FP32 = 2, 1


class GoldenInput(Strict):
    """One prompt to record: a text as it is, or chat messages for the template."""

    text: str | None = None
    messages: list[dict[str, str]] | None = None

    @pydantic.model_validator(mode="after")
    def _one_of_them(self) -> GoldenInput:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give either text or messages")
        return self


class Golden(Strict):
    """What the artifact gave for one prompt at export: run.py --verify replays it on the device.

    `messages` is None for plain prompts, and for templates that print the date: their text changes every day.
    `greedy_ids` ends before the first step whose two best logits are nearer than twice the tolerance: there
    another CPU may rightly choose the other.
    """

    messages: list[dict[str, str]] | None
    text: str
    plain: bool
    ids: list[int]
    greedy_ids: list[int]
    top_ids: list[int]
    top_logits: list[float]


class BundledFile(Strict):
    sha256: str
    size_bytes: int


class Predicted(Strict):
    """Memory of `run.py` on the device with a full context, and the most tokens/s its memory allows."""

    weights_bytes: int = Field(description="weights as stored, and the copies the runtime makes of the head's")
    kv_cache_bytes: int = Field(description="2 x layers x kv heads x head_dim x 4 x context")
    logits_bytes: int = Field(description="vocabulary x 4 x tokens of one prefill pass")
    runtime_bytes: int = Field(description="Python, numpy and ONNX Runtime, as measured")
    memory_bytes: int = Field(description="the sum of these")
    device_memory_bytes: int | None = Field(description="what the device has for it")
    tokens_per_second_bound: float | None = Field(description="bandwidth / weight bytes per token")


class Measured(Strict):
    """What run.py --bench found on the machine that exported."""

    load_seconds: float
    prompt_tokens: int
    new_tokens: int
    time_to_first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    weight_bytes_per_token: int
    bandwidth_bytes_per_second: float
    bound_tokens_per_second: float
    fraction_of_bound: float
    cores: int


class Bundle(Artifact):
    """bundle.json: what is in the folder, where it came from, what it needs and what it gave here."""

    format_version: Literal[1] = 1
    target: Target
    prompt_format: PromptFormat
    prefix_ids: list[int] = Field(description="ids before every plain prompt, such as begin-of-text")
    stop_ids: list[int] = Field(description="ids that end an answer")
    context_tokens: int
    context_limited_by: LimitedBy
    golden_logit_tolerance: float
    weight_bytes_per_token: int = Field(description="read for each new token: all but tables of which one row is read")
    size_bytes: int = Field(description="all files but bundle.json")
    files: dict[str, BundledFile]
    golden: list[Golden]
    provenance: dict[str, str] = Field(description="sha256 of what this was made from, by name")
    predicted: Predicted
    proof: Proof | None = None
    measured: Measured | None = None
    predicted_here_bytes: int | None = Field(default=None, description="peak memory as predicted for what was measured")
    seconds: float
    self_sha256: str = Field(default="0" * 64, description="sha256 of this file with 64 zeros here")

    def write(self, path: Path) -> None:
        """Write with `self_sha256` over the very bytes of the file, so that any later change to it shows."""
        blank = self.model_copy(update={"self_sha256": "0" * 64}).model_dump_json(indent=1) + "\n"
        digest, key = hashlib.sha256(blank.encode()).hexdigest(), '"self_sha256": '
        with saving(path):
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(blank.replace(f'{key}"{"0" * 64}"', f'{key}"{digest}"').encode())
            temporary.replace(path)


def kv_cache_bytes_per_token(spec: ModelSpec) -> int:
    """2 x layers x kv heads x head_dim x 4: keys and values in fp32, as the CPU kernels keep them."""
    return 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * 4


class Weights(NamedTuple):
    """Bytes of an ONNX file's weights: all, the output head's, and what every new token reads."""

    stored_bytes: int
    head_bytes: int
    bytes_per_token: int


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
