"""Rotating layers through the real trainer: 4-bit and dense bases, adapters, killed runs, and what is kept of them."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import qwen3_folder

from edgeft.documents import sha256_file
from edgeft.errors import BadInput
from edgeft.memory import disk
from edgeft.merging.merge import merge
from edgeft.models.checkpoint import TensorFile, load_plain, read_changed
from edgeft.planning.plan import Plan, make_plan
from edgeft.progress import silent
from edgeft.settings.job import make_job
from edgeft.training.result import TrainResult
from edgeft.training.train import train
from edgeft.training.work import work_folder

ROWS = [
    {"prompt": f"Package: lib{i}\nSection:", "completion": f" {('libs', 'doc', 'python')[i % 3]}"} for i in range(36)
]
LISA = {"tuner": "full", "layers": "lisa", "active_layers": 1, "lisa_interval": 3}
STREAMED = {"stream_layers": True, "checkpointing": True}
MODES: dict[str, dict[str, Any]] = {
    "lisa": LISA,
    "lisa, parked": {**LISA, "lisa_state": "park", "lisa_schedule": "uniform"},
    "lisa, ends rotate": {**LISA, "embedding": "rotate", "head": "on", "norm": "rotate"},
    "lisa, recomputed": {**LISA, "checkpointing": True},
    "lisa on nf4": {**LISA, "base_precision": "nf4"},
    "lisa on nf4, parked": {**LISA, "base_precision": "nf4", "lisa_state": "park", "active_layers": 2},
    "lisa, streamed": {**LISA, **STREAMED, "lisa_state": "park", "lisa_schedule": "uniform"},
    "lisa on nf4, streamed": {**LISA, **STREAMED, "base_precision": "nf4"},
    "rotating adapters": {"tuner": "lora", "rank": 4, "layers": "lisa", "active_layers": 1, "lisa_interval": 3},
    "sparse": {"tuner": "full", "layers": "sparse", "active_layers": 2, "layer_score": "random"},
    "sparse on nf4": {"tuner": "full", "layers": "sparse", "trained_layers": "1,3", "base_precision": "nf4"},
    "sparse adapters": {"tuner": "lora", "rank": 4, "layers": "sparse", "trained_layers": "0,2"},
}


@pytest.fixture(scope="module")
def deep_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_folder(tmp_path_factory.mktemp("deep"), tokenizer_folder, layers=4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache of quantised bases for all tests of this file, none of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "nf4-cache"))


@pytest.fixture
def planned(deep_folder: Path, write_rows: Any, tmp_path: Path) -> Any:
    """Writes the plan of a job on ROWS and gives its path."""

    def write(**settings: Any) -> Path:
        data = write_rows("rows.jsonl", ROWS)
        values = {"profile": "cpu-8gb", "batch_size": 4, "max_steps": 14, "epochs": 3.0, "eval_rows": 4, **settings}
        if values.get("head") == "on":
            values |= {"model": str(untied(deep_folder, tmp_path))}
        path = tmp_path / "plan.json"
        make_plan(make_job(**{"model": str(deep_folder), "data": str(data), "learning_rate": 3e-3, **values})).write(
            path
        )
        return path

    return write


def untied(folder: Path, tmp_path: Path) -> Path:
    import json
    import shutil

    out = tmp_path / "untied"
    if not out.exists():
        shutil.copytree(folder, out)
        model = load_plain(folder)
        config = json.loads((folder / "config.json").read_text())
        state = {**model.state_dict(), "lm_head.weight": model.lm_head.weight.detach().clone()}
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, out / "model.safetensors")
        (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return out


def run(path: Path, out: Path, **options: Any) -> TrainResult:
    return train(Plan.read(path), out, plan_sha256=sha256_file(path), progress=options.pop("progress", silent))


def tensors(out: Path) -> dict[str, torch.Tensor]:
    file = read_changed(out) or TensorFile(out / "adapter_model.safetensors")
    return {name: file.read(name) for name in file.entries}


WRITES = (
    "torch.save", "safetensors.torch.save_file", "edgeft.engine.loop.write_tensors", "edgeft.engine.lisa.link",
    "edgeft.engine.fp32_layers.link", "edgeft.engine.fp32_layers.write_tensors", "pathlib.Path.replace",
    "pathlib.Path.write_text", "pathlib.Path.unlink", "shutil.rmtree",
)  # fmt: skip


def after(do: Callable[[], None], call: Any) -> Any:
    def both(*args: Any, **named: Any) -> Any:
        do()
        return call(*args, **named)

    return both


@contextlib.contextmanager
def before_each_write(do: Callable[[], None]) -> Iterator[None]:
    """Has `do` called before everything that changes the disk."""
    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            place, _, called = name.rpartition(".")
            owner: Any = Path if place == "pathlib.Path" else importlib.import_module(place)

            patch.setattr(owner, called, after(do, getattr(owner, called)))
        yield


def on_disk(folder: Path) -> int:
    """Bytes of all files below a folder, those of several names once."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum({file.st_ino: file.st_size for file in files}.values())


