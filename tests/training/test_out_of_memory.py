"""Running out of memory, or taking more than planned: said, recorded, exit 3 with what fits, never a traceback."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIGS, killed_at, run
from typer.testing import CliRunner

from edgeft.cli import app
from edgeft.data.scoring_groups import scoring
from edgeft.documents import sha256_file
from edgeft.engine.loop import Run
from edgeft.errors import DoesNotFit
from edgeft.machines.limits import Limit
from edgeft.machines.profile import load_profile
from edgeft.planning.plan import Plan, make_plan
from edgeft.progress import silent
from edgeft.settings.job import make_job
from edgeft.training.out_of_memory import capped, command, explained, is_out_of_memory
from edgeft.training.prepare import carried_out, choose_device
from edgeft.training.promise import above, check_budget, promise
from edgeft.training.train import train

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "problem, ran_out",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(problem: Exception, ran_out: bool) -> None:
    assert is_out_of_memory(problem) is ran_out


@pytest.mark.parametrize(
    "kind",
    [MemoryError, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (torch.OutOfMemoryError, RuntimeError))],
)
def test_running_out_of_memory_is_exit_3_with_the_next_smaller_way(
    kind: type[Exception], plan_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    path, out = plan_file(micro_batch_size=None, checkpoint_steps=1), tmp_path / "train"
    step = Run.train_step

    def out_of_memory(self: Run, samples: Any) -> float:
        if self.step == 2:
            raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")
        return step(self, samples)

    monkeypatch.setattr(Run, "train_step", out_of_memory)
    with pytest.raises(DoesNotFit, match=r"train: memory ran out in phase train: .* measured at the highest, at most"):
        run(path, out)
    assert not out.exists()
    result = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "again"), "--no-rehearsal"])
    assert isinstance(result.exception, DoesNotFit) and result.exception.exit_code == 3
    monkeypatch.undo()
    assert run(path, out).resumed_at == (2,), "what was learnt before is kept"


def test_the_command_plans_the_next_smaller_way(tmp_path: Path) -> None:
    job = make_job(model=str(CONFIGS / "smollm2-135m"), profile="t4", max_length=512, checkpointing=False, seed=3)
    made = make_plan(job)
    with pytest.raises(DoesNotFit) as caught, explained(made, CPU, ["train"]):
        raise MemoryError
    words = shlex.split(str(caught.value).split(": edgeft ")[1])
    assert words[0] == "plan" and "--max-memory" in words
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "plan.json")])
    assert result.exit_code == 0, result.output
    smaller = Plan.read(tmp_path / "plan.json")
    assert smaller.peak_bytes <= 0.9 * made.peak_bytes
    assert (smaller.job.max_length, smaller.job.checkpointing, smaller.job.seed) == (512, False, 3)


def test_a_command_says_every_setting_that_is_not_the_default() -> None:
    pins = {"layers": "sparse", "trained_layers": "0,2", "max_memory_bytes": 2**30}
    job = make_job(model="a b", data="rows.jsonl", device="raspberrypi5-8gb", **pins)
    assert shlex.split(command(job)) == [
        "edgeft", "plan", "a b", "--data", "rows.jsonl", "--on", "cpu", "--for", "raspberrypi5-8gb",
        "--max-memory", "1024MiB", "--set", "layers=sparse", "--set", "trained_layers=0,2",
    ]  # fmt: skip


def test_other_errors_stay_what_they_are(plan_file: Any) -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained(Plan.read(plan_file()), CPU, ["train"]):
        raise RuntimeError("shapes cannot be multiplied")


def test_a_card_is_capped_at_the_budget_and_freed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        total_memory = 1000

    set_to: list[float] = []

    def fraction(share: float, device: int) -> None:
        assert device == 0  # as PyTorch does: a device without a number is refused
        set_to.append(share)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fraction)
    with pytest.raises(KeyError), capped(250, torch.device("cuda")):
        raise KeyError
    with capped(4000, torch.device("cuda")):
        pass
    assert set_to == [0.25, 1.0, 1.0, 1.0]
    with capped(250, CPU):
        assert len(set_to) == 4


def test_more_than_the_high_estimate_is_a_deviation_and_said(
    plan_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    path = plan_file(max_steps=2)
    made = Plan.read(path)
    assert above(made, {"load": 1, "train": made.peak_bytes}) == []
    monkeypatch.setattr("edgeft.machines.meter.peak_bytes", lambda device: 3 * made.peak_bytes)
    result = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "train"), "--no-rehearsal"])
    assert result.exit_code == 0 and "WARNING: training took" in result.stderr and "were planned" in result.stderr
    assert "not as planned: peak memory" in result.stdout


def test_a_gpus_plan_on_a_cpu_is_planned_for_the_cpu(
    plan_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    monkeypatch.setattr("edgeft.training.prepare.detect", lambda profile: load_profile("cpu-8gb"))
    path = plan_file(profile="t4", base_precision="fp16", tuner="lora", max_steps=2)
    made = Plan.read(path)
    result = train(made, tmp_path / "train", plan_sha256=sha256_file(path), progress=silent)
    done = {d.what: (d.planned, d.done) for d in result.deviations if d.what != "peak memory"}
    assert done == {"device": ("cuda", "cpu"), "compute_dtype": ("fp16", "fp32"), "base_precision": ("fp16", "fp32")}
    assert result.training.base_precision == "fp32" and result.plan.training.base_precision == "fp16"
    baseline = load_profile("cpu-8gb").training_baseline_bytes
    assert result.predicted_peak_bytes > baseline > made.peak_bytes  # the process itself counts on a CPU
    assert result.predicted_expected_bytes <= result.predicted_peak_bytes
    too_little = Limit((made.peak_bytes + result.predicted_peak_bytes) // 2, "ulimit")
    monkeypatch.setattr("edgeft.machines.limits.memory_limit", lambda: too_little)
    with pytest.raises(DoesNotFit, match=r"plan: needs .*, this process can have .* \(ulimit\)"):
        train(made, tmp_path / "again", plan_sha256=sha256_file(path), progress=silent)


def test_reading_a_checkpoint_is_held_to_the_limit_and_recorded(
    plan_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    path, out = plan_file(max_steps=3, checkpoint_steps=1), tmp_path / "train"

    stop = killed_at(2)

    with pytest.raises(KeyboardInterrupt):
        run(path, out, progress=stop)
    made = Plan.read(path)
    stages = made.stages.model_copy(update={"phases": tuple(
        phase.model_copy(update={"high_bytes": made.peak_bytes + 1000}) if phase.name == "resume" else phase
        for phase in made.stages.phases)})  # fmt: skip
    higher = made.model_copy(update={"stages": stages})  # whose reading of a checkpoint is its highest moment
    assert [promise(higher, going_on=on) - made.peak_bytes for on in (False, True)] == [0, 1000]
    monkeypatch.setattr("edgeft.machines.limits.memory_limit", lambda: Limit(made.peak_bytes + 999, "ulimit"))
    check_budget(higher, CPU)
    with pytest.raises(DoesNotFit, match=r"\(ulimit\)"):
        train(higher, out, plan_sha256=sha256_file(path), progress=silent)
    taken = {"train": made.peak_bytes, "resume": made.peak_bytes + 1000}
    assert not above(higher, taken, going_on=True) and above(higher, taken)
    monkeypatch.undo()
    result = run(path, out)
    assert result.resumed_at == (1,) and result.phase_peak_bytes["resume"] > 0


def test_a_gpus_plan_on_the_cpu_holds_what_scoring_its_own_rows_takes(
    plan_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    monkeypatch.setattr("edgeft.training.prepare.detect", lambda profile: load_profile("cpu-8gb"))
    pins = {"tuner": "lora", "rank": 4, "max_steps": 2, "malloc": "tight"}
    on_gpu = Plan.read(plan_file(profile="t4", base_precision="fp16", **pins))
    here = carried_out(on_gpu, choose_device(on_gpu, None)[2])
    on_cpu = Plan.read(plan_file(profile="cpu-8gb", base_precision="fp32", **pins))
    assert here.training == on_cpu.training.model_copy(update={"checkpoint_steps": here.training.checkpoint_steps})
    assert here.phases == on_cpu.phases
    assert here.peak_bytes == on_cpu.peak_bytes
    for_longest = carried_out(on_gpu.model_copy(update={"scoring": scoring((), here.training.group_tokens)}),
                              choose_device(on_gpu, None)[2])  # fmt: skip
    assert for_longest.phases != here.phases  # the rows do count
