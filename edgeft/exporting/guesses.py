"""Do a fine-tune's answers copy so much that guessing what comes next saves time on the device?

A guess is what followed where the last tokens stood before, in the prompt or the answer; one pass checks several
(run.py). A row's own answer says what its passes would be: nothing is run for that. Where they promise enough, rows are
really answered with and without guesses, in turns; their passes decide, and the clock here must agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from edgeft.data.samples import Sample
from edgeft.data.scoring_groups import MAX_ANSWER_TOKENS
from edgeft.exporting.bundle import Guesses, Measurement, measurement_path
from edgeft.machines.runner import runner_module
from edgeft.progress import Progress

WORTH = 1.2  # times faster, at least
ROWS = 16  # that are answered
# What each more position of a pass takes, of a pass of one token: 2, 4, 8 and 16 tokens through ort-int4 of 135M take
# 1.15, 1.60, 2.54 and 4.16 times as long as one.
MORE = 0.22


class Answering(Protocol):
    """What a runtime must offer."""

    def answer(self, ids: list[int], most: int, *, guess: bool) -> list[int]: ...


class Passes(NamedTuple):
    """What writing answers takes behind their first tokens: one by one, and in passes that check guesses too."""

    tokens: int
    passes: int
    guessed: int  # tokens that the passes read beside their own first

    @property
    def worth(self) -> float:
        """How many times faster, by what passes cost."""
        return self.tokens / max(1.0, self.passes + MORE * self.guessed)


def passes_of(pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Passes:
    """Of answers to prompts, each with its guesses as run.py makes them."""
    runner, tokens, passes, read = runner_module(), 0, 0, 0
    for prompt, answer in pairs:
        text, guessed = runner.Copied(prompt), list[int]()
        for place, token in enumerate(answer[:-1], start=1):
            text.add(token)
            tokens += 1
            if guessed and guessed[0] == token:
                guessed = guessed[1:]
                continue
            guessed = text.guess(min(runner.LAST_POSITIONS - 1, len(answer) - place))
            passes, read = passes + 1, read + len(guessed)
    return Passes(tokens, passes, read)


def measured(
    artifact: Answering, rows: Sequence[Sample], progress: Progress, clock: Callable[[], float] = time.perf_counter
) -> tuple[Guesses | None, float | None]:
    """(what guesses save on rows, how many times faster whole answers were here; None: not worth looking).

    None where nothing is asked.
    """
    asked = [row for row in rows if row.prompt_tokens and len(row.ids) > row.prompt_tokens]
    if not asked:
        return None, None
    own = passes_of((row.prompt, row.ids[row.prompt_tokens :][:MAX_ANSWER_TOKENS]) for row in asked)
    if own.worth < WORTH:
        return Guesses(on=False, rows=len(asked), tokens=own.tokens, passes=own.passes, guessed=own.guessed), None
    asked, seconds, answers = asked[:ROWS], {False: 0.0, True: 0.0}, list[dict[bool, list[int]]]()
    for number, row in enumerate(asked):
        answers.append({})
        for guess in (False, True) if number % 2 else (True, False):
            started = clock()
            answers[-1][guess] = artifact.answer(row.prompt, MAX_ANSWER_TOKENS, guess=guess)
            seconds[guess] += clock() - started
        progress("guesses", number + 1, len(asked), {})
    found = passes_of((row.prompt, made[True]) for row, made in zip(asked, answers, strict=True))
    faster = seconds[False] / max(seconds[True], 1e-9)
    same = sum(made[True] == made[False] for made in answers) / len(asked)
    return Guesses(
        on=min(found.worth, faster) >= WORTH, rows=len(asked), tokens=found.tokens, passes=found.passes,
        guessed=found.guessed, same_answers=same,
    ), faster  # fmt: skip


def note(bundle: Path, times_faster: Sequence[float | None]) -> None:
    """Put what the clock said beside a bundle, where it was asked: the bundle itself says nothing of this machine."""
    path = measurement_path(bundle.resolve())
    if times_faster and times_faster[-1] is not None:
        changes = {"guesses_times_faster": round(times_faster[-1], 3)}
        Measurement.read(path).model_copy(update=changes).write(path)
