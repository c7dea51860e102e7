"""Scores of layers equal what is computed by hand, find what was planted, and fit where training fits."""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIGS
from warm import edgeft

from edgeft.data.dataset import IGNORED, Sample
from edgeft.engine.lisa import draw
from edgeft.engine.loop import Run, learning_rate, remaining_steps
from edgeft.engine.nf4_base import make_nf4
from edgeft.engine.trainable import apply_tuner
from edgeft.errors import BadInput, DoesNotFit, EdgeftError
from edgeft.machines import meter, processes
from edgeft.models.metrics import Importance
from edgeft.models.parts import find_parts, is_linear
from edgeft.planning import layer_scores
from edgeft.planning.layer_choice import draw_weights
from edgeft.planning.plan import Plan, make_plan
from edgeft.reporting.terminal import plan_text
from edgeft.settings.job import Job, Training, make_job
from edgeft.training import gradients, importance
from edgeft.training.importance import METHODS, Scored

CPU = torch.device("cpu")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 4
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 1, "tie_word_embeddings": False, "initializer_range": 0.1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL,
    "gemma2": SMALL,
    "phi3": SMALL,
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "eos_token_id": 1},
    "gpt_neox": SMALL,
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny(kind: str = "llama", **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**FAMILIES[kind], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def training_of(**changes: Any) -> Training:
    values: dict[str, Any] = {
        "device": "cpu", "tuner": "lora", "base_precision": "fp32", "compute_dtype": "fp32", "rank": 8,
        "lora_alpha": 16.0, "target_modules": ALL, "trained_layers": tuple(range(LAYERS)), "micro_batch_size": 4,
        "batch_size": 4, "max_length": 16, "max_trained": 16, "checkpointing": False, "loss_chunk_tokens": 64,
        "optimizer": "adamw",
        "learning_rate": 2e-2, "steps": 40, "warmup_steps": 1, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 0,
        "checkpoint_steps": None, "eval_rows": 8,
    }  # fmt: skip
    return Training(**{**values, **changes})


def samples(count: int, length: int = 12, trained: int = 4, seed: int = 0) -> list[Sample]:
    """Prompts of random words, the same answer to each, three different lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(2, 60, (length - i % 3,), generator=generator).tolist()
        ids[-trained:] = [7, 5, 9, 3, *range(10, 10 + trained)][:trained]
        labels = [IGNORED] * (len(ids) - trained) + ids[-trained:]
        made.append(Sample(ids, labels, len(ids) - trained))
    return made


def scored_of(model: Any, **changes: Any) -> Scored:
    return Scored(training_of(**changes), CPU, torch.float32, model, find_parts(model), samples(24), samples(6, seed=1))


def nf4(model: Any) -> Any:
    for layer in find_parts(model).layers:
        for name, module in list(layer.named_modules()):
            if is_linear(module):
                module.source_cls = torch.nn.Linear
                layer.set_submodule(name, make_nf4(module, torch.float32))
    return model


def mean_loss(model: Any, rows: list[Sample]) -> torch.Tensor:
    """Mean loss per trained token by the model's own logits, a row at a time."""
    total, tokens = torch.zeros(()), 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(
            logits, torch.tensor(row.labels[1:]), ignore_index=IGNORED, reduction="sum"
        )
        tokens += row.trained_tokens
    return total / tokens


def autograd_scores(model: Any, rows: list[Sample]) -> list[float]:
    """sum over matrices of ||W|| mean ||G||, by torch's own gradients of every weight."""
    layers = find_parts(model).layers
    linears = [[m for m in layer.modules() if is_linear(m)] for layer in layers]
    for linear in (m for found in linears for m in found):
        linear.weight.requires_grad_(True)
    scores = [0.0] * len(layers)
    for row in rows:
        mean_loss(model, [row]).backward()
        for i, found in enumerate(linears):
            for linear in found:
                scores[i] += float(linear.weight.detach().norm() * linear.weight.grad.norm()) / len(rows)
                linear.weight.grad = None
    return scores


# gradient


def test_a_gradient_norm_needs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, d = torch.randn(3, 7, 11), torch.randn(3, 7, 5)
    expected = float((d.flatten(0, 1).T @ x.flatten(0, 1)).norm())
    assert gradients.gradient_norm(x, d) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(gradients, "GRAM_ENTRIES", 50)  # two rows at a time
    assert gradients.gradient_norm(x, d) == pytest.approx(expected, rel=1e-5)
    assert gradients.gradient_norm(x, d * float("inf")) == float("inf")


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradient_scores_equal_autograd(kind: str) -> None:
    model = tiny(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    scores, rows = importance.by_gradient(scored_of(model))
    assert len(rows) == 24
    assert scores == pytest.approx(autograd_scores(copy.deepcopy(model), rows), rel=1e-4)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(m._forward_hooks for m in model.modules()) and not any(p.requires_grad for p in after.values())


def test_gradient_scores_of_a_4_bit_base_are_those_of_its_dense_form() -> None:
    from bitsandbytes.functional import dequantize_4bit

    model = nf4(tiny())
    dense = tiny()
    for layer, other in zip(find_parts(model).layers, find_parts(dense).layers, strict=True):
        for name, module in layer.named_modules():
            if is_linear(module):
                weight: Any = module.weight
                other.get_submodule(name).weight.data = dequantize_4bit(weight, weight.quant_state).float()
    scores, rows = importance.by_gradient(scored_of(model))
    assert scores == pytest.approx(autograd_scores(dense, rows), rel=1e-3)


def test_gradient_scores_do_not_depend_on_recomputation() -> None:
    plain, _ = importance.by_gradient(scored_of(tiny()))
    again, _ = importance.by_gradient(scored_of(tiny(), checkpointing=True))
    assert again == pytest.approx(plain, rel=1e-5)


def test_half_precision_gradients_are_scaled_until_they_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = scored_of(tiny())
    expected, _ = importance.by_gradient(scored)
    scored.compute, used = torch.float16, []
    monkeypatch.setattr(Scored, "loss_of", lambda self, rows: mean_loss(model, rows) * rows[0].trained_tokens)
    model = scored.model

    def overflows(x: torch.Tensor, d: torch.Tensor) -> float:
        used.append(float(d.abs().max()))
        return float("inf") if len(used) == 3 else float((d.flatten(0, 1).T @ x.flatten(0, 1)).norm())

    monkeypatch.setattr(gradients, "gradient_norm", overflows)
    found, _ = importance.by_gradient(scored)
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_model_whose_layers_hold_no_linear_scores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "is_linear", lambda module: False)
    assert importance.by_gradient(scored_of(tiny()))[0] == [0.0] * LAYERS


# hidden states


@pytest.mark.parametrize("group_tokens", [16, 1024])
def test_hidden_scores_equal_a_direct_computation(group_tokens: int) -> None:
    model = tiny()
    scores, rows = importance.by_hidden(scored_of(model, max_length=group_tokens))
    inputs: list[torch.Tensor] = []
    middles: list[torch.Tensor] = []
    handles = [layer.input_layernorm.register_forward_pre_hook(lambda m, a: inputs.append(a[0][0]))
               for layer in model.model.layers]  # fmt: skip
    handles += [layer.post_attention_layernorm.register_forward_pre_hook(lambda m, a: middles.append(a[0][0]))
                for layer in model.model.layers]  # fmt: skip
    handles.append(model.model.norm.register_forward_pre_hook(lambda m, a: inputs.append(a[0][0])))
    sums, tokens = torch.zeros(LAYERS), 0
    for row in rows:
        inputs.clear(), middles.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([row.ids]))
        trained = torch.tensor(row.labels[1:]).ne(IGNORED).nonzero().flatten()
        tokens += len(trained)
        for i in range(LAYERS):
            entering, middle, leaving = inputs[i][trained], middles[i][trained], inputs[i + 1][trained]
            cosine = torch.nn.functional.cosine_similarity(entering, leaving, dim=-1)
            sums[i] += (1 - cosine + (middle - entering).norm(dim=-1) / entering.norm(dim=-1)).sum()
    assert scores == pytest.approx((sums / tokens).tolist(), rel=1e-4)
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", FAMILIES)
def test_attention_is_found_in_every_family(kind: str) -> None:
    model = tiny(kind)
    for layer in find_parts(model).layers:
        (attention,) = importance.attention_of(layer)
        assert "attention" in type(attention).__name__.lower()
    assert all(score > 0 for score in importance.by_hidden(scored_of(model))[0])


