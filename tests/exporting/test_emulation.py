"""Is the emulated machine made and started as it should be, and are two processors' answers compared rightly?

Nothing is emulated here: a program that says how it was started stands for QEMU. `make test-arm64` has the real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from bundles import DATA, bundle, reseal
from typer.testing import CliRunner

from edgeft.cli import app
from edgeft.documents import sha256_file, shipped_folder
from edgeft.errors import BadInput, EdgeftError, MissingExtra, ParityFailed
from edgeft.exporting import device_check, emulation
from edgeft.exporting.device_check import DeviceCheck, Rows, compared, refuse, result_path, spread, verify_on
from edgeft.exporting.device_script import emulator_bytes
from edgeft.exporting.emulation import Machine, Setup
from edgeft.machines.profile import Profile, list_profiles, load_profile

PI = "raspberrypi5-8gb"
EMULATED = [profile.name for profile in list_profiles() if profile.emulation]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose QEMU says how it was started, in a cache with a space in its path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "my cache"))
    found = emulation.machine()
    for name in ("root/usr/bin", "root/etc", "site"):
        (found.folder / name).mkdir(parents=True)
    (found.root / "usr/bin/python3.11").touch()
    (found.root / "usr/bin/python3.11-config").touch()
    found.qemu.write_text(
        f"#!{sys.executable}\nimport json, os, sys, time\nfrom pathlib import Path\n"
        "root = Path(sys.argv[2])\n"
        "if sys.argv[-1] == 'sleep': time.sleep(60)\n"
        "print(json.dumps({'arguments': sys.argv[1:], 'environment': dict(os.environ), 'here': os.getcwd(),\n"
        "    'cpuinfo': (root / 'proc/cpuinfo').read_text(), 'links': sorted(p.name for p in root.iterdir()),\n"
        "    'python': (root / 'usr/bin/python3.11').is_file()}))\n"
    )
    found.qemu.chmod(0o755)
    Setup(qemu="qemu-aarch64 version 7", python="3.11.2", debian={}, wheels={"numpy": "2.0"}, seconds=1).write(
        found.folder / "setup.json"
    )
    return found


def started(made: Machine, *arguments: object, timeout: float = 60) -> dict[str, Any]:
    profile, processor = emulation.emulated(PI)
    done = emulation.run(made, profile, processor, arguments, timeout=timeout)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", EMULATED)
def test_a_profiles_files_are_those_of_its_cores(name: str) -> None:
    profile, processor = emulation.emulated(name)
    files = processor.contents(profile.cores)
    lines = files["/proc/cpuinfo"].splitlines()
    assert [line for line in lines if line.startswith("processor")] == [f"processor\t: {n}" for n in range(4)]
    assert all("asimddp" in line.split() for line in lines if line.startswith("Features"))
    assert files["/sys/devices/system/cpu/possible"] == "0-3\n"
    assert sum(path.endswith("/regs/identification/midr_el1") for path in files) == profile.cores
    assert "{" not in "".join([*files, *files.values()])


@pytest.mark.parametrize("name", ["/etc/passwd", "/proc/../etc/passwd", "proc/cpuinfo", "/sys/"])
def test_a_profiles_files_are_the_kernels_alone(tmp_path: Path, name: str) -> None:
    path = tmp_path / "board.toml"
    path.write_text((shipped_folder("profiles") / f"{PI}.toml").read_text() + f'"{name}" = "x"\n')
    with pytest.raises(BadInput, match=r"emulation.files: names begin with /proc/ or /sys/ and stay there"):
        load_profile(str(path))


def test_the_program_is_started_with_the_devices_root_and_nothing_of_this_machines_environment(
    made: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/somewhere")
    monkeypatch.setenv("QEMU_CPU", "max")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    told = started(made, "a b", "$HOME;'\"")
    root = told["arguments"][1]
    assert told["arguments"] == ["-L", root, "-cpu", "cortex-a76", str(made.python), "a b", "$HOME;'\""]
    assert made.python.name == "python3.11" and told["python"]
    assert told["links"] == ["etc", "proc", "sys", "usr"]
    assert told["cpuinfo"].startswith("processor\t: 0\n") and "Raspberry Pi 5" in told["cpuinfo"]
    assert not {"LD_LIBRARY_PATH", "QEMU_CPU"} & told["environment"].keys()
    assert told["environment"]["OMP_NUM_THREADS"] == "1" and told["environment"]["PYTHONPATH"] == str(made.site)
    assert not Path(root).exists() and (made.root / "usr/bin/python3.11").exists()


def test_a_program_that_does_not_end_is_ended(made: Machine) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        started(made, "sleep", timeout=0.5)


def test_what_is_set_up_is_not_set_up_again(made: Machine) -> None:
    assert emulation.set_up(lambda text: pytest.fail(text)) == made
    done = CliRunner().invoke(app, ["arm64"])
    assert done.exit_code == 0 and done.stdout.strip() == str(made.folder)


def test_another_version_of_a_runtime_is_not_set_up(made: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert emulation.find_machine("ort-genai") == made
    monkeypatch.setattr(emulation, "wanted_wheels", lambda: {"onnxruntime": "99"})
    with pytest.raises(MissingExtra, match="no emulated aarch64 machine is set up") as caught:
        emulation.find_machine("ort-genai")
    assert caught.value.exit_code == 5 and "hint: run `make arm64` once" in str(caught.value)


def test_what_cannot_be_emulated_is_refused_by_name(made: Machine) -> None:
    with pytest.raises(BadInput, match=r"^--for: llama-cpp-python has no wheel for aarch64, 'llama\.cpp' bundles"):
        emulation.find_machine("llama.cpp")
    with pytest.raises(BadInput, match=r"profile t4 names no processor to emulate") as caught:
        emulation.emulated("t4")
    assert f"hint: these do: {', '.join(EMULATED)}" in str(caught.value)


def test_without_debians_tools_the_missing_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtra, match=r"^dpkg: there is no dpkg here"):
        emulation.set_up(lambda text: None)
    assert not any((tmp_path / "edgeft").iterdir())  # nothing half made is left


def test_what_could_not_be_fetched_is_said_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt-get and dpkg as they answer where no server is reached."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"dpkg": "echo amd64", "apt-get": "echo 'Err: no server' >&2; exit 100"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(EdgeftError, match=r"^apt-get update: Err: no server\n\nhint: make arm64 fetches from"):
        emulation.set_up(lambda text: None)
    assert not any((tmp_path / "cache/edgeft").iterdir())


def package(folder: Path, name: str, files: dict[str, str]) -> Path:
    """A .deb as Debian's tools make it."""
    place = folder / name
    (place / "DEBIAN").mkdir(parents=True)
    fields = {"Package": name, "Version": "1:2.36-9", "Architecture": "arm64", "Maintainer": "x", "Description": "x"}
    (place / "DEBIAN/control").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    for path, text in files.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text)
    out = folder / f"{name}_1%3a2.36-9_arm64.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", str(place), str(out)], check=True, capture_output=True)
    return out


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")
def test_packages_are_unpacked_and_of_qemu_one_program(tmp_path: Path) -> None:
    made = Machine(tmp_path / "my machine")
    made.folder.mkdir()
    debs = [
        package(tmp_path, "python3.11", {"usr/bin/python3.11": "python", "usr/lib/x": "x"}),
        package(tmp_path, "qemu-user-static", {"usr/bin/qemu-arm-static": "no", "usr/bin/qemu-aarch64-static": "yes"}),
    ]
    emulation.unpack(debs, made)
    assert made.qemu.read_text() == "yes" and os.access(made.qemu, os.X_OK)
    assert made.python.read_text() == "python" and (made.root / "lib/x").read_text() == "x"
    assert not (made.root / "usr/bin/qemu-arm-static").exists()
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(EdgeftError, match="holds no qemu-aarch64-static"):
        emulation.unpack([package(again, "qemu-user-static", {"usr/x": ""})], Machine(again))


