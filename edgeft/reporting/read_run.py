"""What did a run leave behind, as far as a report shows it? Reads the stages' JSON without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from edgeft.documents import Artifact, sha256_file
from edgeft.exporting.bundle import MANIFEST, Bundle, Measurement, measurement_path
from edgeft.merging.result import MergedCheckpoint
from edgeft.planning.plan import Plan
from edgeft.training.result import TrainResult


class Run(NamedTuple):
    """A plan and what the stages after it wrote, as far as they ran; `notes` say what of it was left out."""

    plan: Plan
    train: TrainResult | None = None
    merged: MergedCheckpoint | None = None
    bundle: Bundle | None = None
    here: Measurement | None = None
    notes: tuple[str, ...] = ()
    plan_sha256: str = ""


def read_run(plan_file: Path) -> Run:
    """The run beside a plan.json: what the folder holds of later stages, as far as each was made from the last."""
    folder = plan_file.parent
    run = Run(Plan.read(plan_file), plan_sha256=sha256_file(plan_file))
    stages: tuple[tuple[str, Path, type[Artifact]], ...] = (
        ("train", folder / "train" / "train.json", TrainResult),
        ("merged", folder / "merged" / "merged.json", MergedCheckpoint),
        ("bundle", folder / "bundle" / MANIFEST, Bundle),
        ("here", measurement_path(folder / "bundle"), Measurement),
    )
    made_from = plan_file
    for name, path, model in stages:
        if not path.is_file():
            break
        record: Any = model.read(path)
        if record.input_sha256 != sha256_file(made_from):
            note = f"{path.relative_to(folder)} was not made from this {made_from.name}: left out"
            return run._replace(notes=(note,))
        run = run._replace(**{name: record})
        made_from = path
    return run
