"""Which words mean the same in every verb: `--on`, the machine that trains; `--for`, the device that runs it?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

DeviceOption = Annotated[
    str | None,
    typer.Option("--for", metavar="DEVICE", help="the device that runs the result: a profile's name, or a TOML file"),
]  # fmt: skip

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
