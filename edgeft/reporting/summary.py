"""What does a plan, and the run after it, say to somebody who decides on hardware? The data of a report, no layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from edgeft.data.task_score import TaskScore
from edgeft.documents import Artifact, Strict, versions
from edgeft.exporting.answers import Answers, HeldToGrammar
from edgeft.exporting.bundle import Bundle, Measurement
from edgeft.machines.profile import Profile
from edgeft.memory.disk import Disk
from edgeft.memory.simulated import Moment
from edgeft.memory.stages import file_bytes, needed_bytes, over_by_pages
from edgeft.memory.train_step import Phase, Term
from edgeft.merging.result import MergedCheckpoint
from edgeft.models.metrics import Metrics, Pair, Proof, Repair, pair
from edgeft.planning.alternatives import Alternative, Saving
from edgeft.planning.costs import Candidate
from edgeft.planning.plan import Plan
from edgeft.reporting.answers import shown
from edgeft.reporting.card import Card, headline, plan_card, run_card, scores_of
from edgeft.reporting.matrix import DeviceCell, device_cell, method
from edgeft.reporting.read_run import Run
from edgeft.reporting.words import kept_step
from edgeft.settings.job import ENDS
from edgeft.settings.tuners import TUNERS
from edgeft.training.result import TrainResult

Measurements = Mapping[str, int]  # bytes by the name of a phase
NONE_MEASURED: Measurements = {}
CURVE_POINTS = 200  # of a loss curve: what a plot of a page's width can show


class Setting(Strict):
    """One choice of the plan in plain words."""

    name: str
    text: str


class Stage(Strict):
    """The memory of one phase of the work: terms that add up, and the limit they have to stay below."""

    name: str
    where: str = Field(description="whose memory: the training device's, its host's, the target's")
    terms: tuple[Term, ...]
    low_bytes: int
    expected_bytes: int
    high_bytes: int
    limit_bytes: int | None
    measured_bytes: int | None = None

    @property
    def file_bytes(self) -> int:
        """Of these bytes those of files, which the system takes back when it needs them."""
        return file_bytes(self)

    @property
    def over(self) -> bool:
        """Whether the high estimate, pages of files left out, is more than the limit."""
        return self.limit_bytes is not None and needed_bytes(self) > self.limit_bytes

    @property
    def by_pages(self) -> bool:
        """Whether the high estimate is more than the limit, by pages of files alone."""
        return over_by_pages(self, self.limit_bytes)

    @property
    def title(self) -> str:
        """The name as people say it."""
        own = {"load": "loading", "prefix": "keeping outputs", "evaluate": "scoring", "train": "training",
               "quantise": "quantising", "resume": "resuming", "merge": "merging", "export: build": "exporting",
               "export: prove": "proving", "bundle": "running"}  # fmt: skip
        title = own.get(self.name, self.name)
        return (title[:1].upper() + title[1:]) + (", host" if self.name == "load" and self.where == "host" else "")


class Option(Strict):
    """A way of training that was looked at: the least memory for its quality, or the chosen way with one change."""

    text: str
    quality_cost: float = Field(description="expected points given up against the best way: an order, no measurement")
    high_bytes: int
    seconds_per_step: float
    fits: bool
    chosen: bool = False
    frontier: bool = True


class Compared(Strict):
    """A prediction and what was measured. `bound`: the prediction is what cannot be exceeded."""

    what: str
    unit: Literal["bytes", "seconds", "tokens/s"]
    predicted: float
    measured: float
    bound: bool = False

    @property
    def error(self) -> float:
        """measured / predicted - 1."""
        return self.measured / self.predicted - 1 if self.predicted else 0.0


class Scored(Strict):
    """Scores of one form of the model."""

    name: str
    metrics: Metrics


class Answered(Strict):
    """One validation row and what each form of the model answers; a bundle that was not asked says nothing."""

    prompt: str
    expected: str
    base: str
    tuned: str
    bundle: str = ""


class Summary(Artifact):
    """report.json of one plan; `kind` is "run" when there was a training run to compare it with."""

    kind: Literal["plan", "run"]
    model: str
    architecture: str
    parameters: int
    profile: Profile
    headline: tuple[str, ...]
    card: Card
    method: str
    budget_bytes: int
    need_bytes: int = Field(description="least memory at this quality")
    peak_bytes: int = Field(description="of the chosen way, the fastest of its quality")
    seconds_per_step: float
    seconds: float
    settings: tuple[Setting, ...]
    stages: tuple[Stage, ...] = Field(description="the phases of training, on the device that trains")
    later_stages: tuple[Stage, ...] = Field(description="what comes before and after, on the host and the target")
    disk: tuple[Disk, ...]
    timeline: tuple[Moment, ...] = Field(
        default=(), description="live tensor bytes within a step, where it was simulated"
    )
    simulated_peak_bytes: int | None = None
    options: tuple[Option, ...]
    looked_at: int
    gave_up: tuple[str, ...]
    savings: tuple[Saving, ...]
    alternatives: tuple[Alternative, ...]
    target: str
    devices: tuple[DeviceCell, ...]
    compared: tuple[Compared, ...] = ()
    scores: tuple[Scored, ...] = ()
    scored_on: str = ""
    pairs: tuple[Pair, ...] = Field(default=(), description="of forms on the same scored rows, with 95% intervals")
    proof: Proof | None = None
    answers: Answers | HeldToGrammar | None = Field(
        default=None, description="how a bundle's answers are held; null: they are free"
    )
    repair: Repair | None = Field(default=None, description="what was considered, where the export chose its target")
    task_score: TaskScore = Field(default="exact_match", description="which score says how well the task is done")
    samples: tuple[Answered, ...] = Field(default=(), description="answers to some of the scored validation rows")
    loss_curve: tuple[tuple[int, float], ...] = ()
    validations: tuple[tuple[int, float], ...] = Field(default=(), description="(step, loss) of rows that stop a run")
    notes: tuple[str, ...]


def summarise(run: Run, devices: Sequence[Profile] = ()) -> Summary:
    """Everything a report of a plan shows; `devices`: where the result could run as a bundle of the plan's target."""
    plan, train, merged, bundle = run.plan, run.train, run.merged, run.bundle
    elsewhere = train is not None and any(deviation.what == "device" for deviation in train.deviations)
    peaks = train.phase_peak_bytes if train is not None and not elsewhere else {}
    merge_peaks = {"merge": merged.measured_peak_bytes} if merged is not None else {}
    during, later = stages_of(plan, peaks, merge_peaks)
    around, simulated = plan.stages, plan.simulation
    said = [*plan.notes, *run.notes]
    if train is not None:
        said += [f"not as planned: {d.what} {d.done} instead of {d.planned}" for d in train.deviations]
        said += ["measured on another device than planned: memory and time cannot be compared"] if elsewhere else []
        said += kept_step(train)
        said += [f"{train.cut_rows} rows were cut to {plan.training.max_length} tokens"] if train.cut_rows else []
    scores, scored_on = scores_of(train, bundle)
    cells = tuple(device_cell(plan.spec, around.target, profile) for profile in devices)
    card = plan_card(plan, cells) if train is None else run_card(run)
    return Summary(
        input_sha256=run.plan_sha256,
        versions=versions(),
        kind="run" if train is not None else "plan",
        model=plan.job.model,
        architecture=plan.spec.architecture,
        parameters=plan.spec.total_parameters,
        profile=plan.profile,
        headline=headline(card),
        card=card,
        method=method(plan),
        budget_bytes=plan.budget_bytes,
        need_bytes=plan.need_bytes,
        peak_bytes=plan.peak_bytes,
        seconds_per_step=plan.seconds_per_step,
        seconds=plan.seconds,
        settings=plain_words(plan),
        stages=during,
        later_stages=later,
        disk=around.disk,
        timeline=simulated.timeline if simulated else (),
        simulated_peak_bytes=simulated.live_peak_bytes if simulated else None,
        options=options(plan),
        looked_at=plan.looked_at,
        gave_up=plan.gave_up,
        savings=plan.savings,
        alternatives=plan.alternatives,
        target=around.target.name,
        devices=cells,
        compared=() if train is None or elsewhere else compared(plan, train, merged, run.here),
        scores=tuple(Scored(name=name, metrics=metrics) for name, metrics in scores.items()),
        scored_on=scored_on,
        pairs=_pairs(train, bundle),
        proof=bundle.proof if bundle else None,
        answers=bundle.answers if bundle else None,
        repair=bundle.repair if bundle else None,
        task_score=plan.task_score,
        samples=_samples(train, run.here),
        loss_curve=_thinned(train.loss_curve) if train else (),
        validations=_thinned(train.validations) if train else (),
        notes=tuple(said),
    )


