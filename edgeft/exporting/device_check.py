"""Does a bundle answer on a device's processor, emulated, as it did at export and as it does here?

The golden vectors were recorded at export: they are the check. Rows of data are answered here first; the device follows
those answers token by token, so that every token is compared with the same tokens before it. Kernels for activations of
8 bits differ between instruction sets: a token may be another one where its best two logits lay within twice the
bundle's tolerance of each other, the rule of golden vectors, and nowhere else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from pydantic import Field

from edgeft.data.dataset import read_samples
from edgeft.data.samples import Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.documents import Artifact, Strict, invalid, sha256_file, versions
from edgeft.errors import BadInput, EdgeftError, ParityFailed, of_exit_code
from edgeft.exporting import emulation
from edgeft.exporting.bundle import MANIFEST
from edgeft.exporting.emulation import Machine
from edgeft.machines import processes
from edgeft.machines.environment import environment
from edgeft.machines.profile import Emulation, Profile
from edgeft.machines.runner import runner_module
from edgeft.models.identity import DATA
from edgeft.models.intervals import share
from edgeft.models.metrics import Difference
from edgeft.progress import Say, quiet
from edgeft.targets.runtimes import RUNTIMES
from edgeft.units import show_bytes, show_seconds

ROWS, ANSWER_TOKENS = 32, 32
TIMEOUT_SECONDS = 900.0
SCRIPT = Path(__file__).with_name("device_script.py")
Result = dict[str, Any]  # what device_script.py wrote


class Target(pydantic.BaseModel):
    runtime: str


class Predicted(pydantic.BaseModel):
    memory_bytes: int


class Manifest(pydantic.BaseModel):
    """What is needed of a bundle.json, also of one that another version of edgeft wrote."""

    target: Target
    task: str = "text-generation"
    context_tokens: int
    golden_logit_tolerance: float
    provenance: dict[str, str]
    predicted: Predicted

    @classmethod
    def of(cls, bundle: Path) -> Manifest:
        """Raises BadInput if there is none, or not what run.py reads; ParityFailed if no export writes that."""
        runner = runner_module()
        try:
            return cls.model_validate(runner.read_manifest(bundle))
        except runner.RunError as problem:
            raise of_exit_code(problem.exit_code, problem.where, problem.problem, problem.hint) from None
        except pydantic.ValidationError as problem:
            raise invalid(bundle / MANIFEST, problem, cls) from None


class OtherToken(Strict):
    """A token that the device chooses otherwise, after the same tokens."""

    row: int = Field(description="number of the row in the data, from 1")
    token: int = Field(description="number of the token in the answer, from 0")
    here: int
    there: int
    margin_here: float = Field(description="between this machine's best two logits")
    margin_there: float
    binding: bool = Field(description="the margin here is more than twice the bundle's tolerance: a fault")


class Rows(Strict):
    """The device's choices along this machine's answers."""

    source: str = Field(description="file name of the data")
    source_sha256: str
    rows: int
    tokens: int
    close_tokens: int = Field(description="those whose margin here is within twice the bundle's tolerance")
    others: tuple[OtherToken, ...]
    other_answers: Difference = Field(description="share of the rows with such a token, with its 95% interval")
    logit_difference: float = Field(description="the largest, of the tokens that were best here")


class Memory(Strict):
    """Largest resident size of the process that replayed the vectors and followed the rows."""

    emulated_bytes: int = Field(description="QEMU and the program in it")
    emulator_bytes: int = Field(description="QEMU's own at the end: program, translated code")
    here_bytes: int = Field(description="the same program without emulation, on this machine")
    predicted_bytes: int = Field(description="bundle.json's own figure, for a whole context")

    @property
    def program_bytes(self) -> int:
        """The emulated program's own."""
        return self.emulated_bytes - self.emulator_bytes


