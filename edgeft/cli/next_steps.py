"""What can be typed next, and where did what was made go? On stderr: stdout is the result."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.cli.screen import say
from edgeft.units import show_bytes

if TYPE_CHECKING:
    from edgeft.api.results import Merged, MergedForeign
    from edgeft.exporting.bundle import Bundle, Golden
    from edgeft.planning.plan import Plan

EXAMPLE_CHARACTERS = 300  # of a prompt that is typed


def after_init(file: Path, missing: Sequence[str]) -> None:
    """The command that makes what a job file says, or what it still has to say."""
    named = "" if str(file) == "edgeft.toml" else f" --job {shlex.quote(str(file))}"
    if missing:
        _say(f"fill in {' and '.join(missing)}; then: {edgeft()} build{named}")
    else:
        _say(f"next: {edgeft()} build{named}")


def after_data(files: Sequence[str], model: str, roles: Mapping[str, str | None], columns: str | None) -> None:
    """What of a folder scores and tests, and the command that makes a bundle of the data."""
    for role in ("valid", "test"):
        if roles[role]:
            _say(f"{role}: {roles[role]}")
    words = ["build", model, *(word for file in files for word in ("--data", file)), "--on", "cpu"]
    words += ["--columns", columns] if columns else []
    _say(f"next: {edgeft()} {shlex.join(words)}")


def after_plan(plan: Plan, path: Path) -> None:
    """Where the plan is, and the command that carries it out, on which machine."""
    _say(f"plan: {path}")
    if plan.job.data is None:
        _say("to train it, plan with --data FILE: edgeft data shows what of a file trains")
        return
    where = "" if is_here(plan) else f", on {plan.profile.name}"
    if plan.training.processes > 1:
        from edgeft.planning.processes import start

        _say(f"next{where}: {start(plan.training, path, plan.profile.cores)}")
    else:
        _say(f"next{where}: {edgeft()} train {shlex.quote(str(path))}")


def after_refusal(asked: Mapping[str, Any]) -> None:
    """The command that shows, as a page, what does not fit: there is no plan to make one of."""
    words = ["report", "--models", str(asked["model"]), "--on", str(asked.get("profile") or "cpu")]
    words += ["--for", str(asked["device"])] if asked.get("device") else []
    _say(f"as a page, with what it needs: {edgeft()} {shlex.join(words)}")


def after_train(folder: Path) -> None:
    """Where the training is, and the command that merges it."""
    _say(f"training: {folder}")
    _say(f"next: {edgeft()} merge {shlex.quote(str(folder))}")


def after_merge(merged: Merged | MergedForeign) -> None:
    """Where the checkpoint is, and the command that exports it, where there is data to prove it with."""
    from edgeft.api.results import Merged

    _say(f"merged: {merged.folder}")
    if isinstance(merged, Merged):
        _say(f"next: {edgeft()} export {shlex.quote(str(merged.folder))}")


def after_export(bundle: Bundle, folder: Path, *, learnt: bool = True) -> None:
    """Where the bundle is, how it is run, with a prompt of the data it was trained on, and what the device needs."""
    device = bundle.provenance.get("device") or "the device"
    to_do = f"copy this folder to {device}" if learnt else "it answers as what was trained, which learnt nothing: above"
    _say(f"bundle: {folder} ({show_bytes(bundle.size_bytes)}): {to_do}")
    runner = shlex.quote(str(folder / "run.py"))
    if bundle.adapters:
        name, adapter = next(iter(bundle.adapters.items()))
        _say(f"run it: {python()} {runner} {shlex.quote(example(adapter.golden))} --adapter {shlex.quote(name)}")
    else:
        _say(f"run it: {python()} {runner} {shlex.quote(example(bundle.golden))}")


def example(golden: Iterable[Golden]) -> str:
    """The shortest prompt that a bundle's answers were recorded for, as a user would type it."""
    from edgeft.exporting.bundle import first_said

    said = [first_said(each) for each in golden if each.plain or each.messages]
    texts = [text for text in said if isinstance(text, str) and text.strip() and not text.startswith("-")]
    return min((text for text in texts if len(text) <= EXAMPLE_CHARACTERS), key=len, default="a prompt")


def edgeft() -> str:
    """The words that start this very edgeft in a shell here."""
    script = Path(sys.executable).with_name("edgeft.exe" if os.name == "nt" else "edgeft")
    if script.is_file():
        found = shutil.which("edgeft")  # or a link to it
        return "edgeft" if found is not None and Path(found).resolve() == script.resolve() else _typed(script)
    return f"{python()} -m edgeft"


def python() -> str:
    """The word that starts this very Python in a shell here."""
    here = Path(sys.executable)
    return next((name for name in ("python", "python3") if _is_found(name, here)), None) or _typed(here)


def _is_found(name: str, program: Path) -> bool:
    """Whether a shell takes the program for this name. Of an environment the place counts, not what it links to."""
    found = shutil.which(name)
    return found is not None and Path(found).absolute() == program.absolute()


def _typed(program: Path) -> str:
    """A program's path as it is typed from the current folder."""
    here = Path.cwd()
    path = program.absolute()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def is_here(plan: Plan) -> bool:
    """Whether the plan's device may be in this machine, without a look by PyTorch."""
    if plan.profile.device == "mps":
        return sys.platform == "darwin"
    if plan.profile.device == "cuda":
        from edgeft.machines.limits import visible_gpu

        return visible_gpu() is not None
    return True


def _say(line: str) -> None:
    """A line, unless what follows is known: `edgeft build` and make go on by themselves."""
    if os.environ.get("EDGEFT_NEXT") != "0":
        say(line)
