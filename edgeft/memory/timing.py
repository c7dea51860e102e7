"""How long does a training step take? Multiplications at a share of the matrix rate, bytes at a share of the bandwidth.

What is multiplied follows from the shapes. What is moved are the tensors that a step makes: each is written once and
read once or twice, and on a CPU its pages are fetched from the system first, unless freed memory is kept (malloc=fast).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from edgeft.data.dataset import Lengths
from edgeft.data.scoring_groups import PROMPT_READINGS, Scoring, Size, by_answer
from edgeft.machines.profile import Profile
from edgeft.memory import train_step
from edgeft.memory.launches import launches, loss_launches, optimizer_launches
from edgeft.memory.several import PCIE_RATE, added_up, adding_seconds, gathering_seconds
from edgeft.memory.sharded import pass_bytes
from edgeft.memory.streamed import casts, files_bytes, layer_file_bytes
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import Training
from edgeft.units import GIB

# Shares of a profile's matrix rate and bandwidth that a step reaches. MEASURED: of a CPU's measured ones, fitted on
# half of the shapes of bench/step_time.py, which records the error of all. HOPPER: of an H100's datasheet, fitted on
# the seconds of its kernels in a step of 1B in bf16 and one of 8B on NF4 (bench/results/cuda.json). DATASHEET: guesses
# for other GPUs, which clock down where an H100 does not.
MEASURED_SHARES, HOPPER_SHARES, DATASHEET_SHARES = (0.9, 0.13), (0.6, 0.26), (0.4, 0.3)
FAST_BANDWIDTH = 0.21  # of a CPU's where freed memory is kept (malloc=fast): fitted on the example's step alone

# Tensors that a layer makes, in elements per token: of the hidden, MLP, query and key widths, and the rank. Forwards
# alone, then with a backward pass through it; `tuners` has those of a layer that trains. Counted on the tape of
# `memory.dataflow` for a Llama (tests/memory/test_timing.py).
MADE = {
    "idle": (11, 4, 6.5, 6.5, 0),
    "through": (33, 8, 14, 14, 0),
}
ROUNDED_BYTES = (
    60  # of a weight that is rounded for a pass and back (quantize_aware): fitted on the example's step alone
)
PER_MICRO_BATCH = 0.02  # of a step's time, for each further micro-batch: smaller products, more of them
# Of one more token of answers: share of the bandwidth at which weights are read, and what calling takes; guesses.
TOKEN_BANDWIDTH, TOKEN_SECONDS, LAYER_TOKEN_SECONDS = 0.5, 3e-3, 1e-3
KEEPING = 1.25  # of a forward pass: its outputs are also written, hashed and compared; a guess
READ_BYTES_PER_SECOND = 5e8  # of a file whose pages the system has not kept: what a SATA SSD gives; not measured
KEPT_SHARE = 0.5  # of a GPU host's memory, in which the system keeps files that are read again and again; a guess
LOSS_BYTES, OPTIMIZER_BYTES = 20, 36  # per word and trained token: fp32 logits; per trained parameter: states, gradient


class Counted(NamedTuple):
    """What one optimizer step computes and moves."""

    operations: float
    bytes: float
    launches: float = 0.0  # kernels that a host puts on a GPU; of the loss those of one chunk
    read: float = 0.0  # bytes of layers that stay in their files
    files: float = 0.0  # which they are read from: once each
    added_up: float = 0.0  # bytes of gradients that several processes add up
    gathered: float = 0.0  # bytes of layers of which each of them has a part


def mean_work(work: train_step.Workload, lengths: Lengths | None) -> train_step.Workload:
    """The typical batch: samples of similar length share a batch, so the mean length is nearly what is computed."""
    if lengths is None:
        return work
    return train_step.Workload(
        min(work.longest, round(lengths.mean) + 1), min(work.longest_trained, round(lengths.mean))
    )


def seconds_per_step(profile: Profile, training: Training, work: train_step.Workload, counted: Counted) -> float:
    """Seconds per optimizer step of samples of `work`: what the device computes and moves, or what launching it takes.

    A GPU works while its host launches what comes next, and any device while the next layer is read or gathered: the
    slower of the two decides.
    """
    reading = counted.read / read_rate(profile, training, counted.files)
    beside = max(launch_seconds(profile, training, work, counted), reading)
    beside = max(beside, gathering_seconds(training, counted.gathered))
    slower = max(device_seconds(profile, training, work, counted), beside)
    return slower + adding_seconds(training, counted.added_up)


def read_rate(profile: Profile, training: Training, files: float) -> float:
    """Bytes a second at which layers come from their `files`: at a disk's rate, or over PCIe where the host keeps them.

    Processes of a machine share its disk. That its memory may keep files is counted on beside a GPU alone: what trains
    on a CPU takes that.
    """
    if profile.device == "cuda" and files <= KEPT_SHARE * (profile.host_memory_gib or 0.0) * GIB:
        return PCIE_RATE
    return READ_BYTES_PER_SECOND / training.neighbours


def launch_seconds(profile: Profile, training: Training, work: train_step.Workload, counted: Counted) -> float:
    """Seconds that the host takes to launch a step's kernels; nothing where the CPU itself computes."""
    if not counted.launches:
        return 0.0
    more = micro_batches(training, work) * loss_launches(training, work)
    return profile.seconds_per_launch * (counted.launches + more)


