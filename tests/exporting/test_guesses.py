"""Are answers with guesses those without, in fewer passes, and are guesses on only where they pay?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundles import bundle, loose, reseal, script, some_ids

from edgeft.data.samples import Sample
from edgeft.exporting.bundle import Bundle
from edgeft.exporting.guesses import MORE, ROWS, WORTH, measured, passes_of
from edgeft.machines.runner import runner_module
from edgeft.progress import silent

run = runner_module()
NAMES = ("ort-fp32", "ort-int4")


def repeating(count: int) -> list[list[int]]:
    """Prompts that say some tokens two and a half times."""
    ids = some_ids(60 * count)
    return [(ids[first : first + 24] * 3)[:60] for first in range(0, 60 * count, 60)]


def answer(runner: Any, ids: list[int], guess: bool, most: int = 40, ends: Sequence[int] = (), **drawn: Any) -> Any:
    runner.guess = guess
    return list(runner.stream(ids, most, ends, **drawn))


# What is guessed


@pytest.mark.parametrize(
    ("ids", "most", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 4, [4, 5, 1, 2]),
        ([1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2, 3], 2, [5, 8]),  # where they stood last
        ([7, 1, 2, 3, 4, 9, 6, 1, 2, 3, 5, 8, 7, 1, 2, 3], 2, [4, 9]),  # four of them before three
        ([1, 2, 3, 1, 2, 3], 5, [1, 2, 3, 1, 2]),  # a text that repeats itself goes on
        ([1, 1, 1, 1], 3, [1, 1, 1]),
        ([1, 2, 9, 1, 2], 4, []),  # two are too few
        ([1, 2, 3, 4, 1, 2, 3], 0, []),
        ([], 4, []),
    ],
)
def test_what_followed_the_longest_run_of_last_tokens_is_guessed(
    ids: list[int], most: int, expected: list[int]
) -> None:
    assert run.Copied(ids).guess(most) == expected
    grown = run.Copied(ids[:2])
    for token in ids[2:]:
        grown.add(token)
    assert grown.guess(most) == expected


# What is answered


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Prompts and the plain answers that guesses are made of, half of them with a wrong token: models of random weights
    do not copy."""
    known, random = list[tuple[list[int], list[int]]](), np.random.default_rng(0)

    def guess(self: Any, most: int) -> list[int]:
        for ids, plain in known:
            if self.ids[: len(ids)] == ids:
                made = plain[len(self.ids) - len(ids) :][:most]
                if made and random.random() < 0.5:
                    made[int(random.integers(len(made)))] ^= 1
                return made
        return []

    monkeypatch.setattr(run.Copied, "guess", guess)
    return known


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_without_guesses_in_fewer_passes(name: str, told: list[tuple[list[int], list[int]]]) -> None:
    runner, tokens, passes = run.Runner(bundle(name)), 0, 0
    for ids in repeating(12):
        plain = answer(runner, ids, False)
        assert runner.passes == len(plain) - 1
        told.append((ids, plain))
        assert answer(runner, ids, True) == plain
        tokens, passes = tokens + len(plain) - 1, passes + runner.passes
    assert passes < tokens / 2


def test_the_export_counts_the_passes_that_a_device_makes() -> None:
    """On a stand-in for a model that says its prompt again, and now and then something else."""
    ids = [*range(100, 140)] * 2

    class Session:
        def __init__(self) -> None:
            self.read = 0

        def append(self, some: list[int], every: bool = False) -> Any:
            places = range(self.read, self.read + len(some))
            self.read += len(some)
            rows = np.zeros((len(some), 200), dtype=np.float32)
            for row, place in enumerate(places):
                rows[row, 7 if place % 11 == 0 else 100 + (place + 1) % 40] = 1.0
            return rows if every else rows[-1]

        def rewind(self, tokens: int) -> None:
            self.read = tokens

    engine = SimpleNamespace(start=lambda room, grammar: Session(), shares=True)
    runner = run.Runner.__new__(run.Runner)
    runner.engine, runner.context_tokens, runner.eos_ids = engine, 500, [0]
    plain = answer(runner, ids, False, 90)
    assert answer(runner, ids, True, 90) == plain and len(plain) == 90
    found = passes_of([(ids, plain)])
    assert (found.tokens, found.passes) == (89, runner.passes) and found.passes < 45


