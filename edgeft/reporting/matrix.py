"""Which of these models can be fine-tuned on which machines and shipped to which devices, and how?"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from edgeft.documents import Artifact, Strict, versions
from edgeft.errors import BadInput, DoesNotFit, MissingExtra
from edgeft.machines.extras import installed
from edgeft.machines.profile import Profile, detect, list_profiles, load_profile
from edgeft.models.config_file import near_model
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.planning.expected import expected, likely
from edgeft.planning.plan import Plan, make_plan
from edgeft.planning.rows_read import DEFAULT_LENGTH
from edgeft.planning.stage_checks import run_bundle
from edgeft.progress import Progress, silent
from edgeft.settings.job import AUTO, Job, make_job, parse_kv_bits
from edgeft.settings.tuners import TUNERS
from edgeft.targets.footprint import SMALLEST_CONTEXT, LimitedBy, bundle_weights, choose_cache, choose_context, predict
from edgeft.targets.runtimes import cannot_build
from edgeft.targets.target import Target, candidates

# What a plan keeps of the best there is: "full" every layer over a 16- or 32-bit base, "4-bit" every layer over a 4-bit
# base, "reduced" fewer layers or a lower rank than the best candidate's, "none" that it does not fit.
Grade = Literal["full", "4-bit", "reduced", "none"]

WHOLE = 0.01  # share of a layer outside its projections and norms that still counts as none


class TrainingCell(Strict):
    """How one model is fine-tuned on one machine; without a plan `problem` says why, and `need_bytes` what it took."""

    machine: str
    grade: Grade
    method: str = Field(default="", description="NF4 LoRA r64, all 32 layers")
    base_precision: str = ""
    rank: int = Field(default=0, description="0: every weight trains")
    trained_layers: int = 0
    micro_batch_size: int = 0
    checkpointing: bool = False
    max_length: int = Field(default=0, description="tokens of the longest sample planned for")
    need_bytes: int | None = Field(description="least memory at this quality; of the smallest candidate when none fits")
    uses_bytes: int | None = Field(default=None, description="of the plan, the fastest way of that quality")
    budget_bytes: int
    seconds_per_million_tokens: float | None = Field(default=None, description="padded tokens; an estimate")
    seconds: float | None = Field(default=None, description="of training on the rows that are assumed; an estimate")
    gave_up: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = Field(
        default=(), description="later stages that need more memory than the machine's host has"
    )
    problem: str = ""
    hint: str = ""
    fits_at_tokens: int | None = Field(
        default=None, description="samples of this length would fit, where longer ones do not"
    )

    @property
    def fits(self) -> bool:
        return self.grade != "none"


class DeviceCell(Strict):
    """How one model runs on one device as a bundle of the target; without room for it `problem` says why."""

    machine: str
    fits: bool
    context_tokens: int | None = Field(default=None, description="the longest that model, target and memory allow")
    kv_bits: int | None = Field(default=None, description="of the cache, where they are not the runtime's own")
    limited_by: LimitedBy | None = None
    need_bytes: int | None = Field(
        default=None, description="of that context, or of the smallest one when nothing fits"
    )
    budget_bytes: int
    high_bytes: int | None = Field(
        default=None, description="high estimate of what `need_bytes` is the expected one of"
    )
    target: str = Field(default="", description="what it runs; the target that is expected, where the export chooses")
    weights_bytes: int | None = Field(default=None, description="size of the weights on disk")
    tokens_per_second_bound: float | None = Field(
        default=None, description="bandwidth / bytes read per token: never reached"
    )
    problem: str = ""

    @property
    def tight(self) -> bool:
        """Whether the high estimate is more than the device has."""
        return self.fits and (self.high_bytes or 0) > self.budget_bytes


class ModelRow(Strict):
    """One model: its shape, and a cell for each machine. `problem`: the config cannot be read; then without cells."""

    name: str
    parameters: int | None
    architecture: str = ""
    num_hidden_layers: int = 0
    hidden_size: int = 0
    vocab_size: int = 0
    approximate: str = Field(default="", description="why the prediction is rougher than for other models")
    training: tuple[TrainingCell, ...] = ()
    devices: tuple[DeviceCell, ...] = ()
    problem: str = ""


class Matrix(Artifact):
    """matrix.json: every model on every machine; machines by memory, models by parameters."""

    kind: Literal["matrix"] = "matrix"
    max_length: int = Field(description="tokens of the samples that training is planned for")
    settings: dict[str, str] = Field(description="what was pinned, as for edgeft plan --set")
    target: str = Field(description="what is shipped: a target, or auto: the smallest that keeps the fine-tune")
    training_machines: tuple[Profile, ...]
    devices: tuple[Profile, ...]
    models: tuple[ModelRow, ...]


def find_all(folders: str) -> list[tuple[str, str]]:
    """(name, folder) of every model below one folder or several, `a,b,c`. Raises BadInput where one holds none."""
    if Path(folders).exists() or "," not in folders:
        return find_models(Path(folders))
    return [each for folder in folders.split(",") for each in find_models(Path(folder.strip()))]


def find_models(folder: Path) -> list[tuple[str, str]]:
    """(name, folder) of every model below `folder`, itself included. Raises BadInput when there is none."""
    found = sorted(_holding("config.json", folder))
    if not found:
        problem = "holds no config.json" if folder.is_dir() else "no such folder"
        hint = "give a folder of model folders, as examples/configs is one"
        raise BadInput(folder, problem, (not folder.is_dir() and near_model(str(folder))) or hint)
    return [(path.relative_to(folder).as_posix() if path != folder else folder.name, str(path)) for path in found]


def _holding(name: str, folder: Path) -> Iterator[Path]:
    """The folders below one, itself included, that hold a file of this name; links are followed, each place once."""
    seen = set()
    for place, below, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            below.clear()
        elif name in files:
            yield Path(place)
        seen.add(real)


def find_profiles(names: str, option: str = "--on") -> list[Profile]:
    """The profiles of `a,b,file.toml`, or every shipped one of `all`, with what they leave to be detected filled in.

    `all` leaves out this machine where it cannot be measured, without torch.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise BadInput(option, f"names no profile: {names!r}", "give all, or names as in t4,l4-24gb")
    if wanted != ["all"]:
        return [detect(load_profile(name)) for name in dict.fromkeys(wanted)]
    found = []
    for profile in list_profiles():
        with contextlib.suppress(MissingExtra):
            found.append(detect(profile))
    return found


