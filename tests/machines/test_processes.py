"""Does what edgeft runs in a process of its own import nothing of the user's folder, and say why it failed?"""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import ROOT

from edgeft.machines import processes

pytestmark = pytest.mark.cold
PACKAGE = ROOT / "edgeft"
# Those that start Python by its own name, with -P: run.py, what is compared with an emulated device, pip, optimum.
# next_steps.py prints it.
OWN_WAYS = {"next_steps.py", "processes.py", "build.py", "portable_onnx.py", "device_check.py", "emulation.py"}


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files in it whose names are those of modules that everything imports."""
    folder = tmp_path / "a user's folder"
    folder.mkdir()
    for name in ("random", "tempfile", "numpy", "torch", "json", "edgeft"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported a stranger')\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def test_nothing_of_the_current_folder_is_imported(hostile: Path) -> None:
    code = "import random, sys, edgeft; print(edgeft.__file__, *sys.argv[1:])"
    done = processes.run(code, "a", Path("b c"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{PACKAGE / '__init__.py'} a b c\n"
    planted = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert planted.stderr == "imported a stranger\n"  # what a process without -P gets


def test_the_command_line_does_not_import_it_either(hostile: Path) -> None:
    (hostile / "edgeft.py").unlink()  # this one name the user's folder decides: `python -m edgeft` means it
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "edgeft", "show", "targets"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ort-int4" in done.stdout


def test_random_weights_are_made_in_such_a_folder(hostile: Path, checkpoint_folder: Path, tmp_path: Path) -> None:
    from edgeft.training.try_plan import random_checkpoint

    random_checkpoint(checkpoint_folder, tmp_path / "random weights")
    assert (tmp_path / "random weights" / "model.safetensors").is_file()


def test_every_process_of_ours_is_started_in_this_way() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "executable":
                found.add(path.name)
    assert found <= OWN_WAYS


def test_the_reason_is_the_last_line_or_how_it_ended() -> None:
    done = processes.run("print('noise'); raise ValueError('the shape is wrong')")
    assert done.returncode == 1
    assert processes.reason(done.returncode, done.stderr) == "ValueError: the shape is wrong"
    assert processes.reason(3, " \n") == "exit code 3"
    assert processes.reason(1, "a\nb\nc\n", 2) == "b\nc"
    killed = processes.run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == -signal.SIGKILL
    assert processes.reason(killed.returncode, killed.stderr) == "ended by SIGKILL, as by a system out of memory"
    assert processes.reason(-signal.SIGSEGV, "loading\n") == "loading\nended by SIGSEGV"


def test_variables_are_added_to_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEFT_TEST", "kept")
    code = "import os; print(*(os.environ[name] for name in ('EDGEFT_TEST', 'MORE', 'ORT_DISABLE_TELEMETRY')))"
    assert processes.run(code, environment={"MORE": "added"}).stdout == "kept added 1\n"


def carried_out(*arguments: object, quiet: bool = False) -> int:
    return processes.carry_out("import sys\nexec(sys.argv[1])", *arguments, environment={"OWN": "1"}, quiet=quiet)


def test_a_stage_speaks_for_itself_and_gives_its_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os; print('out', os.environ['OWN'], flush=True); print('err', file=sys.stderr); sys.exit(7)"
    assert carried_out(code) == 7
    assert capfd.readouterr() == ("out 1\n", "err\n")
    assert carried_out(code, quiet=True) == 7
    assert capfd.readouterr() == ("", "err\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_asks_to_stop_asks_the_stage_once(number: int, tmp_path: Path) -> None:
    """As of a terminal, where Ctrl-C is for every process of its group."""
    count = tmp_path / "asked"
    stage = (
        f"import os, signal, time\nasked = []\nsignal.signal({int(number)}, lambda *_: asked.append(1))\n"
        "print('ready', flush=True)\nwhile not asked:\n    time.sleep(0.01)\n"
        f"time.sleep(0.3)\nopen({str(count)!r}, 'w').write(str(len(asked)))\nsys.exit(5)"
    )
    parent = f"import sys\nfrom edgeft.machines import processes\ncode = {stage!r}\n"
    parent += "print('ended', processes.carry_out('import sys\\nexec(sys.argv[1])', code, environment={}))"
    running = subprocess.Popen(processes.command(parent), stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert running.stdout is not None and running.stdout.readline() == "ready\n"
    os.killpg(running.pid, number)
    assert running.stdout.read() == "ended 5\n" and count.read_text() == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with the one that started it")
def test_a_stage_does_not_outlive_what_started_it() -> None:
    stage = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)"
    parent = f"from edgeft.machines import processes\nprocesses.carry_out({stage!r}, environment={{}})"
    running = subprocess.Popen(processes.command(parent), stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    pid = int(running.stdout.readline())
    running.kill()
    assert running.stdout.read() == ""  # its end of the pipe is closed: it has ended
    with pytest.raises(ProcessLookupError):
        for _ in range(1000):
            os.kill(pid, 0)
            time.sleep(0.01)
