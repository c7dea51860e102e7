"""What does each stage around the training step hold in the host's memory at its highest moment?

Closed forms like those of train_step.py. Coefficients come from the order in which each stage makes and drops its
arrays, read from its source and confirmed by measurement (bench/stages.py); the fitted numbers are those of whole
processes before they hold a model, and say so. Symbols as in train_step.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from edgeft.data.dataset import Lengths
from edgeft.errors import DoesNotFit
from edgeft.machines.limits import memory_limit
from edgeft.machines.profile import Profile
from edgeft.memory import train_step
from edgeft.memory.prompted import reading_bytes
from edgeft.memory.sharded import gathered_bytes, uncut
from edgeft.memory.streamed import PIECE_BYTES, passing_bytes, stored_as, window_bytes
from edgeft.memory.train_step import DTYPE_BYTES, NF4_BYTES, Phase, Term
from edgeft.models.headers import BLOCK_BYTES
from edgeft.models.spec import STORED_BYTES, ModelSpec
from edgeft.settings.job import Job, Training
from edgeft.settings.tuners import TUNERS
from edgeft.targets.build_bytes import Build
from edgeft.targets.matrices import linear_weights
from edgeft.targets.runtimes import runtime_of
from edgeft.targets.target import Target
from edgeft.units import MIB, show_bytes

# Resident bytes of processes that hold no model yet: Python 3.11, torch 2.13 (CPU build), transformers 5.23,
# onnxruntime-genai 0.18 on Linux. A probe of this machine replaces the first two.
TORCH_BYTES, TRAINING_BYTES = 245_000_000, 450_000_000
QUANTISE_IMPORTS_BYTES = 178_000_000  # beyond torch: transformers, bitsandbytes, accelerate
EXPORT_IMPORTS_BYTES = 14_000_000  # beyond torch, while the builder runs: transformers' tokenizer, pydantic, the plan
RUNTIME_LIBRARIES_BYTES = 53_000_000  # onnxruntime-genai's, onnx's and the export's, in a process that has the others
MATRIX_LIBRARY_BYTES = 4_000_000  # its buffers after the first products of a merge
# A process that uses a GPU keeps the driver's and libraries' own memory on the host as well. Not measured.
CUDA_HOST_BYTES = 1_000_000_000
NF4_FILE_BYTES = 2**29  # of one file of codes that a GPU made: what is kept in memory before it is written

# A merge computes in fp32, a block of rows at a time, so that a tensor of any size changes within a few times this
# much. Blocks that exist while one is computed: W0, the product or norm, Wft, their difference.
BLOCKS_AT_ONCE = 4


class Planned(Protocol):
    """What a stage's memory depends on besides its target: the model, the machine, and the job's rows."""

    @property
    def job(self) -> Job: ...

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def profile(self) -> Profile: ...

    @property
    def lengths(self) -> Lengths | None: ...

    @property
    def work(self) -> train_step.Workload: ...

    @property
    def data_bytes(self) -> int: ...


PARITY_PROMPTS = 64
CALIBRATION_ROWS, CALIBRATION_TOKENS = 128, 32_768  # at most, of the training data
CACHE_TOKENS = 8192  # of them, on which the scales of an 8-bit KV cache are found
CACHE_COPIES = 4  # fp32 forms of a batch's widest activations in one layer
CALIBRATION_IMPORTS_BYTES = 130_000_000  # beyond torch, once a model is loaded
CALIBRATION_BATCH = 1024  # padded tokens that go through a layer at once
CALIBRATION_COPIES = 7  # fp32 forms of a matrix and of H while its codes are chosen; with activations, at 135M
ROWS_SOLVED, EQUATIONS = 512, 2**22  # at most: outputs whose scales are found at once, coefficients of their equations
EQUATION_BYTES = 20  # of a coefficient: fp32, fp64, its factor
ROUNDING_BLOCKS = 5.3  # forms of a block in fp32 while it is rounded: itself, two in fp64, what its scales are made of
LOGIT_BYTES = 128 * 2**20  # of one form's log-probabilities: positions are thinned for large vocabularies


@dataclass(frozen=True)
class Processes:
    """Resident bytes of processes before they hold a model: one that imported torch, one ready to train."""

    torch_bytes: int
    training_bytes: int


class Estimated(Protocol):
    """A phase, or what a report says of one."""

    @property
    def terms(self) -> tuple[Term, ...]: ...
    @property
    def high_bytes(self) -> int: ...


def file_bytes(phase: Estimated) -> int:
    """Bytes of a phase that are pages of files: resident, but the system takes them back when it needs them."""
    return _pages(phase.terms)


def needed_bytes(phase: Estimated) -> int:
    """What a phase may need of a limit: its high estimate without such pages."""
    return phase.high_bytes - file_bytes(phase)


def over_by_pages(phase: Estimated, limit: int | None) -> bool:
    """Whether the high estimate is above a limit by pages of weight files alone."""
    return limit is not None and needed_bytes(phase) <= limit < phase.high_bytes


def _pages(terms: Iterable[Term]) -> int:
    return sum(term.bytes for term in terms if term.name == "weight file")


def check_host(name: str, need_bytes: int) -> None:
    """Raise DoesNotFit when this process can have less than a stage needs at least."""
    have = memory_limit()
    if need_bytes > have.bytes:
        problem = f"needs {show_bytes(need_bytes)}, this process can have {show_bytes(have.bytes)} ({have.reason})"
        raise DoesNotFit(name, problem, "copy the folder to a machine with more memory and run the stage there")


def processes(profile: Profile) -> Processes:
    """What processes hold before a model: as probed here, or else what was measured where edgeft was made."""
    if profile.probe is not None:
        return Processes(profile.probe.torch_rss_bytes, profile.probe.import_rss_bytes)
    return Processes(TORCH_BYTES, profile.training_baseline_bytes or TRAINING_BYTES)


def stage(
    name: str, where: Literal["device", "host", "target"], terms: list[Term], spec: ModelSpec, *, margins: int = 1
) -> Phase:
    """A phase with its estimates: 5% and 16 MiB around what is expected, 15% for families approximated by a Llama's.

    `margins` widens the share. Pages of a file have none: they are its bytes.
    """
    expected = sum(term.bytes for term in terms)
    margin = int(margins * (0.05 if spec.exact else 0.15) * (expected - _pages(terms))) + 16 * MIB
    return Phase(
        name=name,
        where=where,
        terms=tuple(term for term in terms if term.bytes),
        low_bytes=max(0, expected - margin),
        expected_bytes=expected,
        high_bytes=expected + margin,
    )


def file_term(spec: ModelSpec) -> Term:
    """Weights that are read through the page cache, see `file_bytes`."""
    return Term(name="weight file", bytes=spec.stored_bytes, formula=f"pages of the file, {spec.dtype}")


def process_term(count: int, what: str) -> Term:
    return Term(name="process", bytes=count, formula=what)


def quantise(spec: ModelSpec, training: Training, has: Processes, data_bytes: int) -> Phase:
    """A base made NF4 before training, tensor by tensor: by a GPU in the training process, by a CPU in one beside it.

    A model that is put together from its files is made whole, in the process beside.
    """
    codes = int(linear_weights(spec) * NF4_BYTES)
    largest = max(spec.vocab_size * spec.hidden_size, *(each.in_features * each.out_features for each in spec.linears))
    one_by_one = [
        Term(name="NF4 codes", bytes=min(codes, NF4_FILE_BYTES), formula="one file of them at a time"),
        Term(name="one tensor", bytes=largest * STORED_BYTES.get(spec.dtype, 4),
             formula=f"the largest, {largest} weights in {spec.dtype}"),
    ]  # fmt: skip
    if training.device == "cuda" and not spec.stacked:
        return stage("quantise", "host", [
            process_term(has.training_bytes + CUDA_HOST_BYTES, "Python, torch, CUDA's libraries: not measured"),
            Term(name="data", bytes=data_bytes, formula="samples as arrays of ids, the tokenizer"), *one_by_one,
        ], spec)  # fmt: skip
    whole = Term(name="NF4 codes", bytes=codes, formula=f"{linear_weights(spec)} weights x {NF4_BYTES:.4f} B")
    return stage("quantise", "host", [
        process_term(has.torch_bytes + QUANTISE_IMPORTS_BYTES, "Python, torch, transformers, bitsandbytes"),
        Term(name="waiting", bytes=has.training_bytes + data_bytes, formula="training itself, its data and tokenizer"),
        file_term(spec), *([whole] if spec.stacked else one_by_one),
    ], spec)  # fmt: skip


def host_load(spec: ModelSpec, training: Training, has: Processes) -> Phase:
    """The host's share of loading a base onto a GPU: a dense one is made there first, NF4 goes over piece by piece.

    So does one of which each process has a part, and all else of one whose layers stay in their files.
    """
    terms = [process_term(has.training_bytes + CUDA_HOST_BYTES, "Python, torch, CUDA's libraries: not measured")]
    if training.base_precision == "nf4" or training.shard_base or training.stream_layers:
        terms += _passing(spec, training)
        file, table = train_step.weight_bytes(spec, uncut(training)), spec.vocab_size * spec.hidden_size
        one = Term(
            name="one tensor", bytes=table * DTYPE_BYTES[training.compute_dtype], formula=f"the largest, {table}"
        )
        terms.append(Term(name="weight file", bytes=file, formula="pages of the file") if spec.stacked else one)
    else:
        # tensors of the file's own dtype stay mapped from it; a cast makes new ones
        same = stored_as(training) == spec.dtype
        dense = 0 if same else spec.total_parameters * DTYPE_BYTES[training.base_precision]
        terms += [file_term(spec), Term(name="weights", bytes=dense, formula=f"cast to {training.base_precision}")]
    return stage("load", "host", terms, spec)


def host_train(spec: ModelSpec, training: Training, has: Processes, data_bytes: int) -> Phase:
    """The host's share of training on a GPU: the process, the data, and optimizer states that are paged to it."""
    trained = max(train_step.trained_parameters(spec, worst) for worst in train_step.worst_sets(spec, training))
    paged = int(trained * train_step.ADAM8_BYTES) if training.optimizer == "paged_adamw8bit" else 0
    return stage("train", "host", [
        process_term(has.training_bytes + CUDA_HOST_BYTES, "Python, torch, CUDA's libraries: not measured"),
        Term(name="data", bytes=data_bytes, formula="samples as arrays of ids, the tokenizer"),
        Term(name="paged states", bytes=paged, formula=f"{trained} parameters, {training.optimizer}"),
        *_passing(spec, training),
    ], spec)  # fmt: skip


