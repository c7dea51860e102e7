"""Is portable ONNX what it says: standard operators, PyTorch's numbers, the same bytes twice, encoders too?"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import PROMPTS, ROWS, checkpoint, save_tokenizer, some_ids, torch_logits, workplace
from tiny import EXAMPLE
from typer.testing import CliRunner

from edgeft.cli import app
from edgeft.data.dataset import TextTokenizer
from edgeft.errors import BadInput, DoesNotFit, MissingExtra, ParityFailed
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.build import build_bundle
from edgeft.exporting.bundle import Bundle, GoldenInput, Measurement, measurement_path
from edgeft.exporting.encoder import export_encoder, is_encoder, read_texts
from edgeft.machines.runner import runner_module
from edgeft.models.spec import read_model_spec
from edgeft.targets.footprint import bundle_weights, choose_context, predict
from edgeft.targets.optimum_script import older_config
from edgeft.targets.portable_onnx import INTERPRETER, interpreter, read_weights
from edgeft.targets.target import load_target

FP32, INT8 = load_target("onnx-portable-fp32"), load_target("onnx-portable-int8")
needs_optimum = pytest.mark.targets  # make test-targets has its environment


# -- without optimum --------------------------------------------------------------------------------------------------


def test_a_config_of_transformers_5_keeps_its_rotary_base_for_transformers_4() -> None:
    rope = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    made = older_config({"model_type": "llama", "dtype": "float16", "rope_parameters": rope})
    assert made == {
        "model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    }  # fmt: skip
    plain = older_config({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}})
    assert plain == {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5}
    two = {"full_attention": rope, "sliding_attention": {"rope_theta": 1e3, "rope_type": "default"}}
    assert older_config({"rope_parameters": two})["rope_local_base_freq"] == 1e3
    assert older_config({"rope_theta": 7.0}) == {"rope_theta": 7.0}  # as it was in 4
    two["sliding_attention"] = rope
    with pytest.raises(ValueError, match="scaled rotary positions in the windowed layers"):
        older_config({"rope_parameters": two})


def test_optimum_is_looked_for_where_it_is_named_then_here_then_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv(INTERPRETER, raising=False)
    with pytest.raises(
        MissingExtra, match=r"optimum-onnx: is not installed; .*\n\nhint: make optimum, or: python3"
    ) as why:
        build_bundle(checkpoint(), FP32, tmp_path / "b", prompts=[GoldenInput(text="x")])
    assert why.value.exit_code == 5 and list(tmp_path.iterdir()) == []
    beside = tmp_path / ".venv-optimum" / "bin" / "python"
    beside.parent.mkdir(parents=True)
    beside.symlink_to(sys.executable)
    assert interpreter() == str(beside)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert interpreter() == sys.executable
    monkeypatch.setenv(INTERPRETER, "/nowhere/python")
    with pytest.raises(BadInput, match=r"EDGEFT_OPTIMUM_PYTHON: no such program: /nowhere/python"):
        interpreter()
    monkeypatch.setenv(INTERPRETER, str(beside))
    assert interpreter() == str(beside)


def test_an_interpreter_without_optimum_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$2" "$3" "$4" "$5" "$6"\n')
    bare.chmod(0o755)
    monkeypatch.setenv(INTERPRETER, str(bare))
    with pytest.raises(MissingExtra, match=r"cannot be imported by .*bare: ModuleNotFoundError: No module named"):
        build_bundle(checkpoint(), FP32, tmp_path / "b", prompts=[])
    assert not (tmp_path / "b").exists()


def test_memory_of_the_device_counts_both_caches_and_a_passs_scores() -> None:
    spec = read_model_spec(str(EXAMPLE))
    weights = bundle_weights(spec, FP32)
    assert weights.stored_bytes == 4 * spec.total_parameters
    found = predict(spec, FP32, weights, 300)
    assert found.kv_cache_bytes == 2 * 2 * 8 * 2 * 64 * 4 * 300  # read and written; K and V, layers, heads, width
    assert found.scores_bytes == 3 * 4 * 256 * 300 * 4
    assert found.logits_bytes == 256 * 4096 * 4
    room = predict(spec, FP32, weights, 300).memory_bytes
    assert choose_context(spec, FP32, weights, room) == (300, "device memory")
    with pytest.raises(DoesNotFit, match=r"bundle: needs .* for a context of 128 tokens"):
        choose_context(spec, FP32, weights, 2**20)


# -- with optimum -----------------------------------------------------------------------------------------------------


@functools.cache
def bundle(name: str) -> Path:
    out = workplace() / f"bundle {name}"
    build_bundle(checkpoint(), load_target(name), out, prompts=PROMPTS, device_memory_bytes=2**30)
    return out


@needs_optimum
@pytest.mark.parametrize("name", ["onnx-portable-fp32", "onnx-portable-int8"])
def test_a_portable_bundle_is_standard_whole_and_as_large_as_predicted(name: str, tmp_path: Path) -> None:
    import onnx

    made, target = Bundle.read(bundle(name) / "bundle.json"), load_target(name)
    assert runner_module().verify(bundle(name)) == []
    assert set(made.files) == {
        "run.py", "model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "sbom.cdx.json", "README.md",
    }  # fmt: skip
    graph = onnx.load(str(bundle(name) / "model.onnx"))
    onnx.checker.check_model(str(bundle(name) / "model.onnx"))
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 18)]
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    assert {entry.key: entry.value for entry in graph.metadata_props}["optimum-onnx"] == "0.1.0"
    spec = read_model_spec(str(checkpoint()))
    norms = 4 * spec.hidden_size * (2 * spec.num_hidden_layers)  # all ones here, and stored once
    predicted, stored = bundle_weights(spec, target).stored_bytes, read_weights(bundle(name)).stored_bytes
    assert predicted - norms <= stored <= predicted
    here = Measurement.read(measurement_path(bundle(name)))
    assert here.predicted_here_bytes == pytest.approx(here.measured.peak_memory_bytes, rel=0.15)
    again = tmp_path / "again"
    build_bundle(checkpoint(), target, again, prompts=PROMPTS, device_memory_bytes=2**30, measure=False)
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in bundle(name).iterdir()}


@needs_optimum
def test_fp32_gives_the_logits_of_torch_in_one_pass_or_several() -> None:
    ids = some_ids(300)
    np.testing.assert_allclose(ArtifactModel(bundle("onnx-portable-fp32")).logits(ids), torch_logits(ids), atol=2e-3)


@needs_optimum
def test_a_chat_and_half_characters_go_through_tokenizers_and_jinja() -> None:
    runner = runner_module().Runner(bundle("onnx-portable-fp32"))
    for text in (*ROWS[:20], "Größe: naïve → 12.5%\n\n  tabs\tand ünïcode", "日本語 🙂"):
        assert runner.decode(runner.encode(text, plain=True)) == text
    done = subprocess.run(
        [sys.executable, bundle("onnx-portable-fp32") / "run.py", "hello", "--chat", "--max-tokens", "2", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    ids = json.loads(done.stdout)["prompt_ids"]
    text = TextTokenizer(checkpoint()).render([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    assert ids == TextTokenizer(checkpoint()).encode([text])[0]


@needs_optimum
def test_untied_tables_stay_in_fp32_and_scaled_rotary_positions_survive(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "untied"
    folder.mkdir()
    rope = {
        "rope_type": "llama3", "rope_theta": 1e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        initializer_range=0.3, rope_parameters=rope, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(2)
    LlamaForCausalLM(config).save_pretrained(folder)
    ids = some_ids(200)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0].numpy()
    build_bundle(folder, FP32, tmp_path / "b", prompts=[], measure=False)
    np.testing.assert_allclose(ArtifactModel(tmp_path / "b").logits(ids), expected, atol=2e-3)
    build_bundle(folder, INT8, tmp_path / "b", prompts=[], measure=False)
    weights, spec = read_weights(tmp_path / "b"), read_model_spec(str(folder))
    assert weights.stored_bytes - weights.bytes_per_token == 4 * spec.embedding_parameters
    assert weights.head_bytes == spec.vocab_size * (64 + 5)


@needs_optimum
def test_an_architecture_optimum_does_not_know_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(checkpoint(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "granite4000"}))
    with pytest.raises((BadInput, ParityFailed), match=r"granite4000"):
        build_bundle(folder, FP32, tmp_path / "b", prompts=[])


# -- encoders ---------------------------------------------------------------------------------------------------------


def bert(folder: Path, classifier: bool) -> Any:
    """A small BERT with random weights, its tokenizer putting a token on both sides of a text."""
    from tokenizers import Tokenizer, processors
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    folder.mkdir()
    words = save_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.BertProcessing(("<|im_end|>", 2), ("<|im_start|>", 1))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = BertConfig(
        vocab_size=words, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=128, id2label={0: "libs", 1: "doc", 2: "games"}, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(3)
    model = (BertForSequenceClassification if classifier else BertModel)(config).eval()
    model.save_pretrained(folder)
    return model


@needs_optimum
@pytest.mark.parametrize("name", ["onnx-portable-fp32", "onnx-portable-int8"])
@pytest.mark.parametrize("classifier", [True, False])
def test_an_encoder_gives_torchs_labels_and_embeddings(tmp_path: Path, classifier: bool, name: str) -> None:
    model, out = bert(tmp_path / "bert", classifier), tmp_path / "bundle"
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(row.replace("\n", " ") for row in ROWS[:20]))
    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "bert"), "--target", name, "--texts", str(texts), "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    made = Bundle.read(out / "bundle.json")
    proof = made.encoder_proof
    assert proof is not None and proof.texts == 20
    assert made.task == ("text-classification" if classifier else "feature-extraction")
    if name == "onnx-portable-fp32":
        assert proof.max_difference < 1e-4 and proof.label_agreement in (1.0, None)
    assert runner_module().verify(out) == []
    text = read_texts(texts)[1]
    asked = subprocess.run([sys.executable, out / "run.py", text, "--json"], capture_output=True, text=True, check=True)
    given = json.loads(asked.stdout)
    assert given["prompt_ids"][0] == 1 and given["prompt_ids"][-1] == 2
    with torch.no_grad():
        output = model(torch.tensor([given["prompt_ids"]]))
    if classifier:
        shares = output.logits[0].softmax(0)
        label = ("libs", "doc", "games")[int(shares.argmax())]
        assert given["scores"][label] == pytest.approx(float(shares.max()), abs=1e-4 if name == FP32.name else 0.2)
        plain = subprocess.run([sys.executable, out / "run.py", text], capture_output=True, text=True, check=True)
        assert plain.stdout.split()[0] == given["label"]
    else:
        expected = output.last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(given["embedding"], expected, atol=1e-4 if name == FP32.name else 0.5)
    bench = subprocess.run([sys.executable, out / "run.py", "--bench"], capture_output=True, text=True, check=False)
    assert bench.returncode == 1 and "measures models that write text" in bench.stderr
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[-100] ^= 64
    (out / "model.onnx.data").write_bytes(data)
    assert "model.onnx.data: changed since the export" in runner_module().verify(out)


@needs_optimum
def test_another_model_than_the_graphs_fails_parity_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bert(tmp_path / "bert", True)
    monkeypatch.setattr(
        "edgeft.exporting.encoder._by_torch", lambda folder, encoder, rows: [np.ones(3) * 9] * len(rows)
    )
    with pytest.raises(ParityFailed, match=r"(?s)encoder against PyTorch: .*values differ by"):
        export_encoder(tmp_path / "bert", FP32, tmp_path / "b", texts=ROWS[:3])
    assert not (tmp_path / "b").exists()


def test_what_an_encoder_needs_is_named(tmp_path: Path) -> None:
    bert(tmp_path / "bert", True)
    assert is_encoder(tmp_path / "bert") and not is_encoder(checkpoint()) and not is_encoder(tmp_path)
    done = CliRunner().invoke(app, ["export", str(tmp_path / "bert")])
    assert isinstance(done.exception, BadInput) and str(done.exception).startswith("--texts: is missing: an encoder is")
    with pytest.raises(BadInput, match=r"target ort-int4: is for models that write text; this is an encoder"):
        export_encoder(tmp_path / "bert", load_target("ort-int4"), tmp_path / "b", texts=["x"])
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n{"prompt": "b"}\n{}\n')
    assert read_texts(tmp_path / "rows.jsonl") == ["a", "b"]
    (tmp_path / "empty").write_text("\n")
    for name, message in (("empty", "there are no texts in it"), ("nothing", "cannot be read: ")):
        with pytest.raises(BadInput, match=message):
            read_texts(tmp_path / name)
