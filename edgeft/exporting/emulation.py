"""How does a program of another processor run here: QEMU, a small Debian for aarch64, and the runtimes' own wheels?

`set_up` fetches them once, through this machine's own apt and pip, into a folder of the cache. No root is needed and
nothing of this machine is changed: packages are unpacked, not installed. `run` starts that Debian's Python under QEMU's
user-mode emulation of the processor that a profile names. What lies at the same path in the Debian, or among the
profile's files, takes the place of this machine's; everything else (a bundle, a temporary folder) is this machine's.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeft.documents import Artifact, cache_folder, sha256_json, staging
from edgeft.errors import BadInput, EdgeftError, MissingExtra
from edgeft.machines import processes
from edgeft.machines.profile import Emulation, Profile, list_profiles, load_profile
from edgeft.progress import Say
from edgeft.targets.runtimes import RUNTIMES

FORMAT = 1  # of the folder: counted up when what lies in it changes
DEBIAN = ("python3", "libstdc++6")  # onnxruntime asks for the second
QEMU, QEMU_PACKAGE = "qemu-aarch64-static", "qemu-user-static"
FIRST_GLIBC = 17  # the oldest that wheels for aarch64 are built for is 2.17
SET_UP = "run `make arm64` once (`edgeft arm64`): it fetches about 200 MB and takes a minute"
KEPT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")  # of this machine's environment


class Setup(Artifact):
    """setup.json, the last file that `set_up` writes."""

    qemu: str
    python: str
    debian: dict[str, str]
    wheels: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class Machine:
    """A folder that `set_up` made."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def site(self) -> Path:
        return self.folder / "site"

    @property
    def qemu(self) -> Path:
        return self.folder / QEMU

    @property
    def python(self) -> Path:
        """The Debian's interpreter, by the name with its version."""
        found = sorted(path for path in (self.root / "usr/bin").glob("python3.*") if path.name[8:].isdigit())
        if not found:
            raise EdgeftError(self.root, "holds no Python", "remove the folder above it and run `make arm64` again")
        return found[-1]

    @property
    def ready(self) -> bool:
        """Whether `set_up` came to its end here."""
        return (self.folder / "setup.json").is_file()

    @property
    def setup(self) -> Setup:
        return Setup.read(self.folder / "setup.json")


def wanted_wheels() -> dict[str, str]:
    """Packages that bundles need on the device, in the versions that this machine has."""
    rows = [runtime for runtime in RUNTIMES.values() if runtime.arm64_wheels]
    names = sorted({name for runtime in rows for name in (*runtime.needed, *runtime.packages)})
    held = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            held[name] = importlib.metadata.version(name)
    return held


def machine() -> Machine:
    """Where the machine for this edgeft's runtimes lies, or will: another version of one is another folder."""
    return Machine(cache_folder() / f"arm64-{sha256_json([FORMAT, wanted_wheels()])[:12]}")


def find_machine(runtime: str) -> Machine:
    """The machine, for bundles of this runtime. Raises MissingExtra (exit 5) where it is not set up; BadInput."""
    row = RUNTIMES.get(runtime)
    if row is None or not row.arm64_wheels:
        package = row.needed[0] if row else runtime
        raise BadInput("--for", f"{package} has no wheel for aarch64, {runtime!r} bundles cannot run there emulated",
                       "verify an ort- or onnx-portable- bundle, or this one on the device itself")  # fmt: skip
    found = machine()
    if not found.ready:
        raise MissingExtra("--for", "no emulated aarch64 machine is set up for the runtimes installed here", SET_UP)
    return found


def emulated(name_or_path: str) -> tuple[Profile, Emulation]:
    """A profile and its emulated processor. Raises BadInput if it names none."""
    profile = load_profile(name_or_path)
    if profile.emulation is None:
        others = ", ".join(each.name for each in list_profiles() if each.emulation)
        raise BadInput("--for", f"profile {profile.name} names no processor to emulate", f"these do: {others}")
    return profile, profile.emulation


