"""What is refused of several processes, and by which name?"""

from __future__ import annotations

from typing import Any

import pytest
from tiny import CONFIGS

from edgeft.errors import BadInput
from edgeft.planning.plan import Plan, make_plan
from edgeft.settings.job import make_job


def plan(**settings: Any) -> Plan:
    return make_plan(make_job(**{"model": str(CONFIGS / "smollm2-135m"), "profile": "cpu-8gb", **settings}))


@pytest.mark.parametrize(
    ("settings", "where", "problem"),
    [
        ({"processes": 3, "machines": 2}, "processes", "3 cannot be divided among 2 machines"),
        ({"processes": 8, "batch_size": 4}, "processes", "8 share each step's 4 samples: some would have none"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(settings: dict[str, Any], where: str, problem: str) -> None:
    with pytest.raises(BadInput) as caught:
        plan(**settings)
    assert caught.value.where == where and problem in caught.value.problem


def test_several_processes_are_planned_to_stream_each_in_its_own_part() -> None:
    """Where one process would leave its layers in their files, so do two that have as much each."""
    asked = {"model": str(CONFIGS / "llama-3.1-8b"), "profile": "laptop-16gb", "max_memory_bytes": 5 * 2**30,
             "tuner": "lora", "rank": 8, "base_precision": "nf4", "batch_size": 4, "micro_batch_size": 1,
             "max_length": 256}  # fmt: skip
    one, two = (plan(**asked, processes=count) for count in (1, 2))
    assert one.training.stream_layers and two.training.stream_layers and two.peak_bytes <= 5 * 2**30
    held = [{term.name: term.bytes for term in made.phases[-1].terms} for made in (one, two)]
    assert held[0]["streamed layers"] == held[1]["streamed layers"] and "gloo" in held[1], "each has its own window"
    assert any("hold" in note and "together" in note for note in two.notes)