# ablation


def test_ablation_scores_equal_adapters_zeroed_by_hand() -> None:
    scored = scored_of(tiny())
    base = float(mean_loss(scored.model, scored.valid))
    scores, rows = importance.by_ablation(scored)
    assert 1 < len(rows) <= 24

    def loss() -> float:
        with torch.no_grad():
            return float(mean_loss(scored.model, scored.valid))

    whole, by_hand = loss(), []
    assert whole < base
    for layer in scored.parts.layers:
        adapters = [p for name, p in layer.named_parameters() if "lora_B" in name]
        assert len(adapters) == len(ALL) and any(p.abs().sum() > 0 for p in adapters)
        kept = [p.clone() for p in adapters]
        for p in adapters:
            p.data.zero_()
        by_hand.append(loss() - whole)
        for p, value in zip(adapters, kept, strict=True):
            p.data.copy_(value)
    assert scores == pytest.approx(by_hand, rel=1e-3, abs=1e-6)


# progressive


def test_progressive_scores_equal_short_trainings_by_hand() -> None:
    from peft.tuners.lora import LoraLayer

    scored = scored_of(tiny())
    scores, _ = importance.by_progress(scored)
    model = tiny()
    training = training_of(steps=importance.SHORT_STEPS, warmup_steps=importance.WARMUP_STEPS)
    apply_tuner(model, find_parts(model), training)
    losses = [float(mean_loss(model, scored.valid).detach())]
    for joined in (1, 2):
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", True)
        top = [f"layers.{LAYERS - 1 - i}." for i in range(joined)]
        own = [p for name, p in model.named_parameters() if "lora_" in name and any(place in name for place in top)]
        assert len(own) == 2 * len(ALL) * joined
        optimizer = torch.optim.AdamW(own, weight_decay=0.0)
        for step, rows in enumerate(remaining_steps(training, scored.train, 0)):
            optimizer.param_groups[0]["lr"] = learning_rate(training, step)
            mean_loss(model, rows).backward()
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
            for p in model.parameters():
                p.grad = None
        losses.append(float(mean_loss(model, scored.valid).detach()))
    assert scores[-1] == pytest.approx(losses[0] - losses[1], rel=1e-2)
    gain, total = losses[1] - losses[2], losses[0] - losses[2]
    expected = gain if gain > importance.TOLERANCE * max(0.0, total) else 0.0
    assert scores[-2] == pytest.approx(expected, rel=0.05, abs=1e-3)
    assert all(score == 0 for score in scores[: -1 - [*scores[::-1], 0.0].index(0.0)])


