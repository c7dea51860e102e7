"""Which rows are scored at once, and what is the most that a group of them takes? (no torch: the planner asks too)"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from pydantic.dataclasses import dataclass


class Size(NamedTuple):
    """Tokens of one row: the whole of it, before its answer (0: nothing is asked), and those that train.

    `begun` are those that all rows of its file begin with.
    """

    tokens: int
    prompt: int
    trained: int
    begun: int = 0

    @property
    def new(self) -> int:
        """Tokens that are enough to give its answer and the end of it; 0 where nothing is asked."""
        return min(MAX_ANSWER_TOKENS, self.tokens - self.prompt + 1) if self.prompt else 0

    def cut(self, most: int) -> Size:
        """What is left of it in `most` tokens: the start of the prompt goes first."""
        excess = max(0, self.tokens - most)
        prompt, begun = max(min(1, self.prompt), self.prompt - excess), 0 if excess else self.begun
        return Size(self.tokens - excess, prompt, min(self.trained, most), begun)


@dataclass(frozen=True)
class Shape:
    """One group whose losses are computed at once: rows, the longest row, trained tokens of all."""

    rows: int
    tokens: int
    trained: int


@dataclass(frozen=True)
class Answers:
    """At most this is generated at once: tokens in the cache, of them of prompts, the longest prompt, rows."""

    tokens: int
    prompt_tokens: int
    longest_prompt: int
    rows: int


@dataclass(frozen=True)
class Scoring:
    """What scoring a job's rows once takes, in groups of at most `group_tokens`.

    `shapes` are the groups that may need most. Answers are generated for those rows alone that a pass over the given
    ones leaves open: which is known only then, so `answers` is what any choice of them stays within.
    """

    group_tokens: int
    rows: int
    shapes: tuple[Shape, ...]
    answers: Answers | None
    tokens: int  # padded tokens of all groups
    trained_tokens: int
    saved_tokens: int = 0  # of those: what all rows of a file begin with, read once where layers stay in memory
    written: Answers | None = None  # the answers that are written out in any case


def by_length(sizes: Sequence[Size], tokens: int) -> Iterator[list[int]]:
    """Indices of rows in groups of similar length, at most `tokens` padded tokens each (one row at least)."""
    group: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: sizes[index].tokens):
        if group and sizes[index].tokens * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def by_answer(sizes: Sequence[Size], tokens: int) -> Iterator[list[int]]:
    """Indices of rows that are answered together: rows x (longest prompt + new tokens + 1) is at most `tokens`.

    The new tokens are those of the group's own longest answer; one row at least, however long.
    """
    group: list[int] = []
    prompt = 0
    for index in sorted(range(len(sizes)), key=lambda index: (sizes[index].new, sizes[index].prompt)):
        prompt = max(prompt, sizes[index].prompt)
        if group and (prompt + sizes[index].new + 1) * (len(group) + 1) > tokens:
            yield group
            group, prompt = [], sizes[index].prompt
        group.append(index)
    if group:
        yield group


def scoring(files: Sequence[Sequence[Size]], tokens: int) -> Scoring:
    """What scoring each of `files` in groups of at most `tokens` takes."""
    shapes = [
        Shape(len(group), sizes[group[-1]].tokens, sum(sizes[i].trained for i in group))
        for sizes in files
        for group in by_length(sizes, tokens)
    ]
    asked = [size for sizes in files for size in sizes if size.new]
    orders = (lambda shape: shape.rows * shape.tokens, lambda shape: shape.trained, lambda shape: shape.tokens)
    most = {max(shapes, key=order) for order in orders} if shapes else set()
    return Scoring(
        group_tokens=tokens,
        rows=sum(map(len, files)),
        shapes=tuple(sorted(most, key=lambda shape: -shape.rows * shape.tokens)),
        answers=answers(asked, tokens) if asked else None,
        tokens=sum(shape.rows * shape.tokens for shape in shapes),
        trained_tokens=sum(shape.trained for shape in shapes),
        saved_tokens=sum(_saved(sizes) for sizes in files if sizes),
    )


def worth_sharing(tokens: int, rows: Sequence[int]) -> int:
    """So many tokens that rows of these lengths begin with; 0 where reading them once would save too little."""
    return tokens if tokens >= LEAST_SHARED and tokens * (len(rows) - 1) >= WORTH * max(rows) else 0


def _saved(sizes: Sequence[Size]) -> int:
    """Tokens that are not read because all rows begin alike."""
    begun = worth_sharing(min(size.begun for size in sizes), [size.tokens for size in sizes])
    return begun * (len(sizes) - 1)


def sampled(rows: int, most: int) -> list[int]:
    """Which of so many rows are taken, at most so many, spread evenly: the same ones every time."""
    count = min(rows, most)
    return [number * rows // count for number in range(count)]


def sampled_sizes(files: Sequence[Sequence[Size]], most: int) -> list[list[Size]]:
    """The rows of each file whose answers are written out."""
    found = [[sizes[i] for i in sampled(len(sizes), most) if sizes[i].prompt] for sizes in files]
    return [sizes for sizes in found if sizes]


def with_written(plain: Scoring, files: Sequence[Sequence[Size]], most: int) -> Scoring:
    """`plain` with what writing out the answers of so many rows of each file takes."""
    each = [answers(sizes, plain.group_tokens) for sizes in sampled_sizes(files, most)]
    return replace(plain, written=max(each, key=lambda found: found.tokens)) if each else plain


def answers(sizes: Sequence[Size], tokens: int) -> Answers:
    """The most that any choice of these rows can take, answered in groups of at most `tokens`."""
    each = [size.prompt + size.new for size in sizes]
    longest, new = max(size.prompt for size in sizes), max(size.new for size in sizes)
    together = max(max(each), min(tokens, (longest + new) * len(sizes)))
    share = max(size.prompt / (size.prompt + size.new) for size in sizes)
    return Answers(
        tokens=together,
        prompt_tokens=min(together, max(longest, round(together * share))),
        longest_prompt=longest,
        rows=max(1, min(len(sizes), tokens // (min(each) + 1))),
    )


def searched(plain: Scoring, files: Sequence[Sequence[Size]], longest: int, nodes: int) -> Scoring:
    """What scoring takes where answers are labels of at most `longest` tokens, with `nodes` beginnings in all.

    None is generated. What the pass along a row's own answer leaves open is read behind its prompt, of any choice of
    the rows: as much as a group holds at once.
    """
    begun = [[Size(size.prompt + longest - 1, 0, 1) for size in sizes if size.prompt] for sizes in files]
    each = [size.tokens for sizes in begun for size in sizes]
    if not each:
        return plain
    found, tokens, tree = scoring(begun, plain.group_tokens), plain.group_tokens, round(TREE_SHARE * nodes * len(each))
    most = (Shape(max(1, tokens // max(each)), max(each), tokens), Shape(1, max(tokens, max(each)), tokens))
    return replace(
        plain, shapes=(*plain.shapes, *most), answers=None,
        tokens=plain.tokens + round(PROMPT_READINGS * found.tokens) + tree, trained_tokens=plain.trained_tokens + tree,
    )  # fmt: skip


LEAST_SHARED = 8  # tokens of a beginning that is read once
WORTH = 4  # times the longest row that must be saved: to look whether it is understood, that row is read twice
MAX_ANSWER_TOKENS = 256  # of an answer that are compared
EVAL_TOKENS = 1024  # padded tokens scored at once where no plan says otherwise
# How often a prompt is read again where answers are labels, and how much of their tree is read behind it: the mean
# of the base (3.0 times, all of it) and the tuned model (0.4 times, next to none), measured on the example.
PROMPT_READINGS, TREE_SHARE = 1.7, 0.5
