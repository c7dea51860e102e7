"""What does the builder of each runtime hold in memory, and write to disk, while it makes a bundle? No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from edgeft.models.spec import STORED_BYTES, ModelSpec
from edgeft.targets.matrices import GGUF_ROWS_BYTES, rotary_elements

if TYPE_CHECKING:
    from edgeft.targets.target import Target

# Beyond torch, before a model is held: onnxruntime-genai's builder with transformers, onnx, onnxruntime and onnx_ir;
# optimum's exporter with transformers and onnx. Python 3.11, torch 2.13 (CPU build) on Linux.
BUILDER_IMPORTS_BYTES, OPTIMUM_IMPORTS_BYTES = 175_500_000, 165_000_000
BUILDER_BYTES_PER_LAYER = 120_000  # graph nodes and values
GGUF_TEMPORARIES = 5  # arrays of about the size of the rows of a GGUF's matrix that are quantised at once


class Scratch(NamedTuple):
    """What a build writes to disk and leaves out of the bundle: bytes, and in words."""

    bytes: int = 0
    what: str = ""


class Part(NamedTuple):
    """One part of what a build holds in memory; the formula has its numbers filled in."""

    name: str
    bytes: int
    formula: str


class Build(NamedTuple):
    """What the memory of a build depends on: sizes of the model and of a process with torch."""

    spec: ModelSpec
    target: Target
    torch_bytes: int

    @property
    def weight_file(self) -> Part:
        """Weights that are read through the page cache."""
        spec = self.spec
        return Part("weight file", spec.stored_bytes, f"pages of the file, {spec.dtype}")


def genai_scratch(spec: ModelSpec, target: Target, stored_bytes: int) -> Scratch:
    """The builder's graph in fp32, whose matrices are then rounded."""
    if target.weight_bits >= 32:
        return Scratch()
    return Scratch(4 * (spec.total_parameters + rotary_elements(spec)), "the graph in fp32 that is rounded")


def portable_scratch(spec: ModelSpec, target: Target, stored_bytes: int) -> Scratch:
    head = spec.vocab_size * spec.hidden_size if spec.tie_word_embeddings else 0
    graph = 4 * spec.total_parameters
    if target.weight_bits == 8:
        return Scratch(2 * graph + 4 * head + stored_bytes, "optimum's graph, with a head of its own, and rounded")
    return Scratch(graph, "optimum's graph")


def gguf_scratch(spec: ModelSpec, target: Target, stored_bytes: int) -> Scratch:
    """llama.cpp's quantiser reads a model in fp16."""
    fitted = target.method == "k_quant"
    return Scratch(2 * spec.total_parameters, "the fp16 model that is quantised") if fitted else Scratch()


def genai_build(made: Build) -> list[Part]:
    """onnxruntime-genai's model builder, which writes fp32 tensor by tensor: what is rounded later takes less.

    It keeps the source mapped and its fused query-key-value matrices until it ends. Of the largest tensor there are a
    transposed copy, and before that its cast.
    """
    spec = made.spec
    size, head = STORED_BYTES.get(spec.dtype, 4), spec.vocab_size * spec.hidden_size
    builder = made.torch_bytes + BUILDER_IMPORTS_BYTES + BUILDER_BYTES_PER_LAYER * spec.num_hidden_layers
    fused, copies = _fused_weights(spec), 1 if size == 4 else 2
    return [
        Part("builder", builder, "Python, torch, transformers, onnx, onnxruntime"),
        made.weight_file,
        Part("fused QKV", fused * size, f"{fused} x {size} B"),
        Part("rotary tables", 8 * rotary_elements(spec), "cosine and sine, fp32, full width"),
        Part("largest tensor", 4 * copies * head, f"{copies} fp32 copies of the head"),
    ]


def _fused_weights(spec: ModelSpec) -> int:
    """Elements of query, key and value, which the builder joins where they are three matrices."""
    inputs = [linear for linear in spec.linears if linear.role == "attention_in"]
    if len(inputs) != 3:
        return 0
    return sum(linear.in_features * linear.out_features for linear in inputs) * spec.num_hidden_layers


def portable_build(made: Build) -> list[Part]:
    """optimum's exporter: the model in fp32, and the traced graph made, joined and written.

    A tied head is a matrix of its own in the graph until its twin is found. Of 5.8M and 135M parameters measured.
    """
    spec = made.spec
    elements = spec.total_parameters + (spec.vocab_size * spec.hidden_size if spec.tie_word_embeddings else 0)
    builder = made.torch_bytes + OPTIMUM_IMPORTS_BYTES
    return [
        Part("builder", builder, "Python, torch, transformers, optimum, onnx"),
        Part("model", 4 * spec.total_parameters, f"{spec.total_parameters} x 4 B"),
        Part("graph", 12 * elements, f"3 forms x {elements} x 4 B"),
    ]


def gguf_build(made: Build) -> list[Part]:
    """A GGUF file written tensor by tensor in the export's own process; k_quant's quantiser follows in another.

    Per tensor: itself, itself rearranged, and its stored form twice; a block of rows in fp32 with what gguf makes of
    it. llama.cpp's quantiser maps the fp16 file and holds its largest tensor in fp32. Twice the usual margin: counted
    from what the code allocates, not measured.
    """
    spec, target = made.spec, made.target
    size, table = STORED_BYTES.get(spec.dtype, 4), spec.vocab_size * spec.hidden_size
    fitted = target.method == "k_quant"
    bits = 16 if fitted else max(target.weight_bits, target.head_bits, target.embedding_bits)
    blocks = 0 if bits >= 16 else GGUF_TEMPORARIES * min(GGUF_ROWS_BYTES, 4 * table)
    parts = [
        made.weight_file,
        Part("largest tensor", 2 * size * table, f"2 x {table} x {size} B"),
        Part("its stored form", 2 * table * bits // 8, f"2 x {table} x {bits} bits"),
        Part("blocks", blocks, "rows in fp32, and what the quantiser makes of them"),
    ]
    if fitted:
        parts.append(Part("fp16 file", 2 * spec.total_parameters, "mapped by llama.cpp's quantiser"))
        parts.append(Part("quantiser", 4 * table, f"{table} x 4 B"))
    return parts
