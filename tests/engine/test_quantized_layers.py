"""quantize_aware: the codes that training saw are those of the merge and of the artifact, and nothing else passes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import CONFIGS, EXAMPLE, ROWS, SECTIONS, qwen3_folder, run

from edgeft.engine import quantized_layers
from edgeft.engine.quantized_layers import Rounded, plain_name, rounded_modules
from edgeft.errors import BadInput
from edgeft.exporting.outputs import load_as_trained, load_tuned, observe_model
from edgeft.exporting.stored_codes import GraphFile
from edgeft.exporting.trained_rung import trained_rung
from edgeft.merging.merge import merge
from edgeft.models.checkpoint import Checkpoint
from edgeft.models.folding import folded
from edgeft.models.spec import read_model_spec
from edgeft.planning.plan import Plan, make_plan
from edgeft.progress import silent
from edgeft.settings.job import make_job
from edgeft.targets import gguf_file
from edgeft.targets.grid import Grid
from edgeft.targets.ort import build_model
from edgeft.targets.rounding import grids_of_shapes
from edgeft.targets.target import load_target
from edgeft.training import train as train_module
from edgeft.training.job_data import Data

LISA = {"tuner": "full", "layers": "lisa", "active_layers": 1, "lisa_interval": 2}
MODES: dict[str, dict[str, Any]] = {
    "LoRA": {"tuner": "lora", "rank": 4},
    "LoRA for gguf-q4_0, recomputed": {"tuner": "lora", "rank": 4, "target": "gguf-q4_0", "checkpointing": True},
    "rotating adapters": {"tuner": "lora", "rank": 4, "layers": "lisa", "active_layers": 1, "lisa_interval": 2},
    "sparse adapters": {"tuner": "lora", "rank": 4, "layers": "sparse", "trained_layers": "1"},
    "full": {"tuner": "full", "layers": "all"},
    "sparse": {"tuner": "full", "layers": "sparse", "trained_layers": "0"},
    "lisa": LISA,
    "lisa, ends rotate": {**LISA, "embedding": "rotate", "norm": "rotate"},
    "lisa, the embedding always": {**LISA, "embedding": "on"},
}
Seen = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_folder(tmp_path_factory.mktemp("model"), tokenizer_folder, layers=2)


@pytest.fixture
def planned(model_folder: Path, write_rows: Any, tmp_path: Path) -> Any:
    """Writes the plan of a job on ROWS and gives its path."""

    def write(**settings: Any) -> Path:
        values = {
            "model": str(model_folder), "data": str(write_rows("rows.jsonl", ROWS)), "profile": "cpu-8gb",
            "batch_size": 4, "max_steps": 5, "eval_rows": 4, "learning_rate": 3e-3, "quantize_aware": True, **settings,
        }  # fmt: skip
        path = tmp_path / "plan.json"
        make_plan(make_job(**values)).write(path)
        return path

    return write


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Every weight of the model that was scored, by its name in the checkpoint."""
    found: Seen = {}

    def settle(model: Any) -> None:
        last = {id(each.weight): each.shipped(each.weight.dtype) for each in rounded_modules(model) if each.trains}
        quantized_layers.settle(model)
        for name, weight in model.named_parameters():
            if ".lora_" not in name:
                found[plain_name(name)] = weight.detach().float().clone()
            if id(weight) in last:  # what forward passes computed with until then
                assert torch.equal(last[id(weight)], weight), name

    monkeypatch.setattr(train_module, "settle", settle)
    return found


def other_weights(seen: Seen, merged: Path, target: str, held: torch.dtype = torch.float32) -> list[str]:
    """Weights that the target would not make of a merge as training saw them, `held` in the dtype of a base."""
    checkpoint = Checkpoint(merged)
    names = {name: checkpoint.find(name) for name in seen}
    shapes = {name: tuple(seen[name].shape) for name in names}
    grids = grids_of_shapes(shapes, load_target(target), tied=True)
    assert len(grids) == 2 * 7 + 1
    stored = {name: checkpoint.read(str(names[name])).float() for name in grids}
    made = {name: grid.encode(stored[name]).weight().to(held).float() for name, grid in grids.items()}
    return [name for name, weight in made.items() if not torch.equal(weight, seen[name].to(held).float())]


