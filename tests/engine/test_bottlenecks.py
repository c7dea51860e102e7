"""Adapters that no weight can hold: their formula, their share, what lies beside a merge, and what reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from beside import computes_as_trained
from safetensors.torch import load_file, save_file
from tiny import run, save_model, write_plan

from edgeft.errors import BadInput
from edgeft.exporting.build import build_bundle
from edgeft.exporting.outputs import load_as_trained, load_tuned
from edgeft.merging.merge import merge
from edgeft.merging.merged_tensors import merged_rung
from edgeft.merging.result import MergedCheckpoint
from edgeft.merging.sweep import Line, sweep
from edgeft.models.checkpoint import load_plain
from edgeft.models.evaluate import evaluate
from edgeft.models.headers import BOTTLENECKS
from edgeft.models.layer_shares import Group, Shares
from edgeft.models.parts import find_parts
from edgeft.planning.plan import Plan, make_plan
from edgeft.progress import silent
from edgeft.settings.job import make_job
from edgeft.targets.target import candidates, load_target
from edgeft.training.job_data import Data
from edgeft.training.result import TrainResult

IDS = torch.arange(5, 37).reshape(2, 16)
CPU = torch.device("cpu")
PLACES = ("both", "mlp", "parallel")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=PLACES)
def trained(request: Any, checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {"tuner": "adapter", "adapter_at": request.param, "layers": "all", "base_precision": "fp32"}
    run(write_plan(folder, checkpoint_folder, epochs=2.0, learning_rate=1e-2, **settings), folder / "train")
    return folder / "train"


def formula(down: torch.Tensor, up: torch.Tensor, share: float, *, of_output: bool) -> Any:
    """A hook that adds s W_up GELU(W_down h) to a module's output."""

    def added(module: Any, given: Any, made: torch.Tensor) -> torch.Tensor:
        low = (made if of_output else given[0]) @ down.T
        return made + share * (low * 0.5 * (1 + torch.erf(low / 2**0.5))) @ up.T

    return added


def in_float64(base: Path, trained: Path, share: float = 1.0) -> Any:
    """Plain transformers' model of the base with the formula written out: h + s W_up GELU(W_down h), in float64."""
    model, tensors = load_plain(base).double(), load_file(trained / "adapter_model.safetensors")
    for name, down in tensors.items():
        if not name.endswith(".down.weight"):
            continue
        path, _, where = name.removeprefix("base_model.model.").removesuffix(".down.weight").rpartition(".")
        up = tensors[name.replace(".down.", ".up.")].double()

        model.get_submodule(path).register_forward_hook(formula(down.double(), up, share, of_output=where == "adapter"))
    return model


