"""Does a run keep to the memory that its plan promised: is it there before, and was more taken after?"""

from __future__ import annotations

import torch

from edgeft.errors import DoesNotFit
from edgeft.machines import limits
from edgeft.planning.plan import Plan
from edgeft.training.result import Deviation
from edgeft.units import show_bytes

MORE_MEMORY = "peak memory"  # the deviation of a run that took more than its plan's high estimate


def highest(*measured: dict[str, int]) -> dict[str, int]:
    """Of each phase the highest bytes."""
    return {name: max(some.get(name, 0) for some in measured) for name in dict.fromkeys(n for m in measured for n in m)}


def promise(plan: Plan, *, going_on: bool) -> int:
    """The most that a plan says of a run; `going_on`: from a checkpoint, whose reading main memory must hold."""
    resuming = [phase.high_bytes for phase in plan.stages.phases if phase.name == "resume" and going_on]
    return max([plan.peak_bytes, *(resuming if plan.training.device != "cuda" else [])])


def above(plan: Plan, measured: dict[str, int], *, going_on: bool = False) -> list[Deviation]:
    """A deviation where more memory was taken than the plan promised."""
    phase, peak = max(measured.items(), key=lambda entry: entry[1])
    most = promise(plan, going_on=going_on)
    if peak <= most:
        return []
    planned, done = f"at most {show_bytes(most)}", f"{show_bytes(peak)} in phase {phase}"
    return [Deviation(what=MORE_MEMORY, planned=planned, done=done)]


def check_budget(plan: Plan, device: torch.device, *, going_on: bool = False, neighbours: int = 1) -> None:
    """Raise DoesNotFit when this process can really have less than the plan's high estimate.

    `going_on`: from a checkpoint, whose reading on a CPU is held to the same limit. `neighbours`: processes of this
    machine that start now, and share its memory.
    """
    on_gpu = device.type == "cuda"  # of a MIG slice, mem_get_info gives the slice's
    have = limits.Limit(torch.cuda.mem_get_info(device)[0], "free on the GPU") if on_gpu else limits.memory_limit()
    if neighbours > 1 and not on_gpu:
        have = limits.part_of(have, neighbours)
    need = promise(plan, going_on=going_on)
    if need > have.bytes:
        hint = f"plan for what is there: edgeft plan --max-memory {have.bytes // 2**20}MiB ..."
        problem = f"needs {show_bytes(need)}, this process can have {show_bytes(have.bytes)} ({have.reason})"
        raise DoesNotFit("plan", problem, hint)
