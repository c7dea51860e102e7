"""What can somebody begin with who has nothing but edgeft?"""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import Annotated

import typer

from edgeft.api.example import MODEL, SHAPES
from edgeft.api.example import example as write_example
from edgeft.cli.screen import say, stdout
from edgeft.machines.extras import install_line


def example(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="a new folder")] = Path("edgeft-example"),
) -> None:
    """Write a small model and the rows of a task for it, which come with edgeft, and say what can be done with them."""
    folder = write_example(out)
    stdout.print(str(folder), soft_wrap=True, markup=False)
    here = shlex.quote(str(folder))
    say(f"which of these shapes fits which machine: edgeft report --models {here}/{SHAPES}")
    if importlib.util.find_spec("torch"):
        say(f"from the small one to a proven bundle: edgeft build {here}/{MODEL} --data {here} --on cpu")
    else:  # nor can this machine's CPU be measured without it
        say(f"what the small one takes: edgeft plan {here}/{MODEL} --data {here} --on cpu-16gb")
        say(f"to a proven bundle: {install_line('export')}, then edgeft build {here}/{MODEL} --data {here} --on cpu")
