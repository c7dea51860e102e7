"""What did a run leave behind, as far as a report shows it? Reads the stages' JSON without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from edgeft.documents import invalid, sha256_file
from edgeft.errors import BadInput
from edgeft.exporting.bundle import MANIFEST, Bundle, Measurement, measurement_path
from edgeft.models.metrics import Metrics
from edgeft.planning.plan import Plan


class Deviation(pydantic.BaseModel):
    """What was not done as planned, of train.json."""

    what: str
    planned: Any
    done: Any


class TrainRecord(pydantic.BaseModel):
    """What a report shows of train.json. Its whole type lives beside torch, which a report does without."""

    input_sha256: str
    plan: Plan
    deviations: tuple[Deviation, ...]
    steps: int
    trained_parameters: int
    seconds: float
    tokens_per_second: float
    measured_peak_bytes: int
    phase_peak_bytes: dict[str, int]
    loss_curve: tuple[tuple[int, float], ...]
    cut_rows: int
    base_valid: Metrics
    valid: Metrics
    base_test: Metrics | None
    test: Metrics | None


class MergeRecord(pydantic.BaseModel):
    """What a report shows of merged.json."""

    input_sha256: str
    wise_alpha: float
    predicted_peak_bytes: int
    measured_peak_bytes: int
    relative_change: float
    seconds: float


class Run(NamedTuple):
    """A plan and what the stages after it wrote, as far as they ran; `notes` say what of it was left out."""

    plan: Plan
    train: TrainRecord | None = None
    merged: MergeRecord | None = None
    bundle: Bundle | None = None
    here: Measurement | None = None
    notes: tuple[str, ...] = ()
    plan_sha256: str = ""


def read_run(plan_file: Path) -> Run:
    """The run beside a plan.json: what the folder holds of later stages, as far as each was made from the last."""
    folder = plan_file.parent
    run = Run(Plan.read(plan_file), plan_sha256=sha256_file(plan_file))
    stages: tuple[tuple[str, Path, type[pydantic.BaseModel]], ...] = (
        ("train", folder / "train" / "train.json", TrainRecord),
        ("merged", folder / "merged" / "merged.json", MergeRecord),
        ("bundle", folder / "bundle" / MANIFEST, Bundle),
        ("here", measurement_path(folder / "bundle"), Measurement),
    )
    made_from = plan_file
    for name, path, model in stages:
        record: Any = _read(path, model)
        if record is None:
            break
        if record.input_sha256 != sha256_file(made_from):
            note = f"{path.relative_to(folder)} was not made from this {made_from.name}: left out"
            return run._replace(notes=(note,))
        run = run._replace(**{name: record})
        made_from = path
    return run


def _read(path: Path, model: type[pydantic.BaseModel]) -> pydantic.BaseModel | None:
    """One stage's document, or None where there is none. Raises BadInput for one that does not fit."""
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise BadInput(path, f"cannot be read: {problem.strerror}") from None
    except pydantic.ValidationError as problem:
        raise invalid(path, problem, model) from None
