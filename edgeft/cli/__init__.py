"""Which verbs are there? The only place that prints or exits: a table of commands, each a function of a file beside.

Every stage is skipped, in a fraction of a second, when its output is already what its inputs say: content decides, not
file dates. torch is imported by the verbs that need it only.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Annotated, Any

import typer

from edgeft import __version__
from edgeft.cli.bases import doctor
from edgeft.cli.commands import adapters, export, merge, survival, train
from edgeft.cli.device import arm64, run, sign, verify
from edgeft.cli.evaluation import evaluate
from edgeft.cli.jobs import build, init
from edgeft.cli.lists import data, report, show_what
from edgeft.cli.options import settings_of
from edgeft.cli.planning import plan
from edgeft.cli.screen import complain, say
from edgeft.cli.sharing import push
from edgeft.cli.start import example
from edgeft.cli.verb import Verb
from edgeft.errors import BadInput, EdgeftError
from edgeft.machines.extras import installed

app = typer.Typer(
    name="edgeft",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
# the commands in the order of --help
PANELS: dict[str, tuple[Any, ...]] = {
    "From a plan to a bundle": (init, build, plan, train, merge, export, run),
    "Understand": (example, doctor, data, report, survival),
    "Ship": (adapters, verify, sign, arm64, push),
}
PASSED_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _say_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def whole(
    version: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="print and end")] = (
        False
    ),
) -> None:
    """Fine-tune a language model inside a memory budget and ship it to a small device, proven equal."""


for panel, verbs in PANELS.items():
    for verb in verbs:  # `run` hands what follows to run.py
        how = settings_of(verb.__name__) | (PASSED_ON if verb is run else {})
        app.command(cls=Verb, context_settings=how, rich_help_panel=panel)(verb)
app.command("show", rich_help_panel="Understand")(show_what)
app.command("eval", rich_help_panel="Understand")(evaluate)

# what these were called before 0.2
MOVED = {
    "profiles": "show profiles", "targets": "show targets", "settings": "show settings", "layers": "show layers",
    "schema": "show schema", "keygen": "sign --new-key FILE",
}  # fmt: skip


# what other tools call what is called otherwise here
ELSEWHERE = {
    "chat": "edgeft run BUNDLE holds a conversation", "infer": "edgeft run BUNDLE 'a prompt'",
    "generate": "edgeft run BUNDLE 'a prompt'", "serve": "edgeft run BUNDLE --serve 8080",
    "api": "edgeft run BUNDLE --serve 8080", "sft": "edgeft build does all, from data to a bundle",
    "finetune": "edgeft build does all, from data to a bundle", "tune": "edgeft build does all, from data to a bundle",
    "fuse": "edgeft merge TRAIN", "quantize": "edgeft export MERGED", "convert": "edgeft export MERGED",
    "estimate": "edgeft plan MODEL", "estimate-memory": "edgeft plan MODEL",
    "env": "edgeft show profiles --here OUT.toml",
}  # fmt: skip


def main() -> None:
    """The command line: errors as `where: problem` and a hint, without a traceback, and their exit code."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it announces kernels it did not find at import
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        if len(sys.argv) > 1 and sys.argv[1] in MOVED:
            raise BadInput(f"edgeft {sys.argv[1]}", "is another command now", f"edgeft {MOVED[sys.argv[1]]}")
        if len(sys.argv) > 1 and sys.argv[1] in ELSEWHERE:
            raise BadInput(f"edgeft {sys.argv[1]}", "is called otherwise here", ELSEWHERE[sys.argv[1]])
        with installed("export" if sys.argv[1:2] and sys.argv[1] in ("export", "adapters") else ""):
            app()
    except EdgeftError as problem:
        if os.environ.get("EDGEFT_TRACEBACK"):
            raise
        complain(problem)
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        say("\nstopped")
        sys.exit(130)