@pytest.mark.parametrize("mode", MODES)
def test_what_was_scored_is_what_the_target_makes_of_the_merge(
    mode: str, planned: Any, seen: Seen, tmp_path: Path
) -> None:
    target = str(MODES[mode].get("target", "ort-int4"))
    result = run(planned(**MODES[mode]), tmp_path / "train")
    assert result.scored_as == target and result.steps == 5
    merge(tmp_path / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    assert other_weights(seen, tmp_path / "merged", target) == []
    # loaded anew the model is the one that was scored; unrounded it is another
    data = Data.read(result.plan, train=False)
    model, compute = load_as_trained(tmp_path / "train", result)
    rows = data.valid[: result.plan.training.eval_rows]
    form = observe_model("trained", model, rows, compute=compute, group_tokens=result.plan.training.group_tokens)
    assert trained_rung(form, result.valid, compute, "cpu").problems == ()
    unrounded = observe_model("tuned", load_tuned(tmp_path / "train", result), rows)
    assert trained_rung(unrounded, result.valid, compute, "cpu").problems


@pytest.mark.parametrize("mode", ["LoRA", "lisa"])
def test_a_base_in_half_precision_sees_the_same_codes(mode: str, planned: Any, seen: Seen, tmp_path: Path) -> None:
    """A GPU's plan in bf16, carried out on the CPU under autocast."""
    path = planned(**MODES[mode], profile="l4-24gb", base_precision="bf16")
    plan = Plan.read(path)
    assert plan.training.compute_dtype == "bf16"
    result = run(path, tmp_path / "train", emulate=True)
    merge(tmp_path / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    assert other_weights(seen, tmp_path / "merged", "ort-int4", torch.bfloat16) == []
    model, compute = load_as_trained(tmp_path / "train", result)
    rows = Data.read(plan, train=False).valid[: plan.training.eval_rows]
    form = observe_model("trained", model, rows, compute=compute, group_tokens=plan.training.group_tokens)
    assert trained_rung(form, result.valid, compute, "cpu").problems == ()


def symmetric(*args: Any) -> dict[str, Grid]:
    return {name: replace(grid, symmetric=True) for name, grid in grids_of_shapes(*args).items()}


@pytest.mark.parametrize("what, fault", [("grids_of_shapes", symmetric), ("stored_in", lambda training: torch.float32)])
def test_another_grid_or_another_dtype_is_caught(
    what: str, fault: Any, planned: Any, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_layers, what, fault)
    run(planned(**MODES["LoRA"], max_steps=2), tmp_path / "train")
    merge(tmp_path / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    assert len(other_weights(seen, tmp_path / "merged", "ort-int4")) >= 14


def onnx_weights(merged: Path, folder: Path) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """(the checkpoint's names, their weights one under the other) as the nodes of model.onnx decode them."""
    build_model(merged, load_target("ort-int4"), read_model_spec(str(merged)), folder)
    file = GraphFile(folder)
    for held in file.matrices(Checkpoint(merged), True):
        codes, scales, zeros = (file.read(name) for name in held.inputs[:3])
        rows = len(codes)
        codes, zeros = (unpacked(each.reshape(rows, -1), held.bits) for each in (codes, zeros))
        scales = scales.reshape(rows, -1, 1)
        blocks = codes.reshape(rows, scales.shape[1], 32).astype(np.float32)
        values = (blocks - zeros.reshape(rows, -1, 1)[:, : scales.shape[1]]) * scales
        yield held.names, torch.from_numpy(values.reshape(rows, -1))


def gguf_weights(merged: Path, folder: Path) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """The same of a GGUF file, by ggml's own decoding."""
    import gguf

    gguf_file.build_model(merged, load_target("gguf-q4_0"), read_model_spec(str(merged)), folder)
    places = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
              "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
              "ffn_down": "mlp.down_proj"}  # fmt: skip
    for tensor in gguf.GGUFReader(next(folder.glob("*.gguf"))).tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        parts = tensor.name.split(".")
        if tensor.name == "token_embd.weight":
            yield ("model.embed_tokens.weight",), values
        elif len(parts) == 4 and parts[2] in places:
            yield (f"model.layers.{parts[1]}.{places[parts[2]]}.weight",), values


@pytest.mark.parametrize("target, weights", [("ort-int4", onnx_weights), ("gguf-q4_0", gguf_weights)])
def test_the_artifacts_hold_the_codes_of_the_last_forward_pass(
    target: str, weights: Any, planned: Any, seen: Seen, tmp_path: Path
) -> None:
    run(planned(**MODES["LoRA"], target=target), tmp_path / "train")
    merge(tmp_path / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    (tmp_path / "bundle").mkdir()
    compared = 0
    for names, found in weights(tmp_path / "merged", tmp_path / "bundle"):
        assert torch.equal(found, torch.cat([seen[name] for name in names])), names
        compared += len(names)
    assert compared == 2 * 7 + 1


def unpacked(packed: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1) if bits == 4 else packed


def hand_written(x: torch.Tensor, d: torch.Tensor, rounded: Rounded) -> dict[str, torch.Tensor]:
    """Gradients by the rule, in fp64: at x by Q(M), at the factors of M = W0 + s B A as if Q were not there."""
    weight, change = rounded.weight.detach(), rounded.change()
    assert change is not None
    merged = folded(weight, change.left, change.right, change.scale).bfloat16().float()
    shipped = rounded.grid.encode(merged).weight().double()
    of_merged = d.double().flatten(0, 1).T @ x.double().flatten(0, 1)
    return {
        "y": x.double() @ shipped.T, "x": d.double() @ shipped,
        "left": change.scale * of_merged @ change.right.double().T,
        "right": change.scale * change.left.double().T @ of_merged,
    }  # fmt: skip


def test_gradients_pass_straight_through() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40, bias=False)
    linear.weight.data = linear.weight.data.bfloat16().float()
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["0"])
    module: Any = inject_adapter_in_model(config, torch.nn.Sequential(linear))[0]
    torch.nn.init.normal_(module.lora_B["default"].weight, std=0.02)
    rounded = Rounded(module, Grid(4, 32, False, "rtn"), torch.bfloat16, module.forward)
    linear.weight.requires_grad_(False)
    x, d = torch.randn(2, 7, 96, requires_grad=True), torch.randn(2, 7, 40)
    y = rounded(x)
    y.backward(d)
    wanted = hand_written(x.detach(), d, rounded)
    found = {"y": y, "x": x.grad, "left": module.lora_B["default"].weight.grad,
             "right": module.lora_A["default"].weight.grad}  # fmt: skip
    for name, expected in wanted.items():
        torch.testing.assert_close(found[name].detach().double(), expected, rtol=1e-4, atol=1e-5)
    plain = module.base_layer(x) + 8 / 4**0.5 * module.lora_B["default"](module.lora_A["default"](x))
    assert (plain - y).abs().max() > 0.01  # the unrounded product is another one


@pytest.mark.parametrize("mode", ["LoRA", "lisa, ends rotate"])
def test_stopped_and_resumed_ends_bit_for_bit_the_same(mode: str, planned: Any, tmp_path: Path) -> None:
    path = planned(**MODES[mode])
    whole = run(path, tmp_path / "whole")

    def interrupt(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        if stage == "train" and done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "stopped", progress=interrupt)
    resumed = run(path, tmp_path / "stopped")
    assert len(resumed.resumed_at) == 1
    expected, found = ({name: value for file in sorted((tmp_path / run).glob("*.safetensors"))
                        for name, value in load_file(file).items()} for run in ("whole", "stopped"))  # fmt: skip
    assert expected
    assert expected.keys() == found.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert resumed.loss_curve == whole.loss_curve and resumed.valid == whole.valid


def test_a_real_model_learns_while_it_is_rounded(tmp_path: Path, write_rows: Any, seen: Seen) -> None:
    lines = (SECTIONS / "train.jsonl").read_text(encoding="utf-8").splitlines()
    data, valid = (
        write_rows(f"{name}.jsonl", rows) for name, rows in (("train", lines[:96]), ("valid", lines[96:120]))
    )
    job = make_job(
        model=str(EXAMPLE), data=str(data), valid=str(valid), profile="cpu-8gb",
        tuner="lora", rank=16, batch_size=8, max_steps=12, eval_rows=24, quantize_aware=True,
    )  # fmt: skip
    make_plan(job).write(tmp_path / "plan.json")
    result = run(tmp_path / "plan.json", tmp_path / "train")
    assert result.base_valid.loss > 5 and result.valid.loss < 2.5
    assert load_file(EXAMPLE / "model.safetensors").keys() == seen.keys()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"base_precision": "nf4"}, r"quantize_aware: an NF4 base is rounded, the merge adds to the original weights"),
        ({"base_precision": "bf16", "stored": "float32"}, r"a base in bf16 is not what is stored, float32"),
        ({"target": "ort-int4-calibrated"}, r"target ort-int4-calibrated chooses its codes on training rows"),
        ({"target": "gguf-q4_k_m"}, r"target gguf-q4_k_m rounds in a way that is not computed here"),
        ({"target": "onnx-portable-int8"}, r"onnx-portable-int8 rounds in a way that is not computed here"),
        ({"target": "ort-fp32"}, r"target ort-fp32 keeps weights in 32 bits: there is nothing to train for"),
        ({"model": "gpt2"}, r"gpt2 keeps its matrices transposed"),
        ({"model": "mixtral-8x7b"}, r"and its like are put together from several tensors"),
    ],
)
def test_what_could_not_be_equal_is_refused(settings: dict[str, Any], message: str, model_folder: Path) -> None:
    values = {"model": str(model_folder), "profile": "cpu-8gb", "quantize_aware": True, **settings}
    if "model" in settings:
        values["model"] = str(CONFIGS / settings["model"])
    spec = read_model_spec(values["model"])
    if stored := values.pop("stored", None):
        spec = spec.model_copy(update={"dtype": stored})
    with pytest.raises(BadInput, match=message):
        make_plan(make_job(**values), spec=spec)


def test_a_tuner_that_training_does_not_fold_in_is_refused(model_folder: Path) -> None:
    with pytest.raises(BadInput, match=r"quantize_aware: dora changes a weight by more than a product of two factors"):
        make_plan(make_job(model=str(model_folder), profile="cpu-8gb", quantize_aware=True, tuner="dora"))


def test_a_plan_says_what_it_trains_for_and_counts_it(planned: Any) -> None:
    plan = Plan.read(planned(**MODES["LoRA"], micro_batch_size=4, checkpointing=False))
    plain = Plan.read(planned(**MODES["LoRA"], micro_batch_size=4, checkpointing=False, quantize_aware=False))
    aim = plan.training.quantize_aware
    assert aim is not None and aim.name == "ort-int4" and plan.training.stored_dtype == "bfloat16"
    assert any("rounded as ort-int4 will hold it, the smallest that auto tries" in note for note in plan.notes)
    assert plan.training.base_precision == "fp32" and plain.training.quantize_aware is None
    assert plan.seconds_per_step > plain.seconds_per_step
