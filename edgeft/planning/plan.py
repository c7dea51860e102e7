"""How will a job run, what does that take, and what else was considered? No torch is imported here.

Candidates are compared by expected quality, then by time (`costs.py` has the evidence for the order), and the first one
inside the budget and the time limit is taken (`choice.py`).
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from edgeft.data.dataset import Lengths, Measured
from edgeft.data.grammar import Grammar, HeldTo, grammar_file
from edgeft.data.labels import Label
from edgeft.data.scoring_groups import Scoring
from edgeft.data.task_score import TaskScore, task_score
from edgeft.documents import Artifact, sha256_file, sha256_json, versions
from edgeft.errors import BadInput, DoesNotFit
from edgeft.machines.profile import Profile, detect, load_profile, profile_path
from edgeft.memory import train_step
from edgeft.memory.simulated import Simulation
from edgeft.models.headers import has_weights, refuse_beside
from edgeft.models.identity import Inputs, cached_folder, data_inputs, model_inputs
from edgeft.models.metrics import Importance
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.planning.alternatives import (
    Alternative,
    Saving,
    alternatives,
    does_not_fit,
    frontier,
    gave_up,
    length_hints,
    savings,
    smallest,
    unused_budget,
)  # fmt: skip
from edgeft.planning.answers import Held, read_held
from edgeft.planning.candidates import candidates
from edgeft.planning.choice import best_that_fits, choose, choose_of_all
from edgeft.planning.costs import Candidate, Question
from edgeft.planning.early_stopping import patience_notes
from edgeft.planning.job_checks import check_job, needs_importance, unused_notes
from edgeft.planning.layer_choice import random_layers, top_layers
from edgeft.planning.notes import machine_notes, training_notes
from edgeft.planning.other_tuners import OtherTuner, other_tuners, tuner_notes
from edgeft.planning.prefix_cache import prefix_notes, tokens_kept
from edgeft.planning.prefix_tuner import positions_left, tokens_of
from edgeft.planning.processes import budget_of_one, check_processes, process_notes
from edgeft.planning.quantize_aware import rounding_notes
from edgeft.planning.rows_read import DEFAULT_LENGTH, assumed_rows, read_data, read_lengths, steps_of
from edgeft.planning.sharding import sharding_notes
from edgeft.planning.stage_checks import Stages, plan_stages
from edgeft.planning.streaming import DEVICES, goes_on, streaming_notes
from edgeft.settings.job import Job, Training
from edgeft.settings.tuners import ADAPTERS, TUNERS, adapts
from edgeft.units import show_bytes

PINS = ("base_precision", "layers", "active_layers", "checkpointing", "kept_layers", "micro_batch_size", "rank",
        "loss_chunk_tokens", "optimizer", "malloc", "stream_layers", "shard_base", "prefix_cache")  # fmt: skip


class Plan(Artifact):
    """plan.json: how a job runs on a profile, what that takes, and what else was considered."""

    request_sha256: str
    job_file_sha256: str = Field(default="", description="of the job file (edgeft.toml) it was first made by, if any")
    inputs: Inputs
    job: Job
    profile: Profile
    spec: ModelSpec
    lengths: Lengths | None
    labels: tuple[Label, ...] = Field(default=(), description="what answers are held to; none: to a grammar, or free")
    grammar: Grammar | None = None
    training: Training
    budget_bytes: int
    peak_bytes: int = Field(description="high estimate of the chosen way, which is the fastest of its quality")
    need_bytes: int = Field(description="high estimate of the way that takes least memory at this quality or better")
    need_seconds_per_step: float = Field(description="a step of that way")
    phases: tuple[train_step.Phase, ...]
    stages: Stages
    seconds_per_step: float
    launches: int = Field(default=0, description="of a GPU's kernels in a step, where the host's launching decides")
    seconds: float
    prefix_seconds: float = Field(default=0.0, description="of `seconds`: making the outputs of layers that are kept")
    scoring: Scoring
    scoring_seconds: float
    task_score: TaskScore = Field(default="exact_match", description="which score says how well the task is done")
    sample_answers: int = Field(default=0, description="rows of each scored file whose answers are written out")
    answering_seconds: float = Field(default=0.0, description="of writing them out, before training and after it")
    notes: tuple[str, ...]
    gave_up: tuple[str, ...]
    looked_at: int  # candidates
    frontier: tuple[Candidate, ...]
    alternatives: tuple[Alternative, ...]
    tuners: tuple[OtherTuner, ...] = Field(
        default=(), description="the planned one, then each other in its place, if asked"
    )
    savings: tuple[Saving, ...]
    work: train_step.Workload
    simulation: Simulation | None = None  # of the chosen way, when asked for
    importance: Importance | None = None

    @property
    def held_to(self) -> HeldTo:
        """What answers are held to."""
        return self.labels if self.grammar is None else self.grammar


def plan_inputs(job: Job, model_folder: Path | None) -> Inputs:
    """The hashes of what a plan is made from; of weights only where they say which layers train."""
    return data_inputs(job) | (_of_model(job, model_folder) if model_folder else {})


def _of_model(job: Job, folder: Path) -> Inputs:
    return model_inputs(folder, weights=needs_importance(job) and has_weights(folder))


# of a plan's choices those that change what a step holds, and nothing that it computes but the order of sums
MEMORY_ALONE = ("micro_batch_size", "checkpointing", "kept_layers", "loss_chunk_tokens", "malloc", "stream_layers",
                "shard_base")  # fmt: skip


def request_digest(job: Job, model_folder: Path | None) -> str:
    """One digest of what a plan is made from: settings, profile, model config, data. Equal: the plan is current."""
    profile = profile_path(job.profile)
    grammar = grammar_file(job.answers)
    shipped = [sha256_file(path) for path in (profile, grammar) if path is not None and path.is_file()]
    read = [*shipped, plan_inputs(job, model_folder)]
    return sha256_json([job.model_dump(), versions().get("edgeft", ""), read])


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Thousands of candidates and no circle among them: looking for garbage took a fifth of a plan's time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Asked(NamedTuple):
    """What is planned: all that a job names has been read, and every candidate is there, best first."""

    question: Question
    looked_at: list[Training]
    steps: int
    rows_tokens: int  # of all rows that are trained on or scored
    held: Held
    importance: Importance | None
    notes: list[str]


@_without_collections()
def make_plan(
    job: Job, importance: Importance | None = None, *, spec: ModelSpec | None = None, profile: Profile | None = None,
    compare_tuners: bool = False,
) -> Plan:  # fmt: skip
    """The plan of a job. Raises BadInput for what cannot be planned, DoesNotFit (exit 3) when nothing fits.

    Where the choice of layers reads data, `importance` is what `edgeft.planning.layer_scores.score_layers(job)` gives.
    `spec` and `profile` are what the job's names stand for, where the caller has read them already. With
    `compare_tuners` the plan says what every other tuner would take, for a quarter more time.
    """
    asked = _ask(job, importance, spec, profile)
    made = _planned(asked)
    if not compare_tuners:
        return made
    scores = asked.importance.scores if asked.importance else None
    return made.model_copy(update={"tuners": other_tuners(asked.question, made.training, scores)})


@_without_collections()
def smaller_plan(plan: Plan, most_bytes: int) -> Plan:
    """The best way that trains the very same within `most_bytes`: other micro-batches, recomputation, chunks, malloc.

    What was pinned of these is left to the planner. Raises DoesNotFit where there is none.
    """
    open_again: dict[str, Any] = dict.fromkeys(MEMORY_ALONE)
    job = plan.job.model_copy(update=open_again | {"max_memory_bytes": most_bytes})
    asked = _ask(job, plan.importance, plan.spec, plan.profile)
    taken = {name: getattr(plan.training, name) for name in MEMORY_ALONE}
    for ways in (asked.looked_at, _not_whole(asked.question, asked)):
        same = [way for way in ways if way.model_copy(update=taken) == plan.training and goes_on(plan.training, way)]
        training, _ = choose(asked.question, same)
        if training is not None:
            break
    else:
        problem = f"no way of training the same needs at most {show_bytes(most_bytes)}"
        raise DoesNotFit("plan", problem, "plan another way: edgeft plan --max-memory ...")
    return _planned(asked._replace(looked_at=same)).model_copy(update={"budget_bytes": plan.budget_bytes})


def _planned(asked: _Asked) -> Plan:
    question, looked_at, spec, job = asked.question, asked.looked_at, asked.question.spec, asked.question.job
    training, looked_at, said, whole = choose_of_all(question, looked_at, lambda: _not_whole(question, asked))
    if training is None:
        raise does_not_fit(question, looked_at, _unpinned(asked))
    best, key = looked_at[0], question.key(training)
    better = list(itertools.takewhile(lambda other: question.key(other) < key, looked_at))
    notes = asked.notes + said + unused_notes(job, training) + training_notes(spec, training)
    notes += rounding_notes(job, training.quantize_aware) + patience_notes(training) + machine_notes(question.profile)
    notes += prefix_notes(question, training, asked.rows_tokens) + streaming_notes(question, training, whole)
    notes += process_notes(question, training) + sharding_notes(question, training)
    notes += tuner_notes(question, looked_at)
    notes += length_hints(question, training) + unused_budget(question, best, training, better)
    stages, stage_notes = plan_stages(question, training)
    of_each_quality = frontier(question, training, looked_at)
    least = smallest(of_each_quality, question.candidate(training))
    return Plan(
        request_sha256=request_digest(job, cached_folder(job.model)),
        inputs=plan_inputs(job, cached_folder(job.model)),
        versions=versions(),
        job=job,
        profile=question.profile,
        spec=spec,
        lengths=question.lengths,
        labels=asked.held.labels,
        grammar=asked.held.grammar,
        training=training,
        budget_bytes=question.budget_bytes,
        peak_bytes=question.high_bytes(training),
        need_bytes=least.high_bytes,
        need_seconds_per_step=least.seconds_per_step,
        phases=question.phases(training),
        stages=stages,
        seconds_per_step=round(question.seconds(training), 4),
        launches=question.launches(training),
        seconds=round(question.all_seconds(training), 1),
        prefix_seconds=round(question.prefix_seconds(training), 1),
        scoring=question.scoring(training),
        scoring_seconds=round(question.scoring_seconds(training), 1),
        task_score=question.task_score,
        sample_answers=question.sample_answers(training),
        answering_seconds=round(question.answering_seconds(training), 1),
        notes=(*notes, *stage_notes),
        gave_up=tuple(gave_up(question, best, training)) if better else (),
        looked_at=len(looked_at),
        frontier=of_each_quality,
        alternatives=alternatives(question, training, looked_at),
        savings=savings(question, training),
        work=question.work,
        importance=_with_choice(asked.importance, training, spec) if asked.importance else None,
    )


def _not_whole(question: Question, asked: _Asked) -> list[Training]:
    """The candidates that do not have all of a base in memory, where nobody has said whether they shall.

    Each process can leave layers in their files, several can have a part of each.
    """
    job, found = question.job, list[Training]()
    scores = asked.importance.scores if asked.importance else None
    for setting, can in (("stream_layers", question.profile.device in DEVICES), ("shard_base", job.processes > 1)):
        if can and getattr(job, setting) is None:
            with contextlib.suppress(BadInput):
                asking = job.model_copy(update={setting: True})
                found += candidates(asking, question.profile, question.spec, question.work, asked.steps, scores)
    return found


def _ask(job: Job, importance: Importance | None, spec: ModelSpec | None, profile: Profile | None) -> _Asked:
    """Read what a job names, check it, and list every candidate. Raises BadInput."""
    profile = profile or detect(load_profile(job.profile))
    if "train" not in profile.roles:
        hint = f"--for {profile.name} is what runs the result; --on names the machine that trains, as --on t4: "
        hint += f"edgeft plan {shlex.quote(job.model)} --on t4 --for {shlex.quote(job.profile)}"
        raise BadInput("profile", f"{profile.name} is a target device, not a training host", hint)
    spec = spec or read_model_spec(job.model)
    refuse_beside(Path(job.model), "training")
    read = read_data(job, Path(job.model) if Path(job.model).is_dir() else None)
    files = read.files if read else {}
    lengths, data_bytes, scored, notes = read_lengths(job, spec, read)
    held = read_held(job, files, read.tokenizer if read else None)
    length, length_note = _max_length(job, spec, lengths)
    notes += assumed_rows(job, length) if lengths is None else []
    check_processes(job, profile)
    budget = budget_of_one(job, profile)
    steps = steps_of(job, lengths)
    work = train_step.Workload(length, min(length, lengths.longest_trained if lengths else length))
    check_job(job, spec)
    importance = _importance_of(job, spec, importance)
    scores = importance.scores if importance else None
    question = Question(job, profile, spec, lengths, work, data_bytes, budget, scored, held.labels, _score(job, files))
    rows_tokens = tokens_kept(job, files, length)
    looked_at = sorted(candidates(job, profile, spec, work, steps, scores, rows_tokens), key=question.key)
    if not looked_at:
        raise BadInput("settings", "no way of training is left by what was set", "leave base_precision to the planner")
    notes = [*([profile.assumed] if profile.assumed else []), *notes, *held.notes, *length_note]
    return _Asked(question, looked_at, steps, rows_tokens, held, importance, notes)


def _score(job: Job, files: Mapping[str, Measured]) -> TaskScore:
    """Which score suits the job's training data."""
    read = files.get(job.data or "")
    return task_score(read.sizes, read.asked, held_to_labels=job.answers == "labels") if read else "loss"


