"""What is in the folder where a run that has not ended keeps its checkpoints, and may this run go on from them?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from edgeft.documents import saving
from edgeft.errors import BadInput
from edgeft.models.identity import WEIGHTS, Inputs, changed, differences, weights_sha256
from edgeft.planning.plan import Plan


def work_folder(out: Path) -> Path:
    """Where a run that has not ended keeps its checkpoints."""
    return out.with_name(f".{out.name}.work")


PROCESSES = "processes"  # a file: how many made the checkpoints


def open_work(work: Path, plan: Plan, plan_sha256: str, base: Path, *, writes: bool = True) -> Inputs:
    """The hashes of what a run reads, kept in its work folder, whose checkpoints are this plan's or gone.

    Of several processes one `writes`. Raises BadInput when checkpoints were made from other files, or by another
    number of processes.
    """
    inputs = plan.inputs | {WEIGHTS: weights_sha256(base)}
    if not writes:
        return inputs
    with saving(work):
        work.mkdir(parents=True, exist_ok=True)
        check_processes(work, plan.training.processes)
        if (work / "plan.sha256").exists() and (work / "plan.sha256").read_text() != plan_sha256:
            for old in work.glob("step-*"):  # checkpoints of another plan
                shutil.rmtree(old)
        (work / "plan.sha256").write_text(plan_sha256)
        (work / PROCESSES).write_text(str(plan.training.processes))
        return settle_inputs(work, inputs, base)


def check_processes(work: Path, processes: int) -> None:
    """Raise BadInput where another number of processes made the checkpoints: sums would be taken in another order."""
    kept = work / PROCESSES
    before = int(kept.read_text()) if kept.is_file() else 1
    if before != processes and any(work.glob("step-*")):
        hint = f"plan with --processes {before} to go on, or remove {work} to start over"
        raise BadInput(work, f"{before} processes made the checkpoint there, this plan is for {processes}", hint)


def settle_inputs(work: Path, inputs: Inputs, base: Path) -> Inputs:
    """`inputs`, kept in a run's work folder. Raises BadInput when the checkpoints there were made from others."""
    kept = work / "inputs.json"
    if any(work.glob("step-*")):
        held = json.loads(kept.read_text()) if kept.is_file() else {}
        if lines := differences(held, inputs, {WEIGHTS: base}):
            hint = f"put the files back to go on, or start over: remove {work} and run the same command again"
            raise changed(f"the checkpoint in {work}", lines, hint)
    kept.write_text(json.dumps(inputs))
    return inputs