def make_matrix(
    models: Sequence[tuple[str, str]],
    profiles: Sequence[Profile],
    *,
    devices: Sequence[Profile] | None = None,
    device: str | None = None,
    target: str = AUTO,
    settings: dict[str, str] | None = None,
    workers: int = 1,
    progress: Progress = silent,
) -> Matrix:
    """Every model of (name, folder) planned on every profile: for training, as a device, or both, as its roles say.

    With `devices`, those are the devices; where one alone is asked for, `device` names it, and training is planned for
    it: what its bundle is decides what the export takes. Nothing that a model or a machine does stops it: what cannot
    be planned is a cell that says why. Raises BadInput for settings that no plan could take.
    """
    values = dict(settings or {})
    make_job(**{**values, "model": "any", "profile": "any"})
    tuner = TUNERS.get(values.get("tuner", ""))
    chosen = candidates(target, beside=tuner is not None and not tuner.folds)
    machines = sorted((p for p in profiles if "train" in p.roles), key=_by_memory)
    shipped_to = devices_of(profiles if devices is None else devices)
    pinned = values | {"target": target} | ({"device": device} if device is not None else {})
    arguments = [(name, folder, machines, shipped_to, chosen, pinned) for name, folder in models]
    rows: list[ModelRow] = []
    for row in _each(arguments, workers):
        rows.append(row)
        progress("plan", len(rows), len(models), {})
    return Matrix(
        versions=versions(),
        max_length=int(values.get("max_length") or DEFAULT_LENGTH),
        settings=values,
        target=target if len(chosen) > 1 else chosen[0].name,
        training_machines=tuple(machines),
        devices=tuple(shipped_to),
        models=tuple(sorted(rows, key=lambda row: (row.parameters is None, row.parameters or 0, row.name))),
    )


_Arguments = tuple[str, str, list[Profile], list[Profile], tuple[Target, ...], dict[str, str]]


