"""Which way of training fits the budget and loses least? The only place that chooses; no torch is imported here.

Candidates are compared by expected quality, then by time. What quality costs is an order, not a measurement of your
task; its evidence: rank 64 rsLoRA 51.3, rank 32 47.8, full fine-tuning 47.2 points on GSM8K at equal data (PEFT's
MetaMathQA comparison on Llama-3.2-3B); NF4 with double quantisation follows 16-bit LoRA within half a point (QLoRA,
arXiv 2305.14314); 8-bit AdamW follows 32-bit (arXiv 2110.02861). Recomputing activations, a smaller micro-batch and
loss chunks change no result, only time: they are given up first.
"""

from __future__ import annotations

from pathlib import Path

from edgeft import memory
from edgeft.artifacts import Artifact, Strict, sha256_file, sha256_json, shipped_path, versions
from edgeft.candidates import candidates, check_job
from edgeft.data import Lengths, TextTokenizer, measure_lengths
from edgeft.errors import BadInput, DoesNotFit
from edgeft.model_spec import ModelSpec, read_model_spec
from edgeft.profile import Profile, detect, load_profile
from edgeft.settings import Job, Layers, Optimizer, Precision, Training, Tuner
from edgeft.units import show_bytes

HELD_OUT_SHARE = 0.05  # of the training rows, when no validation data is given
DEFAULT_LENGTH = 2048  # tokens planned for when no data is given
# Samples as Python lists: 44 bytes per token, 1,900 per row with its texts and what the heap loses. Measured
# on five files of 1,500 to 6,000 rows, 52k to 716k tokens.
DATA_BYTES = 3_000_000
# Share of a profile's matmul rate that a training step reaches. Of a CPU's measured rate: the example took 19% more
# seconds than this gives (LoRA) and 19% fewer (full fine-tuning). Of a datasheet's peak: a guess, not measured.
MEASURED_SHARE, DATASHEET_SHARE = 0.2, 0.35

# expected quality points given up, by the evidence above; only their order decides
NF4_COST, RANK_COST, LAYERS_COST, LISA_COST, ADAM8_COST = 0.5, {64: 0.0, 32: 2.0, 16: 3.0, 8: 4.0}, 12.0, 2.0, 0.1
# On a CPU fp32 comes first even where bf16 multiplies faster: for every length of batch oneDNN compiles its kernels
# anew and keeps them, which is slower than fp32 in short runs and grows beyond any plan.
CPU_HALF_COST = 0.2


class Candidate(Strict):
    """One way of training that was looked at; `missed_bytes` is how far above the budget its high estimate is."""

    tuner: Tuner
    base_precision: Precision
    rank: int
    layers: Layers
    trained: int
    micro_batch_size: int
    checkpointing: bool
    loss_chunk_tokens: int
    optimizer: Optimizer
    high_bytes: int
    missed_bytes: int


class Plan(Artifact):
    """plan.json: how a job runs on a profile, what that takes, and what else was considered."""

    request_sha256: str
    job: Job
    profile: Profile
    spec: ModelSpec
    lengths: Lengths | None
    training: Training
    budget_bytes: int
    peak_bytes: int
    phases: tuple[memory.Phase, ...]
    seconds_per_step: float
    seconds: float
    notes: tuple[str, ...]
    gave_up: tuple[str, ...]
    rejected: tuple[Candidate, ...]


def request_digest(job: Job, model_folder: Path | None) -> str:
    """One digest of what a plan is made from: settings, profile, model config, data. Equal: the plan is current."""
    profile = shipped_path("profile", "profiles", job.profile)
    files = [profile, *((model_folder / name) for name in ("config.json", "tokenizer.json") if model_folder)]
    files += [Path(source) for source in (job.data, job.valid, job.test) if source]
    return sha256_json(
        [
            job.model_dump(),
            versions().get("edgeft", ""),
            [sha256_file(f) if f.is_file() else None for f in files],
        ]
    )


