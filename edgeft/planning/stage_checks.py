"""Do the stages around a training step fit too: quantising, resuming, merging, exporting, and the bundle's device?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from pydantic import Field

from edgeft.documents import Strict
from edgeft.errors import BadInput, DoesNotFit
from edgeft.machines.limits import Gpu, Limit, memory_limit, usable_memory, visible_gpu
from edgeft.machines.profile import Profile, detect, load_profile
from edgeft.machines.runner import runner_module
from edgeft.memory.disk import Disk, plan_disk, total
from edgeft.memory.export_time import Timed, export_seconds, rehearsal_seconds
from edgeft.memory.proof import prove, streams
from edgeft.memory.stages import (
    build,
    calibrate_phases,
    host_load,
    host_train,
    merge,
    needed_bytes,
    process_bytes,
    processes,
    quantise,
    resume,
    stage,
)
from edgeft.memory.train_step import Phase, Term, beside
from edgeft.models.spec import ModelSpec
from edgeft.planning.costs import Question
from edgeft.planning.expected import expected, likely
from edgeft.planning.output_bias import as_merged
from edgeft.settings.job import AUTO, Training
from edgeft.targets.footprint import (
    LimitedBy,
    bundle_weights,
    choose_cache,
    choose_context,
    kv_cache_bytes_per_token,
    predict,
    with_kv_bits,
)
from edgeft.targets.matrices import Weights
from edgeft.targets.runtimes import cannot_build, runtime_of
from edgeft.targets.target import Target, candidates, instead, list_targets
from edgeft.units import GIB, MIB, show_bytes


class Stages(Strict):
    """What the stages around training take: a plan's forecast of everything after, and beside, the training step."""

    phases: tuple[Phase, ...]
    disk: tuple[Disk, ...]
    target: Target = Field(description="what is exported, or expected to be where the export chooses")
    context_tokens: int = Field(description="the bundle's context, as the export would choose it")
    context_limited_by: LimitedBy
    host_bytes: int | None = Field(description="what the host has for a stage; None: not known")
    target_bytes: int | None = Field(description="what the named device has for the bundle; None: none named")
    target_name: str = ""
    cannot_build: str = Field(default="", description="why the target's bundle of this model cannot be built, if so")
    data_bytes: int = Field(description="samples in memory, in the stages that read them")
    export: tuple[Timed, ...] = Field(
        default=(), description="by stage, where all rows are read; none for a host that is not known"
    )
    safer: str = Field(default="", description="what the device has room for, where it may have too little for this")
    rehearsal_seconds: float = Field(default=0.0, description="before the first step; 0 for a host that is not known")

    def limit_bytes(self, phase: Phase) -> int | None:
        """What a stage's memory must fit in, where that is known."""
        return self.target_bytes if phase.where == "target" else self.host_bytes

    def notes(self) -> list[str]:
        """A line for each stage that may need more than there is: of the host, pages of files apart, or the device."""
        lines = [
            f"{name} may need {show_bytes(need)}, the host has {show_bytes(self.host_bytes or 0)}: run it elsewhere"
            for name, need in self.too_large().items()
        ]
        return [*lines, *self.device_notes()]

    def device_notes(self) -> list[str]:
        """A line where the bundle may need more than its device has, and what would not."""
        if not (tight := self.tight_on_device()):
            return []
        expected = show_bytes(self.phases[-1].expected_bytes)
        return [f"the bundle may need {tight}, {expected} are expected: {self.safer or 'a smaller model is safer'}"]

    def tight_on_device(self) -> str:
        """`1.85 GiB of NAME's 1.82 GiB` where the bundle's high estimate is more than its device has; else nothing."""
        high = self.phases[-1].high_bytes
        if self.target_bytes is None or high <= self.target_bytes:
            return ""
        return f"{show_bytes(high)} of {self.target_name}'s {show_bytes(self.target_bytes)}"

    def too_large(self) -> dict[str, int]:
        """Bytes that may be needed by each stage for which the host has less; nothing where that is not known."""
        needs = {phase.name: needed_bytes(phase) for phase in self.phases if phase.where == "host"}
        return {name: need for name, need in needs.items() if self.host_bytes is not None and need > self.host_bytes}