# planted layers


def dead(model: Any, *layers: int) -> Any:
    """The model with layers that give back their input, whatever adapters sit in them: their norms are zero."""
    for i in layers:
        for norm in (model.model.layers[i].input_layernorm, model.model.layers[i].post_attention_layernorm):
            norm.weight.data.zero_()
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_does_nothing_scores_lowest(method: str) -> None:
    scores, _ = METHODS[method](scored_of(dead(tiny(), 1)))
    assert scores[1] == 0.0 == min(map(abs, scores))
    if method in ("gradient", "hidden"):
        assert min(scores[:1] + scores[2:]) > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_only_layer_that_does_something_scores_highest(method: str) -> None:
    live = LAYERS - 1 if method == "progressive" else 2  # the search begins at the top and ends where nothing is gained
    scores, _ = METHODS[method](scored_of(dead(tiny(), *(i for i in range(LAYERS) if i != live))))
    assert scores[live] > 0
    assert [score for i, score in enumerate(scores) if i != live] == pytest.approx([0.0] * (LAYERS - 1), abs=1e-7)


# memory


@pytest.mark.parametrize(
    "base, micro_batch, checkpointing",
    [
        ("fp32", 2, False),
        pytest.param("fp32", 1, True, marks=pytest.mark.slow),
        pytest.param("nf4", 1, False, marks=pytest.mark.slow),
    ],
)
def test_no_method_holds_more_than_a_training_step(
    base: str, micro_batch: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 64
    monkeypatch.setattr(importance, "SHORT_STEPS", 2)  # every step after the first holds the same
    rows = samples(4, length=length, trained=8)

    def setting() -> tuple[Any, dict[str, Any]]:
        model = tiny(hidden_size=64, intermediate_size=192, head_dim=16)
        plan = {"base_precision": base, "micro_batch_size": micro_batch, "checkpointing": checkpointing,
                "batch_size": 2, "max_length": length}  # fmt: skip
        return nf4(model) if base == "nf4" else model, plan

    def peak(model: Any, work: Any, states: Any = ()) -> int:
        gc.collect()
        live = meter.LiveBytes()
        live.count([list(model.parameters()), list(model.buffers()), list(states)])
        with live:
            work()
        return live.peak_bytes

    model, plan = setting()
    training = training_of(**plan)
    parts = find_parts(model)
    run = Run(training, CPU, torch.float32, model, parts, apply_tuner(model, parts, training))
    longest = [rows[0], rows[3]]
    run.train_step(longest)
    trained = peak(model, lambda: run.train_step(longest), run.optimizer.state.values())
    for method, measure in METHODS.items():
        model, plan = setting()
        scored = Scored(training_of(**plan), CPU, torch.float32, model, find_parts(model), rows, rows)
        assert peak(model, partial(measure, scored)) <= trained, method


# what the planner does with scores


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, none of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgeft" / "importance"


@pytest.fixture
def rows_file(write_rows: Any) -> Path:
    sections = ("libs", "doc", "python")
    rows = [{"prompt": f"Package: lib{i}\nSection:", "completion": f" {sections[i % 3]}"} for i in range(30)]
    return write_rows("rows.jsonl", rows)  # type: ignore[no-any-return]


@pytest.fixture
def job_of(rows_file: Path, deep_folder: Path) -> Any:
    def make(**settings: Any) -> Job:
        values = {"model": str(deep_folder), "data": str(rows_file), "profile": "cpu-8gb", "batch_size": 4,
                  "max_steps": 4, "layers": "sparse", "layer_score": "gradient", "eval_rows": 4}  # fmt: skip
        return make_job(**{**values, **settings})

    return make


@pytest.fixture(scope="module")
def deep_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-layer Llama with the tests' tokenizer; its second layer does nothing."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = dead(tiny(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None), 1)
    folder = tmp_path_factory.mktemp("deep")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scores_of(*scores: float, method: str = "gradient", **changes: Any) -> Importance:
    facts: dict[str, Any] = {"rows": 64, "tokens": 640, "device": "cpu", "seconds": 3.0, "peak_bytes": 2**20}
    return Importance(method=method, scores=scores, **{**facts, **changes})  # type: ignore[arg-type]


def test_a_plan_takes_the_layers_of_highest_score_and_names_its_baselines(job_of: Any) -> None:
    made = make_plan(job_of(active_layers=2, seed=3), importance=scores_of(0.5, 0.1, 0.9, 0.2))
    assert made.training.trained_layers == (0, 2)
    assert made.importance is not None
    assert made.importance.chosen == (0, 2) and made.importance.top == (2, 3)
    by_chance = make_plan(job_of(active_layers=2, seed=3, layer_score="random")).training.trained_layers
    assert made.importance.random == by_chance
    assert Plan.model_validate_json(made.model_dump_json()) == made


def test_equal_scores_go_to_the_upper_layer(job_of: Any) -> None:
    made = make_plan(job_of(active_layers=2), importance=scores_of(0.0, 0.0, 0.0, 0.4))
    assert made.training.trained_layers == (2, 3)


def test_a_progressive_search_says_itself_how_many_layers(job_of: Any) -> None:
    found = scores_of(0.0, 0.0, 0.1, 0.4, method="progressive")
    assert make_plan(job_of(layer_score="progressive"), importance=found).training.trained_layers == (2, 3)
    pinned = make_plan(job_of(layer_score="progressive", active_layers=3), importance=found)
    assert pinned.training.trained_layers == (1, 2, 3)


def test_random_layers_follow_the_jobs_seed(job_of: Any) -> None:
    sets = Counter(
        make_plan(job_of(layer_score="random", active_layers=2, seed=seed)).training.trained_layers for seed in range(8)
    )
    assert len(sets) >= 3 and all(len(chosen) == 2 for chosen in sets)


def test_pinned_layers_need_no_scores(job_of: Any) -> None:
    made = make_plan(job_of(trained_layers="0,3"))
    assert made.training.trained_layers == (0, 3) and made.importance is None


def test_weighted_draws_follow_the_scores(job_of: Any) -> None:
    job = job_of(layers="lisa", lisa_schedule="weighted", active_layers=1, tuner="full")
    made = make_plan(job, importance=scores_of(4.0, -0.5, 2.0, 2.0))
    weights = made.training.layer_weights
    assert weights == pytest.approx((4.0, 0.2, 2.0, 2.0))
    counts = Counter(draw(("a", "b", "c", "d"), 1, "weighted", weights, 0, i)[0] for i in range(4000))
    assert [counts[unit] / 4000 for unit in "abcd"] == pytest.approx([w / 8.2 for w in weights], abs=0.03)
    assert made.importance is not None and made.importance.chosen == ()
    assert draw_weights([-1.0, 0.0]) == (1.0, 1.0)


@pytest.mark.parametrize(
    "settings, given, message",
    [
        (
            {},
            None,
            "layer_score: gradient is measured before planning, and it was not\n\n"
            "hint: call make_plan(job, importance=edgeft.planning.layer_scores.score_layers(job))",
        ),
        (
            {"data": None},
            None,
            "layer_score: gradient is measured on training data, and none was given\n\n"
            "hint: plan with --data FILE (make: data=FILE), or use layer_score=top",
        ),
        (
            {"layers": "lisa", "tuner": "full"},
            None,
            "layer_score: gradient chooses layers, but nothing here asks for a choice\n\n"
            "hint: add --set layers=sparse, or layers=lisa and lisa_schedule=weighted",
        ),
        (
            {"layer_score": "hidden"},
            scores_of(1.0, 2.0, 3.0, 4.0),
            "importance: 4 scores by gradient were given, the job wants 4 by hidden\n\n"
            "hint: give what edgeft.planning.layer_scores.score_layers(job) does",
        ),
        (
            {},
            scores_of(1.0, 2.0),
            "importance: 2 scores by gradient were given, the job wants 4 by gradient\n\n"
            "hint: give what edgeft.planning.layer_scores.score_layers(job) does",
        ),
    ],
)
def test_scores_that_are_missing_or_others(settings: Any, given: Any, message: str, job_of: Any) -> None:
    with pytest.raises(BadInput) as caught:
        make_plan(job_of(**settings), importance=given)
    assert str(caught.value) == message


def test_scoring_refuses_what_needs_no_scores_and_bad_settings_before_it_starts(job_of: Any) -> None:
    with pytest.raises(BadInput, match=r"layer_score: a plan of this job needs no scores \(top\)"):
        layer_scores.score_layers(job_of(layer_score="top"))
    with pytest.raises(BadInput, match="layer_score: hidden is measured on training data, and none was given"):
        layer_scores.score_layers(job_of(layer_score="hidden", data=None))
    with pytest.raises(BadInput, match="active_layers: 9 is more than the model's 4 layers"):
        layer_scores.score_layers(job_of(active_layers=9))
    plan = layer_scores.scoring_plan(job_of())
    with pytest.raises(BadInput, match="layer_score: top reads no data"):
        importance.score(plan, "top", lambda *report: None)


def test_layers_are_scored_as_lora_in_all_of_them_trains(job_of: Any) -> None:
    job = job_of(tuner="full", active_layers=2, learning_rate=1e-5, batch_size=8, max_length=32, seed=5)
    plan = layer_scores.scoring_plan(job)
    training = plan.training
    assert (training.tuner, training.layers, training.trained_layers) == ("lora", "all", (0, 1, 2, 3))
    assert (training.batch_size, training.max_length, training.seed) == (8, plan.lengths and plan.lengths.longest, 5)
    assert training.learning_rate != 1e-5  # that of full fine-tuning
    assert layer_scores.scoring_plan(job_of(rank=4, learning_rate=1e-3)).training.learning_rate == 1e-3


def test_only_hidden_states_do_without_all_layers() -> None:
    """A budget in which LoRA trains in a few layers only, its rank, precision and micro-batch pinned."""
    configs = str(CONFIGS / "llama-3.1-8b")
    job = make_job(model=configs, profile="t4", layers="sparse", base_precision="nf4", rank=64, micro_batch_size=4,
                   checkpointing=False, max_length=1024)  # fmt: skip
    fits = make_plan(job.model_copy(update={"layers": "sparse", "max_memory_bytes": 14 * 2**30}))
    assert len(fits.training.trained_layers) < 32
    small = job.model_copy(update={"max_memory_bytes": 14 * 2**30})
    hidden = layer_scores.scoring_plan(small.model_copy(update={"layer_score": "hidden"}))
    assert hidden.peak_bytes <= 14 * 2**30 and hidden.training.layers == "sparse"
    with pytest.raises(DoesNotFit, match="gradient needs all layers at once: nothing fits") as no:
        layer_scores.scoring_plan(small.model_copy(update={"layer_score": "gradient"}))
    assert "hint: use layer_score=hidden, which needs no backward pass" in str(no.value)


def test_the_plan_shows_scores_choice_and_seconds(job_of: Any) -> None:
    from rich.console import Console

    made = make_plan(job_of(active_layers=2), importance=scores_of(0.5, 0.1, 0.9, 0.2))
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(plan_text(made))
    text = console.export_text()
    assert (
        "gradient of 64 rows, 3.0 s on the cpu, peak 1.00 MiB: 0* 0.5, 1 0.1, 2* 0.9, 3 0.2. Chosen 0,2, topmost 2,3"
        in text
    )


# the whole way, by the verbs


def plan_arguments(job: Job, out: Path, *settings: str) -> list[object]:
    pins = ["layers=sparse", f"layer_score={job.layer_score}", "batch_size=4", "max_steps=4", "eval_rows=4", *settings]
    options = [part for pin in pins for part in ("--set", pin)]
    return ["plan", "--model", job.model, "--data", job.data, "--profile", "cpu-8gb", "--out", out, *options]


def test_plan_scores_once_and_trains_what_it_chose(job_of: Any, own_cache: Path, tmp_path: Path) -> None:
    from edgeft.documents import sha256_file
    from edgeft.training.train import train

    path = tmp_path / "plan.json"
    done = edgeft(*plan_arguments(job_of(), path, "active_layers=3", "tuner=lora", "rank=4"))
    assert "score layers by gradient" in done.stderr and "importance" in done.stdout
    made = Plan.read(path)
    assert made.importance is not None and made.importance.method == "gradient"
    assert made.importance.scores[1] == 0.0 < min(made.importance.scores[i] for i in (0, 2, 3))
    assert made.training.trained_layers == (0, 2, 3) and made.importance.peak_bytes > 0
    assert (made.importance.rows, made.importance.device) == (28, "cpu")  # two of thirty are held out
    (kept,) = own_cache.iterdir()
    held = Importance.model_validate_json(kept.read_bytes())
    assert held.scores == made.importance.scores and held.chosen == ()

    stamp = kept.stat().st_mtime_ns
    again = edgeft(*plan_arguments(job_of(), path, "active_layers=2", "tuner=full", "micro_batch_size=2"))
    assert "score layers" not in again.stderr
    assert Plan.read(path).importance is not None and kept.stat().st_mtime_ns == stamp
    assert list(own_cache.iterdir()) == [kept]
    assert "is up to date" in edgeft(*plan_arguments(job_of(), path, "active_layers=2", "tuner=full",
                                                     "micro_batch_size=2")).stderr  # fmt: skip
    result = train(Plan.read(path), tmp_path / "train", plan_sha256=sha256_file(path), progress=lambda *report: None)
    trained = {int(unit.unit.split()[1]) for unit in result.units if unit.steps}
    assert trained == set(Plan.read(path).training.trained_layers) and 1 not in trained


def test_what_scores_follow_is_in_their_name(job_of: Any, rows_file: Path, deep_folder: Path) -> None:
    def digest(**settings: Any) -> str:
        job = job_of(**settings)
        return layer_scores._digest(layer_scores.scoring_plan(job), job)

    first = digest()
    assert first == digest(active_layers=3) == digest(rank=8) == digest(micro_batch_size=1, checkpointing=True)
    short = {"layer_score": "ablation"}
    changed = [digest(seed=1), digest(base_precision="nf4"), digest(layer_score="hidden"), digest(max_length=8),
               digest(valid=str(rows_file)), digest(**short), digest(**short, rank=8)]  # fmt: skip
    rows_file.write_text(rows_file.read_text().replace("lib0", "lib9"))
    assert len({first, digest(), *changed}) == 2 + len(changed)


def test_an_error_while_scoring_is_told_as_if_it_were_here(job_of: Any, own_cache: Path, tmp_path: Path) -> None:
    import shutil

    job = job_of()
    bare = tmp_path / "bare"
    shutil.copytree(job.model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(BadInput, match="bare: holds no weights"):
        layer_scores.score_layers(job.model_copy(update={"model": str(bare)}))
    assert not own_cache.exists()


def test_a_process_that_dies_says_so(job_of: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    with pytest.raises(EdgeftError, match="layer_score: scoring by gradient stopped: exit code 1"):
        layer_scores.score_layers(job_of())
    assert not own_cache.exists()


def test_ctrl_c_while_scoring_leaves_nothing(job_of: Any, own_cache: Path, tmp_path: Path) -> None:
    import psutil

    path = tmp_path / "plan.json"
    command = [sys.executable, "-m", "edgeft", *map(str, plan_arguments(job_of(layer_score="progressive"), path))]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # where the tests run in the background, a shell has them ignore SIGINT, and their children too
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, **options) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert first.startswith("score layers by progressive"), first + process.stderr.read()
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped; no plan was made" in rest and "Traceback" not in rest
    assert children and not psutil.wait_procs(children, timeout=20)[1]
    assert not path.exists() and not own_cache.exists()


def test_scores_in_this_process_speak_of_progress(job_of: Any) -> None:
    job = job_of(layer_score="ablation", rank=4, batch_size=8)
    heard: list[tuple[int, int]] = []
    found = importance.score(
        layer_scores.scoring_plan(job), "ablation", lambda stage, done, total, n: heard.append((done, total))
    )
    assert heard[-1] == (LAYERS, LAYERS) and len(found.scores) == LAYERS and found.scores[1] == 0.0
    assert json.loads(found.model_dump_json())["method"] == "ablation" and found.peak_bytes > 0


def test_scores_that_are_not_finite_are_refused(job_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "hidden", lambda scored: ([1.0, float("nan"), 2.0, 3.0], scored.train))
    with pytest.raises(EdgeftError, match="layer_score: hidden gave scores that are not finite") as caught:
        importance.score(layer_scores.scoring_plan(job_of(layer_score="hidden")), "hidden", lambda *report: None)
    assert "hint: use another layer_score, or another precision" in str(caught.value)
