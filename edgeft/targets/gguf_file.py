"""How does a checkpoint become a GGUF file for llama.cpp: which keys, which tensors, in which order and precision?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

from edgeft.documents import saving
from edgeft.errors import BadInput
from edgeft.machines.extras import missing
from edgeft.models.checkpoint import Checkpoint, quiet_transformers
from edgeft.models.families import Gguf
from edgeft.models.spec import ModelSpec
from edgeft.targets import k_quants
from edgeft.targets.gguf_tokenizer import write_vocabulary
from edgeft.targets.grid import GGML, Encoded
from edgeft.targets.matrices import GGUF_ROWS_BYTES, GGUF_TYPES, Weights
from edgeft.targets.runtimes import cannot_build
from edgeft.targets.target import Target, eight_bit_modules

if TYPE_CHECKING:
    from edgeft.targets.codes import Codes

MODEL = "model.gguf"
OTHERS = "export with an ort- or an onnx-portable- target"
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
PROJECTIONS = {
    "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj", "attn_qkv": "qkv_proj",
    "ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj",
}  # fmt: skip


def library() -> ModuleType:
    """The gguf package. Raises MissingExtra (exit 5) without it."""
    try:
        import gguf
    except ImportError as problem:
        raise missing("gguf", f"cannot be imported: {problem}", "gguf") from None
    return gguf  # type: ignore[no-any-return]


class Placed(NamedTuple):
    """One tensor of the file: where it comes from and what it is stored as."""

    name: str
    source: str  # in the checkpoint; "" for rotary factors
    shape: tuple[int, ...]
    type: str


def build_model(merged: Path, target: Target, spec: ModelSpec, folder: Path, codes: Codes | None = None) -> int:
    """model.gguf in `folder`, written tensor by tensor, in this process. Calibrated `codes` are written as they are; of
    k_quant they are what its quantiser weighs inputs by.

    Returns the highest resident bytes of llama.cpp's quantiser, 0 where it is not asked or no /proc tells them.

    Raises BadInput for a model or tokenizer llama.cpp would not reproduce, MissingExtra without gguf, or, for k_quant,
    without llama-cpp-python, whose quantiser alone writes that.
    """
    gguf = library()
    path = folder / MODEL
    if target.method != "k_quant":
        _write(gguf, merged, target, spec, path, codes)
        return 0
    plain = folder / ".plain.gguf"
    half = target.model_copy(
        update={"method": "rtn", "weight_bits": 16, "head_bits": 16, "embedding_bits": 16, "symmetric": True}
    )
    _write(gguf, merged, half, spec, plain)
    weights = None if codes is None else _weights(gguf, merged, half, spec, codes.input_weights())
    peak = k_quants.quantise(plain, path, target.weight_bits, weights)
    plain.unlink()
    return peak


def _write(
    gguf: ModuleType, merged: Path, target: Target, spec: ModelSpec, path: Path, codes: Codes | None = None
) -> None:
    family, config, checkpoint = _known(merged, target, spec), _config(merged), Checkpoint(merged)
    factors = _rope_factors(merged, config, family)
    placed = list(_place(gguf, checkpoint, target, spec, family))
    placed += [Placed("rope_freqs.weight", "", tuple(factors.shape), "F32")] if factors is not None else []
    writer = gguf.GGUFWriter(str(path), family.name)
    _describe(gguf, writer, merged, config, spec, target, family)
    write_vocabulary(writer, merged, next(tensor.shape[0] for tensor in placed if tensor.name == "token_embd.weight"))
    for tensor in placed:
        raw = gguf.GGMLQuantizationType[tensor.type]
        block, block_bytes = gguf.GGML_QUANT_SIZES[raw]
        size = int(numpy.prod(tensor.shape)) // block * block_bytes
        writer.add_tensor_info(tensor.name, tensor.shape, numpy.dtype(numpy.float32), size, raw_dtype=raw)
    with saving(path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in placed:
            if codes is not None and tensor.source in codes:
                order = _arrange(tensor, torch.arange(tensor.shape[0]), spec, family)
                writer.write_tensor_data(packed(codes.read(tensor.source).rows(order)))
                continue
            values = factors if tensor.source == "" else checkpoint.read(tensor.source)
            assert values is not None
            writer.write_tensor_data(_encode(_arrange(tensor, values, spec, family), tensor.type))
        writer.close()


def _weights(
    gguf: ModuleType, merged: Path, target: Target, spec: ModelSpec, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What each input counts, by the tensors' names in the file."""
    placed = _place(gguf, Checkpoint(merged), target, spec, _known(merged, target, spec))
    return {tensor.name: weights[tensor.source] for tensor in placed if tensor.source in weights}


