"""What does a recorded number depend on besides the code: which machine, which packages, which commit, how busy?"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeft.documents import versions
from edgeft.machines.limits import PROC, usable_cores

# Instructions that decide how fast a model computes, as /proc/cpuinfo writes them (x86-64, then ARM).
FEATURES = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
    "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
RUNTIMES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers", "numpy", "onnx",
    "onnxruntime", "onnxruntime-genai", "llama-cpp-python",
)  # fmt: skip


def cpu_model() -> str:
    """The CPU's name, as far as the system tells."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """Those of FEATURES that this CPU has; none where the system does not tell."""
    flags = set(cpuinfo("flags", "Features").split())
    return tuple(name for name in FEATURES if name in flags)


def cpuinfo(*fields: str) -> str:
    """The first of these fields in /proc/cpuinfo, "" where there is none."""
    with contextlib.suppress(OSError):
        for line in (PROC / "cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in fields:
                return value.strip()
    return ""


def threads(variables: Mapping[str, str] | None = None) -> int:
    """Threads that a process starts with: OMP_NUM_THREADS where it is a number, else every usable core."""
    asked = (os.environ if variables is None else variables).get("OMP_NUM_THREADS", "").split(",")[0]
    return int(asked) if asked.isdigit() and int(asked) else usable_cores()


def commit(folder: Path) -> dict[str, Any]:
    """The git commit of a folder and whether tracked files differ from it; {} where git knows nothing of it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def environment(folder: Path | None = None) -> dict[str, Any]:
    """The machine, its packages and how busy it is now; with the commit of the checkout in `folder`."""
    load = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []
    return {
        "cpu": cpu_model(),
        "features": list(cpu_features()),
        "cores": usable_cores(),
        "threads": threads(),
        "system": f"{platform.system()} {platform.release()}, {'-'.join(platform.libc_ver())}",
        "versions": versions(RUNTIMES),
        "load_average": load,
        **({"git": commit(folder)} if folder else {}),
    }
