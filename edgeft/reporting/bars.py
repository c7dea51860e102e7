"""How long is each piece of a memory bar? Shares of a row's width, for a page that draws them with HTML alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from edgeft.reporting.palette import Family, families, family
from edgeft.reporting.summary import Stage
from edgeft.units import show_bytes

FAR = 2.5  # times the longest bar: a limit beyond would leave the bars unreadable, and is only written
NARROW, WIDE = 300, 660  # pixels of a bar on a phone, on paper and a screen
LETTER = 6.6  # pixels of a label's letter


class Segment(NamedTuple):
    """One piece of a stacked bar, in bytes from zero."""

    term: str
    start: int
    length: int


class Piece(NamedTuple):
    """A segment as it is drawn, in percent of the row; `room`: where its name fits on it."""

    name: str
    size: str
    family: Family
    left: float
    width: float
    room: str


class Bar(NamedTuple):
    """A phase: its pieces, the marks of its high estimate, limit and measurement in percent, and all of it in words."""

    title: str
    said: str
    over: bool
    pieces: tuple[Piece, ...]
    expected: float
    high: float
    limit: float | None
    measured: float | None


class Group(NamedTuple):
    """Bars of one memory, which share a scale."""

    where: str
    bars: tuple[Bar, ...]
    families: tuple[Family, ...]


def segments(stage: Stage) -> list[Segment]:
    """The pieces of a phase's bar; the last one ends at the expected bytes.

    They are in the order of the terms, but pages of files come last: a limit holds for what lies before them.
    """
    found, start = [], 0
    for term in sorted(stage.terms, key=lambda term: family(term.name) == "files"):
        if term.bytes:
            found.append(Segment(term.name, start, term.bytes))
            start += term.bytes
    return found


def plain(term: str) -> str:
    """A term's name as a figure shows it: `height: loss` is what a step holds for a moment, at the loss."""
    kind, _, when = term.partition(": ")
    return f"temporary ({when})" if kind == "height" and when else term


def groups(stages: Sequence[Stage], names: dict[str, str]) -> list[Group]:
    """The bars of these phases, neighbours of one memory together; `names`: what a page calls the memories."""
    found = []
    for where, own in itertools.groupby(stages, key=lambda stage: stage.where):
        rows = list(own)
        end = scale(rows)
        kinds = families(piece.term for stage in rows for piece in segments(stage))
        found.append(Group(names.get(where, where), tuple(_bar(stage, end) for stage in rows), tuple(kinds)))
    return found


def scale(stages: Sequence[Stage]) -> float:
    """Bytes of a whole row: the longest bar and every limit that is not far beyond it."""
    highest = max(max(stage.high_bytes, stage.measured_bytes or 0) for stage in stages)
    near = [stage.limit_bytes for stage in stages if stage.limit_bytes and stage.limit_bytes <= FAR * highest]
    return 1.01 * max([highest, *near, 1])


def _bar(stage: Stage, end: float) -> Bar:
    def share(count: int | None) -> float | None:
        return None if count is None else round(100 * count / end, 2)

    limit = stage.limit_bytes if stage.limit_bytes and stage.limit_bytes <= end else None
    pieces = tuple(_piece(piece, end) for piece in segments(stage))
    return Bar(stage.title, said(stage), stage.over, pieces, share(stage.expected_bytes) or 0.0,
               share(stage.high_bytes) or 0.0, share(limit), share(stage.measured_bytes))  # fmt: skip


def _piece(piece: Segment, end: float) -> Piece:
    name, size = plain(piece.term), show_bytes(piece.length)
    share, letters = piece.length / end, LETTER * max(len(name), len(size)) + 8
    room = "always" if letters < NARROW * share else "wide" if letters < WIDE * share else ""
    return Piece(name, size, family(piece.term), round(100 * piece.start / end, 2), round(100 * share, 2), room)


def said(stage: Stage) -> str:
    """A phase's numbers in a line: `10.2 GiB expected, 11.8 at most of 14.0 GiB`."""
    of = f" of {show_bytes(stage.limit_bytes)}" if stage.limit_bytes else ""
    expected, high = (show_bytes(size - stage.file_bytes) for size in (stage.expected_bytes, stage.high_bytes))
    text = f"{expected} expected, {high} at most{of}"
    if stage.measured_bytes is not None:
        text += f", {show_bytes(stage.measured_bytes)} measured"
    if stage.file_bytes:
        text += f"; beside it {show_bytes(stage.file_bytes)} of a file's pages, which the system takes back"
    return text
