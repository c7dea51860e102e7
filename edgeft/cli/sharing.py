"""How does a model get to others from the command line?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeft.cli.screen import stdout
from edgeft.units import show_bytes


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="what edgeft train (an adapter), merge or export wrote")
    ],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="on the hub, as in org/name; made when absent")],
    base: Annotated[
        str | None, typer.Option(help="the base model's name on the hub, for one that lies in a folder here")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="a repository that is made is not for everybody")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would be uploaded, and end")] = False,
) -> None:
    """Upload an adapter, a merged checkpoint or a bundle to the hub, with its card.

    What failed its proof, has none or was changed afterwards is refused (exit 4 and 1); records with paths stay here.
    """
    from edgeft.api import sharing

    if dry_run:
        for name, size in sharing.pack(folder, base=base).sizes().items():
            stdout.print(f"{name:40} {show_bytes(size)}", soft_wrap=True, markup=False)
        return
    stdout.print(sharing.push(folder, repository, base=base, private=private), soft_wrap=True, markup=False)
