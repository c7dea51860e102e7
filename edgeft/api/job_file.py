"""What does a job file (edgeft.toml) say, and what of it is left beside what the command line says?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import BeforeValidator, Field

from edgeft.api.folders import job_folder
from edgeft.data.sources import by_role
from edgeft.documents import Strict, invalid, parse_toml
from edgeft.errors import BadInput
from edgeft.machines.sized import machine_name
from edgeft.settings.job import Job, check_known
from edgeft.settings.other_names import BY_NAME as ELSEWHERE
from edgeft.settings.other_names import hint_for
from edgeft.units import parse_bytes

NAME = Path("edgeft.toml")
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?(e-?[0-9]+)?|true|false")
HEAD = """\
# A job of edgeft. `edgeft build` makes it, from a plan to a bundle that is proven to be what was trained; `edgeft plan`
# says what it takes. Both read this file in the folder that they run in, or by --job FILE. Paths are seen from that
# folder. What the command line says goes before what stands here.
"""
# settings that are keys of their own in the file; of them those that --set may pin, by their fields
KEYS = {"profile": "on", "device": "for", "max_memory_bytes": "max_memory"} | {
    name: name for name in ("model", "data", "valid", "test", "target", "max_seconds")
}
SHOWN = (
    "epochs",
    "rank",
    "learning_rate",
    "batch_size",
    "max_length",
    "answers",
    "kv_bits",
    "seed",
)  # of the settings, in a new file
EXAMPLES = {
    "rank": 16,
    "learning_rate": 2e-4,
    "max_length": 512,
    "answers": "labels",
    "kv_bits": 8,
}  # of those that are planned where they are not set
PINNED = {"device": "device", "target": "target", "max_seconds": "max_seconds", "max_memory_bytes": "max_memory"}
# what is read together: where the command line names the first of them, the others of the file are not meant
TOGETHER = (("on", "memory"), ("memory", "on"), ("data", "valid", "test", "columns"))


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _as_columns(value: Any) -> Any:
    return ",".join(f"{known}={own}" for known, own in value.items()) if isinstance(value, Mapping) else value


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, Field(min_length=1)]
Sources = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)]


class JobFile(Strict):
    """What is asked for: by a file, by a command line, or by both."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    model: Text | None = Field(
        None, description="folder of a Hugging Face checkpoint, or a hub id", examples=["Qwen/Qwen2.5-0.5B-Instruct"]
    )
    data: Sources = Field(
        (), description="training data: a file, a pattern, a folder, a hub data set, or a list of them",
        examples=["train.jsonl"],
    )  # fmt: skip
    valid: Sources = Field((), description="validation data; held out when absent", examples=["valid.jsonl"])
    test: Sources = Field(
        (), description="test data, scored before and after every stage", examples=["test.jsonl"]
    )  # fmt: skip
    columns: Annotated[Text | None, BeforeValidator(_as_columns)] = Field(
        None, description="own columns by the known names", examples=["prompt=question,completion=answer"]
    )
    on: Text | None = Field(
        None, description="the machine that trains: a name from `edgeft show profiles`, or a TOML file; cpu: this one",
        examples=["cpu"],
    )  # fmt: skip
    memory: Text | None = Field(
        None, description="what it has: alone a graphics card of so much, with `on` that machine with so much",
        examples=["8GiB"],
    )  # fmt: skip
    device: Text | None = Field(
        None, alias="for", description="the device that runs the result", examples=["raspberrypi5-8gb"]
    )
    target: Text | None = Field(
        None, description="what is exported: auto is the smallest that keeps the fine-tune; see `edgeft show targets`",
        examples=["auto"],
    )  # fmt: skip
    max_memory: Text | None = Field(
        None, description="most that edgeft may hold of the machine's memory", examples=["7GiB"]
    )
    max_seconds: float | None = Field(
        None, gt=0, description="time limit for all training steps, by the estimate", examples=[3600]
    )
    wise_alpha: Annotated[Text | None, BeforeValidator(_as_text)] = Field(
        None, description="share of the change that a merge takes: 0 base, 1 fine-tuned", examples=[1.0]
    )
    track: Sources = Field(
        (), description="trackers that are told each step: tensorboard, trackio, wandb, mlflow ..., or a list of them",
        examples=["tensorboard"],
    )  # fmt: skip
    out: Text | None = Field(
        None, description="folder of the results; build/MODEL-DATA-MACHINE when absent", examples=["build/my-job"]
    )
    settings: dict[str, Any] = Field({}, description="what else is pinned; see `edgeft show settings`")

    def given(self) -> dict[str, Any]:
        """What is said here, by the names of the file."""
        return {key_of(name): value for name in type(self).model_fields if (value := getattr(self, name))}


def key_of(name: str) -> str:
    """What a field is called in the file."""
    return JobFile.model_fields[name].alias or name


def find_job_file(named: Path | None) -> Path | None:
    """The file that is read: the one that was named, else edgeft.toml of the current folder; `-` is none."""
    if named is None:
        return NAME if NAME.is_file() else None
    return None if str(named) == "-" else named


