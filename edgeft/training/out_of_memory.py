"""What holds a run to its budget, and what is said when memory ran out or more was taken than planned?"""

from __future__ import annotations

import contextlib
import shlex
import traceback
from collections.abc import Iterator

import torch

from edgeft.errors import DoesNotFit, EdgeftError
from edgeft.machines import meter
from edgeft.planning.plan import Plan, make_plan, smaller_plan
from edgeft.settings.job import Job
from edgeft.training.step_down import less
from edgeft.units import MIB, show_bytes

# What PyTorch and bitsandbytes say when the system, or CUDA outside PyTorch's allocator, gives nothing more.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "cudaErrorMemoryAllocation")


@contextlib.contextmanager
def capped(budget_bytes: int, device: torch.device) -> Iterator[None]:
    """Let PyTorch's allocator give out no more than the budget of a CUDA device; elsewhere nothing is capped."""
    if device.type != "cuda":
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index  # "cuda" alone is refused
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an error says that memory ran out, whoever raised it."""
    if isinstance(problem, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(problem, RuntimeError) and any(words in str(problem) for words in NO_MEMORY)


@contextlib.contextmanager
def explained(plan: Plan, device: torch.device, phase: list[str]) -> Iterator[None]:
    """Turn an out-of-memory error into DoesNotFit; the last entry of `phase` says what was running."""
    try:
        yield
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        held, others = meter.peak_bytes(device), beside(device)
        traceback.clear_frames(problem.__traceback__)  # the tensors of the run are in them
        raise ran_out(plan, phase[-1], held, others) from problem


def ran_out(plan: Plan, phase: str, held_bytes: int, others: str = "") -> DoesNotFit:
    """What to say when memory ran out: where, what was planned and measured, and the command of a smaller plan."""
    problem = (
        f"memory ran out in phase {phase}: {show_bytes(held_bytes)} measured at the highest, at most "
        f"{show_bytes(plan.peak_bytes)} planned, the budget is {show_bytes(plan.budget_bytes)}{others}"
    )
    return DoesNotFit("train", problem, smaller(plan))


def smaller(plan: Plan) -> str:
    """The hint that names the next smaller ways: of the same training from its last step on, and planned anew."""
    budget, ways = less(plan), list[str]()
    with contextlib.suppress(EdgeftError, MemoryError, RuntimeError, OSError):  # of what little is left
        peak = show_bytes(smaller_plan(plan, budget).peak_bytes)
        ways.append(f"the same command with --smaller goes on from the last step in at most {peak}")
    job = plan.job.model_copy(update={"max_memory_bytes": budget})
    try:
        found = make_plan(job, plan.importance, spec=plan.spec, profile=plan.profile)
        ways.append(f"the next smaller way needs {show_bytes(found.peak_bytes)}: {command(job)}")
    except EdgeftError as problem:
        why = f"no smaller way is known: {problem.problem}" + (f" ({problem.hint})" if problem.hint else "")
        ways += [] if ways else [why]
    except (MemoryError, RuntimeError, OSError):
        ways.append(f"plan again with less: {command(job)}")
    return "; or ".join(ways)


def command(job: Job) -> str:
    """The `edgeft plan` command of a job."""
    named = {"data": job.data, "valid": job.valid, "test": job.test, "on": job.profile, "for": job.device}
    words = ["edgeft", "plan", job.model]
    words += [word for name, value in named.items() if value for word in (f"--{name}", str(value))]
    if job.max_memory_bytes:
        words += ["--max-memory", f"{job.max_memory_bytes // MIB}MiB"]
    for name, value in job.model_dump(exclude_defaults=True).items():
        if name not in (*named, "model", "profile", "device", "max_memory_bytes"):
            shown = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
            words += ["--set", f"{name}={shown.lower() if isinstance(value, bool) else shown}"]
    return shlex.join(words)


def beside(device: torch.device) -> str:
    """What the card holds besides this process's tensors, in words; nothing elsewhere."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    others = max(0, total - free - torch.cuda.memory_reserved(device))
    return f"; of the card's {show_bytes(total)} other processes and CUDA itself hold {show_bytes(others)}"