def device_seconds(profile: Profile, training: Training, work: train_step.Workload, counted: Counted) -> float:
    """Seconds of computing and moving what was counted."""
    rate = profile.matmul_tflops.get(training.compute_dtype, min(profile.matmul_tflops.values())) * 1e12
    of_rate, of_bandwidth = shares(profile)
    if training.malloc == "fast":
        of_bandwidth *= FAST_BANDWIDTH / MEASURED_SHARES[1]
    moved = counted.bytes / (of_bandwidth * profile.bandwidth_gb_per_second * 1e9)
    slower = 1 + PER_MICRO_BATCH * (micro_batches(training, work) - 1) + 1e-4 * 1024 / training.loss_chunk_tokens
    slower *= 1.1 if training.optimizer == "paged_adamw8bit" else 1.0
    slower *= training.neighbours if training.device == "cpu" else 1  # each has its part of the cores
    return (counted.operations / (of_rate * rate) + moved) * slower


def shares(profile: Profile) -> tuple[float, float]:
    """The shares of its matrix rate and of its bandwidth that a step reaches on a machine."""
    if profile.probe:
        return MEASURED_SHARES
    return HOPPER_SHARES if profile.compute_capability == 9.0 else DATASHEET_SHARES


def scoring_seconds(profile: Profile, spec: ModelSpec, training: Training, scored: Scoring) -> float:
    """Seconds of scoring the base before training and the tuned model after it, without answers that stay open.

    What all rows begin with is read once (models/beginning.py), where layers stay in memory and nothing lies before.
    """
    layers = spec.num_hidden_layers - training.cached_layers
    once = not (training.stream_layers or training.shard_base or training.prefix_tokens)
    tokens = scored.tokens - scored.saved_tokens * once
    forward = forward_seconds(profile, spec, training, layers, tokens, scored.trained_tokens)
    if training.stream_layers:
        groups = -(-scored.tokens // training.group_tokens)
        rate = read_rate(profile, training, files_bytes(spec, training))
        forward = max(forward, groups * layers * layer_file_bytes(spec, training) / rate)
    if training.shard_base:
        groups = -(-scored.tokens // training.group_tokens)
        forward = max(forward, groups * gathering_seconds(training, pass_bytes(spec, training, layers)))
    return 2 * forward


def answering_seconds(
    profile: Profile, spec: ModelSpec, training: Training, files: Sequence[Sequence[Size]], *, labels: bool
) -> float:  # fmt: skip
    """Seconds of writing out the answers of some rows, before training and after it: their prompts, token after token.

    A token reads every weight once for all rows of its group. Of labels only what is read again behind a prompt.
    """
    if labels:
        tokens = sum(round((1 + PROMPT_READINGS) * size.tokens) for sizes in files for size in sizes)
        return 2 * forward_seconds(profile, spec, training, spec.num_hidden_layers, tokens, 0)
    seconds = 0.0
    for sizes in files:
        for group in by_answer(sizes, training.group_tokens):
            rows = [sizes[i] for i in group]
            prompts, new = len(rows) * max(row.prompt for row in rows), max(row.new for row in rows)
            seconds += forward_seconds(profile, spec, training, spec.num_hidden_layers, prompts, len(rows))
            seconds += new * _token_seconds(profile, spec, training)
    return 2 * seconds


def _token_seconds(profile: Profile, spec: ModelSpec, training: Training) -> float:
    """Seconds of one more token for each row of a group: every weight is read, 4-bit ones are made dense first."""
    weights = spec.num_hidden_layers * sum(linear.in_features * linear.out_features for linear in spec.linears)
    itemsize = train_step.DTYPE_BYTES[training.compute_dtype]
    made = 2 * itemsize * weights if training.base_precision == "nf4" else 0
    read = itemsize * (weights + spec.vocab_size * spec.hidden_size) + made
    moved = read / (TOKEN_BANDWIDTH * profile.bandwidth_gb_per_second * 1e9)
    if training.stream_layers:
        files = files_bytes(spec, training)
        moved = max(moved, files / read_rate(profile, training, files))
    if training.shard_base:
        moved = max(moved, gathering_seconds(training, pass_bytes(spec, training, spec.num_hidden_layers)))
    return moved + TOKEN_SECONDS + LAYER_TOKEN_SECONDS * spec.num_hidden_layers


def prefix_seconds(profile: Profile, spec: ModelSpec, training: Training) -> float:
    """Seconds of running every row once through the layers whose outputs are kept; none where none are."""
    return KEEPING * forward_seconds(profile, spec, training, training.cached_layers, training.cached_tokens, 0)


def forward_seconds(
    profile: Profile, spec: ModelSpec, training: Training, layers: int, tokens: int, trained_tokens: int
) -> float:
    """Seconds of so many tokens through some layers, and through the head where they train."""
    rate = profile.matmul_tflops.get(training.compute_dtype, min(profile.matmul_tflops.values())) * 1e12
    of_rate, of_bandwidth = shares(profile)
    weights = layers * sum(linear.in_features * linear.out_features for linear in spec.linears)
    operations = 2 * weights * tokens + 2 * spec.vocab_size * spec.hidden_size * trained_tokens
    moved = float(train_step.DTYPE_BYTES[training.compute_dtype] * layers * tokens)
    moved *= _widths_made(spec, training, MADE["idle"])
    moved += LOSS_BYTES / 2 * spec.vocab_size * trained_tokens
    return operations / (of_rate * rate) + moved / (of_bandwidth * profile.bandwidth_gb_per_second * 1e9)


def _widths_made(spec: ModelSpec, training: Training, made: tuple[float, ...]) -> float:
    """Elements for each token of the tensors that a layer makes."""
    query, key = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    widths = (spec.hidden_size, spec.intermediate_size, query, key, training.rank)
    return sum(share * width for share, width in zip(made, widths, strict=True))


def micro_batches(training: Training, work: train_step.Workload) -> float:
    """How many a step takes: short samples fill one up to the tokens of the longest."""
    at_once = training.micro_batch_size * max(1.0, training.max_length / work.longest)
    return max(1.0, training.share / at_once)


# what `count` reads of a plan, but for the layers that keep their activations
COUNTED = attrgetter(
    "compute_dtype", "base_precision", "tuner", "init", "adapter_at", "rank", "target_modules", "layers",
    "trained_layers", "active_layers", "embedding", "norm", "head", "micro_batch_size", "batch_size", "max_length",
    "checkpointing", "quantize_aware", "cached_layers", "stream_layers", "shard_base", "processes",
    "lisa_interval",
)  # fmt: skip


def count(spec: ModelSpec, training: Training, work: train_step.Workload, kept_layers: int) -> Counted:
    """Operations and bytes of one optimizer step; of layers whose outputs are kept none.

    Forward 2 operations per weight and token; backward 2 more for each layer that gradients cross, and 2 more where
    the weights train; recomputation one more forward pass of those layers. The head is counted for trained tokens only.
    4-bit weights are made dense for every product of every micro-batch.
    """
    layers, trained = float(spec.num_hidden_layers - training.cached_layers), float(len(training.trained_layers))
    crossed = spec.num_hidden_layers - float(min(training.trained_layers, default=spec.num_hidden_layers))
    if training.layers == "lisa":  # the lowest of n uniform draws out of L lies at (L - n) / (n + 1) on average
        crossed -= (trained - training.active_layers) / (training.active_layers + 1)
        trained = training.active_layers
    again = max(0.0, crossed - kept_layers) * training.checkpointing
    tokens, loss_tokens = training.share * work.longest, training.share * work.longest_trained
    splits = micro_batches(training, work)
    tokens += round(splits * training.prefix_tokens) if training.embeds else 0  # each reads the prompt once
    weights = sum(linear.in_features * linear.out_features for linear in spec.linears)
    parameters = train_step.trained_parameters(spec, training)
    full = not training.adapts
    operations = 2 * (layers + crossed + again + trained * full) * weights * tokens
    operations += 0 if full else 6 * parameters * tokens
    operations += 6 * spec.vocab_size * spec.hidden_size * loss_tokens

    itemsize = train_step.DTYPE_BYTES[training.compute_dtype]

    def made(shares: tuple[float, ...]) -> float:
        return _widths_made(spec, training, shares)

    per_token = (layers - crossed + again) * made(MADE["idle"]) + (crossed - trained) * made(MADE["through"])
    joined = training.form.joined if training.compute_dtype == "fp32" else ()
    per_token += trained * made(joined or training.form.made)
    moved = itemsize * per_token * tokens + LOSS_BYTES * spec.vocab_size * loss_tokens + OPTIMIZER_BYTES * parameters
    if training.base_precision == "nf4" or casts(spec, training):
        moved += itemsize * weights * (layers + crossed + again) * splits
    if training.quantize_aware is not None:
        moved += ROUNDED_BYTES * weights * (trained + trained * again / max(1.0, crossed)) * splits
    if full:
        moved += itemsize * parameters * splits
    put = 0.0
    if training.device == "cuda":
        put = splits * launches(spec, training, work, kept_layers)
        put += optimizer_launches(sum(train_step.trained_tensors(spec, training).values()))
    away = layers + again - (1 + training.checkpointing) * trained * full  # dense ones that train are in memory
    read = layer_file_bytes(spec, training) * away * splits if training.stream_layers else 0.0
    gathered = pass_bytes(spec, training, layers + crossed) * splits  # on the way back too, recomputed or not
    moved, files = moved + read + gathered, files_bytes(spec, training)
    return Counted(operations, moved, put, read, files, added_up(spec, training), gathered)
