"""Does a profile say what its file says, and does detection respect what this process may really have?"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeft.documents import shipped_folder
from edgeft.errors import BadInput, MissingExtra
from edgeft.machines import extras, limits, processes
from edgeft.machines import probe as machine
from edgeft.machines import profile as module
from edgeft.machines.limits import Limit, usable_cores, usable_memory
from edgeft.machines.probe import Probe, probe_cpu
from edgeft.machines.profile import Profile, detect, list_profiles, load_profile, present, why_absent
from edgeft.planning.notes import machine_notes
from edgeft.training import measure_machine
from edgeft.training.measure_machine import measure
from edgeft.units import GIB

SHIPPED = sorted(shipped_folder("profiles").glob("*.toml"))
CARD = """\
description = "a card"
roles = ["train"]
device = "cuda"
memory_gib = 8.0
runtime_memory_gib = 0.5
cores = 4
compute_capability = 7.5
bandwidth_gb_per_second = 300

[matmul_tflops]
fp32 = 8
fp16 = 64
"""
PROBE = Probe(
    cpu="a CPU",
    cores=2,
    matmul_tflops={"fp32": 0.1, "fp16": 0.05, "bf16": 0.049},
    bandwidth_gb_per_second=9.0,
    torch_rss_bytes=240_000_000,
    import_rss_bytes=400_000_000,
    head_buffers={128: 10, 256: 560},
    seconds=9.0,
)


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# Reading


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_profile_loads_and_survives_json(path: Path) -> None:
    profile = load_profile(path.stem)
    assert profile.name == path.stem
    assert profile.detected or path.stem == "cpu"
    assert Profile.model_validate_json(profile.model_dump_json()) == profile


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_number_has_its_source_beside_or_above_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    bare = [
        line
        for above, line in zip(["", *lines], lines, strict=False)
        if re.match(r"\w+ = [\d.]", line) and "#" not in line and not above.startswith("#")
    ]
    assert bare == []


def test_the_hosts_and_devices_that_must_exist() -> None:
    profiles = {profile.name: profile for profile in list_profiles()}
    hosts = "cpu cpu-8gb cpu-16gb t4 t4-24gb rtx3060-12gb rtx4060-8gb rtx4090-24gb l4-24gb apple-16gb"
    devices = "raspberrypi5-8gb jetson-orin-nano-8gb android-8gb laptop-16gb"
    assert all("train" in profiles[name].roles for name in hosts.split())
    assert all("deploy" in profiles[name].roles for name in devices.split())
    assert list(profiles) == [path.stem for path in SHIPPED]


@pytest.mark.parametrize("name", ["t4", "t4-24gb"])
def test_a_t4_computes_no_bf16(name: str) -> None:
    assert load_profile(name).dtypes == ("fp32", "fp16")
    assert not load_profile(name).supports("bf16")


def test_a_cpu_that_trains_says_what_the_imports_take() -> None:
    for profile in list_profiles():
        if profile.device == "cpu" and "train" in profile.roles and profile.detected:
            assert profile.training_baseline_bytes == round(0.45 * GIB), profile.name


@pytest.mark.parametrize("name", ["card.toml", "my own card.toml"])
def test_a_user_file(tmp_path: Path, name: str) -> None:
    profile = load_profile(written(tmp_path / name, CARD))
    assert profile.name == Path(name).stem
    assert profile.budget_bytes == round(7.5 * GIB)
    assert profile.dtypes == ("fp32", "fp16")
    assert profile.training_baseline_bytes == 0


def test_a_path_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "card.toml", CARD)
    assert load_profile("card.toml") == load_profile("./card.toml")


# What a user can get wrong


def message(source: str) -> str:
    with pytest.raises(BadInput) as caught:
        load_profile(source)
    return str(caught.value)


def test_unknown_name() -> None:
    other = "raspberrypi5-8gb:4GiB is such a machine with that memory"
    assert message("raspberrypi5-4gb") == f"profile: unknown profile 'raspberrypi5-4gb'\n\nhint: {other}"
    assert load_profile("raspberrypi5-8gb:4GiB").memory_gib < 4.1
    assert "hint: did you mean 't4" in message("t4-16gb")  # a T4 has no other
    assert message("t4-24g") == "profile: unknown profile 't4-24g'\n\nhint: did you mean 't4-24gb'?"
    names = ", ".join(sorted(path.stem for path in SHIPPED))
    assert message("mainframe") == f"profile: unknown profile 'mainframe'\n\nhint: one of {names}"


def test_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "absent.toml"
    expected = f"{path}: no such file\n\nhint: give a file that exists, or a shipped profile's name"
    assert message(str(path)) == expected


def test_a_folder(tmp_path: Path) -> None:
    assert message(f"{tmp_path}/") == f"{tmp_path}: cannot be read: Is a directory"


def test_not_toml(tmp_path: Path) -> None:
    path = written(tmp_path / "card.toml", "description = a card\n")
    assert message(path) == (
        f"{path}: not valid TOML: Invalid value (at line 1, column 15)\n\nhint: text needs quotes, tables come last"
    )


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "card.toml"
    path.write_bytes(b'description = "\xff"\n')
    assert message(str(path)) == (
        f"{path}: not valid TOML: 'utf-8' codec can't decode byte 0xff in position 15: invalid start byte\n\n"
        "hint: text needs quotes, tables come last"
    )


REFUSED = {
    "unknown key": (
        ("memory_gib = 8.0", "memory_gib = 8.0\nmemory_gb = 8"),
        "unknown key 'memory_gb'\n\nhint: did you mean 'memory_gib'?",
    ),
    "missing key": (
        ("cores = 4\n", ""),
        "cores: field required",
    ),
    "wrong type": (
        ("memory_gib = 8.0", 'memory_gib = "lots"'),
        "memory_gib: input should be a valid number, unable to parse string as a number, got 'lots'",
    ),
    "negative": (
        ("memory_gib = 8.0", "memory_gib = -8"),
        "memory_gib: input should be greater than or equal to 0, got -8",
    ),
    "unknown device": (
        ('"cuda"', '"gpu"'),
        "device: input should be 'cpu', 'cuda' or 'mps', got 'gpu'",
    ),
    "no role": (
        ('["train"]', "[]"),
        "roles: tuple should have at least 1 item after validation, not 0, got []",
    ),
    "unknown dtype": (
        ("fp16 = 64", "fp8 = 64"),
        "matmul_tflops.fp8.[key]: input should be 'fp32', 'fp16' or 'bf16', got 'fp8'",
    ),
    "emulated bf16": (
        ("fp16 = 64", "bf16 = 64"),
        "matmul_tflops: bf16 is emulated below capability 8.0: leave it out, got {'fp32': 8, 'bf16': 64}",
    ),
    "no capability": (
        ("compute_capability = 7.5\n", ""),
        "compute_capability: a cuda profile needs one and no other has one, got None",
    ),
    "capability of a CPU": (
        ('"cuda"', '"cpu"'),
        "compute_capability: a cuda profile needs one and no other has one, got 7.5",
    ),
    "all of it reserved": (
        ("runtime_memory_gib = 0.5", "runtime_memory_gib = 8"),
        "runtime_memory_gib: must be less than memory_gib, got 8",
    ),
    "a card detected": (
        ("cores = 4", 'cores = "detected"'),
        "cores: only a cpu profile's values can be detected, got 'detected'",
    ),
    "a name": (
        ("cores = 4", 'cores = 4\nname = "x"'),
        "key 'name' cannot be set\n\nhint: remove the line: the file's name names it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    (old, new), expected = REFUSED[case]
    assert old in CARD
    path = written(tmp_path / "card.toml", CARD.replace(old, new))
    text = message(path)
    if expected.endswith("got "):  # pydantic's input is the whole document here
        assert text.startswith(f"{path}: {expected}")
    else:
        assert text == f"{path}: {expected}"


def test_an_unresolved_profile_has_no_budget() -> None:
    with pytest.raises(ValueError, match=r"^profile cpu is not resolved: call detect\(\) first$"):
        _ = load_profile("cpu").budget_bytes


# What this process may have


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    """A /proc that says 10 GiB available and 1 GiB held by this process, and an empty /sys/fs/cgroup."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroup.mkdir()
    written(proc / "meminfo", f"MemTotal: {16 * 2**20} kB\nMemAvailable: {10 * 2**20} kB\nHugePages_Total: 0\n")
    written(proc / "self/status", f"Name:\tpython\nVmSize:\t{2 * 2**20} kB\nRssAnon:\t{2**20} kB\n")
    return proc, cgroup


