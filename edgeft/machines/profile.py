"""What does a machine have: which memory, dtypes and rates, as its TOML file says or as measured here?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from edgeft.documents import Strict, read_toml, shipped_folder, shipped_path
from edgeft.errors import BadInput
from edgeft.machines.limits import memory_limit, usable_cores
from edgeft.machines.probe import Dtype, Probe, probe_cpu
from edgeft.machines.sized import nearest_card, resized, sized, with_other_memory
from edgeft.units import GIB

Role = Literal["train", "deploy"]

SLOWEST_USABLE = 0.5  # of the fp32 rate: a CPU dtype below it is emulated (bf16 without AVX512-BF16: 1/60)
LAUNCH_MICROSECONDS = 34  # 16 virtual cores beside an H100, PyTorch 2.11 (bench/gpu.py); assumed for other hosts
HEAD_BUFFERS = 350  # bytes per word and thread, where no probe has measured them: 2 cores, 1 to 8 threads, torch 2.13

Detected = pydantic.BeforeValidator(lambda value: 0 if value == "detected" else value)
DetectedTable = pydantic.BeforeValidator(lambda value: {} if value == "detected" else value)


class Emulation(Strict):
    """What stands for a device's processor where the device is not: QEMU's name of it, and what its system tells.

    Runtimes choose their kernels by these files. In names and contents {n} is a processor's number, {last} the
    highest one; a file with {n} in its name is there for each of them.
    """

    cpu: str = Field(min_length=1, description="the processor as `qemu-aarch64 -cpu help` lists it")
    cpuinfo: str = Field(min_length=1, description="/proc/cpuinfo's lines of one processor")
    cpuinfo_end: str = Field("", description="/proc/cpuinfo's lines behind those of all processors")
    files: dict[str, str] = Field({}, description="files of /proc and /sys by name: what they hold")

    @pydantic.field_validator("files")
    @classmethod
    def _of_the_kernel(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not name.startswith(("/proc/", "/sys/")) or ".." in name.split("/") or name.endswith("/"):
                raise PydanticCustomError("file", "names begin with /proc/ or /sys/ and stay there")
        return value

    def contents(self, cores: int) -> dict[str, str]:
        """Every file by its name, for a device of so many cores."""

        def told(text: str, n: int) -> str:
            return text.replace("{n}", str(n)).replace("{last}", str(cores - 1))

        found = {told(name, n): told(text, n) + "\n" for name, text in self.files.items() for n in range(cores)}
        blocks = [told(self.cpuinfo, n).rstrip("\n") for n in range(cores)] + [told(self.cpuinfo_end, 0).rstrip("\n")]
        return found | {"/proc/cpuinfo": "\n\n".join(block for block in blocks if block) + "\n"}


class Profile(Strict):
    """One machine. 0 (in TOML: "detected") stands for what `detect` has still to find out, on a CPU only.

    Rates of a shipped profile are the datasheet's peaks; a detected one's are measured, and `probe` is set.
    """

    name: str = Field(description="the file's name without .toml")
    description: str = Field(description="the machine in one line")
    roles: tuple[Role, ...] = Field(min_length=1, description="what the machine is for")
    device: Literal["cpu", "cuda", "mps"] = Field(description="the PyTorch device that computes")
    memory_gib: Annotated[float, Detected] = Field(ge=0, description="all memory of that device")
    runtime_memory_gib: float = Field(ge=0, description="its share that the CUDA context or the system keeps")
    keeps_a_share: bool = Field(False, description="what is kept is a share of the memory, of whatever size")
    import_memory_gib: float = Field(0.0, ge=0, description="resident before a CPU run has a model")
    host_memory_gib: float | None = Field(None, gt=0, description="GPU hosts: main memory, typically")
    cores: Annotated[int, Detected] = Field(ge=0, description="CPU cores that compute")
    compute_capability: float | None = Field(None, gt=0, validate_default=True, description="CUDA only: 7.5")
    bandwidth_gb_per_second: Annotated[float, Detected] = Field(ge=0, description="memory, 10^9 bytes/s")
    # 10^12 dense operations a second, for each dtype that runs at hardware rate
    matmul_tflops: Annotated[dict[Dtype, Annotated[float, Field(gt=0)]], DetectedTable]
    launch_microseconds: float | None = Field(
        None, gt=0, description="CUDA only: 10^-6 s of the host for each kernel of a step, Python included"
    )
    disk_gib: float | None = Field(None, gt=0, description="free disk where results will lie; None: not known")
    emulation: Emulation | None = Field(None, description="its processor emulated, for `edgeft verify --for`")
    memory_limit: str = Field("", description="what limits a detected memory; written by detect(), not by hand")
    probe: Probe | None = Field(None, description="written by detect(), not by hand")
    assumed: str = Field("", description="of a machine that is named by its memory: what else it is taken to have")

    @property
    def dtypes(self) -> tuple[Dtype, ...]:
        """The compute dtypes that run at hardware rate, those of `matmul_tflops`."""
        return tuple(self.matmul_tflops)

    @property
    def detected(self) -> bool:
        """Whether nothing is left for `detect` to find out."""
        return bool(self.memory_gib and self.cores and self.matmul_tflops and self.bandwidth_gb_per_second)

    @property
    def budget_bytes(self) -> int:
        """memory - runtime_memory: a plan's peak must fit, a CPU's `training_baseline_bytes` included."""
        if not self.memory_gib:
            raise ValueError(f"profile {self.name} is not resolved: call detect() first")
        return max(0, round((self.memory_gib - self.runtime_memory_gib) * GIB))

    @property
    def seconds_per_launch(self) -> float:
        """The host's time for each kernel of a training step: the file's, or what was measured beside an H100."""
        return 1e-6 * (self.launch_microseconds or LAUNCH_MICROSECONDS)

    @property
    def budget_reason(self) -> str:
        """Where `budget_bytes` comes from, in words: the limit that was found, or the file's figure."""
        kept = f"{self.runtime_memory_gib:g} GiB kept for the {'CUDA context' if self.device == 'cuda' else 'system'}"
        if self.memory_limit:
            return f"{self.memory_limit}; {kept}"
        return f"{self.memory_gib:g} GiB of {self.name}, {kept}"

    @property
    def training_baseline_bytes(self) -> int:
        """Resident in a CPU training process before the model: as probed, or else the profile's figure."""
        return self.probe.import_rss_bytes if self.probe else round(self.import_memory_gib * GIB)

    @property
    def head_buffers(self) -> dict[int, int]:
        """Bytes per word that the matrix library keeps after a head has seen so many rows: as probed, or assumed."""
        return self.probe.head_buffers if self.probe else {512: HEAD_BUFFERS * min(self.cores or 1, 5)}

    def supports(self, dtype: str) -> bool:
        """Whether `dtype` is computed at hardware rate. NF4 only stores: ask for its compute dtype."""
        return dtype in self.matmul_tflops

    @pydantic.field_validator("memory_gib", "cores", "bandwidth_gb_per_second", "matmul_tflops")
    @classmethod
    def _only_a_cpu_is_detected(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        if not value and info.data.get("device") in ("cuda", "mps"):
            raise PydanticCustomError("detected", "only a cpu profile's values can be detected")
        # Below 8.0 torch.cuda.is_bf16_supported() says True all the same, because it counts emulation.
        if isinstance(value, dict) and "bf16" in value and (info.data.get("compute_capability") or 8.0) < 8.0:
            raise PydanticCustomError("bf16", "bf16 is emulated below capability 8.0: leave it out")
        return value

    @pydantic.field_validator("runtime_memory_gib", "compute_capability")
    @classmethod
    def _fits_the_device(cls, value: float | None, info: pydantic.ValidationInfo) -> float | None:
        if info.field_name == "compute_capability":
            if "device" in info.data and (value is None) == (info.data["device"] == "cuda"):
                raise PydanticCustomError("capability", "a cuda profile needs one and no other has one")
        elif value and value >= (info.data.get("memory_gib") or math.inf):
            raise PydanticCustomError("runtime", "must be less than memory_gib")
        return value


def list_profiles() -> list[Profile]:
    """The shipped profiles, by name. Nothing is measured."""
    return [_read(str(path)) for path in sorted(shipped_folder("profiles").glob("*.toml"))]


def load_profile(name_or_path: str) -> Profile:
    """The shipped profile of that name, a user's own file (with a slash, or ending in .toml), or a number of bytes.

    `8GiB` is a graphics card of 8 GiB, `cpu-8gb:6GiB` that machine with 6 GiB (`edgeft.machines.sized`).
    Raises BadInput for an unknown name, a file that is no TOML, an unknown key or a value that does not fit.
    """
    asked = sized(name_or_path)
    profile = _read(str(profile_path(name_or_path)))
    return resized(profile, asked) if asked else profile


def profile_path(name_or_path: str) -> Path:
    """The file that a machine's name stands for: of one that is named by its memory that of all else it has."""
    asked = sized(name_or_path)
    if asked is None or asked.base:
        name = asked.base if asked else name_or_path
        known = [file.stem for file in shipped_folder("profiles").glob("*.toml")]
        if name not in known and (other := with_other_memory(name, known)):
            raise BadInput("profile", f"unknown profile {name!r}", f"{other} is such a machine with that memory")
        return shipped_path("profile", "profiles", name)
    return shipped_folder("profiles") / f"{nearest_card(list_profiles(), asked.size).name}.toml"


def _read(path: str) -> Profile:
    return read_toml("profile", Path(path), Profile, ("name", "probe", "memory_limit", "assumed"))


def detect(profile: Profile) -> Profile:
    """The profile with what it leaves to be "detected" filled in from this machine; any other one unchanged.

    The rates come from a probe that takes about 10 seconds once and a cache afterwards; memory is read anew.
    """
    if profile.detected:
        return profile
    found: dict[str, object] = {}
    if not profile.memory_gib:
        limit = memory_limit()
        found["memory_gib"] = math.floor(limit.bytes / GIB * 100) / 100  # two digits: what a report shows
        found["memory_limit"] = limit.reason
    if not profile.cores:
        found["cores"] = usable_cores()
    if not (profile.matmul_tflops and profile.bandwidth_gb_per_second):
        probe = found["probe"] = probe_cpu()
        rates = probe.matmul_tflops
        usable = {dtype: rate for dtype, rate in rates.items() if rate >= SLOWEST_USABLE * rates["fp32"]}
        found["matmul_tflops"] = profile.matmul_tflops or usable
        found["bandwidth_gb_per_second"] = profile.bandwidth_gb_per_second or probe.bandwidth_gb_per_second
    return profile.model_copy(update=found)


def why_absent(profile: Profile) -> str:
    """Why this machine lacks the profile's device, or "" if it has it. Imports torch for a GPU."""
    if profile.device == "cpu":
        return ""
    import torch

    if profile.device == "mps":
        return "" if torch.backends.mps.is_available() else "PyTorch sees no Apple GPU here"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device here"
    if profile.supports("bf16") and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} computes no bf16"
    return ""


def present(profile: Profile) -> bool:
    """Whether this machine has the profile's device; `why_absent` gives the reason."""
    return not why_absent(profile)