def _passing(spec: ModelSpec, training: Training) -> list[Term]:
    """What layers in files take of the host on their way to a GPU."""
    formula = f"2 pinned buffers of {show_bytes(PIECE_BYTES)}, pages that are read"
    found = passing_bytes(spec, training)
    return [Term(name="streamed layers", bytes=found, formula=formula)] if found else []


def resume(spec: ModelSpec, training: Training, has: Processes, data_bytes: int) -> Phase:
    """Going on from a training checkpoint: parameters are read one at a time into place, what becomes the optimizer's
    states is read whole. Writing one copies nothing (at most a tensor)."""
    trained = train_step.trained_parameters(spec, training)
    sets = train_step.worst_sets(spec, training)
    state = max(train_step.optimizer_bytes(spec, one) for one in sets)
    largest = 4 * max((size for one in sets for size in train_step.trained_tensors(spec, one)), default=0)
    terms = [
        process_term(has.training_bytes, "Python, torch, transformers, the matrix library's buffers"),
        Term(name="data", bytes=data_bytes, formula="samples as arrays of ids, the tokenizer"),
        Term(name="optimizer states", bytes=state, formula=f"{training.optimizer}, read whole"),
        Term(name="one tensor", bytes=largest, formula="the largest that trains, read into place"),
    ]
    if training.device == "cpu":
        adapters, dense = train_step.adapter_bytes(spec, training), train_step.worst_dense_bytes(spec, training)
        weights = train_step.weight_bytes(spec, training) + window_bytes(spec, training)
        weights += gathered_bytes(spec, training)
        terms += [
            Term(name="weights", bytes=weights, formula=f"{spec.total_parameters} in {training.base_precision}"),
            Term(name="adapters", bytes=adapters, formula=f"{trained} x 4 B"),
            Term(name="dense layers", bytes=dense, formula="layers in fp32 that train now"),
        ]
    elif training.device == "cuda":
        terms.append(Term(name="CUDA", bytes=CUDA_HOST_BYTES, formula="its libraries on the host: not measured"))
    return stage("resume", "host", terms, spec)


