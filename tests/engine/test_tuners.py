"""Each tuner against a reference of its own, from its start, and after a stop; its settings leave their mark."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import to_the_device
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from tiny import killed_at, plan_of, run, save_model, write_plan

from edgeft.data.dataset import Sample
from edgeft.engine.loop import Run, learning_rate, make_run
from edgeft.engine.nf4_base import load_base
from edgeft.engine.trainable import save_tuned
from edgeft.errors import BadInput
from edgeft.exporting.outputs import load_as_trained, load_changed, load_tuned
from edgeft.exporting.rehearsal import change_at_random
from edgeft.merging.merge import merge
from edgeft.merging.merged_tensors import merged_rung
from edgeft.models.checkpoint import DTYPES, Checkpoint, load_plain
from edgeft.models.evaluate import evaluate
from edgeft.models.layer_shares import Shares
from edgeft.models.parts import find_parts
from edgeft.models.streamed import load_streamed
from edgeft.planning.plan import Plan
from edgeft.progress import silent
from edgeft.settings.tuners import TUNERS, adapter_parts
from edgeft.training.job_data import Data
from edgeft.training.result import TrainResult

CPU = torch.device("cpu")
SAMPLES = [Sample(ids := list(range(5 + i, 21 + i)), ids, 1) for i in range(4)]
KEPT = {"max_steps": 6, "epochs": 5.0, "checkpoint_steps": 2}
# settings of a run; what LISA switches between is its adapters
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"tuner": "lora", "lora_plus": 16, "lora_scale": "plain"},
    "pissa": {"tuner": "lora", "init": "pissa"},
    "ia3, sparse": {"tuner": "ia3", "rank": None, "layers": "sparse", "active_layers": 1, "weight_decay": 0.5},
    "dora": {"tuner": "dora"},
    "dora, nf4, lisa": {
        "tuner": "dora",
        "base_precision": "nf4",
        "layers": "lisa",
        "active_layers": 1,
        "lisa_interval": 1,
    },
    "adalora": {"tuner": "adalora"},
    "adalora, nf4, lisa": {
        "tuner": "adalora",
        "base_precision": "nf4",
        "layers": "lisa",
        "active_layers": 1,
        "lisa_interval": 1,
    },
    "h-adapter": {"tuner": "h-adapter", "rank": None, "weight_decay": 0.5},
    "h-adapter, nf4, lisa": {
        "tuner": "h-adapter",
        "rank": None,
        "base_precision": "nf4",
        "layers": "lisa",
        "active_layers": 1,
        "lisa_interval": 1,
    },
    "adapter": {"tuner": "adapter"},
    "adapter, nf4, lisa": {
        "tuner": "adapter",
        "adapter_at": "parallel",
        "base_precision": "nf4",
        "layers": "lisa",
        "active_layers": 1,
        "lisa_interval": 1,
    },
    "prefix": {"tuner": "prefix", "rank": None, "prefix_tokens": 3, "weight_decay": 0.5},
    "prefix, nf4, lisa": {
        "tuner": "prefix",
        "rank": None,
        "base_precision": "nf4",
        "layers": "lisa",
        "active_layers": 1,
        "lisa_interval": 1,
    },
    "prefix, sparse": {"tuner": "prefix", "rank": None, "layers": "sparse", "active_layers": 1},
    "prompt": {"tuner": "prompt", "rank": None, "prefix_tokens": 3, "weight_decay": 0.5},
    "prompt, nf4": {"tuner": "prompt", "rank": None, "prefix_tokens": 3, "base_precision": "nf4"},
    "lora, lisa": {"tuner": "lora", "lora_plus": 16, "layers": "lisa", "active_layers": 1, "lisa_interval": 1},
}


SLOW = (
    "prefix, sparse",
    "pissa, nf4",
    "ia3, nf4",
    "dora, sparse",
    "lora, lisa",
    "ia3, sparse",
    "h-adapter",
    "adalora, nf4, lisa",
)  # each of kinds that others show


def sampled(names: Iterable[str]) -> list[Any]:
    """Every name, those of SLOW marked so."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in names]


RANK = {name: {} if tuner.ranked else {"rank": None} for name, tuner in TUNERS.items()}
# (a tuner, what chooses its form) of all that begins beside frozen weights as nothing, and of what a weight can hold
STARTS = [
    (name, (tuner.chosen_by, form))
    for name, tuner in TUNERS.items()
    if tuner.adapters and tuner.shared
    for form in tuner.forms
]
FOLDING = [start for start in STARTS if TUNERS[start[0]].folds]


