"""Is a model that starts from its lower layers' outputs the whole one, bit for bit, and do their weights really go?"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_model

from edgeft.data.samples import Sample
from edgeft.engine.loop import recompute_layers
from edgeft.machines import meter
from edgeft.models.boundary import Boundary, release_pages
from edgeft.models.checkpoint import load_plain
from edgeft.models.evaluate import token_losses
from edgeft.models.parts import find_parts

CPU = torch.device("cpu")
CUT = 2
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "gemma2": {}, "gemma3_text": {"sliding_window": 4}, "phi3": {}, "granite": {},
    "mistral": {"sliding_window": 4}, "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}, "gpt_neox": {"max_position_embeddings": 64},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}, "bloom": {"n_head": 4},
}  # fmt: skip
SAMPLES = [Sample([5, 7, 9, 11, 13, 15, 17, 19], [-100] * 3 + [11, 13, 15, 17, 19], 3), Sample([3, 4, 6], [3, 4, 6], 0)]


def build(folder: Path, kind: str, **changes: Any) -> tuple[Any, Any]:
    save_model(folder, kind, **{"num_hidden_layers": 4, **FAMILIES.get(kind, {}), **changes})
    model = load_plain(folder)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, find_parts(model)


def step(model: Any, parts: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of a batch, and the gradients of the layers above the boundary."""
    trained = [parameter for layer in list(parts.layers)[CUT:] for parameter in layer.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
        parameter.grad = None
    loss = token_losses(model, parts, SAMPLES, CPU, torch.float32, 16)
    loss.backward()
    return loss.detach(), [p.grad for p in trained if p.grad is not None]


def ids_of(samples: list[Sample]) -> torch.Tensor:
    from edgeft.data.batches import make_batch

    return make_batch(samples).ids


@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    """Of states that the same batch gave; without the weights below, which then read as no number."""
    model, parts = build(tmp_path, kind)
    loss, gradients = step(model, parts)
    boundary = Boundary(parts, CUT)
    states = boundary.reach(ids_of(SAMPLES))
    above = boundary.above(parts, lambda samples: states)
    boundary.drop(model, release_pages)
    found, again = step(model, above)
    assert torch.equal(found, loss) and len(again) == len(gradients) > 4
    assert all(torch.equal(one, other) for one, other in zip(again, gradients, strict=True))
    assert all(w.module.get_parameter(w.key).isnan().all() for w in boundary.dropped)
    with contextlib.suppress(RuntimeError):  # some products refuse what takes no memory
        assert not step(model, parts)[0].isfinite()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_recomputed_layers_start_there_too(kind: str, tmp_path: Path) -> None:
    model, parts = build(tmp_path, kind)
    loss, gradients = step(model, parts)
    boundary = Boundary(parts, CUT)
    states = boundary.reach(ids_of(SAMPLES))
    recompute_layers(parts)
    found, again = step(model, boundary.above(parts, lambda samples: states))
    assert torch.equal(found, loss)
    assert all(torch.equal(one, other) for one, other in zip(again, gradients, strict=True))


def test_states_of_another_layer_are_another_model(tmp_path: Path) -> None:
    model, parts = build(tmp_path, "llama")
    loss, _ = step(model, parts)
    states = Boundary(parts, CUT - 1).reach(ids_of(SAMPLES))
    assert abs(float(step(model, Boundary(parts, CUT).above(parts, lambda _: states))[0] - loss)) > 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_stays_and_an_embedding_goes(tied: bool, tmp_path: Path) -> None:
    model, parts = build(tmp_path, "llama", tie_word_embeddings=tied)
    boundary = Boundary(parts, CUT)
    before = sum(p.untyped_storage().nbytes() for p in set(model.parameters()))
    boundary.drop(model)
    below = sum(p.numel() for layer in list(parts.layers)[:CUT] for p in layer.parameters())
    below += 0 if tied else 512 * 64
    freed = before - sum(p.untyped_storage().nbytes() for p in set(model.parameters()))
    assert freed == 4 * below - 4 * len(boundary.dropped)  # each leaves one number
    assert {weight.name for weight in boundary.dropped} >= {"model.layers.0.mlp.up_proj.weight"}
    assert ("model.embed_tokens.weight" in {weight.name for weight in boundary.dropped}) is not tied
    assert all(bool(p.isfinite().all()) for p in parts.head.parameters())


def test_a_weight_that_an_upper_layer_shares_stays(tmp_path: Path) -> None:
    model, parts = build(tmp_path, "llama")
    parts.layers[3].mlp.up_proj.weight = parts.layers[0].mlp.up_proj.weight
    Boundary(parts, CUT).drop(model, release_pages)
    assert bool(parts.layers[3].mlp.up_proj.weight.isfinite().all())
    assert parts.layers[0].mlp.down_proj.weight.isnan().all()


def test_pages_of_a_file_leave_memory_while_its_other_weights_are_in_use(tmp_path: Path) -> None:
    """transformers maps an fp32 file: what is let go of would stay resident as long as the rest is used."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 2048}
    model, parts = build(tmp_path, "llama", **sizes)
    boundary = Boundary(parts, CUT)
    boundary.reach(ids_of(SAMPLES))
    total = sum(float(p.sum()) for p in model.parameters())  # every page is there
    size = 4 * sum(p.numel() for layer in boundary.lower for p in layer.parameters())
    upper = parts.layers[3].mlp.up_proj.weight
    kept, before = float(upper.sum()), meter.rss_bytes()
    boundary.drop(model, release_pages)
    assert before - meter.rss_bytes() > 0.9 * size and total == total
    assert float(upper.sum()) == kept
