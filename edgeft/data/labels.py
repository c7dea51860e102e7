"""Which few answers does a data set ask for, again and again, and can a device be held to them? (no torch)"""

from __future__ import annotations

import json
import statistics
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import Field

from edgeft.data.conversation import Row
from edgeft.data.samples import Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.documents import Strict
from edgeft.errors import BadInput

FILE = "labels.json"  # in a bundle
MOST_LABELS = 1000
MOST_SHARE = 0.5  # of the rows: what is asked for once is no label but a text
OFFERED, ROWS_EACH = 200, 5  # labels are offered where there are at most so many, each asked for by so many rows
HINT = "leave answers=labels out (--set answers=free): the device then writes what the model says"
NO_LABEL = -1
FEWEST_TO_CALIBRATE = 20  # validation rows: fewer say nothing of a temperature of probabilities
MOST_SHOWN = 40  # characters of a label in a line of a plan


class Label(Strict):
    """One of the answers: its text without white space around it, its tokens with the end of an answer behind them."""

    text: str
    ids: tuple[int, ...]
    rows: int = Field(description="of the training data that ask for it")


@dataclass
class AskedAnswers:
    """What the rows of a file ask for: distinct answers with their rows, as long as they are few.

    `spelled` are the texts of one answer's tokens, the first two: a tokenizer that makes the same of two texts cannot
    tell them apart. `asked` is each row's answer by its place in `found`, NO_LABEL where it has none that is whole.
    """

    found: dict[tuple[int, ...], int] = field(default_factory=dict)
    spelled: list[set[str]] = field(default_factory=list)
    asked: array[int] = field(default_factory=lambda: array("i"))
    too_many: bool = False

    def add(self, sample: Sample, row: Row, stop_ids: Sequence[int]) -> None:
        """One more row."""
        answer = whole_answer(sample, stop_ids)
        if answer is None or self.too_many:
            self.asked.append(NO_LABEL)
            return
        if answer not in self.found:
            self.too_many = len(self.found) >= MOST_LABELS
            if self.too_many:
                self.asked.append(NO_LABEL)
                return
            self.spelled.append(set())
        place = self.found.setdefault(answer, len(self.found))
        if len(self.spelled[place]) < 2:
            self.spelled[place].add(row.text[row.border :])
        self.asked.append(place)

    @property
    def repeats(self) -> bool:
        """Whether the rows ask for the same few answers again and again."""
        counts = Counter(self.asked)
        whole = NO_LABEL not in counts and not self.too_many
        return whole and 2 <= len(counts) <= OFFERED and statistics.median(counts.values()) >= ROWS_EACH

    @property
    def offer(self) -> str:
        """One line for a user whose rows do that; else nothing."""
        if not self.repeats:
            return ""
        asked = f"{len(self.asked):,} rows ask for {len(set(self.asked))} different answers"
        return f"{asked}: --set answers=labels, of plan and build, holds the device to them, each with its probability"


def whole_answer(sample: Sample, stop_ids: Sequence[int]) -> tuple[int, ...] | None:
    """The tokens of a row's answer with the one that ends it; None where nothing is asked, or the end was cut."""
    if not sample.has_prompt:
        return None
    ids = sample.ids[sample.prompt_tokens :]
    end = next((at for at, token in enumerate(ids) if token in stop_ids), None)
    return None if end is None else tuple(ids[: end + 1])