@pytest.fixture
def started(plan_file: Any, checkpoint_folder: Path, tmp_path: Path) -> Any:
    """A run of a plan, in the plan's own dtypes on the CPU, before its first step."""

    def start(work: str = "work", **settings: Any) -> Run:
        training = Plan.read(plan_file(**{"layers": "all", **settings})).training
        training = training.model_copy(update={"device": "cpu", "optimizer": "adamw"})
        compute = DTYPES[training.compute_dtype]
        model = load_base(checkpoint_folder, training, CPU, compute).requires_grad_(False)
        (tmp_path / work).mkdir(exist_ok=True)
        return make_run(training, CPU, compute, model, find_parts(model), checkpoint_folder, tmp_path / work)

    return start


@pytest.mark.parametrize("name", sampled(WAYS))
def test_stopped_and_resumed_ends_bit_for_bit_the_same(name: str, plan_file: Any, tmp_path: Path) -> None:
    path = plan_file(**KEPT, **WAYS[name])
    whole = run(path, tmp_path / "whole")

    stop = killed_at(5)

    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "stopped", progress=stop)
    resumed = run(path, tmp_path / "stopped")
    assert resumed.resumed_at == (4,) and resumed.loss_curve == whole.loss_curve and resumed.valid == whole.valid
    expected, found = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("whole", "stopped"))
    assert expected.keys() == found.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


@pytest.mark.parametrize("layers", ["all", "lisa"])
def test_the_second_factor_learns_faster_as_pefts_own_optimizer_has_it(layers: str, started: Any) -> None:
    lisa = {"active_layers": 2, "lisa_interval": 1} if layers == "lisa" else {}
    ours = started(lora_plus=16, tuner="lora", layers=layers, **lisa)
    theirs = started("theirs", lora_plus=16, tuner="lora")
    optimizer = create_loraplus_optimizer(
        theirs.model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=16, fused=True, weight_decay=0.0
    )
    times = [group["lr"] for group in optimizer.param_groups]
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1.0, 16.0}
    for step in range(4):
        for group, each in zip(optimizer.param_groups, times, strict=True):
            group["lr"] = each * learning_rate(theirs.training, step)
        theirs._gradients(SAMPLES)
        torch.nn.utils.clip_grad_norm_([p for _, p in theirs.chosen], theirs.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ours.train_step(SAMPLES)
    expected = dict(theirs.chosen)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in ours.chosen)
    plain = started("plain", tuner="lora")
    for _ in range(4):
        plain.train_step(SAMPLES)
    assert not any(torch.equal(parameter, expected[name]) for name, parameter in plain.chosen)


def test_what_has_no_second_factor_cannot_learn_it_faster(plan_file: Any) -> None:
    with pytest.raises(BadInput, match=r"lora_plus: full has no second factor.*\n\nhint: use tuner=lora"):
        plan_file(tuner="full", lora_plus=16)
    assert Plan.read(plan_file(lora_plus=16)).training.tuner == "lora"  # a small model is tuned whole otherwise


def test_weight_decay_is_the_factors_own_also_where_one_learns_faster(started: Any) -> None:
    made = started(tuner="lora", lora_plus=16, weight_decay=0.5)
    decayed = [(len(group["params"]), group["weight_decay"]) for group in made.optimizer.param_groups]
    half = len(made.chosen) // 2
    assert decayed == [(half, 0.5), (0, 0.0), (half, 0.5)]


PORTABLE = "onnx-portable-fp32"
IDS = torch.arange(5, 37).reshape(2, 16)
# what a short run leaves, of every tuner whose change a weight holds; large rates, so that it is no small one
FOLDED: dict[str, dict[str, Any]] = {
    "lora": {"tuner": "lora", "lora_scale": "plain", "lora_alpha": 8.0},
    "pissa": {"tuner": "lora", "init": "pissa"},
    "pissa, nf4": {"tuner": "lora", "init": "pissa", "base_precision": "nf4"},
    "ia3": {"tuner": "ia3", "rank": None, "learning_rate": 0.05},
    "ia3, nf4": {"tuner": "ia3", "rank": None, "learning_rate": 0.05, "base_precision": "nf4"},
    "dora": {"tuner": "dora"},
    "adalora": {"tuner": "adalora", "learning_rate": 0.05},
    "dora, sparse": {"tuner": "dora", "layers": "sparse", "trained_layers": "1"},
    "dora, nf4": {"tuner": "dora", "base_precision": "nf4"},
}


