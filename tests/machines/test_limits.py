"""Which limit decides what a process may have, and is the allocator told before torch is imported?"""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import CONFIGS, ROOT

from edgeft.machines import limits
from edgeft.machines.limits import (
    memory_limit,
    reset_resident_peak,
    resident_bytes,
    resident_lap,
    settle_allocator,
    visible_gpu,
)
from edgeft.planning.plan import make_plan
from edgeft.settings.job import make_job
from edgeft.units import GIB, MIB

LLAMA = CONFIGS / "llama-3.1-8b"


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    """A /proc that says 10 GiB available and 1 GiB held by this process, and an empty /sys/fs/cgroup."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    put(proc, meminfo=f"MemAvailable: {10 * 2**20} kB\nCommitLimit: {9 * 2**20} kB\nCommitted_AS: {6 * 2**20} kB")
    put(proc / "self", status=f"VmSize:\t{3 * 2**20} kB\nVmData:\t{2 * 2**20} kB\nRssAnon:\t{2**20} kB")
    cgroup.mkdir()
    return proc, cgroup


def put(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_without_any_limit_what_is_available_decides(roots: tuple[Path, Path]) -> None:
    assert memory_limit(*roots) == (11 * GIB, "what is available now (MemAvailable)")


@pytest.mark.parametrize("file", ["memory.max", "memory.high"])
def test_the_least_of_nested_cgroups_decides_and_is_named(roots: tuple[Path, Path], file: str) -> None:
    proc, cgroup = roots
    put(proc / "self", cgroup="0::/a/b/c")
    put(cgroup / "a/b/c", memory__max="max", memory__current=GIB)
    put(cgroup / "a/b", memory__max=8 * GIB, memory__current=GIB)
    put(cgroup / "a", memory__max=20 * GIB, memory__current=GIB)
    (cgroup / "a" / file).write_text(f"{4 * GIB}\n")
    assert memory_limit(proc, cgroup) == (4 * GIB, f"cgroup limit of 4.00 GiB in {cgroup}/a/{file}")


def test_a_v1_cgroup_knows_the_limits_above_it_that_a_container_hides(roots: tuple[Path, Path]) -> None:
    proc, cgroup = roots
    put(proc / "self", cgroup="4:memory:/job")
    stat_file = f"hierarchical_memory_limit {3 * GIB}\ntotal_inactive_file 0"
    put(cgroup / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=GIB, memory__stat=stat_file)
    limit = memory_limit(proc, cgroup)
    assert limit == (3 * GIB, f"cgroup limit of 3.00 GiB in {cgroup}/memory/memory.stat")


def test_a_strict_commit_limit_counts(roots: tuple[Path, Path]) -> None:
    put(roots[0] / "sys/vm", overcommit_memory=1)
    assert memory_limit(*roots).bytes == 11 * GIB
    put(roots[0] / "sys/vm", overcommit_memory=2)
    assert memory_limit(*roots) == (4 * GIB, "commit limit of 9.00 GiB (vm.overcommit_memory=2)")


@pytest.mark.parametrize(("kind", "letter", "left"), [(resource.RLIMIT_AS, "v", 2), (resource.RLIMIT_DATA, "d", 3)])
def test_ulimits_count(
    roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, kind: int, letter: str, left: int
) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda asked: (5 * GIB, 5 * GIB) if asked == kind else unlimited)
    assert memory_limit(*roots) == ((left + 1) * GIB, f"ulimit -{letter} of 5.00 GiB")


def test_what_is_resident_and_its_peak() -> None:
    reset_resident_peak()
    before = resident_bytes()
    block = bytearray(os.urandom(64 * MIB))
    assert resident_bytes() > before + 50 * MIB
    del block
    assert resident_bytes(highest=True) > before + 50 * MIB
    reset_resident_peak()
    assert resident_bytes(highest=True) < before + 50 * MIB


def test_a_lap_has_a_peak_of_its_own_and_lowers_no_other() -> None:
    reset_resident_peak()
    resident_lap()
    before = resident_bytes()
    block = bytearray(os.urandom(64 * MIB))
    del block
    reset_resident_peak()  # a new phase begins within the lap
    assert resident_lap() > before + 50 * MIB > resident_lap()
    block = bytearray(os.urandom(64 * MIB))
    del block
    assert resident_lap() > before + 50 * MIB
    assert resident_bytes(highest=True) > before + 50 * MIB


# GPUs

TWO = """0, GPU-aaaa, Tesla T4, 15360, 15000
1, GPU-bbbb, NVIDIA A100-SXM4-40GB, 40960, 1024
2, GPU-cccc, NVIDIA L4, 23034, [N/A]
"""
LIST = """GPU 0: Tesla T4 (UUID: GPU-aaaa)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bbbb)
"""
SLICES = "  MIG 3g.20gb     Device  0: (UUID: MIG-1111)\n  MIG 1g.5gb      Device  1: (UUID: MIG-2222)\n"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name on the PATH that answers from two files."""
    folder = tmp_path / "bin"
    put(folder, query=TWO, list=LIST)
    script = folder / "nvidia-smi"
    script.write_text(f'#!/bin/sh\ncase "$1" in -L) cat "{folder}/list";; *) cat "{folder}/query";; esac\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ("Tesla T4", 15360 * MIB, 15000 * MIB)),
        ("0,1", ("Tesla T4", 15360 * MIB, 15000 * MIB)),
        ("1", ("NVIDIA A100-SXM4-40GB", 40960 * MIB, 1024 * MIB)),
        ("GPU-bb", ("NVIDIA A100-SXM4-40GB", 40960 * MIB, 1024 * MIB)),
        ("", None),
        ("-1", None),
        ("2", None),  # one that does not tell its memory
    ],
)
def test_the_gpu_that_cuda_will_see(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: object
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpu() == expected


@pytest.mark.parametrize(
    ("visible", "slice_", "size"), [("1", "3g.20gb", 20), ("MIG-2222", "1g.5gb", 5), ("GPU-bbbb", "3g.20gb", 20)]
)
def test_with_mig_it_is_a_slice(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch, visible: str, slice_: str, size: int
) -> None:
    put(nvidia_smi, list=LIST + SLICES)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    name = f"NVIDIA A100-SXM4-40GB, slice {slice_}"
    assert visible_gpu() == (name, size * 10**9, size * 10**9)


def test_nvidia_smi_is_asked_once_for_many_plans_and_again_later(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, now = nvidia_smi / "nvidia-smi", [1000.0]
    first, rest = script.read_text().split("\n", 1)
    script.write_text(f'{first}\necho "$@" >>"{nvidia_smi}/asked"\n{rest}')
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    for seconds, questions in ((0, 2), (9, 2), (10, 4)):  # the GPUs and the list of slices
        now[0] = 1000.0 + seconds
        assert visible_gpu() == ("Tesla T4", 15360 * MIB, 15000 * MIB)
        assert len((nvidia_smi / "asked").read_text().splitlines()) == questions


def test_no_gpu_without_nvidia_smi_or_when_it_fails(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nvidia_smi / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert visible_gpu() is None
    monkeypatch.setattr(limits.shutil, "which", lambda _: None)
    assert visible_gpu() is None


def test_a_plan_says_when_the_gpu_here_has_less(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_plan(make_job(model=str(LLAMA), profile="t4"))
    assert not any("this machine has" in note for note in made.notes)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    made = make_plan(make_job(model=str(LLAMA), profile="t4"))
    [note] = [note for note in made.notes if "this machine has" in note]
    has = "this machine has 410 MiB (free on NVIDIA A100-SXM4-40GB beside a CUDA context), the plan needs "
    assert note.startswith(has)
    assert note.endswith(": --max-memory 409MiB plans for this one")


# The allocator


def test_expandable_segments_are_for_cuda_and_the_user_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "PYTORCH_ALLOC_CONF"
    for variable in (name, "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(variable, "")  # so that what the test sets is undone
        monkeypatch.delenv(variable)
    settle_allocator("cpu")
    assert name not in os.environ
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    settle_allocator("cuda")
    assert name not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    settle_allocator("cuda")
    assert os.environ[name] == "expandable_segments:True"


@pytest.mark.parametrize(("profile", "expected"), [("t4", "expandable_segments:True"), ("cpu-16gb", "not set")])
def test_training_sets_them_before_torch_is_imported(tmp_path: Path, profile: str, expected: str) -> None:
    model = str(LLAMA.parent / "smollm2-135m")
    make_plan(make_job(model=model, profile=profile)).write(tmp_path / "plan.json")
    seen = tmp_path / "seen"
    torch = tmp_path / "fake" / "torch"
    torch.mkdir(parents=True)
    writes = f"open({str(seen)!r}, 'w').write(os.environ.get('PYTORCH_ALLOC_CONF', 'not set'))"
    (torch / "__init__.py").write_text(f"import os\n{writes}\nraise SystemExit(7)\n")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTORCH")}
    environment = kept | {"PYTHONPATH": f"{tmp_path / 'fake'}:{ROOT}"}
    command = [sys.executable, "-m", "edgeft", "train", str(tmp_path / "plan.json")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert seen.read_text() == expected
