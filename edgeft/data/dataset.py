"""What does a data file hold in tokens, what of it trains, and what does not? (no torch: the planner reads data too)"""

from __future__ import annotations

import functools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from edgeft.data.beginning import Common
from edgeft.data.conversation import COLUMNS, PromptFormat, Row
from edgeft.data.labels import AskedAnswers
from edgeft.data.rows import each_row, read_rows
from edgeft.data.samples import IGNORED, Sample, each_sample, hold_out, to_samples
from edgeft.data.scoring_groups import Size
from edgeft.data.sources import digest, files
from edgeft.data.tokenizer import TextTokenizer
from edgeft.documents import Strict

__all__ = [
    "COLUMNS", "IGNORED", "PromptFormat", "Row", "Sample", "TextTokenizer", "hold_out", "read_rows", "to_samples",
]  # fmt: skip
QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99)
LONGEST_SHOWN = 40  # tokens of a prompt or answer that are shown at each of its ends


class Lengths(Strict):
    """Sample lengths of one data file, in tokens, after cutting to `max_length`, and what of its rows is not used."""

    path: str
    sha256: str
    rows: int
    longest: int
    median: int
    mean: float
    tokens: int
    longest_trained: int
    trained_tokens: int = Field(0, description="tokens that are trained, of all rows")
    cut_rows: int = 0
    untrained_rows: int = Field(0, description="rows without a token to train on, as max_length cuts them")
    answers: int = Field(0, description="answers that train, of all rows: several in a chat; 0 where nothing is asked")
    remarks: dict[str, int] = Field(
        default_factory=dict, description="what of a row is not used, does not train or was added, and in how many rows"
    )
    highest_id: int = Field(0, description="the highest token id in it: the embedding must have a row for it")
    quantiles: dict[str, int] = Field(default_factory=dict)  # share of the samples: tokens that it has at most

    @property
    def line(self) -> str:
        """The file in one line."""
        answers = f" in {self.answers:,} answers" if self.answers else ""
        cut = f", {self.cut_rows:,} rows are cut" if self.cut_rows else ""
        return f"{self.rows:,} rows, {self.trained_tokens:,} of {self.tokens:,} tokens train{answers}{cut}"

    @property
    def said(self) -> list[str]:
        """The remarks as sentences."""
        return [f"{self.path}: {rows:,} of {self.rows:,} rows: {text}" for text, rows in self.remarks.items()]


def read_samples(
    source: str, tokenizer: TextTokenizer, max_length: int | None, most: int | None = None
) -> list[Sample]:
    """The samples of a data file, or of its first `most` rows; texts are dropped as they are encoded.

    Raises what `read_rows` raises.
    """
    return [sample for sample, _ in each_sample(each_row(source, tokenizer, most), tokenizer, max_length)]


class Measured(NamedTuple):
    """What one reading of a data file tells: lengths, row for row what scoring asks for, the answers it asks for."""

    lengths: Lengths
    sizes: tuple[Size, ...]
    asked: AskedAnswers


def measure_lengths(source: str, tokenizer: TextTokenizer, max_length: int | None = None) -> Lengths:
    """Row count and token lengths of a data file; every row is tokenised. Raises what `read_rows` raises."""
    return measure(source, tokenizer, max_length).lengths


def measure(source: str, tokenizer: TextTokenizer, max_length: int | None = None) -> Measured:
    """All that a plan asks of a data file; every row is tokenised. Raises what `read_rows` raises."""
    found = files(source)
    if not found:
        return _measured(source, tokenizer, max_length)
    return _measured_once(source, str(tokenizer.folder), max_length, *_stamps(found, tokenizer.folder))


def _stamps(found: Sequence[Path], folder: Path) -> tuple[tuple[int, int, int], ...]:
    """By which a file or a tokenizer that has changed is told from the one that was read."""
    stats = [file.stat() for file in (*found, *sorted(folder.glob("*.j*"))) if file.is_file()]
    return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)


@functools.lru_cache(maxsize=8)  # a plan that is made twice, to score its layers first, reads its data once
def _measured_once(source: str, folder: str, max_length: int | None, *stamps: tuple[int, int, int]) -> Measured:
    return _measured(source, TextTokenizer(Path(folder)), max_length)


