"""Is a cell of the matrix what planning that model on that machine gives, and does nothing stop the others?"""

from __future__ import annotations

import json
import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIGS

from edgeft.errors import BadInput, DoesNotFit
from edgeft.machines.profile import load_profile
from edgeft.models.families import FAMILIES, OTHERS_ORT_BUILDS
from edgeft.models.spec import read_model_spec
from edgeft.planning.plan import make_plan
from edgeft.reporting import card
from edgeft.reporting.matrix import (
    Matrix,
    device_cell,
    find_all,
    find_models,
    find_profiles,
    make_matrix,
    model_row,
    training_cell,
)
from edgeft.reporting.words import (
    BEHIND,
    DEVICE_MARKS,
    ELSEWHERE,
    MARKS,
    MAY_EXCEED,
    SHORTENED,
    SYMBOLS,
    behind,
    bundles_of,
    cell_text,
    memory_line,
    of_gib,
    show_pace,
    show_rate,
    symbol,
    verdict,
)
from edgeft.settings.job import make_job
from edgeft.targets.footprint import SMALLEST_CONTEXT, bundle_weights, predict
from edgeft.targets.target import load_target
from edgeft.units import GIB

INT4 = load_target("ort-int4")


def models(*names: str) -> list[tuple[str, str]]:
    return [(name, str(CONFIGS / name)) for name in names]


def cell(model: str, profile: str, **settings: str) -> Any:
    return training_cell(read_model_spec(str(CONFIGS / model)), load_profile(profile), settings)


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    found = models("qwen2.5-72b", "smollm2-135m", "llama-3.1-8b")
    return make_matrix(found, find_profiles("rtx4090-24gb,t4,cpu-8gb,raspberrypi5-8gb"))


def test_a_cell_is_what_planning_says(matrix: Matrix) -> None:
    for row in matrix.models:
        for profile, found in zip(matrix.training_machines, row.training, strict=True):
            assert found.machine == profile.name
            if row.name == "qwen2.5-72b" and profile.name != "cpu-8gb":  # its plans take seconds
                continue
            job = make_job(model=str(CONFIGS / row.name), profile=profile.name)
            try:
                plan = make_plan(job)
            except DoesNotFit as problem:
                assert (found.grade, found.need_bytes) == ("none", problem.need_bytes)
                continue
            training = plan.training
            needs = plan.need_bytes, plan.peak_bytes, plan.budget_bytes
            assert (found.need_bytes, found.uses_bytes, found.budget_bytes) == needs
            assert plan.need_bytes <= plan.peak_bytes
            assert (found.base_precision, found.rank) == (training.base_precision, training.rank)
            assert (found.micro_batch_size, found.max_length) == (training.micro_batch_size, 2048)
            tokens = training.batch_size * training.max_length
            assert found.seconds_per_million_tokens == pytest.approx(plan.seconds_per_step / tokens * 1e6)
            assert found.gave_up == plan.gave_up


@pytest.mark.parametrize(("machine", "elsewhere"), [("laptop-16gb", True), ("t4", False), ("rtx4090-24gb", False)])
@pytest.mark.parametrize("target", [None, "ort-int4", "ort-fp32"])
def test_page_and_plan_give_one_answer(machine: str, elsewhere: bool, target: str | None) -> None:
    """What is shipped decides whether the export fits too: where nobody says it, both take what the export will."""
    pinned = {} if target is None else {"target": target}
    devices = [load_profile("raspberrypi5-8gb")]
    found = make_matrix(models("llama-3.1-8b"), find_profiles(machine), devices=devices, **pinned)
    [row] = found.models
    plan = make_plan(make_job(model=str(CONFIGS / "llama-3.1-8b"), profile=machine, **pinned))
    [cell] = row.training
    assert f"fits, but {' and '.join(cell.elsewhere)} elsewhere" in verdict(plan) if cell.elsewhere else (
        verdict(plan).partition(";")[0] == "fits"
    )  # fmt: skip
    assert (ELSEWHERE in behind(cell)) == bool(cell.elsewhere)
    [on_device] = row.devices
    assert on_device.target in ("", plan.stages.target.name)
    if target is None:
        assert (
            bool(cell.elsewhere) is elsewhere and on_device.target == "ort-int4-calibrated" and found.target == "auto"
        )
        assert "expected to be ort-int4-calibrated" in bundles_of(found)


