"""Embeddings before the text: what they begin as, what PEFT makes of them, how the model reads them once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from beside import computes_as_trained, others_merge, peft_logits
from safetensors.torch import load_file, save_file
from tiny import plan_of, run, save_model, write_plan

from edgeft.data.samples import Sample
from edgeft.engine.loop import recompute_layers
from edgeft.engine.prefixes import start_ids
from edgeft.engine.trainable import apply_tuner, save_tuned
from edgeft.errors import BadInput
from edgeft.exporting.outputs import load_as_trained, load_tuned
from edgeft.merging.merge import merge
from edgeft.merging.merged_tensors import merged_rung
from edgeft.merging.sweep import sweep
from edgeft.models.checkpoint import load_plain
from edgeft.models.evaluate import evaluate, greedy, token_losses
from edgeft.models.headers import KV_PREFIX
from edgeft.models.layer_shares import Shares
from edgeft.models.parts import find_parts
from edgeft.models.soft_prompt import prompt_of
from edgeft.models.spec import ModelSpec
from edgeft.planning.candidates import candidates
from edgeft.planning.job_checks import check_job
from edgeft.planning.plan import make_plan
from edgeft.progress import silent
from edgeft.settings.job import make_job
from edgeft.targets.target import load_target
from edgeft.training.job_data import Data
from edgeft.training.result import TrainResult

IDS = torch.arange(5, 37).reshape(2, 16)
CPU = torch.device("cpu")
GROUPED, ALONE = {"num_key_value_heads": 2}, {"num_key_value_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED, "qwen3": GROUPED, "phi3": GROUPED, "gemma": GROUPED, "granite": GROUPED,
    "gpt2": {**ALONE, "n_inner": 192}, "gpt_neox": ALONE, "opt": {**ALONE, "ffn_dim": 192, "word_embed_proj_dim": 64},
}  # fmt: skip
SETTINGS: dict[str, Any] = {"tuner": "prompt", "rank": None, "prefix_tokens": 5, "base_precision": "fp32"}


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def hung(folder: Path, spec: ModelSpec) -> tuple[Any, Any, list[Any]]:
    """A model with a prompt, its parts, and what trains."""
    model = load_plain(folder)
    parts = find_parts(model)
    return model, parts, apply_tuner(model, parts, plan_of(spec, range(3), tuner="prompt"))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("llama", "gpt2"))) for kind in FAMILIES]
)
def test_it_begins_as_tokens_before_the_text_and_goes_on_as_pefts(kind: str, tmp_path: Path) -> None:
    spec = save_model(tmp_path / "base", kind, num_hidden_layers=3, **FAMILIES[kind])
    training = plan_of(spec, range(3), tuner="prompt")
    drawn = torch.cat([start_ids(spec.vocab_size, training).expand(2, -1), IDS], dim=1)
    before = logits(load_plain(tmp_path / "base"), drawn)[:, 3:]
    model, parts, chosen = hung(tmp_path / "base", spec)
    begun = logits(model)
    torch.testing.assert_close(begun, before, rtol=1e-5, atol=2e-6)
    ((_, embeddings),) = chosen
    with torch.no_grad():
        embeddings.add_(torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0)) * embeddings.std())
    (tmp_path / "adapter").mkdir()
    save_tuned(model, parts, training, chosen, str(tmp_path / "base"), tmp_path / "adapter")
    tuned = logits(model)  # read anew
    assert (tuned - begun).abs().max() > 1e-3
    torch.testing.assert_close(tuned, peft_logits(tmp_path / "base", tmp_path / "adapter", IDS), rtol=1e-5, atol=2e-6)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5]]  # of other lengths: padded on the left, under a mask

    def alone(ids: list[int]) -> list[int]:
        for _ in range(6):
            ids = [*ids, int(logits(model, torch.tensor([ids]))[0, -1].argmax())]
        return ids[-6:]

    assert greedy(model, prompts, [511], 6, CPU) == [alone(prompt) for prompt in prompts]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_its_gradient_is_that_of_a_prompt_before_each_row(kind: str, tmp_path: Path) -> None:
    """Against plain transformers, the embeddings put before each row's; also where layers are computed again."""
    spec = save_model(tmp_path, kind, num_hidden_layers=3, **FAMILIES[kind])
    model, parts, ((_, embeddings),) = hung(tmp_path, spec)
    plain = load_plain(tmp_path).requires_grad_(False)
    prompt = embeddings.detach().clone().requires_grad_(True)
    rows = torch.cat([prompt.expand(2, -1, -1), plain.get_input_embeddings()(IDS)], dim=1)
    scores = plain(inputs_embeds=rows, use_cache=False).logits[:, 3:-1]
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    samples = [Sample(row.tolist(), row.tolist(), 1) for row in IDS]
    for _ in range(2):
        embeddings.grad = None
        token_losses(model, parts, samples, CPU, torch.float32, 64).backward()
        torch.testing.assert_close(embeddings.grad, prompt.grad, rtol=1e-4, atol=1e-6)
        assert all(made.keys is None for made in prompt_of(parts).made)  # nothing of the pass is kept
        recompute_layers(parts)


