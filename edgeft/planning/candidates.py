"""Which ways of training are looked at? Every combination of what the user left open, none of what cannot work."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from edgeft.errors import BadInput
from edgeft.machines.profile import Profile
from edgeft.memory.train_step import Workload
from edgeft.models.families import overflows_fp16
from edgeft.models.spec import ModelSpec
from edgeft.planning import sharding, streaming
from edgeft.planning.early_stopping import cannot_keep, steps_between
from edgeft.planning.job_checks import (
    SMALL_PRECISIONS,
    form_of,
    untrainable,
)
from edgeft.planning.layer_choice import layer_choices
from edgeft.planning.prefix_cache import check_prefix, prefixes
from edgeft.planning.prefix_tuner import tokens_of
from edgeft.planning.projections import target_modules
from edgeft.planning.quantize_aware import exact_precisions, rounding_of
from edgeft.planning.rank_budget import target_rank
from edgeft.settings.job import ENDS, Job, Malloc, Optimizer, Precision, Rounding, Training, Tuner
from edgeft.settings.tuners import ADAPTERS, TUNERS, WEIGHTS, adapts

# Up to this many parameters full fine-tuning is looked at too: adapters save little memory there, and what was measured
# says which is better (`evidence.py`), or the faster wins. Above it, LoRA of high rank is not worse (the comparison
# named in costs.py) and far smaller.
SMALL_MODEL = 50_000_000
RANKS = (64, 32, 16, 8)
CHUNKS = (1024, 256, 64)
LORA_ALPHA = 16.0


def _tuners(job: Job, spec: ModelSpec) -> list[Tuner]:
    """LoRA, and full fine-tuning too where the model is so small that adapters save nothing."""
    if job.tuner is not None:
        return [job.tuner]
    if any(getattr(job, end) not in (None, "off") for end in ENDS):
        return [WEIGHTS]
    asked = job.rank is not None or job.lora_alpha is not None or job.target_modules is not None
    asked = asked or job.lora_plus != 1 or job.init != "random"
    pinned_lora = asked or job.base_precision in SMALL_PRECISIONS
    small = spec.total_parameters <= SMALL_MODEL and not spec.stacked
    return [WEIGHTS, ADAPTERS] if small and not pinned_lora else [ADAPTERS]


def _precisions(job: Job, profile: Profile, spec: ModelSpec, tuner: Tuner, layers: dict[str, Any]) -> list[Precision]:
    """Ways to keep the base, best first. A GPU computes in half precision, a CPU in fp32.

    What trains is fp32: full fine-tuning of all layers, and of the ends, wants the base so. Of some layers, those that
    train are fp32 beside a base of any precision.
    """
    if job.base_precision is not None:
        return [job.base_precision]
    found = _any_precision(profile, spec, tuner, layers)
    return exact_precisions(found, spec) if job.quantize_aware else found


def _any_precision(profile: Profile, spec: ModelSpec, tuner: Tuner, layers: dict[str, Any]) -> list[Precision]:
    half, on_cpu = _half(profile, spec), profile.device == "cpu"
    some_layers = layers["layers"] != "all"
    if not adapts(tuner) and (not some_layers or on_cpu or _trained_end(layers)):
        return ["fp32", "nf4"] if some_layers and on_cpu else ["fp32"]
    if on_cpu:
        return ["fp32", "bf16", "nf4"] if profile.supports("bf16") else ["fp32", "nf4"]
    return [half] if profile.device == "mps" else [half, "nf4"]  # bitsandbytes has no 4-bit kernels for Apple GPUs


def _half(profile: Profile, spec: ModelSpec) -> Literal["fp32", "bf16", "fp16"]:
    """The half precision that a GPU computes this model in; fp32 where it would have to be fp16 and that overflows."""
    return "bf16" if profile.supports("bf16") else "fp32" if overflows_fp16(spec.model_type) else "fp16"


def _trained_end(layers: dict[str, Any]) -> str | None:
    """The first end that trains, if any does."""
    return next((end for end in ENDS if layers.get(end, "off") != "off"), None)


def refusal(
    profile: Profile, tuner: Tuner, precision: Precision, compute: str, layers: dict[str, Any]
) -> BadInput | None:  # fmt: skip
    """Why a combination does not run, to be raised where nothing else is left; None where it runs."""
    end, some_layers = _trained_end(layers), layers["layers"] != "all"
    if precision == "nf4" and profile.device == "mps":
        return BadInput("base_precision", "bitsandbytes has no 4-bit kernels for Apple GPUs", "use bf16, fp16 or fp32")
    if not adapts(tuner) and not some_layers and precision != "fp32":
        return untrainable(precision)
    if not adapts(tuner) and end is not None and compute != "fp32":
        # an fp32 embedding or norm would make every activation fp32
        problem = f"trains in fp32, but this plan computes in {compute}"
        return BadInput(end, problem, f"leave {end} off, or base_precision to the planner")
    return None


class _Method(NamedTuple):
    """What trains, and beside which base: what a candidate's expected quality depends on."""

    tuner: Tuner
    layers: dict[str, Any]  # the fields of Training that say which layers and ends train
    precision: Precision
    rank: int
    compute: str


