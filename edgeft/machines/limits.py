"""How much memory may this process really have, and which limit says so: cgroups, ulimits, other processes, GPUs?"""

from __future__ import annotations

import contextlib
import csv
import importlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from edgeft.errors import BadInput
from edgeft.units import MIB, show_bytes

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
NVIDIA_SMI_SECONDS = 10  # for so long at most an answer counts: what is free changes

# For processes of our own that make large arrays: glibc returns each of 64 KiB or more to the system at once, so that
# what they take is what they hold (see ledger.control_malloc).
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Limit(NamedTuple):
    """Bytes that may be had, and what says so, in words for a user."""

    bytes: int
    reason: str


class Gpu(NamedTuple):
    """What CUDA will see first: a GPU, or a MIG slice of one (whose free bytes nvidia-smi does not tell)."""

    name: str
    total_bytes: int
    free_bytes: int


def usable_memory(proc: Path | None = None, cgroup: Path | None = None) -> int:
    """Bytes this process may hold in all, the ones it holds already included; swap is never counted."""
    return memory_limit(proc, cgroup).bytes


def memory_limit(proc: Path | None = None, cgroup: Path | None = None) -> Limit:
    """What this process may hold in all, the bytes it holds already included, and which limit is the least.

    The least of MemAvailable, the kernel's commit limit where it is strict, RLIMIT_AS and RLIMIT_DATA, and the room in
    each cgroup (v1 or v2), its own and those above; file cache counts as room. Elsewhere than on Linux: what psutil
    calls available.
    """
    proc, cgroup = proc or PROC, cgroup or CGROUP
    memory, own = kib_lines(proc / "meminfo"), kib_lines(proc / "self/status")
    if "MemAvailable" not in memory:
        return _memory_limit_elsewhere()
    held = own.get("RssAnon", 0)  # file pages are in MemAvailable already
    rooms = [Limit(memory["MemAvailable"], "what is available now (MemAvailable)"), *_cgroup_rooms(proc, cgroup)]
    if _integer(proc / "sys/vm/overcommit_memory") == 2 and "CommitLimit" in memory:
        room = memory["CommitLimit"] - memory.get("Committed_AS", 0)
        rooms.append(Limit(room, f"commit limit of {show_bytes(memory['CommitLimit'])} (vm.overcommit_memory=2)"))
    with contextlib.suppress(ImportError):
        import resource

        # mapped libraries use address space too, so the whole process's size counts against RLIMIT_AS
        kinds = (("v", resource.RLIMIT_AS, "VmSize"), ("d", resource.RLIMIT_DATA, "VmData"))
        for letter, kind, used in kinds:
            limit = resource.getrlimit(kind)[0]
            if limit != resource.RLIM_INFINITY:
                rooms.append(Limit(limit - own.get(used, 0), f"ulimit -{letter} of {show_bytes(limit)}"))
    room, reason = min(rooms, key=lambda limit: limit.bytes)
    return Limit(max(0, room + held), reason)


def part_of(limit: Limit, processes: int, proc: Path | None = None) -> Limit:
    """What one of several processes may hold where they share what a limit leaves beside what this one holds."""
    held = kib_lines((proc or PROC) / "self/status").get("RssAnon", 0)
    room = max(0, limit.bytes - held) // processes
    return Limit(room + held, f"its part for one of {processes} processes; {limit.reason}")


def usable_cores(proc: Path | None = None, cgroup: Path | None = None) -> int:
    """Cores this process may keep busy: its affinity and each cgroup's quota, rounded down; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroup_folders("cpu", proc or PROC, cgroup or CGROUP):
        quota, period = _integer(folder / "cpu.cfs_quota_us"), _integer(folder / "cpu.cfs_period_us")
        with contextlib.suppress(OSError, ValueError):  # v2: "200000 100000", or "max 100000" for no quota
            quota, period = (int(part) for part in (folder / "cpu.max").read_text().split())
        if quota and period and quota > 0:  # v1 writes -1 for no quota
            cores = min(cores, quota // period)
    return max(1, cores)


def kib_lines(path: Path) -> dict[str, int]:
    """`Name:  123 kB` lines as bytes; {} if there is no such file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) == 3 and line[2] == "kB"}


# The highest resident bytes of this process that the system has forgotten: since the last reset, since the last lap.
_earlier = {"reset": 0, "lap": 0}


def resident_bytes(*, highest: bool = False, status: Path | None = None) -> int:
    """Resident bytes now, or the highest since `reset_resident_peak`, of this process or of a copy of its status file.

    0 where the system does not tell.
    """
    found = kib_lines(status or PROC / "self/status").get("VmHWM" if highest else "VmRSS", 0)
    return max(found, _earlier["reset"]) if highest and status is None else found


def resident_lap() -> int:
    """The highest resident bytes of this process since the last lap; those of now where the system cannot tell."""
    if not _forget_peak():
        return resident_bytes()
    highest, _earlier["lap"] = _earlier["lap"], 0
    return highest


def reset_resident_peak() -> None:
    """Let the highest resident bytes fall to what is resident now."""
    _forget_peak()
    _earlier["reset"] = 0


def _forget_peak() -> bool:
    """Let the system's own count fall, and keep what it was."""
    highest = kib_lines(PROC / "self/status").get("VmHWM", 0)
    try:
        (PROC / "self/clear_refs").write_text("5")
    except OSError:
        return False
    _earlier.update({name: max(bytes_, highest) for name, bytes_ in _earlier.items()})
    return True