def read_job_file(path: Path) -> JobFile:
    """What a job file says. Raises BadInput for what is no TOML, an unknown key, or a value that does not fit."""
    data = parse_toml(path, "edgeft init writes one")
    for key in sorted(data.keys() & (Job.model_fields.keys() - (JobFile.model_fields.keys() - {"device"}))):
        hint = f"it is called {KEYS[key]} here" if key in KEYS else f"it is a setting: {key} = ... below [settings]"
        raise BadInput(path, f"unknown key {key!r}", hint)
    for key in sorted((data.keys() & ELSEWHERE.keys()) - JobFile.model_fields.keys()):
        raise BadInput(path, f"unknown key {key!r}", hint_for(key, JobFile.model_fields))
    try:
        made = JobFile.model_validate(data)
    except pydantic.ValidationError as problem:
        raise invalid(path, problem, JobFile) from None
    for key in made.settings:
        if key in KEYS:
            raise BadInput(path, f"settings: {key!r} is a key of its own", f"{KEYS[key]} = ... above [settings]")
    check_known(path, "settings: ", made.settings, Job.model_fields.keys() - KEYS)
    return made


def over(file: JobFile, typed: JobFile) -> tuple[JobFile, list[str]]:
    """What is asked for by both, the command line first, and a line for each thing that the file says in vain."""
    values, lines = {name: getattr(file, name) for name in JobFile.model_fields}, list[str]()
    said = {name: value for name in JobFile.model_fields if (value := getattr(typed, name)) and name != "settings"}
    for lead, *others in TOGETHER:
        for name in others if lead in said else ():
            if name not in said and values[name]:
                lines.append(
                    f"{key_of(name)} = {_shown(values[name])} is not read: the command line says {key_of(lead)}"
                )
                values[name] = JobFile.model_fields[name].default
    for name, value in said.items():
        if values[name] and values[name] != value:
            lines.append(_instead(key_of(name), values[name], value))
        values[name] = value
    for name, value in typed.settings.items():
        if (field := PINNED.get(name)) and values[field] and field not in said:
            lines.append(_instead(key_of(field), values[field], value))
            values[field] = None
        if name in file.settings and str(file.settings[name]) != str(value):
            lines.append(_instead(name, file.settings[name], value))
    values["settings"] = {**file.settings, **typed.settings}
    return JobFile.model_construct(**values), lines


def _instead(key: str, there: Any, here: Any) -> str:
    return f"{key} = {_shown(there)} is not read: the command line says {_shown(here)}"


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and len(value) == 1:
        return _shown(value[0])
    return json.dumps(value, ensure_ascii=False)


def job_values(asked: JobFile) -> dict[str, Any]:
    """The settings of a job as `make_job` takes them. Raises BadInput for what names no machine, data or size."""
    values = dict(asked.settings)
    if asked.max_memory is not None:
        values["max_memory_bytes"] = parse_bytes(asked.max_memory)
    for name in ("device", "target", "max_seconds"):
        if (value := getattr(asked, name)) is not None:
            values[name] = value
    sources = by_role(asked.data, asked.valid, asked.test, asked.columns)
    return values | {"model": asked.model, "profile": machine_name(asked.on, asked.memory, "cpu"), **sources}


def results_folder(asked: JobFile, values: Mapping[str, Any]) -> Path:
    """Where a job's results lie: where it says, or in a folder of its own."""
    if asked.out is not None:
        return Path(asked.out)
    return job_folder(str(values["model"]), values["data"], str(values["profile"]))


def write_job_file(path: Path, asked: JobFile) -> None:
    """Write a file that says what is asked for and explains every key. Raises BadInput where there is one already."""
    if path.exists():
        raise BadInput(path, "exists: it will not be replaced", "edit it, remove it, or give another name")
    text = "\n".join([HEAD, *_lines(asked)]) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as problem:
        raise BadInput(path, f"cannot write: {problem.strerror}", "choose another place") from None


def _lines(asked: JobFile) -> Iterator[str]:
    """Every key with what it means: as asked for, else an example behind a #."""
    for name, field in JobFile.model_fields.items():
        if name == "settings":
            continue
        value = getattr(asked, name)
        yield f"# {field.description}"
        yield (
            f"{key_of(name)} = {_toml(value)}" if value else f"# {key_of(name)} = {_toml((field.examples or [''])[0])}"
        )
        yield ""
    yield f"# {JobFile.model_fields['settings'].description}"
    yield "[settings]"
    for name in dict.fromkeys((*SHOWN, *asked.settings)):
        field = Job.model_fields[name]
        value = asked.settings.get(name)
        example = EXAMPLES.get(name, field.default)
        if value is not None:
            yield f"{name} = {_pinned(value)}"
        else:
            yield f"# {name} = {_toml(example)}  # {field.description}"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return _toml(value[0]) if len(value) == 1 else json.dumps(list(value), ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)


def _pinned(value: Any) -> str:
    """A setting: what the command line says of a number is text."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return value
    return _toml(value)
