"""Several processes, planned: what each holds, what a machine holds, what they bring, what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIGS

from edgeft.errors import BadInput
from edgeft.machines.profile import load_profile
from edgeft.memory.several import GLOO_BYTES, NCCL_BYTES, added_up, adding_seconds
from edgeft.memory.train_step import trained_parameters
from edgeft.planning.plan import Plan, make_plan
from edgeft.planning.processes import budget_of_one
from edgeft.settings.job import make_job

MODEL = str(CONFIGS / "smollm2-135m")
FIXED = {"micro_batch_size": 2, "checkpointing": False, "loss_chunk_tokens": 64, "max_length": 256, "malloc": "tight",
         "base_precision": "fp32", "batch_size": 8}  # fmt: skip

BUFFERS = ("train", "buffers")


def planned(**settings: Any) -> Plan:
    return make_plan(make_job(model=MODEL, **{"profile": "cpu-16gb", **FIXED, **settings}))


def phase(plan: Plan, name: str) -> int:
    return next(phase.expected_bytes for phase in plan.phases if phase.name == name)


def buffers(plan: Plan) -> int:
    return sum(term.bytes for phase in plan.phases for term in phase.terms if (phase.name, term.name) == BUFFERS)


def test_a_process_holds_what_one_does_and_what_connects_it() -> None:
    alone, four = planned(tuner="lora"), planned(tuner="lora", processes=4)
    assert (alone.training.share, four.training.share) == (8, 2)
    assert phase(four, "load") - phase(alone, "load") == GLOO_BYTES
    # a share of two is one micro-batch: no gradients are there while it runs
    assert phase(four, "train") <= phase(alone, "train") + GLOO_BYTES
    together = planned(tuner="lora", processes=2)
    assert buffers(together) < buffers(alone), "half of the threads"
    assert phase(together, "train") - buffers(together) == phase(alone, "train") - buffers(alone) + GLOO_BYTES
    apart = planned(tuner="lora", processes=2, machines=2)
    assert buffers(apart) == buffers(alone), "a machine of its own"


def test_the_buffer_holds_all_that_trains_at_a_time() -> None:
    for settings in ({"tuner": "lora"}, {"tuner": "full"}, {"tuner": "full", "layers": "sparse", "active_layers": 3}):
        plan = planned(**settings, processes=2)
        assert added_up(plan.spec, plan.training) == 4 * trained_parameters(plan.spec, plan.training)
        one = plan.training.model_copy(update={"processes": 1})
        assert added_up(plan.spec, one) == 0 == adding_seconds(one, 10**9)


def test_processes_of_a_cpu_divide_its_memory_and_those_of_gpus_have_their_own() -> None:
    cpu, gpu = load_profile("cpu-16gb"), load_profile("t4")
    assert budget_of_one(make_job(model=MODEL), cpu) == cpu.budget_bytes
    assert budget_of_one(make_job(model=MODEL, processes=4), cpu) == cpu.budget_bytes // 4
    assert budget_of_one(make_job(model=MODEL, processes=4, machines=2), cpu) == cpu.budget_bytes // 2
    assert budget_of_one(make_job(model=MODEL, processes=4), gpu) == gpu.budget_bytes - NCCL_BYTES
    assert budget_of_one(make_job(model=MODEL, processes=4, max_memory_bytes=10**9), cpu) == 10**9
    plan = planned(processes=4, tuner="lora")
    assert plan.budget_bytes == cpu.budget_bytes // 4 >= plan.peak_bytes


def test_a_machine_of_several_gpus_holds_each_process_of_its_own() -> None:
    one, four = (planned(profile="t4", base_precision="nf4", processes=count, tuner="lora") for count in (1, 4))
    held = [{phase.name: phase.high_bytes for phase in plan.stages.phases} for plan in (one, four)]
    times = {name: held[1][name] / size for name, size in held[0].items() if held[1][name] != size}
    assert len(times) == 2 and set(times.values()) == {4.0}, "loading, and what training leaves to the host"


def test_time_is_a_guess_on_the_safe_side() -> None:
    """On one CPU nothing is won; two machines halve the work and pay for the network."""
    alone, two = planned(tuner="lora"), planned(tuner="lora", processes=2)
    assert two.seconds_per_step > 0.98 * alone.seconds_per_step, "fewer micro-batches each, no core more"
    machines = planned(tuner="lora", processes=2, machines=2)
    assert alone.seconds_per_step / 2 < machines.seconds_per_step < two.seconds_per_step
    cards = [planned(profile="t4", base_precision="nf4", tuner="lora", processes=n).seconds_per_step for n in (1, 4)]
    assert cards[0] / 4 < cards[1] < cards[0]


def test_the_plan_says_how_it_is_started(tmp_path: Path) -> None:
    notes = planned(tuner="lora", processes=4, machines=2).notes
    assert any(
        note.startswith("4 processes on 2 machines share each step's 8 samples, 2 at most each") for note in notes
    )
    assert any("torchrun --nnodes 2 --nproc-per-node 2 " in note and "-m edgeft train PLAN" in note for note in notes)
    assert not any("torchrun" in note for note in planned(tuner="lora").notes)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"processes": 4, "machines": 3}, "processes: 4 cannot be divided among 3 machines"),
        ({"processes": 16}, "processes: 16 share each step's 8 samples: some would have none"),
        ({"processes": 2, "profile": "apple-16gb"}, "processes: PyTorch connects no Apple GPUs with one another"),
    ],
)
def test_what_processes_cannot_do(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        planned(**settings)
