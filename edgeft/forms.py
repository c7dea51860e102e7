"""What does one form of a fine-tuned model say? As trained, on the original weights, merged: loaded, and observed."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from edgeft.architectures import Parts, find_parts
from edgeft.batches import make_batch
from edgeft.checkpoint import DTYPES, Checkpoint, TensorFile, load_base, load_plain, local_folder
from edgeft.data import IGNORED, Sample, TextTokenizer
from edgeft.dense import DenseTurns
from edgeft.evaluate import EVAL_TOKENS, answer_tokens, autocast, by_length, greedy, is_exact, metrics
from edgeft.host import LOGIT_BYTES, PARITY_PROMPTS
from edgeft.loss import head_transform
from edgeft.scores import Metrics
from edgeft.settings import Training
from edgeft.shares import Shares, layer_of
from edgeft.train import TrainResult
from edgeft.tuners import CHANGED, apply_tuner, make_lisa

WHOLE = Shares()
CPU = torch.device("cpu")
POSITIONS = 256  # whose logits are held at a time


class Artifact(Protocol):
    """What a target's runtime must offer to be compared."""

    stop_ids: list[int]

    def logits(self, ids: list[int], first: int = 0) -> Any: ...
    def follow(
        self, ids: list[int], first: int, prompt_tokens: int, max_new_tokens: int, stop_ids: Sequence[int],
        hopeless: Callable[[list[int]], bool],
    ) -> tuple[Any, list[int]]: ...  # fmt: skip


@dataclass
class Form:
    """What one form of the model says of some rows.

    `log_probabilities` (N, V) are those at the answers' positions of the first PARITY_PROMPTS rows; `losses` each
    row's summed nats, `tokens` its trained tokens; `exact` whether it is answered exactly, where that was asked.
    """

    name: str
    log_probabilities: torch.Tensor
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    exact: tuple[bool, ...] = ()

    @property
    def loss(self) -> float:
        """Mean nats per trained token of all rows."""
        return sum(self.losses) / max(1, sum(self.tokens))

    def metrics(self, rows: slice = slice(None)) -> Metrics:
        """Scores of some of the rows."""
        losses, tokens, exact = self.losses[rows], self.tokens[rows], self.exact[rows]
        made = metrics(len(losses), sum(losses) / max(1, sum(tokens)), sum(exact) / len(exact) if exact else None)
        kept = {
            "row_losses": tuple(round(loss, 6) for loss in losses),
            "row_tokens": tokens,
            "row_exact": "".join("01"[right] for right in exact),
        }
        return made.model_copy(update=kept)


def stop_ids(tokenizer: TextTokenizer) -> list[int]:
    """The ids at which an answer ends, on the device as here."""
    from edgeft.build import stop_ids_of

    return stop_ids_of(tokenizer)


def trained_at(sample: Sample) -> list[int]:
    """Positions whose next token is trained."""
    return [i for i in range(len(sample.ids) - 1) if sample.labels[i + 1] != IGNORED]


