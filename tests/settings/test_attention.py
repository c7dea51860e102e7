"""One rule says which attention kernel a plan runs; no plan of a GPU is left to the math one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HALF, plan_of, save_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from edgeft.memory import train_step
from edgeft.models.checkpoint import load_plain
from edgeft.models.parts import cap_scores
from edgeft.settings.attention import attention_kernel, repeats_groups
from edgeft.settings.job import Training
from edgeft.simulation import fake
from edgeft.simulation.simulate import simulate

FP16 = {"base_precision": "fp16", "compute_dtype": "fp16"}


def of(**changes: Any) -> Training:
    return Training.model_construct(**{"device": "cuda", "compute_dtype": "bf16", **changes})


@pytest.mark.parametrize(("changes", "head", "place", "kernel"), [
    ({}, 64, {}, "flash"), ({}, 256, {}, "flash"), ({}, 320, {}, "efficient"),
    ({}, 64, {"masked": True}, "efficient"), ({}, 256, {"capped": True}, "scores"),
    ({"compute_dtype": "fp16"}, 64, {}, "efficient"), ({"compute_dtype": "fp32"}, 64, {}, "efficient"),
    ({"device": "cpu", "compute_dtype": "fp32"}, 64, {}, "flash"), ({"device": "cpu"}, 64, {"masked": True}, "flash"),
])  # fmt: skip
def test_the_kernel_of_a_layer(changes: dict[str, Any], head: int, place: dict[str, bool], kernel: str) -> None:
    assert attention_kernel(of(**changes), head, **place) == kernel


@pytest.mark.parametrize(("head", "dtypes"), [(16, HALF), (16, FP16), (16, {}), (320, HALF)])
def test_no_step_makes_scores_of_all_pairs(
    head: int, dtypes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own choice of a kernel, simulated, holds what is planned, and more where nobody repeats the heads."""
    spec = save_model(tmp_path / "model", head_dim=head)
    training = plan_of(spec, range(2), device="cuda", max_length=256, max_trained=256, **dtypes)
    work = train_step.Workload(256, 256)
    closed = sum(term.bytes for term in train_step.step_terms(spec, training, work))
    repeated = repeats_groups(training, head)
    assert repeated == (dtypes != HALF or head > 256)
    assert simulate(spec, training, work).live_peak_bytes == pytest.approx(closed, rel=0.03)
    if repeated and head == 16:
        chosen = fake.cuda_attention
        monkeypatch.setattr(fake, "repeats_groups", lambda *_: False)
        monkeypatch.setattr(fake, "cuda_attention", lambda flash: chosen(False))
        assert simulate(spec, training, work).live_peak_bytes > 1.2 * closed


def test_scores_are_capped_whatever_transformers_would_take(tmp_path: Path) -> None:
    """Some versions attend to Gemma 2 by a kernel that leaves its caps out."""
    model = load_plain(Path(save_model(tmp_path / "model", "gemma2", attn_logit_softcapping=0.05).model))
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        right = model(input_ids=ids).logits
        model.config.get_text_config(decoder=True)._attn_implementation_internal = "edgeft_repeat"
        repeat = AttentionInterface()._global_mapping.get("sdpa")
        AttentionInterface.register("edgeft_repeat", lambda *args, softcap=None, **more: repeat(*args, **more))
        AttentionMaskInterface.register("edgeft_repeat", sdpa_mask)
        wrong = model(input_ids=ids).logits
        cap_scores(model)
        again = model(input_ids=ids).logits
    assert not torch.allclose(right, wrong, atol=1e-4) and torch.equal(right, again)
