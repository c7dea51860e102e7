"""What is wrong with a folder that is to be a base, from Python, and how is it put right?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.api import current
from edgeft.errors import BadInput
from edgeft.models.config_file import config_path
from edgeft.models.headers import local_folder
from edgeft.progress import Progress, silent

if TYPE_CHECKING:
    from edgeft.models.doctor.exam import Base
    from edgeft.models.doctor.findings import Diagnosis, Repaired


def doctor(
    folder: str | Path, *, base: str | None = None, values: bool = False, progress: Progress = silent
) -> Diagnosis:
    """What a folder (or a GGUF file) is, what is wrong with it, and what would put it right; headers alone are read.

    `base` is the model it was made from, for what it lacks; `values` reads every number and names what is not finite.
    Raises BadInput for what cannot be opened.
    """
    from edgeft.models.doctor.diagnose import Patient

    patient = Patient(Path(folder), _base(base))
    if values and patient.exam is not None:
        from edgeft.models.doctor.values import look_at_values

        patient.findings += look_at_values(patient.exam, progress)
    return patient.diagnosis()


def repair(folder: str | Path, out: str | Path, *, base: str | None = None, progress: Progress = silent) -> Repaired:
    """The folder as one that trains, in `out`: whole or not at all. Raises as `models.doctor.repair.repair`."""
    from edgeft.models.doctor.repair import RECORD
    from edgeft.models.doctor.repair import repair as run

    current.replaceable(Path(out), RECORD)
    return run(Path(folder), Path(out), _base(base), progress)


def _base(named: str | None) -> Base | None:
    """Raises BadInput for a base that is no model of its own."""
    if named is None:
        return None
    from edgeft.models.doctor.exam import Base

    config_path(named)
    place = local_folder(named)
    if not (place / "tokenizer.json").is_file():
        raise BadInput(place, "is named as the base and has no tokenizer.json", "name a whole checkpoint")
    return Base(named, place)