@pytest.fixture(scope="module")
def trained(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    run(write_plan(folder, checkpoint_folder, epochs=2.0, learning_rate=3e-2, **SETTINGS), folder / "train")
    return folder / "train"


def test_what_was_trained_is_pefts_own(trained: Path, checkpoint_folder: Path) -> None:
    result = TrainResult.read(trained / "train.json")
    assert result.valid.loss < result.base_valid.loss
    assert result.trained_parameters == 5 * result.plan.spec.hidden_size
    assert {unit.unit: unit.steps for unit in result.units}["soft_prompt"] == result.steps
    ours = logits(load_tuned(trained, result))
    torch.testing.assert_close(ours, peft_logits(checkpoint_folder, trained, IDS), rtol=1e-5, atol=2e-6)
    assert (ours - logits(load_plain(checkpoint_folder))).abs().max() > 1e-3


def test_it_is_scored_as_it_was_trained(trained: Path) -> None:
    result = TrainResult.read(trained / "train.json")
    data = Data.read(result.plan)
    model, compute = load_as_trained(trained, result)
    scores = evaluate(model, find_parts(model), data.valid[:4], data.tokenizer, device=CPU, compute=compute)
    assert scores.loss == pytest.approx(result.valid.loss, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_merge_has_what_the_base_makes_of_it(
    share: float, trained: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    computes_as_trained(trained, checkpoint_folder, tmp_path / "merged", KV_PREFIX, share, logits)


def test_no_share_of_it_is_between(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--wise-alpha: a share of .* are there or not.*\n\nhint: use 1, or 0 for"):
        merge(trained, tmp_path / "merged", wise_alpha=0.5, progress=silent)
    with pytest.raises(BadInput, match="--sweep: keys and values before the text are there or not"):
        sweep(trained, load_target("onnx-portable-fp32"), select="best")


KEY = "past_key_values.1.key"
FAULTS: dict[str, Any] = {
    "shifted by a token": lambda tensors: {name: tensor.roll(1, dims=2) for name, tensor in tensors.items()},
    "a token short": lambda tensors: {name: tensor[:, :, 1:] for name, tensor in tensors.items()},
    "a layer's dropped": lambda tensors: {name: tensor for name, tensor in tensors.items() if ".1." not in name},
    "a value a little off": lambda tensors: tensors | {KEY: tensors[KEY] * (1 + 2.0**-20)},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_merge_that_is_a_little_off_is_no_merge(
    fault: str, trained: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    result = TrainResult.read(trained / "train.json")
    merge(trained, tmp_path / "merged", wise_alpha=1.0, progress=silent)
    kept = FAULTS[fault](load_file(tmp_path / "merged" / KV_PREFIX))
    save_file({name: tensor.contiguous() for name, tensor in kept.items()}, tmp_path / "merged" / KV_PREFIX)
    assert merged_rung(checkpoint_folder, trained, tmp_path / "merged", result.training, Shares()).problems


def test_a_peft_prompt_of_others_merges_too(checkpoint_folder: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    wrong = r"prompt_embeddings: .* in the fine-tune, the base's embeddings have"
    others_merge(PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=4), checkpoint_folder, tmp_path, IDS, wrong)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "sparse": ("llama", {}, {"layers": "sparse"}, "layers: sparse says which layers train, and a soft prompt is in no"),
    "lisa": ("llama", {}, {"layers": "lisa"}, "layers: lisa says which layers train, and a soft prompt is in none"),
    "a window": ("mistral", {"sliding_window": 32}, {}, "tuner: layers that see a window of 32 tokens would lose"),
    "a family that is not known": ("stablelm", {}, {}, "tuner: .* is of no family whose attention is known"),
    "a rank": ("llama", {}, {"rank": 8}, "rank: prompt has no factors of a rank"),
    "rounding": ("llama", {}, {"quantize_aware": True, "target": "ort-int4"}, "quantize_aware: "),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_is_refused_by_name(why: str, tmp_path: Path) -> None:
    from edgeft.machines.profile import load_profile
    from edgeft.memory.train_step import Workload

    kind, shape, settings, message = REFUSED[why]
    spec: ModelSpec = save_model(tmp_path, kind, **shape)
    job = make_job(model=str(tmp_path), **{"tuner": "prompt", "profile": "cpu-8gb", **settings})
    with pytest.raises(BadInput, match=message) as problem:
        check_job(job, spec)
        list(candidates(job, load_profile("cpu-8gb"), spec, Workload(48, 47), 4, rows_tokens=100))
    assert problem.value.hint


def test_nothing_but_all_layers_is_planned(checkpoint_folder: Path) -> None:
    plan = make_plan(make_job(model=str(checkpoint_folder), profile="cpu-8gb", tuner="prompt"))
    assert plan.training.layers == "all" and not plan.training.resting_layers
    assert plan.stages.context_tokens == (plan.spec.max_position_embeddings or 0) - plan.training.prefix_tokens