def set_up(say: Say) -> Machine:
    """Fetch and unpack what is needed, unless it is there, and let it import each runtime once.

    Raises MissingExtra where a tool of Debian's is missing, EdgeftError naming what could not be had.
    """
    found, start = machine(), time.monotonic()
    if found.ready:
        return found
    with staging(found.folder) as folder:
        made = Machine(folder)
        say("fetching Debian's packages for arm64, and QEMU")
        packages = fetch_debian(folder / "apt")
        say("unpacking")
        unpack(packages, made)
        say("fetching the runtimes' wheels")
        install_wheels(made, glibc_of(packages))
        shutil.rmtree(folder / "apt")
        say("starting each runtime once")
        python = try_out(made)
        Setup(
            qemu=_done([str(made.qemu), "--version"], "QEMU").splitlines()[0], python=python,
            debian=dict(map(_name_and_version, packages)), wheels=installed(made.site),
            seconds=time.monotonic() - start,
        ).write(folder / "setup.json")  # fmt: skip
    return found


def fetch_debian(folder: Path) -> list[Path]:
    """The .deb files of DEBIAN with all that they need, for arm64, and QEMU's for this machine.

    By this machine's sources and keys, with lists and caches of its own in `folder`.
    """
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()  # nothing is installed there
    here = _done(["dpkg", "--print-architecture"], "dpkg").strip()
    settings = {
        "Dir::State": folder, "Dir::State::lists": folder / "lists", "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache", "APT::Architecture": "arm64", "APT::Architectures": f"arm64,{here}",
        "APT::Sandbox::User": "root", "Acquire::Languages": "none", "Debug::NoLocking": "1",
        "APT::Update::Error-Mode": "any",
    }  # fmt: skip
    apt = ["apt-get", "-q", "-y", *(part for key, value in settings.items() for part in ("-o", f"{key}={value}"))]
    names = [*(f"{name}:arm64" for name in DEBIAN), f"{QEMU_PACKAGE}:{here}"]
    _done([*apt, "update"], "apt-get update")
    _done([*apt, "--no-install-recommends", "--download-only", "install", *names], "apt-get")
    return sorted((folder / "cache/archives").glob("*.deb"))


def unpack(packages: Sequence[Path], made: Machine) -> None:
    """QEMU's program, and every other package into the root."""
    made.root.mkdir()
    for path in packages:
        if path.name.startswith(f"{QEMU_PACKAGE}_"):
            _take_program(path, QEMU, made.qemu)
        else:
            _done(["dpkg-deb", "--extract", str(path), str(made.root)], path.name)
    for name in ("bin", "lib"):  # where all lies below /usr these are links that another package brings
        if not (made.root / name).exists():
            (made.root / name).symlink_to(f"usr/{name}")


def _take_program(package: Path, name: str, out: Path) -> None:
    """One program of a package that holds hundreds of megabytes of others."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as reading:
        with tarfile.open(fileobj=reading.stdout, mode="r|") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() and member.name.endswith(f"/{name}") else None
                if content is not None:
                    out.write_bytes(content.read())
                    out.chmod(0o755)
                    break
        reading.kill()
    if not out.is_file():
        raise EdgeftError(package.name, f"holds no {name}", "report this with the version of Debian here")


def glibc_of(packages: Iterable[Path]) -> int:
    """N of glibc 2.N among the packages: which wheels can run."""
    version = dict(map(_name_and_version, packages)).get("libc6", "")
    found = re.match(r"2\.(\d+)", version)
    if found is None:
        raise EdgeftError(
            "libc6", f"has no version 2.N, got {version!r}", "report this with the version of Debian here"
        )
    return int(found[1])


def platforms(glibc: int) -> list[str]:
    """The names of wheels' platforms that a system with glibc 2.N runs, the newest first."""
    return [*(f"manylinux_2_{n}_aarch64" for n in range(glibc, FIRST_GLIBC - 1, -1)), "manylinux2014_aarch64"]


