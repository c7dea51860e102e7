"""Which files, and which of their rows, does a data source name? (no torch)

A source is a text: `a.jsonl`, `chats/*.jsonl`, a hub id (`ORG/NAME:CONFIG/SPLIT`), or several joined by " + ". Behind
each may stand `[prompt=question,completion=answer]`, its own columns by the known names, and `#500`, so many of its
rows, spread evenly over a file, the first ones of a hub dataset, or `#3x`, all of them three times. A path that is
there as it is written is no pattern.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from edgeft.documents import sha256_file, sha256_json
from edgeft.errors import BadInput, did_you_mean

T = TypeVar("T")
JOIN = " + "
KNOWN = ("prompt", "completion", "messages", "text", "system", "tools", "documents")
KINDS = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
SPLITS = {"data": ("train", "training"), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
SYNTAX = re.compile(r"(?P<place>.*?)(\[(?P<columns>[^\[\]]*=[^\[\]]*)\])?(#(?P<count>\d+)(?P<times>x)?)?", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """One file or hub data set of a source, and what is read of it."""

    place: str
    columns: Mapping[str, str] = field(default_factory=dict)  # a known name: what it is called here
    rows: int | None = None
    times: int = 1

    def chosen(self, values: Iterator[T]) -> Iterator[T]:
        """Those of the values that are read, in order."""
        if self.rows is None and self.times == 1:
            yield from values
            return
        held = list(values)
        count = len(held) if self.rows is None else min(self.rows, len(held))
        for _ in range(self.times):
            yield from (held[index * len(held) // count] for index in range(count))


def parts(source: str) -> list[Part]:
    """What a source names, in its order. Raises BadInput for one that names nothing."""
    return [part for text in _texts(source) for part in _parts(text.strip(), source)]


def files(source: str) -> list[Path]:
    """The files that a source names; a hub data set is none. Raises nothing: whoever reads it says what is wrong."""
    try:
        return [Path(part.place) for part in parts(source) if Path(part.place).is_file()]
    except BadInput:
        return []


def digest(source: str, of: Callable[[Path], str] = sha256_file) -> str:
    """The SHA-256 of a source's file, by `of`; of several the one of all theirs, in order; "" without any."""
    found = [of(path) for path in files(source)]
    return found[0] if len(found) == 1 else sha256_json(found) if found else ""


def places(source: str) -> list[str]:
    """What a source is made of, as it is named there: files, patterns, hub ids. Whether they exist is not looked at."""
    return [str(_parsed(text.strip())["place"]) for text in _texts(source)]


def names(source: str) -> str:
    """What a source reads, without the folders that it lies in."""
    return JOIN.join(Path(part.place).name if Path(part.place).is_file() else part.place for part in parts(source))


def by_role(
    data: Sequence[str], valid: Sequence[str] = (), test: Sequence[str] = (), columns: str | None = None
) -> dict[str, str | None]:
    """The source of each role; one folder as data stands for the files in it, where a role names no others.

    Raises BadInput as `splits`.
    """
    found = splits(data[0]) if len(data) == 1 else {}
    given = {"data": [found["data"]] if found else data, "valid": valid, "test": test}
    return {role: _joined(each, columns) or _joined([found[role]] if role in found else [], columns)
            for role, each in given.items()}  # fmt: skip


def _joined(sources: Sequence[str], columns: str | None) -> str | None:
    """One source of several, each with these columns where it names none. None of none."""
    return JOIN.join(each if columns is None else _with_columns(each, columns) for each in sources) or None


def splits(source: str) -> dict[str, str]:
    """The files of a folder by their roles: data, and valid and test where they are there; {} where it is no folder.

    Raises BadInput for a folder without training data, or with two files for one role.
    """
    folder = Path(source)
    if not folder.is_dir():
        return {}
    found: dict[str, str] = {}
    for role, names in SPLITS.items():
        there = [folder / f"{name}{kind}" for name in names for kind in KINDS if (folder / f"{name}{kind}").is_file()]
        if len(there) > 1:
            raise BadInput(source, f"holds {there[0].name} and {there[1].name}", "name the file to read")
        found |= {role: str(there[0])} if there else {}
    if "data" not in found:
        raise BadInput(
            source, "is a folder without train.jsonl (or .json, .csv, .parquet)", f"give {source}/NAME.jsonl"
        )
    return found


def _with_columns(source: str, columns: str) -> str:
    made = []
    for text in _texts(source):
        given = _parsed(text)
        count = f"#{given['count']}{given['times'] or ''}" if given["count"] else ""
        made.append(text if given["columns"] else f"{given['place']}[{columns}]{count}")
    return JOIN.join(made)


def _texts(source: str) -> list[str]:
    """What is joined in a source; a path that is there as it is written is one."""
    return [source] if Path(source).exists() else source.split(JOIN)


def _parsed(text: str) -> dict[str, str | None]:
    match = SYNTAX.fullmatch(text)
    if Path(text).exists() or match is None:
        return {"place": text, "columns": None, "count": None, "times": None}
    return match.groupdict()


def _parts(text: str, source: str) -> Iterator[Part]:
    given = _parsed(text)
    place, count = str(given["place"]), int(given["count"] or 1)
    if not place:
        raise BadInput(source, "names no file", "as in a.jsonl + b.jsonl#500")
    if count < 1:
        raise BadInput(source, f"asks for {count} rows of {place}", "leave it out")
    rows, times = (None, count) if given["times"] or not given["count"] else (count, 1)
    columns = _columns(given["columns"], source)
    places = [place]
    if not Path(place).exists() and glob.has_magic(place):
        places = sorted(glob.glob(place, recursive=True))
        if not places:
            raise BadInput(source, f"no file matches {place}", "look for it: a pattern is one of * ? [a-z]")
    yield from (Part(each, columns, rows, times) for each in places)


def _columns(text: str | None, source: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in (text or "").split(",") if text else ():
        known, _, own = (word.strip() for word in pair.partition("="))
        if known not in KNOWN or not own:
            hint = "as in prompt=question,completion=answer" if known in KNOWN else did_you_mean(known, KNOWN)
            if own in KNOWN and known not in KNOWN:
                hint = f"the known name comes first, your own behind it: {own}={known}"
            raise BadInput(source, f"columns: {pair!r} does not name one of " + ", ".join(KNOWN), hint)
        if known in found:
            raise BadInput(source, f"columns: {known} is given twice", "name each once")
        found[known] = own
    return found