def put(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        written(folder / name.replace("__", "."), f"{value}\n")


def test_memory_without_a_cgroup_is_what_is_available_and_held(roots: tuple[Path, Path]) -> None:
    assert usable_memory(*roots) == 11 * GIB


def test_memory_of_a_v2_cgroup_counts_file_cache_as_room(roots: tuple[Path, Path]) -> None:
    proc, cgroup = roots
    written(proc / "self/cgroup", "0::/a/b\n")
    stat = f"anon 1\ninactive_file {GIB // 2}\nactive_file {GIB // 2}"
    put(cgroup / "a/b", memory__max=6 * GIB, memory__current=4 * GIB, memory__stat=stat)
    assert usable_memory(proc, cgroup) == (6 - 4 + 1 + 1) * GIB


def test_memory_is_limited_by_an_ancestor(roots: tuple[Path, Path]) -> None:
    proc, cgroup = roots
    written(proc / "self/cgroup", "0::/a/b\n")
    put(cgroup / "a/b", memory__max="max", memory__high=9 * GIB, memory__current=GIB)
    put(cgroup / "a", memory__max=5 * GIB, memory__current=3 * GIB)
    assert usable_memory(proc, cgroup) == (5 - 3 + 1) * GIB


def test_memory_of_a_v1_cgroup_counts_its_children(roots: tuple[Path, Path]) -> None:
    proc, cgroup = roots
    written(proc / "self/cgroup", "5:cpu,cpuacct:/\n4:memory:/job\n0::/\n")
    stat = f"inactive_file 0\ntotal_inactive_file {GIB}\ntotal_active_file 0"
    usage = {"memory__limit_in_bytes": 4 * GIB, "memory__usage_in_bytes": 3 * GIB}
    put(cgroup / "memory/job", **usage, memory__stat=stat)
    put(cgroup / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=8 * GIB)
    assert usable_memory(proc, cgroup) == (4 - 3 + 1 + 1) * GIB


def test_memory_in_a_container_that_shows_the_hosts_path(roots: tuple[Path, Path]) -> None:
    proc, cgroup = roots
    written(proc / "self/cgroup", "0::/system.slice/docker-0123.scope\n")
    put(cgroup, memory__max=2 * GIB, memory__current=GIB)
    assert usable_memory(proc, cgroup) == (2 - 1 + 1) * GIB


def test_memory_is_never_negative(roots: tuple[Path, Path]) -> None:
    proc, cgroup = roots
    written(proc / "self/cgroup", "0::/\n")
    put(cgroup, memory__max=GIB, memory__current=4 * GIB)
    assert usable_memory(proc, cgroup) == 0


def test_memory_is_limited_by_the_address_space(roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4 * GIB, resource.RLIM_INFINITY))
    assert usable_memory(*roots) == (4 - 2 + 1) * GIB


