"""What rounding leaves of a change: against ONNX Runtime's own quantisers, a closed form, and cases known by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_models import base_model, shaken
from runtimes import by_onnxruntime
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from edgeft.cli import app
from edgeft.errors import BadInput, MissingExtra
from edgeft.merging.survival import Survival, layer_of, survival
from edgeft.models import headers
from edgeft.models.checkpoint import Checkpoint, load_plain
from edgeft.reporting.sweep_charts import plot_survival
from edgeft.targets.rounding import grid_of
from edgeft.targets.target import load_target

INT4, INT8, FP32 = (load_target(f"ort-{name}") for name in ("int4", "int8", "fp32"))


def tuned(base: Path, out: Path, by: float, fits: Any = lambda name: True) -> Path:
    model = load_plain(base)
    shaken(model, fits, by=by)
    model.save_pretrained(out)
    (out / "merged.json").write_text(json.dumps({"base": str(base)}))
    return out


def dequantised(weight: torch.Tensor, grid: Any) -> Any:
    codes, scale, zero = by_onnxruntime(weight, grid)
    wide = np.repeat(zero, grid.block_size, axis=1)[:, : weight.shape[1]].astype(np.float64)
    return (codes - wide) * np.repeat(scale.astype(np.float32), grid.block_size, axis=1)[:, : weight.shape[1]], codes


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_against_onnxruntime_on_whole_tensors(
    kind: str,
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merged = tuned(bases[kind], tmp_path / "merged", 0.02, lambda name: "layers.0.input" not in name)
    monkeypatch.setattr(headers, "BLOCK_BYTES", 4 * 32 * 7)  # seven rows at a time
    found = survival(merged, INT4)
    before, after = Checkpoint(bases[kind]), Checkpoint(merged)
    assert {tensor.name for tensor in found.tensors} == {n for n in after.owner if "layers.0.input" not in n}
    assert found.unchanged_tensors == 1 and found.base == str(bases[kind])
    for tensor in found.tensors:
        old, new = before.read(tensor.name), after.read(tensor.name)
        d = (new - old).double().numpy()
        grid = grid_of(tensor.name, tuple(new.shape), INT4, kind == "tied")
        if grid is None:
            assert (tensor.bits, tensor.projection, tensor.cosine, tensor.noise) == pytest.approx((32, 1, 1, 0))
            continue
        (base_values, base_codes), (new_values, new_codes) = dequantised(old, grid), dequantised(new, grid)
        dq = new_values - base_values
        assert tensor.bits == grid.bits and tensor.parameters == d.size
        assert tensor.codes_changed == np.mean(base_codes != new_codes)
        assert tensor.projection == pytest.approx((dq * d).sum() / (d * d).sum(), rel=1e-5)
        assert tensor.cosine == pytest.approx((dq * d).sum() / np.sqrt((d * d).sum() * (dq * dq).sum()), rel=1e-5)
        assert tensor.noise == pytest.approx(np.sqrt(((dq - d) ** 2).sum() / (d * d).sum()), rel=1e-4)
        assert tensor.delta_rms == pytest.approx(np.sqrt((d * d).mean()), rel=1e-6)
    one = next(layer for layer in found.layers if layer.layer == 1)
    mine = [t for t in found.tensors if t.layer == 1 and t.bits != 32]
    assert one.tensors == len(mine) == 7 and one.parameters == sum(t.parameters for t in mine)
    energy = [t.delta_rms**2 * t.parameters for t in mine]
    expected = sum(t.projection * e for t, e in zip(mine, energy, strict=True)) / sum(energy)
    assert one.projection == pytest.approx(expected, rel=1e-6)
    worst = [next(t for t in found.tensors if t.name == name) for name in found.promote]
    assert all(t.bits == 4 for t in worst) and [t.cosine for t in worst] == sorted(t.cosine for t in worst)


def test_the_noise_of_independent_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two uniform errors of variance step^2 / 12: noise = step / (sqrt(6) |d|), cosine = 1 / sqrt(1 + noise^2)."""
    monkeypatch.setattr(
        "edgeft.models.spec.check_weights", lambda folder, spec: None
    )  # one tensor stands for a model's
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "base").mkdir()
    (tmp_path / "merged").mkdir()
    model = base_model("llama")
    for name in ("base", "merged"):
        model.save_pretrained(tmp_path / name)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = torch.rand(512, 256, generator=generator) * 2 - 1
    for size in (0.05, 0.3, 1.0):
        # a change that leaves the ends of each block, and so its codes' grid, where they are
        delta = size * (2 / 15) * torch.randn(weight.shape, generator=generator)
        inner = weight * 0.4
        inner[:, ::32], inner[:, 1::32] = 1.0, -1.0
        delta[:, ::32] = delta[:, 1::32] = 0.0
        save_file({name: inner}, tmp_path / "base" / "model.safetensors")
        save_file({name: (inner + delta).clamp(-1, 1)}, tmp_path / "merged" / "model.safetensors")
        (tensor,) = survival(tmp_path / "merged", INT4, base=str(tmp_path / "base")).tensors
        assert tensor.step_rms == pytest.approx(2 / 15, rel=1e-3)
        assert tensor.projection == pytest.approx(1.0, abs=0.03)
        if size == 1.0:  # large enough for the two errors to be independent
            noise = tensor.step_rms * math.sqrt(30 / 32) / (math.sqrt(6) * tensor.delta_rms)
            assert tensor.noise == pytest.approx(noise, rel=0.05)
            assert tensor.cosine == pytest.approx(1 / math.sqrt(1 + noise**2), rel=0.02)


