"""How is a plan carried out, so that what was planned is what runs, and a killed run goes on where it stopped?"""

from __future__ import annotations

import json
import math
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as recompute

from edgeft import ledger
from edgeft.architectures import Parts, find_parts, repeat_for_groups
from edgeft.artifacts import Artifact, Strict, saving, staging, versions
from edgeft.batches import epoch_order, steps_per_epoch
from edgeft.checkpoint import DTYPES, load_base, local_folder, weights_sha256
from edgeft.data import IGNORED, Sample, TextTokenizer, hold_out, read_rows, to_samples
from edgeft.errors import BadInput, DoesNotFit, EdgeftError
from edgeft.evaluate import autocast, evaluate, token_losses
from edgeft.planner import HELD_OUT_SHARE, Plan
from edgeft.scores import Metrics
from edgeft.settings import Training
from edgeft.tuners import apply_tuner, save_tuned
from edgeft.units import show_bytes

SECONDS_BETWEEN_CHECKPOINTS = 60.0
Progress = Callable[[str, int, int, dict[str, float]], None]


class Deviation(Strict):
    """Something that could not be done as planned, and what was done instead."""

    what: str
    planned: str
    done: str


class TrainResult(Artifact):
    """train.json: what was trained, on what, how well, and how much memory it took."""

    plan: Plan
    base_sha256: str
    deviations: tuple[Deviation, ...]
    steps: int
    trained_parameters: int
    trained_tokens: int
    seconds: float
    tokens_per_second: float
    predicted_peak_bytes: int
    measured_peak_bytes: int
    phase_peak_bytes: dict[str, int]
    loss_curve: tuple[tuple[int, float], ...]
    cut_rows: int
    base_valid: Metrics
    valid: Metrics
    base_test: Metrics | None
    test: Metrics | None
    resumed_at: tuple[int, ...] = ()


@dataclass
class Data:
    """The samples of one job; `valid` is held out of the training file when no file is given for it."""

    train: list[Sample]
    valid: list[Sample]
    test: list[Sample]
    tokenizer: TextTokenizer

    @classmethod
    def read(cls, plan: Plan) -> Data:
        if plan.job.data is None:
            raise BadInput("plan", "was made without training data", "plan again with --data FILE (make: data=FILE)")
        tokenizer = TextTokenizer(local_folder(plan.job.model))

        def samples(source: str) -> list[Sample]:
            return to_samples(read_rows(source, tokenizer), tokenizer, plan.training.max_length)

        train = samples(plan.job.data)
        valid = samples(plan.job.valid) if plan.job.valid else []
        if not valid:
            train, valid = hold_out(train, HELD_OUT_SHARE, plan.training.seed)
        train = [sample for sample in train if sample.trained_tokens]
        if not train:
            hint = "raise max_length: every sample was cut before its first trained token"
            raise BadInput(plan.job.data, "no sample has a token to train on", hint)
        return cls(train, valid, samples(plan.job.test) if plan.job.test else [], tokenizer)