def plan_stages(question: Question, training: Training) -> tuple[Stages, list[str]]:
    """Every stage of a job besides the training step itself, and a note for each that may not fit.

    Where the export chooses its target, host and disk are planned for whichever takes most of it.

    Raises DoesNotFit when the bundle would not fit the device that the job names, BadInput for an unknown one.
    """
    job, profile, spec, data_bytes = question.job, question.profile, question.spec, question.data_bytes
    device = target_device(job.device)
    device_bytes = device.budget_bytes if device else None
    named = candidates(job.target, beside=not training.folds)
    found = tuple(choose_cache(each, spec, job.kv_bits, device_bytes) for each in named)
    planned = likely(found)
    target, why = expected(spec, planned)
    has, gpu = processes(profile), visible_gpu() if profile.device == "cuda" else None
    together = question.budget_bytes * (1 if profile.device == "cuda" else training.neighbours)
    host_bytes = host_memory(profile, together, usable_memory() if gpu else None)
    weights, context, limited_by = on_device(spec, training, target, device_bytes)
    proven = [prove(question, training, each, host_bytes) for each in planned]
    # an export that chooses its target has computed before it builds
    computed = [process_bytes(each) if job.target == AUTO else 0 for each in proven]
    phases = [quantise(spec, training, has, data_bytes)] if training.base_precision == "nf4" else []
    if profile.device == "cuda":
        each = [host_load(spec, training, has), host_train(spec, training, has, data_bytes)]
        phases += [times(phase, training.neighbours) for phase in each]
    phases += [
        resume(spec, training, has, data_bytes),
        merge(spec, training, has),
        *_largest(calibrate_phases(question, each) for each in planned),
        *_largest((build(question, each, waiting),) for each, waiting in zip(planned, computed, strict=True)),
        *_largest((each,) for each in proven),
        run_bundle(spec, target, weights, context, training.prefix_tokens),
    ]
    stages = Stages(
        phases=tuple(phases),
        disk=plan_disk(spec, training, planned),
        target=target,
        context_tokens=context,
        context_limited_by=limited_by,
        data_bytes=data_bytes,
        host_bytes=host_bytes,
        target_bytes=device_bytes,
        target_name=device.name if device else "",
        cannot_build=cannot_build(target, as_merged(spec, training)),
        export=export_seconds(profile, spec, training, target, job.target, question.answered(training)),
        rehearsal_seconds=rehearsal_seconds(profile, spec, question.answered(training)),
    )
    if stages.tight_on_device():
        stages = stages.model_copy(update={"safer": safer(spec, training, target, device_bytes or 0)})
    said = [device.assumed] if device is not None and device.assumed else []
    said += [why] if why and not stages.cannot_build else []
    said += build_notes(spec, target, stages.cannot_build)
    said += cache_notes(spec, named[found.index(target)], target, context, device_bytes)
    if streams(question, training, host_bytes):
        said.append("export: prove reads the model a layer at a time, anew for each pass: less memory, more time")
    return stages, [
        *said, *stages.notes(), *disk_notes(profile, stages.disk),
        *machine_notes(profile, question.high_bytes(training), gpu),
    ]  # fmt: skip


def on_device(
    spec: ModelSpec, training: Training, target: Target, device_bytes: int | None
) -> tuple[Weights, int, LimitedBy]:
    """What a device holds of a bundle, its context, and what limits that. Raises DoesNotFit."""
    weights = bundle_weights(as_merged(spec, training), target, beside(spec, training))
    return weights, *choose_context(spec, target, weights, device_bytes, training.prefix_tokens)


def safer(spec: ModelSpec, training: Training, target: Target, device_bytes: int) -> str:
    """The first of a cache of 8 bits and the shipped targets that a device surely has room for; nothing without one."""
    shipped = [each for each in list_targets() if each.runtime == target.runtime]
    ways = [("--set kv_bits=8", target, 8), *((f"--target {each.name}", each, None) for each in shipped),
            *((f"--target {each.name} --set kv_bits=8", each, 8) for each in shipped)]  # fmt: skip
    for option, each, bits in ways:
        if cannot_build(each, spec) or (each.name == target.name and bits == target.kv_bits):
            continue
        with contextlib.suppress(BadInput, DoesNotFit):
            other = with_kv_bits(each, spec, bits) if bits else each
            weights, context, _ = on_device(spec, training, other, device_bytes)
            high = run_bundle(spec, other, weights, context, training.prefix_tokens).high_bytes
            if high <= device_bytes:
                return f"{option} takes {show_bytes(high)} at most"
    return ""


def build_notes(spec: ModelSpec, target: Target, problem: str) -> list[str]:
    """A line where a target's bundle cannot be built, with those that can."""
    able = " or ".join(f"--target {each.name}" for each in instead(target, spec))
    return [f"{target.name} cannot be built: {problem}" + (f"; {able} may do" if able else "")] if problem else []


def times(phase: Phase, processes: int) -> Phase:
    """A phase of the host's memory as all processes of a machine have it at once."""
    if processes == 1:
        return phase
    others = phase.expected_bytes * (processes - 1)
    more = Term(name="other processes", bytes=others, formula=f"{processes - 1} x {show_bytes(phase.expected_bytes)}")
    return phase.model_copy(update={
        "terms": (*phase.terms, more), "low_bytes": phase.low_bytes * processes,
        "expected_bytes": phase.expected_bytes * processes, "high_bytes": phase.high_bytes * processes,
    })  # fmt: skip


