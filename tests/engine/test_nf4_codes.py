"""Codes made on a device tensor by tensor are bit for bit those that transformers and bitsandbytes make on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_model

from edgeft.engine import nf4_base, nf4_codes
from edgeft.models.checkpoint import Checkpoint
from edgeft.progress import silent

pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")


def adversarial(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What may round otherwise elsewhere: values half way between codes, zeros, outliers, denormals, odd sizes."""
    draw = torch.Generator().manual_seed(0)
    middle = nf4_codes.midpoints()
    near = torch.cat([middle, *(torch.nextafter(middle, torch.tensor(end)) for end in (-2.0, 2.0)), torch.ones(19)])
    outliers = torch.randn(64, 64, generator=draw)
    outliers[::7, 3] *= 1e6
    tiny = torch.finfo(dtype).smallest_normal
    every_other = torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None]
    found = {
        "normal": torch.randn(192, 130, generator=draw),
        "half way": near.repeat(8, 1) * torch.logspace(-6, 6, 8)[:, None],
        "zeros": torch.zeros(2, 64),
        "some zeros": torch.randn(4, 64, generator=draw) * every_other,
        "outliers": outliers,
        "denormals": torch.randn(8, 64, generator=draw) * tiny / 16,
        "tiny": torch.randn(8, 64, generator=draw) * 1e-38,
        "odd": torch.randn(7, 33, generator=draw),
        "large": torch.randn(8, 64, generator=draw) * torch.finfo(dtype).max / 8,
        "equal": torch.full((4, 64), 0.7),
    }
    return {name: value.to(dtype) for name, value in found.items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_made_on_a_gpu_are_those_made_on_a_cpu(dtype: torch.dtype) -> None:
    cuda = torch.device("cuda")
    large = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(1)).to(dtype)
    wrong = {}
    for name, weight in {**adversarial(dtype), "a whole matrix": large}.items():
        here, scales = nf4_codes.nf4_codes(weight, CPU)
        there, other = nf4_codes.nf4_codes(weight, cuda)
        differ = int((here != there).sum()), int((scales != other).sum())
        if any(differ):
            wrong[name] = differ
    print("codes, scales that differ:", wrong)
    assert not wrong


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_how_far_the_kernels_of_bitsandbytes_are_from_a_cpu() -> None:
    """Why the codes are not left to them: values half way between two codes, and the smallest, get others there."""
    from bitsandbytes import functional

    library: Any = functional
    found = {}
    for name, weight in adversarial(torch.float32).items():
        here, state = library.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        there, other = library.quantize_4bit(weight.cuda(), blocksize=64, quant_type="nf4")
        found[name] = int((here != there.cpu()).sum()), int((state.absmax != other.absmax.cpu()).sum())
    print("bitsandbytes, codes and scales that differ:", found)
    assert found["normal"] == found["outliers"] == (0, 0)
    assert found["half way"][0] and found["denormals"][0], "leave the codes to them"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_files_made_on_a_gpu_are_those_of_transformers_on_a_cpu(tmp_path: Path) -> None:
    base = Path(save_model(tmp_path / "base", "llama", hidden_size=256, vocab_size=1024).model)
    nf4_base.quantise(base, tmp_path / "theirs")
    assert nf4_codes.quantise_on(base, tmp_path / "ours", torch.device("cuda"), silent)
    theirs, ours = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_bitsandbytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    library: Any = functional
    for at_once in (nf4_codes.AT_ONCE, 128):  # in parts as well
        monkeypatch.setattr(nf4_codes, "AT_ONCE", at_once)
        for name, weight in adversarial(dtype).items():
            codes, state = library.quantize_4bit(weight, blocksize=64, quant_type="nf4")
            ours, scales = nf4_codes.nf4_codes(weight, CPU)
            assert torch.equal(codes, ours), name
            assert torch.equal(state.absmax, scales), name


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = Checkpoint(folder, packed=True)
    return {name: files.read(name) for name in files.owner}


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "dtype": "bfloat16"}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("qwen2", {}),
        ("gemma3_text", {}),
    ],
)
def test_files_are_those_of_transformers(
    kind: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = save_model(tmp_path / "base", kind, **changes)
    base = Path(spec.model)
    nf4_base.quantise(base, tmp_path / "theirs")
    monkeypatch.setattr(nf4_codes, "NF4_FILE_BYTES", 4096)
    seen: list[tuple[int, int]] = []
    assert nf4_codes.quantise_on(base, tmp_path / "ours", CPU, lambda _, done, total, __: seen.append((done, total)))
    theirs, ours = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert ours.keys() == theirs.keys() and any(tensor.dtype == torch.uint8 for tensor in ours.values())
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("theirs", "ours")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert seen[-1][0] == seen[-1][1] > 1


def test_a_model_that_is_put_together_from_its_files_is_left_to_transformers(tmp_path: Path) -> None:
    base = Path(save_model(tmp_path / "base", "mixtral", num_local_experts=2, num_experts_per_tok=1).model)
    assert not nf4_codes.quantise_on(base, tmp_path / "ours", CPU, silent)
    assert not (tmp_path / "ours").exists()


def test_a_planted_fault_in_rounding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of a middle moved by one step of fp32 are others: the comparison above can fail."""
    moved = torch.nextafter(nf4_codes.midpoints(), torch.tensor(2.0))
    right = [nf4_codes.nf4_codes(weight, CPU)[0] for weight in adversarial(torch.float32).values()]
    monkeypatch.setattr(nf4_codes, "midpoints", lambda: moved)
    wrong = [nf4_codes.nf4_codes(weight, CPU)[0] for weight in adversarial(torch.float32).values()]
    assert not all(map(torch.equal, right, wrong))