def test_what_was_trained_is_the_formula(trained: Path, checkpoint_folder: Path) -> None:
    result = TrainResult.read(trained / "train.json")
    at = result.training.adapter_at
    names = load_file(trained / "adapter_model.safetensors")
    assert len(names) == 2 * 2 * (2 if at == "both" else 1)  # two matrices in each of two layers
    assert all((".mlp.parallel_adapter." in name) == (at == "parallel") for name in names)
    ours, expected = logits(load_tuned(trained, result)), logits(in_float64(checkpoint_folder, trained))
    assert (expected - logits(load_plain(checkpoint_folder))).abs().max() > 0.02
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_merge_has_their_share_beside_the_bases_own_bytes(
    share: float, trained: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    found = computes_as_trained(trained, checkpoint_folder, tmp_path / "merged", BOTTLENECKS, share, logits)
    torch.testing.assert_close(
        found.double(), logits(in_float64(checkpoint_folder, trained, share)), rtol=1e-4, atol=2e-5
    )


def test_layers_have_shares_of_their_own(trained: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    shares = Shares(rest=1.0, groups=(Group(first=0, last=0, wise_alpha=0.0),))
    made = merge(trained, tmp_path / "merged", wise_alpha=shares, progress=silent)
    kept = load_file(tmp_path / "merged" / BOTTLENECKS)
    assert made.beside == len(kept) // 2 and not any(".layers.0." in name for name in kept)
    line = Line(trained, checkpoint_folder, tied=True)
    line.move_to(shares)
    assert torch.equal(logits(line.model), logits(load_plain(tmp_path / "merged")))


FAULTS: dict[str, Any] = {
    "dropped": lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name],
    "halved": lambda tensors: [tensors[name].mul_(0.5) for name in tensors if name.endswith("up.weight")],
    "a value a little off": lambda tensors: next(iter(tensors.values()))[0, 0].mul_(1 + 2.0**-20),
    "one more": lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.adapter.up.weight": torch.ones(2, 2)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_merge_that_is_a_little_off_is_no_merge(
    fault: str, trained: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    result = TrainResult.read(trained / "train.json")
    merge(trained, tmp_path / "merged", wise_alpha=1.0, progress=silent)
    tensors = load_file(tmp_path / "merged" / BOTTLENECKS)
    FAULTS[fault](tensors)
    save_file(tensors, tmp_path / "merged" / BOTTLENECKS)
    assert merged_rung(checkpoint_folder, trained, tmp_path / "merged", result.training, Shares()).problems


def test_it_is_scored_as_it_was_trained(trained: Path) -> None:
    result = TrainResult.read(trained / "train.json")
    assert {unit.relative_change for unit in result.units} == {None}
    data = Data.read(result.plan)
    model, compute = load_as_trained(trained, result)
    scores = evaluate(model, find_parts(model), data.valid[:4], data.tokenizer, device=CPU, compute=compute)
    assert scores.loss == pytest.approx(result.valid.loss, rel=1e-6) and result.valid.loss < result.base_valid.loss


def test_what_would_leave_them_out_refuses_the_folder(trained: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge(trained, merged, wise_alpha=1.0, progress=silent)
    told = MergedCheckpoint.read(merged / "merged.json").notes
    assert told == (f"other tools than edgeft read the base alone here: the adapters are in {BOTTLENECKS}",)
    with pytest.raises(BadInput, match=r"holds adapters beside its weights .*, which training would leave out"):
        make_plan(make_job(model=str(merged), profile="cpu-8gb"))
    with pytest.raises(BadInput, match="which a merge would leave out\n\nhint: use the base that they were trained"):
        merge(trained, tmp_path / "again", wise_alpha=1.0, progress=silent, base=str(merged))
    with pytest.raises(BadInput, match="target ort-int4: runs in ort-genai, which computes with a model's weights"):
        build_bundle(merged, load_target("ort-int4"), tmp_path / "bundle", prompts=[])
    with pytest.raises(BadInput, match="target ort-int4: runs in ort-genai"):
        sweep(trained, load_target("ort-int4"), select="best")
    other = load_file(merged / BOTTLENECKS)
    save_file({f"model.layers.9.{name}": tensor for name, tensor in other.items()}, merged / BOTTLENECKS)
    with pytest.raises(BadInput, match="does not fit the model beside it"):
        load_plain(merged)


def test_a_sweep_measures_their_shares(trained: Path) -> None:
    found = sweep(trained, load_target("onnx-portable-fp32"), select="best", golden=True)
    losses = {point.wise_alpha: point.task.loss for point in found.points}
    result = TrainResult.read(trained / "train.json")
    assert losses[0.0] == pytest.approx(result.base_valid.loss, rel=1e-5)
    assert losses[1.0] == pytest.approx(result.valid.loss, rel=1e-5)


def test_auto_is_the_smallest_that_can_run_them(plan_file: Any) -> None:
    assert [each.name for each in candidates("auto", beside=True)] == ["onnx-portable-int8", "onnx-portable-fp32"]
    plan, other = Plan.read(plan_file(tuner="adapter")), Plan.read(plan_file(tuner="lora", target="onnx-portable-int8"))
    assert plan.stages.target == other.stages.target
    weights = [next(term.bytes for phase in each.stages.phases if phase.name == "bundle" for term in phase.terms
                    if term.name == "weights") for each in (plan, other)]  # fmt: skip
    hidden, rank = plan.spec.hidden_size, plan.training.rank
    codes = 2 * hidden * rank + 5 * (hidden + rank)  # 8 bits, a scale and a zero point for each output
    assert weights[0] - weights[1] == 2 * 2 * codes  # two places in each of two layers


def test_a_model_without_a_place_for_them_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "opt", "opt", ffn_dim=192, word_embed_proj_dim=64)
    with pytest.raises(BadInput, match="adapter_at: this model's MLP is in its layers' own code"):
        make_plan(make_job(model=str(tmp_path / "opt"), profile="cpu-8gb", tuner="adapter", adapter_at="parallel"))