def find_devices(names: str) -> list[Profile]:
    """The devices of `a,b`, or every shipped one of `all`. Raises BadInput for one that runs no bundle."""
    found = find_profiles(names, "--for")
    if wrong := [each.name for each in found if "deploy" not in each.roles and names.strip() != "all"]:
        hint = "name what runs the result, as raspberrypi5-8gb; --on is where it trains"
        raise BadInput("--for", f"{wrong[0]} is a training host, not a target device", hint)
    return devices_of(found)


def devices_of(profiles: Iterable[Profile]) -> list[Profile]:
    """Those that run a bundle, by their memory."""
    return sorted((each for each in profiles if "deploy" in each.roles), key=_by_memory)


def _by_memory(profile: Profile) -> tuple[int, str]:
    return profile.budget_bytes, profile.name


def _each(arguments: Sequence[_Arguments], workers: int) -> Iterable[ModelRow]:
    """The rows in order, as they are done: a model takes seconds on one core, and shares nothing with the next."""
    if workers <= 1 or len(arguments) < 4:
        yield from itertools.starmap(model_row, arguments)
        return
    import multiprocessing  # not in every Python: a browser's has no processes
    from concurrent.futures import ProcessPoolExecutor

    # spawned, not forked: torch may be loaded here, for a model that only transformers can count
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(arguments)), mp_context=context) as pool:
        yield from pool.map(model_row, *zip(*arguments, strict=True))


def model_row(
    name: str, folder: str, machines: list[Profile], devices: list[Profile], targets: tuple[Target, ...],
    settings: dict[str, str],
) -> ModelRow:  # fmt: skip
    """One model on every machine; `targets`: what its export may end in, as `candidates` gives them."""
    try:
        with installed("train"):  # torch counts what a family is that edgeft does not know
            spec = read_model_spec(folder)
    except BadInput as problem:
        return ModelRow(name=name, parameters=None, problem=problem.problem.splitlines()[0])
    except MissingExtra as problem:
        return ModelRow(name=name, parameters=None, problem=f"{problem.where} {problem.problem}: {problem.hint}")
    asked, target = parse_kv_bits(settings.get("kv_bits", AUTO)), expected(spec, likely(targets))[0]
    return ModelRow(
        name=name,
        parameters=spec.total_parameters,
        architecture=spec.architecture,
        num_hidden_layers=spec.num_hidden_layers,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        approximate=why_approximate(spec),
        training=tuple(training_cell(spec, profile, settings) for profile in machines),
        devices=tuple(device_cell(spec, target, profile, asked) for profile in devices),
    )


def outside_projections(spec: ModelSpec) -> float:
    """Share of a decoder layer's parameters in neither projections nor norms: experts kept as one tensor."""
    inside = sum(linear.parameters for linear in spec.linears) + spec.norm_parameters_per_layer
    return max(0.0, 1 - inside / spec.layer_parameters[0])


def why_approximate(spec: ModelSpec) -> str:
    """Why a model's prediction is rougher than for a known family, or ""."""
    if outside_projections(spec) > WHOLE:
        return "mixture of experts: experts stay in 16 bit without adapters, their time is guessed"
    if not spec.exact:
        return "approximated by a Llama of that shape, with a wider margin"
    return ""


