"""A KV cache of 8 bits: its scales, its codes, what proves it, and planted faults."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import PROMPTS, ROWS, checkpoint, model_folder, reseal, save_tokenizer, some_ids, workplace
from tiny import save_model

from edgeft.api.deploying import export as api_export
from edgeft.data.samples import Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.errors import BadInput, ParityFailed
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.build import build_bundle
from edgeft.exporting.bundle import Bundle
from edgeft.exporting.calibrate import calibrate
from edgeft.exporting.export import export, export_adapters
from edgeft.exporting.kv_rung import cache_rung, long_rows, reached, scales_rung
from edgeft.exporting.kv_scales import find_scales, finder, rows_for_scales
from edgeft.exporting.parity import CACHE
from edgeft.exporting.rehearsal import go_through
from edgeft.machines.runner import runner_module
from edgeft.models.spec import read_model_spec
from edgeft.planning.plan import Plan
from edgeft.progress import silent
from edgeft.targets.kv_cache import CODES, CacheScales, codes_of, longest_pairs, scales_of, stored_scales
from edgeft.targets.target import Target, load_target


def small(name: str, **changes: Any) -> Target:
    return Target.model_validate(load_target(name).model_dump() | {"kv_bits": 8} | changes)


needs_llama = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is missing")
FP32, INT4 = small("ort-fp32"), small("ort-int4")


def samples(folder: Path, count: int = 60) -> list[Sample]:
    return [Sample(ids[:48], ids[:48], 0) for ids in TextTokenizer(folder).encode(ROWS[:count])]


@functools.cache
def scales(folder: Path, target: Target) -> CacheScales:
    return find_scales(folder, target, samples(folder))


@functools.cache
def built(folder: Path, target: Target) -> Path:
    out = workplace() / f"{folder.name} {target.name} of 8 bits"
    build_bundle(folder, target, out, prompts=PROMPTS[:1], measure=False, scales=lambda codes: scales(folder, target))
    return out


def with_scales(place: Path, change: Callable[[CacheScales], CacheScales]) -> ArtifactModel:
    """A bundle that was built with other scales than those that were found."""
    target, found = INT4, scales(checkpoint(), INT4)
    build_bundle(checkpoint(), target, place / "b", prompts=[], measure=False, scales=lambda codes: change(found))
    return ArtifactModel(place / "b")


def test_a_key_reaches_the_length_of_its_pair_at_some_position_and_no_more() -> None:
    """Turned by transformers' own rotary embedding to many positions."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    random = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 1, 16, generator=random)
    angles = torch.arange(4000)[:, None] * torch.logspace(0, -3, 8)
    cos, sin = (torch.cat([part, part], -1)[None] for part in (angles.cos(), angles.sin()))
    turned = apply_rotary_pos_emb(key.expand(1, 1, 4000, 16), key.expand(1, 1, 4000, 16), cos, sin)[1][0, 0]
    reach = longest_pairs(key[0].numpy(), 16)
    most = turned.abs().amax(0).numpy()
    assert (most <= reach * (1 + 1e-5)).all() and (most > 0.999 * reach)[:7].all()
    assert (longest_pairs(key[0].numpy(), 0) == key[0, 0].abs().numpy()).all()
    half = longest_pairs(key[0].numpy(), 8)  # half of the channels are not turned
    assert (half[8:] == key[0, 0, 0, 8:].abs().numpy()).all() and half[0] == pytest.approx(half[4])


