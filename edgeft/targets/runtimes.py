"""What differs between the runtimes that a bundle can be made for? A runtime is a row of RUNTIMES; no torch is needed.

A row names the file of edgeft/targets that builds for it; how a device runs its bundles is in export/run.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from edgeft.data.grammar import Grammar, HeldTo
from edgeft.models.families import ort_builds
from edgeft.models.spec import Linear, ModelSpec
from edgeft.settings.job import Bits, Rounding
from edgeft.targets.build_bytes import (
    Build,
    Part,
    Scratch,
    genai_build,
    genai_scratch,
    gguf_build,
    gguf_scratch,
    portable_build,
    portable_scratch,
)
from edgeft.targets.matrices import (
    Weights,
    gguf_bytes,
    gguf_type,
    k_quant_type,
    output_bytes,
    quantised_bytes,
    rotary_elements,
    table_of,
)

if TYPE_CHECKING:
    from edgeft.targets.target import Target

# The head's weights are held again, packed for its kernel; a tied one once more, for the embedding's lookup.
# In fp32, and in fp16 that becomes fp32 on loading, only the lookup's transposed copy is made.
HEAD_COPIES_QUANTISED, HEAD_COPIES_FP32 = 2, 1


class Tables(NamedTuple):
    """Bytes of what is no projection of a layer: the head, an embedding that is not tied to it, rotary tables."""

    head: int
    embedding: int
    positions: int


@dataclass(frozen=True)
class Runtime:
    """One runtime: what it needs here and on a device, what its bundles hold and take, and what it can do."""

    # here
    builder: str  # the file of edgeft/targets with build_model, read_weights and write_limits
    module: str  # what is imported to run a bundle
    packages: tuple[str, ...]  # that decide its numbers, the one of the module first
    part: str  # of edgeft that brings them: an extra, or several
    problem: Callable[[Target], str]  # what of a target it cannot do, or nothing
    cannot_build: Callable[[ModelSpec], str]  # why no bundle of a model can be built for it, as far as that is known
    build_parts: Callable[[Build], list[Part]]  # memory beside the waiting export
    scratch: Callable[[ModelSpec, Target, int], Scratch]  # of so many bytes of weights
    # a bundle's weights
    matrix_bytes: Callable[[Linear, Bits, Target, int, int], int]  # of a layer's projection; layer, number of layers
    tables: Callable[[ModelSpec, Target], Tables]
    held_bytes: Callable[[Weights, Target], int]  # weights as loaded, with the runtime's copies
    # on the device
    needed: tuple[str, ...]  # packages that a bundle needs and does not hold
    process_bytes: int  # Python, numpy, the runtime and its graph, as measured
    layer_bytes: int  # the same for each layer
    cache_itemsize: float  # bytes of a key's or value's element
    kv_bits: Bits  # of the element itself
    holds: str
    copies: str  # held_bytes beyond what is stored
    copied: str
    cache8_itemsize: float = 0.0  # the same where the cache has 8 bits, with its share of scales; 0: it cannot
    cache8_block: int = 1  # elements of a head that have a scale together
    window_slack: int | None = None  # tokens that a windowed layer keeps beyond its window; None: it keeps all
    word_bytes: int = 0  # for each entry of the vocabulary
    scores_at_once: int = 0  # forms of the scores of a prefill pass that exist together
    every_position: bool = False  # logits of all of a pass, not of its last token
    arm64_wheels: bool = True  # its packages are published built for aarch64
    build_margins: int = 1  # of the estimate of build_parts
    # what it can do
    grids: Literal["ort", "ggml"] | None = None  # on whose grids it rounds, where that is computed here
    calibrates: bool = True  # takes codes that were chosen on training rows
    cache_scales: bool = False  # a cache of 8 bits has scales that are found on training rows
    climbs_calibrated: bool = False  # any of its 4-bit targets is tried calibrated too, not only a shipped one
    # what a device switches to without a reload: LoRA's factors; what a graph takes as inputs, prefixes and bottlenecks
    switches: Literal["factors", "inputs"] | None = None
    runs_beside: bool = False  # computes adapters that no weight can hold: they are nodes of its graph
    encoders: bool = False
    other_interpreter: bool = False  # its exporter lives in an environment of its own
    graph_is_read: bool = False  # codes and numbers in the file are compared with what they must be
    widened_proof: bool = False  # a proof runs a graph with the logits of every position
    guides: bool = False  # holds answers to a grammar by itself
    casts_half: bool = False  # fp16 matrices become fp32 on loading


def portable_problem(target: Target) -> str:
    if (target.weight_bits, target.head_bits, target.embedding_bits) not in ((32, 32, 32), (8, 8, 32)):
        return "runtime onnxruntime has weight_bits and head_bits 32 or 8, and embedding_bits 32"
    if target.block_size or target.symmetric or target.method != "rtn" or target.accuracy_level:
        problem = "runtime onnxruntime rounds each output to nearest with a zero point: block_size 0, "
        return problem + "symmetric false, method rtn, no accuracy_level"
    return "runtime onnxruntime needs an opset of at least 18" if target.opset < 18 else ""


def _only_portable(target: Target) -> str:
    outputs = target.block_size == 0 or target.opset
    return "block_size 0 and opset are for the runtime onnxruntime" if outputs else ""


def genai_problem(target: Target) -> str:
    if problem := _only_portable(target):
        return problem
    if target.weight_bits in (5, 6):
        return "weight_bits 5 and 6 exist for llama.cpp only"
    if target.method != "rtn":
        return 'method k_quant exists for llama.cpp only; calibration = "gptq" fits codes to what layers see'
    if target.head_bits != target.weight_bits and (target.weight_bits, target.head_bits) != (4, 8):
        return "head_bits must equal weight_bits, or be 8 where weight_bits is 4"
    allowed = {4: (4, 32), 16: (16,)}.get(target.weight_bits, (32,))
    if target.embedding_bits not in allowed:
        numbers = " or ".join(map(str, allowed))
        return f"embedding_bits must be {numbers} where weight_bits is {target.weight_bits}"
    return ""


def gguf_problem(target: Target) -> str:
    if problem := _only_portable(target):
        return problem
    if target.method == "k_quant":
        if target.weight_bits not in (4, 5, 6) or target.block_size != 256:
            return "k_quant of llama.cpp has weight_bits 4, 5 or 6 and block_size 256"
        if target.mixed_layers or target.eight_bit:
            return "k_quant of llama.cpp mixes layers itself: no mixed_layers, no eight_bit"
    elif target.block_size != 32:
        return "block_size must be 32: llama.cpp has no other block but with k_quant"
    if target.method == "rtn" and target.weight_bits == 6:
        return "weight_bits 6 needs method k_quant"
    return "8 bits of llama.cpp are symmetric" if target.weight_bits == 8 and not target.symmetric else ""


def genai_cannot_build(spec: ModelSpec) -> str:
    if not ort_builds(spec.architecture):
        return f"onnxruntime-genai's builder does not know {spec.architecture}"
    return spec.family.ort_problem


def gguf_cannot_build(spec: ModelSpec) -> str:
    family = spec.family.gguf
    if family is None:
        return f"the GGUF writer does not know the model type {spec.model_type!r}"
    biased = any(linear.has_bias for linear in spec.linears if linear.role == "attention_out")
    if biased and not family.output_bias:
        return f"llama.cpp adds no bias to what attention gives in {family.name}, and this model has one there"
    if family.square and spec.num_attention_heads * spec.head_dim != spec.hidden_size:
        what = f"{spec.num_attention_heads} heads of {spec.head_dim} are not the hidden size, {spec.hidden_size}"
        return f"{what}, as llama.cpp assumes for {family.name}"
    return ""


def cannot_build(target: Target, spec: ModelSpec) -> str:
    """Why a target's bundle of this model cannot be built, as far as its config tells; nothing where it can."""
    return runtime_of(target).cannot_build(spec)


