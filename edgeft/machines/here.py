"""What does this machine have, as a profile's TOML file that plans for it on any other?"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeft.documents import nearest_folder
from edgeft.errors import BadInput
from edgeft.machines import processes
from edgeft.machines.environment import cpu_model
from edgeft.machines.limits import PROC, Gpu, kib_lines, memory_limit, visible_gpu
from edgeft.machines.profile import Profile, detect, list_profiles, load_profile
from edgeft.progress import Say, quiet
from edgeft.units import GIB, show_bytes

MARGIN_GIB = 0.25  # beside what others hold now: as profiles/cpu.toml
CONTEXT_GIB = 0.6  # of a CUDA context with its kernels, at least: as the shipped cards


@dataclass
class Written:
    """Lines of a TOML file, and why each says what it says."""

    lines: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any, why: str = "") -> None:
        self.lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}" + (f"  # {why}" if why else ""))


def profile_of_here(folder: Path, say: Say = quiet) -> str:
    """This machine's profile as TOML: its GPU where PyTorch computes on one, else its CPU, measured.

    `folder` is on the disk whose free room counts. Raises BadInput where nothing can be measured.
    """
    gpu = visible_gpu()
    if gpu is not None:
        say(f"measuring {gpu.name}")
        if found := _gpu_rates():
            return _card(gpu, found, folder)
        say(f"note: PyTorch computes nothing on {gpu.name} (a build for CPUs?): the file is of the CPU")
    say("measuring the CPU (about 10 seconds, once)")
    return _cpu(folder)


def write_here(path: Path, say: Say = quiet) -> Path:
    """Write this machine's profile. Raises BadInput for a name that is none of a profile, and for one that is taken."""
    if path.suffix != ".toml":
        raise BadInput(path, "is no name of a profile", f"give one that ends in .toml: {path.with_suffix('.toml')}")
    if path.exists():
        raise BadInput(path, "exists: it will not be replaced", "give another name, or remove it")
    text = profile_of_here(path.parent, say)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise BadInput(path, f"cannot write: {problem.strerror}", "choose another place") from None
    return path


def _start(description: str, roles: list[str], device: str) -> Written:
    made = Written(
        ["# This machine, as `edgeft show profiles --here` measured it: --on THIS_FILE plans for it, anywhere."]
    )
    made.add("description", description)
    made.add("roles", roles)
    made.add("device", device)
    return made


def _rates(made: Written, rates: Mapping[Any, float], why: str) -> str:
    made.lines += ["", "[matmul_tflops]", f"# {why}"]
    for dtype, rate in rates.items():
        made.add(dtype, rate)
    return "\n".join(made.lines) + "\n"


def _cpu(folder: Path) -> str:
    found = detect(load_profile("cpu"))
    assert found.probe is not None
    limit, total = memory_limit(), kib_lines(PROC / "meminfo").get("MemTotal", 0)
    made = _start(f"{cpu_model()}, {found.cores} cores, measured", list(found.roles), "cpu")
    if total and "MemAvailable" in limit.reason:
        made.add("memory_gib", _down(total), "all of it (MemTotal)")
        kept = total - limit.bytes + MARGIN_GIB * GIB
        made.add("runtime_memory_gib", _up(kept), "in use as this was written, and a margin of 0.25")
    else:
        made.add("memory_gib", _down(limit.bytes), limit.reason)
        made.add("runtime_memory_gib", MARGIN_GIB, "our margin")
    made.add("import_memory_gib", _up(found.probe.import_rss_bytes), "measured: a run before it has a model")
    made.add("cores", found.cores, "affinity and cgroup quota")
    made.add("bandwidth_gb_per_second", found.bandwidth_gb_per_second, "a measured copy")
    made.add("disk_gib", _down(shutil.disk_usage(nearest_folder(folder)).free), "free as this was written")
    return _rates(made, found.matmul_tflops, "measured; dtypes below half of fp32's rate are left out")


def _card(gpu: Gpu, found: dict[str, Any], folder: Path) -> str:
    host = memory_limit()
    known = _same_card(gpu.name)
    made = _start(f"{gpu.name}, {show_bytes(found['total_bytes'])}", ["train"], "cuda")
    made.add("memory_gib", _down(found["total_bytes"]), "what PyTorch sees")
    kept = max(round(CONTEXT_GIB * GIB), found["kept_bytes"])
    made.add(
        "runtime_memory_gib", _up(kept), f"CUDA context, kernels, other processes; {_up(found['kept_bytes'])} seen"
    )
    made.add("host_memory_gib", _down(host.bytes), host.reason)
    made.add("cores", found["cores"], "affinity and cgroup quota")
    made.add("compute_capability", found["compute_capability"])
    bandwidth = known.bandwidth_gb_per_second if known else found["gb_per_second"]
    made.add("bandwidth_gb_per_second", bandwidth, f"as {known.name}" if known else "a measured copy")
    made.add("disk_gib", _down(shutil.disk_usage(nearest_folder(folder)).free), "free as this was written")
    if known is not None:
        return _rates(made, known.matmul_tflops, f"as {known.name}: the datasheet's, of which a plan takes a share")
    return _rates(made, found["matmul_tflops"], "measured; a plan takes a share, as of a datasheet's: times are high")


def _same_card(name: str) -> Profile | None:
    """The shipped profile of a card, by its name without what the driver puts around it."""
    words = set(name.replace("NVIDIA", "").replace("Tesla", "").split())
    cards = [each for each in list_profiles() if each.device == "cuda"]
    return next((each for each in cards if set(each.description.partition(",")[0].split()[1:]) == words), None)


def _gpu_rates() -> dict[str, Any]:
    """What PyTorch measures on the GPU, in a process of its own; {} where it computes nothing there."""
    done = processes.run("from edgeft.training.measure_gpu import measure; print(measure())")
    if done.returncode:
        return {}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _down(size: float) -> float:
    return math.floor(size / GIB * 100) / 100


def _up(size: float) -> float:
    return math.ceil(size / GIB * 100) / 100
