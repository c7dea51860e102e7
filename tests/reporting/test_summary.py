"""Does a report's data say what the plan and the stages' JSON say, and leave out what belongs to another run?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIGS, EXAMPLE

from edgeft.documents import sha256_file
from edgeft.errors import BadInput
from edgeft.exporting.bundle import Bundle, Measured, Measurement, measurement_path
from edgeft.machines.profile import load_profile
from edgeft.memory.simulated import Moment, Simulation
from edgeft.models.metrics import Difference, Metrics, Proof
from edgeft.planning.alternatives import CHOICES
from edgeft.planning.plan import Plan, make_plan
from edgeft.reporting.read_run import Run, read_run
from edgeft.reporting.summary import CURVE_POINTS, Summary, summarise
from edgeft.reporting.words import difference_text
from edgeft.settings.job import make_job
from edgeft.targets.footprint import bundle_weights, predict
from edgeft.targets.target import load_target

LLAMA = str(CONFIGS / "llama-3.1-8b")
SCORES = {"rows": 10, "loss": 2.0, "perplexity": 7.39, "exact_match": 0.1}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(make_job(model=LLAMA, profile="t4", max_memory_bytes=9 * 2**30))


def trained(plan: Plan, **changes: Any) -> dict[str, Any]:
    """train.json of a short run."""
    return {
        "input_sha256": "", "plan": json.loads(plan.model_dump_json()), "deviations": [], "steps": 10,
        "inputs": {}, "files": {}, "trained_tokens": 900, "micro_batches": 10, "padding": 0.0,
        "predicted_peak_bytes": plan.peak_bytes, "trained_parameters": 5,
        "seconds": 200.0, "tokens_per_second": 9.0, "measured_peak_bytes": 9_000_000_000,
        "phase_peak_bytes": {"load": 6_000_000_000, "train": 9_000_000_000, "save": 1}, "cut_rows": 3,
        "loss_curve": [[1, 3.0], [2, 2.0]], "base_valid": SCORES, "valid": SCORES | {"loss": 1.0}, "base_test": None,
        "test": None, "units": [],
    } | changes  # fmt: skip


MERGED = {
    "input_sha256": "", "wise_alpha": 1.0, "predicted_peak_bytes": 100, "measured_peak_bytes": 110, "seconds": 1.0,
    "relative_change": 0.1, "kind": "lora", "dtype": "bf16", "changed_tensors": 1, "tensors": 2, "untied_head": False,
    "inputs": {}, "files": {},
}  # fmt: skip


def write_run(folder: Path, plan: Plan, train: dict[str, Any], merged: dict[str, Any] | None = None) -> Path:
    """A build folder whose JSON documents name one another's hashes."""
    plan.write(folder / "plan.json")
    for name in ("train", "merged"):
        (folder / name).mkdir(exist_ok=True)
    path = folder / "train" / "train.json"
    train = train | {"input_sha256": sha256_file(folder / "plan.json")}
    path.write_text(json.dumps(train))
    if merged is not None:
        text = json.dumps(
            merged
            | {
                "input_sha256": sha256_file(path),
                "train": train,
                "trained": {"relative": "../train", "absolute": "/train"},
            }
        )
        (folder / "merged" / "merged.json").write_text(text)
    return folder / "plan.json"


def test_a_plan_alone(plan: Plan) -> None:
    found = summarise(Run(plan, plan_sha256="abc"))
    assert (found.kind, found.input_sha256, found.compared, found.scores) == ("plan", "abc", (), ())
    assert (found.peak_bytes, found.budget_bytes) == (plan.peak_bytes, plan.budget_bytes)
    assert [(s.name, s.terms, s.high_bytes) for s in found.stages] == [
        (p.name, p.terms, p.high_bytes) for p in plan.phases
    ]
    assert [s.name for s in found.later_stages] == [p.name for p in plan.stages.phases]
    for stage, phase in zip(found.later_stages, plan.stages.phases, strict=True):
        assert stage.limit_bytes == plan.stages.limit_bytes(phase)
    assert Summary.model_validate_json(found.model_dump_json()) == found


def test_exactly_one_way_is_the_chosen_one(plan: Plan) -> None:
    found = summarise(Run(plan))
    [chosen] = [option for option in found.options if option.chosen]
    assert (chosen.high_bytes, chosen.fits, chosen.frontier) == (plan.peak_bytes, True, True)
    assert chosen.text == "NF4 LoRA r64, all 32 layers, 8-bit AdamW"
    assert sum(option.frontier for option in found.options) == len(plan.frontier)
    assert found.alternatives == plan.alternatives
    assert {c.setting for c in found.alternatives} <= set(CHOICES)


