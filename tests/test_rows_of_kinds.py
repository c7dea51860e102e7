"""Is a tuner, a runtime, a family a row of one table, and nothing else? A row of each is added and taken to the end."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, ROWS, plan_of, run, save_model

from edgeft.engine.trainable import unit_changes
from edgeft.errors import BadInput, MissingExtra
from edgeft.exporting.bundle import Bundle
from edgeft.exporting.export import export
from edgeft.memory import train_step
from edgeft.merging.merge import merge
from edgeft.models.checkpoint import Checkpoint, load_plain
from edgeft.models.families import FAMILIES, Family, Gguf
from edgeft.models.parts import find_parts
from edgeft.models.spec import read_model_spec
from edgeft.planning.plan import Plan, make_plan
from edgeft.progress import silent
from edgeft.reporting.matrix import method
from edgeft.settings.job import Job, make_job
from edgeft.settings.tuners import TUNERS
from edgeft.simulation.simulate import simulate
from edgeft.targets import gguf_file
from edgeft.targets.runtimes import RUNTIMES
from edgeft.targets.target import load_target

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_a_tuner_is_a_row(plan_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA whose factors begin as PEFT's option says: planned, trained, measured and merged by nothing but its row."""
    with pytest.raises(
        BadInput,
        match="tuner: input should be 'lora', 'dora', 'adalora', 'ia3', 'h-adapter', 'adapter', 'prefix', 'prompt' "
        "or 'full', got 'plain'",
    ):
        make_job(model="any", tuner="plain")
    plain = replace(
        TUNERS["lora"], rate=lambda hidden: 0.01, peft={"init_lora_weights": "gaussian"}, short="plain r{rank}"
    )
    monkeypatch.setitem(TUNERS, "plain", plain)
    plan = Plan.read(plan_file(tuner="plain", base_precision="fp32", layers="all", lora_scale="plain"))
    assert plan.training.learning_rate == 0.01 and method(plan) == "FP32 plain r4, all 2 layers"
    trained = run(tmp_path / "plan.json", tmp_path / "train")
    written = json.loads((tmp_path / "train" / "adapter_config.json").read_text())
    assert not written.get("use_rslora") and written["init_lora_weights"] == "gaussian"
    merge(tmp_path / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    factors = load_file(tmp_path / "train" / "adapter_model.safetensors")
    base, merged = Checkpoint(Path(plan.job.model)), Checkpoint(tmp_path / "merged")
    for name in (f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)):
        down, up = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        expected = base.read(f"{name}.weight") + plan.training.lora_alpha / 4 * up @ down
        torch.testing.assert_close(merged.read(f"{name}.weight"), expected)
    model = load_plain(Path(plan.job.model))
    moved = unit_changes(tmp_path / "train", base, model, find_parts(model), trained.training)
    whole = [f"model.layers.0.{where}.weight" for where in (
        *(f"self_attn.{name}" for name in PROJECTIONS[:4]), *(f"mlp.{name}" for name in PROJECTIONS[4:]))]  # fmt: skip
    change, size = (
        sum(float(matrix.square().sum()) for matrix in matrices)
        for matrices in ([merged.read(name) - base.read(name) for name in whole], [base.read(name) for name in whole])
    )
    assert moved["layer 0"] == pytest.approx((change / size) ** 0.5, rel=1e-3)


def test_a_tuner_says_how_large_what_it_trains_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third vector for each projection, as DoRA's magnitudes are."""
    spec = read_model_spec(str(ROOT / "examples" / "configs" / "smollm2-135m"))
    wide = replace(TUNERS["lora"], sizes=lambda inputs, outputs, rank, last: (rank * inputs, rank * outputs, outputs))
    monkeypatch.setitem(TUNERS, "wide", wide)
    one, other = (plan_of(spec, range(3), tuner=tuner) for tuner in ("lora", "wide"))
    more = 3 * sum(linear.out_features for linear in spec.linears)
    assert train_step.trained_parameters(spec, other) - train_step.trained_parameters(spec, one) == more
    assert train_step.optimizer_bytes(spec, other) - train_step.optimizer_bytes(spec, one) == 8 * more


