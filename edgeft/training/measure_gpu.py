"""How fast does this machine's GPU compute, and what is left of its memory? Measured in a fresh process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

from edgeft.machines.limits import usable_cores
from edgeft.machines.probe import Dtype
from edgeft.training.measure_machine import _TORCH_NAMES, _fastest, _rounded

SMALLEST, LARGEST, BYTES = 1024, 16384, 2**28  # widths of a product, size of a copy: larger than caches, within 2 GiB


def measure() -> str:
    """The first CUDA device's rates, capability and memory as JSON; `kept_bytes` is taken where no model is there.

    Raises RuntimeError where PyTorch sees none.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no CUDA device")
    capability = torch.cuda.get_device_capability()
    found = rates("cuda", torch.cuda.synchronize, bf16=capability >= (8, 0))  # below it is emulated
    torch.cuda.empty_cache()
    seen = torch.cuda.get_device_properties(0).total_memory
    return json.dumps({
        **found, "total_bytes": seen, "kept_bytes": max(0, seen - torch.cuda.mem_get_info()[0]),
        "cores": usable_cores(), "compute_capability": float(f"{capability[0]}.{capability[1]}"),
    })  # fmt: skip


def rates(device: str, finish: Callable[[], object], *, bf16: bool) -> dict[str, Any]:
    """10^12 operations a second of each dtype, and 10^9 bytes read plus written; `finish` waits for the device."""

    def seconds(call: Callable[[], object], for_seconds: float = 0.4) -> float:
        def whole() -> None:
            call()
            finish()

        return _fastest(whole, for_seconds)[0]

    dtypes = [dtype for dtype in get_args(Dtype) if dtype != "bf16" or bf16]
    return {
        "matmul_tflops": {dtype: _rounded(_matmul_tflops(dtype, device, seconds)) for dtype in dtypes},
        "gb_per_second": _rounded(_copied(device, seconds)),
    }


def _matmul_tflops(name: Dtype, device: str, seconds: Callable[..., float]) -> float:
    """2 n^3 / seconds / 10^12 of an n x n product; n doubles until one takes 20 ms."""
    import torch

    size, taken = SMALLEST, 0.0
    while taken < 0.02 and size < LARGEST:
        size *= 2
        a, b = torch.ones((2, size, size), dtype=getattr(torch, _TORCH_NAMES[name]), device=device)
        taken = seconds(partial(torch.matmul, a, b), for_seconds=0.0)
    return 2 * size**3 / seconds(partial(torch.matmul, a, b)) / 1e12


def _copied(device: str, seconds: Callable[..., float]) -> float:
    import torch

    source = torch.ones(BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * BYTES / seconds(partial(target.copy_, source)) / 1e9