def test_settings_are_sentences_with_the_plans_numbers(plan: Plan) -> None:
    text = {setting.name: setting.text for setting in summarise(Run(plan)).settings}
    assert text["What trains"].startswith("Small adapter matrices of rank 64 (LoRA) train in all 32 layers")
    assert text["Base model"] == "The weights lie in memory in 4 bits (NF4) and are multiplied in fp16."
    assert text["Batch"] == "16 samples make a step, 1 of them at a time, each of up to 2,048 tokens."
    assert "computed twice" in text["Activations"] and "two 8-bit numbers" in text["Optimizer"]
    paged = make_plan(make_job(model=LLAMA, profile="t4", optimizer="paged_adamw8bit"))
    sentences = {setting.name: setting.text for setting in summarise(Run(paged)).settings}
    assert "host's memory" in sentences["Optimizer"]
    assert all(sentence.endswith(".") for sentence in text.values())


def test_full_fine_tuning_and_lisa_in_words() -> None:
    tiny = str(EXAMPLE)
    whole = summarise(Run(make_plan(make_job(model=tiny, profile="cpu-8gb", tuner="full", layers="all"))))
    assert whole.settings[0].text == "The model's own weights train: all 8 layers, and embedding, norm, head."
    lisa = summarise(Run(make_plan(make_job(model=tiny, profile="cpu-8gb", tuner="full", layers="lisa"))))
    assert "layers at a time, drawn anew every" in lisa.settings[0].text


def test_predicted_against_measured(plan: Plan, tmp_path: Path) -> None:
    found = summarise(read_run(write_run(tmp_path, plan, trained(plan), MERGED)))
    assert found.kind == "run"
    rows = {row.what: (row.predicted, row.measured) for row in found.compared}
    assert rows == {
        "training, peak memory": (max(p.expected_bytes for p in plan.phases), 9_000_000_000),
        "training, a step": (plan.seconds_per_step, 20.0),
        "merge, peak memory": (100, 110),
    }
    assert found.compared[-1].error == pytest.approx(0.1)
    assert {s.name: s.measured_bytes for s in found.stages} == {
        "load": 6_000_000_000, "evaluate": None, "train": 9_000_000_000
    }  # fmt: skip
    assert next(s for s in found.later_stages if s.name == "merge").measured_bytes == 110
    assert [(row.name, row.metrics.loss) for row in found.scores] == [("base", 2.0), ("fine-tuned", 1.0)]
    assert "3 rows were cut to 2048 tokens" in found.notes


def test_the_bundle_and_what_it_cost_here(plan: Plan, tmp_path: Path) -> None:
    file = write_run(tmp_path, plan, trained(plan), MERGED)
    spec, target = plan.spec, load_target("ort-int4")
    scores = {name: Metrics(**SCORES) for name in ("base", "fine-tuned", "merged", "ort-int4")}
    bundle = Bundle(
        input_sha256=sha256_file(tmp_path / "merged" / "merged.json"), target=target, prompt_format="plain",
        prefix_ids=[], stop_ids=[], context_tokens=64, context_limited_by="model", golden_logit_tolerance=0.1,
        weight_bytes_per_token=1, size_bytes=1, files={}, golden=[], provenance={},
        predicted=predict(spec, target, bundle_weights(spec, target), 64),
        proof=Proof(prompts=1, positions=1, rungs=(), scored_on="test", scores=scores),
    )  # fmt: skip
    (tmp_path / "bundle").mkdir()
    bundle.write(tmp_path / "bundle" / "bundle.json")
    here = Measurement(
        input_sha256=sha256_file(tmp_path / "bundle" / "bundle.json"), predicted_here_bytes=50, seconds=1.0,
        predicted_peak_bytes=70, measured_peak_bytes=77, measured=Measured(
            load_seconds=1, prompt_tokens=1, new_tokens=1, time_to_first_token_seconds=1, prefill_tokens_per_second=1,
            decode_tokens_per_second=8, peak_memory_bytes=60, weight_bytes_per_token=1, bandwidth_bytes_per_second=1,
            bound_tokens_per_second=10, fraction_of_bound=0.8, cores=1,
        ),
    )  # fmt: skip
    here.write(measurement_path(tmp_path / "bundle"))
    found = summarise(read_run(file))
    assert [(row.what, row.predicted, row.measured, row.bound) for row in found.compared[3:]] == [
        ("export, peak memory", 70, 77, False),
        ("bundle, peak memory", 50, 60, False),
        ("bundle, decoding", 10, 8, True),
    ]
    assert [row.name for row in found.scores] == ["base", "fine-tuned", "merged", "ort-int4"]
    assert found.proof == bundle.proof and found.scored_on == "test"


