"""Do weights that a quantiser packed become the numbers that it meant? Packed here a code at a time, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from broken_folders import copied, model_of, tensors_of
from safetensors.torch import save_file

from edgeft.api import doctoring
from edgeft.models.checkpoint import load_plain
from edgeft.models.doctor import unpack
from edgeft.models.doctor.diagnose import diagnose

Made = tuple[dict[str, torch.Tensor], np.ndarray[Any, Any]]  # (what is stored, the weight in float64)
GROUP = 32
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # which column lies in which place of a word


def words(codes: np.ndarray[Any, Any], bits: int, places: tuple[int, ...] = ()) -> torch.Tensor:
    """Codes of every row packed into words of 32 bits, one after the other, lowest bits first."""
    rows, columns = codes.shape
    each = 32 // bits
    packed = np.zeros((rows, columns // each), dtype=np.uint32)
    for column in range(columns):
        word, place = divmod(column, each)
        for at in range(rows):
            code = int(codes[at, word * each + places[place]] if places else codes[at, column])
            packed[at, word] |= np.uint32(code << (bits * place))
    return torch.from_numpy(packed.view(np.int32))


def numbers(shape: tuple[int, int], bits: int, seed: int) -> tuple[np.ndarray[Any, Any], ...]:
    """(codes, zeros, scales of 16 bits), each group's a column of the last two."""
    random, groups = np.random.default_rng(seed), shape[1] // GROUP
    codes = random.integers(0, 2**bits, shape)
    return (
        codes,
        random.integers(1, 2**bits, (shape[0], groups)),
        random.random((shape[0], groups)).astype(np.float16) / 50,
    )