@pytest.fixture(scope="module", params=sampled(FOLDED))
def trained(request: Any, checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    cache = pytest.MonkeyPatch()
    cache.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "tuners-cache"))
    settings = {"epochs": 2.0, "learning_rate": 5e-3, "layers": "all", **FOLDED[request.param]}
    run(write_plan(folder, checkpoint_folder, **settings), folder / "train")
    cache.undo()
    return folder / "train"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


def test_what_was_trained_is_what_peft_computes(trained: Path, checkpoint_folder: Path) -> None:
    """PEFT's own forward pass of the folder that training wrote, and our merge of it."""
    ours = load_tuned(trained, TrainResult.read(trained / "train.json"))
    theirs = PeftModel.from_pretrained(load_plain(checkpoint_folder), trained).eval()
    base, expected = logits(load_plain(checkpoint_folder)), logits(theirs)
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_merged_at_any_share_is_the_formula_and_the_live_model(
    share: float, trained: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    result = TrainResult.read(trained / "train.json")
    merge(trained, tmp_path / "merged", wise_alpha=share, progress=silent)
    shares = Shares(rest=share)
    rung = merged_rung(checkpoint_folder, trained, tmp_path / "merged", result.training, shares)
    assert not rung.problems and (share == 0) == (
        rung.tensors == 0 or not _moved(checkpoint_folder, tmp_path / "merged")
    )
    live = logits(load_tuned(trained, result, shares))
    torch.testing.assert_close(logits(load_plain(tmp_path / "merged")), live, rtol=1e-4, atol=2e-5)


def _moved(base: Path, merged: Path) -> list[str]:
    before, after = Checkpoint(base), Checkpoint(merged)
    return [name for name in before.owner if not torch.equal(before.read(name), after.read(name))]


def test_a_merge_that_is_a_little_off_is_no_merge(trained: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    """One value in the last bits that rounding does not explain, a scale, and lengths that were left out."""
    result = TrainResult.read(trained / "train.json")
    merge(trained, tmp_path / "merged", wise_alpha=1.0, progress=silent)
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in _moved(checkpoint_folder, tmp_path / "merged") if "layers.1" in name)
    tensors[name][0, 0] *= 1 + 2.0**-15
    save_file(tensors, file, metadata={"format": "pt"})
    check = (checkpoint_folder, trained, tmp_path / "merged")
    assert [name in line for line in merged_rung(*check, result.training, Shares()).problems] == [True]
    others = {"lora_scale": "rslora" if result.training.lora_scale == "plain" else "plain"}, {"lora_alpha": 9.0}
    for setting in others if TUNERS[result.training.tuner].ranked else ():
        assert merged_rung(*check, result.training.model_copy(update=setting), Shares()).problems


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize(("tuner", "form"), STARTS)
def test_the_start_is_the_base_itself(
    tuner: str, form: tuple[str, str], base: str, started: Any, checkpoint_folder: Path
) -> None:
    """Before the first step: bit for bit what the base computes, also where it is rounded."""
    gpu = {"profile": "rtx4090-24gb"} if base == "bf16" else {}
    made = started(tuner=tuner, base_precision=base, **dict([form]), **gpu, **RANK[tuner])
    plain = load_base(checkpoint_folder, made.training, CPU, made.compute)
    with torch.autocast("cpu", made.compute, enabled=made.compute != torch.float32):
        assert torch.equal(logits(made.model), logits(plain))


def test_untrained_lengths_merge_into_the_base_bit_for_bit(
    started: Any, checkpoint_folder: Path, tmp_path: Path
) -> None:
    """Also where training held the base in 4 bits: the lengths are those of what is merged into."""
    made = started(tuner="dora", base_precision="nf4")
    save_tuned(made.model, made.parts, made.training, made.chosen, str(checkpoint_folder), tmp_path)
    merge(tmp_path, tmp_path / "merged", wise_alpha=1.0, progress=silent, base=str(checkpoint_folder))
    assert _moved(checkpoint_folder, tmp_path / "merged") == []


def test_lengths_take_the_gradients_that_peft_gives_them(started: Any, checkpoint_folder: Path, tmp_path: Path) -> None:
    made = started(tuner="dora")
    for _ in range(3):
        made.train_step(SAMPLES)
    save_tuned(made.model, made.parts, made.training, made.chosen, str(checkpoint_folder), tmp_path)
    theirs = PeftModel.from_pretrained(load_plain(checkpoint_folder), tmp_path, is_trainable=True).eval()
    for model in (made.model, theirs):
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in made.chosen:
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            parameter.grad, expected[f"base_model.model.{name}"].grad, rtol=1e-3, atol=1e-4 * scale, msg=name
        )


