"""The codes of a target's quantiser, one for one, without its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_bundle import bundle, checkpoint, reference, some_ids, workplace

from edgeft.build import ArtifactModel, build_bundle
from edgeft.checkpoint import Checkpoint, load_plain
from edgeft.errors import BadInput
from edgeft.rounding import Rule, promoted_modules, round_, round_model, rounded, rule_of
from edgeft.target import load_target


def awkward(rows: int, columns: int) -> torch.Tensor:
    """Weights with every kind of block: of one sign, constant, zero, tiny, with an outlier, with exact halves."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    weight[0], weight[1], weight[2], weight[3] = weight[0].abs(), -weight[1].abs(), 0.0, 0.25
    weight[4] *= 1e-30
    weight[5, ::32] = 40.0
    weight[6] = torch.arange(columns) % 16 - 7.5
    weight[7] = (torch.arange(columns) % 31) / 2.0
    return weight


def by_onnxruntime(weight: torch.Tensor, rule: Rule) -> tuple[Any, Any, Any]:
    """(codes, scale, zero point) by ONNX Runtime's own quantisers."""
    from onnxruntime.capi import _pybind_state as kernels
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantizer as Default
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor

    rows, columns = weight.shape
    count = -(-columns // rule.block_size)
    padded = np.zeros((rows, count * rule.block_size), dtype=np.float32)
    padded[:, :columns] = weight.numpy()
    if rule.method == "rtn":
        scheme = "sym" if rule.symmetric else "asym"
        codes, scale, zero = quant_tensor(padded, rule.bits, rule.block_size, scheme, "uint", 1)
    elif rule.method == "gather":
        slices = padded.reshape(rows * count, rule.block_size)
        codes, scale, zero = Default.quant_slice_asymmetric(slices)
    else:
        each = 8 // rule.bits
        codes = np.zeros((rows, count, rule.block_size // each), dtype=np.uint8)
        zero = np.zeros((rows, -(-count // each)), dtype=np.uint8)
        scale = np.zeros((rows, count), dtype=np.float32)
        kernel = kernels.quantize_matmul_4bits if rule.bits == 4 else kernels.quantize_matmul_8bits
        kernel(codes, np.ascontiguousarray(padded.T), scale, zero, rule.block_size, rows, columns, rule.symmetric)
        codes, zero = unpacked(codes, rule.bits), unpacked(zero, rule.bits)[:, :count]
        if rule.symmetric:
            zero = np.full((rows, count), 2 ** (rule.bits - 1))
    return codes.reshape(rows, -1)[:, :columns], scale.reshape(rows, count), zero.reshape(rows, count)


def unpacked(packed: Any, bits: int) -> Any:
    rows = packed.shape[0]
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1) if bits == 4 else packed.reshape(rows, -1)


RULES = [
    Rule(bits, size, symmetric, method)  # type: ignore[arg-type]
    for method in ("rtn", "mlas")
    for bits in (4, 8)
    for size in (32, 128)
    for symmetric in (False, True)
] + [Rule(4, 32, False, "gather")]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("columns", [256, 160])
def test_codes_are_those_of_onnxruntime(rule: Rule, columns: int) -> None:
    weight = awkward(16, columns)
    codes, scale, zero = by_onnxruntime(weight, rule)
    mine = rounded(weight, rule)
    np.testing.assert_array_equal(mine.scale.numpy(), scale.astype(np.float32))
    np.testing.assert_array_equal(mine.zero.numpy(), zero.astype(np.float32))
    np.testing.assert_array_equal(mine.codes.numpy(), codes.astype(np.float32))
    expected = (codes - np.repeat(zero, rule.block_size, axis=1)[:, :columns].astype(np.float32)) * np.repeat(
        scale.astype(np.float32), rule.block_size, axis=1
    )[:, :columns]
    np.testing.assert_allclose(mine.weight().numpy(), expected.astype(np.float32), rtol=1e-6, atol=0)
    assert torch.equal(round_(weight.clone(), rule), mine.weight())


def graph_weights(folder: Path) -> dict[str, Any]:
    import onnx

    graph = onnx.load(str(folder / "model.onnx")).graph
    return {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type in (1, 2)}


def compare_codes(folder: Path, source: Path, target_name: str, tied: bool) -> int:
    """Every matrix product of a built bundle against the rules; how many there were."""
    stored, weights, target = graph_weights(folder), Checkpoint(source), load_target(target_name)
    seen = 0
    for name in weights.owner:
        rule = rule_of(name, weights.shape(name), target, tied)
        if rule is None or rule.method == "gather" or "k_proj" in name or "v_proj" in name:
            continue
        weight = weights.read(name)
        if "q_proj" in name:  # the builder joins the three
            weight = torch.cat([weights.read(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")])
        stem = name.replace("self_attn.q_proj", "attn.qkv_proj").replace("self_attn", "attn").removesuffix(".weight")
        stem = ("lm_head" if "embed" in name else stem) + ".MatMul.weight_"
        codes = next(value for key, value in stored.items() if key.startswith(stem + "Q"))
        scale = next(value for key, value in stored.items() if key.startswith(stem + "scale"))
        zero = next(value for key, value in stored.items() if key.startswith((stem + "zp", stem + "zero")))
        mine = rounded(weight, rule)
        np.testing.assert_array_equal(mine.codes.numpy(), unpacked(codes, rule.bits)[:, : weight.shape[1]])
        np.testing.assert_array_equal(mine.scale.numpy(), scale.reshape(mine.scale.shape))
        np.testing.assert_array_equal(mine.zero.numpy(), unpacked(zero, rule.bits)[:, : mine.zero.shape[1]])
        seen += 1
    return seen


def test_a_bundle_holds_these_codes_and_gives_these_logits() -> None:
    """What is left between rounded model and artifact are its 8-bit activations: a ninth of what rounding does."""
    assert compare_codes(bundle("ort-int4"), checkpoint(), "ort-int4", True) == 2 * 5 + 1
    model = load_plain(checkpoint())
    assert round_model(model, load_target("ort-int4")) == 2 * 7 + 1
    ids = some_ids(120)
    with torch.no_grad():
        mine = model(torch.tensor([ids])).logits[0]
        exact = reference()(torch.tensor([ids])).logits[0]
    theirs = torch.tensor(ArtifactModel(bundle("ort-int4")).logits(ids))
    assert (mine - theirs).square().mean().sqrt() < 0.15 * (exact - theirs).square().mean().sqrt()
    log_mine, log_exact, log_theirs = (torch.log_softmax(form, dim=-1) for form in (mine, exact, theirs))
    kl = [float((form.exp() * (form - log_theirs)).sum(-1).mean()) for form in (log_mine, log_exact)]
    assert kl[0] < 0.03 * kl[1]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["ort-int4", "ort-int8"])
def test_every_target_with_exact_activations(name: str, tied: bool) -> None:
    """With fp32 activations the artifact's logits are the rounded model's but for the order of sums."""
    target = load_target(name).model_copy(update={"accuracy_level": 0})
    out, source = workplace() / f"exact {name} {tied}", checkpoint() if tied else checkpoint(tied=False)
    build_bundle(source, target, out, prompts=[], measure=False)
    assert compare_codes(out, source, name, tied) == 2 * 5 + 1
    model = load_plain(source)
    round_model(model, target)
    ids = some_ids(120)
    with torch.no_grad():
        mine = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(torch.tensor(ArtifactModel(out).logits(ids)), mine, rtol=1e-4, atol=1e-3)


def test_which_tensors_are_rounded() -> None:
    int4, int8, fp32 = load_target("ort-int4"), load_target("ort-int8"), load_target("ort-fp32")
    embedding, head, layer, norm = (
        ("model.embed_tokens.weight", (96, 32)), ("lm_head.weight", (96, 32)),
        ("model.layers.0.mlp.up_proj.weight", (48, 32)), ("model.norm.weight", (32,)),
    )  # fmt: skip

    def bits(name: str, shape: tuple[int, ...], target: Any, tied: bool) -> tuple[int, str] | None:
        rule = rule_of(name, shape, target, tied)
        return (rule.bits, rule.method) if rule else None

    assert [bits(*t, int4, True) for t in (embedding, layer, norm)] == [(8, "rtn"), (4, "rtn"), None]
    assert [bits(*t, int4, False) for t in (embedding, head, layer)] == [(4, "gather"), (8, "mlas"), (4, "mlas")]
    assert [bits(*t, int8, False) for t in (embedding, head, layer)] == [None, (8, "rtn"), (8, "rtn")]
    assert [bits(*t, fp32, False) for t in (embedding, head, layer)] == [None, None, None]
    assert bits("transformer.wpe.weight", (64, 32), int4, True) is None


def test_promoted_modules_of_a_mixed_target_get_eight_bits() -> None:
    """The codes of a built bundle of the mix, and the bits that its graph gives each product."""
    target, weights = load_target("ort-int4-mixed"), Checkpoint(checkpoint())
    eight = promoted_modules(list(weights.owner), target)
    assert eight == {f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.v_proj", "mlp.down_proj")}
    assert promoted_modules(list(weights.owner), load_target("ort-int4")) == set()
    stored = graph_weights(bundle("ort-int4-mixed"))
    for name in weights.owner:
        rule = rule_of(name, weights.shape(name), target, True, eight)
        if rule is None or "embed" in name:
            continue
        assert rule.bits == (8 if name.removesuffix(".weight") in eight else 4)
        stem = name.replace("self_attn", "attn").removesuffix(".weight") + ".MatMul.weight_Q"
        codes = next(value for key, value in stored.items() if key.startswith(stem))
        mine = rounded(weights.read(name), rule).codes.numpy()
        np.testing.assert_array_equal(mine, unpacked(codes, rule.bits)[:, : mine.shape[1]])
    with pytest.raises(BadInput, match="target ort-int4-mixed: rounds in a way that is not computed here"):
        rule_of("model.layers.0.mlp.down_proj.weight", (64, 128), target, True)
