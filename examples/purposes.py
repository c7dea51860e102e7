"""How was examples/debian-purposes made? From the Debtags of a package index: what a package is used for.

    python examples/purposes.py Packages --out examples/debian-purposes

`Packages` is the plain index of section main, as `apt-helper cat-file` gives it from /var/lib/apt/lists. A package
with one `use::` tag is a row: its name and short description ask, the tag answers. Packages of one source stay in one
file, a description is asked once, and a purpose of fewer than LEAST rows is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LEAST = 20
TEST, VALID = 0.34, 0.08  # shares of the sources


class Package(NamedTuple):
    """What a row needs of an index entry."""

    name: str
    source: str
    description: str
    purpose: str

    def row(self) -> dict[str, str]:
        return {
            "prompt": f"Package: {self.name}\nDescription: {self.description}\nPurpose:",
            "completion": f" {self.purpose}",
        }

    def place(self) -> float:
        """A number from 0 to 1 that all packages of a source share."""
        return int(hashlib.sha256(self.source.encode()).hexdigest()[:8], 16) / 2**32


def packages(index: str) -> Iterator[Package]:
    """The entries with exactly one purpose."""
    for entry in index.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*(?:\n .*)*)", entry, re.M))
        tags = [tag.strip() for tag in fields.get("Tag", "").replace("\n", " ").split(",")]
        uses = [tag.removeprefix("use::") for tag in tags if tag.startswith("use::")]
        if len(uses) == 1 and uses != ["TODO"]:
            source = fields.get("Source", fields["Package"]).split(" ")[0]
            yield Package(fields["Package"], source, fields["Description"], uses[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("index", type=Path, help="the plain Packages file")
    parser.add_argument("--out", type=Path, required=True, help="folder of train.jsonl, valid.jsonl and test.jsonl")
    given = parser.parse_args()
    asked = {each.description: each for each in packages(given.index.read_text(encoding="utf-8"))}
    often = Counter(each.purpose for each in asked.values())
    found = sorted(
        (each for each in asked.values() if often[each.purpose] >= LEAST),
        key=lambda each: hashlib.sha256(each.name.encode()).hexdigest(),
    )
    given.out.mkdir(parents=True, exist_ok=True)
    for name, low, high in (("test", 0, TEST), ("valid", TEST, TEST + VALID), ("train", TEST + VALID, 1)):
        rows = [each.row() for each in found if low <= each.place() < high]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (given.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(name, len(rows), "rows,", len({row["completion"] for row in rows}), "purposes")


if __name__ == "__main__":
    main()
