"""What does a model with random weights, made where it computes, take and how long does its step last?

Nothing is read from a disk: an 8B base in 4 bits is there after seconds, and its tensors are those of a loaded one.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from run import BASE, CONFIGS

from edgeft.data.dataset import Sample
from edgeft.engine.loop import Run, make_run
from edgeft.engine.nf4_base import make_nf4
from edgeft.engine.nf4_codes import nf4_codes, quantise_on
from edgeft.engine.trainable import apply_tuner
from edgeft.machines import meter
from edgeft.machines.profile import Profile
from edgeft.memory import phases, timing
from edgeft.memory.train_step import Workload
from edgeft.models.checkpoint import DTYPES, quiet_transformers
from edgeft.models.parts import Parts, cap_scores, find_parts, repeat_groups
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.progress import silent
from edgeft.settings.attention import repeats_groups
from edgeft.settings.job import Training
from edgeft.training.out_of_memory import capped
from edgeft.training.prepare import tf32

WARM_UP = 2  # steps before any is timed: kernels are loaded, the allocator has its blocks


@dataclass(frozen=True)
class Case:
    """One way of training one shape; `cap_gib`: what the process may take of the card."""

    name: str
    folder: Path
    training: Training
    cap_gib: float = 0.0
    steps: int = 3
    needs_files: bool = False  # layers are made dense from the base's files

    @property
    def spec(self) -> ModelSpec:
        return read_model_spec(str(self.folder))

    @property
    def work(self) -> Workload:
        return Workload(self.training.max_length, self.training.max_trained)


def measured_before(runs: dict[str, Any], run: dict[str, Any], **changes: Any) -> Case:
    """A case of bench/gpu_runs.json, with the settings that its numbers were measured at."""
    folder = BASE if run["model"] == BASE.name else CONFIGS / run["model"]
    spec = read_model_spec(str(folder))
    settings = {**runs["shared"], **run["settings"], **changes}
    settings |= {"rank": 0} if settings["tuner"] == "full" else {}
    count = settings["active_layers"] if settings.get("layers") == "sparse" else spec.num_hidden_layers
    plain = {
        "device": "cuda", "lora_alpha": 16.0, "max_trained": settings["max_length"] - 1, "learning_rate": 1e-4,
        "steps": 8, "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 0, "checkpoint_steps": None,
        "eval_rows": 1, "trained_layers": tuple(range(spec.num_hidden_layers - count, spec.num_hidden_layers)),
        "target_modules": tuple(linear.name for linear in spec.linears) if settings["rank"] else (),
    }  # fmt: skip
    if settings.get("layers") == "lisa":
        plain |= {"lisa_interval": 4}  # one change of layers among the timed steps
    training = Training.model_validate({**plain, **settings})
    cap = 9.0 if "in 9 GiB" in run["run"] else 0.0
    return Case(run["run"], folder, training, cap, needs_files=training.layers == "lisa" or training.densely)


def planned(case: Case, profile: Profile) -> dict[str, Any]:
    """What edgeft says of a case before it runs: bytes of its step, at most those of any phase, seconds."""
    spec, training, work = case.spec, case.training, case.work
    found = phases.phases(spec, training, work, baseline_bytes=0, capability=profile.compute_capability)
    step = next(phase for phase in found if phase.name == "train")
    alive = sum(term.bytes for term in step.terms if term.name != "reserved")
    counted = timing.count(spec, training, work, training.kept_layers)
    return {
        "planned_allocated_bytes": alive, "planned_bytes": step.expected_bytes,
        "planned_high_bytes": max(phase.high_bytes for phase in found),
        "planned_seconds_per_step": round(timing.seconds_per_step(profile, training, work, counted), 4),
    }  # fmt: skip


def errors(row: dict[str, Any]) -> dict[str, Any]:
    """How far what was planned of a row is from what was measured."""
    found: dict[str, Any] = {}
    if "reserved_bytes" in row:
        found["error_of_allocated"] = round(row["planned_allocated_bytes"] / row["allocated_bytes"] - 1, 4)
        found["error_of_reserved"] = round(row["planned_bytes"] / row["reserved_bytes"] - 1, 4)
        found["above_high"] = row["reserved_bytes"] > row["planned_high_bytes"]
    if "seconds_per_step" in row:
        found["planned_to_measured_seconds"] = round(row["planned_seconds_per_step"] / row["seconds_per_step"], 3)
    return found


def random_model(case: Case, device: torch.device, base: Path | None = None) -> tuple[Any, Parts]:
    """A base with random weights as `training.prepare` would give it, made on the device; its head is never packed.

    `base`: where its files are written, before anything is packed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    training, compute = case.training, DTYPES[case.training.compute_dtype]
    nf4 = training.base_precision == "nf4"
    dense = DTYPES[training.base_precision] if not nf4 and compute.itemsize == 2 else compute
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    with quiet_transformers(), torch.device(device):
        model = auto.from_config(AutoConfig.from_pretrained(case.folder), dtype=dense).eval()
    model.config.use_cache = False
    cap_scores(model)
    if base is not None:
        model.save_pretrained(base)
    if nf4:
        pack(model, compute)
    if repeats_groups(training, case.spec.head_dim):
        repeat_groups(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, find_parts(model)


def pack(model: Any, compute: torch.dtype) -> None:
    """Make every matrix but the head's 4-bit, one after the other."""
    head = model.get_output_embeddings()
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    for name, linear in linears:
        linear.source_cls = torch.nn.Linear
        model.set_submodule(name, make_nf4(linear, compute))
        linear.weight = None
    del linears


def rows_of(case: Case) -> list[Sample]:
    """The samples of one step: random words, each as long as the longest."""
    draw = torch.Generator().manual_seed(1)
    length, trained = case.training.max_length, case.training.max_trained
    words = torch.randint(1, case.spec.vocab_size, (case.training.batch_size, length), generator=draw).tolist()
    hidden = length - trained
    return [Sample(ids, [-100] * hidden + ids[hidden:], hidden) for ids in words]


def start(case: Case, device: torch.device, scratch: Path) -> Run:
    """The run of a case, before its first step."""
    training, compute = case.training, DTYPES[case.training.compute_dtype]
    if not case.needs_files:
        model, parts = random_model(case, device)
        return Run(training, device, compute, model, parts, apply_tuner(model, parts, training))
    base, work = scratch / "base", scratch / "work"
    work.mkdir(parents=True)
    model, parts = random_model(case, device, base)
    return make_run(training, device, compute, model, parts, base, work)


def limited(case: Case, device: torch.device) -> AbstractContextManager[None]:
    """A process held to what the case may take of the card."""
    return capped(round(case.cap_gib * 2**30), device) if case.cap_gib else nullcontext()


def measure(case: Case, device: torch.device, scratch: Path) -> dict[str, Any]:
    """Bytes at their highest and seconds of each timed step."""
    run, samples = start(case, device, scratch), rows_of(case)
    clear(device)
    with tf32(case.training, device), limited(case, device):
        seconds, busy, losses = timed(run, samples, case.steps, device)
    return {**bytes_at_the_highest(device), **summary(seconds), "host_seconds_per_step": round(busy, 4),
            "micro_batches": run.micro_batches // run.step, "losses": [round(loss, 4) for loss in losses]}  # fmt: skip


def timed(run: Run, samples: list[Sample], steps: int, device: torch.device) -> tuple[list[float], float, list[float]]:
    """(seconds of each step after the warm-up, the process's CPU seconds of a step, every loss)."""
    seconds, losses, busy = [], [], 0.0
    for step in range(WARM_UP + steps):
        wait(device)
        started, before = time.perf_counter(), time.process_time()
        losses.append(run.train_step(samples))
        wait(device)
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - started)
            busy += (time.process_time() - before) / steps
    return seconds, busy, losses


def summary(seconds: list[float]) -> dict[str, Any]:
    """The median of timed steps, and all of them."""
    return {"seconds_per_step": round(statistics.median(seconds), 4), "seconds": [round(one, 4) for one in seconds]}


def count_kernels(case: Case, device: torch.device, scratch: Path) -> dict[str, Any]:
    """What one step puts on the device: launches, their seconds there, copies, and what the host spends meanwhile."""
    from torch.profiler import ProfilerActivity, profile

    run, samples = start(case, device, scratch), rows_of(case)
    on_card = device.type == "cuda"
    with tf32(case.training, device):
        for _ in range(WARM_UP):
            run.train_step(samples)
        wait(device)
        with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as seen:
            started = time.perf_counter()
            run.train_step(samples)
            wait(device)
            seconds = time.perf_counter() - started
    kind = torch.autograd.DeviceType.CUDA if on_card else torch.autograd.DeviceType.CPU
    events = [event for event in seen.events() or [] if event.device_type == kind]
    copies = [event for event in events if event.name.startswith(("Memcpy", "Memset"))]
    busy = sum(event.time_range.elapsed_us() for event in events)
    return {"kernels": len(events) - len(copies), "copies": len(copies), "device_seconds": round(busy / 1e6, 5),
            "profiled_seconds": round(seconds, 4), "top": top(events)}  # fmt: skip


def top(events: list[Any]) -> dict[str, list[float]]:
    """The twelve kernels that take most of a step: how often, and milliseconds."""
    found: dict[str, list[float]] = {}
    for event in events:
        one = found.setdefault(event.name[:80], [0, 0.0])
        one[0], one[1] = one[0] + 1, round(one[1] + event.time_range.elapsed_us() / 1e3, 3)
    return dict(sorted(found.items(), key=lambda item: -item[1][1])[:12])


def launch_seconds(device: torch.device, count: int = 5000) -> float:
    """Host seconds of putting one small operation on the device."""
    x = torch.zeros(64, device=device)
    for _ in range(2):
        wait(device)
        started = time.perf_counter()
        for _ in range(count):
            x.add_(1.0)
        each = (time.perf_counter() - started) / count
    wait(device)
    return each


def nf4_from_files(case: Case, device: torch.device, scratch: Path) -> dict[str, Any]:
    """Seconds and bytes of making a base NF4 from its files, on the device; codes that differ from a CPU's."""
    model, _ = random_model(case, device, scratch / "base")
    largest = max((p for p in model.parameters() if p.ndim == 2), key=torch.Tensor.numel).detach().cpu()[:4096]
    del model
    clear(device)
    before, started = meter.bytes_now(torch.device("cpu")), time.perf_counter()
    made = quantise_on(scratch / "base", scratch / "nf4", device, silent)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    codes, scales = nf4_codes(largest, torch.device("cpu"))
    host = time.perf_counter() - started
    there, other = nf4_codes(largest, device)
    return {
        **bytes_at_the_highest(device), "made": made, "seconds_to_make": round(seconds, 2),
        "host_bytes_more": meter.peak_bytes(torch.device("cpu")) - before, "parameters": case.spec.total_parameters,
        "codes_compared": codes.numel() * 2, "codes_that_differ": int((codes != there).sum()),
        "scales_that_differ": int((scales != other).sum()), "host_seconds_of_compared": round(host, 3),
    }  # fmt: skip


def bytes_at_the_highest(device: torch.device) -> dict[str, int]:
    """Allocated and reserved; nothing without a GPU."""
    if device.type != "cuda":
        return {}
    return {"allocated_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}


def clear(device: torch.device) -> None:
    """Forget what is gone: what is measured next starts from what is alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    meter.reset_peak(device)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def shrink(case: Case, out: Path) -> Case:
    """The case on a shape of the same family, two layers of a small width, for a CPU: what a rehearsal runs."""
    config = json.loads((case.folder / "config.json").read_text())
    heads = max(1, config["num_attention_heads"] // config.get("num_key_value_heads", config["num_attention_heads"]))
    small = {
        "num_hidden_layers": 2, "hidden_size": 64 * heads, "intermediate_size": 128, "num_attention_heads": 2 * heads,
        "vocab_size": 512, "layer_types": config.get("layer_types", [])[:2] or None, "pad_token_id": 0,
        "max_window_layers": 2,
    }  # fmt: skip
    config |= {key: value for key, value in small.items() if key in config}
    config |= {"num_key_value_heads": 2} if "num_key_value_heads" in config else {}
    config |= {"head_dim": 32} if "head_dim" in config else {}
    folder = out / case.name.replace(" ", "-").replace(",", "")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    old = case.training
    changes = {
        "device": "cpu", "compute_dtype": "fp32", "optimizer": "adamw", "max_length": 32, "max_trained": 31,
        "base_precision": "nf4" if old.base_precision == "nf4" else "fp32", "batch_size": 2, "micro_batch_size": 1,
        "trained_layers": (0, 1), "kept_layers": min(old.kept_layers, 1), "active_layers": min(1, old.active_layers),
        "layers": "all" if old.layers == "sparse" else old.layers,
    }  # fmt: skip
    training = old.model_copy(update=changes)
    return Case(case.name, folder, training, 0.0, case.steps, case.needs_files)
