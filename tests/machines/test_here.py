"""This machine's profile is a file that any other machine plans with, and says no more than was seen."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgeft.cli import app
from edgeft.errors import BadInput
from edgeft.machines import here, processes
from edgeft.machines import profile as profiles
from edgeft.machines.here import profile_of_here, write_here
from edgeft.machines.limits import Gpu, Limit
from edgeft.machines.probe import Probe
from edgeft.machines.profile import Profile, load_profile
from edgeft.units import GIB

PROBE = Probe(
    cpu="a CPU", cores=2, matmul_tflops={"fp32": 0.1, "fp16": 0.01, "bf16": 0.09}, bandwidth_gb_per_second=9.0,
    torch_rss_bytes=240_000_000, import_rss_bytes=400_000_000, head_buffers={128: 10}, seconds=9.0,
)  # fmt: skip
MEASURED = {
    "total_bytes": round(79.2 * GIB), "kept_bytes": round(0.7 * GIB), "cores": 16, "compute_capability": 9.0,
    "matmul_tflops": {"fp32": 50.0, "fp16": 700.0, "bf16": 690.0}, "gb_per_second": 2900.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 20 GiB with 12 left, without a GPU."""
    monkeypatch.setattr(here, "visible_gpu", lambda: None)
    monkeypatch.setattr(here, "cpu_model", lambda: 'A "quick" CPU \\ µ')
    monkeypatch.setattr(here, "kib_lines", lambda path: {"MemTotal": 20 * GIB})
    for module in (here, profiles):
        monkeypatch.setattr(module, "memory_limit", lambda: Limit(12 * GIB, "what is available now (MemAvailable)"))
    monkeypatch.setattr(profiles, "probe_cpu", lambda: PROBE)


def written(path: Path) -> Profile:
    return load_profile(str(write_here(path)))


def test_a_cpu_is_written_with_what_it_has_and_what_is_in_use(tmp_path: Path) -> None:
    profile = written(tmp_path / "a folder" / "here.toml")
    assert (profile.name, profile.device, profile.roles) == ("here", "cpu", ("train", "deploy"))
    assert profile.detected and profile.memory_gib == 20 and profile.runtime_memory_gib == 8.25
    assert profile.budget_bytes == round(11.75 * GIB)
    assert profile.description.startswith('A "quick" CPU \\ µ, ') and profile.dtypes == ("fp32", "bf16")
    assert profile.training_baseline_bytes >= PROBE.import_rss_bytes and profile.disk_gib


def test_a_limit_that_is_not_the_machines_is_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (here, profiles):
        monkeypatch.setattr(module, "memory_limit", lambda: Limit(3 * GIB, "cgroup limit of 3.00 GiB in a file"))
    profile = written(tmp_path / "here.toml")
    assert (profile.memory_gib, profile.runtime_memory_gib) == (3, 0.25)
    assert "cgroup limit" in (tmp_path / "here.toml").read_text()


def with_gpu(monkeypatch: pytest.MonkeyPatch, name: str, found: dict[str, Any]) -> None:
    monkeypatch.setattr(here, "visible_gpu", lambda: Gpu(name, 80 * GIB, 79 * GIB))
    monkeypatch.setattr(here, "_gpu_rates", lambda: found)


def test_a_gpu_is_written_as_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, "NVIDIA H100 80GB HBM3", MEASURED)
    profile = written(tmp_path / "here.toml")
    assert (profile.device, profile.roles, profile.compute_capability, profile.cores) == ("cuda", ("train",), 9.0, 16)
    assert (profile.memory_gib, profile.runtime_memory_gib, profile.host_memory_gib) == (79.2, 0.71, 12)
    assert profile.matmul_tflops == MEASURED["matmul_tflops"] and profile.bandwidth_gb_per_second == 2900


@pytest.mark.parametrize(
    ("name", "known"),
    [("Tesla T4", "t4"), ("NVIDIA L4", "l4-24gb"), ("NVIDIA GeForce RTX 4090", "rtx4090-24gb"),
     ("NVIDIA GeForce RTX 4060 Ti", None), ("NVIDIA GeForce RTX 3060 Laptop GPU", None)],
)  # fmt: skip
def test_a_card_that_edgeft_knows_has_the_rates_of_its_datasheet(
    name: str, known: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability = load_profile(known).compute_capability if known else 8.9
    small = MEASURED | {"compute_capability": capability, "matmul_tflops": {"fp32": 4.0, "fp16": 20.0}}
    with_gpu(monkeypatch, name, small)
    profile = written(tmp_path / "here.toml")
    assert profile.matmul_tflops == (load_profile(known).matmul_tflops if known else small["matmul_tflops"])


def test_a_gpu_that_pytorch_cannot_use_is_said_and_the_cpu_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_gpu(monkeypatch, "Tesla T4", {})
    said: list[str] = []
    text = profile_of_here(tmp_path, said.append)
    assert 'device = "cpu"' in text and any("PyTorch computes nothing on Tesla T4" in line for line in said)


def test_a_measurement_that_fails_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "RuntimeError: PyTorch sees no CUDA device")
    monkeypatch.setattr(processes, "run", lambda *arguments, **options: failed)
    assert here._gpu_rates() == {}


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    path.write_text("mine")
    with pytest.raises(BadInput, match="exists: it will not be replaced"):
        write_here(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(("name", "problem"), [("here", "is no name of a profile"), ("file/here.toml", "cannot write")])
def test_a_place_that_cannot_be_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=problem):
        write_here(tmp_path / name)


def test_the_command_writes_it_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "my machine.toml"
    done = CliRunner().invoke(app, ["show", "profiles", "--here", str(path)])
    assert done.exit_code == 0 and done.stdout.strip() == str(path) and "measuring the CPU" in done.stderr
    assert load_profile(str(path)).name == "my machine"
    other = CliRunner().invoke(app, ["show", "targets", "--here", str(path)]).exception
    assert isinstance(other, BadInput) and other.where == "--here"


def test_rates_of_a_device_are_measured_when_it_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a CPU in a GPU's place: what is computed and counted is the same."""
    from edgeft.training import measure_gpu

    for name, value in (("SMALLEST", 64), ("LARGEST", 128), ("BYTES", 2**20)):
        monkeypatch.setattr(measure_gpu, name, value)
    finished: list[int] = []

    def finish() -> None:
        finished.append(1)
        time.sleep(0.01)  # a device that is slower than its launches

    found = measure_gpu.rates("cpu", finish, bf16=False)
    assert set(found["matmul_tflops"]) == {"fp32", "fp16"} and set(found) == {"matmul_tflops", "gb_per_second"}
    assert 0 < found["matmul_tflops"]["fp32"] <= 2 * 128**3 / 0.01 / 1e12
    assert 0 < found["gb_per_second"] <= 2 * 2**20 / 0.01 / 1e9 and len(finished) > 6
    assert set(measure_gpu.rates("cpu", finish, bf16=True)["matmul_tflops"]) == {"fp32", "fp16", "bf16"}
    with pytest.raises(RuntimeError, match="no CUDA device"):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        measure_gpu.measure()
