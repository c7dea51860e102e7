"""What is one training process, step by step: what trains now, the optimizer, and all that a checkpoint brings back?"""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as recompute

from edgeft.data.batches import epoch_order, micro_batches, shares, steps_per_epoch
from edgeft.data.dataset import Sample
from edgeft.documents import staging
from edgeft.engine import adapted_linear
from edgeft.engine.adalora import Pruning, pruning_of
from edgeft.engine.fp32_layers import DenseTurns
from edgeft.engine.lisa import Lisa, Named
from edgeft.engine.quantized_layers import RoundedTurns, check_stored, round_frozen
from edgeft.engine.ranks import ALONE, Ranks
from edgeft.engine.sharded import shards_of
from edgeft.engine.trainable import apply_tuner, make_lisa, trained_units
from edgeft.errors import BadInput, EdgeftError
from edgeft.models import soft_prompt
from edgeft.models.checkpoint import Checkpoint, TensorFile, write_tensors
from edgeft.models.evaluate import token_losses
from edgeft.models.parts import Parts
from edgeft.settings.job import ENDS, Training
from edgeft.settings.tuners import TUNERS, is_prefix, is_scale

COUNTED = ("step", "tokens", "padded_tokens", "micro_batches", "skipped_steps")
SKIPPED_IN_A_ROW = 20  # fp16: by then the scale is a millionth of what it was, and no scale will do
PRUNING = "pruning.safetensors"  # of a checkpoint: what AdaLoRA knows of its triplets
PARAMETERS = "parameters.safetensors"  # of a checkpoint: read and written one tensor at a time


