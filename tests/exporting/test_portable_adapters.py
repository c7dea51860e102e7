"""One portable bundle, the base in it once: does each prefix, prompt and bottleneck give its own answers?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from bundles import reseal, script
from safetensors.torch import load_file, save_file
from tiny import run, write_plan

from edgeft.errors import BadInput, DoesNotFit, ParityFailed
from edgeft.exporting import build
from edgeft.exporting.adapters import AdapterSource
from edgeft.exporting.add_adapter import add_adapter
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.bundle import Bundle
from edgeft.exporting.export import export_adapters
from edgeft.exporting.outputs import load_tuned
from edgeft.machines.runner import runner_module
from edgeft.models.checkpoint import load_plain
from edgeft.progress import silent
from edgeft.targets.target import load_target
from edgeft.training.result import TrainResult

FP32, INT8 = load_target("onnx-portable-fp32"), load_target("onnx-portable-int8")
pytestmark = pytest.mark.targets  # make test-targets has optimum's environment
RUNNER = runner_module()
IDS = list(range(5, 45))
RUNS: dict[str, dict[str, Any]] = {
    "long": {"tuner": "prefix", "rank": None, "prefix_tokens": 7, "learning_rate": 3e-2},
    "short": {"tuner": "prefix", "rank": None, "prefix_tokens": 3, "seed": 1, "learning_rate": 0.1},
    "prompt": {"tuner": "prompt", "rank": None, "prefix_tokens": 5, "learning_rate": 3e-2},
    "after": {"tuner": "adapter", "rank": 4, "learning_rate": 1e-2},
    "beside": {"tuner": "adapter", "rank": 6, "adapter_at": "parallel", "learning_rate": 1e-2},
    "lora": {"tuner": "lora", "target": "ort-int4"},
}


@pytest.fixture(scope="module")
def trained(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one base. Not to be written to."""
    folder, found = tmp_path_factory.mktemp("several"), {}
    for name, settings in RUNS.items():
        (folder / name).mkdir()
        more = {"layers": "all", "base_precision": "fp32", "target": FP32.name, "epochs": 1.0, **settings}
        run(write_plan(folder / name, checkpoint_folder, **more), folder / name / "train")
        found[name] = folder / name / "train"
    return found