def _importance_of(job: Job, spec: ModelSpec, given: Importance | None) -> Importance | None:
    """The scores that this job's choice of layers reads; None when it reads none. Raises BadInput for others'."""
    if not needs_importance(job):
        return None
    if given is None:
        hint = "call make_plan(job, importance=edgeft.planning.layer_scores.score_layers(job))"
        raise BadInput("layer_score", f"{job.layer_score} is measured before planning, and it was not", hint)
    if given.method != job.layer_score or len(given.scores) != spec.num_hidden_layers:
        problem = f"{len(given.scores)} scores by {given.method} were given, the job wants {spec.num_hidden_layers} by"
        raise BadInput(
            "importance",
            f"{problem} {job.layer_score}",
            "give what edgeft.planning.layer_scores.score_layers(job) does",
        )
    return given


def _with_choice(importance: Importance, training: Training, spec: ModelSpec) -> Importance:
    """The scores together with what a sparse plan chose by them, and as many layers chosen by nothing."""
    if training.layers != "sparse":
        return importance
    count = len(training.trained_layers)
    choices = {
        "chosen": training.trained_layers,
        "top": top_layers(spec.num_hidden_layers, count),
        "random": random_layers(training.seed, spec.num_hidden_layers, count),
    }
    return importance.model_copy(update=choices)


