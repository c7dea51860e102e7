"""How much disk does each stage take, and is it there before hours are spent?"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from edgeft.documents import Strict, nearest_folder
from edgeft.errors import DoesNotFit
from edgeft.memory import train_step
from edgeft.memory.sharded import uncut
from edgeft.memory.streamed import learnt_pages_bytes
from edgeft.memory.train_step import Term
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import ENDS, Training
from edgeft.settings.tuners import TUNERS
from edgeft.targets.footprint import bundle_weights
from edgeft.targets.matrices import linear_weights
from edgeft.targets.runtimes import runtime_of
from edgeft.targets.target import Target
from edgeft.units import show_bytes

CHECKPOINTS_KEPT = 2
SIDE_FILES_BYTES = 40_000_000  # tokenizer, template, graph and configs; of tokenizers Gemma's is the largest, 33 MB
CODE_BYTES = 1.25  # of a weight's calibrated code: a byte, and scale and zero point of its block of 32
CODES_KEPT = 2  # sets of codes that choosing a target keeps at a time
TENSOR_BYTES = 1_200  # names, headers and padding of one trained parameter and its two states in a checkpoint


class Disk(Strict):
    """What one stage writes: `peak_bytes` while it runs, of which `kept_bytes` stay."""

    stage: str
    where: Literal["out", "cache"]
    terms: tuple[Term, ...]
    peak_bytes: int
    kept_bytes: int


def plan_disk(spec: ModelSpec, training: Training, targets: Sequence[Target]) -> tuple[Disk, ...]:
    """Every stage's disk. A stage writes beside what it replaces: an earlier result is not counted as room.

    Of several targets that the export chooses among, the one that takes most.
    """
    sets = CODES_KEPT if len(targets) > 1 else 1
    made = [export_disk(spec, target, sets, training) for target in targets]
    export = max(made, key=lambda each: each.peak_bytes)
    found = [train_disk(spec, training), merge_disk(spec), export]
    cached = [nf4_disk(spec, training)] if training.base_precision == "nf4" else []
    cached += [prefix_disk(spec, training)] if training.cached_layers else []
    return (*cached, *found)


def nf4_disk(spec: ModelSpec, training: Training) -> Disk:
    """The NF4 form of the base, kept in the cache: codes, and what is not quantised in the checkpoint's own dtype."""
    dense = train_step.weight_bytes(
        spec, uncut(training).model_copy(update={"base_precision": "nf4", "compute_dtype": "fp32"})
    )
    size = dense + SIDE_FILES_BYTES
    term = Term(name="NF4 base", bytes=size, formula=f"{spec.total_parameters} parameters, 4 bits where quantised")
    return Disk(stage="quantise", where="cache", terms=(term,), peak_bytes=size, kept_bytes=size)


def prefix_disk(spec: ModelSpec, training: Training) -> Disk:
    """The outputs of layers that do not train, of every row, kept in the cache."""
    dtype = training.compute_dtype if training.cached_dtype == "computed" else training.cached_dtype
    size = training.cached_tokens * spec.hidden_size * train_step.DTYPE_BYTES[dtype]
    formula = f"{training.cached_tokens} tokens x {spec.hidden_size} in {dtype}"
    term = Term(name="layer outputs", bytes=size, formula=formula)
    return Disk(stage="prefix", where="cache", terms=(term,), peak_bytes=size, kept_bytes=size)


def train_disk(spec: ModelSpec, training: Training) -> Disk:
    """Checkpoints (the older goes before another is written), then what was trained, in fp32.

    Layers that take turns in a base of another precision lie in files between them, which checkpoints and the result
    share: each once, and those that are replaced once more while a checkpoint holds them.
    """
    checkpoint = checkpoint_bytes(spec, training)
    result = 4 * learnt_parameters(spec, training)
    if not training.target_rank:  # whose adapters hold what is not written
        result = max(result, train_step.adapter_bytes(spec, training))
    what = f"{CHECKPOINTS_KEPT}, one of them being written: what trains and its states"
    terms = [Term(name="checkpoints", bytes=CHECKPOINTS_KEPT * checkpoint, formula=what)]
    if turns_in_files(training):
        one = 4 * active_parameters(spec, training)
        again = draws(training) > 1 if training.lisa_schedule != "cycle" else draws(training) * one > result
        result, replaced = min(result, draws(training) * one), CHECKPOINTS_KEPT * one * again
        terms += [
            Term(name="result", bytes=result, formula=f"{result // 4} x 4 B, files that checkpoints share"),
            Term(name="replaced", bytes=replaced, formula="older files of layers that had another turn"),
            _pages(spec, training),
        ]
        peak = sum(term.bytes for term in terms)
    else:
        terms += [Term(name="result", bytes=result, formula=f"{result // 4} x 4 B")]
        peak = checkpoint + max(checkpoint, result)
    if training.patience:
        terms.append(Term(name="best", bytes=2 * result, formula="of the best step, and of one that is better"))
        peak += 2 * result
    terms = [term for term in terms if term.bytes]
    return Disk(stage="train", where="out", terms=tuple(terms), peak_bytes=peak, kept_bytes=result)


def _pages(spec: ModelSpec, training: Training) -> Term:
    """What layers that stay in their files are read from once they had a turn, where that is not what they learnt."""
    layers = min(len(training.trained_layers), draws(training) * training.active_layers)
    formula = f"{layers} layers as the base is kept, which are read after their turn"
    return Term(name="pages", bytes=learnt_pages_bytes(spec, training, layers), formula=formula)


def turns_in_files(training: Training) -> bool:
    """Whether layers that train are kept in files while others have their turn (`engine.fp32_layers`)."""
    return training.densely or (training.layers == "lisa" and training.quantize_aware is not None
                                and not training.adapts)  # fmt: skip


