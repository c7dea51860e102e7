"""What does one form of a fine-tuned model say? As trained, on the original weights, merged: loaded, and observed."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from edgeft.data.dataset import Sample, TextTokenizer
from edgeft.data.grammar import HeldTo
from edgeft.data.scoring_groups import EVAL_TOKENS
from edgeft.engine.forms import adapted, form_of, restore
from edgeft.engine.fp32_layers import DenseTurns, piece_of
from edgeft.engine.grammar_scores import held_rows
from edgeft.engine.label_scores import label_numbers
from edgeft.engine.nf4_base import load_base
from edgeft.engine.quantized_layers import round_frozen, settle
from edgeft.engine.trainable import apply_tuner, make_lisa
from edgeft.engine.written import answer_text, written
from edgeft.exporting.artifact_answers import Artifact, along, answered
from edgeft.exporting.drawn_rows import Drawing
from edgeft.exporting.form import Form, joined
from edgeft.exporting.row_logits import CPU, row_logits, trained_at
from edgeft.machines import meter
from edgeft.memory.proof import PASS_POSITIONS, POSITIONS
from edgeft.memory.stages import LOGIT_BYTES, PARITY_PROMPTS
from edgeft.models.checkpoint import (
    CHANGED,
    DTYPES,
    Checkpoint,
    TensorFile,
    load_plain,
    local_folder,
    read_changed,
)  # fmt: skip
from edgeft.models.evaluate import answer_open, judge
from edgeft.models.layer_shares import Shares, layer_of
from edgeft.models.parts import Parts, find_parts
from edgeft.models.streamed import Load, alter
from edgeft.settings.job import Training
from edgeft.training.result import TrainResult

WHOLE = Shares()


class Observer:
    """Gathers a form row by row: which log-probabilities are kept, which are summed."""

    def __init__(self, rows: Sequence[Sample], tables: int = PARITY_PROMPTS) -> None:
        self.rows = rows
        self.losses, self.tokens = [0.0] * len(rows), [0] * len(rows)
        self.likely: list[list[int]] = [[] for _ in rows]
        self.tables: list[list[torch.Tensor]] = [[] for _ in rows[:tables]]
        self.written: dict[int, str] = {}

    def add(self, row: int, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """The next positions of a row: logits (n, V) and the tokens that follow."""
        found = torch.log_softmax(logits.float(), dim=-1)
        self.losses[row] -= float(found.gather(1, targets[:, None]).sum())
        self.likely[row] += found.argmax(dim=-1).tolist()
        if row < len(self.tables):
            most = max(1, LOGIT_BYTES // 4 // found.shape[-1] // len(self.tables))
            room = most - self.tokens[row]
            if room > 0:
                self.tables[row].append(found[:room].clone())
        self.tokens[row] += len(targets)

    def taker(self, row: int) -> Callable[[Any], None]:
        """What takes logits (n, V), as numpy has them, at positions of a row one behind the other.

        The first of them are those at the first trained one.
        """
        ids, at = self.rows[row].ids, trained_at(self.rows[row])
        place = at[0]

        def take(logits: Any) -> None:
            nonlocal place
            given, inside = torch.from_numpy(logits), [i for i in at if place <= i < place + len(logits)]
            for part in (inside[start : start + PASS_POSITIONS] for start in range(0, len(inside), PASS_POSITIONS)):
                self.add(row, given[[i - place for i in part]], torch.tensor([ids[i + 1] for i in part]))
            place += len(logits)

        return take

    def form(self, name: str, exact: Sequence[bool] = (), drawn: Sequence[int] = ()) -> Form:
        """All that was gathered."""
        parts = [part for row in self.tables for part in row]
        table = torch.cat(parts) if parts else torch.empty(0)
        return Form(name, table, tuple(self.losses), tuple(self.tokens), tuple(exact), self.written, tuple(drawn))


def observe_model(
    name: str, model: Any, rows: Sequence[Sample], tokenizer: TextTokenizer | None = None, *,
    compute: torch.dtype = torch.float32, group_tokens: int = EVAL_TOKENS, answers: slice | None = None,
    held_to: HeldTo = (), write: Sequence[int] = (), progress: Callable[[int, int], None] = lambda done, total: None,
    tables: int = PARITY_PROMPTS,
) -> Form:  # fmt: skip
    """One pass of a torch model over each row on the CPU; for the rows of `answers` also whether it answers exactly.

    Only what the likeliest tokens along the row's own answer leave open is generated, or found as `held_to` wants it.
    The answers to the rows numbered in `write` are written out whatever they are.
    """
    seen, parts = Observer(rows, tables), find_parts(model)
    asked = rows[answers] if answers is not None and tokenizer is not None else []
    held = held_rows(held_to, asked, tokenizer, model) if tokenizer is not None else None

    def look(number: int, logits: torch.Tensor, targets: torch.Tensor) -> None:
        if held is not None:
            held.along(rows[number], seen.tokens[number], logits)
        seen.add(number, logits, targets)
        progress(sum(count > 0 for count in seen.tokens), len(rows))

    for part in row_logits(model, parts, rows, compute, group_tokens):
        look(*part)
        del part  # or its logits stay beside all that follows
    if write and tokenizer is not None:
        found = written(
            model, parts, [rows[i] for i in write], tokenizer, held_to, device=CPU, compute=compute,
            chunk_tokens=POSITIONS, group_tokens=group_tokens,
        )  # fmt: skip
        seen.written = {i: answer_text(tokenizer, ids) for i, ids in zip(write, found, strict=True)}
    if answers is None or tokenizer is None or not rows[0].has_prompt:
        return seen.form(name)
    if held is not None:
        held.settle(model, parts, CPU, compute, POSITIONS, group_tokens)
        chosen = {id(row) for row in asked if held.is_exact(row)}
        return seen.form(name, [id(row) in chosen for row in rows])
    wanted = range(len(rows))[answers]
    judged: dict[int, bool | None] = {id(rows[i]): judge(tokenizer, rows[i], seen.likely[i]) for i in wanted}
    answer_open(model, rows, tokenizer, judged, CPU, compute, group_tokens)
    return seen.form(name, [bool(judged.get(id(sample), False)) for sample in rows])


class Asked(NamedTuple):
    """Rows of a proof: those whose answers are scored, and the numbers of those whose answers are written out."""

    rows: Sequence[Sample]
    answers: slice | None
    write: Sequence[int]


def observe_numbers(
    name: str, model: Any, asked: Asked, numbers: Sequence[int], tokenizer: TextTokenizer, *, held_to: HeldTo = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Form:  # fmt: skip
    """`observe_model` on the rows of these numbers, as a form of all; the first rows have the table."""
    every = range(len(asked.rows))
    scored = set(every[asked.answers]) if asked.answers is not None else set()
    begin = sum(number not in scored for number in numbers)  # what is scored is behind what is not
    form = observe_model(
        name, model, [asked.rows[number] for number in numbers], tokenizer,
        answers=slice(begin, None) if scored else None, held_to=held_to,
        write=[place for place, number in enumerate(numbers) if number in asked.write], progress=progress,
        tables=0 if numbers[0] else PARITY_PROMPTS,
    )  # fmt: skip
    found = joined(name, len(every), [(numbers, form)])
    found.written = {numbers[place]: text for place, text in form.written.items()}
    return found


def observe_drawn(
    name: str, model: Any, rows: Sequence[Sample], tokenizer: TextTokenizer | None, drawing: Drawing, *,
    held_to: HeldTo = (),
) -> Form:  # fmt: skip
    """`observe_model` on as many rows as a drawing takes; where it scores some, also their exact answers."""
    parts = list[tuple[list[int], Form]]()
    for block in drawing.blocks():
        answers = slice(None) if drawing.scored else None
        some = [rows[i] for i in block]
        tables = 0 if parts else PARITY_PROMPTS
        form = observe_model(name, model, some, tokenizer, answers=answers, held_to=held_to, tables=tables)
        parts.append((block, form))
        for place, number in enumerate(block):
            drawing.see(number, form.losses[place], bool(form.exact) and form.exact[place])
    return joined(name, len(rows), parts)


def observe_artifact(
    name: str, artifact: Artifact, rows: Sequence[Sample], tokenizer: TextTokenizer, *, answers: slice | None = None,
    held_to: HeldTo = (), write: Sequence[int] = (), progress: Callable[[int, int], None] = lambda done, total: None,
    drawing: Drawing | None = None,
) -> Form:  # fmt: skip
    """One pass of a bundle over each row in its own runtime, one at a time; of those of `answers` also if it is right.

    The first PARITY_PROMPTS rows and those of `write` are really decoded; of any other one the likeliest tokens along
    its own answer say whether decoding would give it, and where they leave that open it is decoded too. Where answers
    are held to labels its own search chooses one, to a grammar its own runtime writes one. Of a row the logits of one
    of the runtime's passes are held. With a `drawing` as many rows as it takes.
    """
    seen, exact = Observer(rows), [False] * len(rows)
    asked_for = set(range(len(rows))[answers]) if answers is not None and rows[0].has_prompt else set()
    asked = label_numbers(held_to, rows, tokenizer) if isinstance(held_to, tuple) else []
    read = list[int]()
    for number in drawing.each() if drawing is not None else range(len(rows)):
        sample = rows[number]
        at = trained_at(sample)
        read.append(number)
        if not at:
            continue
        if number in write or (number in asked_for and (held_to or number < PARITY_PROMPTS)):
            answer, right = answered(
                artifact, sample, at, tokenizer, held_to, asked[number:], seen.taker(number), number in write
            )
            exact[number] = right and number in asked_for
            if number in write:
                seen.written[number] = answer_text(tokenizer, answer)
        else:
            take = seen.taker(number)
            for logits in artifact.each_pass(sample.ids[: at[-1] + 1], at[0]):
                take(logits)
            exact[number] = number in asked_for and along(artifact, sample, tokenizer, seen.likely[number])
        if drawing is not None:
            drawing.see(number, seen.losses[number], exact[number])
        progress(len(read), len(rows))
    return seen.form(name, exact if asked_for else (), sorted(read) if len(read) < len(rows) else ())


def trained_settings(result: TrainResult) -> tuple[Training, torch.dtype, str]:
    """(settings, compute dtype, where) of the run as it was, not as it was planned."""
    training = result.training
    return training, DTYPES[training.compute_dtype], training.device


def is_original(training: Training, compute: torch.dtype) -> bool:
    """Whether training held the original weights, unrounded: then nothing lies between them and what trained."""
    return training.base_precision != "nf4" and compute == torch.float32


def load_as_trained(trained: Path, result: TrainResult, load: Load = load_plain) -> tuple[Any, torch.dtype]:
    """The model as it was scored at the end of training, and what it computes in here; on the CPU.

    The base as training held it (4 bits, half precision), adapters live; layers that trained dense are so again if they
    were training last, else back in the base's precision. A run on a GPU keeps its weights' precision here, but
    computes in fp32.
    """
    meter.import_all()
    training, compute, where = trained_settings(result)
    folder = local_folder(result.plan.job.model)
    here = compute if where == "cpu" else torch.float32
    if where != "cpu" and training.base_precision != "nf4" and compute != torch.float32:
        model = load(folder)
        half = DTYPES[training.base_precision]
        for name, _ in list(model.named_parameters()):
            alter(model, name, lambda weight: weight.copy_(weight.to(half)))
    else:
        model = load_base(folder, training, CPU, here)
    parts = find_parts(model)
    if training.adapts:
        put_adapters(model, parts, trained, training, WHOLE, Checkpoint(folder))
    else:
        apply_tuner(model, parts, training)
        dense = training.stream_layers or not is_original(training, here)
        if training.densely and dense and training.quantize_aware is None:
            put_dense_layers(model, parts, trained, training, result, Checkpoint(folder), here)
        else:
            put_changed(model, trained, WHOLE)
    round_as_trained(model, parts, training)
    return model, here


def round_as_trained(model: Any, parts: Parts, training: Training) -> None:
    """Put every weight in its place as the run held it when it was scored, where it trained for a target."""
    if training.quantize_aware is not None:
        round_frozen(model, parts, training)
        settle(model)


def put_dense_layers(
    model: Any, parts: Parts, trained: Path, training: Training, result: TrainResult, base: Checkpoint,
    compute: torch.dtype,
) -> None:  # fmt: skip
    """Give every layer that trained what it learnt, in fp32 where it was active last, else rounded as the base is.

    Those come first, beside nothing that is dense yet. Where layers stay in files, so do these: beside `trained`, on
    the disk that has it.
    """
    learnt = _changed(trained)

    class Kept(DenseTurns):
        def file(self, unit: str) -> Path:
            return trained / piece_of(unit)

        def _read(self, unit: str, name: str) -> torch.Tensor:
            if name in learnt.entries:
                return learnt.read(name)
            return self.base.read(self.base.name_of(name)).float()

    beside = trained.resolve().parent if training.stream_layers else None
    # where files that are mapped cannot go, they stay
    with tempfile.TemporaryDirectory(prefix="edgeft-", dir=beside, ignore_cleanup_errors=True) as scratch:
        turns = Kept(model, parts, base, Path(scratch), compute)
        lisa = make_lisa(model, parts, training, None, Path(scratch))
        active = (*lisa.always, *lisa.at(max(0, result.steps - 1)))
        visited = [record.unit for record in result.units if record.steps and record.unit.startswith("layer ")]
        for unit in sorted(visited, key=active.__contains__):
            turns.enter(unit)
            if unit not in active:
                turns._requantise(unit)
    ends = {name for name in learnt.entries if layer_of(name) is None}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ends:
                parameter.copy_(learnt.read(name))


def load_tuned(trained: Path, result: TrainResult, shares: Shares = WHOLE, load: Load = load_plain) -> Any:
    """Base and change of a training result, nothing merged, the change scaled by its shares; on the CPU in fp32."""
    return load_changed(local_folder(result.plan.job.model), trained, result.training, shares, load)


def load_changed(
    base: Path, trained: Path, training: Training, shares: Shares = WHOLE, load: Load = load_plain, *,
    rounded: bool = False,
) -> Any:  # fmt: skip
    """The original weights and what training left in `trained`, nothing merged; fp32, on the CPU.

    `rounded`: as the target will hold them that it trained for.
    """
    meter.import_all()
    model = load(base).requires_grad_(False)
    aim = training.quantize_aware if rounded else None
    training = training.model_copy(update={"compute_dtype": "fp32", "quantize_aware": aim})
    if training.adapts:
        if not shares.nothing:
            put_adapters(model, find_parts(model), trained, training, shares)
    else:
        put_changed(model, trained, shares)
    round_as_trained(model, find_parts(model), training)
    return model


def put_adapters(
    model: Any, parts: Parts, trained: Path, training: Training, shares: Shares, stored: Checkpoint | None = None
) -> None:
    """Hang trained adapters on a model, each scaled by its layer's share; `stored` as for `apply_tuner`."""
    meter.import_all()
    training = form_of(training).as_written(training)
    chosen = apply_tuner(model, parts, training, stored if training.holds_others else None)
    restore(model, parts, training, TensorFile(trained / "adapter_model.safetensors"), chosen)
    for name, module in adapted(model):
        form_of(training).scale(module, shares.of(layer_of(name + ".")))


def _changed(trained: Path) -> TensorFile:
    """Raises BadInput where nothing was trained in place, or what was is gone."""
    return read_changed(trained) or TensorFile(trained / CHANGED)


def put_changed(model: Any, trained: Path, shares: Shares) -> None:
    """Give a model the tensors that trained, each at its layer's share."""
    changed = _changed(trained)

    def put(name: str, weight: torch.Tensor) -> None:
        share, wanted = shares.of(layer_of(name)), changed.read(name)
        weight.copy_(weight + share * (wanted - weight) if share < 1 else wanted)

    for name, _ in list(model.named_parameters()):
        if name in changed.entries:
            alter(model, name, functools.partial(put, name))
