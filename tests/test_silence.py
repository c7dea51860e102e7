"""Does anything that edgeft runs leave files in a home folder or look for the network? Watched, not believed.

Runtimes keep still where they see a build server's or a test's variables, so the watched processes do not have them.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from edgeft.machines.runner import runner_module

# By these a package may know that nobody is there to be watched.
TELLTALE = re.compile(
    "CI|CI_.*|PYTEST.*|GITHUB_.*|GITLAB_.*|TF_BUILD|JENKINS.*|TEAMCITY.*|TRAVIS|.*TELEMETRY.*|.*TRACK.*|XDG_.*|HF_.*"
)
# A call that leaves this machine, or wants to: names are looked up over AF_INET too.
OUTWARD = re.compile(r"\b(connect|sendto|sendmsg|sendmmsg)\(.*AF_INET6?\b")


class Watched(NamedTuple):
    folder: Path
    home: Path
    trace: Path | None  # of system calls, where strace works here


@functools.cache
def tracer() -> tuple[str, ...]:
    """strace's command, or nothing where it is not installed or may not look."""
    if shutil.which("strace") is None:
        return ()
    for fast in (("--seccomp-bpf",), ()):  # stops at these calls only; older ones stop at every call
        command = ("strace", "-f", *fast, "-e", "trace=network", "-o")
        if subprocess.run([*command, os.devnull, "true"], capture_output=True, check=False).returncode == 0:
            return command
    return ()


@functools.cache
def isolated() -> tuple[str, ...]:
    """The command that runs another without any network interface, or nothing where that is not allowed."""
    command = ("unshare", "--map-root-user", "--net")
    if shutil.which("unshare") is None:
        return ()
    return command if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0 else ()


def watch(folder: Path, *commands: list[str], net: bool = False, **variables: str) -> Watched:
    """Run commands one after the other with a home folder of their own, `folder`/home, and see what they do."""
    home, trace = folder / "home", folder / "trace"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not TELLTALE.fullmatch(name)}
    environment = kept | {"HOME": str(home), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"} | variables
    for number, command in enumerate(commands):
        watcher = [*(() if net else isolated()), *((*tracer(), f"{trace}.{number}") if tracer() else ())]
        done = subprocess.run([*watcher, *command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    if not tracer():
        return Watched(folder, home, None)
    whole = "".join(path.read_text(errors="replace") for path in sorted(folder.glob("trace.*")))
    trace.write_text(whole)
    return Watched(folder, home, trace)


def files(home: Path) -> list[str]:
    return sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if not path.is_dir())


def outward(watched: Watched) -> list[str]:
    """Calls that wanted to leave this machine. Skips the test, saying so, where nobody can look."""
    if watched.trace is None:
        pytest.skip("strace does not work here: the network was not watched, only the files were")
    return [line for line in watched.trace.read_text().splitlines() if OUTWARD.search(line)]


def edgeft(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "edgeft", *map(str, arguments)]


@pytest.fixture(scope="module")
def line(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Every verb from plan to verify, and the bundle's own run.py."""
    folder = tmp_path_factory.mktemp("watched")
    rows = [{"prompt": f"Package: lib{i}\nSection:", "completion": (" libs", " doc")[i % 2]} for i in range(12)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pins = [part for pin in ("epochs=1", "batch_size=4", "rank=4", "eval_rows=4") for part in ("--set", pin)]
    made, planned = folder / "bundle", folder / "plan.json"
    source = ("--model", checkpoint_folder, "--profile", "cpu-8gb", "--data", data)
    return watch(
        folder,
        edgeft("plan", *source, *pins, "--out", planned),
        edgeft("train", planned),
        edgeft("merge", folder / "train"),
        edgeft("export", folder / "merged", "--target", "ort-fp32", "--out", made),
        edgeft("run", made, "Package: libx", "--max-tokens", "2"),
        edgeft("verify", made),
        [sys.executable, str(made / "run.py"), "Package: libx", "--max-tokens", "2"],
        [sys.executable, str(made / "run.py"), "--verify"],
    )  # fmt: skip


def test_no_verb_leaves_a_file_in_the_home_folder_but_edgefts_own_cache(line: Watched) -> None:
    assert [name for name in files(line.home) if not name.startswith(".cache/edgeft/")] == []


def test_no_verb_looks_for_the_network(line: Watched) -> None:
    assert outward(line) == []


def test_the_watch_sees_what_a_runtime_does_when_it_is_let(line: Watched, tmp_path: Path) -> None:
    command = [sys.executable, str(line.folder / "bundle" / "run.py"), "--verify"]
    left = files(watch(tmp_path, command, ORT_DISABLE_TELEMETRY="0").home)
    if not left:
        pytest.skip("the runtime installed here has no telemetry: nothing could be planted")
    assert any("deviceid" in name for name in left)


def test_the_watch_sees_a_call_to_the_network(tmp_path: Path) -> None:
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 53))"
    assert outward(watch(tmp_path, [sys.executable, "-c", code], net=True))


def test_importing_edgeft_silences_before_a_runtime_is_imported(line: Watched, tmp_path: Path) -> None:
    code = (
        "import sys, edgeft, onnxruntime; onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
    )
    command = [sys.executable, "-c", code, str(line.folder / "bundle" / "model.onnx")]
    assert files(watch(tmp_path, command).home) == []


def test_one_list_of_variables_and_what_a_user_sets_stays() -> None:
    names = runner_module().SILENCE
    code = f"import os, edgeft; print([os.environ[name] for name in {names!r}])"
    kept = {name: value for name, value in os.environ.items() if name not in names}
    for given, expected in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == str([expected, "1", "1"])


def test_the_exporter_in_its_own_environment_is_silent_too() -> None:
    from edgeft.targets import optimum_script

    kept = {name: value for name, value in os.environ.items() if name not in runner_module().SILENCE}
    code = "import os, runpy, sys; runpy.run_path(sys.argv[1]); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    command = [sys.executable, "-P", "-c", code, str(optimum_script.__file__)]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