def test_where_one_device_is_asked_for_its_bundle_is_what_is_exported() -> None:
    """Its keys and values may be kept in 8 bits, and the proof of that needs more of the host; or it has no room."""
    [pi], [phone] = find_profiles("raspberrypi5-8gb"), find_profiles("android-8gb:6GiB")
    for_pi = make_matrix(models("llama-3.1-8b"), find_profiles("t4"), devices=[pi], device=pi.name).models[0]
    plan = make_plan(make_job(model=str(CONFIGS / "llama-3.1-8b"), profile="t4", device=pi.name))
    assert verdict(plan).startswith("fits, but export elsewhere") and for_pi.training[0].elsewhere == ("export",)
    small = make_matrix(models("llama-3.1-8b"), find_profiles("t4"), devices=[phone], device=phone.name).models[0]
    assert small.training[0].fits and not small.training[0].elsewhere and not small.devices[0].fits


@pytest.mark.parametrize(("model", "tight"), [("llama-3.1-8b", True), ("qwen2.5-1.5b", False)])
def test_a_bundle_that_may_need_more_than_its_device_is_marked_as_its_plan_says(model: str, tight: bool) -> None:
    """By the same high estimate: what a plan's verdict calls tight has a mark of its own in the matrix."""
    plan = make_plan(make_job(model=str(CONFIGS / model), profile="rtx4090-24gb", device="raspberrypi5-8gb"))
    [found] = make_matrix(models(model), find_profiles("raspberrypi5-8gb")).models[0].devices
    assert found.high_bytes == plan.stages.phases[-1].high_bytes
    assert (behind(found) == MAY_EXCEED) == ("tightly on the device" in verdict(plan)) == tight


def test_every_mark_has_one_meaning() -> None:
    training, devices = {SYMBOLS[grade]: said for grade, said in MARKS.items()}, DEVICE_MARKS
    shared = training.keys() & devices.keys()
    assert shared == {SYMBOLS["full"], SYMBOLS["none"]}  # all that can be had; nothing
    others = [*training, *devices, *BEHIND, *(set(card.MARKS.values()))]
    assert len(others) - len(shared) == len(set(others)), "a card's sign is no cell's"


def test_adapters_beside_the_weights_are_shipped_by_what_runs_them() -> None:
    """As in a plan of that tuner: not every runtime can."""
    made = make_matrix(models("qwen2.5-0.5b"), find_profiles("t4,raspberrypi5-8gb"), settings={"tuner": "adapter"})
    plan = make_plan(make_job(model=str(CONFIGS / "qwen2.5-0.5b"), profile="t4", tuner="adapter"))
    assert made.models[0].devices[0].target == plan.stages.target.name != "ort-int4-calibrated"


def test_machines_by_memory_models_by_parameters_each_where_its_role_is(matrix: Matrix) -> None:
    assert [m.name for m in matrix.training_machines] == ["cpu-8gb", "t4", "rtx4090-24gb"]
    assert [m.name for m in matrix.devices] == ["raspberrypi5-8gb", "cpu-8gb"]
    assert [m.name for m in matrix.models] == ["smollm2-135m", "llama-3.1-8b", "qwen2.5-72b"]
    assert Matrix.model_validate_json(matrix.model_dump_json()) == matrix


@pytest.mark.parametrize(
    ("model", "profile", "grade", "method"),
    [
        ("smollm2-135m", "t4", "full", "FP16 LoRA r64, all 30 layers"),
        ("llama-3.1-8b", "t4", "4-bit", "NF4 LoRA r64, all 32 layers"),
        ("phi-4", "rtx3060-12gb", "4-bit", "NF4 LoRA r64, all 40 layers, from their files"),
        ("llama-3.1-8b", "cpu-8gb", "reduced", "NF4 LoRA r64, 24 of 32 layers, from their files"),
        ("llama-3.1-8b", "2GiB", "none", ""),
        ("qwen2.5-14b", "rtx4060-8gb", "4-bit", "NF4 LoRA r64, all 48 layers, from their files"),
    ],
)
def test_grade_and_method(model: str, profile: str, grade: str, method: str) -> None:
    found = cell(model, profile)
    assert (found.grade, found.method) == (grade, method)
    assert found.fits == (grade != "none")


def test_what_the_user_pins_is_no_loss() -> None:
    found = cell("smollm2-135m", "t4", rank="8", layers="sparse", active_layers="10")
    assert (found.grade, found.method) == ("full", "FP16 LoRA r8, 10 of 30 layers")


def test_a_model_that_does_not_fit_gives_a_cell_that_says_what_it_needs() -> None:
    found = cell("qwen2.5-72b", "t4", stream_layers="false")
    assert found.need_bytes > 40 * GIB > found.budget_bytes
    assert re.fullmatch(r"does not fit: needs 4\d\.\d of 14\.0 GiB", cell_text(found))
    assert found.hint


def test_shorter_samples_that_would_fit_do_fit() -> None:
    found = cell("llama-3.1-8b", "rtx4060-8gb", max_length="8192", stream_layers="false")
    assert found.grade == "none" and found.fits_at_tokens
    assert cell_text(found).endswith(f"; samples of {found.fits_at_tokens:,} tokens fit")
    shorter = {"max_length": str(found.fits_at_tokens), "stream_layers": "false"}
    assert cell("llama-3.1-8b", "rtx4060-8gb", **shorter).fits


