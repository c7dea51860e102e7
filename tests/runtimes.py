"""What runtimes store and compute, read without edgeft: ONNX Runtime's quantisers, its graphs, GGUF files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import EXAMPLE

from edgeft.targets.grid import Grid
from edgeft.targets.target import Target


def by_onnxruntime(weight: torch.Tensor, grid: Grid) -> tuple[Any, Any, Any]:
    """(codes, scale, zero point) by ONNX Runtime's own quantisers."""
    from onnxruntime.capi import _pybind_state as kernels
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantizer as Default
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor

    rows, columns = weight.shape
    count = -(-columns // grid.block_size)
    padded = np.zeros((rows, count * grid.block_size), dtype=np.float32)
    padded[:, :columns] = weight.numpy()
    if grid.method == "rtn":
        scheme = "sym" if grid.symmetric else "asym"
        codes, scale, zero = quant_tensor(padded, grid.bits, grid.block_size, scheme, "uint", 1)
    elif grid.method == "gather":
        slices = padded.reshape(rows * count, grid.block_size)
        codes, scale, zero = Default.quant_slice_asymmetric(slices)
    else:
        each = 8 // grid.bits
        codes = np.zeros((rows, count, grid.block_size // each), dtype=np.uint8)
        zero = np.zeros((rows, -(-count // each)), dtype=np.uint8)
        scale = np.zeros((rows, count), dtype=np.float32)
        kernel = kernels.quantize_matmul_4bits if grid.bits == 4 else kernels.quantize_matmul_8bits
        kernel(codes, np.ascontiguousarray(padded.T), scale, zero, grid.block_size, rows, columns, grid.symmetric)
        codes, zero = unpacked(codes, grid.bits), unpacked(zero, grid.bits)[:, :count]
        if grid.symmetric:
            zero = np.full((rows, count), 2 ** (grid.bits - 1))
    return codes.reshape(rows, -1)[:, :columns], scale.reshape(rows, count), zero.reshape(rows, count)


def unpacked(packed: Any, bits: int) -> Any:
    """One code a number of those that bytes hold, two where they have 4 bits."""
    rows = packed.shape[0]
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1) if bits == 4 else packed.reshape(rows, -1)


def graph_weights(folder: Path) -> dict[str, Any]:
    """What a bundle's graph holds, by its names there."""
    import onnx

    graph = onnx.load(str(folder / "model.onnx")).graph
    return {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type in (1, 2)}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the file as fp32."""
    import gguf

    reader = gguf.GGUFReader(str(folder / "model.gguf"))
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape[::-1]))
        for tensor in reader.tensors
    }


PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
}  # fmt: skip


def dequantised(folder: Path) -> Any:
    """The example's model in torch with the very weights of its GGUF file."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    given, head = tensors(folder), model.config.head_dim
    with torch.no_grad():
        for name, value in model.state_dict().items():
            part = next((theirs for part, theirs in PARTS.items() if f".{part}.weight" in name), None)
            if part is not None:
                array = given[f"blk.{name.split('.')[2]}.{part}.weight"]
                if part in ("attn_q", "attn_k"):
                    places = [h * head + half * head // 2 + i for h in range(len(array) // head)
                              for i in range(head // 2) for half in (0, 1)]  # fmt: skip
                    array = array[np.argsort(places)]
                value.copy_(torch.from_numpy(array.copy()))
            elif "embed_tokens" in name:
                value.copy_(torch.from_numpy(given["token_embd.weight"].copy()))
    return model


def by_builder(checkpoint: Path, target: Target, promoted: Sequence[str], out: Path) -> Path:
    """A graph as onnxruntime-genai's builder makes and rounds it by itself: its own quantiser, no code of edgeft's."""
    config = json.loads((checkpoint / "config.json").read_text())
    tied = bool(config["tie_word_embeddings"])

    def options(bits: int, names: Sequence[str]) -> dict[str, Any]:
        separate = not tied and target.embedding_bits == 4
        shared = tied and bits == 4
        overrides: list[dict[str, Any]] = [{"match": {"name": name}, "type": "int8"} for name in names]
        if bits == 4 and target.head_bits == 8:
            overrides.append({"match": {"preset": "last_matmul"}, "type": "int8"})
        weights = {
            "type": f"int{bits}", "method": "default" if separate else "rtn", "block_size": target.block_size,
            "symmetric": target.symmetric, "accuracy_level": target.accuracy_level, "overrides": overrides,
            "op_types": ["MatMul", "Gather"] if separate or shared else ["MatMul"],
        }  # fmt: skip
        found: dict[str, Any] = {"quant_config": {"io_dtype": "fp32", "weights": weights}}
        apart = any("/attn/" in name for name in names) and not any("/qkv_proj/" in name for name in names)
        return found | ({"optimizations": {"fuse_qkv": False}} if apart else {})

    def run(bits: int, names: Sequence[str]) -> None:
        command = [
            sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-i", str(checkpoint), "-o",
            str(out), "-c", str(out / "cache"), "--builder_config_version", "2", "--target_options",
            json.dumps(options(bits, names)),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})

    run(target.weight_bits, promoted)
    if tied and target.weight_bits == 8:  # it shares a table of 8 bits where every matmul is an exception from 4
        import onnx

        nodes = onnx.load(str(out / "model.onnx"), load_external_data=False).graph.node
        run(4, [node.name.removesuffix("_Q8") for node in nodes if node.op_type == "MatMulNBits"])
    return out