ROTATING = {**LISA, "base_precision": "nf4", "max_steps": 20, "checkpoint_steps": 5, "lisa_interval": 2}


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
def test_a_layers_file_is_on_disk_once_and_once_more_while_a_checkpoint_holds_an_older_one(
    streamed: bool, planned: Any, tmp_path: Path
) -> None:
    """Ten turns of four layers: the third round begins. Checkpoints and the result share files."""
    path = planned(**ROTATING, **(STREAMED if streamed else {}))
    made, seen = Plan.read(path), list[int]()
    disks = disk.train_disk(made.spec, made.training)
    with before_each_write(lambda: seen.append(on_disk(tmp_path))):
        run(path, tmp_path / "train")
    beside = on_disk(tmp_path) - on_disk(tmp_path / "train")
    sizes = {term.name: term.bytes for term in disks.terms}
    assert sizes.keys() == {"checkpoints", "result", "replaced", *(["pages"] if streamed else [])}
    small = 2 * disk.CHECKPOINTS_KEPT * disk.TENSOR_BYTES * len(made.spec.linears) * made.spec.num_hidden_layers
    assert 0.98 * disks.peak_bytes - small <= max(seen) - beside <= disks.peak_bytes + small
    pieces = sorted((tmp_path / "train").glob("changed-*"))
    assert len(pieces) == 4 and {piece.stat().st_nlink for piece in pieces} == {1}
    assert sum(piece.stat().st_size for piece in pieces) == pytest.approx(disks.kept_bytes, rel=0.05)
    few = make_plan(made.job.model_copy(update={"max_steps": 4}))
    assert disk.train_disk(few.spec, few.training).kept_bytes == disks.kept_bytes // 2  # two of four layers visited


@pytest.mark.parametrize("precision", ["nf4", "nf4 in its files", "fp32 in its files"])
def test_killed_before_any_write_it_ends_bit_for_bit_the_same(precision: str, planned: Any, tmp_path: Path) -> None:
    """By SIGKILL, again and again, each process twelve writes later than the one before: nothing is cleaned up.

    Of a base in its files the whole run is the resident one.
    """
    base, streams = precision.split()[0], "files" in precision
    resident = {
        **ROTATING,
        "base_precision": base,
        **({"stream_layers": False, "checkpointing": True} if streams else {}),
    }
    whole = run(planned(**resident), tmp_path / "whole")
    path, out = planned(**{**resident, **(STREAMED if streams else {})}), tmp_path / "killed"
    ends = list[int]()
    for allowed in itertools.count(2, 12):
        if (child := os.fork()) == 0:
            left = iter(range(allowed))

            def count(left: Iterator[int] = left) -> None:
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

            with contextlib.suppress(BaseException), before_each_write(count):
                run(path, out)
                os._exit(0)
            os._exit(1)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if ends[-1] != -signal.SIGKILL:
            break
    assert ends[-1] == 0 and len(ends) > 4
    result = TrainResult.read(out / "train.json")
    expected, found = tensors(tmp_path / "whole"), tensors(out)
    assert expected.keys() == found.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert result.loss_curve == whole.loss_curve and result.valid == whole.valid and result.units == whole.units
    assert not work_folder(out).exists()


# To go on in each of these is shown by its neighbours: recomputed or not, parked or dropped, adapters in turn.
LONG = {"lisa, recomputed", "lisa on nf4", "sparse adapters", "sparse on nf4"}


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[pytest.mark.slow] if mode in LONG else []) for mode in MODES]
)
def test_stopped_in_the_middle_of_an_interval_ends_bit_for_bit_the_same(
    mode: str, planned: Any, tmp_path: Path
) -> None:
    path = planned(**MODES[mode])
    whole = run(path, tmp_path / "whole")
    out = tmp_path / "stopped"
    for stop_at in (4, 11):  # inside the second and the fourth interval

        def interrupt(stage: str, done: int, total: int, numbers: dict[str, float], stop_at: int = stop_at) -> None:
            if stage == "train" and done == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            run(path, out, progress=interrupt)
        assert any(work_folder(out).glob("step-*"))
    resumed = run(path, out)
    assert len(resumed.resumed_at) == 2
    expected, found = tensors(tmp_path / "whole"), tensors(out)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert resumed.loss_curve == whole.loss_curve and resumed.valid == whole.valid
    assert resumed.units == whole.units
    assert len(resumed.interval_peak_bytes) == len(whole.interval_peak_bytes)
    assert resumed.interval_optimizer_bytes == whole.interval_optimizer_bytes
    assert not work_folder(out).exists()


