"""Does one loaded model give each adapter's own answers, the base's without one, and refuse what does not fit it?"""

from __future__ import annotations

import functools
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from bundles import PROMPTS, bundle, checkpoint, reference, reseal, save_tokenizer, script, seal, some_ids, workplace
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from tiny import run
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from edgeft.data.dataset import TextTokenizer
from edgeft.documents import sha256_file
from edgeft.errors import BadInput
from edgeft.exporting.adapters import AdapterSource, add_adapters
from edgeft.exporting.add_adapter import add_adapter
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.build import build_bundle
from edgeft.exporting.bundle import Bundle
from edgeft.exporting.export import export_adapters
from edgeft.machines.runner import runner_module
from edgeft.models.spec import read_model_spec
from edgeft.planning.plan import make_plan
from edgeft.progress import silent
from edgeft.reporting.bundle_tables import adapters_text
from edgeft.settings.job import make_job
from edgeft.targets.ort import read_weights
from edgeft.targets.target import load_target

RUNNER = runner_module()
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = {"all": (LINEARS, 4), "some": (("q_proj", "v_proj", "down_proj"), 8)}
BASE = "ba" * 32


@functools.cache
def tuned(name: str) -> Any:
    """The base in torch with random adapters on it, by PEFT: the independent reference."""
    modules, rank = ADAPTERS[name]
    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32).eval()
    torch.manual_seed(rank)
    config = LoraConfig(r=rank, lora_alpha=3, use_rslora=True, target_modules=list(modules))
    model = inject_adapter_in_model(config, model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3)
    return model


def source(name: str, **other: Any) -> AdapterSource:
    values = dict(tuned(name).named_parameters())
    rank = ADAPTERS[name][1]
    changes = {}
    for key, a in values.items():
        if ".lora_A." in key:
            b = values[key.replace(".lora_A.", ".lora_B.")]
            weight = key.replace(".lora_A.default.weight", ".weight")
            changes[weight] = (a.detach().numpy().T, b.detach().numpy().T * np.float32(3 / rank**0.5))
    fields: dict[str, Any] = {
        "name": name, "folder": Path(name), "changes": changes, "base_sha256": BASE, "train_sha256": "cd" * 32,
        "prompt_format": "plain", "prompts": PROMPTS[:2], "tokenizer": TextTokenizer(checkpoint()),
    }  # fmt: skip
    return AdapterSource(**fields | other)


@functools.cache
def switchable(target: str) -> Path:
    out = workplace() / f"adapters {target}"
    build_bundle(
        checkpoint(), load_target(target), out, prompts=PROMPTS, measure=False, provenance={"base weights": BASE},
        adapters=[source(name) for name in ADAPTERS],
    )  # fmt: skip
    return out


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "my bundle"
    shutil.copytree(switchable("ort-int4"), folder)
    return folder


