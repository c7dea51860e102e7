"""How often is a run validated, which ways of training can keep their best step, and what is said of it?"""

from __future__ import annotations

from collections.abc import Sequence

from edgeft.data.samples import validation_rows
from edgeft.data.scoring_groups import Scoring, Size, scoring
from edgeft.errors import BadInput
from edgeft.machines.profile import Profile
from edgeft.memory.disk import turns_in_files
from edgeft.memory.timing import scoring_seconds
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import Job, Training

VALIDATIONS = 20  # in a whole run, where nothing says how often


def check_patience(job: Job) -> None:
    """Raise BadInput where steps between validations are given, and nothing is validated."""
    if job.valid_steps and not job.patience:
        raise BadInput(
            "valid_steps",
            "says how often a run is validated, but none is",
            "add --set patience=3 (1000: it never stops)",
        )


def steps_between(job: Job, steps: int) -> int:
    """Optimizer steps between two validations; 0 where none are asked for."""
    return (job.valid_steps or max(1, steps // VALIDATIONS)) if job.patience else 0


def cannot_keep(training: Training) -> BadInput | None:
    """Why the best step of a way of training cannot be kept; None where it can."""
    if not training.patience or not turns_in_files(training):
        return None
    problem = "layers that train in turn at full rank lie in files, and no step of them but the last is kept"
    return BadInput("patience", problem, "use tuner=lora, or leave patience out")


def rows_scored(job: Job, valid: Sequence[Size], test: Sequence[Size] | None) -> tuple[tuple[Size, ...], ...]:
    """The rows that a run scores before training and after it, and last those that say when it stops."""
    scored, stopping = validation_rows(valid, job.patience, job.eval_rows)
    found = (tuple(scored[: job.eval_rows]), *([tuple(test)] if test is not None else []))
    return (*found, tuple(stopping)) if stopping else found


def validating_seconds(
    profile: Profile, spec: ModelSpec, training: Training, scored: Sequence[Sequence[Size]]
) -> float:  # fmt: skip
    """Seconds of all validations of a run that does not stop early; 0 without data or patience."""
    if not training.patience or not scored:
        return 0.0
    each: Scoring = scoring([[size.cut(training.max_length) for size in scored[-1]]], training.group_tokens)
    count = -(-training.steps // training.valid_steps)
    return count * scoring_seconds(profile, spec, training, each) / 2  # which is before and after training


def patience_notes(training: Training) -> list[str]:
    """A line on what a plan's steps and seconds are then."""
    if not training.patience:
        return []
    every = f"every {training.valid_steps} steps" if training.valid_steps > 1 else "every step"
    return [f"patience: validated {every} on every second validation row, the others score; the run ends after "
            f"{training.patience} in a row without a lower loss, the best step is kept; time is the most"]  # fmt: skip
