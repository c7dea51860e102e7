"""Keys and values before the text on a device: the model's own answers, and proven to be all there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from beside import stopped_by
from bundles import reseal, script, to_the_device
from safetensors.torch import load_file, save_file
from tiny import run, write_plan

from edgeft.errors import ParityFailed
from edgeft.exporting.build import build_bundle
from edgeft.exporting.bundle import Bundle, GoldenInput
from edgeft.exporting.export import export
from edgeft.exporting.rehearsal import go_through
from edgeft.machines.runner import runner_module
from edgeft.merging.merge import merge
from edgeft.models.checkpoint import load_plain
from edgeft.models.headers import KV_PREFIX
from edgeft.models.spec import read_model_spec
from edgeft.planning.plan import Plan
from edgeft.progress import silent
from edgeft.targets.footprint import predict
from edgeft.targets.portable_onnx import read_weights
from edgeft.targets.target import load_target

FP32 = load_target("onnx-portable-fp32")
pytestmark = pytest.mark.targets  # make test-targets has optimum's environment
TOKENS = 5
SETTINGS: dict[str, Any] = {
    "tuner": "prefix", "rank": None, "prefix_tokens": TOKENS, "layers": "all", "base_precision": "fp32",
    "target": FP32.name,
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def test_the_device_says_what_the_trained_model_says(tmp_path: Path) -> None:
    to_the_device(tmp_path, **SETTINGS)


@pytest.fixture(scope="module")
def trained(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny model and its merge beside it. Not to be written to."""
    folder = tmp_path_factory.mktemp("prefix")
    run(write_plan(folder, checkpoint_folder, epochs=2.0, learning_rate=3e-2, **SETTINGS), folder / "train")
    merge(folder / "train", folder / "merged", wise_alpha=1.0, progress=silent)
    return folder


@pytest.fixture(scope="module")
def bundle(trained: Path) -> Path:
    prompts = [GoldenInput(text="Package: lib1\nSection:")]
    build_bundle(trained / "merged", FP32, trained / "bundle", prompts=prompts, measure=False)
    return trained / "bundle"


def shifted(tensors: Tensors) -> Tensors:
    """By a token: the first is gone, the last is there twice. PEFT's tensor has one a row.

    In another order the tokens would say the same: keys came with their positions.
    """

    def shift(tensor: torch.Tensor) -> torch.Tensor:
        dim = 2 if tensor.ndim == 4 else 0
        count = tensor.shape[dim]
        return tensor.index_select(dim, torch.tensor([*range(1, count), count - 1]))

    return {name: shift(tensor) for name, tensor in tensors.items()}


def swapped(tensors: Tensors) -> Tensors:
    """Keys with values."""
    if "prompt_embeddings" in tensors:
        keys_0, values_0, keys_1, values_1 = tensors["prompt_embeddings"].chunk(4, dim=1)
        return {"prompt_embeddings": torch.cat([values_0, keys_0, values_1, keys_1], dim=1)}
    other = {"key": "value", "value": "key"}
    return {f"{name.rpartition('.')[0]}.{other[name.rpartition('.')[2]]}": tensors[name] for name in tensors}


def without_a_layers(tensors: Tensors) -> Tensors:
    """The last one's, as empty as a layer without."""
    if "prompt_embeddings" in tensors:
        half = tensors["prompt_embeddings"].chunk(2, dim=1)
        return {"prompt_embeddings": torch.cat([half[0], torch.zeros_like(half[1])], dim=1)}
    return {name: tensor * (0 if ".1." in name else 1) for name, tensor in tensors.items()}


FAULTS = [shifted, swapped, without_a_layers]


def plant(fault: Callable[[Tensors], Tensors], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in fault(load_file(file)).items()}, file)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("file", "rung"), [("train/adapter_model.safetensors", "'trained'"), (f"merged/{KV_PREFIX}", "'merged'")]
)
def test_the_ladder_stops_a_prefix_that_is_not_what_was_trained(
    fault: Any, file: str, rung: str, trained: Path, bundle: Path, tmp_path: Path
) -> None:
    for name in ("train", "merged"):
        shutil.copytree(trained / name, tmp_path / name)
    assert stopped_by(tmp_path, bundle, FP32) == ""
    plant(fault, tmp_path / file)
    assert rung in stopped_by(tmp_path, bundle, FP32)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bundle_whose_prefix_is_another_is_not_what_was_exported(
    fault: Any, trained: Path, bundle: Path, tmp_path: Path
) -> None:
    """Damage shows by its hash; where all hashes were made right again, by what it answers."""
    place = tmp_path / "bundle"
    shutil.copytree(bundle, place)
    plant(fault, place / KV_PREFIX)
    damaged = script(place, "a prompt")
    assert damaged.returncode == 4 and f"{KV_PREFIX}: " in damaged.stderr
    reseal(place, lambda manifest: None)
    assert "'artifact' against 'merged'" in stopped_by(trained, place, FP32)
    assert script(place, "--verify").returncode == 4