@dataclass
class Run:
    """One training process: the model, what trains, and everything a checkpoint must bring back.

    With `work`, goes on from the newest readable checkpoint there; `counters` is what it said, None when there is none.
    """

    training: Training
    device: torch.device
    compute: torch.dtype
    model: Any
    parts: Parts
    chosen: Named
    lisa: Lisa | None = None
    work: Path | None = None
    ranks: Ranks = ALONE
    optimizer: torch.optim.Optimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    counters: dict[str, Any] | None = field(init=False, default=None)
    pruning: Pruning | None = field(init=False)
    step: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    micro_batches: int = 0
    skipped_steps: int = 0  # fp16: updates that overflowed and were made again at a smaller scale
    asked: bool = False  # to stop after this step; after a step: whether any process was
    updating: bool = False  # parameters may be between two steps
    curve: list[tuple[int, float]] = field(default_factory=list)
    newest: Path | None = None  # checkpoint

    def __post_init__(self) -> None:
        found = newest_checkpoint(self.work) if self.work else None
        if self.lisa is not None:
            with self.ranks.in_turn():
                if found is None:
                    self.lisa.start()
                else:
                    self.lisa.start(found.counters["step"], found.counters["lisa"], found.folder / "layers")
            self.chosen = self.lisa.parameters()
        self.pruning = pruning_of(self.training, self.model)
        groups = optimizer_groups(self.training, self.model, self.chosen)
        if self.lisa is not None:
            self.lisa.group_of = partial(group_of, self.training, tables_of(self.model))
        self.optimizer = make_optimizer(self.training, self.device, groups)
        self.scaler = make_scaler(self.training, self.device, self.compute)
        if self.training.checkpointing:
            recompute_layers(self.parts, self.training.kept_layers)
        if found is not None:
            self._restore(found)

    def train_step(self, samples: list[Sample]) -> float:
        """Mean loss in nats per trained token of one optimizer step over `samples`, in micro-batches.

        A step is one update: where fp16 gradients overflow, the same samples are taken again at a smaller scale, and
        nothing but `skipped_steps` counts it. Raises EdgeftError for a loss or gradients that are not finite.
        """
        if self.lisa is not None and self.lisa.begin_step(self.step, self.optimizer):
            self.chosen = self.lisa.parameters()
        start_states(self.optimizer)
        for group, times in zip(self.optimizer.param_groups, rates_of(self.training), strict=True):
            group["lr"] = times * learning_rate(self.training, self.step)
        loss, skipped = self._gradients(samples), 0
        while not self._update():
            skipped += 1
            self.skipped_steps += 1
            if not self.scaler.is_enabled() or skipped == SKIPPED_IN_A_ROW:
                raise not_finite_gradients(self.step, skipped, self.training)
            loss = self._gradients(samples)
        self.step += 1
        for micro in (micro for share in shares(samples, self.ranks.size) for micro in self._micro_batches(share)):
            self.padded_tokens += len(micro) * max(len(sample) for sample in micro)
            self.micro_batches += 1
        self.tokens += sum(len(sample) for sample in samples)
        return loss

    def _micro_batches(self, samples: list[Sample]) -> Iterator[list[Sample]]:
        training, size, before = self.training, self.training.micro_batch_size, self.training.prefix_tokens
        most = size * (training.max_length + before)
        return micro_batches(samples, size, most, size * training.max_trained, before)

    def _gradients(self, samples: list[Sample]) -> float:
        """The mean loss of `samples`, of all processes; its gradients, scaled, are in the parameters."""
        total, tokens, shards = 0.0, sum(sample.trained_tokens for sample in samples), shards_of(self.model)
        for micro in self._micro_batches(self.ranks.share(samples)):
            chunk = self.training.loss_chunk_tokens
            loss = token_losses(self.model, self.parts, micro, self.device, self.compute, chunk) / tokens
            total += float(loss.detach())
            if not math.isfinite(total) and shards is None:
                break  # of a base in parts the others wait for this one's
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            del loss
        if shards is not None:
            shards.accompany([len(list(self._micro_batches(share))) for share in shares(samples, self.ranks.size)])
        total, asked = self.ranks.add_gradients([p for _, p in self.chosen], total, float(self.asked))
        self.asked = asked > 0
        if not math.isfinite(total):
            raise not_finite(self.step, total, self.training)
        return total

    def _update(self) -> bool:
        """Whether the parameters took the gradients, which are gone then in either case: only finite ones are taken."""
        self.updating = True
        self.scaler.unscale_(self.optimizer)
        if self.pruning is not None:
            self.pruning.straighten()
        trained = [p for _, p in self.chosen]
        finite = math.isfinite(float(torch.nn.utils.clip_grad_norm_(trained, self.training.max_grad_norm)))
        if finite:
            self.scaler.step(self.optimizer)
            if self.pruning is not None:
                self.pruning.allocate(self.step + 1)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.updating = False
        return finite

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """One checkpoint in `folder`/step-N, whole or not at all; the one before is kept, and older ones go first."""
        self.keep_newest(folder)
        with staging(folder / f"step-{self.step:08d}") as temporary:
            kept = self.chosen if self.lisa is None else self.lisa.in_memory()
            write_tensors(temporary / PARAMETERS, {name: p.detach() for name, p in kept})
            if self.pruning is not None:
                write_tensors(temporary / PRUNING, dict(self.pruning.tensors()))
            state = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": torch.get_rng_state(),
            }
            torch.save(state, temporary / "state.pt")
            counted = {name: getattr(self, name) for name in COUNTED}
            counters = {**counted, "curve": self.curve, **extra}
            if self.lisa is not None:
                counters["lisa"] = self.lisa.state_dict()
                self.lisa.save_files(temporary / "layers")
            (temporary / "counters.json").write_text(json.dumps(counters))
        self.newest = folder / f"step-{self.step:08d}"
        if self.lisa is not None:
            self.lisa.replaced = False

    @property
    def replaced(self) -> bool:
        """Whether files were replaced that the newest checkpoint still holds: as many as one turn may be, no more."""
        return self.lisa is not None and self.lisa.replaced

    def keep_newest(self, folder: Path) -> None:
        """Remove every checkpoint but the newest that could be read or was written."""
        for old in folder.glob("step-*"):
            if old.name != (self.newest.name if self.newest else ""):
                shutil.rmtree(old, ignore_errors=True)

    def _restore(self, found: Found) -> None:
        own = dict(self.chosen if self.lisa is None else self.lisa.in_memory())
        with torch.no_grad():
            for name in found.parameters.entries:
                own[name].copy_(found.parameters.read(name))
        if self.pruning is not None:
            self.pruning.restore(TensorFile(found.folder / PRUNING))
        self.optimizer.load_state_dict(found.state.pop("optimizer"))
        page_states(self.optimizer)
        self.scaler.load_state_dict(found.state["scaler"])
        torch.set_rng_state(found.state["rng"])
        self.counters, self.newest = found.counters, found.folder
        for name in COUNTED:
            setattr(self, name, found.counters[name])
        self.curve = [(step, loss) for step, loss in found.counters["curve"]]


