"""What do commands print, and where? Results on stdout, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType

from edgeft.documents import Artifact
from edgeft.errors import BadInput

# one width for logs and pipes; a terminal has its own
stdout, stderr = (Console(stderr=e, width=None if sys.stdout.isatty() else 140, highlight=False) for e in (False, True))

OutOption = Annotated[Path | None, typer.Option("--out", help="where to write; default build/<profile>/<stage>")]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on stdout instead of text")]


def show(as_json: bool, artifact: Artifact, text: RenderableType) -> None:
    if as_json:
        sys.stdout.write(artifact.model_dump_json() + "\n")
    else:
        stdout.print(text)


def say(message: str) -> None:
    stderr.print(message, soft_wrap=True, markup=False)


@contextlib.contextmanager
def stopping(what: str) -> Iterator[None]:
    """Ctrl-C is said with what it leaves, and ends with its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"\nstopped; {what}")
        raise typer.Exit(130) from None


def need(path: Path, command: str) -> None:
    if not path.is_file():
        raise BadInput(path, "no such file", f"run {command} first")