class DeviceCheck(Artifact):
    """BUNDLE.on-PROFILE.json, beside the bundle. `input_sha256` is the hash of its bundle.json."""

    profile: str
    processor: str = Field(description="as QEMU names it")
    qemu: str
    device_versions: dict[str, str] = Field(description="Python and packages there")
    problems: tuple[str, ...] = Field(description="by which it is not what was exported; none: it is")
    notes: tuple[str, ...]
    rows: Rows | None = Field(None, description="None: no rows were given or found, or the vectors failed")
    memory: Memory
    seconds_here: float
    seconds_emulated: float
    environment: dict[str, Any]

    def text(self) -> str:
        """Lines for a person."""
        state = "not what was exported" if self.problems else "every file and golden vector is as exported"
        lines = [f"on {self.profile} ({self.processor}, emulated by {self.qemu.partition(' (')[0]}): {state}"]
        lines += [*self.problems, *_rows_lines(self.rows), *_memory_lines(self.memory)]
        lines.append(f"took {show_seconds(self.seconds_emulated)} emulated, {show_seconds(self.seconds_here)} here")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _rows_lines(rows: Rows | None) -> list[str]:
    if rows is None:
        return []
    share, other = rows.other_answers, len(rows.others)
    within = f"{rows.close_tokens} lie within the margin"
    lines = [
        f"{rows.source}: {other} of {rows.tokens} tokens are other ones than here ({within}), in "
        f"{share.difference:.1%} of {rows.rows} answers, 95% interval {share.low:.1%} to {share.high:.1%}; "
        f"logits differ by at most {rows.logit_difference:.3g}"
    ]
    return lines + [
        f"  row {each.row}, token {each.token}: {each.there} instead of {each.here}; the best two were "
        f"{each.margin_here:.3g} apart here, {each.margin_there:.3g} there"
        for each in rows.others
    ]


def _memory_lines(memory: Memory) -> list[str]:
    own = f"{show_bytes(memory.emulated_bytes)} with {show_bytes(memory.emulator_bytes)} of the emulator's own"
    return [
        f"peak memory {show_bytes(memory.program_bytes)} ({own}); here {show_bytes(memory.here_bytes)}, "
        f"predicted for a whole context {show_bytes(memory.predicted_bytes)}"
    ]


@dataclass(frozen=True)
class Asked:
    """Rows of a data file, as token ids of their prompts."""

    path: Path
    numbers: tuple[int, ...]
    prompts: tuple[list[int], ...]


def result_path(bundle: Path, profile: str) -> Path:
    """Where the result lies: beside the bundle, which it is no part of."""
    return bundle.with_name(f"{bundle.name}.on-{profile}.json")


def verify_on(
    bundle: Path, on: str, *, data: Path | None = None, rows: int = ROWS, timeout: float = TIMEOUT_SECONDS,
    trusted: bytes | None = None, say: Say = quiet,
) -> DeviceCheck:  # fmt: skip
    """Run a bundle under emulation of a profile's processor, and compare; writes the result beside it.

    Raises BadInput for a profile, bundle or data that cannot be used, MissingExtra where no machine is set up,
    ParityFailed where the program crashes there, EdgeftError after `timeout` seconds. Whether the bundle is as
    exported is in `problems`.
    """
    profile, processor = emulation.emulated(on)
    bundle = bundle.resolve()
    manifest = Manifest.of(bundle)
    made = emulation.find_machine(manifest.target.runtime)
    if not os.access(bundle.parent, os.W_OK):
        raise BadInput(bundle.parent, "cannot be written, and the result lies there", "copy the bundle elsewhere")
    asked, notes = find_rows(bundle, manifest, data, rows)
    with tempfile.TemporaryDirectory(prefix="edgeft-device-") as place:
        request = request_for(bundle, trusted, asked)
        say("answering here")
        here = run_here(request, Path(place), timeout)
        say(f"following on {profile.name}, emulated")
        request["rows"] = following(here)
        start = time.monotonic()
        there = run_there(request, Path(place), (made, profile, processor), timeout)
        seconds = time.monotonic() - start
    result = judged(manifest, profile, processor, made, asked, here, there, notes, seconds)
    result = result.model_copy(update={"input_sha256": sha256_file(bundle / MANIFEST)})
    result.write(result_path(bundle, profile.name))
    return result


