"""What can several processes not do, how much memory has each, and what do they bring?"""

from __future__ import annotations

from pathlib import Path

from edgeft.errors import BadInput
from edgeft.machines.launcher import torchrun
from edgeft.machines.profile import Profile
from edgeft.memory.several import NCCL_BYTES, added_up, adding_seconds, threads
from edgeft.memory.sharded import uncut
from edgeft.planning.costs import Question
from edgeft.settings.job import Job, Training
from edgeft.units import show_bytes, show_seconds


def check_processes(job: Job, profile: Profile) -> None:
    """Raise BadInput for a number of processes that cannot share a job's steps."""
    if job.processes % job.machines:
        problem = f"{job.processes} cannot be divided among {job.machines} machines"
        raise BadInput("processes", problem, "each machine starts as many as the others")
    if job.processes > job.batch_size:
        problem = f"{job.processes} share each step's {job.batch_size} samples: some would have none"
        raise BadInput("processes", problem, "raise --set batch_size, or plan for fewer")
    if job.processes > 1 and profile.device == "mps":
        raise BadInput("processes", "PyTorch connects no Apple GPUs with one another", "plan with --processes 1")


def budget_of_one(job: Job, profile: Profile) -> int:
    """Bytes that one process may hold: a GPU's own less what NCCL takes, or its part of a CPU's memory.

    What the user set is for one process.
    """
    budget = profile.budget_bytes
    if job.processes > 1:
        neighbours = job.processes // job.machines
        budget = budget - NCCL_BYTES if profile.device == "cuda" else budget // neighbours
    return min(max(0, budget), job.max_memory_bytes or budget)


def process_notes(question: Question, training: Training) -> list[str]:
    """What several processes share, take together, bring by the estimate, and how they are started."""
    count, machines = training.processes, training.machines
    if count == 1:
        return []
    one = uncut(training).model_copy(update={"processes": 1, "machines": 1})
    each, before = question.seconds(training), question.seconds(one)
    adding = adding_seconds(training, added_up(question.spec, training))
    where = f" on {machines} machines" if machines > 1 else ""
    lines = [
        f"{count} processes{where} share each step's {training.batch_size} samples, {training.share} at most each: "
        f"about {show_seconds(each)} a step instead of {show_seconds(before)} in one, {show_seconds(adding)} of it to "
        "add gradients up (a guess on the safe side)"
    ]
    if question.profile.device == "cpu":
        together = show_bytes(training.neighbours * question.high_bytes(training))
        lines.append(f"{training.neighbours} processes of a machine share its cores, and hold {together} together")
    lines.append(f"start it with {start(training, Path('PLAN'), question.profile.cores)}")
    return lines


def start(training: Training, plan: Path, cores: int) -> str:
    """The command that carries a plan of several processes out; `cores` of a machine are shared by its processes."""
    mine = threads(training, cores) if training.device == "cpu" else 0
    return torchrun(training.processes, training.machines, plan, mine)
