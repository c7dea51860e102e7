"""What does a plan take on the command line, and where does what it is of go?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group

from edgeft.api import plan_and_train
from edgeft.api.folders import job_folder
from edgeft.cli import next_steps
from edgeft.cli.options import DeviceOption
from edgeft.cli.screen import ColumnsOption, DataOption, JsonOption, Reporter, say, show, stderr, stopping
from edgeft.data.sources import by_role
from edgeft.documents import cache_folder
from edgeft.errors import BadInput
from edgeft.machines.sized import machine_name
from edgeft.settings.job import parse_settings
from edgeft.units import parse_bytes

if TYPE_CHECKING:
    from edgeft.planning.plan import Plan


def plan(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="folder of a Hugging Face checkpoint, or a hub id")
    ] = None,
    named: Annotated[str | None, typer.Option("--model", hidden=True)] = None,
    on: Annotated[
        str | None,
        typer.Option(
            help="the machine that trains: a name from `edgeft show profiles`, or a TOML file; cpu is this one"
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="8GiB",
            help="what the machine has: alone a graphics card of so much, with --on that "
            "machine with so much instead of its own",
        ),
    ] = None,
    device: DeviceOption = None,
    data: DataOption = None,
    valid: Annotated[
        list[str] | None, typer.Option(help="validation data; held out of the training data when absent")
    ] = None,
    test: Annotated[list[str] | None, typer.Option(help="test data, scored before and after every stage")] = None,
    columns: ColumnsOption = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="pin a setting: key=value; see edgeft show settings")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="most that edgeft may hold of it, as in 7GiB; all that is free when absent")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="time limit for all training steps, by the estimate")
    ] = None,
    processes: Annotated[int, typer.Option(help="how many share each step's samples, under torchrun")] = 1,
    verify_here: Annotated[
        bool, typer.Option("--verify", help="measure the plan's own steps here, with random weights")
    ] = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="run the chosen step on tensors without memory, and count their bytes")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="show what else was looked at, and what it costs")] = False,
    out: Annotated[
        Path | None, typer.Option(help="plan file; default build/<model>-<data>-<machine>/plan.json, - writes none")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose how to train inside the machine's memory, and say what it takes.

    Needs no torch, data or weights, except where layers are chosen by what they do on the data (layer_score).
    """
    values = parse_settings(settings or [])
    if max_memory is not None:
        values["max_memory_bytes"] = parse_bytes(max_memory)
    if max_seconds is not None:
        values["max_seconds"] = max_seconds
    if processes != 1:
        values["processes"] = processes
    if device is not None:
        values["device"] = device
    machine = machine_name(on, memory, "cpu")
    sources = by_role(data or [], valid or [], test or [], columns)
    values |= {"model": _model(model, named), "profile": machine, **sources}
    path = out or job_folder(str(values["model"]), sources["data"], machine) / "plan.json"
    written = None if str(path) == "-" else path
    if verify_here and written is None:
        raise BadInput("--verify", "needs the plan as a file", "leave --out - out")
    with stopping("no plan was made"), Reporter(stderr) as progress:
        made = plan_and_train.plan(out=written, simulate=simulate, progress=progress, say=say, **values)
    _say_shortages(made, path)
    from edgeft.reporting.explain import explain_text

    show(as_json, made, Group(made.text(), explain_text(made)) if explain else made.text())
    if written is not None and verify_here:
        trial = plan_and_train.try_plan(written, say)
        from edgeft.reporting.terminal import trial_text

        show(as_json, trial, trial_text(trial))
    if written is not None:
        next_steps.after_plan(made, written)


def _model(model: str | None, named: str | None) -> str:
    """The model as an argument, or as the option that it was. Raises typer.BadParameter (exit 2) for two, or none."""
    if model is not None and named not in (None, model):
        raise typer.BadParameter(f"{model} was given, and --model {named}: name one", param_hint="MODEL")
    if not (found := model or named):
        raise typer.BadParameter("is missing: a folder, or a hub id", param_hint="MODEL")
    return found


def _say_shortages(made: Plan, path: Path) -> None:
    """Warn when the disk of the stages' folder has too little room: of this machine now, so not a part of the plan."""
    from edgeft.memory.disk import shortages

    folder = Path() if str(path) == "-" else path.parent
    for line in shortages(made.stages.disk, folder, cache_folder()):
        say(f"note: {line}")