def _measured(source: str, tokenizer: TextTokenizer, max_length: int | None) -> Measured:
    remarks: Counter[str] = Counter()
    asked, common = AskedAnswers(), Common()
    sizes, cut, answers, highest = list[Size](), 0, 0, 0
    for sample, row in each_sample(each_row(source, tokenizer), tokenizer, max_length, remarks):
        sizes.append(sample.size)
        if sample.trained_tokens:
            common.see(sample)
        highest = max(highest, max(sample.packed_ids))
        cut += sample.cut_tokens > 0
        answers += len(row.trained) if row.has_prompt else 0
        asked.add(sample, row, tokenizer.stop_ids)
    lengths, trained = [size.tokens for size in sizes], [size.trained for size in sizes]
    found = Lengths(
        path=source,
        sha256=digest(source),
        rows=len(lengths),
        longest=max(lengths),
        median=int(statistics.median(lengths)),
        mean=round(statistics.fmean(lengths), 2),
        tokens=sum(lengths),
        longest_trained=max(trained),
        trained_tokens=sum(trained),
        cut_rows=cut,
        untrained_rows=trained.count(0),
        answers=answers,
        remarks=dict(remarks.most_common()),
        highest_id=highest,
        quantiles={str(share): sorted(lengths)[math.ceil(share * len(lengths)) - 1] for share in QUANTILES},
    )
    return Measured(found, tuple(size._replace(begun=common.tokens) for size in sizes), asked)


class Token(Strict):
    """One token of a shown row."""

    id: int
    text: str
    trained: bool


class Shown(Strict):
    """One row as tokens."""

    prompt_tokens: int
    cut_tokens: int
    tokens: tuple[Token, ...]


class DataReport(Strict):
    """What `edgeft data` says of a file."""

    lengths: Lengths
    stop_ids: tuple[int, ...] = Field(description="ids at which an answer ends")
    offer: str = Field("", description="what its answers could be held to, where they are few")
    rows: tuple[Shown, ...]


def report_data(source: str, tokenizer: TextTokenizer, max_length: int | None = None, rows: int = 3) -> DataReport:
    """Counts and remarks of a data file, and its first rows token by token. Raises what `read_rows` raises."""
    lengths, _, asked = measure(source, tokenizer, max_length)
    shown = read_samples(source, tokenizer, max_length, min(rows, lengths.rows)) if rows else []
    return DataReport(
        lengths=lengths, stop_ids=tuple(tokenizer.stop_ids), offer=asked.offer,
        rows=tuple(_shown(each, tokenizer) for each in shown),
    )  # fmt: skip


def _shown(sample: Sample, tokenizer: TextTokenizer) -> Shown:
    tokens = []
    for id, label, text in zip(sample.ids, sample.labels, _texts(sample.ids, tokenizer), strict=True):
        tokens.append(Token(id=id, text=text, trained=label != IGNORED))
    return Shown(prompt_tokens=sample.prompt_tokens, cut_tokens=sample.cut_tokens, tokens=tuple(tokens))


def _texts(ids: Sequence[int], tokenizer: TextTokenizer) -> list[str]:
    """What each token adds to the text, special ones spelled out; a character of several tokens is the last one's."""
    texts, before, start = [], "", 0
    for end in range(1, len(ids) + 1):
        after = tokenizer.spell(ids[start:end])
        if after.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(after.removeprefix(before))
        before = after
        if end - start > LONGEST_SHOWN:  # spelling grows with the square of it
            start, before = end, ""
    return texts


def data_text(report: DataReport, mark: tuple[str, str] = ("\u27e6", "\u27e7")) -> str:
    """The report as text; what trains stands between the marks."""
    found = report.lengths
    lines = [f"{found.path}: {found.line}"]
    lines.append(
        f"a row has {found.median} tokens (median), at most {found.longest}; at most {found.longest_trained} train"
    )
    if found.untrained_rows:
        lines.append(f"{found.untrained_rows:,} rows are cut before their first token to train on")
    lines += [f"{rows:,} rows: {text}" for text, rows in found.remarks.items()]
    lines += [report.offer] if report.offer else []
    for number, row in enumerate(report.rows, start=1):
        cut = f", {row.cut_tokens} cut" if row.cut_tokens else ""
        lines += ["", f"row {number}, {len(row.tokens)} tokens{cut}; what trains is between {mark[0]} and {mark[1]}:"]
        lines.append(_marked(row.tokens, mark))
    return "\n".join(lines)


def _marked(tokens: Sequence[Token], mark: tuple[str, str]) -> str:
    """The text of tokens, runs that train between marks, long runs without their middle."""
    parts, start = [], 0
    while start < len(tokens):
        end = next((i for i in range(start, len(tokens)) if tokens[i].trained != tokens[start].trained), len(tokens))
        texts = [token.text for token in tokens[start:end]]
        left_out = len(texts) - 2 * LONGEST_SHOWN
        if left_out > 0:
            texts = [*texts[:LONGEST_SHOWN], f" ... {left_out} tokens ... ", *texts[-LONGEST_SHOWN:]]
        text = "".join(texts)
        parts.append(f"{mark[0]}{text}{mark[1]}" if tokens[start].trained else text)
        start = end
    return "".join(parts)
