"""Are the published schemas those of the types, and do documents have the shape that they say?"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from tiny import CONFIGS, ROOT

from edgeft.errors import BadInput
from edgeft.machines.profile import load_profile
from edgeft.planning.plan import make_plan
from edgeft.reporting.matrix import make_matrix
from edgeft.reporting.read_run import Run
from edgeft.reporting.schema import DOCUMENTS, schema_text, shipped_schema
from edgeft.reporting.summary import summarise
from edgeft.settings.job import make_job

MODEL = str(CONFIGS / "smollm2-135m")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_published_schema_is_that_of_the_type(name: str) -> None:
    """After a change to a document's type: run make schemas, and commit what it writes."""
    assert json.loads(shipped_schema(name)) == json.loads(schema_text(name)), "run make schemas"


def test_every_published_schema_is_of_a_document() -> None:
    files = (ROOT / "edgeft" / "reporting" / "schemas").glob("*.schema.json")
    assert {file.name.removesuffix(".schema.json") for file in files} == set(DOCUMENTS)


def conforms(value: Any, schema: dict[str, Any], whole: dict[str, Any], place: str = "$") -> None:
    """Assert what the schema says of keys, types, constants and items: the part of JSON Schema that pydantic writes."""
    if "$ref" in schema:
        return conforms(value, whole["$defs"][schema["$ref"].rpartition("/")[2]], whole, place)
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            failed = 0
            for option in schema[choice]:
                try:
                    conforms(value, option, whole, place)
                except AssertionError:
                    failed += 1
            assert failed < len(schema[choice]), place
            return None
    if "const" in schema:
        assert value == schema["const"], place
    if "enum" in schema:
        assert value in schema["enum"], place
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    if schema.get("type") == "null":
        assert value is None, place
    elif "type" in schema:
        assert isinstance(value, kinds[schema["type"]]), (place, schema["type"], value)
    if isinstance(value, dict) and "properties" in schema:
        assert set(schema.get("required", ())) <= set(value), place
        if schema.get("additionalProperties") is False:
            assert set(value) <= set(schema["properties"]), place
        for key, inner in value.items():
            if key in schema["properties"]:
                conforms(inner, schema["properties"][key], whole, f"{place}.{key}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for i, inner in enumerate(value):
            conforms(inner, schema["items"], whole, f"{place}[{i}]")
    return None


def test_documents_conform_to_their_schemas() -> None:
    plan = make_plan(make_job(model=MODEL, profile="t4"))
    matrix = make_matrix([("smol", MODEL)], [load_profile("t4"), load_profile("raspberrypi5-8gb")])
    summary = summarise(Run(plan), [load_profile("raspberrypi5-8gb")])
    for name, document in (("plan", plan), ("report", summary), ("report", matrix)):
        schema = json.loads(shipped_schema(name))
        conforms(json.loads(document.model_dump_json()), schema, schema)
    broken = json.loads(plan.model_dump_json()) | {"budget_bytes": "much"}
    schema = json.loads(shipped_schema("plan"))
    with pytest.raises(AssertionError, match="budget_bytes"):
        conforms(broken, schema, schema)


def test_unknown_document() -> None:
    with pytest.raises(BadInput, match=r"schema: unknown document 'repotr'\n\nhint: did you mean 'report'\?"):
        schema_text("repotr")


def test_the_verb_prints_the_schema() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgeft", "show", "schema", "plan"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == shipped_schema("plan")