def _max_length(job: Job, spec: ModelSpec, lengths: Lengths | None) -> tuple[int, list[str]]:
    """The padded length to plan for: what the user set, the longest sample, or the model's limit where that is less."""
    limit = positions_left(job, spec)
    own = f"the model's {limit} positions" if not tokens_of(job) else f"the {limit} positions behind the prefix"
    if job.max_length is not None:
        if limit is not None and job.max_length > limit:
            raise BadInput("max_length", f"{job.max_length} is more than {own}", f"at most {limit}")
        return min(job.max_length, lengths.longest) if lengths else job.max_length, []
    if lengths is None:
        return min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH), []
    longest = lengths.longest
    if limit is not None and longest > limit:
        return limit, [f"samples reach {longest} tokens, more than {own}: longer ones are cut"]
    return longest, []


def _unpinned(asked: _Asked) -> str | None:
    """The setting that, given back to the planner, makes the job fit; None when none does."""
    question, scores = asked.question, asked.importance.scores if asked.importance else None

    def fits(**changes: object) -> bool:
        other = replace(question, job=question.job.model_copy(update=changes), keys={}, heights={}, counts={})
        try:
            check_job(other.job, other.spec)
            found = candidates(other.job, other.profile, other.spec, other.work, asked.steps, scores,
                               asked.rows_tokens)  # fmt: skip
            return best_that_fits(other, [*found, *_not_whole(other, asked)]) is not None
        except BadInput:
            return False

    for name in PINS:
        if (value := getattr(question.job, name)) is not None and fits(**{name: None}):
            return f"it fits when {name} is left to the planner: drop --set {name}={value}"
    # full fine-tuning is the user's own wish; what the planner chose itself has had its LoRA candidates
    if adapts(question.job.tuner) is False and fits(tuner=ADAPTERS):
        return f"{TUNERS[ADAPTERS].title} would fit: --set tuner={ADAPTERS}"
    return None
