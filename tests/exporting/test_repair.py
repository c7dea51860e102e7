"""The smallest artifact that keeps the fine-tune is what is built; what fails is kept, marked, and told how to mend."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import BENCH, CONFIGS, EXAMPLES, ROOT, ROWS, run
from typer.testing import CliRunner

from edgeft.cli import app
from edgeft.data.dataset import TextTokenizer
from edgeft.errors import BadInput, DoesNotFit, EdgeftError, ParityFailed, QualityLost
from edgeft.exporting import repair, room
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.attempts import left
from edgeft.exporting.bundle import Bundle
from edgeft.exporting.export import Chosen
from edgeft.exporting.outputs import observe_artifact
from edgeft.exporting.parity import HINTS, compare
from edgeft.exporting.promotion import file_bytes
from edgeft.exporting.proof_rows import ProofRows
from edgeft.exporting.repair import Climb, Step, climbing, export_smallest
from edgeft.machines.runner import runner_module
from edgeft.merging.merge import merge
from edgeft.merging.result import MergedCheckpoint
from edgeft.models.streamed import load_streamed
from edgeft.planning import expected as expected_module
from edgeft.planning.expected import MEASURED, expected
from edgeft.planning.plan import make_plan
from edgeft.planning.stage_checks import plan_stages
from edgeft.progress import silent
from edgeft.settings.job import Job, make_job
from edgeft.targets.target import Target, calibrated, candidates, climb, list_targets, load_target
from edgeft.training.job_data import Data
from edgeft.units import show_bytes, show_seconds

INT4 = load_target("ort-int4")
OUTLIER = 300.0  # how much larger one input's weights are than the others of its block: their codes are all but lost


def outlying(source: Path, out: Path) -> Path:
    """The same model, more certain, whose first input of every block's matrices has large weights and small values."""
    shutil.copytree(source, out)
    weights = load_file(out / "model.safetensors")
    for name, weight in weights.items():
        if name == "model.norm.weight":
            weight *= 30
        elif "layernorm" in name:
            weight[0] /= OUTLIER
        elif re.search(r"\.(q|k|v|gate|up)_proj\.weight$", name):
            weight[:, 0] *= OUTLIER
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def trained_and_merged(base: Path, folder: Path) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 5))
    pins: dict[str, Any] = {"epochs": 4.0, "learning_rate": 3e-3, "batch_size": 4, "rank": 4, "eval_rows": 8}
    make_plan(make_job(model=str(base), data=str(folder / "rows.jsonl"), profile="cpu-8gb", **pins)).write(
        folder / "plan.json"
    )
    run(folder / "plan.json", folder / "train")
    merge(folder / "train", folder / "merged", wise_alpha=1.0, progress=silent)
    return folder / "merged"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: Path) -> Path:
    """A merge of the tiny model that any rounding keeps."""
    return trained_and_merged(checkpoint_folder, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def delicate(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: Path) -> Path:
    """A merge of a model that rounding to nearest destroys, and calibrated codes do not."""
    folder = tmp_path_factory.mktemp("delicate")
    return trained_and_merged(outlying(checkpoint_folder, folder / "base"), folder)


def found_in(merged: Path, out: Path, limit: int | None = None) -> Any:
    return climbing(merged, out, None, limit, None, None, silent)


def gated(target: Target, kl: float, **changes: Any) -> Target:
    """The target with activations in fp32 and a gate on the mean KL alone."""
    wide = {"min_top1_agreement": 0.0, "max_loss_increase_nats": 9.0, "max_exact_match_drop_points": 100.0}
    parity = target.parity.model_copy(update=wide | {"max_mean_kl_nats": kl, "max_gain_lost": 9.0})
    return target.model_copy(update={"name": "own", "accuracy_level": 0, "parity": parity} | changes)


def edgeft(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def kl_of(merged: Path, place: Path, *targets: Target) -> list[float]:
    with found_in(merged, place) as found:
        forms = [found.simulate(Step(each.name, each)) for each in targets]
        return [compare(found.exact, form, INT4.parity, found.gain).mean_kl_nats for form in forms]


def test_what_auto_may_end_in_is_one_list() -> None:
    names = ["ort-int4", "ort-int4-calibrated", "ort-int8", "ort-fp16", "ort-fp32"]
    assert [each.name for each in candidates("auto")] == names
    assert candidates("auto") == tuple(map(load_target, names))
    assert candidates("ort-int8") == (load_target("ort-int8"),)
    assert make_job(model="any").target == "auto" and "auto" not in {each.name for each in list_targets()}
    own = gated(INT4, 1.0, eight_bit=("layers.0",))
    better = calibrated(own)
    assert better is not None and (better.name, better.calibration) == ("own-calibrated", "gptq")
    assert better.eight_bit == own.eight_bit and better.parity == own.parity
    assert all(calibrated(load_target(name)) is None for name in ("ort-int8", "ort-int4-calibrated", "ort-int4-mixed"))
    assert [each.name for each in climb(load_target("gguf-q4_0"))][-2:] == ["gguf-q8_0", "gguf-f16"]


def test_auto_ends_in_the_bundle_of_the_smallest_target_that_passes(merged: Path, tmp_path: Path) -> None:
    done = edgeft("export", merged, "--out", tmp_path / "auto")
    assert done.exit_code == 0, (done.output, done.exception)
    made = Bundle.read(tmp_path / "auto" / "bundle.json")
    assert made.target == INT4 and made.repair is not None and made.repair.asked == "auto"
    (attempt,) = made.repair.attempts
    assert attempt.built and attempt.decision == "passes" and attempt.loss is not None
    assert attempt.reason == "passes; the interval covers zero"
    assert "auto: against the merged model on 8 validation rows, by PyTorch" in done.stdout
    assert "is up to date" in edgeft("export", merged, "--out", tmp_path / "auto").stderr
    assert "is up to date" in edgeft("export", merged, "--target", "ort-int4", "--out", tmp_path / "auto").stderr
    done = edgeft("export", merged, "--target", "ort-int4", "--out", tmp_path / "named")
    assert done.exit_code == 0 and Bundle.read(tmp_path / "named" / "bundle.json").repair is None
    for path in (tmp_path / "named").iterdir():
        if path.name != "bundle.json":
            assert path.read_bytes() == (tmp_path / "auto" / path.name).read_bytes(), path.name
    # a target that was named is not what a climb was asked for
    assert "is up to date" not in edgeft("export", merged, "--out", tmp_path / "named", "--size-budget", "9KiB").stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_what_nearest_rounding_destroys_is_calibrated(delicate: Path, tmp_path: Path) -> None:
    nearest, better = kl_of(delicate, tmp_path / "b", INT4, load_target("ort-int4-calibrated"))
    assert nearest > INT4.parity.max_mean_kl_nats > 20 * better  # planted, at the shipped gate
    own = tmp_path / "own.toml"
    own.write_text((ROOT / "export" / "ort-int4.toml").read_text().replace("accuracy_level = 4", "accuracy_level = 0"))
    named = ("export", delicate, "--target", own, "--repair", "auto", "--out", tmp_path / "bundle")
    done = edgeft(*named)
    assert done.exit_code == 0, (done.output, done.exception)
    made = Bundle.read(tmp_path / "bundle" / "bundle.json")
    assert (made.target.name, made.target.calibration) == ("own-calibrated", "gptq")
    assert made.repair is not None and [each.decision for each in made.repair.attempts] == ["fails", "passes"]
    first, last = made.repair.attempts
    assert first.reason.startswith("mean KL") or "loss" in first.reason
    assert first.predicted_bytes == last.predicted_bytes and not first.built
    assert made.proof is not None and made.proof.rungs[-1].mean_kl_nats == pytest.approx(better, rel=0.05)
    assert "is up to date" in edgeft(*named).stderr


def test_a_named_target_that_fails_is_kept_and_the_next_that_passes_is_named(delicate: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    done = edgeft("export", delicate, "--target", "ort-int4", "--out", out)
    assert isinstance(done.exception, QualityLost) and done.exception.exit_code == 4 and not out.exists()
    failed = tmp_path / "bundle.failed"
    assert "the bundle that failed is kept in bundle.failed, beside bundle" in str(done.exception)
    command = rf"hint: edgeft export '?{re.escape(str(delicate))}'? --target ort-int4-calibrated  # \d+ KiB, predicted "
    assert re.search(command + r"[+-]\d+\.\d points \[", str(done.exception))
    made = Bundle.read(failed / "bundle.json")
    assert "at most" in made.failed and made.proof is None and made.target == INT4
    runner = runner_module()
    (problem,) = runner.check_files(failed)
    assert problem.startswith("proof: this bundle FAILED it and is not to be shipped")
    assert runner.main(["--bundle", str(failed), "--verify", "--no-replay"]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle.failed"]


def test_a_failed_bundle_says_so_when_it_runs(capfd: pytest.CaptureFixture[str], merged: Path, tmp_path: Path) -> None:
    made = export_one(merged, tmp_path / "b", gated(INT4, 1e-12))
    assert isinstance(made, QualityLost)
    assert runner_module().main(["--bundle", str(tmp_path / "b.failed"), "x", "--max-tokens", "1"]) == 0
    assert "WARNING: proof: this bundle FAILED it" in capfd.readouterr().err
    (tmp_path / "b.failed" / "bundle.json").unlink()  # now it is somebody's folder
    assert isinstance(export_one(merged, tmp_path / "b", gated(INT4, 1e-12)), BadInput)


def export_one(merged: Path, out: Path, target: Target) -> Any:
    try:
        return repair.export(merged, target, out, device=None, progress=silent, keep_failed=True)
    except EdgeftError as problem:
        return problem


@pytest.mark.slow
def test_eight_bits_go_where_calibrated_codes_need_them(delicate: Path, tmp_path: Path) -> None:
    """Promoted, with the 4-bit codes chosen anew for it; and the bundle's KL is the one that was simulated."""
    loose = gated(INT4, 1.0)
    better = calibrated(loose)
    assert better is not None
    with found_in(delicate, tmp_path / "x") as found:
        every = tuple(f"layers.{i}" for i in range(2))
        forms = [found.simulate(Step("", better.model_copy(update={"eight_bit": each}))) for each in ((), every)]
        none, whole = (compare(found.exact, form, INT4.parity).mean_kl_nats or 0 for form in forms)
    assert whole < 0.9 * none  # there is something to gain
    wanted = gated(INT4, (none + whole) / 2 / 0.9)
    targets = [each for each in climb(wanted) if each.weight_bits == 4]
    made = export_smallest(delicate, targets, tmp_path / "b", asked="own", device=None, progress=silent)
    assert made.promotion is not None and made.repair is not None and made.target.calibration == "gptq"
    assert set(made.target.eight_bit) == {each.module for each in made.promotion.promoted} != set()
    decisions = [each.decision for each in made.repair.attempts]  # the first promotions may fail as they run
    assert decisions in (["fails", "fails", "passes"], ["fails", "fails", "fails", "passes"])
    assert re.fullmatch(r"own-calibrated, 8 bits for \d+ of 14 tensors", made.repair.attempts[-1].name)
    with found_in(delicate, tmp_path / "x") as found:
        form = found.simulate(Step("", made.target))
        artifact = observe_artifact("a", ArtifactModel(tmp_path / "b"), found.rows, TextTokenizer(delicate))
        assert (compare(form, artifact, INT4.parity).mean_kl_nats or 0) < 0.05 * whole


def test_where_no_four_bits_pass_eight_are_taken(merged: Path, tmp_path: Path) -> None:
    made = export_smallest(
        merged, climb(gated(INT4, 1e-12)), tmp_path / "b", asked="auto", device=None, progress=silent
    )
    assert made.target == load_target("ort-int8") and made.repair is not None
    names = [each.name for each in made.repair.attempts]
    assert names[:2] == ["own", "own-calibrated"] and names[-1] == "ort-int8"
    assert [each.decision for each in made.repair.attempts[:-1]] == ["fails"] * (len(names) - 1)
    assert sum(each.built for each in made.repair.attempts) == 1


def test_tensors_are_promoted_only_where_a_whole_model_has_room(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "measure", never)
    monkeypatch.setattr(room, "loader", lambda plan: load_streamed)
    targets = climb(gated(INT4, 1e-12))
    with found_in(merged, tmp_path / "b") as found:
        assert [step.name for step in found.steps(targets) if step.promotion] == []
        (skipped,) = found.attempts
    assert (skipped.name, skipped.decision) == ("own-calibrated, 8 bits for some tensors", "skipped")
    assert re.fullmatch(r"takes a whole model in fp32 and what .* by, .*B, and more than the .*B here", skipped.reason)


def never(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("nothing is built here")


def test_a_size_budget_ends_the_climb_and_says_what_the_next_one_needs(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "export", never)
    with found_in(merged, tmp_path / "b") as found:
        small, large = found.size(INT4), found.size(load_target("ort-int8"))
    targets, common = climb(gated(INT4, 1e-12)), {"asked": "auto", "device": None, "progress": silent}
    with pytest.raises(QualityLost) as caught:
        export_smallest(merged, targets, tmp_path / "b", size_budget_bytes=(small + large) // 2, **common)
    assert str(caught.value).startswith("repair: nothing that fits keeps the fine-tune\nown, ")
    assert re.search(r"ort-int8, .*: a bundle for ort-int8 takes .*, the budget is ", str(caught.value))
    assert re.search(r"hint: edgeft export .* --size-budget 1MiB  # \d+ KiB, predicted ", str(caught.value))
    with pytest.raises(DoesNotFit, match=r"^--size-budget: a bundle for own takes .*, the budget is 10.0 KiB"):
        export_smallest(merged, targets, tmp_path / "b", size_budget_bytes=10240, **common)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_is_left_training_through_the_rounding_is_priced(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = MergedCheckpoint.read(merged / "merged.json").train.plan
    aware = make_plan(plan.job.model_copy(update={"quantize_aware": True}), spec=plan.spec, profile=plan.profile)
    said = left(plan)
    assert f"about {show_seconds(aware.seconds)} and {show_bytes(aware.peak_bytes)} on {plan.profile.name}" in said
    assert left(aware) == HINTS["artifact"]  # which has been done
    gone = plan.model_copy(update={"job": plan.job.model_copy(update={"data": str(tmp_path / "gone.jsonl")})})
    assert "gone.jsonl: no such data file)" in left(gone)
    monkeypatch.setattr(Climb, "passing", lambda found, targets: iter(()))
    with pytest.raises(QualityLost) as caught:
        export_smallest(merged, [INT4], tmp_path / "b", asked="own", device=None, progress=silent)
    assert said in str(caught.value)


def test_a_named_target_grows_by_a_tenth_at_most(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int | None] = []

    def noted(found: Climb, targets: Any) -> Any:
        limits.append(found.limit_bytes)
        return iter(())

    monkeypatch.setattr(Climb, "passing", noted)
    for budget in (None, 1000, 10**9):
        with pytest.raises(QualityLost):
            export_smallest(
                merged, [INT4], tmp_path / "b", asked="own", device=None, progress=silent, same_size=True,
                size_budget_bytes=budget,
            )  # fmt: skip
    most = int(1.1 * file_bytes(spec_of(merged), INT4, merged))
    assert limits == [most, 1000, most]


def spec_of(merged: Path) -> Any:
    return repair.MergedCheckpoint.read(merged / "merged.json").train.plan.spec


def test_a_bundle_that_fails_is_not_the_end_and_nothing_is_built_twice(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Target] = []
    repairs: list[Any] = []

    def failing(folder: Path, target: Target, out: Path, *, chosen: Chosen, **options: Any) -> Any:
        built.append(target)
        repairs.append(chosen.repair)
        lost = QualityLost("parity ladder", "exact match falls by 9.0 points", "a hint")
        lost.rows = "test" if len(built) == 2 else "validation"
        raise lost

    monkeypatch.setattr(repair, "export", failing)
    with pytest.raises(QualityLost, match=r"ort-int4-calibrated, .*: the bundle: exact match falls by 9.0 points"):
        export_smallest(merged, climb(INT4), tmp_path / "b", asked="auto", device=None, progress=silent)
    assert len(built) == len(set(map(repr, built))) and [each.name for each in built[:2]] == [
        "ort-int4", "ort-int4-calibrated",
    ]  # fmt: skip
    assert [each.weight_bits for each in built][-3:] == [8, 16, 32]
    assert [each.by_test_rows for each in repairs][:3] == [False, False, True]
    assert [each.decision for each in repairs[1].attempts] == ["fails", "passes"]


def test_a_fault_that_no_rounding_explains_ends_it_at_once(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def faulty(folder: Path, target: Target, out: Path, **options: Any) -> Any:
        built.append(target.name)
        raise ParityFailed("parity ladder, rung 'stored' against 'merged'", "one zero point", "report this")

    monkeypatch.setattr(repair, "export", faulty)
    with pytest.raises(ParityFailed, match="one zero point"):
        export_smallest(merged, climb(INT4), tmp_path / "b", asked="auto", device=None, progress=silent)
    assert built == ["ort-int4"]


def test_a_climb_that_is_interrupted_leaves_nothing(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".b.repair").mkdir()  # of a run that was killed
    (tmp_path / ".b.repair" / "codes").write_text("old")

    def stopped(*arguments: Any, **options: Any) -> Any:
        assert len(list((tmp_path / ".b.repair").iterdir())) == 1  # the calibrated codes
        raise KeyboardInterrupt

    monkeypatch.setattr(repair, "export", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_smallest(merged, climb(INT4)[1:2], tmp_path / "b", asked="auto", device=None, progress=silent)
    assert list(tmp_path.iterdir()) == []


def test_a_device_without_room_is_no_reason_to_build(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "export", never)
    with found_in(merged, tmp_path / "b") as found:
        found.device_bytes = 10_000_000
        assert [lacking is not None for _, lacking in found.passing([INT4])] == [True]
        assert found.attempts[0].decision == "skipped" and "the device has" in found.attempts[0].reason


def test_decisions_are_made_on_validation_rows_and_codes_on_training_rows(merged: Path, tmp_path: Path) -> None:
    with found_in(merged, tmp_path / "b") as found:
        data = Data.read(found.merged.train.plan)
        ids = [list(each.ids) for each in found.rows]
        assert ids == [list(each.ids) for each in ProofRows.of(data, found.merged.train.plan).trained]
        assert [list(each.ids) for each in found.samples] == [list(each.ids) for each in data.train[:160]]


def test_the_plan_expects_what_was_measured_and_has_room_for_all(tmp_path: Path) -> None:
    from edgeft.machines.profile import load_profile
    from edgeft.memory.train_step import Workload
    from edgeft.models.spec import read_model_spec
    from edgeft.planning.costs import Question

    def planned(model: str, target: str) -> Any:
        spec = read_model_spec(str(EXAMPLES / model))
        job: Job = make_job(model=str(EXAMPLES / model), target=target)
        question = Question(job, load_profile("cpu-8gb"), spec, None, Workload(90, 8), 2**20, 8 * 2**30)
        training = make_plan(make_job(model=job.model, profile="cpu-8gb", target=target, max_length=90)).training
        return plan_stages(question, training)

    stages, notes = planned("debian-tiny", "auto")
    assert stages.target.name == "ort-int4"
    assert any(note.startswith("auto: ort-int4 is expected, by debian-tiny, 5.77M: ort-int4 -0.1") for note in notes)
    large, notes = planned("configs/smollm2-135m", "auto")
    assert large.target.name == "ort-int4-calibrated" and any("SmolLM2" in note for note in notes)
    each = [planned("configs/smollm2-135m", name)[0] for name in ("ort-int4", "ort-int4-calibrated", "ort-int8")]
    for phase in large.phases:
        if phase.where == "host":
            others = [p.high_bytes for stages in each for p in stages.phases if p.name == phase.name]
            # a climb keeps a table more, what it found of the rounded model, and has computed before it builds
            if phase.name in ("export: build", "export: prove"):
                assert phase.high_bytes > max(others)
            else:
                assert phase.high_bytes == max(others), phase.name
    assert "export: calibrate" in {phase.name for phase in large.phases}
    assert large.disk[-1].peak_bytes >= max(stages.disk[-1].peak_bytes for stages in each)
    assert not any("auto" in note for note in planned("debian-tiny", "ort-int4")[1])


def test_what_the_plan_expects_by_is_recorded() -> None:
    recorded = json.loads((BENCH / "results" / "example.json").read_text())["scores"]
    points = 100 * (recorded["ort-int4"]["exact_match"] - recorded["merged"]["exact_match"])
    assert MEASURED[0].points["ort-int4"] == pytest.approx(points, abs=0.05)
    assert recorded["merged"]["rows"] == 1000 and MEASURED[0].source.startswith("1,000 rows")
    smollm2 = BENCH / "results" / "smollm2.json"
    if smollm2.is_file():
        forms = json.loads(smollm2.read_text())["tasks"]["sections"]["forms"]
        for name, points in MEASURED[1].points.items():
            found = forms[name]["exact_match_points_to_merged"]
            assert found["low"] <= points <= found["high"]


def test_a_model_of_another_size_is_said_to_be_one() -> None:
    from edgeft.models.spec import read_model_spec

    spec = read_model_spec(str(CONFIGS / "llama-3.1-8b"))
    assert "none near this size was measured" in expected(spec, candidates("auto"))[1]
    assert 8e9 / MEASURED[1].parameters > expected_module.FAR


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--auto-promote",), "--auto-promote: is a part of repair now\n\nhint: leave it out, or name a target"),
        (("--repair", "yes"), "--repair: must be none or auto, got 'yes'"),
        (("--repair", "none"), "--repair none: is for a target that is named"),
        (("--promote", "layers.0"), "--promote: is for a target that is named"),
        (("--target", "ort-int8", "--calibration", "x"), "--calibration: is what codes are chosen on, ort-int8 takes"),
        (("--target", "all-that-fit", "--repair", "auto"), "--target all-that-fit: builds every target as it is"),
    ],
)
def test_what_does_not_go_together_is_named(
    merged: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = edgeft("export", merged, "--out", tmp_path / "b", *arguments)
    assert isinstance(done.exception, BadInput) and str(done.exception).startswith(message)
    assert list(tmp_path.iterdir()) == []
