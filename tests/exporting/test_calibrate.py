"""Calibrated codes: from the inputs that rounded layers really give, and in built bundles."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import PROMPTS, ROWS, checkpoint, model_folder, some_ids, workplace
from runtimes import dequantised, graph_weights
from tiny import EXAMPLE, job_data

from edgeft.data.samples import Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.errors import BadInput
from edgeft.exporting import calibrate as calibrate_module
from edgeft.exporting import layer_walk
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.build import build_bundle
from edgeft.exporting.calibrate import calibrate, put_codes
from edgeft.exporting.compensation import damped, inverse_factor, least_change
from edgeft.exporting.export import export
from edgeft.exporting.layer_walk import chosen_rows
from edgeft.machines.profile import load_profile
from edgeft.memory import stages as host
from edgeft.memory.train_step import Workload
from edgeft.models.checkpoint import load_plain
from edgeft.models.spec import read_model_spec
from edgeft.planning.costs import Question
from edgeft.settings.job import make_job
from edgeft.targets.codes import Codes
from edgeft.targets.gguf_file import build_model as build_gguf
from edgeft.targets.grid import Grid, joined
from edgeft.targets.nbits import packed
from edgeft.targets.ort import matrices
from edgeft.targets.rounding import grids_of, round_, round_model
from edgeft.targets.target import Target, load_target, to_nearest

INT4 = load_target("ort-int4-calibrated")
LAYER = {"qkv": 64 * (64 + 32 + 32), "o": 64 * 64, "mlp": 3 * 64 * 128, "norms": 2 * 64}  # weights of one layer
EXACT = INT4.model_copy(update={"accuracy_level": 0})


def weights(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4))


def samples(folder: Path, count: int = 6) -> list[Sample]:
    encoded = TextTokenizer(folder).encode(ROWS[:count])
    return [Sample(ids[: 20 + at], ids[: 20 + at], 0) for at, ids in enumerate(encoded)]


@functools.cache
def tiny_codes() -> Codes:
    folder = workplace() / "codes"
    folder.mkdir()
    return calibrate(checkpoint(), INT4, samples(checkpoint()), folder)


def test_every_layer_is_calibrated_on_what_the_rounded_ones_before_it_give() -> None:
    """The second layer's codes, from its inputs in a whole model that holds the first one's and rounded tables."""
    source, codes = checkpoint(), tiny_codes()
    assert len(list(codes)) == 2 * 7
    model: Any = load_plain(source)
    grids = grids_of(model, to_nearest(INT4))
    for name, grid in grids.items():
        if "layers." not in name:
            round_(model.get_parameter(name).data, grid)

    def gram_of(module: str) -> torch.Tensor:
        total = torch.zeros(64, 64)

        def see(_: Any, arguments: Any) -> None:
            read = arguments[0].reshape(-1, 64)
            total.add_(read.T @ read)

        hook = model.get_submodule(module).register_forward_pre_hook(see)
        with torch.no_grad():
            for sample in samples(source):
                model(input_ids=torch.tensor([list(sample.ids)]), use_cache=False)
        hook.remove()
        return total

    def expected(module: str) -> torch.Tensor:
        weight = model.get_submodule(module).weight.data
        gram = damped(gram_of(module))
        return least_change(weight, gram, inverse_factor(gram), grids[f"{module}.weight"]).codes

    def differing(module: str) -> float:
        return float((codes.read(f"{module}.weight").codes != expected(module)).float().mean())

    assert differing("model.layers.0.self_attn.k_proj") < 0.005
    with torch.no_grad():
        for name in codes:
            if "layers.0." in name:
                model.get_parameter(name).copy_(codes.read(name).weight())
    assert differing("model.layers.1.self_attn.k_proj") < 0.005
    unrounded = load_plain(source).state_dict()  # planted: inputs of layers that are not rounded
    model.load_state_dict(unrounded)
    assert differing("model.layers.1.self_attn.k_proj") > 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_files_changes_no_code(tmp_path: Path, dtype: torch.dtype) -> None:
    for name, kept in (("half", dtype), ("fp32", torch.float32)):
        model = load_plain(checkpoint(tied=False), dtype).to(kept)
        model.save_pretrained(shutil.copytree(checkpoint(tied=False), tmp_path / name))
        (tmp_path / f"{name}-codes").mkdir()
        calibrate(tmp_path / name, INT4, samples(checkpoint()), tmp_path / f"{name}-codes")
    assert read_model_spec(str(tmp_path / "half")).dtype == str(dtype).removeprefix("torch.")
    for path in sorted((tmp_path / "half-codes").iterdir()):
        assert (tmp_path / "fp32-codes" / path.name).read_bytes() == path.read_bytes()


def test_one_layer_at_a_time_is_in_memory(tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint(), tmp_path / "source")
    load_plain(source, torch.bfloat16).save_pretrained(source)
    walk = calibrate_module._Walk(source, INT4, samples(source), Codes(tmp_path))
    held: list[list[int]] = []
    for index in range(2):
        assert {each.dtype for each in walk.layers[index].parameters()} == {torch.bfloat16}
        walk.step(index)
        held.append([sum(each.nbytes for each in layer.parameters()) for layer in walk.layers])
    assert held[0][0] == held[1][1] == 0 and held[0][1] == 2 * sum(LAYER.values())


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    calibrate(checkpoint(), INT4, samples(checkpoint()), tmp_path)
    for path in sorted(tiny_codes().folder.iterdir()):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def calibrated_bundle(target: Target, source: Path, codes: Codes) -> Path:
    out = workplace() / f"{source.name} {target.name} {target.accuracy_level}"
    if not out.exists():
        build_bundle(source, target, out, prompts=PROMPTS, measure=False, codes=lambda folder: codes)
    return out


def test_the_bundle_holds_these_codes_bit_for_bit() -> None:
    codes, stored = tiny_codes(), graph_weights(calibrated_bundle(EXACT, checkpoint(), tiny_codes()))
    seen = 0
    for name in codes:
        if "k_proj" in name or "v_proj" in name:
            continue
        parts = [name]
        if "q_proj" in name:  # the builder joins the three
            parts = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        stem = name.replace("self_attn.q_proj", "attn.qkv_proj").replace("self_attn", "attn").removesuffix(".weight")
        held = [value for key, value in sorted(stored.items()) if key.startswith(f"{stem}.MatMul.weight_")]
        made = [b"".join(each) for each in zip(*(packed(codes.read(part)) for part in parts), strict=True)]
        assert sorted(value.tobytes() for value in held) == sorted(made)
        seen += 1
    assert seen == 2 * 5
    assert not list(calibrated_bundle(EXACT, checkpoint(), codes).glob(".codes*"))


def test_the_bundle_computes_with_them() -> None:
    model, ids = load_plain(checkpoint()), some_ids(120)
    assert put_codes(model, EXACT, tiny_codes()) == 2 * 7 + 1
    with torch.no_grad():
        mine = model(torch.tensor([ids])).logits[0]
    given = torch.tensor(ArtifactModel(calibrated_bundle(EXACT, checkpoint(), tiny_codes())).logits(ids))
    torch.testing.assert_close(given, mine, rtol=1e-4, atol=1e-3)
    nearest = load_plain(checkpoint())
    round_model(nearest, to_nearest(EXACT))
    with torch.no_grad():
        other = nearest(torch.tensor([ids])).logits[0]
    assert (given - other).abs().max() > 0.5


def test_a_gguf_file_holds_them_where_llama_cpp_wants_its_rows(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = EXAMPLE
    target = load_target("gguf-q4_0").model_copy(update={"calibration": "gptq"})
    (tmp_path / "codes").mkdir()
    codes = calibrate(source, target, samples(source, 2), tmp_path / "codes")
    build_gguf(source, target, read_model_spec(str(source)), tmp_path, codes)
    model = load_plain(source)
    put_codes(model, target, codes)
    held, seen = dequantised(tmp_path).state_dict(), 0
    for name, value in model.state_dict().items():
        if name in codes:
            assert torch.equal(held[name], value), name
            seen += 1
    assert seen == len(list(codes)) > 0


def test_a_calibrated_target_needs_codes_and_no_other_takes_them(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^target ort-int4-calibrated: has calibration 'gptq'"):
        build_bundle(checkpoint(), INT4, tmp_path / "b", prompts=[], measure=False)
    with pytest.raises(BadInput, match=r"^target ort-int4: has calibration 'none'"):
        build_bundle(
            checkpoint(), load_target("ort-int4"), tmp_path / "b", prompts=[], measure=False,
            codes=lambda folder: tiny_codes(),
        )  # fmt: skip
    with pytest.raises(BadInput, match="chooses its codes on training rows"):
        round_model(load_plain(checkpoint()), INT4)


def test_rows_end_where_there_are_enough_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [Sample([1] * 10, [1] * 10, 0)] * 5
    for limit, expected in ((25, 2), (50, 5), (5, 1)):
        monkeypatch.setattr(layer_walk, "CALIBRATION_TOKENS", limit)
        assert len(chosen_rows(rows)) == expected
    monkeypatch.setattr(layer_walk, "CALIBRATION_ROWS", 1)
    assert len(chosen_rows(rows)) == 1
    with pytest.raises(BadInput, match=r"^calibration: there are no rows to calibrate on"):
        calibrate(checkpoint(), INT4, [], tmp_path)


@pytest.mark.parametrize("change", [{"method": "k_quant"}, {"weight_bits": 16, "head_bits": 16, "embedding_bits": 16}])
def test_calibration_is_for_grids_that_are_known_here(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="calibration needs method rtn, weight_bits below 16"):
        Target.model_validate(INT4.model_dump() | change)


def test_padding_and_batches_change_nothing_but_the_last_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layer_walk, "CALIBRATION_BATCH", 1)  # a row at a time, no padding at all
    alone = calibrate(checkpoint(), INT4, samples(checkpoint()), tmp_path)
    for name in tiny_codes():
        assert (alone.read(name).codes != tiny_codes().read(name).codes).float().mean() < 0.02, name
    np.testing.assert_allclose(alone.read(name).weight(), tiny_codes().read(name).weight(), atol=0.5)


def test_a_fused_checkpoints_codes_are_taken_apart(tmp_path: Path) -> None:
    """Phi-3 holds query, key and value as one matrix, gate and up as another; the builder keeps them apart."""
    spec = read_model_spec(str(model_folder("phi3")))
    kv, query = spec.num_key_value_heads * spec.head_dim, spec.num_attention_heads * spec.head_dim
    heights = {"qkv_proj": query + 2 * kv, "gate_up_proj": 2 * spec.intermediate_size}
    prefix, codes = "model.layers.0", Codes(tmp_path)
    whole = {name: Grid(4, 32, False, "rtn").encode(weights(rows, spec.hidden_size)) for name, rows in heights.items()}
    codes.write("layer-0000", {f"{prefix}.a.{name}.weight": each for name, each in whole.items()})
    found = {name.removeprefix("/model/layers.0/"): read() for name, read in matrices(codes, spec).items()}
    for name, parts in (("qkv_proj", "attn/q attn/k attn/v"), ("gate_up_proj", "mlp/gate mlp/up")):
        made = joined([found.pop(f"{part}_proj") for part in parts.split()])
        assert packed(made) == packed(whole[name])
    assert found == {}


def test_an_export_calibrates_on_the_training_rows_alone(
    merged_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Sample] = []
    stages: list[str] = []

    def spy(folder: Path, target: Target, rows: list[Sample], out: Path, progress: Any) -> Codes:
        seen.extend(rows)
        return calibrate(folder, target, rows, out, progress)

    monkeypatch.setattr(calibrate_module, "calibrate", spy)
    loose = INT4.parity.model_copy(update={"min_top1_agreement": 0.0, "max_mean_kl_nats": 9.0})
    loose = loose.model_copy(update={"max_loss_increase_nats": 9.0, "max_exact_match_drop_points": 100.0})
    wanted = INT4.model_copy(update={"parity": loose})
    bundle = export(
        merged_folder, wanted, tmp_path / "bundle", device=None, progress=lambda stage, *_: stages.append(stage)
    )
    assert [row.ids for row in seen] == [row.ids for row in job_data(merged_folder).train]
    assert bundle.target.calibration == "gptq" and bundle.provenance["calibration"].startswith("gptq, ")
    assert stages.count("calibrate") == 2 + 1  # layers, and the end


def test_what_calibrating_holds_is_planned_for_calibrated_targets_alone() -> None:
    """Measured on SmolLM2-135M in bf16, 128 rows of 59 tokens: 799 MiB at the highest."""
    spec = read_model_spec(str(EXAMPLE.parent / "configs" / "smollm2-135m")).model_copy(update={"dtype": "bfloat16"})
    profile = load_profile("cpu-8gb")
    job = make_job(model="smollm2-135m")
    question = Question(job, profile, spec, None, Workload(90, 8), 8 * 2**20, 8 * 2**30)
    assert host.calibrate_phases(question, to_nearest(INT4)) == ()
    (phase,) = host.calibrate_phases(question, INT4)
    assert phase.expected_bytes / 2**20 == pytest.approx(799, rel=0.05)
    names = [term.name for term in phase.terms]
    assert names == ["process", "data", "weight file", "rows", "one layer"]
    wordy = replace(question, spec=spec.model_copy(update={"vocab_size": 400_000}))
    assert host.calibrate_phases(wordy, INT4)[0].terms[-1].name == "embedding"
