"""What can be asked on the command line of a folder that is to be a base?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeft.api import doctoring
from edgeft.cli.screen import JsonOption, Reporter, show, stderr, stopping


def doctor(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="what is to be a base: a folder, or a GGUF file")],
    base: Annotated[str | None, typer.Option(help="the model it was made from, for what it lacks")] = None,
    repair: Annotated[
        Path | None, typer.Option(help="write it here as a folder that trains, and how it was made")
    ] = None,
    values: Annotated[
        bool, typer.Option("--values", help="also read every number, and name what is not finite")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a folder is, whether it can be trained, and what would put it right (exit 1 where it cannot).

    Reads headers alone and runs nothing that lies in the folder.
    """
    from edgeft.reporting.diagnosis import diagnosis_text, repaired_text

    with stopping("nothing was written"), Reporter(stderr) as progress:
        if repair is not None:
            made = doctoring.repair(folder, repair, base=base, progress=progress)
            show(as_json, made, repaired_text(made, repair))
            return
        found = doctoring.doctor(folder, base=base, values=values, progress=progress)
    show(as_json, found, diagnosis_text(found))
    if found.verdict != "usable":
        raise typer.Exit(1)