def test_a_run_on_another_device_is_not_compared(plan: Plan, tmp_path: Path) -> None:
    moved = trained(plan, deviations=[{"what": "device", "planned": "cuda", "done": "cpu"}])
    found = summarise(read_run(write_run(tmp_path, plan, moved, MERGED)))
    assert (found.kind, found.compared) == ("run", ())
    assert all(stage.measured_bytes is None for stage in found.stages)
    assert "not as planned: device cpu instead of cuda" in found.notes
    assert "measured on another device than planned: memory and time cannot be compared" in found.notes


def test_a_stage_made_from_something_else_is_left_out(plan: Plan, tmp_path: Path) -> None:
    file = write_run(tmp_path, plan, trained(plan), MERGED)
    merged = json.loads((tmp_path / "merged" / "merged.json").read_text())
    (tmp_path / "merged" / "merged.json").write_text(json.dumps(merged | {"input_sha256": "0" * 64}))
    run = read_run(file)
    assert run.train is not None and run.merged is None
    assert run.notes == ("merged/merged.json was not made from this train.json: left out",)
    plan.model_copy(update={"notes": ("another",)}).write(file)
    run = read_run(file)
    assert run.train is None
    assert run.notes == ("train/train.json was not made from this plan.json: left out",)


def test_a_broken_document_is_named(plan: Plan, tmp_path: Path) -> None:
    broken = trained(plan)
    del broken["measured_peak_bytes"]
    with pytest.raises(BadInput, match=r"train\.json: measured_peak_bytes: field required"):
        read_run(write_run(tmp_path, plan, broken))
    with pytest.raises(BadInput, match="no such file"):
        read_run(tmp_path / "absent.json")


def test_a_long_curve_is_thinned_and_keeps_its_mean(plan: Plan, tmp_path: Path) -> None:
    curve = [[step, 1.0 + (step % 7)] for step in range(1, 10 * CURVE_POINTS + 1)]
    found = summarise(read_run(write_run(tmp_path, plan, trained(plan, loss_curve=curve)))).loss_curve
    assert len(found) == CURVE_POINTS and found[-1][0] == curve[-1][0]
    mean = sum(loss for _, loss in curve) / len(curve)
    assert sum(loss for _, loss in found) / len(found) == pytest.approx(mean)


def test_test_rows_come_before_validation_rows(plan: Plan, tmp_path: Path) -> None:
    tested = trained(plan, base_test=SCORES | {"rows": 99}, test=SCORES | {"rows": 99})
    found = summarise(read_run(write_run(tmp_path, plan, tested)))
    assert (found.scored_on, found.scores[0].metrics) == ("test", Metrics(**(SCORES | {"rows": 99})))


def test_a_simulation_and_devices_are_shown(plan: Plan) -> None:
    moments = (Moment(phase="forward", name="layer 0", live_bytes=5), Moment(phase="backward", name="x", live_bytes=9))
    simulation = Simulation(
        live_peak_bytes=9, phase="backward", moment="x", weights_bytes=1, adapter_bytes=1, optimizer_bytes=1,
        phase_peaks=moments, timeline=moments, largest=(), seconds=0.1, extrapolated=False, layers_simulated=1,
    )  # fmt: skip
    pi = load_profile("raspberrypi5-8gb")
    found = summarise(Run(plan.model_copy(update={"simulation": simulation})), [pi])
    assert (found.timeline, found.simulated_peak_bytes) == (moments, 9)
    assert [cell.machine for cell in found.devices] == ["raspberrypi5-8gb"]
    assert found.devices[0].context_tokens is not None


def test_a_differences_unit_stands_behind_its_interval() -> None:
    shown, none = Difference(difference=0.02, low=0.01, high=0.03), Difference(difference=0.0, low=-0.1, high=0.1)
    assert difference_text(shown, 100, 1, "points") == "+2.0 (+1.0 to +3.0) points"
    assert difference_text(none, unit="nats") == "+0.0000 (-0.1000 to +0.1000) nats: no difference shown"
