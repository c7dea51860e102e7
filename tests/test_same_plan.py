"""Is a plan the same in every process? Python orders sets of texts anew in each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from edgeft.planning.plan import make_plan
from edgeft.settings.job import make_job

PYTHIA = str(Path(__file__).parent.parent / "examples" / "configs" / "pythia-160m")
JOB = {"model": PYTHIA, "profile": "laptop-16gb", "tuner": "full", "layers": "lisa", "embedding": "rotate",
       "max_length": 256}  # fmt: skip
CODE = f"""
from edgeft.planning.plan import make_plan
from edgeft.settings.job import make_job
print(make_plan(make_job(**{JOB})).stages.phases)
"""


def test_a_plan_does_not_depend_on_the_order_of_sets() -> None:
    """Two of these seeds order the sets of ends that can train at a time differently."""
    seeds = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("0", "1")]
    command = [sys.executable, "-c", CODE]
    assert (
        len({subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout for env in seeds}) == 1
    )


def test_going_on_reads_the_table_in_place_where_it_may_train() -> None:
    plan = make_plan(make_job(**JOB))
    phase = next(phase for phase in plan.stages.phases if phase.name == "resume")
    largest = next(term.bytes for term in phase.terms if term.name == "one tensor")
    assert largest == 4 * plan.spec.vocab_size * plan.spec.hidden_size
