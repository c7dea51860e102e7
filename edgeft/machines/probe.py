"""How fast is this machine's CPU and what do processes hold before they have a model, measured once and kept?"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path
from typing import Literal

import pydantic

from edgeft.documents import Artifact, sha256_file, sha256_json, versions
from edgeft.errors import BadInput, EdgeftError
from edgeft.machines import processes
from edgeft.machines.environment import cpuinfo
from edgeft.machines.extras import need
from edgeft.machines.limits import usable_cores

Dtype = Literal["fp32", "fp16", "bf16"]
BUSY = 0.85  # of the cores: a product that gets less than this had other work beside it, and measured that too
MEASURE_AGAIN = 900  # seconds after which a probe of a busy machine is made again: a slow one must not stay for good
CODE = ("machines/meter.py", "training/measure_machine.py")  # that measures: a change of it is measured anew


class Probe(Artifact):
    """What a process of its own measured on this machine's CPU, with the packages in `versions`."""

    cpu: str
    cores: int
    matmul_tflops: dict[Dtype, float]  # every dtype tried, those too slow to be used included
    bandwidth_gb_per_second: float  # 10^9 bytes read plus written by a copy, as STREAM counts
    torch_rss_bytes: int  # resident after importing torch and edgeft's own modules: what a merge begins with
    import_rss_bytes: int  # resident after the imports of a training run and one tiny step and one generated token
    head_buffers: dict[int, int]  # what the matrix library keeps after a head has seen so many rows, bytes per word
    share: float = pydantic.Field(1.0, description="of its cores that the products got; the rest had other work")
    seconds: float

    @property
    def busy(self) -> bool:
        """Whether other work took so much of the cores that the rates are too low."""
        return self.share < BUSY

    def beside(self, earlier: Probe) -> Probe:
        """This probe with the higher rates of two of one machine: other work can only slow a measurement down."""
        rates = {dtype: max(rate, earlier.matmul_tflops.get(dtype, 0.0)) for dtype, rate in self.matmul_tflops.items()}
        bandwidth = max(self.bandwidth_gb_per_second, earlier.bandwidth_gb_per_second)
        share = max(self.share, earlier.share)
        return self.model_copy(update={"matmul_tflops": rates, "bandwidth_gb_per_second": bandwidth, "share": share})


def probe_cpu() -> Probe:
    """This CPU's measured rates and a training process's baseline, from the cache where it has them.

    The cache is one JSON file per CPU, core count, package versions and code that measures. A corrupt one is measured
    again, an unwritable one done without; one of a busy machine is measured again after `MEASURE_AGAIN` seconds, and
    the higher rates of the two are kept. Raises MissingExtra without torch, BadInput where
    measuring fails.
    """
    path = _cache()
    kept = None
    with contextlib.suppress(BadInput):
        kept = Probe.read(path)
    if kept and not (kept.busy and _age(path) > MEASURE_AGAIN):
        return kept
    probe = _measured()
    if kept:
        probe = probe.beside(kept)
    with contextlib.suppress(OSError, EdgeftError):  # a cache only saves time: its failing stops nothing
        if path.is_absolute():  # it is not if nobody knows a home folder
            path.parent.mkdir(parents=True, exist_ok=True)
            probe.write(path)
    return probe


def _cache() -> Path:
    # Virtual machines hide the CPU's model: only the flags (on ARM, Features) tell one with AMX from another.
    cpu = [cpuinfo("model name"), cpuinfo("flags", "Features") or platform.node(), platform.machine()]
    measured_by = [sha256_file(Path(__file__).parents[1] / name) for name in CODE]
    key = {"cpu": cpu, "cores": usable_cores(), "versions": _probe_versions(), "code": measured_by}
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "edgeft")
    return folder / f"probe-{sha256_json(key)[:16]}.json"


def _age(path: Path) -> float:
    """Seconds since a file was written; a clock that was set back makes it old."""
    age = time.time() - path.stat().st_mtime
    return age if age >= 0 else MEASURE_AGAIN + 1


def _measured() -> Probe:
    """A probe made now, in a process of its own."""
    environment = {"OMP_NUM_THREADS": str(usable_cores()), "HF_HUB_OFFLINE": "1"}  # OpenMP knows no cgroup quotas
    fixed = "plan for a fixed machine, as in --on cpu-16gb"
    need("train", "this CPU cannot be measured", fixed)
    done = processes.run(
        "from edgeft.training.measure_machine import measure; print(measure())", environment=environment
    )
    if done.returncode:
        reason = processes.reason(done.returncode, done.stderr)
        raise BadInput("this CPU", f"cannot be measured: {reason}", f"mend that, or {fixed}")
    return Probe.model_validate_json(done.stdout.strip().splitlines()[-1])


def _probe_versions() -> dict[str, str]:
    names = {"edgeft", "python", "torch", "transformers", "peft", "bitsandbytes"}
    return {name: version for name, version in versions().items() if name in names}
