"""What does a way of training cost in quality, time and memory? The numbers that candidates are compared by.

What quality costs is an order, not a measurement of your task; its evidence: rank 64 rsLoRA 51.3, rank 32 47.8, full
fine-tuning 47.2 points on GSM8K at equal data (PEFT's MetaMathQA comparison on Llama-3.2-3B); NF4 with double
quantisation follows 16-bit LoRA within half a point (QLoRA, arXiv 2305.14314); 8-bit AdamW follows 32-bit (arXiv
2110.02861). Recomputing activations, a smaller micro-batch and loss chunks change no result, only time.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeft import memory
from edgeft.artifacts import Strict
from edgeft.data import Lengths
from edgeft.model_spec import ModelSpec
from edgeft.profile import Profile
from edgeft.settings import Job, Layers, Optimizer, Precision, Training, Tuner

# Share of a profile's matmul rate that a training step reaches. Of a CPU's measured rate: the example took 19% more
# seconds than this gives (LoRA) and 19% fewer (full fine-tuning). Of a datasheet's peak: a guess, not measured.
MEASURED_SHARE, DATASHEET_SHARE = 0.2, 0.35

# expected quality points given up, by the evidence above; only their order decides
NF4_COST, RANK_COST, LAYERS_COST, LISA_COST, ADAM8_COST = 0.5, {64: 0.0, 32: 2.0, 16: 3.0, 8: 4.0}, 12.0, 2.0, 0.1
# On a CPU fp32 comes first even where bf16 multiplies faster: for every length of batch oneDNN compiles its kernels
# anew and keeps them, which is slower than fp32 in short runs and grows beyond any plan.
CPU_HALF_COST = 0.2


class Candidate(Strict):
    """One way of training and what it costs: points of quality (0 is the best way), seconds, high estimate in bytes."""

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
    work: memory.Workload
    data_bytes: int
    budget_bytes: int

    def key(self, training: Training) -> tuple[float, float]:
        """(quality given up, seconds per step): what candidates are sorted by, best first."""
        return quality_cost(self.spec, training), self.seconds(training)

    def phases(self, training: Training, work: memory.Workload | None = None) -> tuple[memory.Phase, ...]:
        """Every phase of a run, for the longest sample unless another workload is given."""
        return memory.phases(
            self.spec, training, work or self.work, baseline_bytes=self.profile.training_baseline_bytes,
            data_bytes=self.data_bytes,
        )  # fmt: skip

    def high_bytes(self, training: Training, work: memory.Workload | None = None) -> int:
        """What the budget is held to: the highest phase's high estimate."""
        return max(phase.high_bytes for phase in self.phases(training, work))

    def seconds(self, training: Training) -> float:
        """Seconds per optimizer step of typical batches."""
        return seconds_per_step(self.profile, self.spec, training, mean_work(self.work, self.lengths))

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
        return limit is not None and self.seconds(training) * training.steps > limit


def quality_cost(spec: ModelSpec, training: Training) -> float:
    """Expected points that this way gives up against the best one, by the evidence at the top."""
    cost = NF4_COST if training.base_precision == "nf4" else 0.0
    cost += CPU_HALF_COST if training.device == "cpu" and training.compute_dtype != "fp32" else 0.0
    cost += ADAM8_COST if training.optimizer != "adamw" else 0.0
    if training.layers == "lisa":  # every layer trains in its turn
        cost += LISA_COST * (1 - training.active_layers / len(training.trained_layers))
    cost += LAYERS_COST * (1 - len(training.trained_layers) / spec.num_hidden_layers)
    if training.rank:
        cost += min((abs(training.rank - rank), points) for rank, points in RANK_COST.items())[1]
    return cost


def mean_work(work: memory.Workload, lengths: Lengths | None) -> memory.Workload:
    """The typical batch: samples of similar length share a batch, so the mean length is nearly what is computed."""
    if lengths is None:
        return work
    return memory.Workload(min(work.longest, round(lengths.mean) + 1), min(work.longest_trained, round(lengths.mean)))


def seconds_per_step(profile: Profile, spec: ModelSpec, training: Training, work: memory.Workload) -> float:
    """Seconds per optimizer step: counted multiplications over the share of the profile's rate that training reaches.

    Forward 2 operations per weight and token; backward 2 more for each layer that gradients cross, and 2 more where
    the weights train; recomputation one more forward pass of those layers. The head is priced for trained tokens only.
    """
    tokens = training.batch_size * work.longest
    per_layer = sum(linear.in_features * linear.out_features for linear in spec.linears)
    crossed = float(spec.num_hidden_layers - min(training.trained_layers))
    trained = len(training.trained_layers)
    if training.layers == "lisa":  # the lowest of n uniform draws out of L lies at (L - n) / (n + 1) on average
        trained = training.active_layers
        crossed -= (len(training.trained_layers) - trained) / (trained + 1)
    passes = 2 * spec.num_hidden_layers + 2 * crossed + (2 * trained if training.tuner == "full" else 0)
    passes += 2 * max(0.0, crossed - training.kept_layers) * training.checkpointing
    operations = float(passes) * per_layer * tokens
    operations += 6 * memory.trained_parameters(spec, training) * tokens if training.tuner == "lora" else 0
    operations += 6 * spec.vocab_size * spec.hidden_size * training.batch_size * work.longest_trained
    rate = profile.matmul_tflops.get(training.compute_dtype, min(profile.matmul_tflops.values())) * 1e12
    rate *= MEASURED_SHARE if profile.probe else DATASHEET_SHARE
    at_once = training.micro_batch_size * max(1.0, training.max_length / work.longest)  # more where they are short
    splits = max(1.0, training.batch_size / at_once)
    slower = (1.3 if training.base_precision == "nf4" else 1.0) * (1 + 0.02 * (splits - 1))
    if training.optimizer == "paged_adamw8bit":
        slower *= 1.1
    return operations / rate * slower * (1.0 + 0.0001 * (1024 / training.loss_chunk_tokens))