def read_weights(folder: Path) -> Weights:
    """Sizes of a file's weights. An embedding with a head of its own is read one row per token, a tied one as head."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in library().GGUFReader(str(folder / MODEL)).tensors}
    head = sizes.get("output.weight", sizes["token_embd.weight"])
    stored = sum(sizes.values())
    return Weights(stored, head, stored - (sizes["token_embd.weight"] if "output.weight" in sizes else 0))


def _known(merged: Path, target: Target, spec: ModelSpec) -> Gguf:
    if problem := cannot_build(target, spec):
        raise BadInput(merged / "config.json", problem, OTHERS)
    assert spec.family.gguf is not None
    return spec.family.gguf


def _config(merged: Path) -> Any:
    from transformers import AutoConfig

    with quiet_transformers():
        return AutoConfig.from_pretrained(merged).get_text_config()


def _place(gguf: ModuleType, checkpoint: Checkpoint, target: Target, spec: ModelSpec, family: Gguf) -> Iterator[Placed]:
    """Every tensor of the file in the checkpoint's order. Raises BadInput for one that llama.cpp has no name for."""
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    names = gguf.get_tensor_name_map(architecture, spec.num_hidden_layers)
    promoted = set(eight_bit_modules(target, spec.num_hidden_layers, tuple(linear.name for linear in spec.linears)))
    for source in checkpoint.owner:
        if source == "lm_head.weight" and spec.tie_word_embeddings:
            continue  # some savers write it twice
        bare = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", source)
        name = names.get_name(bare, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise BadInput(checkpoint.folder, f"llama.cpp has no place for tensor {source}", OTHERS)
        shape = checkpoint.shape(source)
        yield Placed(name, source, shape, _type_of(name, shape, target, spec, promoted))


def _type_of(name: str, shape: tuple[int, ...], target: Target, spec: ModelSpec, promoted: set[str]) -> str:
    """Matrices by the target's bits; vectors fp32; rows that are no multiple of 32 in fp16, as llama.cpp does."""
    if len(shape) == 1:
        return "F32"
    bits = target.weight_bits
    if name == "output.weight" or (name == "token_embd.weight" and spec.tie_word_embeddings):
        bits = target.head_bits
    elif name == "token_embd.weight":
        bits = target.embedding_bits
    elif found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        projection = PROJECTIONS[found[2]]
        if "gate_up_proj" in {linear.name for linear in spec.linears} and projection == "up_proj":
            projection = "gate_up_proj"
        bits = 8 if f"layers.{found[1]}.{projection}" in promoted else bits
    if bits >= 16:
        return f"F{bits}"
    return GGUF_TYPES[bits, target.symmetric or bits == 8] if shape[-1] % 32 == 0 else "F16"


def _arrange(tensor: Placed, values: torch.Tensor, spec: ModelSpec, family: Gguf) -> torch.Tensor:
    """The tensor as llama.cpp's kernels expect it."""
    if family.norms_from_one and tensor.name.endswith("norm.weight"):
        return values.float() + 1
    part = tensor.name.split(".")[-2]
    if family.rotates_pairs and part in ("attn_q", "attn_k"):
        # a checkpoint rotates value i of a head with value i + half; llama.cpp 2i with 2i + 1
        heads = spec.num_attention_heads if part == "attn_q" else spec.num_key_value_heads
        halves = values.reshape(heads, 2, -1, *values.shape[1:])
        return halves.transpose(1, 2).reshape(values.shape)
    return values


def _encode(values: torch.Tensor, kind: str) -> Any:
    """The stored bytes of a tensor as a numpy array: a block of rows at a time, so that fp32 is held of one block."""
    if kind in ("F32", "F16"):
        array = values.to(torch.float32 if kind == "F32" else torch.float16).numpy()
        if not numpy.isfinite(array).all():
            raise BadInput("checkpoint", f"has values beyond the range of {kind}", "look for a broken training run")
        return numpy.ascontiguousarray(array)
    rows = max(1, GGUF_ROWS_BYTES // 4 // values.shape[-1])
    return numpy.concatenate([packed(GGML[kind].encode(block.float())) for block in torch.split(values, rows)])


def packed(encoded: Encoded) -> Any:
    """The bytes of codes on one of ggml's grids, block by block: scale, least value where it has one, codes.

    Codes of 8 bits follow each other. Of fewer, the lower four bits of two codes share a byte, one of the block's first
    half below one of its second, and fifth bits come first.
    """
    rows, columns = encoded.codes.shape
    scales = [part for part in (encoded.scale, encoded.least) if part is not None]
    halves = torch.stack(scales, dim=-1).to(torch.float16).numpy().view(numpy.uint8).reshape(rows, columns // 32, -1)
    codes = encoded.codes.to(torch.int16).numpy().astype(numpy.uint8).reshape(rows, columns // 32, 32)
    if encoded.bits == 8:
        return numpy.concatenate([halves, codes], axis=-1).reshape(rows, -1)
    fifth = numpy.packbits(codes >> 4, axis=-1, bitorder="little")[:, :, : 4 * (encoded.bits - 4)]
    pairs = codes[:, :, :16] & 15 | codes[:, :, 16:] << 4
    return numpy.concatenate([halves, fifth, pairs], axis=-1).reshape(rows, -1)


def _describe(
    gguf: ModuleType, writer: Any, merged: Path, config: Any, spec: ModelSpec, target: Target, family: Gguf
) -> None:
    """The keys that say what the model is. Raises BadInput for a variant that llama.cpp would compute otherwise."""
    writer.add_type("model")
    writer.add_context_length(spec.max_position_embeddings or target.context_tokens)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_hidden_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_attention_heads)
    writer.add_head_count_kv(spec.num_key_value_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    kind = f"F{target.weight_bits}" if target.weight_bits >= 16 else GGUF_TYPES[target.weight_bits, target.symmetric]
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if family.widest:  # llama.cpp tells the 27B models by their layers
        widest = spec.num_hidden_layers == family.widest
        scale = spec.hidden_size // spec.num_attention_heads if widest else spec.head_dim
        if config.query_pre_attn_scalar != scale:
            what = f"query_pre_attn_scalar {config.query_pre_attn_scalar}, llama.cpp computes with {scale}"
            raise BadInput(merged / "config.json", what, OTHERS)
    if spec.attn_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(spec.attn_logit_softcapping)
    if spec.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(spec.final_logit_softcapping)
    if family.windows and spec.sliding_window is not None:
        writer.add_sliding_window(spec.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    elif family.no_window:
        writer.add_sliding_window(0)
    _describe_rope(gguf, writer, merged, config, spec)


def _describe_rope(gguf: ModuleType, writer: Any, merged: Path, config: Any, spec: ModelSpec) -> None:
    rope = dict(config.rope_parameters)
    if "full_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        if rope["sliding_attention"]["rope_type"] != "default":
            raise BadInput(
                merged / "config.json", "scaled rotary positions in the windowed layers", "use an ort- target"
            )
        rope = rope["full_attention"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise BadInput(merged / "config.json", "rotary positions on part of a head", OTHERS)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        changed = sorted(set(rope) & {"attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow"})
        if changed:
            raise BadInput(merged / "config.json", f"yarn with {', '.join(changed)}", OTHERS)
    elif kind not in ("default", "llama3"):
        raise BadInput(merged / "config.json", f"rotary scaling {kind!r} is not written to GGUF", OTHERS)


def _rope_factors(merged: Path, config: Any, family: Gguf) -> torch.Tensor | None:
    """By what llama3's scaling divides each rotary frequency, as transformers computes it; None without it."""
    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    if not family.rope_factors:
        raise BadInput(merged / "config.json", f"llama3's rotary scaling in {family.name}", OTHERS)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].double()
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(len(scaled), dtype=torch.float64) / len(scaled))
    factors: torch.Tensor = plain / scaled
    return factors.float()


def write_limits(folder: Path, context_tokens: int, stop_ids: list[int]) -> None:
    """Write the context limit into the file, where any llama.cpp app takes its default from; stop ids are there."""
    reader = library().GGUFReader(str(folder / MODEL), "r+")
    field = next(field for name, field in reader.fields.items() if name.endswith(".context_length"))
    field.parts[field.data[0]][0] = context_tokens
    reader.data.flush()
