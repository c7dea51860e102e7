"""Which shape has each JSON document that other programs read? JSON Schema, from the types that write and read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pydantic

from edgeft.errors import BadInput, did_you_mean


def _plan() -> pydantic.TypeAdapter[Any]:
    from edgeft.planning.plan import Plan

    return pydantic.TypeAdapter(Plan)


def _report() -> pydantic.TypeAdapter[Any]:
    from edgeft.reporting.matrix import Matrix
    from edgeft.reporting.summary import Summary

    return pydantic.TypeAdapter(Annotated[Summary | Matrix, pydantic.Field(discriminator="kind")])


DOCUMENTS: dict[str, Callable[[], pydantic.TypeAdapter[Any]]] = {"plan": _plan, "report": _report}


def schema_text(name: str) -> str:
    """The JSON Schema (draft 2020-12) of a document as edgeft writes it. Raises BadInput for an unknown one."""
    if name not in DOCUMENTS:
        raise BadInput("schema", f"unknown document {name!r}", did_you_mean(name, DOCUMENTS))
    schema = DOCUMENTS[name]().json_schema(mode="serialization")
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema, indent=1) + "\n"


def shipped_schema(name: str) -> str:
    """The schema as published with this version: edgeft/reporting/schemas/NAME.schema.json."""
    return (Path(__file__).with_name("schemas") / f"{name}.schema.json").read_text(encoding="utf-8")
