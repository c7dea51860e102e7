"""How does a run whose memory ran out go on from its last step in less: other settings of memory, the same training?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from edgeft.documents import saving
from edgeft.errors import BadInput, DoesNotFit
from edgeft.planning.plan import MEMORY_ALONE, Plan, smaller_plan
from edgeft.training.result import Deviation
from edgeft.units import MIB, show_bytes

SMALLER = 0.9  # of what a plan that ran out of memory takes above the process itself: for the one in its place
FILE = "smaller.json"  # in a run's work folder


class Smaller(NamedTuple):
    """A plan that took another one's place in the middle of a run."""

    plan: Plan
    deviations: list[Deviation]


def taken(work: Path, plan: Plan, plan_sha256: str) -> Smaller:
    """The plan that a run in `work` goes on with: its own, or the smaller one that has taken its place."""
    try:
        found = json.loads((work / FILE).read_text())
    except FileNotFoundError:
        return Smaller(plan, [])
    except ValueError:
        raise BadInput(work / FILE, "is not what was written there", "remove it to go on as planned") from None
    if found["instead_of"] != plan_sha256:
        return Smaller(plan, [])
    smaller = Plan.model_validate(found["plan"])
    changed = [(name, getattr(plan.training, name), getattr(smaller.training, name)) for name in MEMORY_ALONE]
    return Smaller(smaller, [Deviation(what=name, planned=str(before), done=str(now))
                             for name, before, now in changed if before != now])  # fmt: skip


def less(plan: Plan) -> int:
    """The bytes within which the next smaller plan must be."""
    process = plan.profile.training_baseline_bytes if plan.training.device == "cpu" else 0
    return int(process + SMALLER * max(0, plan.peak_bytes - process)) // MIB * MIB


def step_down(work: Path, plan: Plan, plan_sha256: str) -> Plan:
    """Let the run in `work` go on in the next smaller way that trains the same, and give its plan.

    Raises DoesNotFit where there is none.
    """
    now = taken(work, plan, plan_sha256).plan
    try:
        smaller = smaller_plan(now, less(now))
    except DoesNotFit as problem:
        raise DoesNotFit("--smaller", problem.problem, problem.hint) from None
    with saving(work):
        work.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"instead_of": plan_sha256, "plan": smaller.model_dump(mode="json")})
        (work / f"{FILE}.partial").write_text(text)
        (work / f"{FILE}.partial").replace(work / FILE)
    return smaller


def told(before: Plan, smaller: Plan) -> str:
    """One line of what changes."""
    old, new = before.training, smaller.training
    changes = [f"{name} {getattr(old, name)} -> {getattr(new, name)}"
               for name in MEMORY_ALONE if getattr(old, name) != getattr(new, name)]  # fmt: skip
    least = f"{show_bytes(smaller.peak_bytes)} instead of {show_bytes(before.peak_bytes)}"
    return f"going on in a smaller way, at most {least}: {', '.join(changes)}"