def kv_bits_problem(target: Target) -> str:
    """What is wrong with the bits of a target's KV cache, or nothing."""
    runtime = runtime_of(target)
    known = (8, runtime.kv_bits) if runtime.cache8_itemsize else (runtime.kv_bits,)
    if target.kv_bits in (None, *known):
        return ""
    return f"kv_bits of runtime {target.runtime} must be {' or '.join(map(str, known))}"


def genai_tables(spec: ModelSpec, target: Target) -> Tables:
    """In blocks along the input; an fp16 file counts as fp32, which it becomes on loading."""
    table = table_of(spec)
    embedding = 0 if spec.tie_word_embeddings else int(quantised_bytes(table, target.embedding_bits, target))
    return Tables(int(quantised_bytes(table, target.head_bits, target)), embedding, 4 * rotary_elements(spec))


def portable_tables(spec: ModelSpec, target: Target) -> Tables:
    embedding = 0 if spec.tie_word_embeddings else 4 * spec.embedding_parameters
    return Tables(output_bytes(table_of(spec), target.head_bits), embedding, 0)


def gguf_tables(spec: ModelSpec, target: Target) -> Tables:
    table, fitted = table_of(spec), target.method == "k_quant"
    name = f"Q{target.weight_bits}_K" if fitted else gguf_type(target.embedding_bits, target)
    head = gguf_bytes(table, "Q6_K" if fitted else gguf_type(target.head_bits, target))
    return Tables(head, 0 if spec.tie_word_embeddings else gguf_bytes(table, name), 0)


def gguf_matrix(linear: Linear, bits: Bits, target: Target, layer: int, layers: int) -> int:
    fitted = target.method == "k_quant"
    return gguf_bytes(linear, k_quant_type(linear, layer, layers, target) if fitted else gguf_type(bits, target))