def merge_bytes(elements: int, itemsize: int, *, changed: bool, factor_bytes: int = 0) -> int:
    """Bytes that merging one tensor holds at its highest: itself as stored and, where it changes, blocks and factors.

    `factor_bytes`: an adapter's factors in fp32, which a change needs as a whole.
    """
    blocks = min(BLOCKS_AT_ONCE * BLOCK_BYTES, BLOCKS_AT_ONCE * 4 * elements) + factor_bytes
    return elements * itemsize + (blocks if changed else 0)


def merge(spec: ModelSpec, training: Training, has: Processes) -> Phase:
    """W0 + a (Wft - W0), tensor by tensor: the tensor that needs most, changed or not.

    A soft prompt is read by the base, a layer in memory at a time.
    """
    if training.embeds:
        return stage("merge", "host", [
            process_term(has.training_bytes, "Python, torch, transformers, the matrix library's buffers"),
            file_term(spec),
            Term(name="one layer", bytes=reading_bytes(spec), formula="and tied tables, in fp32")], spec)  # fmt: skip
    itemsize = STORED_BYTES.get(spec.dtype, 4)
    lora, sizes, beside = training.adapts, TUNERS[training.tuner].sizes, training.form.beside
    adapted = {linear.name for linear in train_step.targets(spec, training)}
    tensors = []
    for linear in spec.linears:
        shape = linear.in_features, linear.out_features, training.rank  # an adapter's factors, as read and scaled
        elements = sum(sizes(*shape, linear.role == "mlp_out")) + beside(*shape)
        factors = 8 * elements if linear.name in adapted and training.folds else 0
        count = linear.in_features * linear.out_features
        tensors.append((count, merge_bytes(count, itemsize, changed=not lora or bool(factors), factor_bytes=factors)))
    table = spec.vocab_size * spec.hidden_size
    tensors.append((table, merge_bytes(table, itemsize, changed=not lora and training.embedding != "off")))
    count, most = max(tensors, key=lambda tensor: tensor[1])
    return stage("merge", "host", [
        process_term(has.torch_bytes + MATRIX_LIBRARY_BYTES, "Python, torch, the matrix library's buffers"),
        Term(name="largest tensor", bytes=count * itemsize, formula=f"{count} x {itemsize} B"),
        Term(name="blocks", bytes=most - count * itemsize, formula="fp32 forms of some rows, an adapter's factors"),
    ], spec)  # fmt: skip


