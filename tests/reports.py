"""What reports are made of, for tests: a plan, a run that was proven with made-up measurements, a small matrix."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from tiny import CONFIGS

from edgeft.exporting.bundle import Bundle, Measured, Measurement
from edgeft.machines.profile import Profile, list_profiles
from edgeft.memory.simulated import Moment, Simulation
from edgeft.merging.result import MergedCheckpoint
from edgeft.models.metrics import Attempt, Difference, Metrics, Pair, Proof, Repair, Rung
from edgeft.planning.plan import Plan, make_plan
from edgeft.reporting.matrix import Matrix, find_profiles, make_matrix
from edgeft.reporting.read_run import Run
from edgeft.reporting.summary import Summary, summarise
from edgeft.settings.job import make_job
from edgeft.targets.footprint import bundle_weights, predict
from edgeft.targets.target import load_target
from edgeft.training.result import TrainResult
from edgeft.units import GIB, MIB

FORMS = ("base", "fine-tuned", "merged", "ort-int4")
NO_DIFFERENCE = Difference(difference=-0.001, low=-0.01, high=0.008)


def devices() -> list[Profile]:
    """Every shipped device, the smallest first."""
    found = [profile for profile in list_profiles() if "deploy" in profile.roles and profile.detected]
    return sorted(found, key=lambda profile: profile.budget_bytes)


def plan_of(model: str = "llama-3.1-8b", profile: str = "t4", **settings: Any) -> Plan:
    return make_plan(make_job(model=str(CONFIGS / model), profile=profile, **settings))


def plan_summary(model: str = "llama-3.1-8b", profile: str = "t4", **settings: Any) -> Summary:
    """The report of a plan, with a simulated step of made-up heights."""
    steps = [("forward", 40, 5), ("backward", 60, 9), ("optimizer", 2, 4)]
    moments = tuple(Moment(phase=phase, name=f"layer {i}", live_bytes=int((gib + 0.04 * min(i, 30)) * GIB))
                    for phase, count, gib in steps for i in range(count))  # fmt: skip
    simulation = Simulation(
        live_peak_bytes=max(m.live_bytes for m in moments), phase="backward", moment="layer 59", weights_bytes=1,
        adapter_bytes=1, optimizer_bytes=1, phase_peaks=(), timeline=moments, largest=(), seconds=0.1,
        extrapolated=False, layers_simulated=1,
    )  # fmt: skip
    plan = plan_of(model, profile, **settings).model_copy(update={"simulation": simulation})
    return summarise(Run(plan, plan_sha256="f" * 64), devices())


def metrics(exact: float | None, loss: float) -> Metrics:
    return Metrics(rows=1000, loss=loss, perplexity=2.718**loss, exact_match=exact)


def train_of(plan: Plan, **changes: Any) -> TrainResult:
    """train.json of a run whose rows fared well."""
    curve = [[step, 7.0 / (1 + step / 9) + 0.3] for step in range(1, 121)]
    peaks = {phase.name: round(0.97 * phase.expected_bytes) for phase in plan.phases}
    return TrainResult.model_validate({
        "plan": json.loads(plan.model_dump_json()), "deviations": [], "steps": 120, "inputs": {}, "files": {},
        "trained_tokens": 900, "micro_batches": 10, "padding": 0.0, "predicted_peak_bytes": plan.peak_bytes,
        "trained_parameters": 5, "seconds": 200.0, "tokens_per_second": 9.0, "measured_peak_bytes": max(peaks.values()),
        "phase_peak_bytes": peaks, "cut_rows": 3, "loss_curve": curve,
        "base_valid": metrics(0.0, 6.8), "valid": metrics(0.77, 0.36),
        "base_test": metrics(0.0, 6.8066), "test": metrics(0.775, 0.3696), "units": [],
    } | changes)  # fmt: skip


def proof(*problems: str) -> Proof:
    rungs = tuple(
        Rung(name=name, against=against, compared=compared, tolerance="", top1_agreement=0.991, top1_or_tie=0.998,
             mean_kl_nats=4e-3, loss=0.3638, loss_before=0.3696, problems=problems)
        for name, against, compared in (
            ("trained", "training process", "64 prompts, every position"), ("merged", "trained", "512 rows"),
            ("ort-int4", "merged", "512 rows, and 64 prompts written greedily"),
        )
    )  # fmt: skip
    scores = dict(
        zip(FORMS, (metrics(0.0, 6.8066), *(metrics(0.775, 0.3696),) * 2, metrics(0.774, 0.3638)), strict=True)
    )
    pairs = tuple(Pair(before=a, after=b, loss=NO_DIFFERENCE, exact_match=NO_DIFFERENCE)
                  for a, b in itertools.pairwise(FORMS[1:]))  # fmt: skip
    whole = NO_DIFFERENCE.model_copy(update={"difference": 0.774, "low": 0.75, "high": 0.8})
    pairs += (Pair(before=FORMS[0], after=FORMS[-1], loss=whole, exact_match=whole),)  # as an export writes it
    return Proof(prompts=64, positions=900, rungs=rungs, scored_on="test", scores=scores, pairs=pairs, gain_nats=6.4)


def finished_run(profile: str = "cpu-16gb", **changes: Any) -> Run:
    """A run from plan to a measured bundle; `changes` are of its bundle."""
    plan = plan_of("smollm2-135m", profile).model_copy(update={"task_score": "exact_match"})  # of labels
    train, target = train_of(plan), load_target("ort-int4")
    merged = MergedCheckpoint.model_validate({
        "wise_alpha": 1.0, "predicted_peak_bytes": 259 * MIB, "measured_peak_bytes": 258 * MIB, "seconds": 4.0,
        "relative_change": 0.1, "kind": "lora", "dtype": "bf16", "changed_tensors": 1, "tensors": 2,
        "untied_head": False, "inputs": {}, "files": {}, "train": json.loads(train.model_dump_json()),
        "trained": {"relative": "../train", "absolute": "/train"},
    })  # fmt: skip
    attempts = (
        Attempt(name="ort-int4", predicted_bytes=90 * MIB, loss=NO_DIFFERENCE, exact_match=NO_DIFFERENCE, built=True,
                decision="passes", reason="the smallest that keeps the fine-tune"),
    )  # fmt: skip
    bundle = Bundle.model_validate({
        "target": target, "prompt_format": "plain", "prefix_ids": [], "stop_ids": [], "context_tokens": 2048,
        "context_limited_by": "target", "golden_logit_tolerance": 0.1, "weight_bytes_per_token": 1, "files": {},
        "size_bytes": 97 * MIB, "golden": [], "provenance": {}, "proof": proof(),
        "predicted": predict(plan.spec, target, bundle_weights(plan.spec, target), 2048),
        "repair": Repair(asked="auto", compared="512 validation rows", attempts=attempts),
    } | changes)  # fmt: skip
    here = Measurement(
        predicted_here_bytes=150 * MIB, seconds=40.0, predicted_peak_bytes=700 * MIB, measured_peak_bytes=640 * MIB,
        measured=Measured(
            load_seconds=1, prompt_tokens=128, new_tokens=64, time_to_first_token_seconds=1,
            prefill_tokens_per_second=900, decode_tokens_per_second=61, peak_memory_bytes=149 * MIB,
            weight_bytes_per_token=1, bandwidth_bytes_per_second=1, bound_tokens_per_second=180, fraction_of_bound=0.3,
            cores=2,
        ),
    )  # fmt: skip
    return Run(plan, train, merged, bundle, here, plan_sha256="e" * 64)


def run_summary() -> Summary:
    return summarise(finished_run(), devices())


def small_matrix(folder: Path) -> Matrix:
    """Five models, one of them broken, on six machines and every device."""
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{}")
    names = ("smollm2-135m", "llama-3.1-8b", "gpt2", "qwen2.5-72b", "gemma-3-1b", "deepseek-r1-distill-qwen-1.5b")
    found = [(name, str(CONFIGS / name)) for name in names]
    machines = "t4,cpu-8gb,cpu-16gb,rtx4060-8gb,rtx4090-24gb,apple-16gb,raspberrypi5-8gb,jetson-orin-nano-8gb"
    return make_matrix([*found, ("broken", str(folder / "broken"))], find_profiles(machines))