FAMILIES = ["llama3", "qwen3", "gemma2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "gemma"))]


@pytest.mark.parametrize("kind", FAMILIES)
def test_scales_found_in_torch_are_those_of_what_the_runtime_keeps(kind: str) -> None:
    """In fp32: scaled positions, normed keys, windows, biases."""
    folder = model_folder(kind)
    found = scales(folder, FP32)
    rows = [each.ids for each in rows_for_scales(samples(folder), read_model_spec(str(folder)))]
    if kind == "gemma2":
        found = find_scales(folder, FP32, rows_for_scales(samples(folder), read_model_spec(str(folder))))
        assert {len(row) for row in rows} == {16}  # as many as a windowed layer keeps
    full = ArtifactModel(built(folder, FP32), full_cache=True)
    if kind == "gemma2":  # every second layer has a window of 16, see footprint.kv_cache_bytes
        assert [keys.shape[1] for keys, _ in full.cached(some_ids(200), 3)] == [32, 200, 32]
    kept = reached(full, rows, 3)
    for own, wanted in zip((*found.keys, *found.values), (*kept.keys, *kept.values), strict=True):
        np.testing.assert_allclose(own * CODES, wanted, rtol=1e-4)
    assert scales_rung(full, found, rows).problems == ()


def test_codes_in_the_cache_are_those_of_the_rule() -> None:
    """Of the first layer, whose keys and values no cache has changed yet; some of them beyond what its scales hold."""
    folder, ids = checkpoint(), some_ids(300)
    made, full = (ArtifactModel(built(folder, FP32), full_cache=full) for full in (False, True))
    stored = stored_scales(built(folder, FP32))
    assert stored is not None and stored.sha256 == scales(folder, FP32).sha256
    for side, kept, wanted in zip(stored, made.cached(ids, 1)[0], full.cached(ids, 1)[0], strict=True):
        assert kept.dtype == np.int8 and kept.shape == wanted.shape == (1, 300, 32)
        assert (kept == codes_of(wanted, side[0])).all() and len(np.unique(kept)) > 200


def test_going_back_is_exact() -> None:
    runner, ids = ArtifactModel(built(checkpoint(), INT4))._runner, some_ids(400)
    session = runner.engine.start(400)
    session.append(ids[:256])
    whole = session.append(ids[256:]).copy()
    for back in (390, 260, 30):
        session.rewind(back)
        assert np.array_equal(session.append(ids[back:]), whole)


def test_a_calibrated_targets_scales_are_of_its_codes(tmp_path: Path) -> None:
    target = small("ort-int4-calibrated")
    folder = tmp_path / "codes"
    folder.mkdir()
    codes = calibrate(checkpoint(), target, samples(checkpoint()), folder)
    found = find_scales(checkpoint(), target, samples(checkpoint()), codes)
    build_bundle(
        checkpoint(), target, tmp_path / "b", prompts=[], measure=False, codes=lambda _: codes, scales=lambda _: found
    )
    rung = scales_rung(
        ArtifactModel(tmp_path / "b", full_cache=True), found, [row.ids for row in samples(checkpoint())]
    )
    assert rung.problems == ()


def double(found: CacheScales) -> CacheScales:
    keys = [each.copy() for each in found.keys]
    keys[1][7] *= 2
    return CacheScales(keys, found.values)


def exchange(found: CacheScales) -> CacheScales:
    return CacheScales(found.keys[::-1], found.values[::-1])


def before_turning(found: CacheScales) -> CacheScales:
    """The largest of each key's channels as projections give them."""
    from transformers import AutoModelForCausalLM

    from edgeft.targets.rounding import round_model

    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32).eval()
    round_model(model, INT4)
    most = [torch.zeros(32), torch.zeros(32)]
    for index, layer in enumerate(model.model.layers):

        def see(_: Any, __: Any, keys: torch.Tensor, index: int = index) -> None:
            most[index] = torch.maximum(most[index], keys[0].abs().amax(0))

        layer.self_attn.k_proj.register_forward_hook(see)
    with torch.no_grad():
        for row in samples(checkpoint()):
            model(torch.tensor([row.ids]))
    return CacheScales([scales_of(each.numpy(), "planted") for each in most], found.values)


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (double, r"layer 1: 1 key channels have another scale, channel 7 one of [\d.]+ where [\d.]+ holds all"),
        (exchange, r"layer 0: \d+ key channels have another scale"),
        (before_turning, r"layer 0: \d+ key channels have another scale"),
    ],
)
def test_wrong_scales_are_seen(plant: Callable[[CacheScales], CacheScales], said: str, tmp_path: Path) -> None:
    import re

    made = with_scales(tmp_path, plant)
    rows = [row.ids for row in samples(checkpoint())]
    stored = stored_scales(made.folder)
    assert stored is not None
    rung = scales_rung(made.with_full_cache(), stored, rows)
    assert re.match(said, rung.problems[0]), rung.problems
    whole = ArtifactModel(built(checkpoint(), INT4), full_cache=True)
    assert scales_rung(whole, scales(checkpoint(), INT4), rows).problems == ()


