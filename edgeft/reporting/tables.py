"""How do tables and lines fit a screen? No word or number is broken: what has no room in a row goes below it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

LEAST_PROSE = 28  # characters: of a column whose text goes over several lines; one that has fewer goes below its row
# whether heads stand in one line each, and spaces between columns: the first that has room
WAYS = ((True, 3), (False, 3), (False, 2))
INDENT = "    "  # of what goes below its row
NUMBER_AND_UNIT = re.compile(r"(?<=\d) (?=(?:[KMGT]?i?B|s|min|h|d|rows|points|nats|tok/s|tokens)\b)")


class ScreenTable:
    """Rows under a head, as wide as the screen allows: the first column is the rows' name, and stays.

    `prose`: columns whose text goes over several lines. `left`: those that begin at the left; a prose one does too.
    `below`: what goes below its row first where there is no room, with the word that stands before it there; then the
    last ones go, under their own names.
    """

    def __init__(
        self, *columns: str, title: str = "", prose: Sequence[str] = (), left: Sequence[str] = (),
        below: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.columns, self.title, self.caption = columns, title, ""
        self.prose = [columns.index(name) for name in prose]
        self.left = [0, *self.prose, *(columns.index(name) for name in left)]
        self.below = {columns.index(name): word for name, word in (below or {}).items()}
        self.rows: list[list[str]] = []

    def add_row(self, *cells: str | Text) -> None:
        """One more row, a cell for each column."""
        found = [cell.plain if isinstance(cell, Text) else cell for cell in cells]
        self.rows.append(found + [""] * (len(self.columns) - len(found)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield from (Text(line, style=style, no_wrap=True, overflow="ignore") for line, style in
                    self.lines(options.max_width))  # fmt: skip

    def lines(self, width: int) -> Iterator[tuple[str, str]]:
        """Each line on a screen of so many columns, and its style."""
        kept, widths, gap = self._placed(width)
        across = sum(widths) + gap * (len(kept) - 1)
        moved = [i for i in range(len(self.columns)) if i not in kept]
        yield from ((line, "italic") for line in _wrapped(self.title, width))
        yield "", ""
        heads = [_head(self.columns[i], each) for i, each in zip(kept, widths, strict=True)]
        tallest = max(map(len, heads))
        heads = [[""] * (tallest - len(head)) + head for head in heads]
        yield from ((line, "bold") for line in self._beside(kept, heads, widths, gap))
        yield f" {'─' * across} ", ""
        for row in self.rows:
            cells = [_wrapped(row[i], each) if i in self.prose else row[i].split("\n")
                     for i, each in zip(kept, widths, strict=True)]  # fmt: skip
            yield from ((line, "") for line in self._beside(kept, cells, widths, gap))
            told = "; ".join(filter(None, (self._told(i, row[i]) for i in moved)))
            yield from ((INDENT + line, "") for line in _wrapped(told, width - len(INDENT)) if told)
        yield "", ""
        yield from ((line, "italic") for line in _wrapped(self.caption, width))

    def _told(self, column: int, cell: str) -> str:
        """What a row says of a column that has no room."""
        word = self.below.get(column, self.columns[column])
        return f"{word} {cell}".strip() if cell.strip("- ") else ""

    def _placed(self, width: int) -> tuple[list[int], list[int], int]:
        """(columns that have room side by side, their widths, spaces between them)."""
        kept = list(range(len(self.columns)))
        leaving = [*self.below, *(i for i in reversed(kept[1:]) if i not in self.below)]
        while True:
            for one_line, gap in WAYS:
                widths = {i: self._natural(i, one_line=one_line) for i in kept}
                prose = [i for i in kept if i in self.prose]
                fixed = sum(own for i, own in widths.items() if i not in prose)
                room = width - 2 - gap * (len(kept) - 1) - fixed
                each = room // len(prose) if prose else 0
                if room >= 0 and all(each >= min(widths[i], max(LEAST_PROSE, self._word(i))) for i in prose):
                    return kept, [min(own, each) if i in prose else own for i, own in widths.items()], gap
            if not leaving:
                return kept, [*widths.values()], gap
            kept.remove(leaving.pop(0))

    def _natural(self, column: int, *, one_line: bool) -> int:
        """The width of a column of which no cell is broken, nor its head unless it may be between words."""
        cells = (line for row in self.rows for line in row[column].split("\n"))
        head = self.columns[column]
        return max([cell_len(head) if one_line else _longest_word(head), *map(cell_len, cells)])

    def _word(self, column: int) -> int:
        return max([_longest_word(self.columns[column]), *(_longest_word(row[column]) for row in self.rows)])

    def _beside(
        self, kept: Sequence[int], cells: Sequence[Sequence[str]], widths: Sequence[int], gap: int
    ) -> Iterator[str]:
        """The lines of cells that stand side by side."""
        for number in range(max(map(len, cells))):
            parts = []
            for i, lines, width in zip(kept, cells, widths, strict=True):
                text = lines[number] if number < len(lines) else ""
                space = " " * (width - cell_len(text))
                parts.append(text + space if i in self.left else space + text)
            yield f" {(' ' * gap).join(parts)} "


class Line:
    """A line of text that goes on indented where the screen is narrower; a number keeps its unit."""

    def __init__(self, text: str, indent: str = "") -> None:
        self.text, self.indent = text, indent

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line in _wrapped(self.text, options.max_width, self.indent):
            yield Text(line, no_wrap=True, overflow="ignore")


def _longest_word(text: str) -> int:
    return max(map(cell_len, re.split(r"[ \n]+", _bound(text))))


def _bound(text: str) -> str:
    """A text whose numbers keep their units."""
    return NUMBER_AND_UNIT.sub("\N{NO-BREAK SPACE}", text)


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """The lines of a text, broken between words, all but the first indented; nothing of none."""
    wrap = textwrap.TextWrapper(
        max(1, width), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
    lines = [line for part in text.split("\n") for line in wrap.wrap(_bound(part))]
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _head(name: str, width: int) -> list[str]:
    """A column's head in as few lines as its cells are wide: a head makes no column wider than its longest word."""
    return _wrapped(name, width) or [""]
