"""Which grid each tensor of a bundle is on, and that the bundle holds its codes and computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import bundle, checkpoint, reference, some_ids, workplace
from runtimes import graph_weights, unpacked

from edgeft.errors import BadInput
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.build import build_bundle
from edgeft.models.checkpoint import Checkpoint, load_plain
from edgeft.targets.rounding import grid_of, promoted_modules, round_model
from edgeft.targets.target import load_target


def compare_codes(folder: Path, source: Path, target_name: str, tied: bool) -> int:
    """Every matrix product of a built bundle against the grids; how many there were."""
    stored, weights, target = graph_weights(folder), Checkpoint(source), load_target(target_name)
    seen = 0
    for name in weights.owner:
        grid = grid_of(name, weights.shape(name), target, tied)
        if grid is None or grid.method == "gather" or "k_proj" in name or "v_proj" in name:
            continue
        weight = weights.read(name)
        if "q_proj" in name:  # the builder joins the three
            weight = torch.cat([weights.read(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")])
        stem = name.replace("self_attn.q_proj", "attn.qkv_proj").replace("self_attn", "attn").removesuffix(".weight")
        stem = ("lm_head" if "embed" in name else stem) + ".MatMul.weight_"
        codes = next(value for key, value in stored.items() if key.startswith(stem + "Q"))
        scale = next(value for key, value in stored.items() if key.startswith(stem + "scale"))
        zero = next(value for key, value in stored.items() if key.startswith((stem + "zp", stem + "zero")))
        mine = grid.encode(weight)
        np.testing.assert_array_equal(mine.codes.numpy(), unpacked(codes, grid.bits)[:, : weight.shape[1]])
        np.testing.assert_array_equal(mine.scale.numpy(), scale.reshape(mine.scale.shape))
        np.testing.assert_array_equal(mine.zero.numpy(), unpacked(zero, grid.bits)[:, : mine.zero.shape[1]])
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
        grid = grid_of(name, shape, target, tied)
        return (grid.bits, grid.method) if grid else None

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
        grid = grid_of(name, weights.shape(name), target, True, eight)
        if grid is None or "embed" in name:
            continue
        assert grid.bits == (8 if name.removesuffix(".weight") in eight else 4)
        stem = name.replace("self_attn", "attn").removesuffix(".weight") + ".MatMul.weight_Q"
        codes = next(value for key, value in stored.items() if key.startswith(stem))
        mine = grid.encode(weights.read(name)).codes.numpy()
        np.testing.assert_array_equal(mine, unpacked(codes, grid.bits)[:, : mine.shape[1]])
    with pytest.raises(BadInput, match="target ort-int4-mixed: rounds in a way that is not computed here"):
        grid_of("model.layers.0.mlp.down_proj.weight", (64, 128), target, True)
