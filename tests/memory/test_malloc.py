"""Freed memory is kept or returned as the plan says: what a pool saves, what it takes, and when it is chosen."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from tiny import CONFIGS

from edgeft.machines.profile import load_profile
from edgeft.memory import phases, timing
from edgeft.memory.train_step import Workload
from edgeft.models.spec import read_model_spec
from edgeft.planning.plan import Plan, make_plan
from edgeft.settings.job import Training, make_job

SMOL = str(CONFIGS / "smollm2-135m")


def test_the_compiler_is_not_loaded_and_still_there() -> None:
    code = (
        "import torch; before = torch.compile; from edgeft.machines import meter; meter.import_all(); import sys;"
        "assert torch.compile is before and 'bitsandbytes' in sys.modules;"
        "assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def plan(**settings: Any) -> Plan:
    """A plan on a CPU that nobody need measure."""
    return make_plan(make_job(model=SMOL, profile="cpu-16gb", max_length=256, **settings))


def test_fast_where_it_fits_tight_where_it_must() -> None:
    free = plan(tuner="lora")
    assert free.training.malloc == "fast"
    pinned = {
        name: getattr(free.training, name)
        for name in ("tuner", "rank", "base_precision", "micro_batch_size", "checkpointing", "loss_chunk_tokens")
    }
    tight = plan(**pinned, layers="all", malloc="tight")
    assert tight.peak_bytes < free.peak_bytes and tight.seconds_per_step > free.seconds_per_step
    between = (tight.peak_bytes + free.peak_bytes) // 2
    forced = plan(**pinned, layers="all", max_memory_bytes=between)
    assert forced.training == tight.training
    assert any("malloc=tight" in line for line in forced.gave_up)
    assert any("malloc=fast" in saving.instead_of for saving in forced.savings)
    assert make_job(model=SMOL, malloc="tight").malloc == "tight"


def test_a_pool_is_priced_in_the_phases_that_use_it() -> None:
    made = plan(tuner="lora")
    size = phases.pool_size(made.spec, made.training, made.work)
    assert 0 < size.kept < size.reserve
    tight = plan(**{"tuner": "lora", "malloc": "tight"})
    for phase, without in zip(made.phases, tight.phases, strict=True):
        found = [term.bytes for term in phase.terms if term.name == "pool"]
        assert bool(found) == (phase.name != "load") and all(bytes <= size.kept for bytes in found)
        assert phase.expected_bytes == without.expected_bytes + sum(found)


@pytest.mark.parametrize("changes", [{"malloc": "tight"}, {"device": "cuda"}, {"device": "mps"}])
def test_no_pool_is_kept_by_other_plans(changes: dict[str, Any]) -> None:
    made = plan(tuner="lora")
    training: Training = made.training.model_copy(update=changes)
    assert phases.pool_size(made.spec, training, made.work) == (0, 0)


def test_only_what_is_moved_is_faster() -> None:
    spec, profile = read_model_spec(SMOL), load_profile("cpu-16gb")
    training = plan(tuner="lora").training
    tight = training.model_copy(update={"malloc": "tight"})
    work = Workload(256, 256)
    counted = timing.count(spec, training, work, 0)
    assert timing.count(spec, tight, work, 0) == counted
    arithmetic = timing.Counted(counted.operations, 0.0)

    def seconds(way: Training, what: timing.Counted) -> float:
        return timing.seconds_per_step(profile, way, work, what)

    assert seconds(training, counted) < seconds(tight, counted)
    assert seconds(training, arithmetic) == seconds(tight, arithmetic)