def test_the_full_cache_is_that_of_a_bundle_without_an_8_bit_one() -> None:
    out, ids = workplace() / "full cache", some_ids(200)
    build_bundle(checkpoint(), load_target("ort-int4"), out, prompts=[], measure=False)
    own = ArtifactModel(out).logits(ids)
    assert np.array_equal(ArtifactModel(built(checkpoint(), INT4), full_cache=True).logits(ids), own)
    assert not np.array_equal(ArtifactModel(built(checkpoint(), INT4)).logits(ids), own)


# --- the ladder, and the bundle


def test_long_rows_are_of_half_and_of_all_the_context() -> None:
    rows = [Sample([number] * (3 + number), [number] * (3 + number), 0) for number in range(10)]
    made = long_rows(rows, 64)
    assert [len(row) for row in made] == [32] * 8 + [64] * 8
    assert len({tuple(row) for row in made}) == 16 and {row[0] for row in made} == set(range(10))
    assert [len(row) for row in long_rows(rows, 4096)] == [2048] * 2 + [4096]
    assert [len(row) for row in long_rows(rows, 32_768)] == [16_384, 32_768]


def test_what_a_cache_costs_is_seen_on_long_rows() -> None:
    """Nothing of a bundle with itself; too much on this model, whose large random weights attend to single tokens."""
    rows = long_rows(samples(checkpoint()), 128)[6:10]
    made, full = (ArtifactModel(built(checkpoint(), INT4), full_cache=full) for full in (False, True))
    same = cache_rung(full, full, rows, CACHE)
    assert (same.mean_kl_nats, same.top1_agreement, same.problems) == (0, 1, ())
    assert same.loss_change is not None and same.loss_change.difference == 0
    coarse = cache_rung(full, made, rows, CACHE)
    logits = [torch.log_softmax(torch.tensor(each.logits(rows[-1])), -1) for each in (full, made)]
    one = cache_rung(full, made, rows[-1:], CACHE)
    kl = float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())
    assert one.mean_kl_nats == pytest.approx(kl, rel=1e-3) and one.compared == "rows: 1 of 128 tokens; 128 positions"
    following = torch.tensor(rows[-1][1:])[:, None]
    assert one.loss == pytest.approx(-float(logits[1][:-1].gather(1, following).mean()), rel=1e-4)
    assert coarse.compared == "rows: 2 of 64 and 2 of 128 tokens; 384 positions"
    assert [each[:7] for each in coarse.problems] == ["top-1 a", "mean KL"]


@functools.cache
def exported(merged: Path) -> Path:
    out = workplace() / "exported of 8 bits"
    export(merged, INT4, out, device=None, progress=silent)
    return out


def test_an_export_proves_its_cache(merged_folder: Path) -> None:
    made = Bundle.read(exported(merged_folder) / "bundle.json")
    assert made.proof is not None
    rungs = {(rung.name, rung.against): rung for rung in made.proof.rungs}
    assert [name for name, _ in rungs][-4:] == ["scales", "cache", "artifact", "artifact"]
    assert rungs["scales", "runtime"].tensors == 4
    cache = rungs["cache", "full cache"]
    assert cache.compared == "rows: 8 of 128 and 8 of 256 tokens; 3072 positions"
    assert cache.mean_kl_nats is not None and 0 < cache.mean_kl_nats < 0.001 and cache.loss_change is not None
    assert cache.loss_change.low <= cache.loss_change.difference <= cache.loss_change.high
    stored = stored_scales(exported(merged_folder))
    assert stored is not None and made.provenance["cache scales"] == stored.sha256
    assert made.provenance["cache scales from"] == "the first training rows"
    assert made.target.kv_bits == 8 and runner_module().verify(exported(merged_folder)) == []
    assert made.predicted.kv_cache_bytes == 2 * 2 * 2 * 16 * 256