def test_more_bits_keep_more(bases: dict[str, Path], tmp_path: Path) -> None:
    merged = tuned(bases["llama"], tmp_path / "merged", 0.02)
    four, eight, exact = (survival(merged, target) for target in (INT4, INT8, FP32))
    assert 0.2 < four.cosine < 0.95 < 0.99 < eight.cosine < 1.0
    assert all(t.cosine == pytest.approx(1.0) and t.bits == 32 for t in exact.tensors)
    assert exact.layers == exact.promote == eight.promote == ()
    mixed = survival(merged, load_target("ort-int4-mixed"))  # each tensor as with its own bits throughout
    assert {t.bits for t in mixed.tensors} >= {4, 8} and four.cosine < mixed.cosine < eight.cosine
    with_four = {t.name: t for t in four.tensors}
    assert all(t == with_four[t.name] if t.bits == 4 else t.cosine > 0.99 for t in mixed.tensors)
    larger = survival(tuned(bases["llama"], tmp_path / "larger", 0.2), INT4)
    assert larger.cosine > four.cosine
    nothing = survival(tuned(bases["llama"], tmp_path / "nothing", 0.0), INT4)
    assert nothing.tensors == () and nothing.unchanged_tensors > 20


def test_verb_plot_and_messages(bases: dict[str, Path], tmp_path: Path) -> None:
    merged = tuned(bases["tied"], tmp_path / "merged", 0.05)
    arguments = ["survival", str(merged), "--plot", str(tmp_path / "a.svg")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "first to promote to 8 bits" in done.output and "model.layers." in done.output
    found = Survival.read(tmp_path / "survival.json")
    plot_survival(found, tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes() and b"<svg" in drawn and b"down_proj" in drawn
    with pytest.raises(BadInput, match=r"merged\.json: does not say which base was merged into"):
        survival(bases["llama"], INT4)
    with pytest.raises(BadInput, match=r"is not in the base .*, or of another shape\n\nhint: give its own --base"):
        survival(merged, INT4, base=str(bases["gpt2"]))


def test_a_plot_without_matplotlib_says_what_to_install(
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = survival(tuned(bases["tied"], tmp_path / "merged", 0.05), INT4)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"matplotlib: is not installed\n\nhint: pip install .*\[report\]") as caught:
        plot_survival(found, tmp_path / "a.svg")
    assert caught.value.exit_code == 5 and not (tmp_path / "a.svg").exists()


def test_an_untied_head_is_compared_with_the_embedding_it_was(bases: dict[str, Path], tmp_path: Path) -> None:
    merged = tuned(bases["tied"], tmp_path / "merged", 0.05, lambda name: "layers" in name)
    tensors = load_file(merged / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.1
    save_file(tensors, merged / "model.safetensors")
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    head = next(t for t in survival(merged, INT4).tensors if t.name == "lm_head.weight")
    assert head.layer is None and head.bits == 8 and head.delta_rms == pytest.approx(0.1, rel=1e-4)


def test_layer_of() -> None:
    assert [layer_of(n) for n in ("model.layers.11.x", "h.3.attn.c_attn.weight", "lm_head.weight")] == [11, 3, None]
