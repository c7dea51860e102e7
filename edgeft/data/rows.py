"""Which rows does a data file hold, which texts are they, and which of them cannot be used? (no torch)"""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from edgeft.data.conversation import COLUMNS, PromptFormat, Row, to_row
from edgeft.data.json_values import parse_json
from edgeft.data.sources import parts
from edgeft.data.tokenizer import TEMPLATE, TextTokenizer
from edgeft.errors import BadInput
from edgeft.machines.extras import missing

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*(/[\w.\[\]:%-]+)?)?")  # ORG/NAME:CONFIG/SPLIT
LONGEST_LINE = 64 * 2**20  # characters: what is longer is no row but a file without line ends


def read_rows(source: str, tokenizer: TextTokenizer, most: int | None = None) -> list[Row]:
    """All rows of a data file, or its first `most`. Raises as `each_row`."""
    return list(each_row(source, tokenizer, most))


def each_row(source: str, tokenizer: TextTokenizer, most: int | None = None) -> Iterator[Row]:
    """The rows of a data file one by one; when they have ended, BadInput if any could not be used.

    It names the file and the first broken lines, all of them counted.
    """
    hint = "a row is one of " + ", ".join(COLUMNS) + "; names of your own: --columns prompt=YOURS,completion=YOURS"
    kinds: set[tuple[PromptFormat, bool]] = set()
    broken: list[str] = []
    count = 0
    for place, value, columns in islice(_each_value(source), most):
        try:
            if isinstance(value, Exception):
                raise ValueError(str(value))
            row = to_row(value, tokenizer, columns)
        except ValueError as problem:
            broken.append(f"{place}: {problem}")
            continue
        except BadInput as problem:
            if problem.where != TEMPLATE:
                raise
            broken.append(f"{place}: the chat template says: {problem.problem}")
            continue
        count += 1
        kinds.add((row.format, row.has_prompt))
        yield row
    if broken:
        more = f"\n... and {len(broken) - 5} more" if len(broken) > 5 else ""
        said = f"{len(broken)} of {len(broken) + count} rows cannot be used\n" + "\n".join(broken[:5]) + more
        raise BadInput(source, said, hint)
    if not count:
        raise BadInput(source, "there are no rows in it", hint)
    if len(kinds) > 1:
        hint = "use chats, prompts with completions, or texts throughout; a system message makes a chat of a prompt"
        raise BadInput(source, "rows of different kinds are mixed", hint)


def _each_value(source: str) -> Iterator[tuple[str, Any, Mapping[str, str]]]:
    """(where, row as a dict or the error that it is, its columns by known names) of all that a source names."""
    found = parts(source)
    for part in found:
        before = f"{Path(part.place).name}, " if len(found) > 1 else ""
        for place, value in part.chosen(_read_values(part.place, part.rows)):
            yield f"{before}{place}", value, part.columns


def _read_values(source: str, most: int | None = None) -> Iterator[tuple[str, Any]]:
    """(where, row as a dict or the error that it is). Line numbers count from 1, a csv header included.

    Of a hub dataset the first `most`; of a file all, whoever wants fewer chooses among them.
    """
    path = Path(source)
    name = path.name.removesuffix(".gz")
    if not path.exists():
        if not HUB_ID.fullmatch(source) or re.fullmatch(r"\.[A-Za-z]\w*", path.suffix):
            raise BadInput(source, "no such data file", "give a .jsonl, .csv or .parquet file, or a hub dataset id")
        yield from _numbered("row", _hub_rows(source, most))
    elif path.is_dir():
        raise BadInput(source, "is a folder", "give one data file; as --data a folder with train.jsonl is one")
    elif name.endswith(".parquet"):
        yield from _numbered("row", _parquet_rows(path))
    elif name.endswith((".jsonl", ".json", ".csv")):
        try:
            opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
                yield from _csv_rows(lines) if name.endswith(".csv") else _json_rows(source, lines)
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as problem:
            raise BadInput(source, f"cannot be read: {problem}", "save it as UTF-8") from None
        except OSError as problem:
            raise BadInput(source, f"cannot be read: {problem.strerror or problem}") from None
    else:
        raise BadInput(source, f"unknown kind of data file {path.suffix!r}", "use .jsonl, .jsonl.gz, .csv or .parquet")


def _numbered(what: str, values: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{what} {number}", value) for number, value in enumerate(values, start=1))


def _json_rows(source: str, lines: TextIO) -> Iterator[tuple[str, Any]]:
    """The values of a file of one JSON object per line, or of one array of them."""
    number, begun = 0, False
    while line := lines.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            problem = f"line {number} is longer than {LONGEST_LINE // 2**20} million characters"
            raise BadInput(source, problem, "write one row on each line")
        if not line.strip():
            continue
        if not begun and line.lstrip().startswith("["):
            yield from _numbered("row", iter(_array(source, line + lines.read())))
            return
        if not begun and line.strip() == "{":
            raise BadInput(
                source, "holds an object on several lines", "write one row on each line, or an array of rows"
            )
        begun = True
        yield f"line {number}", parse_json(line)


def _array(source: str, text: str) -> list[Any]:
    value = parse_json(text)
    if isinstance(value, list):
        return value
    raise BadInput(source, f"starts as one array of rows, and is {value}", "write one row on each line, or mend it")


def _csv_rows(lines: TextIO) -> Iterator[tuple[str, Any]]:
    """The values of a csv file by its header; a line with other cells than it has is an error."""
    csv.field_size_limit(2**31 - 1)  # the module's own limit is 128 KiB: a document can be longer
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as problem:
            unclosed = "a quote is opened and not closed as it should be"
            yield f"line {start}", ValueError(f"{unclosed} ({problem}): double a quote inside a quoted cell")
            return
        place = f"line {reader.line_num}"
        if header is None:
            header = cells
            if twice := sorted({name for name in header if header.count(name) > 1}):
                yield place, ValueError(f"the header names {', '.join(map(repr, twice))} twice")
                return
        elif cells and len(cells) != len(header):
            yield place, ValueError(f"{len(cells)} cells, the header names {len(header)}: quote a cell with commas")
        elif cells:
            yield place, dict(zip(header, cells, strict=True))


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise missing(path, "reading parquet needs pyarrow", "data") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as problem:
        raise BadInput(path, f"cannot be read: {problem}") from None


def _hub_rows(source: str, most: int | None) -> Iterator[Any]:
    """The rows of a hub dataset, ORG/NAME:CONFIG/SPLIT; of its first `most` no more than those is fetched."""
    try:
        import datasets
    except ImportError:
        what = "is no file; reading a hub dataset needs the package datasets"
        raise missing(source, what, "data", "give a file") from None
    name, _, part = source.partition(":")
    config, _, split = part.partition("/")
    options: dict[str, Any] = {"name": config} if config else {}
    options |= {"streaming": True} if most else {}
    try:
        found = datasets.load_dataset(name, split=split or "train", **options)
        yield from islice(found, most)
    except Exception as problem:  # datasets raises its own, huggingface_hub's and network errors
        hint = "a dataset of several is named ORG/NAME:CONFIG, another split than train ORG/NAME:CONFIG/SPLIT"
        raise BadInput(source, f"is no file and could not be loaded as a hub dataset: {problem}", hint) from None