@pytest.mark.parametrize("plant", [double, exchange])
def test_an_export_with_wrong_scales_fails(
    plant: Callable[[CacheScales], CacheScales], merged_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeft.exporting.kv_scales.find_scales", lambda *given: plant(find_scales(*given)))
    with pytest.raises(ParityFailed, match="parity ladder, rung 'scales' against 'runtime'"):
        export(merged_folder, FP32, tmp_path / "b", device=None, progress=silent)


def test_a_scale_of_zero_is_refused(tmp_path: Path) -> None:
    def zero(found: CacheScales) -> CacheScales:
        return CacheScales([np.zeros_like(each) for each in found.keys], found.values)

    with pytest.raises(BadInput, match=r"layer 0: the scale of key channel 0 must be above 0, got 0"):
        with_scales(tmp_path, zero)
    reach = np.array([2, 0, 4], dtype=np.float32)
    assert (scales_of(reach, "x") * CODES).tolist() == pytest.approx([2, 3, 4])  # one that nothing is known of
    with pytest.raises(BadInput, match="every channel stayed 0 on the rows of the training data"):
        scales_of(reach * 0, "layer 3")


def test_a_cache_needs_rows(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="KV cache of 8 bits: there are no rows to find scales on"):
        find_scales(checkpoint(), FP32, [])
    with pytest.raises(BadInput, match="ort-int4: has a KV cache whose scales are found on training rows"):
        build_bundle(checkpoint(), INT4, tmp_path / "b", prompts=[])
    given = finder(checkpoint(), load_target("ort-int4"), lambda: [], read_model_spec(str(checkpoint())))
    assert given is None


def test_a_context_beyond_the_cache_is_refused() -> None:
    runner = runner_module()
    model = runner.Runner(built(checkpoint(), INT4))
    with pytest.raises(runner.RunError, match="prompt: 513 tokens and an answer do not fit the context of 512 tokens"):
        next(model.stream(some_ids(513), 4))
    with pytest.raises(BadInput, match="513 tokens and an answer do not fit"):
        list(ArtifactModel(built(checkpoint(), INT4)).each_pass(some_ids(513)))


def test_what_the_cache_held_changes_no_bit() -> None:
    """Common beginnings of all lengths: a batch and a server read only what is new of a prompt."""
    runner = runner_module()
    model, alone = (runner.Runner(built(checkpoint(), INT4)) for _ in range(2))
    model.keep_tokens = 512
    ids = some_ids(400)
    for common, end in ((200, 390), (60, 100), (99, 300), (299, 310), (0, 40)):
        prompt = [*ids[:common], *ids[100 : 100 + end - common]]
        assert model.greedy(prompt, 6, ()) == alone.greedy(prompt, 6, ())
        with model.cache(len(prompt)) as shared:
            kept = shared.read(prompt).copy()
        assert np.array_equal(kept, alone.last_logits(prompt))


def test_other_scales_in_a_bundle_are_seen_by_its_hashes_and_vectors(tmp_path: Path) -> None:
    """Somebody who makes the hashes right again is still told by the golden vectors."""
    import shutil

    runner, copy = runner_module(), shutil.copytree(built(checkpoint(), FP32), tmp_path / "b")
    path = copy / "model.onnx.data"
    held = stored_scales(copy)
    assert held is not None
    raw, wanted = path.read_bytes(), held.keys[0].astype("<f4").tobytes()
    assert raw.count(wanted) == 1
    path.write_bytes(raw.replace(wanted, (held.keys[0] * 0.05).astype("<f4").tobytes()))
    assert runner.verify(copy)[0] == "model.onnx.data: changed since the export"
    reseal(copy, lambda manifest: None)
    assert any("golden" in problem for problem in runner.verify(copy))


@needs_llama
def test_llama_cpp_keeps_8_bits_where_the_bundle_says_so() -> None:
    runner, target, ids = runner_module(), small("gguf-q8_0"), some_ids(300)
    places = [workplace() / name for name in ("gguf of 8 bits", "gguf of 16 bits")]
    for out, each in zip(places, (target, load_target("gguf-q8_0")), strict=True):
        build_bundle(checkpoint(), each, out, prompts=PROMPTS[:1], measure=False)
    assert runner.verify(places[0]) == []
    assert Bundle.read(places[0] / "bundle.json").predicted.kv_cache_bytes == 2 * 2 * 32 * 34 // 32 * 512
    made, own = (ArtifactModel(place) for place in places)
    full = made.with_full_cache().logits(ids)
    assert np.array_equal(full, own.logits(ids)) and not np.array_equal(full, made.logits(ids))
    rung = cache_rung(made.with_full_cache(), made, long_rows(samples(checkpoint()), 128)[7:9], CACHE)
    assert rung.mean_kl_nats is not None and 0 < rung.mean_kl_nats < 0.2  # large random weights, as above
    session = made._runner.engine.start(300)
    session.append(ids[:200])
    session.append(ids[200:])
    session.rewind(200)
    again = session.append(ids[200:])
    np.testing.assert_allclose(again, made.logits(ids[:200] + ids[200:], 299)[0], atol=0.5)


PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
import run
runner = run.Runner(__import__("pathlib").Path(sys.argv[1]))
session, ids = runner.engine.start(4096), [number % 500 for number in range(4096)]
for part in run.passes(ids):
    session.append(part)
print(run.peak_memory_bytes())
"""


def test_the_cache_takes_what_is_predicted(tmp_path: Path) -> None:
    """Of a model of little else: 8 KiB a token in fp32, 2 KiB in 8 bits."""
    spec = save_model(
        tmp_path / "m", hidden_size=64, num_attention_heads=8, num_key_value_heads=8, head_dim=64,
        max_position_embeddings=4096,
    )  # fmt: skip
    save_tokenizer(tmp_path / "m", 512)
    peaks, predicted = [], []
    for number, target in enumerate((load_target("ort-fp32"), FP32)):
        given = finder(tmp_path / "m", target, lambda: samples(tmp_path / "m"), spec)
        made = build_bundle(tmp_path / "m", target, tmp_path / f"{number}", prompts=[], measure=False, scales=given)
        assert made.context_tokens == 4096
        command = [sys.executable, "-c", PEAK, str(tmp_path / f"{number}")]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        predicted.append(made.predicted.memory_bytes)
    assert predicted[0] - predicted[1] == 3 * 4096 * 2048 - 8192  # the scales themselves
    assert peaks[0] - peaks[1] == pytest.approx(predicted[0] - predicted[1], rel=0.2)
    assert peaks == pytest.approx(predicted, rel=0.25)


def test_a_rehearsal_proves_the_cache_too(plan_file: Any, tmp_path: Path) -> None:
    plan = Plan.read(plan_file(max_steps=2))
    made = go_through(plan, INT4, tmp_path)
    assert [rung.name for rung in made.rungs] == ["merged", "stored", "scales", "cache", "artifact", "artifact"]


def test_a_plans_setting_reaches_the_bundle(
    merged_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeft.api.deploying.planned_job", lambda merged: {"kv_bits": 8, "target": "ort-fp32"})
    said: list[str] = []
    made = api_export(merged_folder, tmp_path / "b", say=said.append)
    assert made.target == FP32 and said == []
    assert api_export(merged_folder, tmp_path / "b", say=said.append).target == FP32 and "up to date" in said[-1]
    with pytest.raises(BadInput, match="target onnx-portable-fp32: kv_bits of runtime onnxruntime must be 32"):
        api_export(merged_folder, tmp_path / "c", target="onnx-portable-fp32")


def test_adapters_have_no_cache_of_8_bits(merged_folder: Path, tmp_path: Path) -> None:
    trained = {"one": merged_folder.parent / "train"}
    with pytest.raises(BadInput, match="in 8 bits: its scales fit one model, not each of several"):
        export_adapters(trained, INT4, tmp_path / "b", device=None, progress=silent)
