"""Is what says quickly that a way cannot fit never more than what the way needs, and who needs least still found?"""

from __future__ import annotations

import random

import pytest
from tiny import CONFIGS

from edgeft.machines.profile import load_profile
from edgeft.planning import plan as planning
from edgeft.planning.alternatives import with_smallest_passes
from edgeft.planning.plan import _Asked
from edgeft.settings.job import make_job


def asked(model: str, profile: str, **settings: object) -> _Asked:
    job = make_job(model=str(CONFIGS / model), profile=profile, **settings)
    return planning._ask(job, None, None, load_profile(profile))


@pytest.mark.parametrize(
    ("model", "profile", "settings"),
    [("llama-3.1-8b", "t4", {}), ("qwen2.5-14b", "laptop-16gb", {}), ("gpt2", "cpu-8gb", {"tuner": "full"}),
     ("gemma-3-1b", "rtx4060-8gb", {"layers": "lisa", "tuner": "full"}), ("smollm2-135m", "apple-16gb", {}),
     ("qwen2.5-0.5b", "cpu-8gb", {"stream_layers": True}), ("llama-3.2-1b", "t4", {"tuner": "prompt"}),
     ("llama-3.2-1b", "l4-24gb", {"optimizer": "paged_adamw8bit"})],
)  # fmt: skip
def test_no_way_needs_less_than_its_bound(model: str, profile: str, settings: dict[str, object]) -> None:
    found = asked(model, profile, **settings)
    for way in random.Random(0).sample(found.looked_at, min(150, len(found.looked_at))):
        least, high = found.question.least_bytes(way), found.question.high_bytes(way)
        assert 0 < least <= high, way


def test_nor_with_outputs_of_layers_on_disk() -> None:
    found = asked("qwen2.5-0.5b", "cpu-8gb", layers="sparse", active_layers=4)
    way = found.looked_at[0].model_copy(update={"cached_layers": 20})
    assert found.question.least_bytes(way) <= found.question.high_bytes(way)


@pytest.mark.parametrize(
    ("model", "profile", "settings"),
    [("qwen2.5-14b", "rtx4060-8gb", {}), ("llama-3.1-8b", "cpu-8gb", {"tuner": "full", "stream_layers": False}),
     ("gpt2", "cpu-8gb", {"tuner": "full", "max_memory_bytes": 2**30, "max_length": 64})],
)  # fmt: skip
def test_the_smallest_way_is_among_those_of_smallest_passes(
    model: str, profile: str, settings: dict[str, object]
) -> None:
    found = asked(model, profile, **settings)
    few = with_smallest_passes(found.looked_at)
    assert len(few) < len(found.looked_at) / 3
    high = found.question.high_bytes
    assert min(map(high, few)) == min(map(high, found.looked_at))