def test_wheels_fit_the_debians_c_library() -> None:
    assert emulation.glibc_of([Path("zlib1g_1_all.deb"), Path("libc6_2.36-9+deb12u14_arm64.deb")]) == 36
    names = emulation.platforms(19)
    assert names == [f"manylinux_2_{n}_aarch64" for n in (19, 18, 17)] + ["manylinux2014_aarch64"]
    with pytest.raises(EdgeftError, match=r"libc6: has no version 2\.N, got ''"):
        emulation.glibc_of([])


def test_an_emulators_own_memory_is_what_the_program_does_not_see(tmp_path: Path) -> None:
    (tmp_path / "maps").write_text("1000-3000 r-xp 0 00:00 0 python\n8000-9000 rw-p 0 00:00 0\n")
    (tmp_path / "smaps").write_text(
        "1000-2000 r-xp 0 00:00 0 python\nSize: 4 kB\nRss: 4 kB\nVmFlags: rd\n2000-3000 r-xp 0 00:00 0\nRss: 4 kB\n"
        "8800-9000 rw-p 0 00:00 0\nRss: 2 kB\na000-f000 rwxp 0 00:00 0\nRss: 16 kB\nPss: 16 kB\n"
    )
    assert emulator_bytes(tmp_path) == 16 * 1024
    assert emulator_bytes(tmp_path / "none") == 0


