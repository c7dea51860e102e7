"""Several processes of one run, started as torchrun starts them, with faults that are planted in some."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import warm
from safetensors.torch import load_file
from tiny import write_plan

from edgeft.machines import processes
from edgeft.models.metrics import Importance
from edgeft.planning.plan import Plan, make_plan
from edgeft.settings.job import make_job
from edgeft.training.result import TrainResult

# What a process runs: its fault is planted first, if it has one
CHILD = """if True:
    import sys
    from pathlib import Path
    from edgeft.documents import sha256_file
    from edgeft.engine import loop, ranks
    from edgeft.errors import EdgeftError
    from edgeft.planning.plan import Plan
    from edgeft.progress import silent
    from edgeft.training.train import train
    path, out = map(Path, sys.argv[1:3])
    exec(sys.argv[3])
    try:
        train(Plan.read(path), out, plan_sha256=sha256_file(path), progress=silent)
    except EdgeftError as problem:
        if not problem.told:
            print(problem, file=sys.stderr)
        sys.exit(problem.exit_code)
"""

# Faults, each a few lines that a process runs before it trains
EMULATED = "inner = train\ntrain = lambda *a, **k: inner(*a, emulate=True, **k)\n"  # a GPU's plan on this CPU
UNAWARE = """
from edgeft.training import train as stage
stage.check_agree = lambda *a: None
"""
KILLED = """
import os, signal
step = loop.Run.train_step
def killed(self, samples):
    if self.step == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, samples)
loop.Run.train_step = killed
"""


def plan_for(folder: Path, model: Path, count: int, **settings: Any) -> Path:
    """The plan of 20 steps in so many processes."""
    values = {"max_steps": 20, "epochs": 3.0, "learning_rate": 5e-5, "checkpoint_steps": 7, "batch_size": 5} | settings
    folder.mkdir(parents=True, exist_ok=True)
    if values.get("layer_score") != "gradient":
        return write_plan(folder, model, processes=count, **values)
    path = write_plan(folder, model, processes=count, **{**values, "layer_score": "top", "lisa_schedule": "cycle"})
    job = make_job(**Plan.read(path).job.model_dump() | settings)
    scores = (4.0, 1.0, 2.0, 3.0)
    found = Importance(method="gradient", scores=scores, rows=1, tokens=1, device="cpu", seconds=0.0, peak_bytes=1)
    make_plan(job, found).write(path)
    return path


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def start(count: int, path: Path, out: Path, faults: dict[int, str] | None = None) -> list[Any]:
    """What so many processes said and how they ended, told by variables who they are, as torchrun tells them."""
    port = free_port()

    def one(rank: int) -> Any:
        variables = {
            "RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        command = processes.command(CHILD, path, out, (faults or {}).get(rank, ""))
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        return warm.run(command, env=environment, capture_output=True, text=True)

    warm.run(processes.command("pass"))  # the server that forks them is one
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def together(count: int, path: Path, out: Path, faults: dict[int, str] | None = None) -> TrainResult:
    """What a run of so many processes leaves."""
    for done in start(count, path, out, faults):
        assert done.returncode == 0, done.stderr
    return TrainResult.read(out / "train.json")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
