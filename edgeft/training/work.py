"""What is in the folder where a run that has not ended keeps its checkpoints, and may this run go on from them?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from edgeft.documents import saving
from edgeft.models.identity import WEIGHTS, Inputs, changed, differences, weights_sha256
from edgeft.planning.plan import Plan


def work_folder(out: Path) -> Path:
    """Where a run that has not ended keeps its checkpoints."""
    return out.with_name(f".{out.name}.work")


def open_work(work: Path, plan: Plan, plan_sha256: str, base: Path) -> Inputs:
    """The hashes of what a run reads, kept in its work folder, whose checkpoints are this plan's or gone.

    Raises BadInput when they were made from other files.
    """
    with saving(work):
        work.mkdir(parents=True, exist_ok=True)
        if (work / "plan.sha256").exists() and (work / "plan.sha256").read_text() != plan_sha256:
            for old in work.glob("step-*"):  # checkpoints of another plan
                shutil.rmtree(old)
        (work / "plan.sha256").write_text(plan_sha256)
        return settle_inputs(work, plan.inputs | {WEIGHTS: weights_sha256(base)}, base)


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
