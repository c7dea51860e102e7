"""How is a job made from its plan to a proven bundle by one command, and where does its file come from?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgeft.api.job_file import NAME, job_values, results_folder, write_job_file
from edgeft.cli import next_steps
from edgeft.cli.options import (
    DeviceOption,
    JobOption,
    MaxMemoryOption,
    MaxSecondsOption,
    MemoryOption,
    ModelArgument,
    OnOption,
    SetOption,
    TargetOption,
    TestOption,
    TrackOption,
    ValidOption,
    asked_for,
    typed_job,
)
from edgeft.cli.planning import make_and_say
from edgeft.cli.screen import ColumnsOption, DataOption, JsonOption, say, show, stdout
from edgeft.errors import BadInput
from edgeft.machines import processes
from edgeft.machines.extras import need


def init(
    model: ModelArgument = None,
    on: OnOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = None,
    data: DataOption = None,
    target: TargetOption = None,
    settings: SetOption = None,
    file: Annotated[Path, typer.Option(help="the file to write; one that exists is not replaced")] = NAME,
) -> None:
    """Write a job file that explains every key, with what is given filled in: edgeft build makes what it says."""
    asked = typed_job(model, None, settings, on=on, memory=memory, device=device, data=data, target=target)
    write_job_file(file, asked)
    stdout.print(str(file), soft_wrap=True, markup=False)
    next_steps.after_init(file, [name for name in ("model", "data") if not getattr(asked, name)])


def build(
    model: ModelArgument = None,
    on: OnOption = None,
    memory: MemoryOption = None,
    device: DeviceOption = None,
    data: DataOption = None,
    valid: ValidOption = None,
    test: TestOption = None,
    columns: ColumnsOption = None,
    target: TargetOption = None,
    settings: SetOption = None,
    max_memory: MaxMemoryOption = None,
    max_seconds: MaxSecondsOption = None,
    wise_alpha: Annotated[
        str | None, typer.Option(help="share of the change that the merge takes: 0 base, 1 fine-tuned")
    ] = None,
    track: TrackOption = None,
    job: JobOption = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the results; default build/<model>-<data>-<machine>")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Plan, train, merge, export and prove: from a model and data to a bundle, by one command.

    What is up to date is not made again; killed at any point, the same command goes on. Exit codes are the stages' own.
    """
    typed = typed_job(
        model, None, settings, on=on, memory=memory, device=device, data=data, valid=valid, test=test, columns=columns,
        target=target, max_memory=max_memory, max_seconds=max_seconds, wise_alpha=wise_alpha,
        track=tuple(track or ()), out=str(out) if out is not None else None,
    )  # fmt: skip
    asked, file = asked_for(job, typed)
    values = job_values(asked)
    if values["data"] is None:
        raise BadInput("build", "there is no training data", "name it with --data FILE, or as data = ... in a job file")
    need("export")  # the last stage's part, and trackers, before the first begins
    from edgeft.training.tracking import check_trackers

    check_trackers(asked.track)
    folder = results_folder(asked, values)
    _plan(values, folder, file, as_json)
    told = [part for name in asked.track for part in ("--track", name)]
    _stage("train", folder / "plan.json", "--out", folder / "train", *told, quiet=as_json)
    _stage(
        "merge", folder / "train", "--wise-alpha", asked.wise_alpha or "1", "--out", folder / "merged", quiet=as_json
    )
    _stage("export", folder / "merged", "--out", folder / "bundle", *(["--json"] if as_json else []), last=True)


# Ctrl-C while a stage imports what it needs ends it as later on
STAGE = "import sys\ntry:\n from edgeft.cli import main\n main()\nexcept KeyboardInterrupt:\n sys.exit(130)"


def _plan(values: dict[str, Any], folder: Path, file: Path | None, as_json: bool) -> None:
    made = make_and_say(values, folder / "plan.json", file)
    if made.training.processes > 1:
        hint = "edgeft plan says how they are started; then edgeft merge and edgeft export"
        raise BadInput("build", f"{made.training.processes} processes train together, under torchrun", hint)
    if not as_json:
        show(False, made, made.text())


def _stage(verb: str, *arguments: object, quiet: bool = False, last: bool = False) -> None:
    """One stage in a process of its own, as planned: its memory is its own. Ends where it fails, with its exit code."""
    code = processes.carry_out(
        STAGE, verb, *arguments, quiet=quiet,
        environment={} if last else {"EDGEFT_NEXT": "0"},
    )  # fmt: skip
    if code:
        say(f"build ended in {verb}: the same command goes on from there")
        raise typer.Exit(code if code > 0 else 128 - code)
