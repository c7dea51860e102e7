"""How fast does this CPU compute, and what do processes hold before they have a model? Measured in a fresh process."""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import get_args

from edgeft.machines.environment import cpu_model
from edgeft.machines.limits import resident_bytes, usable_cores, usable_memory
from edgeft.machines.probe import Dtype, Probe, _probe_versions

_TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def measure() -> str:
    """This CPU's Probe as JSON, measured in this process, which must be fresh: imports stay resident.

    Raises RuntimeError where torch was imported before: its memory and its number of threads would not be a run's.
    """
    if "torch" in sys.modules:
        raise RuntimeError("what a process holds is measured in one that has not imported torch yet")
    start = time.perf_counter()
    torch_rss_bytes = _rss_after_torch()
    import_rss_bytes = _rss_after_tiny_step()
    head_buffers = _head_buffers()
    import torch

    torch.set_num_threads(usable_cores())
    products = {dtype: _matmul(dtype) for dtype in get_args(Dtype)}
    probe = Probe(
        cpu=cpu_model(),
        cores=usable_cores(),
        matmul_tflops={dtype: _rounded(rate) for dtype, (rate, _) in products.items()},
        bandwidth_gb_per_second=_copy_gb_per_second(),
        torch_rss_bytes=torch_rss_bytes,
        import_rss_bytes=import_rss_bytes,
        head_buffers=head_buffers,
        share=round(min(1.0, products["fp32"][1] / usable_cores()), 3),
        seconds=round(time.perf_counter() - start, 2),
        versions=_probe_versions(),
    )
    return probe.model_dump_json()


def _rss_after_torch() -> int:
    """Resident bytes of a process that is about to merge."""
    for name in ("edgeft.cli", "edgeft.reporting.terminal", "rich.progress", "edgeft.merging.merge"):
        importlib.import_module(name)
    return resident()


def resident() -> int:
    """Resident bytes of this process, on any system."""
    return resident_bytes() or int(importlib.import_module("psutil").Process().memory_info().rss)


def _rss_after_tiny_step() -> int:
    """Resident bytes of a process that has done what a training run does, on a model too small to count.

    One step and one generated token of edgeft's own code, with products large enough that the matrix library has made
    its buffers: what is resident then, before any real model, is in every training process.
    """
    import gc

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from edgeft.data.dataset import Sample
    from edgeft.engine.loop import Run
    from edgeft.engine.trainable import apply_tuner
    from edgeft.machines import meter
    from edgeft.models.evaluate import greedy
    from edgeft.models.parts import find_parts
    from edgeft.settings.job import Training
    from edgeft.settings.tuners import ADAPTERS

    meter.import_all()
    meter.control_malloc()
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_hidden_layers=2,
        use_cache=False,
    )
    training = Training(
        device="cpu", tuner=ADAPTERS, base_precision="fp32", compute_dtype="fp32", rank=8, lora_alpha=16.0,
        target_modules=("q_proj", "down_proj"), trained_layers=(0, 1), micro_batch_size=4,
        batch_size=4, max_length=128, max_trained=127, checkpointing=False, loss_chunk_tokens=256, optimizer="adamw",
        learning_rate=1e-3, steps=1,
        warmup_steps=1, weight_decay=0.0, max_grad_norm=1.0, seed=0, checkpoint_steps=None, eval_rows=1,
    )  # fmt: skip
    device = torch.device("cpu")
    model = LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    parts = find_parts(model)
    run = Run(training, device, torch.float32, model, parts, apply_tuner(model, parts, training))
    ids = list(range(128))
    run.train_step([Sample(ids, ids, 0)] * 4)
    greedy(model, [ids[:8]], [0], 2, device)
    del run, model, parts
    gc.collect()
    return resident()


def _head_buffers() -> dict[int, int]:
    """Bytes per word that stay resident after the product of so many rows with an output head.

    From some number of rows on, which depends on its threads, the library packs a wide matrix and keeps the room.
    """
    import torch

    width, words = 448, 32768
    head, rows = torch.ones(words, width), torch.ones(1024, width)
    before, found = resident(), {}
    for count in (128, 256, 512, 1024):
        torch.nn.functional.linear(rows[:count], head)
        found[count] = max(0, round((resident() - before) / words))
    return found


def _matmul(name: Dtype) -> tuple[float, float]:
    """2 n^3 / seconds / 10^12 of an n x n matmul, and the cores that it got; n doubles until one takes 20 ms."""
    import torch

    size, seconds = 128, 0.0
    while seconds < 0.02 and size < 2048:  # emulation is slow
        size *= 2
        a, b = torch.ones((2, size, size), dtype=getattr(torch, _TORCH_NAMES[name]))
        seconds, _ = _fastest(partial(torch.matmul, a, b), for_seconds=0.0)
    seconds, cores = _fastest(partial(torch.matmul, a, b))
    return 2 * size**3 / seconds / 1e12, cores


def _copy_gb_per_second() -> float:
    import torch

    # 256 MiB is larger than most caches; at most an eighth of what we may have, so that the probe fits.
    source = torch.ones(min(2**26, usable_memory() // 32))
    target = torch.empty_like(source)
    seconds, _ = _fastest(partial(target.copy_, source))
    return _rounded(2 * source.nbytes / seconds / 1e9)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def _fastest(call: Callable[[], object], for_seconds: float = 0.4) -> tuple[float, float]:
    """Seconds of the fastest call after one that warms up, as other work can only slow one down; cores that all got."""
    call()
    best, begun, computed = math.inf, time.perf_counter(), time.process_time()
    while best == math.inf or time.perf_counter() < begun + for_seconds:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best, (time.process_time() - computed) / (time.perf_counter() - begun)
