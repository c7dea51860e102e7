"""What does a way of training cost in quality, time and memory? The numbers that candidates are compared by.

What quality costs is an order, not a measurement of your task. What a tuner costs, and few layers instead of all, was
measured (`make bench-methods`, `evidence.py`). The rest is published: rank 64 rsLoRA 51.3, rank 32 47.8 points on GSM8K
at equal data (PEFT's MetaMathQA comparison on Llama-3.2-3B); NF4 with double quantisation follows 16-bit LoRA within
half a point (QLoRA, arXiv 2305.14314); 8-bit AdamW follows 32-bit (arXiv 2110.02861). Recomputing activations, a
smaller micro-batch and loss chunks change no result, only time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from edgeft.data.dataset import Lengths
from edgeft.data.labels import Label, tree_size
from edgeft.data.scoring_groups import Scoring, Size, sampled_sizes, scoring, searched, with_written
from edgeft.data.task_score import TaskScore, rows_written
from edgeft.documents import Strict
from edgeft.machines.profile import Profile
from edgeft.memory import train_step
from edgeft.memory.phases import Simulated, phases
from edgeft.memory.several import threads
from edgeft.memory.timing import (
    COUNTED,
    Counted,
    answering_seconds,
    count,
    device_seconds,
    launch_seconds,
    mean_work,
    prefix_seconds,
    scoring_seconds,
    seconds_per_step,
)
from edgeft.models.spec import ModelSpec
from edgeft.planning.early_stopping import validating_seconds
from edgeft.planning.evidence import layers_points, method_of, tuner_points
from edgeft.planning.rows_read import rows_of
from edgeft.settings.job import Job, Layers, Malloc, Optimizer, Precision, Training, Tuner

# expected quality points given up, by what is published; only their order decides
NF4_COST, RANK_COST, ADAM8_COST = 0.5, {64: 0.0, 32: 2.0, 16: 3.0, 8: 4.0}, 0.1
ENDS_COST = 0.5  # full fine-tuning that leaves the embedding out: 1.2 points on the example, near its noise
# On a CPU fp32 comes first even where bf16 multiplies faster: for every length of batch oneDNN compiles its kernels
# anew and keeps them, which is slower than fp32 in short runs and grows beyond any plan.
CPU_HALF_COST = 0.2


class Candidate(Strict):
    """One way of training and what it costs: points of quality (0: LoRA, rank 64, all layers), seconds, high bytes."""

    tuner: Tuner
    base_precision: Precision
    rank: int
    layers: Layers
    trained: int  # layers at a time
    micro_batch_size: int
    checkpointing: bool
    kept_layers: int
    loss_chunk_tokens: int
    optimizer: Optimizer
    malloc: Malloc = "tight"
    stream_layers: bool = False
    shard_base: bool = False
    cached_layers: int = 0
    quality_cost: float
    seconds_per_step: float
    high_bytes: int
    fits: bool


@dataclass(frozen=True)
class Question:
    """What is planned: every candidate is measured against the same machine, model, data and budget."""

    job: Job
    profile: Profile
    spec: ModelSpec
    lengths: Lengths | None
    work: train_step.Workload
    data_bytes: int
    budget_bytes: int
    scored: tuple[tuple[Size, ...], ...] = ()  # the rows that are scored, before training and after; a file each
    labels: tuple[Label, ...] = ()  # what their answers are held to
    task_score: TaskScore = "loss"
    # what has been counted, by a plan's id; the plan is kept, so that its id stays its own
    keys: dict[int, tuple[Training, tuple[float, float]]] = field(default_factory=dict, repr=False)
    heights: dict[int, tuple[Training, int]] = field(default_factory=dict, repr=False)
    counts: dict[tuple[Any, ...], Counted] = field(default_factory=dict, repr=False)  # by what `count` reads
    simulated: dict[Training, Simulated] = field(default_factory=dict, repr=False)
    scorings: dict[tuple[int, int, int], Scoring] = field(default_factory=dict, repr=False)  # by what they depend on

    @property
    def rows(self) -> int:
        """Rows that are trained on; those that are assumed where no data is named."""
        return rows_of(self.job, self.lengths)

    @cached_property
    def mean_work(self) -> train_step.Workload:
        """The typical batch, which time is estimated for."""
        return mean_work(self.work, self.lengths)

    def key(self, training: Training) -> tuple[float, float]:
        """(quality given up, seconds per step): what candidates are sorted by, best first; counted once for each.

        A step has its share of what is made once for all of them.
        """
        if id(training) not in self.keys:
            seconds = self.seconds(training) + self.once(training) / training.steps
            self.keys[id(training)] = training, (quality_cost(self.spec, training, self.rows), seconds)
        return self.keys[id(training)][1]

    def once(self, training: Training) -> float:
        """Seconds that keeping outputs of layers takes once, less what scoring saves by them; 0 without."""
        if not training.cached_layers:
            return 0.0
        without = training.model_copy(update={"cached_layers": 0})
        return self.prefix_seconds(training) + self.scoring_seconds(training) - self.scoring_seconds(without)

    def prefix_seconds(self, training: Training) -> float:
        """Seconds of making the outputs of layers that are kept."""
        return prefix_seconds(self.profile, self.spec, training)

    def hope(self, training: Training) -> tuple[float, float]:
        """The key at its best: with all but one of the layers that recompute keeping their activations."""
        most = self.most_kept(training)
        if most == training.kept_layers:
            return self.key(training)
        return self.key(training)[0], self.seconds(training, most) + self.once(training) / training.steps

    def most_kept(self, training: Training) -> int:
        """How many layers could keep their activations while others recompute; what is set when the user set it."""
        if (
            not training.checkpointing
            or training.stream_layers
            or self.job.checkpointing is not None
            or self.job.kept_layers is not None
        ):
            return training.kept_layers
        crossed = self.spec.num_hidden_layers - (0 if training.embedding == "on" else min(training.trained_layers))
        return max(training.kept_layers, crossed - 1)

    def phases(self, training: Training, work: train_step.Workload | None = None) -> tuple[train_step.Phase, ...]:
        """Every phase of a run, for the longest sample unless another workload is given."""
        return phases(
            self.spec, training, work or self.work, baseline_bytes=self.profile.training_baseline_bytes,
            data_bytes=self.data_bytes, head_buffers=self._head_buffers(training), scored=self.scoring(training),
            capability=self.profile.compute_capability,
            more=self._simulated(training),
        )  # fmt: skip

    def _head_buffers(self, training: Training) -> dict[int, int]:
        """What the matrix library keeps for a head: of each thread, and processes of a machine share its cores."""
        cores = self.profile.cores or 1
        mine = threads(training, cores)
        return {rows: kept * mine // cores for rows, kept in self.profile.head_buffers.items()}

    def scoring(self, training: Training) -> Scoring:
        """What scoring this job's rows takes, in groups of as many tokens as this way has at once."""
        key = training.group_tokens, training.max_length, self.sample_answers(training)
        if key not in self.scorings:
            cut = [[size.cut(training.max_length) for size in sizes] for sizes in self.scored]
            plain = scoring(cut, training.group_tokens)
            longest, nodes = tree_size(self.labels)
            found = searched(plain, cut, longest, nodes) if self.labels else plain
            self.scorings[key] = found if self.labels else with_written(found, self.answered(training), key[-1])
        return self.scorings[key]

    def sample_answers(self, training: Training) -> int:
        """Of how many rows of each scored file answers are written out.

        None unless asked for where layers stay in their files, or are in parts: each token would read, or gather, all
        of them again.
        """
        if (training.stream_layers or training.shard_base) and self.job.sample_answers is None:
            return 0
        return rows_written(self.task_score, self.job.sample_answers)

    def answered(self, training: Training) -> list[list[Size]]:
        """The rows that a run has scores of, a file each: not those that say when it stops."""
        files = self.scored[:-1] if training.patience else self.scored
        return [[size.cut(training.max_length) for size in sizes] for sizes in files]

    def answering_seconds(self, training: Training) -> float:
        """Seconds of writing out answers, before training and after it."""
        files = sampled_sizes(self.answered(training), self.sample_answers(training))
        return answering_seconds(self.profile, self.spec, training, files, labels=bool(self.labels))

    def high_bytes(self, training: Training, work: train_step.Workload | None = None) -> int:
        """What the budget is held to: the highest phase's high estimate."""
        if work is not None:
            return max(phase.high_bytes for phase in self.phases(training, work))
        if id(training) not in self.heights:
            self.heights[id(training)] = training, max(phase.high_bytes for phase in self.phases(training))
        return self.heights[id(training)][1]

    def least_bytes(self, training: Training) -> int:
        """What some phase holds at the least: base, adapters, optimizer states. Its high estimate is no lower.

        0 where a simulation corrects the closed form.
        """
        if self.simulated:
            return 0
        spec = self.spec
        scored = train_step.weight_bytes(spec, training) + train_step.adapter_bytes(spec, training)
        states = 0 if training.layers == "lisa" else train_step.optimizer_bytes(spec, training)  # there of a few layers
        return max(scored, scored - train_step.dropped_bytes(spec, training) + states)

    def seconds(self, training: Training, kept_layers: int | None = None) -> float:
        """Seconds per optimizer step of typical batches; with another number of layers that keep their activations."""
        return seconds_per_step(self.profile, training, self.mean_work, self.counted(training, kept_layers))

    def counted(self, training: Training, kept_layers: int | None = None) -> Counted:
        """What a step of typical batches computes and moves."""
        key = (training.kept_layers if kept_layers is None else kept_layers, *COUNTED(training))
        if key not in self.counts:
            self.counts[key] = count(self.spec, training, self.mean_work, key[0])
        return self.counts[key]

    def launches(self, training: Training) -> int:
        """Kernels of a step, or what costs the host as much, where launching them decides its time; else 0."""
        counted = self.counted(training)
        host = launch_seconds(self.profile, training, self.mean_work, counted)
        waits = host > device_seconds(self.profile, training, self.mean_work, counted)
        return round(host / self.profile.seconds_per_launch) if waits else 0

    def simulate(self, training: Training) -> None:
        """Find what this way takes by running its step without memory, for a family that the closed form does not hold.

        Raises BadInput where that cannot run.
        """
        from edgeft.simulation.simulate import simulate  # imports torch: for such families alone

        # what streams, or is gathered, is in the closed form
        resident = training.model_copy(update={"stream_layers": False, "shard_base": False})
        found = simulate(self.spec, resident, self.work).live_peak_bytes
        sets = train_step.worst_sets(self.spec, resident)
        closed = max(sum(term.bytes for term in train_step.step_terms(self.spec, one, self.work)) for one in sets)
        self.simulated[training] = Simulated(found - closed, True)
        self.heights.clear()

    def _simulated(self, training: Training) -> Simulated | None:
        """What simulation found for this way; for another, the most that it found for one like it."""
        if not self.simulated or training in self.simulated:
            return self.simulated.get(training)
        alike = [found for other, found in self.simulated.items()
                 if (other.tuner, other.checkpointing) == (training.tuner, training.checkpointing)]  # fmt: skip
        if not alike:
            return None
        return Simulated(max(one.bytes for one in alike), False)

    def scoring_seconds(self, training: Training) -> float:
        """Seconds of all scoring, before training and after it."""
        return scoring_seconds(self.profile, self.spec, training, self.scoring(training))

    def candidate(self, training: Training) -> Candidate:
        """The row that reports show."""
        quality, seconds = self.key(training)
        high = self.high_bytes(training)
        shared = {name: getattr(training, name) for name in Candidate.model_fields if hasattr(training, name)}
        return Candidate(
            **shared, trained=training.active_layers or len(training.trained_layers), quality_cost=round(quality, 3),
            seconds_per_step=round(seconds, 4), high_bytes=high,
            fits=high <= self.budget_bytes and not self.too_slow(training),
        )  # fmt: skip

    def too_slow(self, training: Training) -> bool:
        """Whether all its steps take longer than the job's max_seconds."""
        limit = self.job.max_seconds
        return limit is not None and self.all_seconds(training) > limit

    def all_seconds(self, training: Training) -> float:
        """Seconds of all steps, of making what they start from, and of validating them."""
        validating = validating_seconds(self.profile, self.spec, training, self.scored)
        return self.seconds(training) * training.steps + self.prefix_seconds(training) + validating


def quality_cost(spec: ModelSpec, training: Training, rows: int) -> float:
    """Expected points that this way gives up, by the evidence at the top; `rows`: that are trained on."""
    cost = NF4_COST if training.base_precision == "nf4" else 0.0
    cost += CPU_HALF_COST if training.device == "cpu" and training.compute_dtype != "fp32" else 0.0
    cost += ADAM8_COST if training.optimizer != "adamw" else 0.0
    method, size = method_of(training), spec.total_parameters
    cost += tuner_points(method, rows, size)
    if training.layers == "lisa":  # every layer trains in its turn
        cost += layers_points(method, "lisa", training.active_layers / len(training.trained_layers), rows, size)
    if not training.adapts and training.embedding == "off":
        cost += ENDS_COST
    cost += layers_points(method, "sparse", len(training.trained_layers) / spec.num_hidden_layers, rows, size)
    if training.rank:
        cost += min((abs(training.rank - rank), points) for rank, points in RANK_COST.items())[1]
    return cost