def spread(values: np.ndarray[Any, Any], group: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return values.astype(np.float64)[:, group]


def gptq(shape: tuple[int, int], bits: int, seed: int, *, ordered: bool = False, version: int = 1) -> Made:
    codes, zeros, scales = numbers(shape, bits, seed)
    group = np.arange(shape[1]) // GROUP
    group = np.random.default_rng(seed).permutation(group) if ordered else group
    stored = {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words(zeros.T - (version == 1), bits),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    return stored, (codes - spread(zeros, group)) * spread(scales, group)


def awq(shape: tuple[int, int], bits: int, seed: int) -> Made:
    codes, zeros, scales = numbers(shape, bits, seed)
    group = np.arange(shape[1]) // GROUP
    stored = {
        "qweight": words(codes.T, bits, AWQ_PLACES),
        "qzeros": words(zeros.T, bits, AWQ_PLACES),
        "scales": torch.from_numpy(scales.T.copy()),
    }
    return stored, (codes - spread(zeros, group)) * spread(scales, group)


def mlx(shape: tuple[int, int], bits: int, seed: int) -> Made:
    codes, offsets, scales = numbers(shape, bits, seed)
    group, biases = np.arange(shape[1]) // GROUP, (offsets / 64).astype(np.float16)
    stored = {"weight": words(codes, bits).view(torch.uint32), "scales": torch.from_numpy(scales),
              "biases": torch.from_numpy(biases)}  # fmt: skip
    return stored, codes * spread(scales, group) + spread(biases, group)


def compressed(shape: tuple[int, int], bits: int, seed: int) -> Made:
    codes, _, scales = numbers(shape, bits, seed)
    group = np.arange(shape[1]) // GROUP
    stored = {"weight_packed": words(codes, bits), "weight_scale": torch.from_numpy(scales),
              "weight_shape": torch.tensor(shape)}  # fmt: skip
    return stored, (codes - 2 ** (bits - 1)) * spread(scales, group)


def eight(shape: tuple[int, int], bits: int, seed: int) -> Made:
    """FP8 with a scale a row."""
    random = np.random.default_rng(seed)
    codes = torch.from_numpy(random.standard_normal(shape)).to(torch.float8_e4m3fn)
    scales = random.random((shape[0], 1)).astype(np.float32)
    return {"weight": codes, "weight_scale": torch.from_numpy(scales)}, codes.double().numpy() * scales


def blocks(shape: tuple[int, int], bits: int, seed: int) -> Made:
    """FP8 with a scale for each block of 48 x 32, which does not divide every matrix."""
    random = np.random.default_rng(seed)
    codes = torch.from_numpy(random.standard_normal(shape)).to(torch.float8_e4m3fn)
    scales = random.random((-(-shape[0] // 48), -(-shape[1] // 32))).astype(np.float32)
    dense = codes.double().numpy().copy()
    for row in range(shape[0]):
        for column in range(shape[1]):
            dense[row, column] *= scales[row // 48, column // 32]
    return {"weight": codes, "weight_scale_inv": torch.from_numpy(scales)}, dense


GROUPS = {"group_0": {"weights": {"num_bits": 4, "group_size": GROUP, "symmetric": True}}}
PACKED: dict[str, tuple[Callable[..., Made], dict[str, Any], dict[str, Any]]] = {
    "GPTQ": (gptq, {}, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "GPTQ, 8 bits": (gptq, {"bits": 8}, {"quant_method": "gptq", "bits": 8, "group_size": GROUP}),
    "GPTQ, 2 bits": (gptq, {"bits": 2}, {"quant_method": "gptq", "bits": 2, "group_size": GROUP}),
    "GPTQ, act-order": (gptq, {"ordered": True}, {"quant_method": "gptq", "bits": 4, "desc_act": True}),
    "GPTQ, version 2": (gptq, {"version": 2},
                        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2", "group_size": GROUP}),
    "AWQ": (awq, {}, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "MLX": (mlx, {}, {"group_size": GROUP, "bits": 4}),
    "MLX, 8 bits": (mlx, {"bits": 8}, {"group_size": GROUP, "bits": 8}),
    "compressed-tensors": (compressed, {}, {"quant_method": "compressed-tensors", "config_groups": GROUPS}),
    "FP8": (eight, {}, {"quant_method": "compressed-tensors", "format": "float-quantized",
                        "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}}),
    "FP8, blocks": (blocks, {}, {"quant_method": "fp8", "weight_block_size": [48, 32]}),
}  # fmt: skip


def pack(base: Path, out: Path, name: str) -> Any:
    """A folder whose linears are packed; the model with the numbers that were meant, in fp32."""
    make, how, settings = PACKED[name]
    model, tensors = model_of(base), {}
    for at, (key, tensor) in enumerate(tensors_of(base).items()):
        if "_proj" not in key:
            tensors[key] = tensor
            continue
        stored, dense = make(tuple(tensor.shape), **({"bits": 4} | how), seed=at)
        tensors |= {key.removesuffix("weight") + role: value for role, value in stored.items()}
        model.get_parameter(key).data = torch.from_numpy(dense).float()
    copied(base, out, "model.safetensors")
    save_file(tensors, out / "model.safetensors", {"format": "mlx" if make is mlx else "pt"})
    config = json.loads((out / "config.json").read_text()) | {
        "quantization" if make is mlx else "quantization_config": settings
    }
    (out / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_folder_becomes_the_model_that_was_meant(name: str, checkpoint_folder: Path, tmp_path: Path) -> None:
    meant = pack(checkpoint_folder, tmp_path / "packed", name)
    found = diagnose(tmp_path / "packed")
    assert found.verdict == "repairable" and found.reason.startswith("14 weights are packed by "), found
    made = doctoring.repair(tmp_path / "packed", tmp_path / "out")
    model = load_plain(tmp_path / "out")
    for key, parameter in meant.named_parameters():
        assert torch.equal(model.get_parameter(key), parameter), key
    assert not made.exact and made.dtype == "float32"
    assert (
        not {"quantization", "quantization_config"} & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    )


@pytest.mark.parametrize("change", [{"bits": 3}, {"checkpoint_format": "marlin"}, {"quant_method": "hqq"}])
def test_what_is_packed_in_another_way_is_refused(
    change: dict[str, Any], checkpoint_folder: Path, tmp_path: Path
) -> None:
    pack(checkpoint_folder, tmp_path / "packed", "GPTQ")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    assert diagnose(tmp_path / "packed").verdict == "not usable"


def test_settings_of_one_that_is_not_packed_are_left_out(checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = copied(checkpoint_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert diagnose(folder).reason == "config.json says that the weights are quantised, and none of them is"
    assert doctoring.repair(folder, tmp_path / "out").exact


# referees: what others make of the same bytes


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_as_the_runtime_builder_unpacks(kind: str) -> None:
    from onnxruntime_genai.models.loaders.awq import AWQModel
    from onnxruntime_genai.models.loaders.gptq import GPTQModel

    make, loader = (gptq, GPTQModel) if kind == "gptq" else (awq, AWQModel)
    stored, _ = make((64, 96), 4, 3)
    module = SimpleNamespace(bits=4, group_size=GROUP, in_features=96, out_features=64, g_idx=None, **{
        name: tensor.clone() for name, tensor in stored.items() if name != "g_idx"})  # fmt: skip
    module.scales = module.scales.float()
    referee = object.__new__(loader)
    if kind == "gptq":
        referee.handle_qzeros(module)
    loader.unpack_qzeros(referee, module)
    loader.unpack_qweight(referee, module)
    referee.dequant_weight(module)
    ours = unpack.UNPACK[kind](stored, {"bits": 4})
    torch.testing.assert_close(ours, module.qweight.float(), rtol=0, atol=1e-3)  # it rounds a product to fp16


def test_as_transformers_unpacks_blocks() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    stored, _ = blocks((96, 64), 8, 5)
    theirs = Fp8Dequantize(None)._dequantize_one(stored["weight"], stored["weight_scale_inv"], torch.float32)
    assert torch.equal(unpack.blocks(stored, {"weight_block_size": [48, 32]}), theirs)


def test_a_code_in_the_wrong_place_would_be_found() -> None:
    stored, dense = awq((32, 64), 4, 7)
    right = unpack.awq(stored, {"bits": 4}).double().numpy()
    assert (right == dense).all()
    swapped = stored | {"qweight": stored["qweight"].roll(4)}
    assert (unpack.awq(swapped, {"bits": 4}).double().numpy() != dense).any()
