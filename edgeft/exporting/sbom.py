"""What is inside a bundle, from whom and under which licence? A bill of materials in CycloneDX 1.6 (data only).

No time and no random serial number are in it: the same bundle has the same bill.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from edgeft.data.grammar import HeldTo
from edgeft.targets.runtimes import needed_packages
from edgeft.targets.target import Target

Kind = Literal["machine-learning-model", "data", "library", "file", "application"]
OURS = ("run.py", "README.md")
BASE = "base model"  # the role whose licence the weights and the tokenizer have
# Identifiers (spdx.org/licenses) that checkpoints on the hub state in lower case; other licences go by name.
SPDX = {
    name.lower(): name
    for name in (
        "Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MPL-2.0", "GPL-2.0-only", "GPL-3.0-only",
        "LGPL-3.0-only", "AGPL-3.0-only", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0",
        "ODC-By-1.0", "ODbL-1.0", "PDDL-1.0", "Unlicense", "Zlib", "0BSD", "AFL-3.0", "Artistic-2.0", "BSL-1.0",
        "EUPL-1.2", "MS-PL", "WTFPL",
    )
}  # fmt: skip


class Component(NamedTuple):
    """One thing a bundle holds, needs or was made from; `role` says which. Empty: not known."""

    kind: Kind
    name: str
    role: str
    version: str = ""
    sha256: str = ""
    weights_sha256: str = ""  # a digest over several files' digests, which is no file's own
    licence: str = ""


def bill_of_materials(
    files: Mapping[str, str], sources: Sequence[Component], target: Target, held_to: HeldTo = ()
) -> str:
    """CycloneDX JSON: every file of a bundle (name to sha256), the packages it needs, and what it was made from.

    Model and tokenizer files have the licence of the base model among `sources`, run.py and README.md that of edgeft.
    """
    base = next((source for source in sources if source.role == BASE), None)
    licence = base.licence if base else ""
    edgeft = _package("edgeft", "made by")
    inside = [
        Component("file", name, "in the bundle", edgeft.version if name in OURS else "", digest,
                  licence=edgeft.licence if name in OURS else licence)
        for name, digest in sorted(files.items())
    ]  # fmt: skip
    needed = [_package(name, "needed on the device") for name in needed_packages(target, held_to)]
    components = [_entry(component) for component in (*inside, *needed, *sources)]
    for number, entry in enumerate(components):  # data of two adapters may have one name
        if any(entry["bom-ref"] == other["bom-ref"] for other in components[:number]):
            entry["bom-ref"] += f" ({number})"
    name = f"{base.name} for {target.name}" if base else f"model for {target.name}"
    bundle = {"type": "machine-learning-model", "bom-ref": "bundle", "name": name}
    depends = [entry["bom-ref"] for entry in components]
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"tools": {"components": [_entry(edgeft)]}, "component": bundle},
        "components": components,
        "dependencies": [{"ref": "bundle", "dependsOn": sorted(depends)}],
    }
    return json.dumps(bill, indent=1, ensure_ascii=False) + "\n"


def extended(bill: str, files: Mapping[str, str], sources: Sequence[Component]) -> str:
    """A bundle's bill with these files of it (name to sha256), new or changed, and what else it was made from."""
    told = json.loads(bill)
    licence = _package("edgeft", "made by").licence
    entries = [
        *(_entry(Component("file", name, "in the bundle", sha256=digest, licence=licence if name in OURS else ""))
          for name, digest in sorted(files.items())),
        *map(_entry, sources),
    ]  # fmt: skip
    kept = {entry["bom-ref"]: entry for entry in told["components"]}
    for entry in entries:
        before = kept.get(entry["bom-ref"])
        if before is not None and entry["name"] in files:
            before["hashes"] = entry["hashes"]
        elif before is None or before.get("hashes") != entry.get("hashes"):
            entry["bom-ref"] += f" ({len(kept)})" if before is not None else ""  # data of two adapters with one name
            kept[entry["bom-ref"]] = entry
    told["components"] = list(kept.values())
    told["dependencies"] = [{"ref": "bundle", "dependsOn": sorted(kept)}]
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


def _entry(component: Component) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": component.kind,
        "bom-ref": f"{component.role}/{component.name}",
        "name": component.name,
    }
    if component.version:
        entry["version"] = component.version
    if component.sha256:
        entry["hashes"] = [{"alg": "SHA-256", "content": component.sha256}]
    if component.licence:
        entry["licenses"] = licence_entries(component.licence)
    if component.kind == "library":
        entry["purl"] = f"pkg:pypi/{component.name}" + (f"@{component.version}" if component.version else "")
    properties = {"edgeft:role": component.role}
    if component.weights_sha256:
        properties["edgeft:sha256 of the weight files' sha256"] = component.weights_sha256
    if not component.licence:
        properties["edgeft:licence"] = "not stated"
    entry["properties"] = [{"name": name, "value": value} for name, value in properties.items()]
    return entry


def licence_entries(licence: str) -> list[dict[str, Any]]:
    """CycloneDX's form of a licence: an SPDX identifier, an expression of several, or else a name."""
    words = re.split(r" (?:AND|OR|WITH) |[()]", licence)
    if len(words) > 1 and all(not word.strip() or re.fullmatch(r"[A-Za-z0-9.+-]+", word.strip()) for word in words):
        return [{"expression": licence}]
    known = SPDX.get(licence.lower().removesuffix(" license"))
    return [{"license": {"id": known} if known else {"name": licence}}]


def _package(name: str, role: str) -> Component:
    """A Python package as installed here; without version where it is not."""
    kind: Kind = "application" if name == "edgeft" else "library"
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return Component(kind, name, role, licence="Apache-2.0" if name == "edgeft" else "")
    stated = next((metadata[key] for key in ("License-Expression", "License") if metadata[key]), "")
    if not stated or "\n" in stated:  # some packages put the whole text there
        classifiers = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License :: ")]
        stated = classifiers[0].rpartition(" :: ")[2] if classifiers else ""
    return Component(kind, name, role, version=metadata["Version"], licence=stated)


def model_licence(folder: Path) -> str:
    """The licence that a checkpoint folder states: README's header, config.json, else LICENSE's first line; or ""."""
    readme = folder / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        header = text.split("\n---", 1)[0] if text.startswith("---") else ""
        stated: dict[str, str] = {
            key: value.strip().strip("\"'") for key, value in re.findall(r"(?m)^(license\w*):(.*)$", header)
        }
        several = re.search(r"(?m)^license:\s*\n((?:\s*- .+\n?)+)", header)
        if several:
            return " OR ".join(SPDX.get(line.lower(), line) for line in re.findall(r"- *(\S+)", several[1]))
        if stated.get("license") == "other" and stated.get("license_name"):
            return stated["license_name"]
        if stated.get("license"):
            return stated["license"]
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if isinstance(config, dict) and isinstance(config.get("license"), str):
        return str(config["license"])
    for path in sorted(folder.glob("LICENSE*")):
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        title = " ".join([line for line in lines if line][:2])
        if title.startswith("Apache License Version 2.0"):
            return "Apache-2.0"
        return next((line for line in lines if line), "")
    return ""