def test_memory_of_a_system_without_proc_is_psutils(tmp_path: Path) -> None:
    assert usable_memory(tmp_path, tmp_path) > 0


def test_memory_of_a_system_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(BadInput) as caught:
        usable_memory(tmp_path, tmp_path)
    assert str(caught.value) == (
        "this machine: cannot tell how much memory is left\n\n"
        "hint: install psutil, or plan for a fixed machine, as in --on cpu-16gb"
    )


@pytest.mark.parametrize(
    ("line", "folder", "files", "expected"),
    [
        ("0::/a", "a", {"cpu__max": "250000 100000"}, 2),
        ("0::/a", "a", {"cpu__max": "50000 100000"}, 1),
        ("0::/a", "a", {"cpu__max": "max 100000"}, 8),
        ("0::/a/b", "a", {"cpu__max": "300000 100000"}, 3),
        ("3:cpu,cpuacct:/", "cpu,cpuacct", {"cpu__cfs_quota_us": 400000, "cpu__cfs_period_us": 100000}, 4),
        ("3:cpu:/x", "cpu/x", {"cpu__cfs_quota_us": -1, "cpu__cfs_period_us": 100000}, 8),
        ("3:cpu:/x", "cpu", {"cpu__cfs_quota_us": 500000, "cpu__cfs_period_us": 100000}, 5),
    ],
)
def test_cores(
    roots: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    folder: str,
    files: dict[str, object],
    expected: int,
) -> None:
    proc, cgroup = roots
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    written(proc / "self/cgroup", f"{line}\n")
    put(cgroup / folder, **files)
    assert usable_cores(proc, cgroup) == expected


