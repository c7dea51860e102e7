"""What can be looked at on the command line? Reports, data files, and what can be named."""

from __future__ import annotations

import enum
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeft.api import reports
from edgeft.cli import next_steps
from edgeft.cli.screen import ColumnsOption, JsonOption, Reporter, say, stderr, stdout
from edgeft.errors import BadInput
from edgeft.settings.job import AUTO, parse_settings

if TYPE_CHECKING:
    from edgeft.machines.profile import Profile


def report(
    plan_file: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="plan.json, or the build folder that holds it")
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="instead of a plan: every model below this folder, or these folders: a,b,c")
    ] = None,
    machines: Annotated[
        str | None, typer.Option("--on", help="for --models: machines that train; all, or names as in t4,l4-24gb")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="DEVICES",
            help="devices that run the result; all, or names as in raspberrypi5-8gb,android-8gb",
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(help="for --models: what is shipped: auto, as in a plan, a name in export/ or a TOML file")
    ] = AUTO,
    settings: Annotated[list[str] | None, typer.Option("--set", help="for --models: pin a setting, key=value")] = None,
    out: Annotated[Path | None, typer.Option(help="HTML page; Markdown and JSON are written beside it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write one page to decide on hardware with: a plan, the run made from it, or many models on many machines."""
    from edgeft.machines.limits import usable_cores
    from edgeft.reporting.matrix import Matrix, find_all, find_devices, make_matrix
    from edgeft.reporting.pages import write_report
    from edgeft.reporting.summary import Summary

    made: Summary | Matrix
    if models is not None and plan_file is not None:
        raise BadInput("report", "a plan and --models were given", "give one of them")
    if models is None and machines is not None:
        raise BadInput("--on", "the machine of a report is its plan's", "give --on to edgeft plan, or --models FOLDER")
    if models is not None:
        found, pinned = find_all(models), [text.partition("=") for text in settings or []]
        shipped_to = find_devices(device) if device is not None else None
        parse_settings(settings or [])  # a misspelt key is an error, not a cell
        with Reporter(stderr) as progress:
            made = make_matrix(
                found,
                _machines(machines or "all"),
                devices=shipped_to,
                device=device if shipped_to is not None and len(shipped_to) == 1 else None,
                target=target,
                settings={key: value for key, _, value in pinned},
                workers=usable_cores(),
                progress=progress,
            )
        path = out or Path("build") / "report" / "matrix.html"
    else:
        source = _plan_of(plan_file)
        made, path = reports.summary(source, device), out or source.parent / "report.html"
    written = write_report(made, path)
    if as_json:
        sys.stdout.write(made.model_dump_json() + "\n")
    else:
        stdout.print("\n".join(map(str, written)), soft_wrap=True, markup=False)


def _plan_of(given: Path | None) -> Path:
    """The plan.json that was named, or that a folder holds. Raises BadInput without any."""
    if given is None:
        raise BadInput("report", "no plan given", "name a plan.json, or a folder of models with --models")
    return given / "plan.json" if given.is_dir() else given


def _machines(names: str) -> list[Profile]:
    """The machines that were named; of all of them, what is left out is said."""
    from edgeft.machines.profile import list_profiles
    from edgeft.reporting.matrix import find_profiles

    found = find_profiles(names)
    if names == "all":
        for absent in {each.name for each in list_profiles()} - {each.name for each in found}:
            say(f"left out {absent}: this machine's CPU is measured with torch, which is not installed")
    return found


def data(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="as `edgeft plan --data` takes them: files, patterns, hub ids"),
    ],
    model: Annotated[str, typer.Option(help="folder of a Hugging Face checkpoint, or a hub id: its tokenizer is used")],
    rows: Annotated[int, typer.Option(min=0, help="rows to show")] = 3,
    max_length: Annotated[int | None, typer.Option(min=8, help="cut samples to so many tokens, as a plan does")] = None,
    columns: ColumnsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what of a data file trains: the first rows with their trained tokens marked, and what is not used, and why.

    Rows that cannot be used are refused with their lines (exit 1).
    """
    from edgeft.data.dataset import TextTokenizer, data_text, report_data
    from edgeft.data.sources import by_role
    from edgeft.models.headers import has_weights, local_folder

    folder = local_folder(model)
    if not (folder / "tokenizer.json").is_file() and not has_weights(folder):
        hint = "name the model itself, a folder or a hub id: its tokenizer counts the data"
        raise BadInput(folder, "is the shape of a model, without tokenizer and weights", hint)
    roles = by_role(files, columns=columns)
    found = report_data(roles["data"] or "", TextTokenizer(folder), max_length, rows)
    if as_json:
        sys.stdout.write(found.model_dump_json() + "\n")
    else:
        stdout.print(data_text(found), soft_wrap=True, markup=False)
        next_steps.after_data(files, model, roles, columns)


class Shown(enum.StrEnum):
    """What `edgeft show` lists."""

    profiles = "profiles"
    targets = "targets"
    settings = "settings"
    layers = "layers"
    schema = "schema"


def show_what(
    what: Annotated[
        Shown,
        typer.Argument(
            metavar="WHAT",
            help="profiles, or one of them as a file to copy; targets, settings; layers MODEL; schema plan or report",
        ),
    ],
    name: Annotated[str | None, typer.Argument(help="of a profile, a model (folder or hub id), or a document")] = None,
    here: Annotated[
        Path | None, typer.Option(metavar="OUT.toml", help="profiles: measure this machine and write its own, for --on")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List what can be named: machines, targets, settings; a model's layers and sizes; a document's JSON Schema."""
    if here is not None and what is not Shown.profiles:
        raise BadInput("--here", f"is for profiles, not for {what}", "edgeft show profiles --here OUT.toml")
    needed = {Shown.layers: "a model", Shown.schema: "a document: plan or report"}
    if (name is None) == (what in needed) and what is not Shown.profiles:
        raise BadInput(f"show {what}", f"needs {needed[what]}" if what in needed else f"takes no name, got {name!r}")
    if here is not None:
        _write_here(here)
    elif what is Shown.profiles and name is not None:
        from edgeft.documents import shipped_path

        stdout.print(shipped_path("profile", "profiles", name).read_text(encoding="utf-8"), markup=False, end="")
    elif what is Shown.profiles:
        _show_profiles(as_json)
    elif what is Shown.targets:
        _show_targets(as_json)
    elif what is Shown.settings:
        _show_settings(as_json)
    elif what is Shown.layers:
        _show_layers(str(name), as_json)
    else:
        from edgeft.reporting.schema import schema_text

        sys.stdout.write(schema_text(str(name)))


def _write_here(path: Path) -> None:
    from edgeft.machines.here import write_here

    stdout.print(str(write_here(path, say)), soft_wrap=True, markup=False)


def _show_profiles(as_json: bool) -> None:
    from edgeft.machines.profile import list_profiles
    from edgeft.reporting.listings import profiles_text

    found = list_profiles()
    if as_json:
        sys.stdout.write(json.dumps([profile.model_dump() for profile in found]) + "\n")
    else:
        stdout.print(profiles_text(found))


def _show_targets(as_json: bool) -> None:
    from edgeft.targets.target import list_targets

    found = list_targets()
    if as_json:
        sys.stdout.write(json.dumps([target.model_dump() for target in found]) + "\n")
        return
    from edgeft.reporting.listings import named_text

    stdout.print(named_text("target", {target.name: target.description for target in found}))


def _show_layers(model: str, as_json: bool) -> None:
    from edgeft.models.discover import discover
    from edgeft.reporting.terminal import layers_text

    found = discover(model)
    if as_json:
        sys.stdout.write(found.model_dump_json() + "\n")
    else:
        stdout.print(layers_text(found))


def _show_settings(as_json: bool) -> None:
    from edgeft.settings.job import Job

    if as_json:
        sys.stdout.write(json.dumps(Job.model_json_schema()["properties"]) + "\n")
        return
    from edgeft.reporting.listings import settings_text

    stdout.print(settings_text())
