"""How fast does this machine's GPU compute, and what is left of its memory? Measured in a fresh process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import get_args

from edgeft.machines.limits import usable_cores
from edgeft.machines.probe import Dtype
from edgeft.training.measure_machine import _TORCH_NAMES, _fastest

LARGEST, BYTES = 16384, 2**28  # width of a product, size of a copy: larger than caches, and fit 2 GiB


def measure() -> str:
    """The first CUDA device's rates, capability and memory as JSON; `kept_bytes` is taken where no model is there.

    Raises RuntimeError where PyTorch sees none.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no CUDA device")
    capability = torch.cuda.get_device_capability()
    dtypes = [dtype for dtype in get_args(Dtype) if dtype != "bf16" or capability >= (8, 0)]  # below it is emulated
    found = {"matmul_tflops": {dtype: _matmul_tflops(dtype) for dtype in dtypes}, "gb_per_second": _copy()}
    torch.cuda.empty_cache()
    seen = torch.cuda.get_device_properties(0).total_memory
    return json.dumps({
        **found, "total_bytes": seen, "kept_bytes": max(0, seen - torch.cuda.mem_get_info()[0]),
        "cores": usable_cores(), "compute_capability": float(f"{capability[0]}.{capability[1]}"),
    })  # fmt: skip


def _matmul_tflops(name: Dtype) -> float:
    """2 n^3 / seconds / 10^12 of an n x n product; n doubles until one takes 20 ms."""
    import torch

    size, seconds = 1024, 0.0
    while seconds < 0.02 and size < LARGEST:
        size *= 2
        a, b = torch.ones((2, size, size), dtype=getattr(torch, _TORCH_NAMES[name]), device="cuda")
        seconds, _ = _fastest(_finished(partial(torch.matmul, a, b)), for_seconds=0.0)
    seconds, _ = _fastest(_finished(partial(torch.matmul, a, b)))
    return float(f"{2 * size**3 / seconds / 1e12:.3g}")


def _copy() -> float:
    """10^9 bytes a second, read plus written."""
    import torch

    source = torch.ones(BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds, _ = _fastest(_finished(partial(target.copy_, source)))
    return float(f"{2 * BYTES / seconds / 1e9:.3g}")


def _finished(call: Callable[[], object]) -> Callable[[], object]:
    """A call that waits for the device, where it would only be started there."""
    import torch

    def wait() -> None:
        call()
        torch.cuda.synchronize()

    return wait
