"""w * h + b of what attention gives: the formula, what of it a merge holds where, and who has no place for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import run, save_model, write_plan

from edgeft.errors import BadInput
from edgeft.exporting.outputs import load_tuned
from edgeft.merging.merge import merge
from edgeft.merging.merged_tensors import merged_rung
from edgeft.merging.sweep import Line
from edgeft.models.checkpoint import load_plain
from edgeft.models.layer_shares import Group, Shares
from edgeft.planning.plan import Plan, make_plan
from edgeft.progress import silent
from edgeft.settings.job import make_job
from edgeft.training.result import TrainResult

IDS = torch.arange(5, 37).reshape(2, 16)
OUT = "self_attn.o_proj"
SETTINGS: dict[str, Any] = {"tuner": "h-adapter", "rank": None, "layers": "all", "base_precision": "fp32"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def trained(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    run(write_plan(folder, checkpoint_folder, epochs=2.0, learning_rate=5e-2, **SETTINGS), folder / "train")
    return folder / "train"


def in_float64(base: Path, trained: Path, share: float = 1.0) -> Any:
    """Plain transformers' model of the base with the formula written out after each attention, in float64."""
    model, tensors = load_plain(base).double(), load_file(trained / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith("hadamard.weight")]:
        w, b = tensors[name].double(), tensors[name.replace("weight", "bias")].double()
        place = name.removeprefix("base_model.model.").removesuffix(".hadamard.weight")
        model.get_submodule(place).register_forward_hook(
            lambda module, given, h, w=w, b=b: (1 + share * (w - 1)) * h + share * b
        )
    return model


def test_what_was_trained_is_the_formula(trained: Path, checkpoint_folder: Path) -> None:
    names = load_file(trained / "adapter_model.safetensors")
    assert sorted(names) == [f"base_model.model.model.layers.{n}.{OUT}.hadamard.{part}" for n in (0, 1)
                             for part in ("bias", "weight")]  # fmt: skip
    ours = logits(load_tuned(trained, TrainResult.read(trained / "train.json")))
    expected = logits(in_float64(checkpoint_folder, trained))
    assert (expected - logits(load_plain(checkpoint_folder))).abs().max() > 0.02
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_merge_gives_attention_the_biases_that_hold_it(
    share: float, trained: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    """At 0 it is the base, byte for byte: no bias either."""
    result, shares = TrainResult.read(trained / "train.json"), Shares(rest=share)
    merge(trained, tmp_path / "merged", wise_alpha=share, progress=silent)
    assert not merged_rung(checkpoint_folder, trained, tmp_path / "merged", result.training, shares).problems
    model = load_plain(tmp_path / "merged")
    torch.testing.assert_close(
        logits(model).double(), logits(in_float64(checkpoint_folder, trained, share)), rtol=1e-4, atol=2e-5
    )
    line = Line(trained, checkpoint_folder, tied=True)
    line.move_to(shares)
    assert torch.equal(logits(line.model), logits(model))  # what a sweep scores is what a merge writes
    names = ["config.json", "model.safetensors"]
    same = [(tmp_path / "merged" / name).read_bytes() == (checkpoint_folder / name).read_bytes() for name in names]
    if not share:
        assert same == [True, True]
        return
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint_folder, tmp_path / "merged"))
    learnt = load_file(trained / "adapter_model.safetensors")
    for name in after.keys() - before.keys():
        b = learnt.get(f"base_model.model.{name.removesuffix('bias')}hadamard.bias")
        assert torch.equal(after[name], torch.zeros_like(after[name]) if b is None else b * share), name
    assert len(after) - len(before) == 2 * 4  # query, key, value and output in two layers
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["attention_bias"] is True


def test_layers_have_shares_of_their_own(trained: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    shares = Shares(rest=1.0, groups=(Group(first=0, last=0, wise_alpha=0.0),))
    merge(trained, tmp_path / "merged", wise_alpha=shares, progress=silent)
    result = TrainResult.read(trained / "train.json")
    assert not merged_rung(checkpoint_folder, trained, tmp_path / "merged", result.training, shares).problems
    live = logits(load_tuned(trained, result, shares))
    torch.testing.assert_close(logits(load_plain(tmp_path / "merged")), live, rtol=1e-4, atol=2e-5)


FAULTS: dict[str, Any] = {
    "a bias dropped": lambda tensors: tensors[f"model.layers.1.{OUT}.bias"].zero_(),
    "a bias a little off": lambda tensors: tensors[f"model.layers.1.{OUT}.bias"][:1].mul_(1 + 2.0**-20),
    "one of query that is none": lambda tensors: tensors["model.layers.1.self_attn.q_proj.bias"][:1].add_(1e-9),
    "rows of the base": lambda tensors: tensors[f"model.layers.0.{OUT}.weight"].mul_(1.001),
    "one missing": lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.bias"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_merge_that_is_a_little_off_is_no_merge(
    fault: str, trained: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    result = TrainResult.read(trained / "train.json")
    merge(trained, tmp_path / "merged", wise_alpha=1.0, progress=silent)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    FAULTS[fault](tensors)
    save_file(tensors, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    problems = merged_rung(checkpoint_folder, trained, tmp_path / "merged", result.training, Shares()).problems
    assert len(problems) == 1


def test_a_config_that_says_more_than_the_biases_is_no_merge(
    trained: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    result = TrainResult.read(trained / "train.json")
    merge(trained, tmp_path / "merged", wise_alpha=1.0, progress=silent)
    path = tmp_path / "merged" / "config.json"
    config = json.loads(path.read_text())
    for key in ("attention_bias", "mlp_bias"):
        path.write_text(json.dumps(config | {key: key == "mlp_bias"}))
        problems = merged_rung(checkpoint_folder, trained, tmp_path / "merged", result.training, Shares()).problems
        assert any(f"config.json: {key} is" in line for line in problems)


def test_a_bundle_is_planned_with_the_biases(plan_file: Any) -> None:
    plans = [Plan.read(plan_file(tuner=tuner, rank=None, target="ort-fp32")) for tuner in ("ia3", "h-adapter")]
    weights = [next(term.bytes for phase in plan.stages.phases if phase.name == "bundle" for term in phase.terms
                    if term.name == "weights") for plan in plans]  # fmt: skip
    spec = plans[0].spec
    width = sum(linear.out_features for linear in spec.linears if linear.role.startswith("attention"))
    assert weights[1] - weights[0] == 4 * width * spec.num_hidden_layers


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("qwen2", {}, "tuner: h-adapter adds a vector after attention, and Qwen2ForCausalLM has no place for one"),
        ("olmo", {}, "tuner: h-adapter adds a vector after attention, and OlmoForCausalLM has no place for one"),
        (
            "qwen3",
            {"target": "gguf-q8_0"},
            r"target gguf-q8_0: llama\.cpp adds no bias to what attention gives in qwen3",
        ),
    ],
)
def test_who_has_no_place_for_it_is_refused_by_name(
    kind: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_model(tmp_path / kind, kind)
    with pytest.raises(BadInput, match=message + r".*\n\nhint: .*use tuner=lora or tuner=ia3"):
        make_plan(make_job(model=str(tmp_path / kind), profile="cpu-8gb", tuner="h-adapter", **settings))
    if settings:
        make_plan(make_job(model=str(tmp_path / kind), profile="cpu-8gb", tuner="h-adapter", target="ort-fp32"))