def test_the_rows_are_spread_over_the_data() -> None:
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread(range(3), 32) == [0, 1, 2]
    assert spread([], 32) == []


def step(token: int, margin: float, logit: float = 0.0) -> dict[str, Any]:
    return {"token": token, "margin": margin, "asked": [1], "logits": [logit]}


def sides(*pairs: tuple[dict[str, Any], dict[str, Any]]) -> Rows:
    asked = device_check.Asked(DATA, (7,), ([1],))
    both = [{"rows": [{"steps": list(steps)}]} for steps in zip(*pairs, strict=True)]
    found = compared(asked, both[0], both[1], binding=0.6)
    assert found is not None
    return found


def test_other_tokens_are_found_and_count_where_the_margin_was_wide() -> None:
    same = sides((step(5, 9.0), step(5, 9.0)), (step(6, 0.5, 1.0), step(6, 0.4, 1.25)))
    assert same.others == () and same.tokens == 2 and same.close_tokens == 1 and same.logit_difference == 0.25
    close = sides((step(5, 0.5), step(6, 0.1)))
    assert [(each.row, each.here, each.there, each.binding) for each in close.others] == [(7, 5, 6, False)]
    assert close.other_answers.difference == 1.0 and device_check._binding(close) == []
    wide = sides((step(5, 0.7), step(6, 0.1)), (step(5, float("nan")), step(6, 0.1)))
    assert [each.binding for each in wide.others] == [True, True]
    assert device_check._binding(wide)[0] == (
        "valid.jsonl: row 7 answers 6 instead of 5 at token 0, where the best two were 0.7 apart"
    )


Emulated = Callable[..., subprocess.CompletedProcess[str]]


def here_instead(change: Callable[[dict[str, Any]], None] = lambda result: None) -> Emulated:
    """This machine's Python in the place of the emulated one; `change` is what the device gives otherwise."""

    def run(made: Machine, profile: Profile, processor: Any, arguments: Sequence[Any], *, timeout: float) -> Any:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        with contextlib.suppress(FileNotFoundError):
            result = json.loads(Path(arguments[2]).read_text())
            change(result)
            Path(arguments[2]).write_text(json.dumps(result))
        return done

    return run


