"""Which layers matter for a user's data? A score per decoder layer, in no more memory than LoRA in all layers takes.

What each method measures stands at its function. Gradients are never in memory (edgeft/gradients.py), adapters train by
the plan's own step, and everything else is scoring: what a plan of LoRA in all layers holds is enough for each.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from edgeft.data.batches import make_batch
from edgeft.data.dataset import Sample
from edgeft.engine.loop import Run, recompute_layers, remaining_steps
from edgeft.engine.low_rank import layers as layers_of
from edgeft.engine.trainable import apply_tuner, trained_units
from edgeft.errors import BadInput, EdgeftError
from edgeft.machines import meter
from edgeft.models.checkpoint import local_folder
from edgeft.models.evaluate import autocast, by_length, token_losses
from edgeft.models.metrics import Importance
from edgeft.models.parts import Parts, is_linear
from edgeft.planning.plan import Plan
from edgeft.progress import Progress
from edgeft.settings.job import LayerScore, Training
from edgeft.settings.tuners import is_adapter
from edgeft.training.gradients import watched
from edgeft.training.job_data import Data
from edgeft.training.prepare import carried_out, check_head, choose_device, prepare
from edgeft.training.promise import check_budget

CALIBRATION_ROWS = 64  # training rows that gradient and hidden read, drawn by the seed
SHORT_STEPS = 30  # optimizer steps of a short training: ablation makes one, progressive one per layer it adds
WARMUP_STEPS = 3
VALIDATION_ROWS = 64  # rows whose loss ablation and progressive compare
TOLERANCE = 0.02  # progressive stops at the first layer that adds less than this share of all that was gained
HALF_SCALES = (1024.0, 32.0, 1.0)  # in fp16 small gradients vanish and large ones overflow: the first that is finite


@dataclass
class Scored:
    """A model on its device, frozen and without adapters, and the rows that its layers are scored on."""

    training: Training
    device: torch.device
    compute: torch.dtype
    model: Any
    parts: Parts
    train: list[Sample]
    valid: list[Sample]
    progress: Callable[[int, int], None] = lambda done, total: None

    def loss_of(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Sum of cross entropies over the trained tokens of one batch; keeps the graph."""
        return token_losses(self.model, self.parts, samples, self.device, self.compute, self.training.loss_chunk_tokens)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss in nats per trained token of the validation rows."""
        rows = self.valid[:VALIDATION_ROWS]
        groups = by_length(rows, self.training.group_tokens)
        return sum(float(self.loss_of(group)) for group in groups) / max(1, sum(row.trained_tokens for row in rows))

    def calibration(self) -> list[Sample]:
        """The training rows that gradient and hidden read."""
        count = min(CALIBRATION_ROWS, len(self.train))
        return random.Random(f"calibration {self.training.seed}").sample(self.train, count)


Found = tuple[list[float], list[Sample]]  # a score per layer, and the training rows that were read


def by_gradient(scored: Scored) -> Found:
    """Of each layer, sum over its matrices of ||W|| times the mean over rows of ||dL/dW||, L a row's mean loss.

    A row at a time, so that scores do not depend on how many samples fit. Matrices are those that adapters can sit on:
    linears (a linear that runs twice counts twice), not experts that a model keeps in one 3-D parameter.
    """
    rows, scales = scored.calibration(), HALF_SCALES if scored.compute == torch.float16 else (1.0,)
    scores = [0.0] * len(scored.parts.layers)
    if scored.training.checkpointing:
        recompute_layers(scored.parts)
    with watched(scored.parts) as now:
        for done, row in enumerate(rows, 1):
            for scale in scales:
                now[:] = [0.0] * len(now)
                loss = scored.loss_of([row])
                if not loss.requires_grad:  # no layer has a matrix
                    break
                (loss * scale).backward()  # type: ignore[no-untyped-call]
                del loss
                if all(map(math.isfinite, now)):
                    break
            scores = [old + new / (scale * row.trained_tokens) for old, new in zip(scores, now, strict=True)]
            scored.progress(done, len(rows))
    return [score / len(rows) for score in scores], rows


def attention_of(layer: nn.Module) -> list[nn.Module]:
    """The outermost modules of a layer that are called attention and hold a matrix; none where nothing is."""
    found: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        last = name.rsplit(".", 1)[-1].lower()
        inside = any(name.startswith(outer + ".") for outer in found)
        if ("attn" in last or "attention" in last) and not inside and any(map(is_linear, module.modules())):
            found[name] = module
    return list(found.values())


@torch.no_grad()
def by_hidden(scored: Scored) -> Found:
    """Mean over trained tokens of 1 - cos(layer's input, its output), plus ||attention's output|| / ||layer's input||.

    Both say how much the residual stream changes: as a whole, and by the attention branch alone. No backward pass.
    """
    rows, layers = scored.calibration(), scored.parts.layers
    sums = torch.zeros(len(layers), dtype=torch.float64)
    where, entering = torch.empty(0), torch.empty(0)  # of the batch and of the layer that run now

    def of_trained(value: Any) -> torch.Tensor:
        value = value[0] if isinstance(value, tuple) else value
        return value.reshape(-1, value.shape[-1])[where].float()  # type: ignore[no-any-return]

    def enter(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal entering
        entering = of_trained(arguments[0] if arguments else named["hidden_states"])

    def attended(index: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            sums[index] += float((of_trained(output).norm(dim=-1) / entering.norm(dim=-1).clamp_min(1e-12)).sum())

        return hook

    def leave(index: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            unit = nn.functional.normalize
            # half the squared distance of unit vectors is 1 - cos, exactly 0 where nothing changes
            sums[index] += float((unit(entering, dim=-1) - unit(of_trained(output), dim=-1)).square().sum()) / 2

        return hook

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    for index, layer in enumerate(layers):
        handles += [module.register_forward_hook(attended(index)) for module in attention_of(layer)]
        handles.append(layer.register_forward_hook(leave(index)))
    try:
        done = 0
        for group in by_length(rows, scored.training.group_tokens):
            batch = make_batch(group).to(scored.device)
            where = batch.positions
            with autocast(scored.device, scored.compute):
                scored.parts.body(input_ids=batch.ids, use_cache=False)
            done += len(group)
            scored.progress(done, len(rows))
    finally:
        for handle in handles:
            handle.remove()
    return (sums / sum(row.trained_tokens for row in rows)).tolist(), rows


def short_run(scored: Scored, trained_layers: Sequence[int]) -> list[Sample]:
    """Train the adapters of some layers for SHORT_STEPS of the plan's own steps; the rows that were read.

    The model has its adapters already, and recomputes its activations if the plan does.
    """
    changes = {"steps": SHORT_STEPS, "warmup_steps": WARMUP_STEPS, "trained_layers": tuple(trained_layers)}
    training = scored.training.model_copy(update={**changes, "checkpointing": False})
    chosen = [entry for unit in trained_units(scored.model, scored.parts, training).values() for entry in unit]
    for name, parameter in scored.model.named_parameters():
        if is_adapter(name):
            parameter.requires_grad_(False)
    for _, parameter in chosen:
        parameter.requires_grad_(True)
    run = Run(training, scored.device, scored.compute, scored.model, scored.parts, chosen)
    read: dict[int, Sample] = {}
    for samples in itertools.islice(remaining_steps(training, scored.train, 0), SHORT_STEPS):
        run.train_step(samples)
        read |= {id(sample): sample for sample in samples}
    return list(read.values())


def _with_adapters(scored: Scored) -> None:
    apply_tuner(scored.model, scored.parts, scored.training)
    if scored.training.checkpointing:
        recompute_layers(scored.parts)


@contextlib.contextmanager
def without_adapters(layer: nn.Module) -> Iterator[None]:
    """Switches a layer's adapters off, and on again."""
    kept = [dict(part.scaling) for part in layers_of(layer)]
    for part in layers_of(layer):
        part.scaling = dict.fromkeys(part.scaling, 0.0)
    try:
        yield
    finally:
        for part, scaling in zip(layers_of(layer), kept, strict=True):
            part.scaling = scaling


def by_ablation(scored: Scored) -> Found:
    """Validation loss without a layer's adapters minus that with all, after a short training of LoRA in all layers."""
    layers = scored.parts.layers
    _with_adapters(scored)
    rows = short_run(scored, range(len(layers)))
    whole = scored.validation_loss()
    scores = []
    for layer in layers:
        with without_adapters(layer):
            scores.append(scored.validation_loss() - whole)
        scored.progress(len(scores), len(layers))
    return scores, rows


def by_progress(scored: Scored) -> Found:
    """The fall of the validation loss when a layer joins those above it: short trainings of the top k, k = 1, 2, ...

    Every training starts from the same fresh adapters and reads the same rows. The first layer that brings less than
    TOLERANCE of all that was gained ends the search; it and all below it score 0.
    """
    count = len(scored.parts.layers)
    _with_adapters(scored)
    scores, rows = [0.0] * count, []
    base = before = scored.validation_loss()
    for lowest in reversed(range(count)):
        torch.manual_seed(scored.training.seed)
        for part in layers_of(scored.model):
            part.reset_lora_parameters("default", True)
        rows = short_run(scored, range(lowest, count))
        after = scored.validation_loss()
        scored.progress(count - lowest, count)
        if before - after <= TOLERANCE * max(0.0, base - after):
            break
        scores[lowest], before = before - after, after
    scored.progress(count, count)
    return scores, rows


METHODS: dict[str, Callable[[Scored], Found]] = {
    "gradient": by_gradient,
    "hidden": by_hidden,
    "ablation": by_ablation,
    "progressive": by_progress,
}


def score(plan: Plan, method: LayerScore, progress: Progress) -> Importance:
    """The importance of every layer of a plan's model for its data, run as the plan (LoRA in all layers) runs.

    Raises what training does: BadInput for data or a model that cannot be used, DoesNotFit, EdgeftError.
    """
    if method not in METHODS:
        known = [name for name in get_args(LayerScore) if name in METHODS]
        raise BadInput("layer_score", f"{method} reads no data", "one of " + ", ".join(known))
    meter.import_all()
    meter.control_malloc()
    started = time.monotonic()
    device, compute, deviations = choose_device(plan, None)
    plan = carried_out(plan, deviations)
    training = plan.training
    check_budget(plan, device)
    data = Data.read(plan)
    stage = f"score layers by {method}"
    progress(stage, 0, 1, {})
    meter.reset_peak(device)
    model, parts = prepare(plan, device, compute, local_folder(plan.job.model))
    check_head(model, parts, data.train[0], device, compute)
    scored = Scored(
        training, device, compute, model, parts, data.train, data.valid,
        progress=lambda done, total: progress(stage, done, total, {"bytes_now": meter.bytes_now(device)}),
    )  # fmt: skip
    scores, rows = METHODS[method](scored)
    if not all(map(math.isfinite, scores)):
        hint = "use another layer_score, or another precision: --set base_precision=fp32"
        raise EdgeftError("layer_score", f"{method} gave scores that are not finite: {scores}", hint)
    return Importance(
        method=method,
        scores=tuple(float(f"{value:.6g}") for value in scores),
        rows=len(rows),
        tokens=sum(len(row.ids) for row in rows),
        device=device.type,
        seconds=round(time.monotonic() - started, 2),
        peak_bytes=meter.peak_bytes(device),
    )


def main(plan_file: str, method: LayerScore) -> None:
    """`score` in a process of its own: on stdout a line of JSON for each report of progress, then the result."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes elsewhere

    def say(kind: str, value: Any) -> None:
        lines.write(json.dumps([kind, value]) + "\n")

    try:
        found = score(Plan.read(Path(plan_file)), method, lambda *report: say("progress", report))
    except EdgeftError as problem:
        say("error", [type(problem).__name__, problem.where, problem.problem, problem.hint])
        sys.exit(problem.exit_code)
    say("result", found.model_dump(mode="json"))