def process_bytes(phase: Phase) -> int:
    """What a stage's own process holds before it has a model."""
    return sum(term.bytes for term in phase.terms if term.name == "process")


def build(planned: Planned, target: Target, computed_bytes: int = 0) -> Phase:
    """What makes the bundle, beside the waiting export, as `targets.build_bytes` has it.

    `computed_bytes`: what the process of that export holds where it has computed before, to choose its target.
    """
    spec, has, runtime = planned.spec, processes(planned.profile), runtime_of(target)
    waiting = max(computed_bytes, has.torch_bytes + EXPORT_IMPORTS_BYTES + planned.data_bytes)
    parts = runtime.build_parts(Build(spec, target, has.torch_bytes))
    terms = [Term(name=part.name, bytes=part.bytes, formula=part.formula) for part in parts]
    process = process_term(waiting, "the export itself, its data and tokenizer")
    return stage("export: build", "host", [process, *terms], spec, margins=runtime.build_margins)


def calibrate_phases(planned: Planned, target: Target) -> tuple[Phase, ...]:
    """Choosing a target's codes, input weights or cache's scales on training rows, layer by layer; none for others.

    Highest while rows are looked up in the embedding, or in the matrices whose codes take most: H with its factors,
    weights of one input with their transpose, codes and decoded form; else in one layer's activations. Weights
    that were read stay pages of their file.
    """
    coded = target.calibration == "gptq"
    if target.calibration == "none" and not target.has_cache_scales:
        return ()
    spec, lengths = planned.spec, planned.lengths
    mean = lengths.mean if lengths else planned.work.longest
    tokens = min(CALIBRATION_TOKENS if target.calibration != "none" else CACHE_TOKENS, int(CALIBRATION_ROWS * mean))
    widest = max(linear.in_features for linear in spec.linears)
    largest = max(2 * linear.in_features * linear.out_features for linear in spec.linears)
    working = 4 * CACHE_COPIES * CALIBRATION_BATCH * widest
    if coded:
        solved = min(ROWS_SOLVED * (widest // 32) ** 2, EQUATIONS)
        working = 4 * CALIBRATION_COPIES * (widest**2 + largest) + EQUATION_BYTES * solved
    layer = 4 * (linear_weights(spec) // spec.num_hidden_layers)
    table = spec.vocab_size * spec.hidden_size
    looking = [Term(name="embedding", bytes=4 * table, formula=f"{table} x 4 B")]
    what = f"H of {widest} inputs, {largest // 2} codes" if coded else f"{CALIBRATION_BATCH} tokens x {widest}"
    walking = [Term(name="one layer", bytes=layer + working, formula=f"fp32, {what}")]
    process = processes(planned.profile).torch_bytes + CALIBRATION_IMPORTS_BYTES
    found = stage("export: calibrate", "host", [
        process_term(process, "Python, torch, transformers, the matrix library's buffers"),
        Term(name="data", bytes=planned.data_bytes, formula="samples as ids"),
        file_term(spec),
        Term(name="rows", bytes=4 * tokens * spec.hidden_size, formula=f"{tokens} tokens x {spec.hidden_size} x 4 B"),
        *max(looking, walking, key=lambda terms: sum(term.bytes for term in terms)),
    ], spec)  # fmt: skip
    return (found,)