def test_it_is_scored_as_it_was_trained(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "tuners-cache"))
    result = TrainResult.read(trained / "train.json")
    data = Data.read(result.plan)
    model, compute = load_as_trained(trained, result)
    scores = evaluate(model, find_parts(model), data.valid[:4], data.tokenizer, device=CPU, compute=compute)
    assert scores.loss == pytest.approx(result.valid.loss, rel=1e-6)


def test_how_far_a_layer_moved_is_what_the_merge_says(trained: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    result = TrainResult.read(trained / "train.json")
    merge(trained, tmp_path / "merged", wise_alpha=1.0, progress=silent)
    before, after = Checkpoint(checkpoint_folder), Checkpoint(tmp_path / "merged")
    saved = adapter_parts(load_file(trained / "adapter_model.safetensors"))  # AdaLoRA may leave a matrix nothing
    names = [f"{module}.weight" for module in saved if "layers.1." in module]
    moved = sum(float(torch.dist(after.read(name), before.read(name))) ** 2 for name in names)
    whole = sum(float(before.read(name).norm()) ** 2 for name in names)
    recorded = {unit.unit: unit.relative_change for unit in result.units}
    assert recorded["layer 1"] == pytest.approx(math.sqrt(moved / whole), rel=1e-4)


# what LoRA of either start leaves is the same in kind, and many tests take it to a device
@pytest.mark.parametrize(
    ("tuner", "form"), [pytest.param(*each, marks=[pytest.mark.slow] * (each[0] != "dora")) for each in FOLDING]
)
def test_the_device_says_what_the_trained_model_says(tuner: str, form: tuple[str, str], tmp_path: Path) -> None:
    """Merged, exported, and asked there: the tokens of the live adapter."""
    to_the_device(tmp_path, "ort-fp32", tuner=tuner, **dict([form]), **RANK[tuner])


def test_pissa_begins_with_the_largest_singular_values(started: Any, checkpoint_folder: Path, tmp_path: Path) -> None:
    """As PEFT computes them from the whole decomposition; and what trains goes on from there as PEFT's does."""
    made, base = started(tuner="lora", init="pissa"), Checkpoint(checkpoint_folder)
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        use_rslora=True,
        init_lora_weights="pissa",
        target_modules=list(made.training.target_modules),
    )
    theirs = get_peft_model(load_plain(checkpoint_folder), config).eval()
    chosen = dict(theirs.named_parameters())
    for name, parameter in made.chosen:
        if "lora_B" in name:
            other = name.replace("lora_B", "lora_A")
            ours = parameter.detach() @ made.model.get_parameter(other).detach()
            expected = chosen[f"base_model.model.{name}"] @ chosen[f"base_model.model.{other}"]
            # of nearly equal singular values either may come first: both take as much of the weight
            assert float(ours.norm()) == pytest.approx(float(expected.detach().norm()), rel=0.01), name
            rest = base.read(f"{name.split('.lora_')[0]}.weight") - made.training.adapter_scale * ours
            least = theirs.get_submodule(f"base_model.model.{name.split('.lora_')[0]}").base_layer.weight
            assert float(rest.norm()) == pytest.approx(float(least.norm()), rel=0.01), name
    with torch.no_grad():
        for name, parameter in made.chosen:  # the same factors in both: singular vectors have either sign
            mine = f"base_model.model.{name}"
            layer = theirs.get_submodule(mine.rsplit(".lora_", 1)[0])
            if "lora_A" in name:
                layer.base_layer.weight += layer.get_delta_weight("default")
            chosen[mine].copy_(parameter)
            if "lora_B" in name:
                layer.base_layer.weight -= layer.get_delta_weight("default")
    torch.testing.assert_close(logits(theirs), logits(load_plain(checkpoint_folder)), rtol=1e-4, atol=1e-5)
    for model in (made.model, theirs):
        model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    for name, parameter in made.chosen:
        wanted = chosen[f"base_model.model.{name}"].grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()), msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tuner": "dora", "init": "pissa"}, "init: dora has nothing that could begin as pissa does"),
        ({"tuner": "ia3"}, "rank: ia3 has no factors of a rank"),
        ({"tuner": "ia3", "rank": None, "lora_plus": 4}, "lora_plus: ia3 has no second factor"),
        ({"tuner": "ia3", "rank": None, "quantize_aware": True}, "quantize_aware: ia3 changes a weight by more than"),
        ({"tuner": "adapter", "lora_alpha": 8}, "lora_alpha: adapter has no product that it would scale"),
        ({"tuner": "adapter", "lora_plus": 4}, "lora_plus: adapter has no second factor"),
        ({"tuner": "adapter", "init": "pissa"}, "init: adapter has nothing that could begin as pissa does"),
        ({"tuner": "adapter", "quantize_aware": True}, "quantize_aware: adapter changes a weight by more than"),
        (
            {"tuner": "lora", "adapter_at": "mlp"},
            "adapter_at: says where adapters lie that no weight can hold, and lora",
        ),
        (
            {"tuner": "adapter", "target": "ort-int4"},
            "target ort-int4: runs in ort-genai, which computes with a model's weights: these adapters lie beside them"
            "\n\nhint: name onnx-portable-int8 or onnx-portable-fp32, or train what a weight can hold",
        ),
        ({"tuner": "adapter", "target": "gguf-q8_0"}, r"target gguf-q8_0: runs in llama\.cpp, which computes with"),
        ({"tuner": "full", "init": "pissa"}, "init: full has nothing that could begin as pissa does"),
        ({"init": "pissa", "quantize_aware": True}, "quantize_aware: init=pissa changes a weight by two products"),
        ({"tuner": "dora", "quantize_aware": True}, "quantize_aware: dora changes a weight by more than a product"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(settings: dict[str, Any], message: str, plan_file: Any) -> None:
    with pytest.raises(BadInput, match=message):
        plan_file(**settings)


@pytest.mark.parametrize(
    ("tuner", "form", "kind"),
    [(*start, kind) for start in STARTS for kind in ("gpt2", "llama" if TUNERS[start[0]].shifts else "qwen2")],
)
def test_transposed_matrices_and_biases_merge_as_they_compute(
    tuner: str, form: tuple[str, str], kind: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """GPT-2 holds matrices as inputs x outputs, square ones too; Qwen2 has biases, no part of a row's length.

    What adds after attention finds a bias in GPT-2, and gets one in a Llama.
    """
    spec = save_model(tmp_path / "base", kind, **({"n_inner": 192} if kind == "gpt2" else {}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes((tokenizer_folder / name).read_bytes())
    biased = load_file(tmp_path / "base" / "model.safetensors")
    moved = {
        name: tensor + 0.1 * torch.randn_like(tensor) if "bias" in name else tensor for name, tensor in biased.items()
    }
    save_file(moved, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    training = plan_of(spec, range(2), tuner=tuner, **dict([form]))
    change_at_random(tmp_path / "base", training, tmp_path / "tuned")
    merge(tmp_path / "tuned", tmp_path / "merged", wise_alpha=0.7, progress=silent, base=str(tmp_path / "base"))
    shares = Shares(rest=0.7)
    folders = tmp_path / "base", tmp_path / "tuned", tmp_path / "merged"
    assert merged_rung(*folders, training, shares).problems == ()
    assert bool(_moved(tmp_path / "base", tmp_path / "merged")) == TUNERS[tuner].folds
    live = logits(load_changed(tmp_path / "base", tmp_path / "tuned", training, shares))
    assert (live - logits(load_plain(tmp_path / "base"))).abs().max() > 1e-4
    torch.testing.assert_close(logits(load_plain(tmp_path / "merged")), live, rtol=1e-4, atol=2e-5)
    streamed = load_changed(tmp_path / "base", tmp_path / "tuned", training, shares, load_streamed)
    assert torch.equal(logits(streamed), live)  # layer by layer from the files, as a proof of a large model has it