def candidates(
    job: Job, profile: Profile, spec: ModelSpec, work: Workload, steps: int, scores: Sequence[float] | None = None,
    rows_tokens: int = 0,
) -> Iterator[Training]:  # fmt: skip
    """Every combination of what the user left open; `scores`: one per layer, where the job's layer_score reads data.

    `rows_tokens`: of all rows that are trained on or scored, where they are known.

    Raises BadInput, with its reason, for a combination that was set and does not run on the profile.
    """
    optimizers = _optimizers(job, profile)
    methods = list(_methods(job, profile, spec, steps, scores))
    rounding = rounding_of(job, spec)
    executions = _executions(job, profile, spec, optimizers)
    refused: BadInput | None = None
    first: Training | None = None
    left = False
    for method in methods:
        if (reason := refusal(profile, method.tuner, method.precision, method.compute, method.layers)) is not None:
            refused = refused or reason
            continue
        first = _training(job, profile, spec, work, steps, method, rounding, executions[0])
        if (reason := cannot_keep(first)) is not None:
            refused = refused or reason
            continue
        cuts = [{}] if job.stream_layers or job.shard_base else prefixes(job, spec, first, rows_tokens)
        runs = sharding.executions(job, spec, first, streaming.executions(job, spec, first, executions))
        pages = method.layers["layers"] != "lisa"  # see pages_pile_up
        yield from (first.model_copy(update={**execution, **cut}) for cut in cuts for execution in runs
                    if pages or execution["optimizer"] != "paged_adamw8bit")  # fmt: skip
        left = left or bool(cuts and runs)
    if first is not None and not left:
        sharding.check_sharding(job, spec, first)
        streaming.check_streaming(job, spec, first)
        check_prefix(job, spec, first, rows_tokens)
    if refused is not None and not left:
        raise refused


def _optimizers(job: Job, profile: Profile) -> list[Optimizer]:
    """Optimizers that the machine runs. Raises BadInput where what was set, or the precision, is beyond it."""
    if job.base_precision not in (None, "nf4") and not profile.supports(str(job.base_precision)):
        hint = "use one of " + ", ".join([*profile.dtypes, "nf4"])
        raise BadInput("base_precision", f"{profile.name} does not compute {job.base_precision} at full rate", hint)
    found: list[Optimizer] = ["adamw"] if profile.device != "cuda" else ["adamw", "adamw8bit", "paged_adamw8bit"]
    if job.optimizer and job.optimizer not in found:
        problem = f"{job.optimizer} needs CUDA, {profile.name} is a {profile.device} profile"
        raise BadInput("optimizer", problem, "use adamw")
    return [job.optimizer] if job.optimizer else found


def _methods(
    job: Job, profile: Profile, spec: ModelSpec, steps: int, scores: Sequence[float] | None
) -> Iterator[_Method]:
    """What could train, whether or not it runs here."""
    for tuner in _tuners(job, spec):
        for layers in layer_choices(job, spec, tuner, steps, scores):
            for precision in _precisions(job, profile, spec, tuner, layers):
                compute = precision if precision != "nf4" else _compute_of_nf4(profile, spec)
                yield from (_Method(tuner, layers, precision, rank, compute) for rank in _ranks(job, spec, tuner))


