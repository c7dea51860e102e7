"""Does the bill of materials name all that is inside, by the manifest's hashes and the licences that are stated?"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from bundles import bundle

from edgeft.exporting.bundle import SBOM, Bundle
from edgeft.exporting.sbom import BASE, Component, bill_of_materials, licence_entries, model_licence
from edgeft.targets.target import load_target

SOURCES = [
    Component("machine-learning-model", "tiny", BASE, weights_sha256="ab" * 32, licence="apache-2.0"),
    Component("data", "rows.jsonl", "training data", sha256="cd" * 32),
]


def bill(sources: list[Component] = SOURCES) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(
        bill_of_materials({"model.onnx": "ef" * 32, "run.py": "01" * 32}, sources, load_target("ort-int4"))
    )
    return made


def component(made: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [entry for entry in made["components"] if entry["name"] == name]
    return dict(found)


def test_the_bill_of_a_bundle_has_every_file_with_the_manifests_hash() -> None:
    manifest = Bundle.read(bundle("ort-int4") / "bundle.json")
    made = json.loads((bundle("ort-int4") / SBOM).read_text(encoding="utf-8"))
    files = {entry["name"]: entry["hashes"][0]["content"] for entry in made["components"] if entry["type"] == "file"}
    assert files == {name: file.sha256 for name, file in manifest.files.items() if name != SBOM}
    runtime = component(made, "onnxruntime-genai")
    version = importlib.metadata.version("onnxruntime-genai")
    assert (runtime["version"], runtime["purl"]) == (version, f"pkg:pypi/onnxruntime-genai@{version}")
    assert runtime["licenses"] == [{"license": {"id": "MIT"}}]
    assert made["metadata"]["tools"]["components"][0]["name"] == "edgeft"


def test_what_it_was_made_from_is_named_by_hash() -> None:
    made = bill()
    base, data = component(made, "tiny"), component(made, "rows.jsonl")
    assert base["licenses"] == [{"license": {"id": "Apache-2.0"}}] and "hashes" not in base
    assert {"name": "edgeft:sha256 of the weight files' sha256", "value": "ab" * 32} in base["properties"]
    assert data["hashes"] == [{"alg": "SHA-256", "content": "cd" * 32}]
    assert {"name": "edgeft:licence", "value": "not stated"} in data["properties"]
    assert component(made, "model.onnx")["licenses"] == base["licenses"]
    assert component(made, "run.py")["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert made["metadata"]["component"]["name"] == "tiny for ort-int4"
    references = [entry["bom-ref"] for entry in made["components"]]
    assert len(set(references)) == len(references)
    assert made["dependencies"] == [{"ref": "bundle", "dependsOn": sorted(references)}]


def test_two_data_files_of_one_name_are_two_components() -> None:
    made = bill([*SOURCES, Component("data", "rows.jsonl", "training data", sha256="99" * 32)])
    references = [entry["bom-ref"] for entry in made["components"]]
    assert len(set(references)) == len(references) == len(made["dependencies"][0]["dependsOn"])


def test_the_schema_of_cyclonedx_accepts_it() -> None:
    json_schema = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    validator = json_schema.JsonStrictValidator(SchemaVersion.V1_6)
    for text in (json.dumps(bill()), json.dumps(bill([])), (bundle("ort-int4") / SBOM).read_text(encoding="utf-8")):
        assert validator.validate_str(text) is None
    assert validator.validate_str(json.dumps(bill() | {"bomFormat": "other"})) is not None


@pytest.mark.parametrize(
    ("licence", "entries"),
    [
        ("apache-2.0", [{"license": {"id": "Apache-2.0"}}]),
        ("MIT License", [{"license": {"id": "MIT"}}]),
        ("llama3.2", [{"license": {"name": "llama3.2"}}]),
        ("Do what you want OR pay", [{"license": {"name": "Do what you want OR pay"}}]),
        ("BSD-3-Clause AND (MIT OR Zlib)", [{"expression": "BSD-3-Clause AND (MIT OR Zlib)"}]),
    ],
)
def test_licences_are_identifiers_expressions_or_names(licence: str, entries: list[Any]) -> None:
    assert licence_entries(licence) == entries


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, ""),
        ({"README.md": "# A model\nlicense: mit\n"}, ""),  # not in the header
        ({"README.md": "---\nlanguage: en\nlicense: 'mit'\n---\ntext", "LICENSE": "Other"}, "mit"),
        ({"README.md": "---\nlicense:\n  - mit\n  - apache-2.0\ntags: []\n---\n"}, "MIT OR Apache-2.0"),
        ({"README.md": "---\nlicense: other\nlicense_name: my-terms\n---\n"}, "my-terms"),
        ({"config.json": '{"license": "gemma"}'}, "gemma"),
        ({"config.json": "{", "LICENSE.txt": "\n  Apache License\n  Version 2.0, January 2004"}, "Apache-2.0"),
        ({"LICENSE": "MIT License\n\nCopyright"}, "MIT License"),
    ],
)
def test_the_licence_a_checkpoint_states_is_found(tmp_path: Path, files: dict[str, str], licence: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert model_licence(tmp_path) == licence