@pytest.mark.parametrize("fault", ["nothing is forgotten", "logits of another position"])
def test_a_fault_in_checking_would_be_seen(
    fault: str, monkeypatch: pytest.MonkeyPatch, told: list[tuple[list[int], list[int]]]
) -> None:
    runner, append = run.Runner(bundle("ort-fp32")), run.Cache.append
    told += [(ids, answer(runner, ids, False)) for ids in repeating(4)]

    def shifted(self: Any, ids: list[int], every: bool = False) -> Any:
        rows = append(self, ids, every)
        return rows[::-1] if every else rows

    if fault == "nothing is forgotten":
        monkeypatch.setattr(run.Cache, "rewind", lambda self, tokens: self.ids.__delitem__(slice(tokens, None)))
    else:
        monkeypatch.setattr(run.Cache, "append", shifted)
    wrong = 0
    for ids, plain in told:
        try:
            wrong += answer(runner, ids, True) != plain
        except RuntimeError:  # the cache runs over
            wrong += 1
    assert wrong == 4


def test_an_answer_ends_where_it_would_without(told: list[tuple[list[int], list[int]]]) -> None:
    runner = run.Runner(bundle("ort-fp32"))
    told += [(ids, answer(runner, ids, False)) for ids in repeating(6)]
    for ids in repeating(6):
        plain = answer(runner, ids, False)
        for stop in {plain[5], plain[17], plain[-1]}:
            assert answer(runner, ids, True, ends=[stop]) == plain[: plain.index(stop)]
        for most in (1, 2, 7):
            assert answer(runner, ids, True, most) == plain[:most]
    ids = (some_ids(20) * 30)[:505]  # 7 tokens before the context ends
    assert answer(runner, ids, True) == answer(runner, ids, False) and len(answer(runner, ids, True)) == 7


def test_a_model_that_cannot_forget_answers_without_guesses(
    monkeypatch: pytest.MonkeyPatch, told: list[tuple[list[int], list[int]]]
) -> None:
    def refuse(self: Any, tokens: int) -> None:
        raise RuntimeError("no")

    runner = run.Runner(bundle("ort-fp32"))
    expected = [answer(runner, ids, False) for ids in repeating(4)]
    told += zip(repeating(4), expected, strict=True)
    monkeypatch.setattr(run.OnnxSession, "rewind", refuse)
    assert [answer(runner, ids, True) for ids in repeating(4)] == expected


def test_what_is_drawn_is_not_guessed() -> None:
    runner, ids = run.Runner(bundle("ort-fp32")), repeating(1)[0]
    made = [answer(runner, ids, guess, temperature=0.7, seed=5) for guess in (False, True)]
    assert made[0] == made[1] and runner.passes == len(made[1]) - 1


def test_the_next_prompt_finds_no_wrong_guess_in_a_kept_cache(told: list[tuple[list[int], list[int]]]) -> None:
    prompts, runner = repeating(5), run.Runner(bundle("ort-fp32"))
    expected = [answer(runner, ids, False) for ids in prompts]
    told += zip(prompts, expected, strict=True)
    runner.keep_tokens = 200
    assert [answer(runner, ids, True) for ids in prompts] == expected


# run.py's options


@pytest.fixture
def guessing(tmp_path: Path) -> Path:
    """A bundle whose export found that guesses pay."""
    shutil.copytree(bundle("ort-fp32"), tmp_path / "b")
    reseal(tmp_path / "b", lambda manifest: manifest.update(guesses={"on": True}))
    return tmp_path / "b"


def test_the_manifest_decides_unless_an_option_does(guessing: Path) -> None:
    text = "one two three four five six one two three four five six one two three four"
    shown = [json.loads(script(guessing, text, "--json", *more).stdout) for more in ([], ["--no-guess"], ["--guess"])]
    assert shown[0] == shown[2] and "passes" not in shown[1]
    assert shown[0]["ids"] == shown[1]["ids"] and shown[0]["passes"] <= len(shown[0]["ids"])
    reseal(guessing, lambda manifest: manifest.update(guesses=None))
    assert "passes" not in json.loads(script(guessing, text, "--json").stdout)