def test_settings_that_a_model_cannot_take_are_a_cell() -> None:
    found = cell("gpt2", "t4", max_length="2048")
    assert (found.grade, found.need_bytes) == ("none", None)
    assert cell_text(found) == "max_length: 2048 is more than the model's 1024 positions"


def test_a_stage_that_the_host_cannot_hold_is_named() -> None:
    found = cell("qwen2.5-14b", "t4")  # its host has 16 GiB
    assert found.elsewhere == ("export",)
    assert cell_text(found).endswith("; export elsewhere")
    assert cell("smollm2-135m", "t4").elsewhere == ()


def test_a_config_that_cannot_be_used_is_a_row(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "llama-3.1-8b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    row = model_row("quantised", str(tmp_path), [load_profile("t4")], [], (INT4,), {})
    assert row.problem == "is quantised (mxfp4); a merge needs the original-precision weights"
    assert (row.parameters, row.training) == (None, ())


def test_experts_are_said_to_be_approximate_and_stop_nothing() -> None:
    [name, folder] = models("qwen3-30b-a3b")[0]
    row = model_row(name, folder, [load_profile("t4")], [load_profile("cpu-16gb")], (INT4,), {})
    assert row.parameters == 30_532_122_624
    assert row.approximate.startswith("mixture of experts")
    assert row.training[0].grade == "none" and row.training[0].need_bytes > 2 * row.parameters
    assert row.devices[0].problem == "bundles of mixtures of experts are not predicted"


def test_families_outside_the_closed_form_are_marked() -> None:
    rows = [model_row(*pair, [], [], (INT4,), {}) for pair in models("olmo-2-1b", "llama-3.2-1b")]
    assert [row.approximate for row in rows] == ["approximated by a Llama of that shape, with a wider margin", ""]


def test_a_device_cell_is_what_the_bundle_is_predicted_to_take() -> None:
    spec, profile = read_model_spec(str(CONFIGS / "llama-3.1-8b")), load_profile("raspberrypi5-8gb")
    found = device_cell(spec, INT4, profile, 32)
    assert found.limited_by == "device memory" and SMALLEST_CONTEXT < found.context_tokens < INT4.context_tokens
    weights = bundle_weights(spec, INT4)
    assert found.need_bytes == predict(spec, INT4, weights, found.context_tokens).memory_bytes <= profile.budget_bytes
    one_more = predict(spec, INT4, weights, found.context_tokens + 1).memory_bytes
    assert one_more > profile.budget_bytes
    bound = profile.bandwidth_gb_per_second * 1e9 / weights.bytes_per_token
    assert found.tokens_per_second_bound == pytest.approx(bound, rel=5e-3)
    own = r"context 1,\d{3} \(KV cache of 32 bits\), 6\.80 of 6\.80 GiB, 7\.1\d GiB by the high estimate, "
    assert re.fullmatch(own + r"at most 3\.\d\d tok/s", cell_text(found))
    small = device_cell(spec, INT4, profile)  # four times as many fit: all that the target asks for
    words = r"context 4,096 \(KV cache of 8 bits\), 6\.\d\d of 6\.80 GiB, 6\.9\d GiB by the high estimate, "
    assert re.fullmatch(words + r"at most 3\.\d\d tok/s", cell_text(small))
    assert symbol(small) == "\u25cf" and behind(small) == MAY_EXCEED and symbol(found) == SHORTENED
    portable = device_cell(spec, load_target("onnx-portable-int8"), profile, 8)
    assert not portable.fits and portable.problem == "kv_bits of runtime onnxruntime must be 32"


def test_devices_that_cannot_run_a_model_say_why() -> None:
    pi = load_profile("raspberrypi5-8gb")
    large = device_cell(read_model_spec(str(CONFIGS / "phi-4")), INT4, pi)
    assert not large.fits and large.need_bytes > pi.budget_bytes
    assert cell_text(large).startswith("does not fit: needs 1")
    unknown = device_cell(read_model_spec(str(CONFIGS / "gpt2")), INT4, pi)
    portable = device_cell(read_model_spec(str(CONFIGS / "gpt2")), load_target("onnx-portable-int8"), pi)
    assert portable.fits  # what one runtime cannot build another can
    assert cell_text(unknown) == "onnxruntime-genai's builder does not know GPT2LMHeadModel"


def test_the_builder_names_every_architecture_that_is_said_to_be_buildable() -> None:
    package = find_spec("onnxruntime_genai")
    if package is None or package.origin is None:
        pytest.skip("onnxruntime-genai is not installed")
    source = (Path(package.origin).parent / "models" / "builder.py").read_text()
    said = {each.architecture for each in FAMILIES.values() if each.ort_builds} | set(OTHERS_ORT_BUILDS)
    assert set(re.findall(r'config\.architectures\[0\] == "(\w+)"', source)) >= said


def test_many_processes_give_what_one_gives() -> None:
    found, machines = models("gpt2", "opt-125m", "smollm2-135m", "pythia-160m"), [load_profile("apple-16gb")]
    assert make_matrix(found, machines, workers=2) == make_matrix(found, machines)


def test_misspelt_settings_are_refused() -> None:
    with pytest.raises(BadInput, match="unknown key 'rnak'"):
        make_matrix(models("gpt2"), [], settings={"rnak": "8"})


def test_models_are_found_by_their_configs(tmp_path: Path) -> None:
    for name in ("b", "a/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    assert [name for name, _ in find_models(tmp_path)] == ["a/x", "b"]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "c").symlink_to(tmp_path / "b")
    (tmp_path / "linked" / "round").symlink_to(tmp_path / "linked")
    assert [name for name, _ in find_models(tmp_path / "linked")] == ["c"]
    both = f"{tmp_path / 'b'}, {tmp_path / 'a'}"
    assert find_all(both) == [("b", str(tmp_path / "b")), ("x", str(tmp_path / "a" / "x"))]
    assert find_all(str(tmp_path)) == find_models(tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        find_all(f"{tmp_path / 'b'},{tmp_path / 'none'}")
    assert find_models(tmp_path / "b") == [("b", str(tmp_path / "b"))]
    with pytest.raises(BadInput, match="no such folder"):
        find_models(tmp_path / "c")
    (tmp_path / "a" / "x" / "config.json").unlink()
    with pytest.raises(BadInput, match=r"holds no config\.json"):
        find_models(tmp_path / "a")


def test_profiles_are_named_once_each() -> None:
    assert [p.name for p in find_profiles("t4, l4-24gb,t4")] == ["t4", "l4-24gb"]
    with pytest.raises(BadInput, match="names no profile"):
        find_profiles(" ,")
    with pytest.raises(BadInput, match="unknown profile 't5'"):
        find_profiles("t5")


def test_rounding_never_turns_fitting_into_not_fitting() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        budget = rng.randrange(GIB // 10, 100 * GIB)
        need = budget + rng.choice((-1, 0, 1)) * rng.randrange(0, budget // 10)
        shown, limit = map(float, re.findall(r"[\d.]+", of_gib(need, budget)))
        assert (shown <= limit) == (need <= budget)
        assert shown == pytest.approx(need / GIB, abs=0.151 if need >= 9.9 * GIB else 0.0151)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "time unknown"), (12.3, "12 s/Mtok"), (59.9, "1.0 min/Mtok"), (3000, "50 min/Mtok"),
     (3.6e4, "10 h/Mtok"), (1.3e5, "1.5 d/Mtok"), (2.5e7, "290 d/Mtok")],
)  # fmt: skip
def test_pace(seconds: float | None, text: str) -> None:
    assert show_pace(seconds) == text


def test_rates() -> None:
    assert [show_rate(value) for value in (3.314, 46.12, 999.4, 999.6, 12345)] == [
        "3.31",
        "46.1",
        "999",
        "1,000",
        "12,345",
    ]


def test_what_a_plan_needs_is_planned_and_fits_in_just_that() -> None:
    """With no more memory than it needs a plan takes that way; with a byte less none of that quality."""
    asked = {"model": str(CONFIGS / "llama-3.1-8b"), "profile": "t4", "target": "ort-int4"}
    plan = make_plan(make_job(**asked))
    assert 9 * GIB < plan.need_bytes < plan.peak_bytes <= plan.budget_bytes
    held = make_plan(make_job(**asked, max_memory_bytes=plan.need_bytes))
    assert held.need_bytes == held.peak_bytes == plan.need_bytes and held.training.rank == plan.training.rank
    assert held.training.trained_layers == plan.training.trained_layers
    less = make_plan(make_job(**asked, max_memory_bytes=plan.need_bytes - 1))
    assert less.frontier[0].quality_cost == plan.frontier[0].quality_cost
    assert min(row.quality_cost for row in less.frontier if row.fits) > min(
        row.quality_cost for row in plan.frontier if row.fits
    )
    assert memory_line(held).endswith("nothing smaller is as good") and "% time), uses " in memory_line(plan)
    assert verdict(plan) == "fits"
    large = make_plan(make_job(**{**asked, "target": "ort-fp32"}))
    assert verdict(large).startswith("fits, but export elsewhere: ") and verdict(large).endswith("here 16.0 GiB")