@dataclass
class Found:
    """A checkpoint that could be read."""

    folder: Path
    counters: dict[str, Any]
    state: dict[str, Any]
    parameters: TensorFile


def newest_checkpoint(work: Path) -> Found | None:
    """The newest readable checkpoint; one that a disk has lost bytes of is passed over for the one before it."""
    for path in sorted(work.glob("step-*"), reverse=True):
        try:
            counters = json.loads((path / "counters.json").read_text())
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            parameters = TensorFile(path / PARAMETERS)
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, BadInput):
            continue
        return Found(path, counters, state, parameters)
    return None


def learning_rate(training: Training, step: int) -> float:
    """Linear warm-up to the peak, then linear to zero at the last step."""
    warm = min(1.0, (step + 1) / max(1, training.warmup_steps))
    left = (training.steps - step) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * min(warm, left)


def tables_of(model: torch.nn.Module) -> frozenset[str]:
    """Names of the parameters that are tables of embeddings, a head that is tied to one included."""
    tables = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    return frozenset(name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in tables)


def group_of(training: Training, tables: frozenset[str], name: str, parameter: torch.nn.Parameter) -> int:
    """Which group of the optimizer a parameter is in.

    0 decays (matrices), 1 does not (norms, biases, embeddings), 2 decays and learns faster (`lora_plus`).
    """
    if parameter.ndim == 1 or name in tables or is_scale(name) or is_prefix(name):
        return 1
    faster = TUNERS[training.tuner].faster
    return 2 if training.lora_plus != 1 and faster and faster in name else 0


def rates_of(training: Training) -> tuple[float, ...]:
    """The learning rates of the optimizer's groups, in times that of the first."""
    return (1.0, 1.0, training.lora_plus) if training.lora_plus != 1 else (1.0, 1.0)


def optimizer_groups(training: Training, model: torch.nn.Module, chosen: Named) -> list[list[torch.nn.Parameter]]:
    """What trains, in the optimizer's groups."""
    tables = tables_of(model)
    return [
        [p for name, p in chosen if group_of(training, tables, name, p) == group]
        for group in range(len(rates_of(training)))
    ]


def make_optimizer(
    training: Training, device: torch.device, groups: Sequence[list[torch.nn.Parameter]]
) -> torch.optim.Optimizer:
    """AdamW as planned over `optimizer_groups`. Fused on every device: no temporary copies of what trains."""
    decays = (training.weight_decay, 0.0, training.weight_decay)
    parameters = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=False)]
    options: dict[str, Any] = {"lr": training.learning_rate, "betas": (0.9, 0.999)}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    if device.type != "cuda":
        raise BadInput("optimizer", f"{training.optimizer} needs CUDA", "use optimizer=adamw")
    from bitsandbytes.optim import adamw

    kind: Any = adamw.AdamW8bit if training.optimizer == "adamw8bit" else adamw.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(parameters, **options)
    return optimizer


