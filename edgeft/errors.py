"""What can a user do wrong, and which exit code does each kind of it give?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgeftError(Exception):
    """`where: problem`, a blank line and `hint: next step`; the CLI prints it without a traceback.

    `problem` may hold several lines: all problems of a kind are reported at once.
    """

    exit_code = 1
    told = False  # whether somebody was told already: of several processes one says it

    def __init__(self, where: object, problem: str, hint: str = "") -> None:
        self.where, self.problem, self.hint = str(where), problem, hint
        super().__init__(f"{where}: {problem}" + (f"\n\nhint: {hint}" if hint else ""))


class WrongStart(EdgeftError):
    """A command that must be started in another way (exit 2)."""

    exit_code = 2


class BadInput(EdgeftError):
    """A file, folder or setting that cannot be used (exit 1)."""


class DoesNotFit(EdgeftError):
    """No plan fits the memory budget, or a plan no longer fits the machine (exit 3)."""

    exit_code = 3
    need_bytes: int | None = None  # of the smallest candidate, where one was looked for


class ParityFailed(EdgeftError):
    """What was exported is not what was trained (exit 4)."""

    exit_code = 4


class QualityLost(ParityFailed):
    """What was exported is what was trained, but rounding has cost too much of it (exit 4); `rows` showed it."""

    rows = "validation"


class CacheLost(ParityFailed):
    """A KV cache of 8 bits gives other answers than the same bundle's full one (exit 4)."""


class MissingExtra(EdgeftError):
    """A package that this verb needs is not installed (exit 5)."""

    exit_code = 5


def of_exit_code(code: int, where: object, problem: str, hint: str = "") -> EdgeftError:
    """The error of the kind that ends with this exit code, as another process or run.py gave it; any other keeps it."""
    kinds = {kind.exit_code: kind for kind in (BadInput, DoesNotFit, ParityFailed, MissingExtra)}
    error = kinds.get(code, EdgeftError)(where, problem, hint)
    error.exit_code = code
    return error


SHOWN_NAMES = 16  # of what is known in one message: more are a wall


def did_you_mean(word: str, known: Iterable[str], listing: str = "") -> str:
    """`did you mean 'x'?`, or the sorted list of what is known when nothing is near: of many what lists them.

    A slip of the pen first, then what is part of a longer name that another tool has: max_seq_length, max_length.
    """
    names = sorted(known)
    parts = _parts(word)
    within = sorted((name for name in names if _parts(name) < parts), key=lambda name: (-len(_parts(name)), name))
    slips, near = (difflib.get_close_matches(word, names, n=1, cutoff=cutoff) for cutoff in (0.8, 0.6))
    found = next((each[0] for each in (slips, within, near) if each), None)
    if found:
        return f"did you mean {found!r}?"
    if len(names) > SHOWN_NAMES:
        return f"{listing} lists all {len(names)}" if listing else f"{len(names)} are known: {names[0]} to {names[-1]}"
    return "one of " + ", ".join(names)


def _parts(name: str) -> set[str]:
    return set(name.replace("-", "_").split("_"))