def _integer(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # "max", v2's word for no limit, is a ValueError
        return int(path.read_text())
    return None


def _cgroup_folders(controller: str, proc: Path, cgroup: Path) -> Iterator[Path]:
    """The process's cgroup and its ancestors. In a container with the host's path only the root exists."""
    with contextlib.suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)  # v2 has no names; v1 mounts may join several: cpu,cpuacct
            if names and controller not in names.split(","):
                continue
            for root in {cgroup / names, cgroup / controller} if names else {cgroup}:
                folder = root / path.lstrip("/")
                yield from (folder, *(parent for parent in folder.parents if parent.is_relative_to(root)))


def _cgroup_rooms(proc: Path, cgroup: Path) -> Iterator[Limit]:
    for folder in _cgroup_folders("memory", proc, cgroup):
        files = ("memory.max", "memory.high", "memory.limit_in_bytes")
        known = [(limit, folder / name) for name in files if (limit := _integer(folder / name)) is not None]
        stat: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError):
            lines = (folder / "memory.stat").read_text().splitlines()
            stat = {key: int(value) for key, value in map(str.split, lines)}
        if "hierarchical_memory_limit" in stat:  # v1: the least of all ancestors, those a container hides included
            known.append((stat["hierarchical_memory_limit"], folder / "memory.stat"))
        if not known:
            continue
        limit, path = min(known)
        used = _integer(folder / "memory.current") or _integer(folder / "memory.usage_in_bytes") or 0
        total = "total_" if "total_inactive_file" in stat else ""  # v1's plain lines are this cgroup alone
        cache = stat.get(f"{total}inactive_file", 0) + stat.get(f"{total}active_file", 0)
        yield Limit(limit - used + cache, f"cgroup limit of {show_bytes(limit)} in {path}")


def _memory_limit_elsewhere() -> Limit:
    try:
        psutil = importlib.import_module("psutil")
    except ImportError:
        hint = "install psutil, or plan for a fixed machine, as in --on cpu-16gb"
        raise BadInput("this machine", "cannot tell how much memory is left", hint) from None
    have = int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
    return Limit(have, "what is available now (psutil)")


def visible_gpu() -> Gpu | None:
    """The first NVIDIA GPU, or MIG slice, that CUDA_VISIBLE_DEVICES leaves to this process, as nvidia-smi tells.

    None without nvidia-smi or a GPU. What PyTorch itself finds free is checked when training starts; this is for a
    plan, which imports no torch.
    """
    fields = "index,uuid,name,memory.total,memory.free"
    rows = list(csv.reader(_nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits").splitlines()))
    found = {}
    for row in rows:
        cells = [cell.strip() for cell in row]
        if len(cells) == 5 and cells[3].isdigit() and cells[4].isdigit():  # "[N/A]" where a driver does not tell
            found[cells[0], cells[1]] = Gpu(cells[2], int(cells[3]) * MIB, int(cells[4]) * MIB)
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = wanted.split(",")[0].strip() if wanted is not None else "0"
    gpu = next(
        (gpu for (index, uuid), gpu in found.items() if first and (first == index or uuid.startswith(first))), None
    )
    slices = _slices(found)
    if first.startswith("MIG-"):
        return next((gpu for _, uuid, gpu in slices if uuid.startswith(first)), None)
    uuid = next((uuid for (_, uuid), other in found.items() if other is gpu), "")
    return next((mig for parent, _, mig in slices if parent == uuid), gpu)  # with MIG on, CUDA sees its first slice


def _slices(gpus: dict[tuple[str, str], Gpu]) -> list[tuple[str, str, Gpu]]:
    """(its GPU's UUID, own UUID, Gpu) of each MIG slice in `nvidia-smi -L`; 1g.5gb has 5 x 10^9 bytes or a few more."""
    names = {uuid: gpu.name for (_, uuid), gpu in gpus.items()}
    parent, found = "", []
    for line in _nvidia_smi("-L").splitlines():
        uuid = re.search(r"UUID: ([\w-]+)", line)
        if uuid and uuid[1].startswith("GPU-"):
            parent = uuid[1]
        slice_ = re.search(r"MIG (\S*?(\d+)gb\S*)", line)
        if uuid and slice_:
            size = int(slice_[2]) * 10**9
            found.append((parent, uuid[1], Gpu(f"{names.get(parent, 'GPU')}, slice {slice_[1]}", size, size)))
    return found


def _nvidia_smi(*arguments: str) -> str:
    command = shutil.which("nvidia-smi")
    return _told(command, arguments, int(time.monotonic() // NVIDIA_SMI_SECONDS)) if command else ""


@lru_cache(maxsize=4)
def _told(command: str, arguments: tuple[str, ...], period: int) -> str:
    """What nvidia-smi prints, asked once in `period`: one command may make hundreds of plans."""
    try:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def settle_allocator(device: str) -> None:
    """Let PyTorch's CUDA allocator grow its segments, for a device "cuda". Only before torch is imported.

    Without it, reserved bytes were 1.10 to 1.14 times the live ones in public runs with samples of varying length; a
    plan counts on 1.05. What the user has set stays.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older name, still read
    if device == "cuda" and not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"
