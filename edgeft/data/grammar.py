"""Which grammar does a user name for answers, and what does a bundle get of it? (no torch)

A grammar is a regular expression, a JSON Schema or a Lark file, in the dialects of llguidance, which holds answers to
it in every runtime.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from edgeft.data.grammar_ends import endless_lark, endless_regex, endless_schema
from edgeft.data.json_values import parse_json
from edgeft.data.labels import Label
from edgeft.documents import Strict
from edgeft.errors import BadInput

REGEX, SCHEMA_ENDING, LARK_ENDING = "regex:", ".json", ".lark"
FILES = {"regex": "answers.regex.txt", "json_schema": "answers.schema.json", "lark": "answers.lark"}  # in a bundle
FREE = "leave answers out (--set answers=free): the device then writes what the model says"
ANY_JSON: tuple[Any, ...] = ({}, True)
# how JSON is written: between items, between a key and its value
SEPARATORS = ((",", ":"), (", ", ": "))
END_HINT = "give it a limit: an answer that never ends is no answer; or " + FREE


class Grammar(Strict):
    """What answers are held to, as every engine gets it: a schema says how its JSON is written, too."""

    form: Literal["regex", "json_schema", "lark"]
    text: str
    source: str = Field(description="the setting that it was made from; of a file its name alone")

    @property
    def file(self) -> str:
        """Its name in a bundle."""
        return FILES[self.form]

    @property
    def line(self) -> str:
        """It in one line."""
        return f"held to {held_name(self.source)}"


def held_name(answers: str) -> str:
    """What a setting names, in words."""
    kinds = {SCHEMA_ENDING: "the JSON Schema", LARK_ENDING: "the Lark grammar"}
    kind = next((words for ending, words in kinds.items() if answers.endswith(ending)), "")
    return f"{kind} {answers}" if kind else f"the regular expression {answers.removeprefix(REGEX)!r:.60}"


HeldTo = tuple[Label, ...] | Grammar  # what answers are held to; no labels: they are free


def grammar_file(answers: str) -> Path | None:
    """The file that the setting names, where it names one."""
    return Path(answers) if answers.endswith((SCHEMA_ENDING, LARK_ENDING)) else None


def read_grammar(answers: str, begins: str = "") -> list[Grammar]:
    """The grammar of a setting, by each way in which its answers may be written: data says which.

    `begins` is the white space before a row's answer. Raises BadInput for what is empty, or allows answers without end.
    """
    path = grammar_file(answers)
    text = _read(path) if path is not None else answers.removeprefix(REGEX)
    if not text.strip():
        raise BadInput("answers", f"{answers} is empty", f"say what an answer looks like; or {FREE}")
    if path is None:
        _ends("answers", endless_regex(text))
        return [Grammar(form="regex", text=text, source=answers)]
    if path.suffix == LARK_ENDING:
        _ends(str(path), endless_lark(text))
        return [Grammar(form="lark", text=text, source=path.name)]
    return list(_schemas(path, text, begins))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise BadInput(path, f"cannot be read: {problem}", "name a UTF-8 file") from None


def _schemas(path: Path, text: str, begins: str) -> Iterator[Grammar]:
    """A schema by each way of writing JSON, without white space that may go on for ever."""
    schema = parse_json(text)
    if isinstance(schema, Exception):
        raise BadInput(path, f"is no JSON Schema: {schema}", "see https://json-schema.org")
    if schema in ANY_JSON:
        raise BadInput(path, "is an empty schema: it allows any JSON", f"say what an answer looks like; or {FREE}")
    if not isinstance(schema, dict):
        raise BadInput(path, f"is no JSON Schema, got {text!r:.60}", "see https://json-schema.org")
    _ends(str(path), endless_schema(schema))
    for start in dict.fromkeys(("", begins)):
        for item, key in SEPARATORS:
            asked = {"whitespace_flexible": False, "item_separator": item, "key_separator": key}
            made = json.dumps({**schema, "x-guidance": asked}, ensure_ascii=False)
            if start:
                yield Grammar(form="lark", text=f"start: {json.dumps(start)} %json {made}\n", source=path.name)
            else:
                yield Grammar(form="json_schema", text=made, source=path.name)


def _ends(where: str, endless: str) -> None:
    if endless:
        raise BadInput(where, f"allows answers without end: {endless}", END_HINT)