@dataclass
class Run:
    """One training process: the model, what trains, and everything a checkpoint must bring back."""

    training: Training
    device: torch.device
    compute: torch.dtype
    model: Any
    parts: Parts
    chosen: list[tuple[str, torch.nn.Parameter]]
    optimizer: torch.optim.Optimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    step: int = 0
    tokens: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.training, self.device, [p for _, p in self.chosen])
        scaled = self.compute == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        if self.training.checkpointing:
            recompute_layers(self.parts, self.training)

    def train_step(self, samples: list[Sample]) -> float:
        """Mean loss in nats per trained token of one optimizer step over `samples`, in micro-batches."""
        training = self.training
        tokens = sum(sample.trained_tokens for sample in samples)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(training, self.step)
        total = 0.0
        for start in range(0, len(samples), training.micro_batch_size):
            micro = samples[start : start + training.micro_batch_size]
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
        self.tokens += sum(len(sample.ids) for sample in samples)
        return total

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """One checkpoint in `folder`/step-N, whole or not at all; the two newest are kept."""
        with staging(folder / f"step-{self.step:08d}") as temporary:
            state = {
                "parameters": {name: p.detach() for name, p in self.chosen},
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": torch.get_rng_state(),
            }
            torch.save(state, temporary / "state.pt")
            counters = {"step": self.step, "tokens": self.tokens, "curve": self.curve, **extra}
            (temporary / "counters.json").write_text(json.dumps(counters))
        for old in sorted(folder.glob("step-*"))[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, folder: Path) -> dict[str, Any] | None:
        """Go on from the newest readable checkpoint; its counters, or None when there is none."""
        for path in sorted(folder.glob("step-*"), reverse=True):
            try:
                counters: dict[str, Any] = json.loads((path / "counters.json").read_text())
                state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError):
                continue  # a disk that lost bytes: the one before it is as good, only older
            with torch.no_grad():
                for name, parameter in self.chosen:
                    parameter.copy_(state["parameters"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["rng"])
            self.step, self.tokens = counters["step"], counters["tokens"]
            self.curve = [(step, loss) for step, loss in counters["curve"]]
            return counters
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


def recompute_layers(parts: Parts, training: Training) -> None:
    """Checkpoint the activations of every layer that autograd sees: the lowest trained one and all above it.

    The layers below run without autograd and save nothing; checkpointing them as well would only cost their inputs.
    """
    for layer in list(parts.layers)[min(training.trained_layers) :]:
        layer.forward = _recomputed(layer.forward)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
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


def check_head(model: Any, parts: Parts, sample: Sample, device: torch.device, compute: torch.dtype) -> None:
    """Compare the chunked loss with the model's own logits on one sample; raises BadInput where they differ.

    It catches a model that does something to its hidden states or logits that edgeft does not know of.
    """
    short = Sample(sample.ids[:64], [IGNORED, *sample.ids[1:64]], 0, "")
    with torch.no_grad(), autocast(device, compute):
        logits = model(input_ids=torch.tensor([short.ids], device=device), use_cache=False).logits[0, :-1].float()
    targets = torch.tensor(short.ids[1:], device=device)
    own = float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    with torch.no_grad():
        ours = float(token_losses(model, parts, [short], device, compute, 16))
    # half precision: the model's own logits are rounded once more than ours
    if abs(own - ours) > (1e-3 if compute == torch.float32 else 2e-2) * max(1.0, abs(own)):
        name = type(model).__name__
        raise BadInput(
            name,
            f"its own loss on one sample is {own:.4f}, computed in chunks {ours:.4f}",
            "report this model",
        )


def choose_device(plan: Plan, wanted: str | None) -> tuple[torch.device, torch.dtype, list[Deviation]]:
    """(device, compute dtype, deviations): the plan's own, or the CPU in a dtype it computes at full rate.

    Raises BadInput when `wanted` names a device that is not there.
    """
    training, here = (
        plan.training,
        {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()},
    )
    if wanted is not None and not here.get(wanted, False):
        raise BadInput("--device", f"{wanted} is not available here", "leave --device out to train on the CPU")
    if wanted is not None and wanted != training.device:
        raise BadInput("--device", f"the plan is for {training.device}, not {wanted}", "plan with another --profile")
    compute = DTYPES[training.compute_dtype]
    if here[training.device]:
        return torch.device(training.device), compute, []
    deviations = [Deviation(what="device", planned=training.device, done="cpu")]
    if compute != torch.float32:
        deviations.append(Deviation(what="compute_dtype", planned=training.compute_dtype, done="fp32"))
    if training.optimizer != "adamw":
        deviations.append(Deviation(what="optimizer", planned=training.optimizer, done="adamw"))
    return torch.device("cpu"), torch.float32, deviations


def prepare(plan: Plan, device: torch.device, compute: torch.dtype, folder: Path) -> tuple[Any, Parts]:
    """The base model on its device, frozen, with the attention the plan counts on."""
    model = load_base(folder, plan.training, device, compute)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register("edgeft_repeat", repeat_for_groups)
        AttentionMaskInterface.register("edgeft_repeat", sdpa_mask)
        model.set_attn_implementation("edgeft_repeat")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, find_parts(model)


class Stop:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after this step; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        self.old = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


def work_folder(out: Path) -> Path:
    """Where a run that has not ended keeps its checkpoints."""
    return out.with_name(f".{out.name}.work")


def train(
    plan: Plan, out: Path, *, plan_sha256: str, progress: Progress, wanted_device: str | None = None
) -> TrainResult:
    """Run a plan and write `out`/train.json beside what was trained.

    Raises BadInput for data or a model that cannot be used, DoesNotFit when this machine has less memory than the plan
    needs, EdgeftError when the loss is not finite, KeyboardInterrupt after saving when asked to stop.
    """
    ledger.import_all()
    ledger.control_malloc()
    started = time.monotonic()
    training = plan.training
    device, compute, deviations = choose_device(plan, wanted_device)
    if deviations:
        training = training.model_copy(update={d.what: d.done for d in deviations})
    check_budget(plan, device)
    folder = local_folder(plan.job.model)
    data = Data.read(plan)
    work = work_folder(out)
    with saving(work):
        work.mkdir(parents=True, exist_ok=True)
        if (work / "plan.sha256").exists() and (work / "plan.sha256").read_text() != plan_sha256:
            for old in work.glob("step-*"):  # checkpoints of another plan
                shutil.rmtree(old)
        (work / "plan.sha256").write_text(plan_sha256)
    phases: dict[str, int] = {}
    progress("load", 0, 1, {})
    model, parts = prepare(plan, device, compute, folder)
    check_head(model, parts, data.train[0], device, compute)
    base_sha256 = weights_sha256(folder)
    phases["load"] = ledger.peak_bytes(device)

    def score(name: str, samples: list[Sample]) -> Metrics:
        return evaluate(
            model, parts, samples, data.tokenizer, device=device, compute=compute,
            chunk_tokens=training.loss_chunk_tokens, group_tokens=training.group_tokens,
            progress=lambda done, total: progress(name, done, total, {}),
        )  # fmt: skip

    valid = data.valid[: training.eval_rows]
    scores: dict[str, Any] = {}
    if not any(work.glob("step-*")):
        ledger.reset_peak(device)
        scores["base_valid"] = score("base on valid", valid).model_dump()
        scores["base_test"] = score("base on test", data.test).model_dump() if data.test else None
        phases["evaluate"] = ledger.peak_bytes(device)
    run = Run(training, device, compute, model, parts, apply_tuner(model, parts, training))
    counters = run.load(work) or {"scores": scores, "resumed_at": [], "seconds": 0.0, "phases": phases}
    resumed = [*counters["resumed_at"], *([run.step] if run.step else [])]
    scores, phases = counters["scores"], {**phases, **counters["phases"]}
    if not scores:  # every checkpoint there was had become unreadable
        return _start_over(plan, out, plan_sha256, progress, wanted_device)
    ledger.reset_peak(device)
    before = counters["seconds"]
    loop_started = time.monotonic()

    def extra() -> dict[str, Any]:
        phases["train"] = max(phases.get("train", 0), ledger.peak_bytes(device))
        spent = before + time.monotonic() - loop_started
        return {"scores": scores, "resumed_at": resumed, "seconds": spent, "phases": phases}

    with Stop() as stop:
        last_saved = time.monotonic()
        for samples in remaining_steps(training, data.train, run.step):
            loss = run.train_step(samples)
            run.curve.append((run.step, round(loss, 6)))
            spent = before + time.monotonic() - loop_started
            progress("train", run.step, training.steps, {
                "loss": loss, "learning_rate": learning_rate(training, run.step - 1),
                "tokens_per_second": run.tokens / spent, "bytes_now": ledger.bytes_now(device),
                "seconds_left": spent / run.step * (training.steps - run.step),
            })  # fmt: skip
            due = time.monotonic() - last_saved > SECONDS_BETWEEN_CHECKPOINTS
            if training.checkpoint_steps is not None:
                due = run.step % training.checkpoint_steps == 0
            if (due and run.step < training.steps) or stop.asked:
                run.save(work, extra())
                last_saved = time.monotonic()
            if stop.asked:
                raise KeyboardInterrupt
    spent = extra()["seconds"]
    run.optimizer.state.clear()  # scoring needs no optimizer states
    ledger.reset_peak(device)
    tuned_valid = score("valid", valid)
    tuned_test = score("test", data.test) if data.test else None
    phases["evaluate"] = max(phases.get("evaluate", 0), ledger.peak_bytes(device))
    ledger.reset_peak(device)
    with staging(out) as temporary:
        save_tuned(model, parts, training, plan.job.model, temporary)
        phases["save"] = ledger.peak_bytes(device)
        result = TrainResult(
            input_sha256=plan_sha256,
            versions=versions(),
            plan=plan,
            base_sha256=base_sha256,
            deviations=tuple(deviations),
            steps=run.step,
            trained_parameters=sum(p.numel() for _, p in run.chosen),
            trained_tokens=run.tokens,
            seconds=round(spent, 2),
            tokens_per_second=round(run.tokens / spent, 1),
            predicted_peak_bytes=plan.peak_bytes,
            measured_peak_bytes=max(phases.values()),
            phase_peak_bytes=phases,
            loss_curve=tuple(run.curve),
            cut_rows=sum(sample.cut_tokens > 0 for sample in data.train),
            base_valid=Metrics.model_validate(scores["base_valid"]),
            valid=tuned_valid,
            base_test=Metrics.model_validate(scores["base_test"]) if scores["base_test"] else None,
            test=tuned_test,
            resumed_at=tuple(resumed),
        )
        result.write(temporary / "train.json")
    shutil.rmtree(work, ignore_errors=True)
    progress("done", 1, 1, {"seconds": time.monotonic() - started})
    return result


def _start_over(plan: Plan, out: Path, plan_sha256: str, progress: Progress, wanted: str | None) -> TrainResult:
    shutil.rmtree(work_folder(out))
    return train(plan, out, plan_sha256=plan_sha256, progress=progress, wanted_device=wanted)


def remaining_steps(training: Training, samples: list[Sample], done: int) -> Iterator[list[Sample]]:
    """The samples of each optimizer step from step `done` on: nothing is stored, the order is computed again."""
    lengths = [len(sample.ids) for sample in samples]
    each = steps_per_epoch(len(samples), training.batch_size)
    for epoch in range(done // each, -(-training.steps // each)):
        order = epoch_order(lengths, training.batch_size, training.seed, epoch)
        first = done - epoch * each if epoch == done // each else 0
        for indices in order[first : training.steps - epoch * each]:
            yield [samples[i] for i in indices]


def check_budget(plan: Plan, device: torch.device) -> None:
    """Raise DoesNotFit when this process can really have less than the plan's high estimate."""
    from edgeft.machine import usable_memory

    have = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else usable_memory()
    need = plan.peak_bytes
    if need > have:
        hint = f"plan for what is there: edgeft plan --max-memory {have // 2**20}MiB ..."
        raise DoesNotFit("plan", f"needs {show_bytes(need)}, this process can have {show_bytes(have)}", hint)