def stages_of(
    plan: Plan, peaks: Measurements = NONE_MEASURED, later_peaks: Measurements = NONE_MEASURED
) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """(phases of training, stages before and after it), each with its limit and what was measured of it, by name."""
    around = plan.stages
    during = tuple(_stage(phase, plan.budget_bytes, peaks) for phase in plan.phases)
    return during, tuple(_stage(phase, around.limit_bytes(phase), later_peaks) for phase in around.phases)


def _stage(phase: Phase, limit: int | None, measured: Measurements) -> Stage:
    return Stage(**dict(phase), limit_bytes=limit, measured_bytes=measured.get(phase.name))


def _thinned(curve: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """At most CURVE_POINTS points, each the mean loss of equally many steps at the last of them."""
    size = -(-len(curve) // CURVE_POINTS) or 1
    parts = [curve[i : i + size] for i in range(0, len(curve), size)]
    return tuple((part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts)


def _samples(train: TrainResult | None, here: Measurement | None) -> tuple[Answered, ...]:
    rows = shown(train.samples, here.answers if here else ()) if train else []
    return tuple(Answered(**row.model_dump(), bundle=answer) for row, answer in rows)


def _pairs(train: TrainResult | None, bundle: Bundle | None) -> tuple[Pair, ...]:
    """What each form changed of the one before it on the same rows."""
    if bundle is not None and bundle.proof is not None:
        return bundle.proof.pairs
    if train is None:
        return ()
    tested = train.base_test is not None and train.test is not None
    base, tuned = (train.base_test, train.test) if tested else (train.base_valid, train.valid)
    found = pair("base", base, "fine-tuned", tuned) if base is not None and tuned is not None else None
    return (found,) if found is not None else ()


def plain_words(plan: Plan) -> tuple[Setting, ...]:
    """The plan's settings, each as a sentence for somebody who does not know the library's names."""
    training, spec = plan.training, plan.spec
    count, layers = spec.num_hidden_layers, len(training.trained_layers)
    which = f"all {count} layers" if layers == count else f"{layers} of {count} layers"
    if training.layers == "lisa":
        which = (
            f"{training.active_layers} of {layers} layers at a time, drawn anew every {training.lisa_interval} steps"
        )
    ends = [end for end in ENDS if getattr(training, end) != "off"]
    said = f", and {', '.join(ends)}" if ends else ""
    what = TUNERS[training.tuner].sentence.format(
        rank=training.rank, tokens=training.prefix_tokens, layers=which, ends=said
    )
    stored = {"nf4": "4 bits (NF4)", "fp32": "32 bits", "fp16": "16 bits (fp16)", "bf16": "16 bits (bf16)"}
    base = f"The weights lie in memory in {stored[training.base_precision]} and are multiplied in "
    base += training.compute_dtype
    batch = f"{training.batch_size} samples make a step, {training.micro_batch_size} of them at a time, each of up to "
    batch += f"{training.max_length:,} tokens"
    of_layers = f" in {count - training.kept_layers} of {count} layers" if training.kept_layers else ""
    recomputed = f"Intermediate results are computed twice{of_layers}: less memory, more time, the same result"
    kept = "Intermediate results are kept from the forward pass to the backward pass"
    optimizer = {
        "adamw": "AdamW with two 32-bit numbers for each trained one",
        "adamw8bit": "AdamW with two 8-bit numbers for each trained one",
        "paged_adamw8bit": "AdamW with two 8-bit numbers for each trained one, kept in the host's memory",
    }[training.optimizer]
    schedule = f"{training.steps:,} steps; the learning rate rises to {training.learning_rate:g} over "
    schedule += f"{training.warmup_steps:,} of them, then falls"
    return tuple(
        Setting(name=name, text=text + ".")
        for name, text in (
            ("What trains", what),
            ("Base model", base),
            ("Batch", batch),
            ("Activations", recomputed if training.checkpointing else kept),
            ("Loss", f"Word scores of at most {training.loss_chunk_tokens:,} tokens exist at the same time"),
            ("Optimizer", optimizer),
            ("Schedule", schedule),
            ("Seed", f"{training.seed}; the same plan gives the same run"),
        )
    )


def options(plan: Plan) -> tuple[Option, ...]:
    """The frontier of candidates, best first, and the chosen way with one change each."""
    training = plan.training
    own = ("tuner", "base_precision", "rank", "layers", "micro_batch_size", "checkpointing", "kept_layers",
           "loss_chunk_tokens", "optimizer")  # fmt: skip

    def is_chosen(row: Candidate) -> bool:
        same = all(getattr(row, name) == getattr(training, name) for name in own)
        return same and row.trained == (training.active_layers or len(training.trained_layers))

    found: list[Option] = []
    base = next(row for row in plan.frontier if is_chosen(row))
    for row in plan.frontier:
        chosen = row is base
        way = TUNERS[row.tuner].short.format(rank=row.rank)
        which = "all" if row.trained == plan.spec.num_hidden_layers else f"{row.trained} of"
        text = f"{row.base_precision.upper()} {way}, {'LISA ' if row.layers == 'lisa' else ''}{which} "
        text += f"{plan.spec.num_hidden_layers} layers" + (", 8-bit AdamW" if row.optimizer != "adamw" else "")
        if row.quality_cost == base.quality_cost and not chosen:  # the same but for what changes no result
            text += f", {row.micro_batch_size} at a time"
        found.append(Option(
            text=text, quality_cost=row.quality_cost, high_bytes=row.high_bytes, seconds_per_step=row.seconds_per_step,
            fits=row.fits, chosen=chosen,
        ))  # fmt: skip
    found += [
        Option(
            text=f"{change.setting}: {change.value}",
            quality_cost=round(base.quality_cost + change.more_quality_cost, 3),
            high_bytes=change.high_bytes,
            seconds_per_step=round(base.seconds_per_step + change.more_seconds_per_step, 4),
            fits=change.fits,
            frontier=False,
        )
        for change in plan.alternatives
    ]
    return tuple(found)


def compared(
    plan: Plan, train: TrainResult, merged: MergedCheckpoint | None, here: Measurement | None
) -> tuple[Compared, ...]:
    """Predicted against measured, stage after stage."""
    expected = max(phase.expected_bytes for phase in plan.phases)
    found = [Compared(
        what="training, peak memory", unit="bytes", predicted=expected, measured=train.measured_peak_bytes
    )]  # fmt: skip
    if train.steps:
        each = train.seconds / train.steps
        found.append(Compared(what="training, a step", unit="seconds", predicted=plan.seconds_per_step, measured=each))
    if train.prefix_seconds:
        found.append(Compared(
            what="outputs of frozen layers", unit="seconds", predicted=plan.prefix_seconds,
            measured=train.prefix_seconds,
        ))  # fmt: skip
    if merged is not None:
        found.append(Compared(
            what="merge, peak memory", unit="bytes", predicted=merged.predicted_peak_bytes,
            measured=merged.measured_peak_bytes,
        ))  # fmt: skip
    if here is not None and here.predicted_peak_bytes is not None and here.measured_peak_bytes is not None:
        found.append(Compared(
            what="export, peak memory", unit="bytes", predicted=here.predicted_peak_bytes,
            measured=here.measured_peak_bytes,
        ))  # fmt: skip
    if here is not None:
        found.append(Compared(
            what="bundle, peak memory", unit="bytes", predicted=here.predicted_here_bytes,
            measured=here.measured.peak_memory_bytes,
        ))  # fmt: skip
        found.append(Compared(
            what="bundle, decoding", unit="tokens/s", predicted=here.measured.bound_tokens_per_second,
            measured=here.measured.decode_tokens_per_second, bound=True,
        ))  # fmt: skip
    return tuple(found)