def _ranks(job: Job, spec: ModelSpec, tuner: Tuner) -> list[int]:
    """Ranks of the adapters, best first; 0 of a tuner that has none. More than half the hidden size is no low rank."""
    if not TUNERS[tuner].ranked:
        return [0]
    most = max(min(RANKS[-1], spec.hidden_size), spec.hidden_size // 2)
    return [job.rank] if job.rank else [rank for rank in RANKS if rank <= most]


def _executions(job: Job, profile: Profile, spec: ModelSpec, optimizers: list[Optimizer]) -> list[dict[str, Any]]:
    """The fields of Training that say how a step is computed: they change memory and time, and nothing else."""
    share = -(-job.batch_size // job.processes)
    batches = [2**k for k in range(share.bit_length())][::-1]
    return [
        {"micro_batch_size": batch, "checkpointing": checkpointing, "kept_layers": kept, "loss_chunk_tokens": chunk,
         "optimizer": optimizer, "malloc": malloc}
        for batch, (checkpointing, kept), chunk, optimizer, malloc in itertools.product(
            [job.micro_batch_size] if job.micro_batch_size else batches,
            _recomputing(job, spec),
            [job.loss_chunk_tokens] if job.loss_chunk_tokens else CHUNKS,
            optimizers,
            _mallocs(job, profile),
        )
    ]  # fmt: skip


def _training(
    job: Job, profile: Profile, spec: ModelSpec, work: Workload, steps: int, method: _Method,
    rounding: Rounding | None, execution: dict[str, Any],
) -> Training:  # fmt: skip
    """One candidate: a method, executed so, and all that the job itself says."""
    row = TUNERS[method.tuner]
    return Training(
        device=profile.device,
        tuner=method.tuner,
        base_precision=method.precision,
        compute_dtype=method.compute,  # type: ignore[arg-type]
        rank=method.rank,
        target_rank=target_rank(job, row, method.rank),
        lora_alpha=(job.lora_alpha or LORA_ALPHA) if row.scaled else 0.0,
        lora_scale=job.lora_scale,
        lora_plus=job.lora_plus if row.faster else 1.0,
        init=job.init,
        adapter_at=job.adapter_at,
        prefix_tokens=tokens_of(job),
        target_modules=target_modules(spec, method.tuner, form_of(job, row), job.target_modules),
        **method.layers,
        **execution,
        batch_size=job.batch_size,
        processes=job.processes,
        machines=job.machines,
        max_length=work.longest,
        max_trained=work.longest_trained,
        learning_rate=job.learning_rate or default_learning_rate(spec, method.tuner),
        steps=steps,
        warmup_steps=max(1, round(job.warmup_fraction * steps)),
        weight_decay=job.weight_decay,
        max_grad_norm=job.max_grad_norm,
        seed=job.seed,
        checkpoint_steps=job.checkpoint_steps,
        eval_rows=job.eval_rows,
        patience=job.patience or 0,
        valid_steps=steps_between(job, steps),
        quantize_aware=rounding,
        stored_dtype=spec.dtype if rounding else "",
    )


def _recomputing(job: Job, spec: ModelSpec) -> list[tuple[bool, int]]:
    """(whether activations are recomputed, in how many topmost layers not); how many more keep theirs `planner` finds.

    The topmost layer's backward pass comes first: recomputing it saves nothing but at the moment of the loss.
    """
    if job.kept_layers is not None:
        if job.checkpointing is False:
            hint = "drop checkpointing=false"
            raise BadInput("kept_layers", "says which layers do not recompute, but none does", hint)
        if job.kept_layers > spec.num_hidden_layers:
            problem = f"{job.kept_layers} is more than the model's {spec.num_hidden_layers} layers"
            raise BadInput("kept_layers", problem, f"at most {spec.num_hidden_layers}")
        return [(True, job.kept_layers)]
    if job.checkpointing is not None:
        return [(job.checkpointing, 0)]
    return [(False, 0), (True, 0), *([(True, 1)] if spec.num_hidden_layers > 1 else [])]


def _mallocs(job: Job, profile: Profile) -> list[Malloc]:
    """Ways to keep freed memory, faster first. Tensors of a GPU are its own allocator's."""
    if job.malloc is not None:
        return [job.malloc]
    return ["fast", "tight"] if profile.device == "cpu" else ["tight"]


def _compute_of_nf4(profile: Profile, spec: ModelSpec) -> str:
    """What 4-bit weights are multiplied in: half precision on a GPU, fp32 on a CPU."""
    return "fp32" if profile.device == "cpu" else _half(profile, spec)


def default_learning_rate(spec: ModelSpec, tuner: Tuner) -> float:
    """LoRA: 2e-4 (2000 / h)^0.775; full fine-tuning: 0.075 / h, falling with the width as in muP (arXiv 2203.03466).

    The exponent is that of Schulman et al., "LoRA Without Regret", 2025. Both factors were chosen on the example's
    validation rows (bench/results/rates.json, three epochs, two seeds): full fine-tuning loses nothing between half of
    this rate and 0.1 / h, and 0.05 nats at 0.15 / h; LoRA is flat from a quarter of its rate to 1.4 times it.
    """
    return float(f"{TUNERS[tuner].rate(spec.hidden_size):.2g}")
