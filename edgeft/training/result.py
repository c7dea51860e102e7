"""What does a training run leave on record: train.json, with its rehearsal? (data only, no torch)"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from edgeft.documents import Artifact, Strict
from edgeft.models.identity import WEIGHTS, Inputs
from edgeft.models.metrics import Metrics, Rung, UnitRecord
from edgeft.planning.plan import Plan
from edgeft.settings.job import Training


class Failure(Strict):
    """Where a rehearsal ended, and why."""

    where: str
    problem: str
    hint: str
    exit_code: int


class Rehearsal(Artifact):
    """What came of it; kept in train.json. `skipped` is the reason where there was none."""

    target: str = ""
    skipped: str = ""
    layers: int = Field(default=0, description="of the model that went through")
    rungs: tuple[Rung, ...] = ()
    generated_tokens: int = Field(default=0, description="by the bundle, from the first rows' prompts")
    predicted_peak_bytes: int = Field(default=0, description="at most, of the process and the builder's")
    measured_peak_bytes: int = Field(default=0, description="of the process alone")
    seconds: float = 0.0
    earlier: str = Field(default="", description="the file of an earlier run whose rehearsal this is")
    kept: bool = Field(default=False, description="from before the run was stopped: it goes on")
    failure: Failure | None = Field(default=None, description="only on the way from process to process")


NOT_REHEARSED = Rehearsal(skipped="not asked for")


class Deviation(Strict):
    """Something that could not be done as planned, and what was done instead."""

    what: str
    planned: str
    done: str


class SampleAnswer(Strict):
    """A validation row, and what base and fine-tuned model answer."""

    prompt: str
    expected: str
    base: str
    tuned: str


class TrainResult(Artifact):
    """train.json: what was trained, on what, how well, and how much memory it took."""

    plan: Plan
    inputs: Inputs
    files: Inputs
    deviations: tuple[Deviation, ...]
    steps: int
    trained_parameters: int
    trained_tokens: int
    micro_batches: int
    padding: float  # share of the computed tokens that is padding
    seconds: float
    tokens_per_second: float
    predicted_peak_bytes: int  # at most, of what was carried out: not the plan's where a GPU's ran on the CPU
    predicted_expected_bytes: int = 0  # the highest phase's expected bytes
    measured_peak_bytes: int
    phase_peak_bytes: dict[str, int]
    loss_curve: tuple[tuple[int, float], ...]
    validations: tuple[tuple[int, float], ...] = ()  # (step, mean loss) of the rows that say when a run stops
    best_step: int = 0  # whose parameters are the result, where steps were validated; 0: the last one's
    cut_rows: int
    base_valid: Metrics
    valid: Metrics
    base_test: Metrics | None
    base_kept: str = ""  # the file of an earlier run that the base's scores are from; none: they were found in this one
    test: Metrics | None
    samples: tuple[SampleAnswer, ...] = Field(default=(), description="answers to some of the scored validation rows")
    scored_as: str = Field(default="", description="the target whose rounding `valid` and `test` saw; none: unrounded")
    units: tuple[UnitRecord, ...]
    process_peak_bytes: tuple[int, ...] = ()  # of each of several processes, before scores
    interval_peak_bytes: tuple[int, ...] = ()  # lisa: the highest bytes of each interval
    interval_optimizer_bytes: tuple[int, ...] = ()  # lisa: optimizer state at the end of each interval
    prefix_cache: str = ""  # folder with the outputs of layers that did not train; none: every step computed them
    prefix_seconds: float = 0.0  # of making them in this run; 0 where they were there
    skipped_steps: int = 0  # fp16: updates that overflowed and were made again at a smaller scale
    resumed_at: tuple[int, ...] = ()
    rehearsal: Rehearsal = NOT_REHEARSED

    @property
    def training(self) -> Training:
        """How it was really trained: the plan's choices, but for the deviations."""
        return deviating(self.plan.training, self.deviations)

    @property
    def base_sha256(self) -> str:
        """Of the base's weights."""
        return self.inputs[WEIGHTS]


def deviating(training: Training, deviations: Sequence[Deviation]) -> Training:
    """A plan's choices with what was done instead of some."""
    done = {d.what: d.done for d in deviations if d.what in Training.model_fields}
    return Training.model_validate(training.model_dump() | done) if done else training


class Trial(Artifact):
    """What the steps of a plan took here; `error` is predicted / measured - 1, None where the device is not planned."""

    device: str
    predicted_bytes: int
    high_bytes: int
    measured_bytes: int
    error: float
    estimated_seconds_per_step: float
    measured_seconds_per_step: float