def nothing(tokens: int, past: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return 0, {name: values[:, :, :0] for name, values in past.items()}


def one_less(tokens: int, past: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return tokens - 1, {name: values[:, :, 1:] for name, values in past.items()}


def reversed_layers(tokens: int, past: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    last = len(past) // 2 - 1
    return tokens, {name: past[".".join([(p := name.split("."))[0], str(last - int(p[1])), p[2]])] for name in past}


@pytest.mark.parametrize("fault", [nothing, one_less, reversed_layers])
def test_a_runner_that_begins_otherwise_is_stopped(
    fault: Any, trained: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_module()
    right = runner.read_past
    monkeypatch.setattr(runner, "read_past", lambda *given: fault(*right(*given)))
    assert "'artifact' against 'merged'" in stopped_by(trained, bundle, FP32)


def test_positions_behind_the_prefix_are_what_the_proof_compares(
    trained: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_module()
    source = Path(runner.__file__).read_text(encoding="utf-8")
    right = "numpy.arange(before + self.done, before + total"
    assert source.count(right) == 1
    module: dict[str, Any] = {"__name__": "faulty", "__file__": runner.__file__}
    exec(compile(source.replace(right, "numpy.arange(self.done, total"), "faulty", "exec"), module)
    monkeypatch.setattr(runner.OnnxRuntimeSession, "append", module["OnnxRuntimeSession"].append)
    assert "'artifact' against 'merged'" in stopped_by(trained, bundle, FP32)


def test_eight_bits_are_proven_with_it(trained: Path, tmp_path: Path) -> None:
    made = export(trained / "merged", load_target("onnx-portable-int8"), tmp_path / "b", device=None, progress=silent)
    assert made.proof is not None and made.kv_prefix is not None and made.kv_prefix.tokens == TOKENS


def test_a_rehearsal_finds_a_runner_that_leaves_it_out(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.read(trained / "plan.json")
    for name in ("right", "wrong"):
        (tmp_path / name).mkdir()
    held = go_through(plan, FP32, tmp_path / "right")
    assert not held.skipped and [rung.name for rung in held.rungs] == ["merged", "artifact"]
    runner = runner_module()
    right = runner.read_past
    monkeypatch.setattr(runner, "read_past", lambda *given: nothing(*right(*given)))
    with pytest.raises(ParityFailed, match="rung 'artifact' against 'merged'"):
        go_through(plan, FP32, tmp_path / "wrong")


def test_answers_go_back_and_on_as_without_a_cache(bundle: Path, trained: Path) -> None:
    """A cache that is kept, rewound and read again gives what the merged model gives of the whole text."""
    model = load_plain(trained / "merged")
    session = runner_module().Runner(bundle).engine.start(64)
    ids = list(range(5, 30))
    session.append(ids[:20])
    session.rewind(7)
    found = session.append(ids[7:])
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    numpy.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-4)


def test_the_manifest_says_what_lies_before_the_context(bundle: Path, tmp_path: Path) -> None:
    made = Bundle.read(bundle / "bundle.json")
    assert made.kv_prefix is not None and (made.kv_prefix.file, made.kv_prefix.tokens) == (KV_PREFIX, TOKENS)
    assert KV_PREFIX in made.files and made.golden
    spec = read_model_spec(str(bundle.parent / "merged"))
    assert made.context_tokens == (spec.max_position_embeddings or 0) - TOKENS
    weights = read_weights(bundle)
    assert made.predicted == predict(spec, FP32, weights, made.context_tokens, before=TOKENS)
    without = predict(spec, FP32, weights, made.context_tokens)
    each = 8 * 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim  # the old cache and the new
    assert made.predicted.kv_cache_bytes - without.kv_cache_bytes == TOKENS * each
    ids = [5] * (made.context_tokens - 1)
    assert len(runner_module().Runner(bundle).greedy(ids, 4, [])) == 1  # the last position there is


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "kv_prefix.safetensors", "tokens": 4}, "is no fp32 tensor of shape"),
        ({"file": "tokenizer.json", "tokens": TOKENS}, "cannot be used"),
        ({"file": "elsewhere", "tokens": TOKENS}, "is the file of 'kv_prefix' and not among 'files'"),
        ({"file": "kv_prefix.safetensors", "tokens": 0}, "'kv_prefix' cannot be"),
        ("kv_prefix.safetensors", "'kv_prefix' cannot be"),
    ],
)
def test_a_manifest_that_says_otherwise_is_refused(change: Any, said: str, bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    shutil.copytree(bundle, place)
    reseal(place, lambda manifest: manifest.update(kv_prefix=change))
    done = script(place, "a prompt")
    assert done.returncode in (1, 4) and said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_runtime_that_begins_no_text_so_is_refused(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    shutil.copytree(bundle, place)
    reseal(place, lambda manifest: manifest["target"].update(runtime="llama.cpp"))
    assert "begins no text with keys and values" in script(place, "a prompt").stderr
    assert json.loads((place / "bundle.json").read_text())["kv_prefix"]["tokens"] == TOKENS
