"""As which of how many processes was this one started by torchrun, accelerate launch or their like? (no torch)"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# What such launchers tell each process; without them a process is alone.
RANK, SIZE, LOCAL_RANK, LOCAL_SIZE = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
PORT = 29400  # of the first machine, where the others find it


class Launched(NamedTuple):
    """One process of several: its number among all, and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0


def launched(environment: Mapping[str, str] = os.environ) -> Launched:
    """How this process was started, by the variables that launchers set; alone where nothing says otherwise."""

    def number(name: str, default: int) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdigit() else default

    size = number(SIZE, 1)
    if size < 2:
        return Launched()
    rank = number(RANK, 0)
    local_size = number(LOCAL_SIZE, size)
    return Launched(rank, size, number(LOCAL_RANK, rank % local_size), local_size)


def alone(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of a process that is started by one of several, and is none of them itself."""
    return {name: value for name, value in environment.items() if name not in (RANK, SIZE, LOCAL_RANK, LOCAL_SIZE)}


def torchrun(processes: int, machines: int, plan: Path, threads: int = 0) -> str:
    """The command that carries out a plan in so many processes, the same on each of several machines.

    `threads` is what each process of a CPU may use: torchrun gives it one where nothing is said.
    """
    words = ["torchrun", "--nproc-per-node", str(processes // machines)]
    if machines > 1:
        words[1:1] = ["--nnodes", str(machines)]
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"FIRST_MACHINE:{PORT}"]
    words += ["-m", "edgeft", "train", str(plan)]
    return (f"OMP_NUM_THREADS={threads} " if threads > 1 else "") + shlex.join(words)