@pytest.fixture
def copy(tmp_path: Path, made: Machine, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle to damage, beside nothing, and an emulation that is none."""
    folder = tmp_path / "my bundle"
    shutil.copytree(bundle("ort-int4"), folder)
    monkeypatch.setattr(emulation, "run", here_instead())
    return folder


def test_the_same_processor_gives_the_same_and_the_result_is_kept(copy: Path) -> None:
    found = verify_on(copy, PI, data=DATA, rows=3)
    assert found.problems == () and found.rows is not None
    assert found.rows.rows == 3 and found.rows.others == () and found.rows.logit_difference == 0
    assert found.rows.other_answers.high > 0.3  # three rows say little
    assert found.device_versions == {"python": "3.11.2", "numpy": "2.0"}
    assert found.input_sha256 == sha256_file(copy / "bundle.json")
    assert DeviceCheck.read(copy.with_name("my bundle.on-raspberrypi5-8gb.json")) == found
    text = found.text()
    assert text.startswith(f"on {PI} (cortex-a76, emulated by qemu-aarch64 version 7): every file and golden vector")
    assert "valid.jsonl: 0 of " in text and "peak memory " in text
    refuse(found, copy)


def test_another_answer_on_the_device_is_a_fault_where_the_margin_is_wide(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(result: dict[str, Any]) -> None:
        for row in result["rows"]:
            for each in row["steps"]:
                each["token"] += 1

    monkeypatch.setattr(emulation, "run", here_instead(other))
    found = verify_on(copy, PI, data=DATA, rows=2)
    assert found.rows is not None and len(found.rows.others) == found.rows.tokens
    assert len(found.problems) == found.rows.tokens - found.rows.close_tokens > 0
    with pytest.raises(ParityFailed, match=f"not what was exported, on {PI}\nvalid.jsonl: row 1 answers "):
        refuse(found, copy)


def test_a_changed_golden_answer_is_found_and_no_row_is_compared(copy: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["golden"][0]["top_logits"][0] += 5

    reseal(copy, change)
    found = verify_on(copy, PI, data=DATA, rows=2)
    assert found.rows is None and "golden vector 1's first logits differ by 5" in "".join(found.problems)


def test_a_damaged_tokenizer_is_a_fault_of_the_bundle_and_none_of_the_data(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    found = verify_on(copy, PI, data=DATA, rows=2)
    assert found.rows is None and found.notes[0].startswith("valid.jsonl: not read, ")
    assert found.problems[0].startswith("tokenizer.json: 1 bytes, the export wrote ")


def test_without_data_the_test_rows_of_the_plan_are_taken_and_only_those(copy: Path) -> None:
    found = verify_on(copy, PI)
    assert found.rows is None and "name rows with --test FILE" in found.notes[0]
    plan = copy.with_name("plan.json")
    plan.write_text(json.dumps({"job": {"test": str(DATA)}}))

    def recorded(**hashes: str) -> Path | None:
        manifest = device_check.Manifest.of(copy)
        return device_check.recorded_test_data(copy, manifest.model_copy(update={"provenance": hashes}))

    right = {"plan.json": sha256_file(plan), "test data": sha256_file(DATA)}
    assert recorded(**right) == DATA
    assert recorded(**right | {"plan.json": "ab"}) is None
    assert recorded(**right | {"test data": "ab"}) is None


def test_errors_say_what_to_do(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"none.jsonl: no such file"):
        verify_on(copy, PI, data=tmp_path / "none.jsonl")
    with pytest.raises(BadInput, match=r"bundle\.json: no such file"):
        verify_on(tmp_path / "none", PI)
    with pytest.raises(EdgeftError, match=r"^this machine: was not done with the bundle after "):
        verify_on(copy, PI, timeout=0.01)
    crash = subprocess.CompletedProcess([], -11, "", "uncaught target signal 11\n")
    monkeypatch.setattr(emulation, "run", lambda *arguments, **options: crash)
    with pytest.raises(ParityFailed, match=r"emulated: the bundle's program failed: uncaught .* 11\nended by SIGSEGV"):
        verify_on(copy, PI)
    assert not result_path(copy, PI).exists()


def test_the_command_refuses_options_that_do_not_fit(copy: Path) -> None:
    for arguments, message in (
        (["--rows", "3"], "--test, --rows, --timeout: belong to --for"),
        (["--for", PI, "--no-replay"], "--no-replay: leaves out what --for is there for"),
        (["--on", "t4"], "--for: profile t4 names no processor to emulate"),
    ):
        done = CliRunner().invoke(app, ["verify", str(copy), *arguments])
        assert isinstance(done.exception, BadInput) and str(done.exception).startswith(message)
