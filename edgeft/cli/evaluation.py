"""How are forms of a model scored on a user's own rows from the command line?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeft.api import evaluating
from edgeft.cli.screen import ColumnsOption, JsonOption, Reporter, show, stderr, stopping
from edgeft.data.sources import by_role


def evaluate(
    forms: Annotated[
        list[str],
        typer.Argument(
            metavar="FORM...",
            help="checkpoints (folders, hub ids) and bundles; the folder of a run: its base, merge and bundle",
        ),
    ],
    data: Annotated[
        list[str] | None, typer.Option(help="rows to score, as `edgeft plan --data` takes them; all of them are")
    ] = None,
    columns: ColumnsOption = None,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="cut samples to so many tokens; as the run did, and to a bundle's context")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="instead of rows: lm-eval's tasks, as in arc_easy,gsm8k")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="--tasks: a folder with tasks of your own")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="--tasks: rows of each")] = None,
    out: Annotated[
        Path | None, typer.Option(help="also write the result, each row's own scores in it, as JSON")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score forms of a model on the same rows, each as it runs, with the 95% intervals of their differences.

    Checkpoints answer in PyTorch, bundles by run.py in their own runtime, as in the proof of an export.
    """
    with stopping("nothing was written"), Reporter(stderr) as progress:
        made = evaluating.evaluate(
            *forms, data=by_role(data or [], columns=columns)["data"], max_length=max_length,
            tasks=[name for name in (tasks or "").split(",") if name], task_folder=task_folder, limit=limit, out=out,
            progress=progress,
        )  # fmt: skip
    show(as_json, made, made.text())
