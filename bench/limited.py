"""What do the processes of a command hold while the system lets them have so many bytes and no more?

They run in a control group of their own below the bench's. Pages of files count against its limit, but the system
takes them back. What is measured leaves out those of weights, and counts all of each process's libraries: so do plans.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from run import ROOT

from edgeft.progress import WORDS

# by a line's controllers in /proc/self/cgroup (version 2 names none): where its folders lie, which file limits memory
KINDS = {
    "": (Path("/sys/fs/cgroup"), "memory.max"),
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
}
EVERY_SECONDS = 0.05
WEIGHTS = (".safetensors", ".data", ".data.new", ".gguf", ".bin")
STAGES = {words: stage for stage, words in WORDS.items()}


class Group:
    """A control group with a limit, and what its processes hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def join(self) -> None:
        """Put the process that calls this into the group."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def processes(self) -> list[int]:
        return [int(line) for line in (self.folder / "cgroup.procs").read_text().split()]

    def anonymous_bytes(self) -> int:
        return sum(map(_anonymous, self.processes()))


@contextlib.contextmanager
def limited(limit_bytes: int) -> Iterator[Group]:
    """A control group of so many bytes. Raises OSError where none can be made: it takes the right to, mostly root's."""
    tried = []
    for names, path in (line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()):
        root, limit = KINDS.get(names, (None, ""))
        if root is None:
            continue
        folder = root / path.lstrip("/") / f"edgeft-bench-{os.getpid()}"
        try:
            folder.mkdir()
            with open(folder / limit, "r+") as file:  # which the system has put there
                file.write(str(limit_bytes))
        except OSError as problem:
            tried.append(str(problem))
            with contextlib.suppress(OSError):
                folder.rmdir()
            continue
        try:
            yield Group(folder)
        finally:
            folder.rmdir()
        return
    raise OSError(f"no control group with a memory limit can be made: {'; '.join(tried)}")


class Peaks:
    """The highest bytes of a group's processes, by what its progress lines say they do."""

    def __init__(self, group: Group) -> None:
        self.group, self.stage = group, "start"
        self.anonymous: dict[str, int] = {}
        self.libraries: dict[str, int] = {}
        self.mapped: dict[int, int] = {}  # a process's libraries, at most: under the limit they come and go

    def look(self) -> None:
        """Compare with what is held now; libraries are counted anew with every 1% more."""
        stage, held = self.stage, self.group.anonymous_bytes()
        if held > 1.01 * self.anonymous.get(stage, 0):
            now = {pid: max(_mapped(pid), self.mapped.get(pid, 0)) for pid in self.group.processes()}
            self.mapped |= now
            self.libraries[stage] = sum(now.values())
        self.anonymous[stage] = max(held, self.anonymous.get(stage, 0))

    def listen(self, lines: Any) -> None:
        """Follow what a command says, and say it on."""
        for line in lines:
            sys.stderr.write(line)
            if said := [words for words in STAGES if line.startswith(words)]:
                self.stage = STAGES[max(said, key=len)]

    @property
    def bytes(self) -> dict[str, int]:
        return {stage: held + self.libraries.get(stage, 0) for stage, held in self.anonymous.items()}


def limited_verb(group: Group, *arguments: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(the JSON result of one edgeft verb that runs in a group, highest bytes of its processes by stage)."""
    command = [sys.executable, "-m", "edgeft", *arguments, "--json"]
    peaks = Peaks(group)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=group.join
    ) as process:  # fmt: skip
        listener = threading.Thread(target=peaks.listen, args=(process.stderr,))
        result: list[str] = []
        reader = threading.Thread(target=lambda: result.append(process.stdout.read() if process.stdout else ""))
        listener.start()
        reader.start()
        while process.poll() is None:
            peaks.look()
            time.sleep(EVERY_SECONDS)
        listener.join()
        reader.join()
    if process.returncode:
        sys.stderr.write(f"highest before it ended: {peaks.bytes}\n")
        raise subprocess.CalledProcessError(process.returncode, command)
    return json.loads(result[0]) if result[0].strip() else {}, peaks.bytes


def _anonymous(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        _, resident, of_files, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
        return (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _mapped(pid: int) -> int:
    """Resident pages of mapped files that hold no weights."""
    found, counts = 0, False
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                path = line.split(maxsplit=5)[5:]
                counts = bool(path) and path[0].startswith("/") and not path[0].endswith(WEIGHTS)
            elif counts and line.startswith("Rss:"):
                found += int(line.split()[1]) * 1024
            elif counts and line.startswith("Anonymous:"):
                found -= int(line.split()[1]) * 1024
    return found