def training_cell(spec: ModelSpec, profile: Profile, settings: dict[str, str]) -> TrainingCell:
    """What `edgeft plan` would answer for this model and machine."""
    budget = profile.budget_bytes
    try:
        with installed("train"):  # and simulates what has no closed form
            job = make_job(**{**settings, "model": spec.model, "profile": profile.name})
            plan = _plan_for_training(job, spec, profile)
    except DoesNotFit as problem:
        shorter = re.match(r"samples of at most (\d+) tokens would fit", problem.hint)
        return TrainingCell(
            machine=profile.name,
            grade="none",
            need_bytes=problem.need_bytes,
            budget_bytes=budget,
            problem="does not fit",
            hint=problem.hint,
            fits_at_tokens=int(shorter[1]) if shorter else None,
        )
    except (BadInput, MissingExtra) as problem:
        return TrainingCell(
            machine=profile.name,
            grade="none",
            need_bytes=None,
            budget_bytes=budget,
            problem=f"{problem.where}: {problem.problem}",
            hint=problem.hint,
        )
    training = plan.training
    return TrainingCell(
        machine=profile.name,
        grade=grade(plan),
        method=method(plan),
        base_precision=training.base_precision,
        rank=training.rank,
        trained_layers=training.active_layers or len(training.trained_layers),
        micro_batch_size=training.micro_batch_size,
        checkpointing=training.checkpointing,
        max_length=training.max_length,
        need_bytes=plan.need_bytes,
        uses_bytes=plan.peak_bytes,
        budget_bytes=plan.budget_bytes,
        seconds_per_million_tokens=plan.seconds_per_step * 1e6 / (training.batch_size * training.max_length),
        seconds=plan.seconds,
        gave_up=plan.gave_up,
        elsewhere=tuple(dict.fromkeys(name.partition(":")[0] for name in plan.stages.too_large())),
    )


def _plan_for_training(job: Job, spec: ModelSpec, profile: Profile) -> Plan:
    """The plan; where the device has no room for the bundle, that of training alone: the device has its own cell."""
    try:
        return make_plan(job, spec=spec, profile=profile)
    except DoesNotFit as problem:
        if job.device is None or problem.where != "bundle":
            raise
        return make_plan(job.model_copy(update={"device": None}), spec=spec, profile=profile)


def grade(plan: Plan) -> Grade:
    """What is left of the best candidate, the first of the frontier."""
    training, best = plan.training, plan.frontier[0]
    if training.rank < best.rank or (training.layers != "all" and plan.job.layers is None):
        return "reduced"
    return "4-bit" if training.base_precision == "nf4" else "full"


def method(plan: Plan) -> str:
    """`NF4 LoRA r64, all 32 layers`, `BF16 LoRA r64, 8 of 32 layers`, `FP32 full, LISA 4 of 32 layers`."""
    training, count = plan.training, plan.spec.num_hidden_layers
    way = TUNERS[training.tuner].short.format(rank=training.rank, tokens=training.prefix_tokens)
    layers = training.active_layers or len(training.trained_layers)
    which = "all" if layers == count else f"{'LISA ' if training.layers == 'lisa' else ''}{layers} of"
    streamed = ", from their files" if training.stream_layers else ""
    parts = f", in {training.processes} parts" if training.shard_base else ""
    return f"{training.base_precision.upper()} {way}, {which} {count} layers{streamed}{parts}"


def device_cell(spec: ModelSpec, target: Target, profile: Profile, asked: int | str = AUTO) -> DeviceCell:
    """What `edgeft export --for` would find: whether the bundle fits, its context, the bound of its speed."""
    budget = profile.budget_bytes
    refused = DeviceCell(machine=profile.name, fits=False, budget_bytes=budget)
    if outside_projections(spec) > WHOLE:
        return refused.model_copy(update={"problem": "bundles of mixtures of experts are not predicted"})
    if why := cannot_build(target, spec):
        return refused.model_copy(update={"problem": why})
    try:
        target = choose_cache(target, spec, asked, budget)
    except BadInput as problem:
        return refused.model_copy(update={"problem": problem.problem})
    weights = bundle_weights(spec, target)
    try:
        context, limited_by = choose_context(spec, target, weights, budget)
    except DoesNotFit:
        need = predict(spec, target, weights, SMALLEST_CONTEXT).memory_bytes
        short = {"problem": "does not fit", "need_bytes": need, "weights_bytes": weights.stored_bytes}
        return refused.model_copy(update=short)
    found = predict(spec, target, weights, context, budget, profile.bandwidth_gb_per_second * 1e9)
    bound = found.tokens_per_second_bound
    return DeviceCell(
        machine=profile.name,
        fits=True,
        context_tokens=context,
        kv_bits=target.kv_bits,
        limited_by=limited_by,
        target=target.name,
        need_bytes=found.memory_bytes,
        high_bytes=run_bundle(spec, target, weights, context).high_bytes,
        budget_bytes=budget,
        weights_bytes=weights.stored_bytes,
        tokens_per_second_bound=None if bound is None else float(f"{bound:.3g}"),
    )