@pytest.mark.parametrize("mode", MODES)
def test_the_record_says_what_trained_and_what_did_not(
    mode: str, planned: Any, deep_folder: Path, tmp_path: Path
) -> None:
    settings = {**MODES[mode], "max_steps": 5}
    path = planned(**settings)
    result = run(path, tmp_path / "train")
    training = result.plan.training
    trained = {unit.unit for unit in result.units if unit.steps}
    for unit in result.units:
        assert (unit.relative_change > 0) == (unit.unit in trained), unit
    if training.layers == "lisa":
        assert (
            0 < sum(unit.steps for unit in result.units if unit.unit.startswith("layer")) <= 5 * training.active_layers
        )
        assert 1 <= len(result.interval_peak_bytes) == len(result.interval_optimizer_bytes) <= 2
    else:
        assert {f"layer {i}" for i in training.trained_layers} == trained
        assert {unit.steps for unit in result.units} == {0, 5}
    merged = merge(tmp_path / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    assert merged.changed_tensors > 0
    base, after = load_file(deep_folder / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in base.items():
        layer = "layer " + name.split("layers.")[1].split(".")[0] if "layers." in name else None
        if layer is not None and layer not in trained:
            assert torch.equal(tensor, after[name]), name


def test_the_change_of_a_4_bit_layer_is_never_rounded(planned: Any, deep_folder: Path, tmp_path: Path) -> None:
    """What is kept is the original weight plus every update; the model that was trained equals the merged one."""
    import bitsandbytes.functional as bnb

    path = planned(**{**LISA, "base_precision": "nf4", "lisa_interval": 2, "max_steps": 8, "learning_rate": 1e-5})
    run(path, tmp_path / "train")
    base, kept = load_file(deep_folder / "model.safetensors"), tensors(tmp_path / "train")
    for name, tensor in kept.items():
        original = base[name].float()
        assert tensor.dtype == torch.float32
        if tensor.ndim == 2:
            change = (tensor - original).abs()
            # AdamW moves a weight by about the learning rate a step, and each layer has had two steps
            assert 0 < change.max() <= 4e-5 and change.mean() > 1e-6
            rounded, state = bnb.quantize_4bit(original, quant_type="nf4", compress_statistics=True)
            step = (bnb.dequantize_4bit(rounded, state) - original).abs().mean()
            assert step > 20 * change.mean(), "the change is far smaller than 4-bit rounding, and is all there"
    merge(tmp_path / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in kept.items():
        assert torch.equal(merged[name], tensor.to(base[name].dtype)), name


def test_frozen_layers_of_a_4_bit_base_stay_4_bit_and_active_ones_are_dense(
    planned: Any, deep_folder: Path, tmp_path: Path
) -> None:
    from edgeft.engine.fp32_layers import DenseTurns
    from edgeft.engine.nf4_base import load_base
    from edgeft.models.checkpoint import Checkpoint
    from edgeft.models.parts import find_parts

    training = Plan.read(planned(**MODES["lisa on nf4"])).training
    model = load_base(deep_folder, training, torch.device("cpu"), torch.float32)
    parts = find_parts(model)
    turns = DenseTurns(model, parts, Checkpoint(deep_folder), tmp_path / "layers", torch.float32)
    base = load_file(deep_folder / "model.safetensors")
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        untouched = model(input_ids=ids, use_cache=False).logits
    codes = [weakref.ref(m.weight) for m in parts.layers[2].modules() if type(m).__name__ == "Linear4bit"]
    gc.collect()
    gc.disable()  # bitsandbytes ties weight and module in a circle: they must not wait for a collection
    try:
        for name, parameter in turns.enter("layer 2"):
            assert torch.equal(parameter, base[name].float()), name
        assert len(codes) == 7 and not any(code() is not None for code in codes)
    finally:
        gc.enable()
    kinds = [{type(m).__name__ for m in layer.modules() if "Linear" in type(m).__name__} for layer in parts.layers]
    assert kinds == [{"Linear4bit"}, {"Linear4bit"}, {"Linear"}, {"Linear4bit"}]
    turns.leave("layer 2")
    again = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(again, untouched, rtol=1e-4, atol=1e-5)  # nothing trained: the same 4-bit layer


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"active_layers": 2}, "active_layers: says which layers train, but all do\n\nhint: add --set layers=sparse"),
        ({"layers": "sparse", "trained_layers": "1,9"}, "trained_layers: 10 is more than the model's 4 layers"),
        (
            {"layers": "sparse", "trained_layers": "1,2", "active_layers": 3},
            "active_layers: 3, but trained_layers names 2",
        ),
        ({"embedding": "on", "tuner": "lora"}, "embedding: embedding, norm and head have no adapters"),
        ({"norm": "rotate", "tuner": "full"}, "rotate: embedding, norm and head rotate only with the layers"),
        ({"embedding": "on", "head": "off", "tuner": "full"}, "head: off, the embedding on: they are one tied tensor"),
        ({**LISA, "lisa_schedule": "weighted"}, "lisa_schedule: weighted draws need scores"),
    ],
)
def test_settings_that_contradict_one_another(settings: dict[str, Any], message: str, deep_folder: Path) -> None:
    with pytest.raises(BadInput, match=message):
        make_plan(make_job(model=str(deep_folder), profile="cpu-8gb", **settings))


def test_lisa_with_ends_in_half_precision_is_refused(deep_folder: Path) -> None:
    with pytest.raises(
        BadInput, match=r"embedding: trains in fp32, but this plan computes in fp16\n\nhint: leave embedding off"
    ):
        make_plan(
            make_job(model=str(deep_folder), profile="t4", **{**LISA, "embedding": "on", "base_precision": "fp16"})
        )
