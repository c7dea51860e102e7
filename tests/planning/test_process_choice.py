"""What is refused of several processes, and by which name?"""

from __future__ import annotations

from typing import Any

import pytest
from tiny import CONFIGS

from edgeft.errors import BadInput, DoesNotFit
from edgeft.planning.plan import Plan, make_plan
from edgeft.settings.job import make_job


def plan(**settings: Any) -> Plan:
    return make_plan(make_job(**{"model": str(CONFIGS / "smollm2-135m"), "profile": "cpu-8gb", **settings}))


@pytest.mark.parametrize(
    ("settings", "where", "problem"),
    [
        ({"processes": 3, "machines": 2}, "processes", "3 cannot be divided among 2 machines"),
        ({"processes": 8, "batch_size": 4}, "processes", "8 share each step's 4 samples: some would have none"),
        ({"processes": 2, "stream_layers": True, "tuner": "lora"}, "stream_layers", "several processes would read"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(settings: dict[str, Any], where: str, problem: str) -> None:
    with pytest.raises(BadInput) as caught:
        plan(**settings)
    assert caught.value.where == where and problem in caught.value.problem


def test_several_processes_are_not_planned_to_stream() -> None:
    """Where one process would leave its layers in their files, two find nothing that fits."""
    asked = {"model": str(CONFIGS / "llama-3.1-8b"), "profile": "laptop-16gb", "max_memory_bytes": 5 * 2**30}
    assert plan(**asked).training.stream_layers
    with pytest.raises(DoesNotFit):
        plan(**asked, processes=2)