def genai_held(weights: Weights, target: Target) -> int:
    copies = HEAD_COPIES_FP32 if target.weight_bits >= 16 else HEAD_COPIES_QUANTISED
    return weights.stored_bytes + copies * weights.head_bytes


def portable_held(weights: Weights, target: Target) -> int:
    """A tied table is looked up as it is stored."""
    return weights.stored_bytes + HEAD_COPIES_FP32 * weights.head_bytes


def gguf_held(weights: Weights, target: Target) -> int:
    """The file is mapped; 4-bit matrices are rearranged into a copy for the processor's instructions."""
    arranged = weights.bytes_per_token - weights.head_bytes if target.weight_bits == 4 else 0
    return weights.stored_bytes + arranged


# Bytes of processes: onnxruntime-genai 0.18 and llama-cpp-python 0.3.36 on Linux, measured on bundles of 5.8M and 135M
# parameters, 8 and 30 layers, up to 600 tokens; six for ONNX Runtime (4, 8 and 32 bits).
RUNTIMES: dict[str, Runtime] = {
    "ort-genai": Runtime(
        builder="ort",
        module="onnxruntime_genai",
        packages=("onnxruntime-genai", "onnxruntime"),
        part="export",
        problem=genai_problem,
        cannot_build=genai_cannot_build,
        build_parts=genai_build,
        scratch=genai_scratch,
        matrix_bytes=lambda linear, bits, target, layer, layers: int(quantised_bytes(linear, bits, target)),
        tables=genai_tables,
        held_bytes=genai_held,
        needed=("onnxruntime-genai", "numpy"),
        process_bytes=76_000_000,
        layer_bytes=600_000,
        cache_itemsize=4,
        kv_bits=32,
        window_slack=16,  # onnxruntime-genai 0.18
        cache8_itemsize=1,  # a scale for each channel lies in the graph
        holds="Python, numpy, ONNX Runtime and its graph",
        copies="head copies",
        copied="packed for its kernel, and for the embedding's lookup",
        grids="ort",
        cache_scales=True,
        climbs_calibrated=True,
        switches="factors",
        graph_is_read=True,
        widened_proof=True,
        guides=True,
        casts_half=True,
    ),
    "llama.cpp": Runtime(
        builder="gguf_file",
        module="llama_cpp",
        packages=("llama-cpp-python",),
        part="gguf,llama",
        problem=gguf_problem,
        cannot_build=gguf_cannot_build,
        build_parts=gguf_build,
        build_margins=2,
        scratch=gguf_scratch,
        matrix_bytes=gguf_matrix,
        tables=gguf_tables,
        held_bytes=gguf_held,
        needed=("llama-cpp-python", "numpy"),
        process_bytes=57_000_000,
        layer_bytes=200_000,
        word_bytes=150,  # in llama.cpp's tables of words
        cache_itemsize=2,
        kv_bits=16,
        cache8_itemsize=34 / 32,  # Q8_0: 32 codes and a scale in fp16
        cache8_block=32,
        holds="Python, numpy, llama.cpp",
        copies="packed copies",
        copied="matrices rearranged for the processor",
        arm64_wheels=False,  # published as source alone
        grids="ggml",
    ),
    "onnxruntime": Runtime(
        builder="portable_onnx",
        module="onnxruntime",
        packages=("onnxruntime",),
        part="export",
        problem=portable_problem,
        cannot_build=lambda spec: "",  # optimum alone knows, in an environment of its own
        build_parts=portable_build,
        build_margins=2,
        scratch=portable_scratch,
        matrix_bytes=lambda linear, bits, target, layer, layers: output_bytes(linear, bits),
        tables=portable_tables,
        held_bytes=portable_held,
        needed=("onnxruntime", "tokenizers", "numpy", "jinja2"),
        process_bytes=76_000_000,
        layer_bytes=300_000,
        kv_bits=32,
        cache_itemsize=8,  # a portable graph reads the old cache and writes a new one: twice
        holds="Python, numpy, ONNX Runtime and its graph",
        copies="head copies",
        copied="packed for its kernel, and for the embedding's lookup",
        scores_at_once=3,  # masked, as shares and as the product's input
        every_position=True,
        calibrates=False,
        switches="inputs",
        runs_beside=True,
        encoders=True,
        other_interpreter=True,
    ),
}


def needed_packages(target: Target, held_to: HeldTo = ()) -> tuple[str, ...]:
    """What a device needs for a target's bundle: for a grammar its reader too, where the runtime has none inside."""
    runtime = runtime_of(target)
    return (*runtime.needed, "llguidance") if isinstance(held_to, Grammar) and not runtime.guides else runtime.needed


def runtime_of(target: Rounding) -> Runtime:
    """The row of a target's runtime."""
    return RUNTIMES[target.runtime]
