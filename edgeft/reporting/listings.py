"""How do machines, targets and settings read when they are listed on a screen?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType

from edgeft.machines.profile import Profile
from edgeft.reporting.tables import ScreenTable
from edgeft.settings.job import Job

# what settings are about, by the first of those that belong together: they stand in the order of the model
GROUPS = {
    "model": "The job", "tuner": "How a layer trains", "layers": "Which layers train, and when",
    "base_precision": "Memory and time of a step", "epochs": "How long", "eval_rows": "Scores, and when to stop",
    "quantize_aware": "What is exported", "max_memory_bytes": "Limits",
}  # fmt: skip


def profiles_text(profiles: Iterable[Profile]) -> RenderableType:
    """All shipped profiles, one line each."""
    columns = ("profile", "for", "device", "memory", "computes in", "GB/s", "description")
    table = ScreenTable(*columns, prose=["description"], below={"description": ""})
    for profile in profiles:
        memory = f"{profile.memory_gib:g} GiB" if profile.memory_gib else "detected"
        bandwidth = f"{profile.bandwidth_gb_per_second:g}" if profile.bandwidth_gb_per_second else "measured"
        dtypes = " ".join(profile.dtypes) or "measured"
        roles = " ".join(profile.roles)
        table.add_row(profile.name, roles, profile.device, memory, dtypes, bandwidth, profile.description)
    return table


def named_text(kind: str, described: Mapping[str, str]) -> RenderableType:
    """Names with what they are, one below the other."""
    table = ScreenTable(kind, "what it is", prose=["what it is"])
    for name, text in described.items():
        table.add_row(name, text)
    return table


def settings_text() -> RenderableType:
    """Every setting by what it is about: what holds where it is not set, what it may be, what it means."""
    properties, tables = Job.model_json_schema()["properties"], list[RenderableType]()
    for name, field in Job.model_fields.items():
        if name in GROUPS:
            table = ScreenTable(
                "setting", "not set", "meaning", title=GROUPS[name], prose=["meaning"], left=["not set"]
            )
            tables.append(table)
        default = "required" if field.is_required() else "planned" if field.default is None else str(field.default)
        values = values_of(properties[name])
        meaning = (field.description or "") + (f" [{' | '.join(values)}]" if values else "")
        table.add_row(name, default, meaning)
    return Group(*tables)


def values_of(schema: Mapping[str, Any]) -> list[str]:
    """What a setting may be, where that can be listed."""
    found: list[str] = []
    for branch in (schema, *schema.get("anyOf", ())):
        found += map(str, branch.get("enum", ()))
        found += ["true", "false"] if branch.get("type") == "boolean" else []
    return found