def refuse(result: DeviceCheck, bundle: Path) -> None:
    """Nothing. Raises ParityFailed (exit 4) if the bundle is not as exported there."""
    if result.problems:
        problem = f"not what was exported, on {result.profile}\n" + "\n".join(result.problems)
        raise ParityFailed(bundle, problem, f"see {result_path(bundle, result.profile)}; edgeft verify checks it here")


def find_rows(bundle: Path, manifest: Manifest, data: Path | None, most: int) -> tuple[Asked | None, list[str]]:
    """(rows evenly spread over the data, what is to be said). Without data, the test rows of the plan beside it."""
    if manifest.task != "text-generation":
        return None, [f"golden vectors alone: a model for {manifest.task} writes no text"]
    if data is not None and not data.is_file():
        raise BadInput(data, "no such file", "give a data file as for training")
    path = data or recorded_test_data(bundle, manifest)
    if path is None:
        return None, ["golden vectors alone: the test rows of the plan are not found here; name rows with --test FILE"]
    if runner_module().check_files(bundle):
        return None, [f"{path.name}: not read, the bundle's tokenizer may be among the files that are not as exported"]
    samples = read_samples(str(path), TextTokenizer(bundle), manifest.context_tokens - 1)
    chosen = spread([n for n, sample in enumerate(samples) if len(sample) > 1], most)
    if not chosen:
        return None, [f"{path.name}: no row is asked"]
    return Asked(path, tuple(n + 1 for n in chosen), tuple(prompt_of(samples[n]) for n in chosen)), []


