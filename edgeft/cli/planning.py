"""What does a plan take on the command line, and where does what it is of go?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from edgeft.api import plan_and_train
from edgeft.api.job_file import job_values, results_folder
from edgeft.cli import next_steps
from edgeft.cli.options import (
    MACHINE,
    DeviceOption,
    JobOption,
    MaxMemoryOption,
    MaxSecondsOption,
    MemoryOption,
    ModelArgument,
    ModelOption,
    OnOption,
    SetOption,
    StrictOption,
    TargetOption,
    TestOption,
    ValidOption,
    asked_for,
    typed_job,
)
from edgeft.cli.screen import ColumnsOption, DataOption, JsonOption, Reporter, say, show, stderr, stopping
from edgeft.documents import cache_folder
from edgeft.errors import BadInput, DoesNotFit

if TYPE_CHECKING:
    from edgeft.api.results import Plan


def plan(
    model: ModelArgument = None,
    named: ModelOption = None,
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
    job: JobOption = None,
    processes: Annotated[
        int, typer.Option(rich_help_panel=MACHINE, help="how many share each step's samples, under torchrun")
    ] = 1,
    verify_here: Annotated[
        bool, typer.Option("--verify", help="measure the plan's own steps here, with random weights")
    ] = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="run the chosen step on tensors without memory, and count their bytes")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="show what else was looked at, and what it costs")] = False,
    strict: StrictOption = False,
    out: Annotated[
        Path | None, typer.Option(help="plan file; default build/<model>-<data>-<machine>/plan.json, - writes none")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose how to train inside the machine's memory, and say what it takes.

    Needs no torch, data or weights, except where layers are chosen by what they do on the data (layer_score).
    """
    typed = typed_job(
        model, named, settings, on=on, memory=memory, device=device, data=data, valid=valid, test=test,
        columns=columns, target=target, max_memory=max_memory, max_seconds=max_seconds,
        settings_too={"processes": processes} if processes != 1 else None,
    )  # fmt: skip
    asked, file = asked_for(job, typed)
    values = job_values(asked)
    path = out or results_folder(asked, values) / "plan.json"
    written = None if str(path) == "-" else path
    if verify_here and written is None:
        raise BadInput("--verify", "needs the plan as a file", "leave --out - out")
    made = make_and_say(values, written, file, simulate=simulate)
    from edgeft.reporting.explain import explain_text

    show(as_json, made, Group(made.text(), explain_text(made)) if explain else made.text())
    if written is not None and verify_here:
        trial = plan_and_train.try_plan(written, say)
        from edgeft.reporting.terminal import trial_text

        show(as_json, trial, trial_text(trial))
    if strict:
        _refuse_in_part(made)
    if written is not None:
        next_steps.after_plan(made, written)


def _refuse_in_part(made: Plan) -> None:
    """Raises DoesNotFit where training fits and something after it does not: all of that at once."""
    from edgeft.planning.stage_checks import disk_notes
    from edgeft.reporting.words import verdict

    stages = made.stages
    lacking = [*stages.notes(), *disk_notes(made.profile, stages.disk)]
    lacking += [verdict(made)] if stages.cannot_build else []
    if lacking:
        hint = "without --strict a plan is enough whose training fits"
        hint += "; the rest can be done on another machine" if lacking != stages.device_notes() else ""
        raise DoesNotFit("--strict", "\n".join(lacking), hint)


def make_and_say(values: dict[str, Any], out: Path | None, file: Path | None, *, simulate: bool = False) -> Plan:
    """The plan of a job, written to `out`, with its progress and what its folder's disk is short of said on stderr."""
    try:
        with stopping("no plan was made"), Reporter(stderr) as progress:
            made = plan_and_train.plan(out=out, simulate=simulate, job_file=file, progress=progress, say=say, **values)
    except DoesNotFit:
        next_steps.after_refusal(values)
        raise
    if made.job.data is not None and next_steps.is_here(made):  # else it is a question about another machine
        _say_shortages(made, Path() if out is None else out.parent)
    return made


def _say_shortages(made: Plan, folder: Path) -> None:
    """Warn when the disk of the stages' folder has too little room: of this machine now, so not a part of the plan."""
    from edgeft.memory.disk import shortages

    for line in shortages(made.stages.disk, folder, cache_folder()):
        say(f"note: {line}")