def test_options_that_do_not_go_together_say_so(guessing: Path) -> None:
    done = script(guessing, "x", "--guess", "--temperature", "1")
    assert done.returncode == 1 and "--guess: is for the likeliest tokens" in done.stderr
    runner = SimpleNamespace(labels=object(), grammar=None, guess=False)
    with pytest.raises(run.RunError, match="--guess: is for free answers, this bundle's are held"):
        run.check_guess(runner, run.parse(["x", "--guess"]))
    run.check_guess(runner, run.parse(["x", "--guess", "--free"]))
    assert runner.guess


@pytest.mark.parametrize("value", [7, {"on": "yes"}, {}])
def test_a_manifest_that_no_export_writes_is_refused(guessing: Path, value: Any) -> None:
    reseal(guessing, lambda manifest: manifest.update(guesses=value))
    done = script(guessing, "x")
    assert done.returncode == 4 and "'guesses' cannot be" in done.stderr


# When the export turns them on


class Told:
    """Answers that are given, whatever is asked."""

    def __init__(self, answers: Iterator[list[int]] | Callable[[list[int]], list[int]]) -> None:
        self.answers, self.asked = answers, list[bool]()

    def answer(self, ids: list[int], most: int, *, guess: bool) -> list[int]:
        self.asked.append(guess)
        made = self.answers(ids) if callable(self.answers) else next(self.answers)
        return made[:most]


def row(prompt: list[int], completion: list[int]) -> Sample:
    return Sample([*prompt, *completion], [-100] * len(prompt) + completion, len(prompt))


COPYING = [row([*range(k, k + 40)], [*range(k + 5, k + 35)]) for k in range(0, 2000, 100)]


def ticking(plain: float, guessed: float) -> Callable[[], float]:
    """A clock by which the answers in turn take so long."""
    now, steps = 0.0, iter([s for n in range(ROWS) for s in ((guessed, plain) if n % 2 == 0 else (plain, guessed))])
    begun = False

    def clock() -> float:
        nonlocal now, begun
        if begun:
            now += next(steps)
        begun = not begun
        return now

    return clock


def copied(ids: list[int]) -> list[int]:
    return ids[5:35]


@pytest.mark.parametrize(("plain", "on"), [(2.0, True), (1.21, True), (1.19, False), (0.5, False)])
def test_guesses_are_on_where_passes_and_clock_agree(plain: float, on: bool) -> None:
    found, faster = measured(told := Told(copied), COPYING, silent, ticking(plain, 1.0))
    assert found is not None and (found.on, found.same_answers, found.rows) == (on, 1.0, ROWS)
    assert faster == pytest.approx(plain) and sorted(told.asked) == [False] * ROWS + [True] * ROWS
    assert found.tokens == 29 * ROWS and found.tokens / (found.passes + MORE * found.guessed) >= WORTH


def test_a_model_that_does_not_copy_has_none_whatever_the_clock_says() -> None:
    """Its rows do: what it answers counts."""
    random = np.random.default_rng(0)
    found, _ = measured(Told(lambda ids: random.integers(9000, 9999, 30).tolist()), COPYING, silent, ticking(9.0, 1.0))
    assert found is not None and not found.on and found.same_answers == 0.0


def test_rows_that_do_not_copy_are_not_answered() -> None:
    rows = [row([*range(40)], [*range(100 + k, 130 + k)]) for k in range(20)]
    found, faster = measured(told := Told(copied), rows, silent)
    assert found is not None and not found.on and found.same_answers is None and faster is None and not told.asked
    assert (found.tokens, found.passes, found.guessed) == (29 * 20, 29 * 20, 0)
    assert measured(told, [Sample([1, 2, 3], [1, 2, 3], 0)], silent) == (None, None)


def test_passes_are_counted_as_they_are_made() -> None:
    assert passes_of([([1, 2, 3, 4, 5, 6], [7, 8])]) == (1, 1, 0)
    # 1 2 3 is guessed to go on after the first three tokens; 5 instead of 4 ends it
    assert passes_of([([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6])])[:2] == (5, 3)
    assert passes_of([([], [4]), ([3], [])]) == (0, 0, 0)


def test_an_export_says_what_it_found(merged_folder: Path, tmp_path: Path) -> None:
    from edgeft.exporting.export import export
    from edgeft.targets.target import load_target

    made = export(merged_folder, loose(load_target("ort-int8")), tmp_path / "b", device=None, progress=silent)
    assert made.guesses is not None and not made.guesses.on and made.guesses.rows > 0
    assert Bundle.read(tmp_path / "b" / "bundle.json").guesses == made.guesses
