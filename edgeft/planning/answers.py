"""What are a job's answers held to, and can the tokenizer and the data do with it?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from edgeft.data.dataset import Measured, hold_out
from edgeft.data.grammar import FREE, Grammar, read_grammar
from edgeft.data.labels import HINT, AskedAnswers, Label, make_labels, unknown_answers
from edgeft.data.samples import HELD_OUT_SHARE
from edgeft.data.tokenizer import TextTokenizer
from edgeft.errors import BadInput
from edgeft.settings.job import Job
from edgeft.targets.words import Words


class Held(NamedTuple):
    """What answers are held to: labels, a grammar, or neither; notes on it."""

    labels: tuple[Label, ...] = ()
    grammar: Grammar | None = None
    notes: tuple[str, ...] = ()


def read_held(job: Job, files: Mapping[str, Measured], tokenizer: TextTokenizer | None) -> Held:
    """What a job's answers are held to. Raises BadInput for what no device can be held to, with the reason."""
    if job.answers == "labels":
        return _read_labels(job, files, tokenizer)
    asked = files[job.data].asked if job.data and job.data in files else AskedAnswers()
    if job.answers == "free":
        return Held(notes=(asked.offer,) if asked.offer else ())
    if tokenizer is None:
        raise BadInput("answers", "a grammar is checked with the model's tokenizer and data, and there is none", FREE)
    return _read_grammar(job, asked, files, tokenizer)


def _read_labels(job: Job, files: Mapping[str, Measured], tokenizer: TextTokenizer | None) -> Held:
    if job.data is None or tokenizer is None:
        raise BadInput("answers", "labels are the completions of the training data, and there is none", HINT)
    answers = files[job.data].asked
    every = range(len(answers.asked))
    rows, held_out = (every, ()) if job.valid else hold_out(every, HELD_OUT_SHARE, job.seed)
    labels = make_labels(answers, rows, tokenizer, job.data)
    notes = unknown_answers(answers, held_out, labels, tokenizer, f"{job.data}, held out")
    for source in filter(None, (job.valid, job.test)):
        scored = files[source].asked
        notes += unknown_answers(scored, range(len(scored.asked)), labels, tokenizer, source)
    return Held(labels, None, tuple(notes))


def _read_grammar(job: Job, asked: AskedAnswers, files: Mapping[str, Measured], tokenizer: TextTokenizer) -> Held:
    """The grammar, written as most of the training data's answers are. Raises BadInput if none of them is in it."""
    words = Words(tokenizer)
    begins = Counter(_begin(tokenizer, path) for path in asked.found).most_common(1)
    found = read_grammar(job.answers, begins[0][0] if begins else "")
    counts = [words.within(each, asked) for each in found]
    best = counts.index(max(counts))
    grammar = words.checked(found[best])
    if asked.found and not counts[best]:
        wanted = next(iter(asked.found))[:-1]
        problem = f"allows none of the {len(asked.found):,} answers of {job.data}, as {tokenizer.decode(wanted)!r:.60}"
        raise BadInput("answers", f"{job.answers} {problem}", "white space before an answer counts; or " + FREE)
    notes = []
    for source in dict.fromkeys(filter(None, (job.data, job.valid, job.test))):
        other = files[source].asked
        if lost := len(other.found) - words.within(grammar, other):
            notes.append(f"{source}: {lost:,} of {len(other.found):,} different answers are not in the grammar")
    return Held((), grammar, tuple(notes))


def _begin(tokenizer: TextTokenizer, path: tuple[int, ...]) -> str:
    """The white space before an answer."""
    text = tokenizer.spell(list(path[:-1]))
    return text[: len(text) - len(text.lstrip())]