def prompt_of(sample: Sample) -> list[int]:
    """What a device is asked with: a row's prompt, or the first half of a text."""
    return sample.prompt if sample.has_prompt else sample.ids[: max(1, len(sample) // 2)]


def spread(numbers: Sequence[int], most: int) -> list[int]:
    """At most so many of them, evenly spaced."""
    count = min(most, len(numbers))
    return [numbers[i * len(numbers) // count] for i in range(count)]


def recorded_test_data(bundle: Path, manifest: Manifest) -> Path | None:
    """The test data that the bundle's plan names, if both are still what the bundle was made from."""
    plan = bundle.parent / "plan.json"
    if not plan.is_file() or sha256_file(plan) != manifest.provenance.get("plan.json"):
        return None
    test = json.loads(plan.read_text(encoding="utf-8"))["job"].get("test")
    path = Path(test) if test else None
    same = path is not None and path.is_file() and sha256_file(path) == manifest.provenance.get(DATA[2])
    return path if same else None


def request_for(bundle: Path, trusted: bytes | None, asked: Asked | None) -> dict[str, Any]:
    """What device_script.py is asked on this machine."""
    rows = [{"ids": ids} for ids in asked.prompts] if asked else []
    return {
        "runner": str(Path(str(runner_module().__file__)).resolve()), "bundle": str(bundle), "rows": rows,
        "trusted": trusted.hex() if trusted else "", "answer_tokens": ANSWER_TOKENS,
    }  # fmt: skip


def following(here: Result) -> list[dict[str, Any]]:
    """The rows for the device: this machine's answers, and which logits to compare."""
    return [
        {"ids": row["ids"], "tokens": row["tokens"], "asked": [step["asked"] for step in row["steps"]]}
        for row in here["rows"]
    ]


def run_here(request: dict[str, Any], folder: Path, timeout: float) -> Result:
    """The script's result on this machine, in a process of its own."""
    files = _written(request, folder, "here")
    command = [sys.executable, "-P", str(SCRIPT), *map(str, files)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise _too_slow("this machine", timeout) from None
    return _read(done, files[1], "this machine")


def run_there(
    request: dict[str, Any], folder: Path, where: tuple[Machine, Profile, Emulation], timeout: float
) -> Result:
    """The script's result under emulation."""
    made, profile, processor = where
    files = _written(request, folder, "there")
    try:
        done = emulation.run(made, profile, processor, [SCRIPT, *files], timeout=timeout)
    except subprocess.TimeoutExpired:
        raise _too_slow(f"{profile.name}, emulated", timeout) from None
    return _read(done, files[1], f"{profile.name}, emulated")


def _written(request: dict[str, Any], folder: Path, name: str) -> tuple[Path, Path]:
    asked, answer = folder / f"{name}.request.json", folder / f"{name}.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    return asked, answer


def _too_slow(where: str, timeout: float) -> EdgeftError:
    hint = "give it longer with --timeout SECONDS, or fewer rows with --rows"
    return EdgeftError(where, f"was not done with the bundle after {show_seconds(timeout)}", hint)


def _read(done: subprocess.CompletedProcess[str], path: Path, where: str) -> Result:
    if done.returncode or not path.is_file():
        problem = f"the bundle's program failed: {processes.reason(done.returncode, done.stderr, lines=3)}"
        raise ParityFailed(where, problem, "edgeft verify BUNDLE checks its files and runs it here")
    found: Result = json.loads(path.read_text(encoding="utf-8"))
    return found


def judged(
    manifest: Manifest, profile: Profile, processor: Emulation, made: Machine, asked: Asked | None, here: Result,
    there: Result, notes: Sequence[str], seconds: float,
) -> DeviceCheck:  # fmt: skip
    """The result, from what the script wrote on both sides."""
    rows = compared(asked, here, there, 2 * manifest.golden_logit_tolerance)
    setup = made.setup
    device = {"python": setup.python} | {name: setup.wheels[name] for name in setup.wheels if name in RUN_BY}
    problems = [*there["problems"], *(_binding(rows) if rows else [])]
    return DeviceCheck(
        versions=versions(), profile=profile.name, processor=processor.cpu, qemu=setup.qemu, device_versions=device,
        problems=tuple(problems), notes=(*notes, *there["notes"], *_only_here(here, there)), rows=rows,
        memory=Memory(
            emulated_bytes=there["peak_memory_bytes"], emulator_bytes=there["emulator_bytes"],
            here_bytes=here["peak_memory_bytes"], predicted_bytes=manifest.predicted.memory_bytes,
        ),
        seconds_here=here["seconds"], seconds_emulated=seconds, environment=environment(),
    )  # fmt: skip


RUN_BY = {package for runtime in RUNTIMES.values() for package in runtime.packages} | {"tokenizers", "numpy"}


def _only_here(here: Result, there: Result) -> list[str]:
    """What fails on this machine and not on the device: of the golden vectors, since the files are the same."""
    return [f"on this machine: {line}" for line in here["problems"] if line not in there["problems"]]


def compared(asked: Asked | None, here: Result, there: Result, binding: float) -> Rows | None:
    """Every token of the answers on both sides; a difference counts where the margin here is more than `binding`."""
    if asked is None or not here["rows"] or not there["rows"]:
        return None
    others, margins, largest = list[OtherToken](), list[float](), 0.0
    for number, ours, theirs in zip(asked.numbers, here["rows"], there["rows"], strict=True):
        for at, (a, b) in enumerate(zip(ours["steps"], theirs["steps"], strict=True)):
            margins.append(a["margin"])
            largest = max(largest, *(abs(x - y) for x, y in zip(a["logits"], b["logits"], strict=True)))
            if a["token"] != b["token"]:
                others.append(_other(number, at, a, b, binding))
    rows = len(here["rows"])
    return Rows(
        source=asked.path.name, source_sha256=sha256_file(asked.path), rows=rows, tokens=len(margins),
        close_tokens=sum(margin <= binding for margin in margins), others=tuple(others),
        other_answers=Difference(**share(len({other.row for other in others}), rows)._asdict()),
        logit_difference=largest,
    )  # fmt: skip


def _other(row: int, at: int, here: Mapping[str, Any], there: Mapping[str, Any], binding: float) -> OtherToken:
    return OtherToken(
        row=row, token=at, here=here["token"], there=there["token"], margin_here=here["margin"],
        margin_there=there["margin"], binding=not here["margin"] <= binding,
    )  # fmt: skip


def _binding(rows: Rows) -> list[str]:
    return [
        f"{rows.source}: row {each.row} answers {each.there} instead of {each.here} at token {each.token}, where the "
        f"best two were {each.margin_here:.3g} apart"
        for each in rows.others
        if each.binding
    ]