def torch_logits(name: str | None, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return (tuned(name) if name else reference())(torch.tensor([ids])).logits[0].numpy()


def test_each_adapter_gives_the_logits_of_torch_by_one_loaded_model_in_any_order() -> None:
    model, ids = ArtifactModel(switchable("ort-fp32")), some_ids(300)
    loaded = model._runner.engine.model
    seen: dict[str | None, np.ndarray] = {}
    for name in (None, "all", "some", "all", None, "some"):
        model.use(name)
        given = model.logits(ids)
        assert np.abs(given - torch_logits(name, ids)).max() < 2e-3  # of logits up to 30
        if name in seen:
            assert np.array_equal(given, seen[name])  # nothing of the one before is left
        seen[name] = given
    assert model._runner.engine.model is loaded and model._runner.engine.loaded == {"all", "some"}
    assert min(np.abs(seen[a] - seen[b]).max() for a, b in ((None, "all"), (None, "some"), ("all", "some"))) > 1


def test_greedy_answers_follow_the_adapter_in_use() -> None:
    model, prompt = ArtifactModel(switchable("ort-fp32")), some_ids(20)
    for name in ("some", None, "all"):
        model.use(name)
        expected = list(prompt)
        for _ in range(8):
            expected.append(int(torch_logits(name, expected)[-1].argmax()))
        assert model.greedy(prompt, 8, []) == expected[20:]


@pytest.mark.parametrize("target", ["ort-int4", "ort-int8", "ort-fp32"])
def test_without_an_adapter_the_base_answers_bit_for_bit(target: str, tmp_path: Path) -> None:
    shutil.copytree(bundle(target), tmp_path / "b")
    inputs, written = add_adapters(tmp_path / "b", read_model_spec(str(checkpoint())), [source("some"), source("all")])
    assert set(inputs) == set(written["all"].parameters)
    reseal(tmp_path / "b", lambda manifest: None)
    ids = some_ids(64)
    assert np.array_equal(ArtifactModel(tmp_path / "b").logits(ids), ArtifactModel(bundle(target)).logits(ids))


def test_quantising_the_base_costs_an_adapter_no_more_than_the_base() -> None:
    model, ids = ArtifactModel(switchable("ort-int4")), some_ids(200)
    errors = {}
    for name in (None, *ADAPTERS):
        model.use(name)
        p, q = (torch.log_softmax(torch.tensor(x), -1) for x in (torch_logits(name, ids), model.logits(ids)))
        errors[name] = float((p.exp() * (p - q)).sum(-1).mean())
    # 4 bits of random weights cost much: an adapter that were not in use would cost several times more
    assert all(errors[name] < 1.5 * errors[None] for name in ADAPTERS), errors


def test_the_contract_says_what_is_in_the_files_and_the_graph() -> None:
    made = Bundle.read(switchable("ort-int4") / "bundle.json")
    assert list(made.adapters) == ["all", "some"]
    # q, k and v share a matmul: three ranks beside each other
    assert made.adapters["all"].parameters["model.layers.1.attn.qkv_proj.lora_A.weight"] == [64, 12]
    assert made.adapters["some"].parameters["model.layers.1.attn.qkv_proj.lora_B.weight"] == [16, 64 + 2 * 32]
    assert made.adapter_inputs["model.layers.0.mlp.down_proj.lora_A.weight"] == [128, 0]
    assert set(made.adapters["some"].parameters) < set(made.adapters["all"].parameters) == set(made.adapter_inputs)
    assert [made.adapters[name].rank for name in ADAPTERS] == [4, 8]
    assert {f"adapters/{name}.onnx_adapter" for name in ADAPTERS} < set(made.files)
    sizes = {
        name: 4 * sum(rows * columns for rows, columns in adapter.parameters.values())
        for name, adapter in made.adapters.items()
    }
    alone = Bundle.read(bundle("ort-int4") / "bundle.json")
    assert made.weight_bytes_per_token == alone.weight_bytes_per_token + max(sizes.values())
    assert made.predicted.weights_bytes == alone.predicted.weights_bytes + sum(sizes.values())
    assert read_weights(switchable("ort-int4")) == read_weights(bundle("ort-int4"))


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    shutil.copytree(bundle("ort-int4"), tmp_path / "b")
    add_adapters(tmp_path / "b", read_model_spec(str(checkpoint())), [source(name) for name in ADAPTERS])
    for name in ("model.onnx", "adapters/all.onnx_adapter", "adapters/some.onnx_adapter"):
        assert (tmp_path / "b" / name).read_bytes() == (switchable("ort-int4") / name).read_bytes()


def test_verify_replays_every_adapter(copy: Path) -> None:
    assert RUNNER.verify(copy) == []
    manifest = Bundle.read(copy / "bundle.json")
    assert manifest.adapters["all"].golden[0].top_logits != manifest.golden[0].top_logits

    def exchange(manifest: dict[str, Any]) -> None:
        entries = manifest["adapters"]
        entries["all"]["golden"], entries["some"]["golden"] = entries["some"]["golden"], entries["all"]["golden"]

    reseal(copy, exchange)
    problems = RUNNER.verify(copy)
    assert problems and {line.split("'s first")[0].split(" continues")[0] for line in problems} == {
        f"model: adapter {name}, golden vector {number}" for name in ADAPTERS for number in (1, 2)
    }


def test_run_py_answers_with_the_adapter_that_is_named(copy: Path) -> None:
    model = ArtifactModel(copy)
    ids = model._runner.encode("Package: x", plain=True)
    for name in (None, *ADAPTERS):
        model.use(name)
        options = ["--adapter", name] if name else []
        given = json.loads(script(copy, "Package: x", "--max-tokens", "6", "--json", *options).stdout)
        assert given["ids"] == model.greedy(ids, 6, [0, 2])
    assert json.loads(script(copy, "--bench", "--adapter", "all", "--json").stdout)["peak_memory_bytes"] > 0
    reseal(copy, lambda manifest: manifest["adapters"]["all"].update(prompt_format="chat"))
    chat = TextTokenizer(checkpoint()).render([{"role": "user", "content": "x"}], add_generation_prompt=True)
    given = json.loads(script(copy, "x", "--max-tokens", "1", "--json", "--adapter", "all").stdout)
    assert given["prompt_ids"] == TextTokenizer(checkpoint()).encode([chat])[0]
    done = script(copy, "x", "--adapter", "other")
    assert done.returncode == 1
    assert done.stderr == "--adapter: there is no adapter 'other' in this bundle\n\nhint: it has: all, some\n"
    done = script(bundle("ort-int4"), "x", "--adapter", "all")
    assert done.stderr.endswith("hint: it has: none\n")


def another_base(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["adapters"]["all"]["base_sha256"] = "00" * 32


def no_such_input(folder: Path, manifest: dict[str, Any]) -> None:
    del manifest["adapter_inputs"]["model.layers.1.mlp.up_proj.lora_B.weight"]


def another_shape(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["adapters"]["all"]["parameters"]["model.layers.0.attn.o_proj.lora_A.weight"] = [63, 4]


def another_file(folder: Path, manifest: dict[str, Any]) -> None:
    shutil.copyfile(folder / "adapters/some.onnx_adapter", folder / "adapters/all.onnx_adapter")


def behind_a_link(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "adapters").rename(folder.parent / "elsewhere")
    (folder / "adapters").symlink_to("../elsewhere")


def no_file(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "adapters/all.onnx_adapter").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_base, rf"adapter all: was trained on the base (00){{32}}, this bundle holds {BASE}"),
        (no_such_input, r"adapter all: model\.layers\.1\.mlp\.up_proj\.lora_B\.weight: the graph has no such input"),
        (another_shape, r"adapter all: .*o_proj\.lora_A\.weight: shape \[63, 4\] does not fit the graph's \[64, 0\]"),
        (another_file, r"adapter all: adapters/all\.onnx_adapter: changed since the export"),
        (no_file, r"adapter all: cannot be used: FileNotFoundError"),
        (behind_a_link, r"adapter all: adapters: is a link, the export wrote none"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_when_it_is_loaded(copy: Path, change: Any, message: str) -> None:
    manifest = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    change(copy, manifest)
    seal(copy, manifest)
    model = ArtifactModel(copy)
    with pytest.raises(BadInput, match=message):
        model.use("all")
    if change is not behind_a_link:  # where all of them are
        model.use("some")  # the others still load
    assert model.logits(some_ids(3)).shape[0] == 3


@pytest.mark.parametrize("file", ["../elsewhere.onnx_adapter", "/etc/hostname", "model.onnx.data2", None])
def test_an_adapters_file_is_one_of_the_bundle(copy: Path, file: str | None) -> None:
    shutil.copyfile(copy / "adapters" / "all.onnx_adapter", copy.parent / "elsewhere.onnx_adapter")
    manifest = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    manifest["adapters"]["all"]["file"] = file
    seal(copy, manifest)
    message = r"bundle\.json: .* is (a file name that may lead|no file name|an adapter's file that is not among)"
    for act in (RUNNER.Runner, RUNNER.read_manifest):
        with pytest.raises(RUNNER.NotAsExported, match=message):
            act(copy)
    assert len(RUNNER.verify(copy)) == 1 or "not replayed" in RUNNER.verify(copy)[1]


def test_an_adapter_exchanged_while_it_is_loaded_is_not_used(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ArtifactModel(copy)
    check = RUNNER.check_adapter

    def exchange(*arguments: Any) -> Any:
        path = check(*arguments)
        shutil.copyfile(path, copy.parent / "other")
        (copy.parent / "other").replace(path)
        return path

    monkeypatch.setattr(RUNNER, "check_adapter", exchange)
    with pytest.raises(BadInput, match=r"adapters/all\.onnx_adapter: changed while it was loaded"):
        model.use("all")
    model.use(None)
    assert model.logits(some_ids(3)).shape[0] == 3


def test_an_adapter_file_that_was_tampered_with_is_named(copy: Path) -> None:
    path = copy / "adapters" / "some.onnx_adapter"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    expected = ["adapters/some.onnx_adapter: changed since the export"]
    assert RUNNER.verify(copy) == [*expected, "golden vectors: not replayed, the files above come first"]


def test_a_change_of_what_is_no_matmul_of_the_graph_is_refused() -> None:
    a, b = np.ones((64, 2), np.float32), np.ones((2, 600), np.float32)
    spec = read_model_spec(str(checkpoint()))
    for weight in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.7.mlp.up_proj.weight"):
        with pytest.raises(BadInput, match=rf"all: changes what is no matmul of its own .*:\n{weight}: 64 to 600"):
            add_adapters(bundle("ort-int4"), spec, [source("all", changes={weight: (a, b)})])
        assert not (bundle("ort-int4") / "adapters").exists()


def test_an_architecture_that_takes_q_k_and_v_apart_again_to_norm_them(tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=save_tokenizer(tmp_path), hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=512, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(1)
    Qwen3ForCausalLM(config).eval().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    changes = {}
    with torch.no_grad():  # W + A B by hand
        for layer in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
            weight = model.get_submodule(f"model.layers.0.{layer}").weight
            a, b = torch.randn(weight.shape[1], 3) / 8, torch.randn(3, weight.shape[0])
            weight += (a @ b).T
            changes[f"model.layers.0.{layer}.weight"] = (a.numpy(), b.numpy())
    build_bundle(
        tmp_path, load_target("ort-fp32"), tmp_path / "b", prompts=[], measure=False,
        provenance={"base weights": BASE}, adapters=[source("all", changes=changes, prompts=[])],
    )  # fmt: skip
    inputs = Bundle.read(tmp_path / "b" / "bundle.json").adapter_inputs
    assert inputs["model.layers.0.attn.qkv_proj.lora_B.weight"] == [0, 64 + 2 * 32] and len(inputs) == 4
    artifact, ids = ArtifactModel(tmp_path / "b"), some_ids(40)
    base = artifact.logits(ids)
    artifact.use("all")
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(artifact.logits(ids) - expected).max() < 1e-3 < np.abs(base - expected).max()


@pytest.fixture
def trained(checkpoint_folder: Path, write_rows: Any, tmp_path: Path) -> dict[str, Path]:
    """Two trainings of one base that answer the same prompts differently."""
    folders = {}
    for name, answer in (("libs", "libs"), ("docs", "doc")):
        rows = [{"prompt": f"Package: lib{i}\nSection:", "completion": f" {answer}"} for i in range(24)]
        data, path = write_rows(f"{name}.jsonl", rows), tmp_path / f"{name}.json"
        values = {"profile": "cpu-8gb", "batch_size": 4, "epochs": 6.0, "learning_rate": 1e-2, "eval_rows": 4}
        rank = 4 if name == "libs" else 8
        make_plan(make_job(model=str(checkpoint_folder), data=str(data), rank=rank, **values)).write(path)
        folders[name] = tmp_path / name
        run(path, folders[name])
    return folders


def test_two_trainings_become_one_bundle_that_is_proven_for_each(
    trained: dict[str, Path], checkpoint_folder: Path, tmp_path: Path
) -> None:
    made = export_adapters(trained, load_target("ort-fp32"), tmp_path / "b", device=None, progress=silent)
    assert RUNNER.verify(tmp_path / "b") == []
    assert made.proof is not None and made.proof.rungs[-1].mean_kl_nats < 1e-6
    for name, adapter in made.adapters.items():
        assert adapter.proof is not None
        assert [rung.name for rung in adapter.proof.rungs] == ["trained", name]
        rung = adapter.proof.rungs[-1]
        assert rung.mean_kl_nats < 1e-6 and rung.problems == ()
        scores = adapter.proof.scores
        assert scores["ort-fp32"].loss == pytest.approx(scores["fine-tuned"].loss, abs=1e-4)
        assert (scores["base"].exact_match, scores["ort-fp32"].exact_match) == (0.0, 1.0)
        assert adapter.train_sha256 == sha256_file(trained[name] / "train.json")
    model = ArtifactModel(tmp_path / "b")
    ids = model._runner.encode("Package: lib3\nSection:", plain=True)
    answers = {}
    for name in ("docs", "libs", "docs"):
        model.use(name)
        answers[name] = model._runner.decode(model.greedy(ids, 3, [0]))
    assert answers["libs"].startswith(" libs") and answers["docs"].startswith(" doc")
    bill = json.loads((tmp_path / "b" / "sbom.cdx.json").read_text(encoding="utf-8"))
    names = [entry["name"] for entry in bill["components"]]
    assert {"libs.jsonl", "docs.jsonl", "adapters/libs.onnx_adapter"} < set(names)
    text = io.StringIO()
    Console(file=text, width=120).print(adapters_text(made, None))
    assert "docs as trained" in text.getvalue() and "base loss" in text.getvalue()


def test_what_cannot_be_switched_to_is_refused_by_name(
    trained: dict[str, Path],
    checkpoint_folder: Path,
    plan_file: Any,
    tmp_path: Path,
) -> None:
    def attempt(**folders: Path) -> None:
        export_adapters(folders, load_target("ort-fp32"), tmp_path / "b", device=None, progress=silent)

    with pytest.raises(BadInput, match=r"adapters: 'Not a name' is no name"):
        attempt(**{"Not a name": trained["libs"]})
    run(plan_file(tuner="full", epochs=1.0), tmp_path / "full")
    with pytest.raises(
        BadInput, match=r"full: was trained by Full fine-tuning, whose change cannot be switched to\n\nhint: plan"
    ):
        attempt(libs=trained["libs"], full=tmp_path / "full")
    document = trained["docs"] / "train.json"
    result = json.loads(document.read_text())
    other = {"inputs": result["inputs"] | {"base weights": "00" * 32}}
    document.write_text(json.dumps(result | other))
    with pytest.raises(
        BadInput, match=r"adapters: were trained on different base weights\n(.*\n)*docs \(.*: trained on 000"
    ):
        attempt(**trained)
    assert not (tmp_path / "b").exists()


def test_the_verb_refuses_what_it_cannot_read(trained: dict[str, Path], tmp_path: Path) -> None:
    def edgeft(*arguments: object) -> str:
        return warm.edgeft("adapters", *arguments, code=1).stderr

    assert "cannot use 'libs'" in edgeft("libs")
    assert "cannot use 'libs=b'" in edgeft(f"libs={trained['libs']}", "libs=b")
    assert "train.json: no such file" in edgeft(f"libs={tmp_path / 'nothing'}")


def test_adapters_are_refused_where_the_runtime_is_llama_cpp(tmp_path: Path) -> None:
    anything: Any = [None]
    with pytest.raises(
        BadInput, match=r"target gguf-q8_0: runs in llama\.cpp, .*\n\nhint: choose an ort- or onnx-portable- target"
    ):
        build_bundle(checkpoint(), load_target("gguf-q8_0"), tmp_path / "b", prompts=[], adapters=anything)


# one more, into a bundle that is out there


def add(bundle: Path, name: str, trained: Path, out: Path | None = None) -> Bundle:
    return add_adapter(bundle, name, trained, out or bundle, silent)


def test_one_more_adapter_comes_into_a_bundle_and_nothing_else_changes(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    """As if all of them had been exported together, but for the graph, which only has to have the inputs."""
    place = tmp_path / "b"
    export_adapters({"docs": trained["docs"]}, load_target("ort-fp32"), place, device=None, progress=silent)
    before = {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    golden = json.loads(before["bundle.json"])["adapters"]["docs"]
    made = add(place, "libs", trained["libs"])
    after = {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert {name for name in after if before.get(name) != after[name]} == {
        "bundle.json", "README.md", "sbom.cdx.json", "adapters/libs.onnx_adapter"}  # fmt: skip
    assert RUNNER.verify(place) == [] and json.loads(after["bundle.json"])["adapters"]["docs"] == golden
    proof = made.adapters["libs"].proof
    assert proof is not None and proof.rungs[-1].mean_kl_nats < 1e-6 and made.adapters["libs"].golden
    both = export_adapters(trained, load_target("ort-fp32"), tmp_path / "both", device=None, progress=silent)
    assert made.adapters["libs"].parameters == both.adapters["libs"].parameters
    assert made.weight_bytes_per_token == both.weight_bytes_per_token
    assert made.predicted.weights_bytes == both.predicted.weights_bytes
    model = ArtifactModel(place)
    ids = model._runner.encode("Package: lib3\nSection:", plain=True)
    for name, answer in (("docs", " doc"), ("libs", " libs"), ("docs", " doc")):
        model.use(name)
        assert model._runner.decode(model.greedy(ids, 3, [0])).startswith(answer)
    bill = json.loads(after["sbom.cdx.json"])
    assert {"libs.jsonl", "adapters/libs.onnx_adapter"} < {entry["name"] for entry in bill["components"]}
    assert "docs, libs" in after["README.md"].decode()


def test_an_adapter_that_breaks_the_contract_is_not_added(
    trained: dict[str, Path], plan_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "b"
    run(plan_file(layers="sparse", trained_layers="1", epochs=1.0), tmp_path / "narrow")
    export_adapters({"narrow": tmp_path / "narrow"}, load_target("ort-fp32"), place, device=None, progress=silent)
    whole = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(BadInput, match=r"products that the bundle's graph has no inputs for:\nlayers\.0\."):
        add(place, "libs", trained["libs"])
    with pytest.raises(BadInput, match="has an adapter 'narrow' already"):
        add(place, "narrow", tmp_path / "narrow")
    with monkeypatch.context() as patch:
        patch.setattr("edgeft.exporting.add_adapter.environment", lambda runtime: Bundle.read(
            place / "bundle.json").environment.model_copy(update={"cpu": "another"}))  # fmt: skip
        with pytest.raises(BadInput, match="its golden vectors would be of two kinds"):
            add(place, "more", tmp_path / "narrow")
    manifest = json.loads((place / "bundle.json").read_text())
    other = Bundle.model_validate(manifest | {"provenance": manifest["provenance"] | {"base weights": "00" * 32}})
    shutil.copytree(place, tmp_path / "other")
    other.write(tmp_path / "other" / "bundle.json")
    with pytest.raises(BadInput, match=r"is not as it was exported|was trained on the base"):
        add(tmp_path / "other", "more", tmp_path / "narrow")
    (tmp_path / "other" / "genai_config.json").write_text("{}")
    with pytest.raises(BadInput, match="is not as it was exported"):
        add(tmp_path / "other", "more", tmp_path / "narrow")
    with pytest.raises(BadInput, match="takes no adapters: it was built for one model"):
        add(bundle("ort-int4"), "more", tmp_path / "narrow")
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == whole
