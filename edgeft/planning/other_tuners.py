"""What would another tuner take in place of the planned one, and what was measured of it?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field

from edgeft.documents import Strict
from edgeft.errors import BadInput
from edgeft.models.metrics import Difference
from edgeft.planning.candidates import candidates
from edgeft.planning.costs import Question
from edgeft.planning.evidence import REFERENCE, Measured, method_of, nearest
from edgeft.planning.job_checks import check_job
from edgeft.settings.job import ENDS, Training, Tuner
from edgeft.settings.tuners import TUNERS, WEIGHTS, adapts


class Points(Strict):
    """What was measured of a tuner beside LoRA in all layers, and on what."""

    score: float | None = Field(description="exact match of 100")
    points: Difference | None = Field(description="exact match less that of LoRA in all layers; None: it is that")
    shown: bool = Field(description="whether exact match or loss shows a difference")
    rows: int = Field(description="that were trained on")
    measured_on: str


class OtherTuner(Strict):
    """A tuner in the planned layers, executed as planned; the planned one is the first."""

    tuner: Tuner
    refused: str = Field(default="", description="why this job cannot have it; then it has no sizes")
    high_bytes: int = 0
    more_bytes: int = 0
    more_seconds_per_step: float = 0.0
    fits: bool = False
    folds: bool = Field(description="whether the model's weights can hold it; else it ships beside them")
    measured: Points | None = Field(default=None, description="in the same kind of layers; None: never")


def other_tuners(question: Question, chosen: Training, scores: Sequence[float] | None) -> tuple[OtherTuner, ...]:
    """The chosen tuner and every other one; `scores`: one per layer, where the job's choice of layers reads data."""
    return tuple(_others(question, chosen, scores))


def _others(question: Question, chosen: Training, scores: Sequence[float] | None) -> Iterator[OtherTuner]:
    here, seconds = question.high_bytes(chosen), question.seconds(chosen)
    for name in sorted(TUNERS, key=lambda name: name != chosen.tuner):
        way = chosen if name == chosen.tuner else _with(question, chosen, name, scores)  # type: ignore[arg-type]
        row: dict[str, Any] = {"tuner": name, "folds": TUNERS[name].folds}
        if isinstance(way, BadInput):
            yield OtherTuner(**row, refused=f"{way.where}: {way.problem}")
            continue
        high = question.high_bytes(way)
        yield OtherTuner(
            **row, high_bytes=high, more_bytes=high - here,
            more_seconds_per_step=round(question.seconds(way) - seconds, 4),
            fits=high <= question.budget_bytes and not question.too_slow(way), measured=points_of(question, way),
        )  # fmt: skip


def _with(question: Question, chosen: Training, name: Tuner, scores: Sequence[float] | None) -> Training | BadInput:
    """The chosen way by another tuner, all else as far as it can be the same; or why there is none."""
    row, some = TUNERS[name], chosen.layers != "all"
    changes: dict[str, Any] = {
        "tuner": name, "rank": (chosen.rank or question.job.rank or None) if row.ranked else None, "target_rank": None,
        "target_modules": question.job.target_modules if row.placed else None,
        "lora_alpha": None, "lora_plus": 1.0, "init": "random", "adapter_at": "both", "prefix_tokens": None,
        "learning_rate": None, "layers": chosen.layers, "trained_layers": chosen.trained_layers if some else None,
        "active_layers": (chosen.active_layers or None) if some else None,
        "base_precision": chosen.base_precision if row.adapters and adapts(chosen.tuner) else None,
        "micro_batch_size": chosen.micro_batch_size, "checkpointing": chosen.checkpointing,
        "kept_layers": chosen.kept_layers if chosen.checkpointing else None, "malloc": chosen.malloc,
        "loss_chunk_tokens": chosen.loss_chunk_tokens, "optimizer": chosen.optimizer,
        "stream_layers": chosen.stream_layers, "shard_base": chosen.shard_base,
        **(dict.fromkeys(ENDS) if row.adapters else {}),
    }  # fmt: skip
    job = question.job.model_copy(update=changes)
    try:
        check_job(job, question.spec)
        found = candidates(job, question.profile, question.spec, question.work, chosen.steps, scores)
        return next(found)
    except BadInput as problem:
        return problem
    except StopIteration:
        return BadInput(name, "no way of training is left by what was set")


def points_of(question: Question, training: Training) -> Points | None:
    """What was measured of a way's tuner in its kind of layers, nearest to the job."""
    size, method = question.spec.total_parameters, method_of(training)
    way = f"{method}, {training.layers}"
    if way == REFERENCE:
        return _reference(question)
    measured = nearest(way, REFERENCE, question.rows, size)
    if measured is None:
        return None
    comparison, study = measured
    return Points(
        score=_score(measured, way), points=comparison.points, shown=comparison.shown, rows=comparison.rows,
        measured_on=study.line(comparison.rows),
    )  # fmt: skip


def _reference(question: Question) -> Points | None:
    """What LoRA in all layers reached where full fine-tuning, which every study has, was compared with it."""
    measured = nearest(f"{WEIGHTS}, all", REFERENCE, question.rows, question.spec.total_parameters)
    if measured is None:
        return None
    rows = measured.comparison.rows
    score = _score(measured, REFERENCE)
    return Points(score=score, points=None, shown=False, rows=rows, measured_on=measured.study.line(rows))


def _score(measured: Measured, way: str) -> float | None:
    rows = measured.comparison.rows
    return next((each.points for each in measured.study.scores if (each.way, each.rows) == (way, rows)), None)


def tuner_notes(question: Question, looked_at: Sequence[Training]) -> list[str]:
    """Why the tuner, where the planner chose between two."""
    measured = nearest(f"{WEIGHTS}, all", REFERENCE, question.rows, question.spec.total_parameters)
    if measured is None or len({training.tuner for training in looked_at}) < 2:
        return []
    taken = "the better" if measured.comparison.shown else "the faster"
    return [f"full fine-tuning against LoRA, both in all layers: {measured.line}: {taken} of those that fit is planned"]