def test_cores_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(limits.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(limits.os, "cpu_count", lambda: 6)
    assert usable_cores(tmp_path, tmp_path) == 6


# The probe and its cache


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The probe's commands instead of the probe, which answers with PROBE; the cache is in tmp_path/cache."""
    commands: list[list[str]] = []

    def run(*command: str, **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(list(command))
        return subprocess.CompletedProcess(command, 0, f"a library's greeting\n{PROBE.model_dump_json()}\n", "")

    monkeypatch.setattr(processes, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return commands


def test_a_probe_is_cached(tmp_path: Path, runs: list[list[str]]) -> None:
    assert [probe_cpu(), probe_cpu()] == [PROBE, PROBE]
    assert len(runs) == 1
    [file] = (tmp_path / "cache/edgeft").iterdir()
    assert json.loads(file.read_text())["cpu"] == "a CPU"


@pytest.mark.parametrize("damage", ["", '{"cpu": "a', '{"cpu": "a CPU", "cores": 2}', "\x00"])
def test_a_corrupt_cache_is_measured_again(tmp_path: Path, runs: list[list[str]], damage: str) -> None:
    probe_cpu()
    [file] = (tmp_path / "cache/edgeft").iterdir()
    file.write_text(damage)
    assert [probe_cpu(), probe_cpu()] == [PROBE, PROBE]
    assert len(runs) == 2


def test_an_unwritable_cache_is_done_without(tmp_path: Path, runs: list[list[str]]) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert [probe_cpu(), probe_cpu()] == [PROBE, PROBE]
    assert len(runs) == 2


def test_other_packages_are_measured_anew(runs: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    probe_cpu()
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "99"})
    probe_cpu()
    assert len(runs) == 2


def test_other_code_that_measures_is_measured_anew(runs: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    probe_cpu()
    monkeypatch.setattr(machine, "sha256_file", lambda path: f"another {path.name}")
    probe_cpu()
    assert len(runs) == 2


BUSY = PROBE.model_copy(
    update={"share": 0.4, "matmul_tflops": {"fp32": 0.04, "fp16": 0.06, "bf16": 0.02}, "bandwidth_gb_per_second": 4.0}
)


def kept(tmp_path: Path, runs: list[list[str]], probe: Probe, age: float) -> None:
    """Put a probe of that age in seconds into the cache, under the name that this machine has."""
    probe_cpu()
    [file] = (tmp_path / "cache/edgeft").iterdir()
    probe.write(file)
    os.utime(file, (time.time() - age,) * 2)
    runs.clear()


def test_a_probe_of_a_busy_machine_is_made_again_and_the_higher_rates_are_kept(
    tmp_path: Path, runs: list[list[str]]
) -> None:
    kept(tmp_path, runs, BUSY, age=machine.MEASURE_AGAIN + 60)
    probe = probe_cpu()
    assert len(runs) == 1
    assert probe.matmul_tflops == {"fp32": 0.1, "fp16": 0.06, "bf16": 0.049}
    assert (probe.bandwidth_gb_per_second, probe.share, probe.busy) == (9.0, 1.0, False)
    assert probe_cpu() == probe
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("probe", "age", "again"), [(BUSY, 60.0, 0), (PROBE, 1e6, 0), (BUSY, -3600.0, 1)], ids=["new", "quiet", "clock"]
)
def test_which_probe_is_kept(tmp_path: Path, runs: list[list[str]], probe: Probe, age: float, again: int) -> None:
    kept(tmp_path, runs, probe, age)
    probe_cpu()
    assert len(runs) == again


def test_the_cores_that_a_call_gets() -> None:
    seconds, cores = measure_machine._fastest(lambda: time.sleep(0.01), for_seconds=0.1)
    assert seconds >= 0.01 and cores < 0.5


@pytest.mark.slow
def test_work_beside_it_is_seen_by_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(usable_cores())]
    try:
        assert probe_cpu().busy
    finally:
        for process in beside:
            process.kill()
            process.wait()


def test_a_plan_says_that_its_machine_was_busy() -> None:
    profile = load_profile("cpu").model_copy(update={"probe": BUSY})
    assert machine_notes(profile) == [
        "this CPU was measured while other work ran beside it (40% of its cores were left): "
        "seconds are as if that stayed so: fewer where it is quiet, more where busier; a later plan measures again"
    ]
    assert machine_notes(load_profile("t4")) == machine_notes(profile.model_copy(update={"probe": PROBE})) == []


def test_a_probe_that_fails(runs: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "Traceback (most recent call last):\nRuntimeError: out of luck\n"
    failed = subprocess.CompletedProcess([], 1, "", lines)
    monkeypatch.setattr(processes, "run", lambda *_, **__: failed)
    with pytest.raises(BadInput) as caught:
        probe_cpu()
    assert str(caught.value) == (
        "this CPU: cannot be measured: RuntimeError: out of luck\n\n"
        "hint: mend that, or plan for a fixed machine, as in --on cpu-16gb"
    )


def test_a_probe_without_torch_says_what_to_install(runs: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtra, match=r"this CPU cannot be measured: torch is not installed\n\nhint: pip install "
    ):
        probe_cpu()
    assert runs == []


def test_detect_fills_in_what_is_missing(runs: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory_limit", lambda: Limit(5 * GIB, "ulimit -v of 5.00 GiB"))
    monkeypatch.setattr(module, "usable_cores", lambda: 3)
    profile = detect(load_profile("cpu"))
    assert (profile.memory_gib, profile.cores, profile.bandwidth_gb_per_second) == (5.0, 3, 9.0)
    # Half the fp32 rate is enough, less is not.
    assert profile.matmul_tflops == {"fp32": 0.1, "fp16": 0.05}
    assert profile.budget_bytes == round(4.75 * GIB)
    assert profile.training_baseline_bytes == 400_000_000
    assert profile.head_buffers == PROBE.head_buffers
    assert Profile.model_validate_json(profile.model_dump_json()) == profile
    assert detect(profile) is profile


def test_detect_leaves_what_is_given(runs: list[list[str]]) -> None:
    for profile in list_profiles():
        if profile.name != "cpu":
            assert detect(profile) is profile
    assert runs == []


def test_the_real_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # A file of the current folder must not be imported in place of a module.
    written(tmp_path / "torch.py", "raise SystemExit('shadowed')\n")
    monkeypatch.chdir(tmp_path)
    probe = probe_cpu()
    assert set(probe.matmul_tflops) == {"fp32", "fp16", "bf16"}
    assert min(*probe.matmul_tflops.values(), probe.bandwidth_gb_per_second) > 0
    assert probe.cores == usable_cores()
    assert 100 * 2**20 < probe.import_rss_bytes < 4 * GIB
    assert list(probe.head_buffers) == [128, 256, 512, 1024]
    assert 0 < probe.head_buffers[1024] < 4 * 448  # less than the head itself: it is packed by blocks
    assert probe.versions["torch"]


def test_only_a_fresh_process_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", object())
    with pytest.raises(RuntimeError, match="not imported torch yet"):
        measure()


# Which device is here


class Cuda:
    """Stands in for torch.cuda: a T4, or no device."""

    def __init__(self, there: bool) -> None:
        self.is_available = lambda: there
        self.get_device_capability = lambda: (7, 5)
        self.get_device_name = lambda: "Tesla T4"


@pytest.mark.parametrize(
    ("name", "there", "reason"),
    [
        ("cpu", False, ""),
        ("t4", True, ""),
        ("t4", False, "PyTorch sees no CUDA device here"),
        ("l4-24gb", True, "Tesla T4 computes no bf16"),
    ],
)
def test_present(monkeypatch: pytest.MonkeyPatch, name: str, there: bool, reason: str) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "cuda", Cuda(there))
    assert why_absent(load_profile(name)) == reason
    assert present(load_profile(name)) is (not reason)


def test_present_on_apple(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert why_absent(load_profile("apple-16gb")) == "PyTorch sees no Apple GPU here"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert present(load_profile("apple-16gb"))


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from edgeft.machines.profile import list_profiles, load_profile; "
        "from edgeft.machines.limits import usable_memory; "
        "list_profiles(); load_profile('t4').budget_bytes; usable_memory(); "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    folder = str(Path(module.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
