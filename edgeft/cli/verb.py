"""What does an option that a verb does not have stand for: a setting, another verb's option?"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from edgeft.errors import BadInput


class Verb(TyperCommand):
    """A command that knows what is typed as an option elsewhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as problem:
            option = str(getattr(problem, "option_name", "") or "")
            if option and (hint := _meant(self.name or "", option.lstrip("-").replace("-", "_"))):
                raise BadInput(option, f"is no option of edgeft {self.name}", hint) from None
            raise


def _meant(verb: str, name: str) -> str:
    """What to type for a name that is no option of a verb; nothing where nobody knows."""
    from edgeft.settings.job import Job
    from edgeft.settings.other_names import BY_NAME, hint_for

    if verb == "train" and name in ("data", "model", "on", "set"):
        return "train carries out a plan: edgeft plan MODEL --data FILE makes one, edgeft build does all of it"
    if name in ("config", "config_file", "yaml", "cfg"):
        return (
            "--job FILE reads a job file, which edgeft init writes; docs/other-trainers.md has what YAML keys are here"
        )
    settings = "--set {} of plan and build" if verb not in ("plan", "build") else "--set {}"
    if name in Job.model_fields:
        return f"it is a setting: {settings.format(f'{name}=VALUE')}"
    if name not in BY_NAME:
        return ""
    said = hint_for(name, ())
    return f"as a setting: {said} ({settings.format('NAME=VALUE')})" if BY_NAME[name].here else said
