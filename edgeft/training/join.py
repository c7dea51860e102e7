"""Were the processes of a run started as its plan counts on, and do all of them see the same?"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from edgeft.documents import versions
from edgeft.engine.lisa import Named
from edgeft.engine.ranks import ALONE, Ranks, joined
from edgeft.errors import BadInput, WrongStart
from edgeft.machines.launcher import SIZE, launched
from edgeft.models.identity import Inputs
from edgeft.planning.plan import Plan
from edgeft.planning.processes import start

TOKEN = "run"  # a file of the work folder, by which the processes know that all see the same one


def check_start(plan: Plan, plan_file: Path) -> None:
    """Raise WrongStart where the number of processes that were started is not the plan's."""
    here, training = launched(), plan.training
    if here.size == training.processes and here.local_size in (training.neighbours, here.size):
        return
    if here.size == 1:
        problem = f"the plan is for {training.processes} processes, one was started"
    elif here.size == training.processes:
        problem = (
            f"{here.local_size} processes were started on this machine, the plan has {training.neighbours} on each"
        )
    else:
        problem = f"{here.size} processes were started ({SIZE}), the plan is for {training.processes}"
    hint = "start it without torchrun, accelerate launch or mpirun; or plan for them: edgeft plan --processes"
    if training.processes > 1:
        hint = start(training, plan_file, plan.profile.cores)
    wrong = WrongStart("train", problem, hint)
    wrong.told = not here.first
    raise wrong


@contextlib.contextmanager
def together(plan: Plan, device: torch.device, plan_file: Path) -> Iterator[Ranks]:
    """This process among those that carry a plan out; alone where the plan is for one.

    Each takes the GPU of its number on its machine. Raises WrongStart, BadInput where there is none.
    """
    check_start(plan, plan_file)
    here = launched()
    if here.size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if here.local_rank >= count:
            problem = f"process {here.local_rank} of this machine has no GPU of its own, {count} are here"
            raise BadInput("train", problem, f"plan with --processes {max(1, count)}")
        torch.cuda.set_device(here.local_rank)
    with joined(here.rank, here.size, here.local_rank, here.local_size, device.type == "cuda") as ranks:
        yield ranks


def check_same(ranks: Ranks, plan_sha256: str, inputs: Inputs, device: torch.device) -> None:
    """Raise BadInput naming what one process reads or computes in another way than the first one does.

    Each takes every step by itself: on another kind of processor, or by another PyTorch, weights would part.
    """
    facts = {"plan": plan_sha256, **inputs, "device": device.type, "torch": versions()["torch"],
             "edgeft": versions()["edgeft"], "threads": str(torch.get_num_threads())}  # fmt: skip
    facts |= {"vector instructions": torch.backends.cpu.get_cpu_capability()} if device.type == "cpu" else {}
    every = ranks.gathered(facts)
    nodes = ranks.gathered(platform.node())
    lines = [f"process {rank} on {nodes[rank]}: {line}" for rank, other in enumerate(every)
             for line in differing(every[0], other)]  # fmt: skip
    if lines:
        hint = "give all the same files, versions, OMP_NUM_THREADS; on unlike processors set ATEN_CPU_CAPABILITY alike"
        raise BadInput("train", "processes have other things than process 0\n" + "\n".join(lines), hint)


def differing(first: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """A line for each fact that another process has otherwise than the first."""
    return [f"{name} {other.get(name, 'is not there')}, process 0 has {first.get(name, 'none')}"
            for name in sorted({*first, *other}) if first.get(name) != other.get(name)]  # fmt: skip


def check_folder(ranks: Ranks, work: Path) -> None:
    """Raise BadInput where a process does not see the folder that the first one writes its checkpoints to."""

    def leave() -> str:
        token = secrets.token_hex(8)
        (work / TOKEN).write_text(token)
        return token

    if ranks.alone:
        return
    token, kept = ranks.told(leave), work / TOKEN
    seen = ranks.gathered(kept.is_file() and kept.read_text() == token)
    if not all(seen):
        problem = f"process {seen.index(False)} does not see the folder that process 0 writes to"
        raise BadInput(work, problem, "put --out on a disk that all machines share")


def digest(chosen: Named) -> str:
    """The hash of what trains, bit for bit."""
    found = hashlib.sha256()
    for name, parameter in chosen:
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()[:16]


def check_agree(ranks: Ranks, what: str, value: str) -> None:
    """Raise BadInput where processes that must hold the same do not."""
    every = ranks.gathered(value)
    for rank, other in enumerate(every):
        if other != every[0]:
            problem = f"process {rank} has other {what} than process 0: {other}, not {every[0]}"
            raise BadInput("train", problem, "start again; if it stays so, report this plan.json")