def make_labels(answers: AskedAnswers, rows: Sequence[int], tokenizer: TextTokenizer, source: str) -> tuple[Label, ...]:
    """The answers that `rows` ask for, as labels, the most frequent first.

    The same text in other tokens, as some tokenizers write it behind another prompt, is one label: its most frequent
    tokens. Raises BadInput for what no device can be held to.
    """
    if answers.too_many:
        problem = f"more than {MOST_LABELS:,} different answers are asked for, labels are at most so many"
        raise BadInput(source, problem, HINT)
    counts = Counter(answers.asked[row] for row in rows)
    if lost := counts.pop(NO_LABEL, 0):
        problem = f"{lost:,} of {len(rows):,} rows have no whole answer: they ask for none, or max_length cuts it"
        texts = "say what is asked and answered, as in --columns prompt=text,completion=label; or "
        raise BadInput(source, problem, f"{texts if lost == len(rows) else ''}raise max_length; or {HINT}")
    paths = list(answers.found)
    by_text: dict[str, list[int]] = {}
    for place, _ in counts.most_common():
        by_text.setdefault(tokenizer.decode(paths[place][:-1]).strip(), []).append(place)
    problems = [*_unclear(answers, by_text), *_number_problem(len(by_text), len(rows))]
    if problems:
        raise BadInput(source, "\n".join(problems), HINT)
    return tuple(
        Label(text=text, ids=paths[places[0]], rows=sum(counts[place] for place in places))
        for text, places in by_text.items()
    )


def _number_problem(labels: int, rows: int) -> list[str]:
    if labels < 2:
        return [f"its rows ask for {labels} answer: there is nothing to choose"]
    if labels > MOST_SHARE * rows:
        return [f"{rows:,} rows ask for {labels:,} different answers: labels are at most half as many as rows"]
    return []


def _unclear(answers: AskedAnswers, by_text: dict[str, list[int]]) -> list[str]:
    """A line for each label that is empty, or that something else is taken for."""
    lines = []
    for text, places in by_text.items():
        spelled = set().union(*(answers.spelled[place] for place in places))
        if not text:
            lines.append(f"an answer is empty: {_shown(spelled)}")
        elif any(len(answers.spelled[place]) > 1 for place in places):
            lines.append(f"{_shown(spelled)} tokenise alike: the model cannot tell them apart")
        elif len(spelled) > 1:
            lines.append(f"{_shown(spelled)} differ in white space or special tokens alone")
    return lines[:5]


def _shown(texts: set[str]) -> str:
    return " and ".join(f"{text!r:.60}" for text in sorted(texts)[:2])


def labels_line(labels: Sequence[Label]) -> str:
    """The labels in one line."""
    tokens, rows = [len(label.ids) for label in labels], [label.rows for label in labels]
    most = ", ".join(_in_a_line(label.text) for label in labels[:3])
    line = f"one of {len(labels):,} labels, {min(tokens)} to {max(tokens)} tokens with the end, asked for by "
    return f"{line}{min(rows):,} to {max(rows):,} rows ({most}, ...)"


def _in_a_line(text: str) -> str:
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= MOST_SHOWN else f"{shown[: MOST_SHOWN - 3]}..."


def unknown_answers(
    answers: AskedAnswers, rows: Sequence[int], labels: Sequence[Label], tokenizer: TextTokenizer, source: str
) -> list[str]:
    """A line where some of the rows that are scored ask for what is no label: nothing can answer them right."""
    if answers.too_many:
        return [f"{source}: more than {MOST_LABELS:,} different answers are asked for, {len(labels):,} are labels"]
    texts = {label.text for label in labels}
    known = {place for path, place in answers.found.items() if tokenizer.decode(path[:-1]).strip() in texts}
    unknown = sum(answers.asked[row] not in known for row in rows)
    if not unknown:
        return []
    return [f"{source}: {unknown:,} of {len(rows):,} rows ask for what is no label, they are scored as wrong"]


def tree_size(labels: Sequence[Label]) -> tuple[int, int]:
    """(tokens of the longest label, distinct beginnings of all that something follows)."""
    beginnings = {label.ids[:end] for label in labels for end in range(len(label.ids))}
    return max((len(label.ids) for label in labels), default=0), len(beginnings)


def labels_file(labels: Sequence[Label]) -> str:
    """The file of a bundle that run.py reads."""
    entries = [json.dumps({"text": label.text, "ids": label.ids}) for label in labels]
    return '{"labels": [\n' + ",\n".join(entries) + "\n]}\n"