def cache_notes(
    spec: ModelSpec, named: Target, target: Target, context_tokens: int, device_bytes: int | None
) -> list[str]:
    """A line where keys and values are kept in 8 bits: what that gains on the device."""
    if target == named or target.kv_bits != 8 or device_bytes is None:
        return []
    try:
        own = choose_context(spec, named, bundle_weights(spec, named), device_bytes)[0]
    except DoesNotFit:
        return [f"KV cache of 8 bits: the device holds a context of {context_tokens} tokens, and none without"]
    if own < context_tokens:
        return [f"KV cache of 8 bits: the device holds a context of {context_tokens} tokens instead of one of {own}"]
    saved = context_tokens * (kv_cache_bytes_per_token(spec, named) - kv_cache_bytes_per_token(spec, target))
    return [
        f"KV cache of 8 bits: {show_bytes(saved)} less; the context has {context_tokens} tokens with it and without"
    ]


def _largest(phases: Iterable[tuple[Phase, ...]]) -> tuple[Phase, ...]:
    """Of one stage for several targets the phase that takes most; none where no target has that stage."""
    found = [phase for each in phases for phase in each]
    return (max(found, key=lambda phase: phase.high_bytes),) if found else ()


def disk_notes(profile: Profile, disk: Iterable[Disk]) -> list[str]:
    """A line where a machine that says its disk has too little of it for the stages."""
    need, gib = total(each for each in disk if each.where == "out"), profile.disk_gib
    if gib is None or need <= gib * GIB:
        return []
    return [f"the stages write up to {show_bytes(need)}, {profile.name} has {show_bytes(gib * GIB)} of disk"]


def machine_notes(profile: Profile, peak_bytes: int, gpu: Gpu | None) -> list[str]:
    """A line when this machine is of the profile's kind and has less than the plan needs: training would refuse."""
    if profile.device == "cuda":
        context = round(profile.runtime_memory_gib * GIB)
        here = Limit(max(0, gpu.free_bytes - context), f"free on {gpu.name} beside a CUDA context") if gpu else None
    else:
        here = memory_limit() if profile.device == "cpu" and not profile.memory_limit else None
    if here is None or here.bytes >= peak_bytes:
        return []
    fits = f"--max-memory {here.bytes // MIB}MiB plans for this one"
    return [
        f"this machine has {show_bytes(here.bytes)} ({here.reason}), the plan needs {show_bytes(peak_bytes)}: {fits}"
    ]


def target_device(device: str | None) -> Profile | None:
    """The profile of the device a bundle must fit, or None. Raises BadInput for a training-only host."""
    if device is None:
        return None
    profile = detect(load_profile(device))
    if "deploy" not in profile.roles:
        hint = f"--on {profile.name} is where it trains; --for names what runs the result, as --for raspberrypi5-8gb"
        raise BadInput("--for", f"{profile.name} is a training host, not a target device", hint)
    return profile


def run_bundle(spec: ModelSpec, target: Target, weights: Weights, context_tokens: int, before: int = 0) -> Phase:
    """`predict` as a phase on the target device, with that context, and a prefix of `before` tokens, in use."""
    found = predict(spec, target, weights, context_tokens, before=before)
    copies = found.weights_bytes - weights.stored_bytes
    runtime = runtime_of(target)
    one = "of every position of a pass" if runtime.every_position else "of the last token"
    if runtime.widened_proof:
        one = f"of the last {runner_module().LAST_POSITIONS} tokens, and the last"
    each = kv_cache_bytes_per_token(spec, target)
    cached = (f"({before} + {context_tokens})" if before else str(context_tokens)) + f" tokens x {each} B"
    if found.kv_cache_bytes < (before + context_tokens) * each:
        cached += f", a window of {spec.sliding_window} in some layers"
    formula = f"{spec.num_attention_heads} heads, one prefill pass x {context_tokens} tokens"
    scores = [Term(name="attention", bytes=found.scores_bytes, formula=formula)] if found.scores_bytes else []
    return stage("bundle", "target", [
        Term(name="weights", bytes=weights.stored_bytes, formula=f"{target.weight_bits} bits, head {target.head_bits}"),
        Term(name=runtime.copies, bytes=copies, formula=runtime.copied),
        Term(name="key-value cache", bytes=found.kv_cache_bytes, formula=cached),
        Term(name="logits", bytes=found.logits_bytes, formula=f"{one}, V = {spec.vocab_size}"),
        *scores,
        Term(name="runtime", bytes=found.runtime_bytes, formula=runtime.holds),
    ], spec)  # fmt: skip


def host_memory(profile: Profile, budget_bytes: int, here_bytes: int | None) -> int | None:
    """What the stages around training may hold on the host: a CPU's own budget, or a GPU host's main memory.

    `here_bytes` is what this process may have, where the profile's GPU is in this machine; None: not known.
    """
    if profile.device != "cuda":
        return budget_bytes
    if here_bytes is not None:
        return here_bytes
    return round(profile.host_memory_gib * GIB) if profile.host_memory_gib else None