def draws(training: Training) -> int:
    """How often units are drawn that train."""
    return -(-training.steps // training.lisa_interval) if training.layers == "lisa" and training.lisa_interval else 1


def active_parameters(spec: ModelSpec, training: Training) -> int:
    """Parameters that train at a time, of the largest units that may be drawn together."""
    return max(train_step.trained_parameters(spec, worst) for worst in train_step.worst_sets(spec, training))


def learnt_parameters(spec: ModelSpec, training: Training) -> int:
    """Parameters that have trained when a run ends: under LISA every unit that can be drawn."""
    on = {end: "on" for end in ENDS if getattr(training, end) == "rotate"}
    return train_step.trained_parameters(spec, training.model_copy(update=on))


def checkpoint_bytes(spec: ModelSpec, training: Training) -> int:
    """One training checkpoint: every parameter learnt so far, of units in files those that train, and its states.

    Under LISA only units that train then have states, unless the others' are parked beside them.
    """
    learnt, itemsize = learnt_parameters(spec, training), train_step.trained_itemsize(training)
    states = 2 * itemsize if training.optimizer == "adamw" else train_step.ADAM8_BYTES
    with_states = learnt
    if training.layers == "lisa" and training.lisa_state == "drop":
        with_states = active_parameters(spec, training)
    if turns_in_files(training):
        learnt = active_parameters(spec, training)
    layers = len(training.trained_layers) + len(ENDS)
    tensors = layers * (
        len(spec.linears) * len(TUNERS[training.tuner].sizes(1, 1, 1, False)) + spec.norms_per_layer + 2
    )
    # of AdaLoRA: how much each number matters
    beside = train_step.adapter_bytes(spec, training) - 4 * learnt if training.target_rank else 0
    return int(learnt * itemsize + with_states * states) + beside + TENSOR_BYTES * tensors * (2 if beside else 1)


def merge_disk(spec: ModelSpec, files_bytes: int | None = None) -> Disk:
    """A whole checkpoint in the base's own dtype; `files_bytes` is the size of its files where they are known."""
    size = files_bytes or spec.stored_bytes
    side = Term(name="side files", bytes=SIDE_FILES_BYTES, formula="tokenizer and configs, at most")
    terms = (Term(name="weights", bytes=size, formula=f"{spec.total_parameters} in {spec.dtype}"), side)
    return Disk(stage="merge", where="out", terms=terms, peak_bytes=size + side.bytes, kept_bytes=size + side.bytes)


def export_disk(spec: ModelSpec, target: Target, code_sets: int = 1, training: Training | None = None) -> Disk:
    """The bundle, and what its making writes and leaves out; `code_sets`: calibrated forms that lie there at a time.

    Of a `training` in turns beside layers in files, what the proof reads them from again.
    """
    stored, runtime = bundle_weights(spec, target).stored_bytes, runtime_of(target)
    first, what = runtime.scratch(spec, target, stored)
    if runtime.casts_half and target.weight_bits == 16:
        stored //= 2
    codes = 0 if target.calibration != "gptq" else int(code_sets * CODE_BYTES * linear_weights(spec))
    pages = [_pages(spec, training)] if training is not None else []
    more = sum(term.bytes for term in pages)
    terms = (
        Term(name="weights", bytes=stored, formula="as stored in the bundle"),
        Term(name="side files", bytes=SIDE_FILES_BYTES, formula="graph, tokenizer, runner, at most"),
        Term(name="first build", bytes=first, formula=what),
        *(
            [Term(name="codes", bytes=codes, formula=f"{code_sets} x {linear_weights(spec)} x {CODE_BYTES} B")]
            * bool(codes)
        ),
        *(pages * bool(more)),
    )
    kept = stored + SIDE_FILES_BYTES
    peak = kept + first + codes + more
    return Disk(stage="export", where="out", terms=terms, peak_bytes=peak, kept_bytes=kept)


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that `folder` is or will be on."""
    return shutil.disk_usage(nearest_folder(folder)).free


def require(disk: Disk, folder: Path, *, there: int = 0) -> None:
    """Raise DoesNotFit (exit 3) when a stage would fill the disk of `folder`; `there`: bytes of it already written."""
    free = free_bytes(folder)
    if disk.peak_bytes - there > free:
        largest = max(disk.terms, key=lambda term: term.bytes)
        problem = f"the {disk.stage} stage writes up to {show_bytes(disk.peak_bytes)} here ({largest.name} "
        problem += f"{show_bytes(largest.bytes)}), {show_bytes(free)} are free"
        hint = f"free {show_bytes(disk.peak_bytes - there - free)}, or choose another disk with --out (make: out=...)"
        if disk.where == "cache":
            hint = (
                f"free {show_bytes(disk.peak_bytes - there - free)}, or set XDG_CACHE_HOME to a folder on another disk"
            )
        raise DoesNotFit(folder, problem, hint)


def shortages(planned: tuple[Disk, ...], out: Path, cache: Path) -> list[str]:
    """A line when the disk of `out`, or of the cache, has less room than the stages need one after the other."""
    lines = []
    for where, folder in (("out", out), ("cache", cache)):
        need = total(disk for disk in planned if disk.where == where)
        free = free_bytes(folder)
        if need > free:
            lines.append(f"the stages need {show_bytes(need)} of disk in {folder}, {show_bytes(free)} are free")
    return lines


def total(stages: Iterable[Disk]) -> int:
    """Highest bytes on disk when the stages run one after the other and each leaves what it keeps."""
    kept = highest = 0
    for disk in stages:
        highest = max(highest, kept + disk.peak_bytes)
        kept += disk.kept_bytes
    return highest


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; 0 when there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