class Observer:
    """Gathers a form row by row: which log-probabilities are kept, which are summed."""

    def __init__(self, rows: Sequence[Sample]) -> None:
        self.rows = rows
        self.losses, self.tokens, self.follows = [0.0] * len(rows), [0] * len(rows), [True] * len(rows)
        self.tables: list[list[torch.Tensor]] = [[] for _ in rows[:PARITY_PROMPTS]]

    def add(self, row: int, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """The next positions of a row: logits (n, V) and the tokens that follow."""
        found = torch.log_softmax(logits.float(), dim=-1)
        self.losses[row] -= float(found.gather(1, targets[:, None]).sum())
        self.follows[row] &= bool((found.argmax(dim=-1) == targets).all())
        if row < len(self.tables):
            most = max(1, LOGIT_BYTES // 4 // found.shape[-1] // len(self.tables))
            room = most - self.tokens[row]
            if room > 0:
                self.tables[row].append(found[:room].clone())
        self.tokens[row] += len(targets)

    def form(self, name: str, exact: Sequence[bool] = ()) -> Form:
        """All that was gathered."""
        table = torch.cat([part for row in self.tables for part in row])
        return Form(name, table, tuple(self.losses), tuple(self.tokens), tuple(exact))


@torch.no_grad()
def row_logits(
    model: Any, parts: Parts, rows: Sequence[Sample], compute: torch.dtype, group_tokens: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(row, logits (n, V), the tokens that follow) at the rows' trained positions, rows of similar length at once."""
    scale, softcap = head_transform(model.config.get_text_config(decoder=True))
    numbers = {id(sample): number for number, sample in enumerate(rows)}
    head: Any = parts.head
    for group in by_length(rows, group_tokens):
        with autocast(CPU, compute):
            hidden = parts.body(input_ids=make_batch(group).ids, use_cache=False).last_hidden_state.to(compute)
        for place, sample in enumerate(group):
            at = torch.tensor(trained_at(sample), dtype=torch.long)
            for part in torch.split(at, POSITIONS):
                with autocast(CPU, compute):
                    logits = hidden[place, part] @ head.weight.T.to(compute)
                    logits = (logits if head.bias is None else logits + head.bias).float() * scale
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                yield numbers[id(sample)], logits, torch.tensor([sample.ids[i + 1] for i in part.tolist()])


def observe_model(
    name: str, model: Any, rows: Sequence[Sample], tokenizer: TextTokenizer | None = None, *,
    compute: torch.dtype = torch.float32, group_tokens: int = EVAL_TOKENS, answers: slice | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Form:  # fmt: skip
    """One pass of a torch model over each row on the CPU; for the rows of `answers` also whether it answers exactly.

    A row whose every token, its end too, is the likeliest after those before it is what greedy decoding gives: only
    the others are decoded.
    """
    seen, parts = Observer(rows), find_parts(model)
    for number, logits, targets in row_logits(model, parts, rows, compute, group_tokens):
        seen.add(number, logits, targets)
        progress(sum(count > 0 for count in seen.tokens), len(rows))
    if answers is None or tokenizer is None or not has_prompt(rows):
        return seen.form(name)
    exact, stops = [False] * len(rows), stop_ids(tokenizer)
    left = []
    for number in range(len(rows))[answers]:
        sample = rows[number]
        answer = reference(sample, stops)
        ends = sample.prompt_tokens + len(answer) < len(sample.ids)
        if seen.follows[number] and ends and not earlier_turns(sample):
            exact[number] = is_exact(tokenizer, sample, answer)
        elif sample.prompt_tokens:
            left.append(number)
    found = decoded(model, [rows[number] for number in left], tokenizer, compute, group_tokens)
    for number in left:
        exact[number] = found[id(rows[number])]
    return seen.form(name, exact)


def has_prompt(rows: Sequence[Sample]) -> bool:
    """Whether the rows have answers of their own, not text alone."""
    return bool(rows) and bool(rows[0].completion)


def earlier_turns(sample: Sample) -> bool:
    """Whether more than the last answer is trained."""
    return any(label != IGNORED for label in sample.labels[: sample.prompt_tokens])


def reference(sample: Sample, stops: Sequence[int]) -> list[int]:
    """The row's own answer up to its first stop id, as decoding would give it."""
    ids = list(sample.ids[sample.prompt_tokens :])
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]


def decoded(
    model: Any, rows: Sequence[Sample], tokenizer: TextTokenizer, compute: torch.dtype, group_tokens: int
) -> dict[int, bool]:
    """Whether each row is answered exactly by greedy decoding, by the row's identity."""
    found: dict[int, bool] = {}
    for group in by_length(rows, group_tokens) if rows else ():
        prompts = [list(sample.ids[: sample.prompt_tokens]) for sample in group]
        with autocast(CPU, compute):
            made = greedy(model, prompts, stop_ids(tokenizer), answer_tokens(group), CPU)
        found |= {id(s): is_exact(tokenizer, s, answer) for s, answer in zip(group, made, strict=True)}
    return found


def observe_artifact(
    name: str, artifact: Artifact, rows: Sequence[Sample], tokenizer: TextTokenizer, *, answers: slice | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Form:  # fmt: skip
    """One pass of a bundle over each row in its own runtime, a row at a time; those of `answers` really decoded."""
    seen, exact = Observer(rows), [False] * len(rows)
    decoding = set(range(len(rows))[answers]) if answers is not None and has_prompt(rows) else set()
    stops = stop_ids(tokenizer)
    for number, sample in enumerate(rows):
        at = trained_at(sample)
        if not at:
            continue
        if number in decoding and sample.prompt_tokens:
            logits, answer = artifact.follow(
                list(sample.ids), at[0], sample.prompt_tokens, answer_tokens([sample]), stops,
                functools.partial(cannot_match, tokenizer, sample),
            )  # fmt: skip
            exact[number] = is_exact(tokenizer, sample, answer)
        else:
            logits = artifact.logits(list(sample.ids), at[0])
        chosen = torch.from_numpy(logits)[[i - at[0] for i in at]]
        seen.add(number, chosen, torch.tensor([sample.ids[i + 1] for i in at]))
        progress(number + 1, len(rows))
    return seen.form(name, exact if decoding else ())


def cannot_match(tokenizer: TextTokenizer, sample: Sample, made: Sequence[int]) -> bool:
    """Whether no continuation of `made` reads as the row's answer."""
    wanted = tokenizer.decode(sample.ids[sample.prompt_tokens :]).strip()
    given = tokenizer.decode(made).rstrip("\ufffd").strip()  # half a character: the next token may complete it
    return not wanted.startswith(given)


def trained_settings(result: TrainResult) -> tuple[Training, torch.dtype, str]:
    """(settings, compute dtype, where) of the run as it was, not as it was planned."""
    changed = {d.what: d.done for d in result.deviations if d.what in Training.model_fields}
    training = result.plan.training.model_copy(update=changed)
    return training, DTYPES[training.compute_dtype], training.device


def is_original(training: Training, compute: torch.dtype) -> bool:
    """Whether training held the original weights, unrounded: then nothing lies between them and what trained."""
    return training.base_precision != "nf4" and compute == torch.float32


def load_as_trained(trained: Path, result: TrainResult) -> tuple[Any, torch.dtype]:
    """The model as it was scored at the end of training, and what it computes in here; on the CPU.

    The base as training held it (4 bits, half precision), adapters live; layers that trained dense are so again if they
    were training last, else back in the base's precision. A run on a GPU keeps its weights' precision here, but
    computes in fp32.
    """
    training, compute, where = trained_settings(result)
    folder = local_folder(result.plan.job.model)
    here = compute if where == "cpu" else torch.float32
    if where != "cpu" and training.base_precision != "nf4" and compute != torch.float32:
        model = load_plain(folder, DTYPES[training.base_precision]).float()
    else:
        model = load_base(folder, training, CPU, here)
    parts = find_parts(model)
    if training.tuner == "lora":
        put_adapters(model, parts, trained, training, WHOLE)
        return model, here
    apply_tuner(model, parts, training)
    if training.densely and not is_original(training, here):
        put_dense_layers(model, parts, trained, training, result, Checkpoint(folder), here)
    else:
        put_changed(model, trained, WHOLE)
    return model, here


def put_dense_layers(
    model: Any, parts: Parts, trained: Path, training: Training, result: TrainResult, base: Checkpoint,
    compute: torch.dtype,
) -> None:  # fmt: skip
    """Give every layer that trained what it learnt, in fp32 where it was active last, else rounded as the base is."""
    learnt = TensorFile(trained / CHANGED)

    class Kept(DenseTurns):
        def _read(self, unit: str, name: str) -> torch.Tensor:
            if name in learnt.entries:
                return learnt.read(name)
            return self.base.read(self.base.name_of(name)).float()

    with tempfile.TemporaryDirectory(prefix="edgeft-") as scratch:
        turns = Kept(model, parts, base, Path(scratch), compute)
        lisa = make_lisa(model, parts, training, None, Path(scratch))
        active = (*lisa.always, *lisa.at(max(0, result.steps - 1)))
        visited = [record.unit for record in result.units if record.steps and record.unit.startswith("layer ")]
        for unit in visited:
            turns.enter(unit)
            if unit not in active:
                turns._requantise(unit)
    ends = {name for name in learnt.entries if layer_of(name) is None}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ends:
                parameter.copy_(learnt.read(name))


def load_tuned(trained: Path, result: TrainResult, shares: Shares = WHOLE) -> Any:
    """Base and change of a training result, nothing merged, the change scaled by its shares; on the CPU in fp32."""
    return load_changed(local_folder(result.plan.job.model), trained, result.plan.training, shares)


def load_changed(base: Path, trained: Path, training: Training, shares: Shares = WHOLE) -> Any:
    """The original weights and what training left in `trained`, nothing merged; fp32, on the CPU."""
    model = load_plain(base)
    training = training.model_copy(update={"compute_dtype": "fp32"})
    if training.tuner == "lora":
        if not shares.nothing:
            put_adapters(model, find_parts(model), trained, training, shares)
    else:
        put_changed(model, trained, shares)
    return model


def put_adapters(model: Any, parts: Parts, trained: Path, training: Training, shares: Shares) -> None:
    """Hang trained adapters on a model, each scaled by its layer's share."""
    from peft.tuners.lora import LoraLayer

    chosen = apply_tuner(model, parts, training)
    weights = TensorFile(trained / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in chosen:
            parameter.copy_(weights.read("base_model.model." + name.replace(".default.", ".")))
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for adapter in module.scaling:
                module.scaling[adapter] *= shares.of(layer_of(name + "."))


def put_changed(model: Any, trained: Path, shares: Shares) -> None:
    """Give a model the tensors that trained, each at its layer's share."""
    changed = TensorFile(trained / CHANGED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in changed.entries:
                share, wanted = shares.of(layer_of(name)), changed.read(name)
                parameter.copy_(parameter + share * (wanted - parameter) if share < 1 else wanted)