def make_plan(job: Job) -> Plan:
    """The plan of a job. Raises BadInput for what cannot be planned, DoesNotFit (exit 3) when nothing fits."""
    profile = detect(load_profile(job.profile))
    if "train" not in profile.roles:
        hint = "plan on a training machine; the device is named at export: --device " + profile.name
        raise BadInput("profile", f"{profile.name} is a target device, not a training host", hint)
    spec = read_model_spec(job.model)
    folder = Path(job.model) if Path(job.model).is_dir() else None
    lengths, others, notes = _read_lengths(job, folder)
    length, length_note = _max_length(job, spec, lengths)
    notes += length_note
    budget = min(profile.budget_bytes, job.max_memory_bytes or profile.budget_bytes)
    steps = _steps(job, lengths)
    data_bytes = DATA_BYTES + sum(44 * entry.tokens + 1900 * entry.rows for entry in others) if others else 0
    work = memory.Workload(length, min(length, lengths.longest_trained if lengths else length))
    if job.base_precision not in (None, "nf4") and not profile.supports(str(job.base_precision)):
        hint = "use one of " + ", ".join([*profile.dtypes, "nf4"])
        raise BadInput("base_precision", f"{profile.name} does not compute {job.base_precision} at full rate", hint)
    check_job(job, spec)
    looked_at: list[tuple[tuple[float, float], Training, tuple[memory.Phase, ...], int]] = []
    for training in candidates(job, profile, spec, length, steps):
        found = memory.phases(
            spec, training, work, baseline_bytes=profile.training_baseline_bytes, data_bytes=data_bytes
        )
        peak = max(phase.high_bytes for phase in found)
        looked_at.append(
            ((_quality_cost(spec, training), _seconds(profile, spec, training, work)), training, found, peak)
        )
    if not looked_at:
        raise BadInput("settings", "no way of training is left by what was set", "leave base_precision to the planner")
    looked_at.sort(key=lambda entry: entry[0])
    chosen = next((entry for entry in looked_at if entry[3] <= budget), None)
    if chosen is None:
        raise _does_not_fit(job, profile, spec, work, looked_at, budget)
    (_, _), training, found, peak = chosen
    better = looked_at[: looked_at.index(chosen)]
    per_step = _seconds(profile, spec, training, _mean_work(work, lengths))
    return Plan(
        request_sha256=request_digest(job, folder),
        versions=versions(),
        job=job,
        profile=profile,
        spec=spec,
        lengths=lengths,
        training=training,
        budget_bytes=budget,
        peak_bytes=peak,
        phases=found,
        seconds_per_step=round(per_step, 4),
        seconds=round(per_step * training.steps, 1),
        notes=tuple(notes),
        gave_up=tuple(_gave_up(looked_at[0][1], looked_at[0][3], training, spec)) if better else (),
        rejected=tuple(_as_candidate(entry[1], entry[3], budget) for entry in better),
    )


def _read_lengths(job: Job, folder: Path | None) -> tuple[Lengths | None, list[Lengths], list[str]]:
    """(training data's lengths, those of every file, notes)."""
    if job.data is None:
        note = f"no data given: planned for samples of {job.max_length or DEFAULT_LENGTH} tokens, all trained"
        return None, [], [note]
    if folder is None:
        from edgeft.checkpoint import (
            local_folder,
        )  # a hub model: its tokenizer must be fetched to measure the data

        folder = local_folder(job.model)
    tokenizer = TextTokenizer(folder)
    every = [measure_lengths(source, tokenizer, job.max_length) for source in (job.data, job.valid, job.test) if source]
    notes = [f"{entry.path}: {entry.cut_rows} of {entry.rows} rows are cut to {job.max_length} tokens"
             for entry in every if entry.cut_rows]  # fmt: skip
    return every[0], every, notes


