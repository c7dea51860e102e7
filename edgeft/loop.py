"""What is one training process, step by step: what trains now, the optimizer, and all that a checkpoint brings back?"""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as recompute

from edgeft.architectures import Parts
from edgeft.artifacts import staging
from edgeft.batches import epoch_order, micro_batches, steps_per_epoch
from edgeft.checkpoint import Checkpoint
from edgeft.data import Sample
from edgeft.dense import DenseTurns
from edgeft.errors import BadInput, EdgeftError
from edgeft.evaluate import token_losses
from edgeft.lisa import Lisa, Named
from edgeft.settings import Training
from edgeft.tuners import apply_tuner, make_lisa

COUNTED = ("step", "tokens", "padded_tokens", "micro_batches")


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
    optimizer: torch.optim.Optimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    counters: dict[str, Any] | None = field(init=False, default=None)
    step: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    micro_batches: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        found = newest_checkpoint(self.work) if self.work else None
        if self.lisa is not None:
            if found is None:
                self.lisa.start()
            else:
                self.lisa.start(found.counters["step"], found.counters["lisa"], found.folder / "layers")
            self.chosen = self.lisa.parameters()
        self.optimizer = make_optimizer(self.training, self.device, [p for _, p in self.chosen])
        scaled = self.compute == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        if self.training.checkpointing:
            recompute_layers(self.parts, self.training.kept_layers)
        if found is not None:
            self._restore(found)

    def train_step(self, samples: list[Sample]) -> float:
        """Mean loss in nats per trained token of one optimizer step over `samples`, in micro-batches."""
        training = self.training
        if self.lisa is not None and self.lisa.begin_step(self.step, self.optimizer):
            self.chosen = self.lisa.parameters()
        tokens = sum(sample.trained_tokens for sample in samples)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(training, self.step)
        total = 0.0
        size = training.micro_batch_size
        for micro in micro_batches(samples, size, size * training.max_length, size * training.max_trained):
            self.padded_tokens += len(micro) * max(len(sample) for sample in micro)
            self.micro_batches += 1
            loss = token_losses(self.model, self.parts, micro, self.device, self.compute, training.loss_chunk_tokens)
            loss = loss / tokens
            total += float(loss.detach())
            if not math.isfinite(total):
                raise not_finite(self.step, total, training)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            del loss
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_([p for _, p in self.chosen], training.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += sum(len(sample) for sample in samples)
        return total

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """One checkpoint in `folder`/step-N, whole or not at all; the two newest are kept."""
        with staging(folder / f"step-{self.step:08d}") as temporary:
            kept = self.chosen if self.lisa is None else self.lisa.in_memory()
            state = {
                "parameters": {name: p.detach() for name, p in kept},
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
        for old in sorted(folder.glob("step-*"))[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def _restore(self, found: Found) -> None:
        own = dict(self.chosen if self.lisa is None else self.lisa.in_memory())
        with torch.no_grad():
            for name, value in found.state["parameters"].items():
                own[name].copy_(value)
        self.optimizer.load_state_dict(found.state["optimizer"])
        self.scaler.load_state_dict(found.state["scaler"])
        torch.set_rng_state(found.state["rng"])
        self.counters = found.counters
        for name in COUNTED:
            setattr(self, name, found.counters[name])
        self.curve = [(step, loss) for step, loss in found.counters["curve"]]


@dataclass
class Found:
    """A checkpoint that could be read."""

    folder: Path
    counters: dict[str, Any]
    state: dict[str, Any]


def newest_checkpoint(work: Path) -> Found | None:
    """The newest readable checkpoint; one that a disk has lost bytes of is passed over for the one before it."""
    for path in sorted(work.glob("step-*"), reverse=True):
        try:
            counters = json.loads((path / "counters.json").read_text())
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError):
            continue
        return Found(path, counters, state)
    return None


def learning_rate(training: Training, step: int) -> float:
    """Linear warm-up to the peak, then linear to zero at the last step."""
    warm = min(1.0, (step + 1) / max(1, training.warmup_steps))
    left = (training.steps - step) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * min(warm, left)


def make_optimizer(
    training: Training, device: torch.device, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW as planned. Fused on every device: no temporary copies of what trains."""
    options = {"lr": training.learning_rate, "betas": (0.9, 0.999), "weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)  # type: ignore[arg-type]
    if device.type != "cuda":
        raise BadInput("optimizer", f"{training.optimizer} needs CUDA", "use optimizer=adamw")
    from bitsandbytes.optim import adamw

    kind: Any = adamw.AdamW8bit if training.optimizer == "adamw8bit" else adamw.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(parameters, **options)
    return optimizer


def recompute_layers(parts: Parts, kept: int = 0) -> None:
    """Checkpoint the activations of every layer that autograd sees when it runs, but for the `kept` topmost ones.

    A layer below the lowest one that trains saves nothing; checkpointing it as well would only cost its inputs.
    """
    for layer in list(parts.layers)[: len(parts.layers) - kept]:
        layer.forward = _recomputed(layer, layer.forward)  # type: ignore[method-assign]


def _recomputed(layer: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        seen = any(value.requires_grad for value in inputs) or any(p.requires_grad for p in layer.parameters())
        if not torch.is_grad_enabled() or not seen:
            return forward(*args, **kwargs)
        # no dropout runs in training, so no RNG state need be kept per layer
        return recompute(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def not_finite(step: int, loss: float, training: Training) -> EdgeftError:
    """What to say when the loss became infinite or not a number."""
    hint = f"plan again with a lower learning rate: --set learning_rate={training.learning_rate / 4:.2g}"
    if training.compute_dtype == "fp16":
        hint += ", or in another precision: --set base_precision=fp32"
    return EdgeftError("training", f"the loss became {loss} at step {step + 1} of {training.steps}", hint)


def make_run(
    training: Training, device: torch.device, compute: torch.dtype, model: Any, parts: Parts, base: Path, work: Path
) -> Run:
    """What trains put into a loaded model, going on from the newest checkpoint in `work`; `base` holds its weights."""
    chosen = apply_tuner(model, parts, training)
    lisa = None
    # a half-precision base on a device that cannot compute in it is fp32 already, and simply trains
    densely = training.densely and (training.base_precision == "nf4" or compute != torch.float32)
    if training.layers == "lisa" or densely:
        turns = DenseTurns(model, parts, Checkpoint(base), work / "layers", compute) if densely else None
        lisa = make_lisa(model, parts, training, turns, work / "layers")
    return Run(training, device, compute, model, parts, chosen, lisa, work)


def remaining_steps(training: Training, samples: list[Sample], done: int) -> Iterator[list[Sample]]:
    """The samples of each optimizer step from step `done` on: nothing is stored, the order is computed again."""
    lengths = [len(sample) for sample in samples]
    each = steps_per_epoch(len(samples), training.batch_size)
    for epoch in range(done // each, -(-training.steps // each)):
        order = epoch_order(lengths, training.batch_size, training.seed, epoch)
        first = done - epoch * each if epoch == done // each else 0
        for indices in order[first : training.steps - epoch * each]:
            yield [samples[i] for i in indices]
