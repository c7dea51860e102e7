"""Which words mean the same in every verb: `--on`, the machine that trains; `--for`, the device that runs it?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeft.cli.screen import say

if TYPE_CHECKING:
    from edgeft.api.job_file import JobFile

# groups of --help
MACHINE, DATA, TRAINING = "Machine and device", "Data", "How it trains, and what is exported"

ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="folder of a Hugging Face checkpoint, or a hub id")
]
ModelOption = Annotated[str | None, typer.Option("--model", hidden=True)]
OnOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MACHINE,
        help="the machine that trains: a name from `edgeft show profiles`, or a TOML file; cpu: this one",
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(rich_help_panel=MACHINE, metavar="8GiB", help="what the machine has: alone a graphics card of so "
                 "much, with --on that machine with so much"),
]  # fmt: skip
DeviceOption = Annotated[
    str | None,
    typer.Option("--for", rich_help_panel=MACHINE, metavar="DEVICE", help="the device that runs the result: a "
                 "profile's name, or a TOML file"),
]  # fmt: skip

ValidOption = Annotated[
    list[str] | None,
    typer.Option(rich_help_panel=DATA, help="validation data; held out of the training data when absent"),
]
TestOption = Annotated[
    list[str] | None, typer.Option(rich_help_panel=DATA, help="test data, scored before and after every stage")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", rich_help_panel=TRAINING, help="pin a setting: key=value; see edgeft show settings"),
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MACHINE, help="most that edgeft may hold of it, as in 7GiB; all that is free when absent"
    ),
]
MaxSecondsOption = Annotated[
    float | None, typer.Option(rich_help_panel=MACHINE, help="time limit for all training steps, by the estimate")
]
StrictOption = Annotated[
    bool,
    typer.Option(
        "--strict",
        rich_help_panel=MACHINE,
        help="exit 3 also where a later stage needs another machine, the device may be too small by the high estimate, "
        "or the bundle cannot be built",
    ),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=TRAINING,
        help="what is exported: a name in export/, a TOML file, or auto: the smallest that keeps the fine-tune",
    ),
]
TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=TRAINING,
        help="tell each step to a tracker: tensorboard, trackio, wandb, mlflow ... (docs/train.md)",
    ),
]
JobOption = Annotated[
    Path | None, typer.Option("--job", help="job file; edgeft.toml of this folder when absent, - reads none")
]

# What options were called up to 0.2, by the verb. `--device` was three things: the PyTorch device in train, a board in
# export and adapters; in verify `--on` was the board.
OLD_OPTIONS = {
    "plan": {"profile": "on"},
    "train": {"device": "on"},
    "export": {"device": "for"},
    "adapters": {"device": "for"},
    "verify": {"on": "for"},
    "report": {"profiles": "on"},
}


def settings_of(verb: str) -> dict[str, Any]:
    """What click is told of a verb: its options go by their old names too."""
    old = OLD_OPTIONS.get(verb, {})
    return {"token_normalize_func": lambda name: old.get(name, name)} if old else {}


def asked_for(job: Path | None, typed: JobFile) -> tuple[JobFile, Path | None]:
    """What job file and command line ask for together, and the file that was read. Says what the file says in vain.

    Raises typer.BadParameter (exit 2) where neither names a model, BadInput for a file that cannot be used.
    """
    from edgeft.api.job_file import find_job_file, over, read_job_file

    path, asked, lines = find_job_file(job), typed, list[str]()
    if path is not None:
        asked, lines = over(read_job_file(path), typed)
        say(f"job: {path}")
    if asked.model is None:
        raise typer.BadParameter("is missing: a folder, or a hub id; or a job file (edgeft init)", param_hint="MODEL")
    for line in lines:
        say(f"{path}: {line}")
    return asked, path


def typed_job(model: str | None, named: str | None, settings: list[str] | None, **options: Any) -> JobFile:
    """What a command line asks for; the model is an argument, or the option that it was.

    Raises typer.BadParameter (exit 2) for two models, BadInput for a value that does not fit.
    """
    import pydantic

    from edgeft.api.job_file import JobFile
    from edgeft.documents import TOML, invalid, is_yaml
    from edgeft.errors import BadInput
    from edgeft.settings.job import parse_settings

    if model is not None and named not in (None, model):
        raise typer.BadParameter(f"{model} was given, and --model {named}: name one", param_hint="MODEL")
    if is_yaml(model or named or ""):
        raise BadInput(model or named, "is YAML, no model", TOML)
    given = {name: value for name, value in options.items() if value is not None}
    pinned = parse_settings(settings or []) | given.pop("settings_too", {})
    try:
        return JobFile(model=model or named, settings=pinned, **given)
    except pydantic.ValidationError as problem:
        raise invalid("command line", problem, JobFile) from None