def install_wheels(made: Machine, glibc: int) -> None:
    """The runtimes and what they need, in the versions that this machine has, into the site folder."""
    pins = made.folder / "apt" / "pins.txt"
    held = {each.name: each.version for each in importlib.metadata.distributions() if each.name}
    pins.write_text("".join(f"{name}=={version}\n" for name, version in sorted(held.items()) if "+" not in version))
    wanted = [part for name in platforms(glibc) for part in ("--platform", name)]
    python = made.python.name.removeprefix("python")
    _done(
        [sys.executable, "-P", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input",
         "--target", str(made.site), "--implementation", "cp", "--python-version", python, *wanted,
         "--only-binary=:all:", "--constraint", str(pins),
         *(f"{name}=={version}" for name, version in wanted_wheels().items())],
        "pip",
    )  # fmt: skip


def try_out(made: Machine) -> str:
    """The Python's version, after each runtime was imported on each shipped processor; compiled files are kept."""
    modules = [name.replace("-", "_") for name in wanted_wheels()]
    code = f"import platform, {', '.join(modules)}; print(platform.python_version())"
    version = ""
    for profile in list_profiles():
        if profile.emulation:
            done = run(made, profile, profile.emulation, ["-c", code], timeout=600, keep_compiled=True)
            if done.returncode:
                raise EdgeftError(profile.name, f"the runtimes do not start under emulation: {said(done)}",
                                  "report this with the versions of Debian and of the runtimes")  # fmt: skip
            version = done.stdout.strip()
    return version


def installed(site: Path) -> dict[str, str]:
    """Packages in a site folder with their versions."""
    return {each.name: each.version for each in importlib.metadata.distributions(path=[str(site)])}


@contextlib.contextmanager
def prefix(made: Machine, emulation: Emulation, cores: int) -> Iterator[Path]:
    """A folder that looks like the device's root: the Debian's folders as links, and the kernel's files."""
    with tempfile.TemporaryDirectory(prefix="edgeft-arm64-") as place:
        folder = Path(place) / "root"
        folder.mkdir()
        for entry in made.root.iterdir():
            (folder / entry.name).symlink_to(entry.resolve())
        for name, text in emulation.contents(cores).items():
            path = folder / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        yield folder


def run(
    made: Machine, profile: Profile, emulation: Emulation, arguments: Sequence[object], *, timeout: float,
    keep_compiled: bool = False,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run the Debian's Python under emulation to its end. Raises subprocess.TimeoutExpired after `timeout` seconds."""
    with prefix(made, emulation, profile.cores) as folder:
        command = [made.qemu, "-L", folder, "-cpu", emulation.cpu, made.python, *arguments]
        given = {name: os.environ[name] for name in KEPT if name in os.environ}
        return subprocess.run(
            list(map(str, command)), cwd=folder.parent, env=variables(made, folder.parent, keep_compiled) | given,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout, check=False,
        )  # fmt: skip


def variables(made: Machine, home: Path, keep_compiled: bool) -> dict[str, str]:
    """The whole environment of an emulated program: nothing of this machine's own libraries or settings."""
    compiled = {} if keep_compiled else {"PYTHONDONTWRITEBYTECODE": "1"}
    return {"PATH": "/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8", "PYTHONPATH": str(made.site)} | compiled


def said(done: subprocess.CompletedProcess[str]) -> str:
    """Why an emulated program failed. QEMU ends as the program does, by the same signal."""
    return processes.reason(done.returncode, done.stderr, lines=3)


def _name_and_version(package: Path) -> tuple[str, str]:
    """("libc6", "2.36-9") of libc6_2.36-9_arm64.deb; apt writes an epoch's colon as %3a."""
    name, version, _ = package.stem.split("_")
    return name, version.replace("%3a", ":")


def _done(command: Sequence[str], what: str) -> str:
    """A command's output. Raises MissingExtra if there is no such program, EdgeftError with its last words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        hint = "make arm64 needs Debian's apt-get and dpkg: run it on a Debian, or in a container of one"
        raise MissingExtra(what, f"there is no {command[0]} here", hint) from None
    if done.returncode:
        problem = processes.reason(done.returncode, done.stderr or done.stdout, lines=5)
        raise EdgeftError(what, problem, "make arm64 fetches from Debian and PyPI: see that apt and pip reach them")
    return done.stdout
