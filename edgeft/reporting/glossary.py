"""Which words of a report have a sense of their own, and what do they mean? The table of docs/glossary.md."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from edgeft.documents import shipped_folder

ROW = re.compile(r"^\| ([^|`]+) \| (.+?) \| [^|]* \|$", re.MULTILINE)


class Word(NamedTuple):
    """A word, or several that belong together, and their sense."""

    names: str
    means: str

    def stands_in(self, text: str) -> bool:
        """Whether one of them is used, in the singular or the plural."""
        names = (re.escape(re.sub(r" \(.*\)", "", name).removesuffix("s")) for name in self.names.split(", "))
        return re.search(rf"\b(?:{'|'.join(names)})s?\b", text, re.IGNORECASE) is not None


@functools.cache
def glossary() -> tuple[Word, ...]:
    """Every word, in the page's order."""
    page = (shipped_folder("docs") / "glossary.md").read_text(encoding="utf-8")
    rows = [Word(names, means.replace("`", "")) for names, means in ROW.findall(page)]
    return tuple(row for row in rows if row.names != "word" and set(row.names) != {"-"})


def words_of(text: str) -> tuple[Word, ...]:
    """The words that a text uses."""
    return tuple(word for word in glossary() if word.stands_in(text))