def _max_length(job: Job, spec: ModelSpec, lengths: Lengths | None) -> tuple[int, list[str]]:
    """The padded length to plan for: what the user set, the longest sample, or the model's limit where that is less."""
    limit = spec.max_position_embeddings
    if job.max_length is not None:
        if limit is not None and job.max_length > limit:
            raise BadInput(
                "max_length",
                f"{job.max_length} is more than the model's {limit} positions",
                f"at most {limit}",
            )
        return min(job.max_length, lengths.longest) if lengths else job.max_length, []
    longest = lengths.longest if lengths else DEFAULT_LENGTH
    if limit is not None and longest > limit:
        return limit, [f"samples reach {longest} tokens, the model has {limit} positions: longer ones are cut"]
    return longest, []


def _steps(job: Job, lengths: Lengths | None) -> int:
    """Optimizer steps."""
    rows = lengths.rows if lengths else 1000
    if lengths and job.valid is None:
        rows -= min(500, max(1, round(rows * HELD_OUT_SHARE)))
    steps = max(1, round(job.epochs * -(-max(1, rows) // job.batch_size)))
    return min(steps, job.max_steps or steps)


def _quality_cost(spec: ModelSpec, training: Training) -> float:
    cost = NF4_COST if training.base_precision == "nf4" else 0.0
    cost += CPU_HALF_COST if training.device == "cpu" and training.compute_dtype != "fp32" else 0.0
    cost += ADAM8_COST if training.optimizer != "adamw" else 0.0
    if training.layers == "lisa":  # every layer trains in its turn
        cost += LISA_COST * (1 - training.active_layers / len(training.trained_layers))
    cost += LAYERS_COST * (1 - len(training.trained_layers) / spec.num_hidden_layers)
    if training.rank:
        cost += min((abs(training.rank - rank), points) for rank, points in RANK_COST.items())[1]
    return cost


def _mean_work(work: memory.Workload, lengths: Lengths | None) -> memory.Workload:
    """The typical batch: samples of similar length share a batch, so the mean length is nearly what is computed."""
    if lengths is None:
        return work
    return memory.Workload(min(work.longest, round(lengths.mean) + 1), min(work.longest_trained, round(lengths.mean)))


def _seconds(profile: Profile, spec: ModelSpec, training: Training, work: memory.Workload) -> float:
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
    passes += 2 * crossed * training.checkpointing
    operations = float(passes) * per_layer * tokens
    operations += 6 * memory.trained_parameters(spec, training) * tokens if training.tuner == "lora" else 0
    operations += 6 * spec.vocab_size * spec.hidden_size * training.batch_size * work.longest_trained
    rate = profile.matmul_tflops.get(training.compute_dtype, min(profile.matmul_tflops.values())) * 1e12
    rate *= MEASURED_SHARE if profile.probe else DATASHEET_SHARE
    splits = training.batch_size / training.micro_batch_size
    slower = (1.3 if training.base_precision == "nf4" else 1.0) * (1 + 0.02 * (splits - 1))
    if training.optimizer == "paged_adamw8bit":
        slower *= 1.1
    return operations / rate * slower * (1.0 + 0.0001 * (1024 / training.loss_chunk_tokens))


def _as_candidate(training: Training, peak: int, budget: int) -> Candidate:
    shared = {name: getattr(training, name) for name in Candidate.model_fields if hasattr(training, name)}
    trained = training.active_layers or len(training.trained_layers)
    return Candidate(**shared, trained=trained, high_bytes=peak, missed_bytes=max(0, peak - budget))


def _gave_up(best: Training, best_bytes: int, chosen: Training, spec: ModelSpec) -> list[str]:
    """One line for each thing the budget took from the best candidate, worst first."""
    lines = []
    if chosen.tuner != best.tuner:
        lines.append("LoRA instead of full fine-tuning")
    if chosen.base_precision != best.base_precision:
        lines.append(f"base weights in {chosen.base_precision} instead of {best.base_precision}")
    if chosen.layers == "lisa" != best.layers:
        lines.append(f"LISA: {chosen.active_layers} of {len(chosen.trained_layers)} layers train at a time")
    elif len(chosen.trained_layers) != len(best.trained_layers):
        lines.append(f"{len(chosen.trained_layers)} of {spec.num_hidden_layers} layers train")
    if chosen.rank != best.rank and best.rank:
        lines.append(f"LoRA rank {chosen.rank} instead of {best.rank}")
    if chosen.optimizer != best.optimizer:
        lines.append(f"{chosen.optimizer} instead of {best.optimizer}")
    if chosen.checkpointing and not best.checkpointing:
        lines.append("activations are computed twice (checkpointing): about a third more time, same result")
    if chosen.micro_batch_size != best.micro_batch_size:
        lines.append(
            f"micro-batches of {chosen.micro_batch_size} instead of {best.micro_batch_size}: slower, same result"
        )
    if chosen.loss_chunk_tokens != best.loss_chunk_tokens:
        lines.append(
            f"loss in chunks of {chosen.loss_chunk_tokens} tokens instead of {best.loss_chunk_tokens}: same result"
        )
    return [*lines, f"the best candidate needs {show_bytes(best_bytes)}"] if lines else []


def _does_not_fit(
    job: Job, profile: Profile, spec: ModelSpec, work: memory.Workload,
    looked_at: list[tuple[tuple[float, float], Training, tuple[memory.Phase, ...], int]], budget: int,
) -> DoesNotFit:  # fmt: skip
    """The error (exit 3): the smallest candidate, its size, and the cheapest change that would fit."""
    _, smallest, found, need = min(looked_at, key=lambda entry: entry[3])
    highest = max(found, key=lambda phase: phase.high_bytes)
    terms = ", ".join(
        f"{term.name} {show_bytes(term.bytes)}" for term in sorted(highest.terms, key=lambda t: -t.bytes)[:3]
    )
    way = (
        f"{smallest.base_precision}, {'rank ' + str(smallest.rank) if smallest.rank else 'full'}, "
        f"{len(smallest.trained_layers)} layers, micro-batch {smallest.micro_batch_size}"
    )
    problem = (
        f"nothing fits {show_bytes(budget)}: the smallest of {len(looked_at)} candidates ({way}) needs "
        f"{show_bytes(need)} in phase {highest.name} ({terms})"
    )
    return DoesNotFit("plan", problem, _cheapest_change(job, profile, spec, work, smallest, budget, need))


def _cheapest_change(
    job: Job, profile: Profile, spec: ModelSpec, work: memory.Workload, smallest: Training, budget: int, need: int
) -> str:
    """What would fit, least painful first: shorter samples, a setting given back to the planner, more memory."""
    length = work.longest
    while length > 32:
        length = length * 3 // 4
        shorter = memory.Workload(length, min(length, work.longest_trained))
        cut = smallest.model_copy(update={"max_length": length})
        found = memory.phases(spec, cut, shorter, baseline_bytes=profile.training_baseline_bytes)
        if max(phase.high_bytes for phase in found) <= budget:
            now = f"(the longest has {work.longest})"
            return f"samples of at most {length} tokens would fit: --set max_length={length} {now}"
    for name in (
        "base_precision",
        "layers",
        "active_layers",
        "checkpointing",
        "micro_batch_size",
        "rank",
        "loss_chunk_tokens",
        "optimizer",
    ):
        if getattr(job, name) is None:
            continue
        try:
            make_plan(job.model_copy(update={name: None}))
        except (DoesNotFit, BadInput):
            continue
        return f"it fits when {name} is left to the planner: drop --set {name}={getattr(job, name)}"
    if job.tuner == "full":  # the user's own wish; what the planner chose itself has had its LoRA candidates
        try:
            make_plan(job.model_copy(update={"tuner": "lora"}))
            return "LoRA would fit: --set tuner=lora"
        except (DoesNotFit, BadInput):
            pass
    return f"a budget of {show_bytes(need)} would do (now {show_bytes(budget)}), or a smaller model"
