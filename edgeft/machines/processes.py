"""How does edgeft run a piece of itself in a process of its own, so that its memory, noise and crashes end there?

Such a process imports nothing from the current folder (a user's random.py would shadow the standard library's) and
inherits the variables that keep packages from calling home.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from edgeft.machines.launcher import alone

_PR_SET_PDEATHSIG = 1
_ASKING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
HERE = str(Path(__file__).resolve().parent.parent)  # where this very edgeft is, installed or not


def command(code: str, *arguments: object) -> list[str]:
    """The command line that runs Python code, which finds this edgeft; `arguments` become sys.argv[1:]."""
    return [sys.executable, "-P", "-c", f"import sys; sys.path.append({HERE!r})\n{code}", *map(str, arguments)]


def run(
    code: str, *arguments: object, environment: Mapping[str, str] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run Python code to its end in a process of its own; its output is kept. This one does `meanwhile` beside it."""
    with subprocess.Popen(
        command(code, *arguments), env=alone() | dict(environment or {}), text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as child:  # fmt: skip
        try:
            meanwhile()
            out, err = child.communicate()
        except BaseException:
            child.kill()
            raise
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def carry_out(code: str, *arguments: object, environment: Mapping[str, str], quiet: bool = False) -> int:
    """Run Python code to its end in a process of its own that speaks for itself; its exit code.

    `quiet`: its standard output is dropped. What asks this process to stop asks that one, once, and its end is waited
    for; where this process is killed, that one stops too (on Linux).
    """
    children: list[subprocess.Popen[bytes]] = []

    def ask(number: int, frame: object) -> None:
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, ask) for number in _ASKING}
    code = f"from edgeft.machines.processes import stay_with\nstay_with({os.getpid()})\n{code}"
    try:
        children.append(subprocess.Popen(
            command(code, *arguments), env={**os.environ, **environment}, start_new_session=True,
            stdout=subprocess.DEVNULL if quiet else None,
        ))  # fmt: skip
        return children[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stay_with(parent: int) -> None:
    """Let this process be asked to stop (SIGTERM) when the one that started it ends. Only Linux can."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(128 + signal.SIGTERM)


def reason(code: int, said: str, lines: int = 1) -> str:
    """Why a process failed: its last words on standard error, and the signal where one ended it."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        killed = f"ended by {name}" + (", as by a system out of memory" if name == "SIGKILL" else "")
        return "\n".join([*said.strip().splitlines()[-lines:], killed])
    return "\n".join(said.strip().splitlines()[-lines:]) or f"exit code {code}"
