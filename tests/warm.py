"""Children of edgeft that start warm: forked from one process that has imported what each of them imports first.

A child that builds a bundle of two layers works for a fifth of a second, after five of imports. Its code, arguments,
variables, folder and streams are its own here too; only the start is shared. Real starts are what tests marked `cold`
see, and those that start `python -m edgeft` themselves, as tests/test_pipeline.py and tests/machines/test_processes.py
do.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from edgeft.machines import processes

FIRST = (
    "onnxruntime_genai.models.builder", "transformers.models.llama.modeling_llama", "bitsandbytes", "edgeft.cli",
    "edgeft.targets.ort", "edgeft.exporting.export", "edgeft.exporting.rehearsal", "edgeft.training.try_plan",
)  # fmt: skip
# whose children wait for nothing but their end
STARTING = ("edgeft.machines.processes", "edgeft.targets.ort", "edgeft.api.plan_and_train")
# measures what a process holds after its imports, for the cache that plans are made from, the user's own
COLD = "edgeft.training.measure_machine"
PYTHON = sys.executable
KNOWN = {"capture_output", "check", "cwd", "env", "errors", "stderr", "stdin", "stdout", "text"}
_server: tuple[subprocess.Popen[bytes], str] | None = None


# What the server does


def serve(place: str, listening: int) -> None:
    """Fork for each connection, until it is ended or alone."""
    asked, parent = socket.socket(fileno=listening), os.getppid()
    for name in FIRST:
        importlib.import_module(name)
    gc.freeze()  # collections of the children leave it alone
    asked.settimeout(2)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    while os.getppid() == parent:
        try:
            connection, _ = asked.accept()
        except TimeoutError:
            continue
        connection.settimeout(None)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not os.fork():
            asked.close()
            _answer(connection, place)
        connection.close()


def _answer(connection: socket.socket, place: str) -> NoReturn:
    """Run what one connection asks for in a fork of this fork, and tell how it ended."""
    head, fds, _, _ = socket.recv_fds(connection, 4, 3)
    todo = json.loads(connection.recv(struct.unpack("I", head)[0], socket.MSG_WAITALL))
    child = os.fork()
    if not child:
        connection.close()
        _begin(todo, fds, place)
    connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    os._exit(0)


def _begin(todo: dict[str, Any], fds: list[int], place: str) -> NoReturn:
    """Be the process that was asked for. Its own children start warm too."""
    global _server
    for stream, fd in enumerate(fds):
        os.dup2(fd, stream)
        os.close(fd)
    os.environ.clear()
    os.environ.update(todo["environment"])
    os.chdir(todo["folder"])
    tempfile.tempdir = None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = ["-c", *todo["arguments"]]
    _server = None
    os.environ.setdefault("EDGEFT_WARM", place)
    for name in STARTING:
        importlib.import_module(name).subprocess = subprocess_for()  # type: ignore[attr-defined]
    ended: Any = 0
    try:
        exec(compile(todo["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as left:
        ended = left.code or 0
        if not isinstance(ended, int):
            print(ended, file=sys.stderr)
            ended = 1
    except BaseException:
        traceback.print_exc()
        ended = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)  # to take all that was imported apart again would be nine tenths of the work


# What its clients do


def _place() -> str:
    """The address of the server, which is started where there is none."""
    global _server
    if "EDGEFT_WARM" in os.environ:
        return os.environ["EDGEFT_WARM"]
    if _server is None or _server[0].poll() is not None:
        place = str(Path(tempfile.mkdtemp(prefix="edgeft-warm-")) / "socket")
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(place)
        listening.listen()
        code = (
            f"sys.path.append({str(Path(__file__).parent)!r})\nimport warm\nwarm.serve(sys.argv[1], int(sys.argv[2]))"
        )
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        _server = (
            subprocess.Popen(
                processes.command(code, place, listening.fileno()), pass_fds=[listening.fileno()], env=environment,
                stdin=subprocess.DEVNULL, start_new_session=True,
            ),
            place,
        )  # fmt: skip
        listening.close()
    return _server[1]


@atexit.register
def stop() -> None:
    """End the server, and with it every child that still runs."""
    global _server
    if _server is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(_server[0].pid, signal.SIGTERM)
        _server[0].wait()
        Path(_server[1]).unlink(missing_ok=True)
        Path(_server[1]).parent.rmdir()
        _server = None


def _ask(todo: dict[str, Any], fds: list[int]) -> int:
    """The exit code of one child, run to its end."""
    text = json.dumps(todo).encode()
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(_place())
            socket.send_fds(server, [struct.pack("I", len(text))], fds)
            server.sendall(text)
            return int(struct.unpack("i", server.recv(4, socket.MSG_WAITALL))[0])
        except BaseException:  # a test that is stopped leaves no child behind
            stop()
            raise


def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[Any]:
    """As subprocess.run does: what `processes.command` gives runs in a fork of the server, all else as it is."""
    if list(command[:3]) != [PYTHON, "-P", "-c"] or not how.keys() <= KNOWN or COLD in command[3]:
        return subprocess.run(command, **how)
    with contextlib.ExitStack() as files:
        nothing = files.enter_context(open(os.devnull, "rb"))
        kept = [files.enter_context(tempfile.TemporaryFile()) for _ in range(2)] if how.get("capture_output") else []
        out = kept[0] if kept else how.get("stdout") or sys.__stdout__
        err = kept[1] if kept else how.get("stderr") or sys.__stderr__
        todo = {
            "code": command[3], "arguments": [str(word) for word in command[4:]],
            "environment": dict(how.get("env") or os.environ), "folder": str(how.get("cwd") or os.getcwd()),
        }  # fmt: skip
        ended = _ask(todo, [nothing.fileno(), out.fileno(), (out if err == subprocess.STDOUT else err).fileno()])
        said: list[Any] = []
        for file in kept:
            file.seek(0)
            said.append(file.read().decode(errors=how.get("errors") or "strict") if how.get("text") else file.read())
    done = subprocess.CompletedProcess(command, ended, *said)
    if how.get("check"):
        done.check_returncode()
    return done


def edgeft(*arguments: object, code: int | None = None, **how: Any) -> subprocess.CompletedProcess[str]:
    """What `python -m edgeft` says and where it ends, in a process of its own; `code`: the exit code it must have."""
    command = processes.command("from edgeft.cli import main\nmain()", *arguments)
    done = run(command, capture_output=True, text=True, **how)
    assert code in (None, done.returncode), f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def subprocess_for() -> SimpleNamespace:
    """The module `subprocess` as edgeft sees it where its children start warm."""
    return SimpleNamespace(**{**vars(subprocess), "run": run})