def start_states(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the states that it would make at its first update, before anything of a step is there.

    Made among a step's tensors they would divide the memory between them for the rest of the run.
    """
    if type(optimizer) is not torch.optim.AdamW:
        return
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if not optimizer.state[parameter]:
            zeros = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format)
                     for name in ("exp_avg", "exp_avg_sq")}  # fmt: skip
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter] = {"step": step, **zeros}


def page_states(optimizer: Any) -> None:
    """Put the states of a paged optimizer back into paged memory: loading them leaves them on the GPU."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            value = state.get(key)
            if value is not None and not getattr(value, "is_paged", False):
                state[key] = optimizer.get_state_buffer(parameter, dtype=value.dtype)
                state[key].copy_(value)


def make_scaler(training: Training, device: torch.device, compute: torch.dtype) -> torch.amp.GradScaler:
    """The scale of fp16 gradients. A short run starts lower and rises sooner: overflowed steps cost it more."""
    start = 2.0 ** min(16, 6 + training.steps.bit_length())
    interval = min(2000, max(10, training.steps // 8))
    enabled = compute == torch.float16
    return torch.amp.GradScaler(device.type, init_scale=start, growth_interval=interval, enabled=enabled)


def recompute_layers(parts: Parts, kept: int = 0) -> None:
    """Checkpoint the activations of every layer that autograd sees when it runs, but for the `kept` topmost ones.

    A layer below the lowest one that trains saves nothing; checkpointing it as well would only cost its inputs.
    """
    for layer in list(parts.layers)[: len(parts.layers) - kept]:
        adapted_linear.save_first(layer)
        layer.forward = _recomputed(layer, layer.forward)  # type: ignore[method-assign]


def _recomputed(layer: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        seen = any(value.requires_grad for value in (*inputs, *layer.parameters(), *soft_prompt.seen(layer)))
        if not torch.is_grad_enabled() or not seen or soft_prompt.is_read(layer):
            return forward(*args, **kwargs)
        # no dropout runs in training, so no RNG state need be kept per layer
        return recompute(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def not_finite(step: int, loss: float, training: Training) -> EdgeftError:
    """What to say when the loss became infinite or not a number."""
    return EdgeftError("training", f"the loss became {loss} at step {step + 1} of {training.steps}", _calmer(training))


def not_finite_gradients(step: int, skipped: int, training: Training) -> EdgeftError:
    """What to say when no finite gradients came, in fp16 at no scale."""
    again = f", {skipped} times in a row at ever smaller scales" if skipped > 1 else ""
    problem = f"the gradients are not finite at step {step + 1} of {training.steps}{again}: nothing was updated"
    if training.compute_dtype == "fp16":
        return EdgeftError("training", problem, "gradients overflow in fp16: plan again with --set base_precision=fp32")
    return EdgeftError("training", problem, _calmer(training))


def _calmer(training: Training) -> str:
    hint = f"plan again with a lower learning rate: --set learning_rate={training.learning_rate / 4:.2g}"
    return hint + (", or in another precision: --set base_precision=fp32" if training.compute_dtype == "fp16" else "")


def make_run(
    training: Training, device: torch.device, compute: torch.dtype, model: Any, parts: Parts, base: Path, work: Path,
    ranks: Ranks = ALONE,
) -> Run:  # fmt: skip
    """What trains put into a loaded model, going on from the newest checkpoint in `work`; `base` holds its weights."""
    chosen = apply_tuner(model, parts, training, Checkpoint(base) if training.holds_others else None)
    lisa = None
    if training.layers == "lisa" or training.densely:
        found = trained_units(model, parts, training)
        ends = {unit: found[unit] for unit in ENDS if unit in found}
        args = Checkpoint(base), work / "layers", compute, ends
        turns: DenseTurns | None = None
        if training.quantize_aware is not None and not training.adapts:
            turns = RoundedTurns(model, parts, training, *args)
        elif training.densely:
            turns = DenseTurns(model, parts, *args)
        lisa = make_lisa(model, parts, training, turns, work / "layers")
        lisa.writes = ranks.first
        if turns is not None:
            turns.writes, turns.wait = ranks.first, ranks.wait  # type: ignore[method-assign]
    if training.quantize_aware is not None:
        check_stored(Checkpoint(base), model, parts, training)
        round_frozen(model, parts, training)
    return Run(training, device, compute, model, parts, chosen, lisa, work, ranks)


def remaining_steps(training: Training, samples: list[Sample], done: int) -> Iterator[list[Sample]]:
    """The samples of each optimizer step from step `done` on: nothing is stored, the order is computed again."""
    lengths = [len(sample) for sample in samples]
    each = steps_per_epoch(len(samples), training.batch_size)
    for epoch in range(done // each, -(-training.steps // each)):
        order = epoch_order(lengths, training.batch_size, training.seed, epoch)
        first = done - epoch * each if epoch == done // each else 0
        for indices in order[first : training.steps - epoch * each]:
            yield [samples[i] for i in indices]