@pytest.fixture(scope="module")
def several(trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of all of them but the prompt, which is added in a test. Not to be written to."""
    out = tmp_path_factory.mktemp("bundle") / "several"
    given = {name: trained[name] for name in ("long", "short", "after", "beside")}
    export_adapters(given, FP32, out, device=None, progress=silent)
    return out


def wanted(trained: dict[str, Path], base: Path, name: str | None) -> Any:
    """Logits of the trained model in torch: nothing of it was exported."""
    model = (
        load_plain(base) if name is None else load_tuned(trained[name], TrainResult.read(trained[name] / "train.json"))
    )
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].numpy()


def test_each_answers_as_it_was_trained_by_one_graph_in_any_order(
    several: Path, trained: dict[str, Path], checkpoint_folder: Path
) -> None:
    model, seen = ArtifactModel(several), dict[str | None, Any]()
    loaded = model._runner.engine.model
    for name in (None, "long", "after", "short", None, "beside", "long", "after"):
        model.use(name)
        found = model.logits(IDS)
        numpy.testing.assert_allclose(found, wanted(trained, checkpoint_folder, name), rtol=1e-3, atol=1e-4)
        if name in seen:
            assert numpy.array_equal(found, seen[name])  # nothing of the one before is left
        seen[name] = found
    assert model._runner.engine.model is loaded
    names = list(seen)
    assert all(numpy.abs(seen[a] - seen[b]).max() > 1e-3 for a in names for b in names if a != b)


def test_the_base_is_there_once_and_is_the_base(several: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    build.build_bundle(checkpoint_folder, FP32, tmp_path / "alone", prompts=[], measure=False)
    assert (several / "model.onnx.data").read_bytes() == (tmp_path / "alone" / "model.onnx.data").read_bytes()
    assert numpy.array_equal(ArtifactModel(several).logits(IDS), ArtifactModel(tmp_path / "alone").logits(IDS))
    more = sum(file.stat().st_size for file in several.glob("adapters/*"))
    assert more < 0.5 * (several / "model.onnx.data").stat().st_size


def test_the_manifest_says_what_each_is(several: Path) -> None:
    made = Bundle.read(several / "bundle.json")
    tokens = {name: each.kv_prefix.tokens if each.kv_prefix else 0 for name, each in made.adapters.items()}
    assert tokens == {"long": 7, "short": 3, "after": 0, "beside": 0}
    assert [each.rank for each in made.adapters.values()] == [0, 0, 4, 6]
    assert all(each.proof is not None and each.golden for each in made.adapters.values())
    assert made.adapter_inputs["past_key_values.0.key"][2] == 0
    assert made.adapter_inputs["model.layers.1.mlp.down_proj.adapter.down.weight"][1] == 0
    assert made.kv_prefix is None and made.context_limited_by == "model"


def test_run_py_answers_with_the_one_that_is_named_and_replays_all(several: Path) -> None:
    answers = {}
    for name in (None, "long", "after"):
        options = ["--adapter", name] if name else []
        done = script(several, "Package: lib1\nSection:", "--max-tokens", "8", "--json", *options)
        assert done.returncode == 0, done.stderr
        answers[name] = json.loads(done.stdout)["ids"]
    model = ArtifactModel(several)
    ids = model._runner.encode("Package: lib1\nSection:", plain=True)
    for name, given in answers.items():
        model.use(name)
        assert given == model.greedy(ids, 8, model._runner.eos_ids)
    assert RUNNER.verify(several) == []
    done = script(several, "x", "--adapter", "other")
    assert done.returncode == 1 and "there is no adapter 'other' in this bundle" in done.stderr


def exchanged(folder: Path, manifest: dict[str, Any]) -> None:
    """Files of two prefixes, each with the other's tokens and shapes: whole files, of the same base."""
    entries = manifest["adapters"]
    for key in ("file", "kv_prefix", "parameters"):
        entries["long"][key], entries["short"][key] = entries["short"][key], entries["long"][key]


def shifted(folder: Path, manifest: dict[str, Any]) -> None:
    file = folder / "adapters" / "long.safetensors"
    tensors = {name: tensor.roll(1, dims=3).contiguous() for name, tensor in load_file(file).items()}
    save_file(tensors, file)


def halved(folder: Path, manifest: dict[str, Any]) -> None:
    file = folder / "adapters" / "after.safetensors"
    save_file({name: tensor * (0.5 if ".up." in name else 1.0) for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("fault", "names"), [(exchanged, ("long", "short")), (shifted, ("long",)), (halved, ("after",))]
)
def test_one_that_is_another_than_was_exported_is_seen(
    fault: Any, names: tuple[str, ...], several: Path, tmp_path: Path
) -> None:
    """By its golden vectors, also where every hash was made right again; the others answer as before."""
    place = tmp_path / "bundle"
    shutil.copytree(several, place)
    reseal(place, lambda manifest: fault(place, manifest))
    problems = RUNNER.verify(place)
    assert problems and all(any(f"adapter {name}, golden vector" in line for name in names) for line in problems)


def test_damage_shows_by_its_hash(several: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    shutil.copytree(several, place)
    shifted(place, {})
    done = script(place, "x", "--adapter", "long")
    assert done.returncode == 4 and "changed since the export" in done.stderr
    assert script(place, "x", "--adapter", "short", "--max-tokens", "1").returncode == 0


def test_what_is_not_what_was_trained_is_not_exported(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each adapter's proof compares with its own training: files of two that are exchanged in the making stop it."""
    right = build.add_inputs

    def wrong(folder: Path, spec: Any, sources: list[AdapterSource]) -> Any:
        first, second = sources
        return right(folder, spec, [first._replace(tensors=second.tensors), second._replace(tensors=first.tensors)])

    monkeypatch.setattr(build, "add_inputs", wrong)
    given = {name: trained[name] for name in ("long", "short")}
    with pytest.raises(ParityFailed):
        export_adapters(given, FP32, tmp_path / "bundle", device=None, progress=silent)
    assert not (tmp_path / "bundle").exists()


def test_one_more_comes_into_a_bundle_that_is_out_there(
    several: Path, trained: dict[str, Path], checkpoint_folder: Path, tmp_path: Path
) -> None:
    made = add_adapter(several, "prompt", trained["prompt"], tmp_path / "more", silent)
    assert list(made.adapters) == ["long", "short", "after", "beside", "prompt"]
    model = ArtifactModel(tmp_path / "more")
    for name in ("prompt", "long", None):
        model.use(name)
        numpy.testing.assert_allclose(model.logits(IDS), wanted(trained, checkpoint_folder, name), rtol=1e-3, atol=1e-4)
    for name in ("model.onnx", "model.onnx.data", "adapters/long.safetensors"):
        assert (tmp_path / "more" / name).read_bytes() == (several / name).read_bytes()
    short = tmp_path / "short"
    export_adapters({"short": trained["short"]}, FP32, short, device=None, progress=silent)
    with pytest.raises(DoesNotFit, match=r"puts 7 tokens before a text: of .* positions the bundle promises"):
        add_adapter(short, "long", trained["long"], tmp_path / "no", silent)
    with pytest.raises(BadInput, match="gives 8 tensors that the bundle's graph has no inputs for"):
        add_adapter(short, "after", trained["after"], tmp_path / "no", silent)


def test_eight_bits_are_proven_with_each(trained: dict[str, Path], tmp_path: Path) -> None:
    given = {name: trained[name] for name in ("long", "after", "beside")}
    made = export_adapters(given, INT8, tmp_path / "bundle", device=None, progress=silent)
    assert all(each.proof is not None for each in made.adapters.values())


@pytest.mark.parametrize(
    ("name", "target", "said"),
    [
        ("lora", "onnx-portable-fp32", "LoRA, whose factors the graph of onnx-portable-fp32 has no inputs for"),
        ("long", "ort-int4", "Prefix tuning, and the graph of ort-int4 takes no more than factors of weights"),
        ("after", "ort-int4", "Adapters, and the graph of ort-int4 takes no more than factors of weights"),
        ("long", "gguf-q8_0", "which edgeft cannot give several adapters to switch between"),
    ],
)  # fmt: skip
def test_what_a_target_cannot_switch_to_is_refused_by_name(
    name: str, target: str, said: str, trained: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=said):
        export_adapters({name: trained[name]}, load_target(target), tmp_path / "no", device=None, progress=silent)