def test_a_runtime_is_a_row(merged_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that holds more and needs another package is planned, built, proven and said as its row says."""
    shipped = ROOT / "export" / "ort-int4.toml"
    toy, own = tmp_path / "toy-int4.toml", "another package"
    toy.write_text(shipped.read_text(encoding="utf-8").replace('"ort-genai"', '"toy"'), encoding="utf-8")
    with pytest.raises(
        BadInput, match=r"runtime: input should be 'ort-genai', 'llama\.cpp' or 'onnxruntime', got 'toy'"
    ):
        load_target(str(toy))
    row = replace(RUNTIMES["ort-genai"], needed=("toy-runtime",), process_bytes=300_000_000)
    monkeypatch.setitem(RUNTIMES, "toy", row)
    target = load_target(str(toy))
    with monkeypatch.context() as absent:
        absent.setitem(RUNTIMES, "toy", replace(row, module="no_such_module", packages=(own,)))
        with pytest.raises(MissingExtra, match=own):
            export(merged_folder, target, tmp_path / "bundle", device=None, progress=silent)
    jobs = [make_job(model=str(ROOT / "examples" / "debian-tiny"), profile="cpu-8gb", target=name)
            for name in ("ort-int4", str(toy))]  # fmt: skip
    usual, other = ({phase.name: phase.expected_bytes for phase in make_plan(job).stages.phases} for job in jobs)
    assert other["bundle"] - usual["bundle"] == 224_000_000 and other["export: build"] == usual["export: build"]
    export(merged_folder, target, tmp_path / "bundle", device=None, progress=silent)
    made = Bundle.read(tmp_path / "bundle" / "bundle.json")
    assert made.target.runtime == "toy" and made.proof is not None
    assert made.predicted.runtime_bytes == 300_000_000 + 2 * 600_000
    assert "pip install toy-runtime\n" in (tmp_path / "bundle" / "README.md").read_text(encoding="utf-8")
    assert '"toy-runtime"' in (tmp_path / "bundle" / "sbom.cdx.json").read_text(encoding="utf-8")


def test_every_runtime_has_a_builder() -> None:
    for name, runtime in RUNTIMES.items():
        builder = importlib.import_module(f"edgeft.targets.{runtime.builder}")
        assert all(hasattr(builder, each) for each in ("build_model", "read_weights", "write_limits")), name


SEED = Family(  # Llama's code; biases where its config says so
    "SeedOssForCausalLM",
    tuple((name, *rest[:2], {"o": "attention_out_bias", "q": "attention_bias", "k": "attention_bias",
          "v": "attention_bias"}.get(name[0], "mlp_bias"), rest[3])
          for name, *rest in FAMILIES["llama"].linears),
    {"max_position_embeddings": 524288, "hidden_act": "silu", "tie_word_embeddings": False, "num_key_value_heads": 8,
     "head_dim": 128, "attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    gguf=Gguf("llama", rotates_pairs=True),
)  # fmt: skip


def test_a_family_is_a_row(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed-OSS, which edgeft does not know: counted and planned exactly, trained, merged, written as GGUF."""
    model = tmp_path / "model"
    counted = save_model(model, "seed_oss", attention_bias=False, residual_dropout=0.0, attention_dropout=0.0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((tokenizer_folder / name).read_bytes())
    with pytest.raises(BadInput, match="does not know the model type 'seed_oss'"):
        gguf_file.build_model(model, load_target("gguf-f16"), counted, tmp_path)
    monkeypatch.setitem(FAMILIES, "seed_oss", SEED)
    spec = read_model_spec(str(model))
    assert spec.exact and not counted.exact
    unlike = {"counted_from", "model"}
    assert spec.model_dump(exclude=unlike) == counted.model_dump(exclude=unlike)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pins: dict[str, Any] = {"batch_size": 4, "epochs": 1.0, "rank": 4, "eval_rows": 4, "base_precision": "fp32"}
    plan = make_plan(make_job(model=str(model), data=str(tmp_path / "rows.jsonl"), profile="cpu-8gb", **pins))
    assert not any("simulation" in note for note in plan.notes)
    closed = sum(term.bytes for term in train_step.step_terms(spec, plan.training, plan.work))
    assert closed == pytest.approx(simulate(spec, plan.training, plan.work).live_peak_bytes, rel=0.005)
    plan.write(tmp_path / "plan.json")
    run(tmp_path / "plan.json", tmp_path / "train")
    merge(tmp_path / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    gguf_file.build_model(tmp_path / "merged", load_target("gguf-f16"), spec, tmp_path)
    tensors = {tensor.name: tensor for tensor in gguf_file.library().GGUFReader(str(tmp_path / "model.gguf")).tensors}
    value = Checkpoint(tmp_path / "merged").read("model.layers.1.self_attn.v_proj.weight").half().numpy()
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight"].data, value)


# where a name of a kind may decide: its own table
TABLES = {"tuner": ("tuners.py", TUNERS), "runtime": ("runtimes.py", RUNTIMES), "model_type": ("families.py", FAMILIES)}


def decided_by_name(code: str, asked: str, names: Any) -> Iterator[str]:
    """Comparisons of a tuner's, runtime's or family's name with one that is written out."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Compare) and asked in ast.unparse(node):
            texts = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
            yield from [ast.unparse(node)] * bool(texts & set(names))


@pytest.mark.parametrize("asked", TABLES)
def test_only_rows_decide(asked: str) -> None:
    home, table = TABLES[asked]
    for path in (ROOT / "edgeft").rglob("*.py"):
        found = list(decided_by_name(path.read_text(encoding="utf-8"), asked, table))
        assert path.name == home or not found, f"{path}: {found}: a field of the row in {home} says it"
    planted = f"if plan.{asked} in ({next(iter(table))!r}, 'another'):\n    pass\n"
    assert list(decided_by_name(planted, asked, table))


def test_the_schema_names_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Job.model_json_schema()["properties"]["tuner"]["anyOf"][0]["enum"] == list(TUNERS)
