"""Which candidate is taken? The best that fits the budget and the time limit, counted or simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from edgeft.errors import BadInput
from edgeft.memory import train_step
from edgeft.planning.costs import Question
from edgeft.planning.streaming import in_groups
from edgeft.settings.job import Training
from edgeft.units import show_seconds

SIMULATIONS = 8  # of a family that is planned by simulation, at most
# Points of quality for which a base that is not whole in memory is looked at, where another fits, and how many times
# as long a step may then take.
WORTH, SLOWER = 1.0, 2.0


class Choice(NamedTuple):
    """The way that is taken, None where none fits; all that was looked at, best first; and notes."""

    training: Training | None
    looked_at: list[Training]
    notes: list[str]
    whole: bool = True  # whether a way fits that has all of a base in memory


def choose_of_all(question: Question, looked_at: list[Training], not_whole: Callable[[], list[Training]]) -> Choice:
    """The best way that fits with all of a base in memory; or without, where none does or that is better.

    Without, every step reads its layers: what is better and far slower is told, not taken.
    """
    training, said = choose(question, looked_at)
    lost, seconds = question.key(training) if training is not None else (float("inf"), float("inf"))
    if lost < question.key(looked_at[0])[0] + WORTH:
        return Choice(training, looked_at, said)
    ways = not_whole()
    both = sorted([*looked_at, *ways], key=question.key)
    for group in in_groups(question, [way for way in ways if question.key(way)[0] <= lost - WORTH]):
        other, more = choose(question, group)
        if other is not None and question.key(other)[1] <= SLOWER * seconds:
            return Choice(other, both, more, whole=training is not None)
        if other is not None and training is not None:
            return Choice(training, looked_at, [*said, _in_parts(question, other, training)])
    return Choice(training, both if training is None else looked_at, said)


def _in_parts(question: Question, other: Training, training: Training) -> str:
    """What a way would give up and take that has not all of the base in memory."""
    (lost, seconds), (now_lost, now_seconds) = question.key(other), question.key(training)
    how = "layers in their files" if other.stream_layers else "a part of each layer in every process"
    setting = "stream_layers" if other.stream_layers else "shard_base"
    return (
        f"with {how} (--set {setting}=true) {lost:.1f} points are given up instead of {now_lost:.1f}, at "
        f"{show_seconds(seconds)} a step instead of {show_seconds(now_seconds)}"
    )


def choose(question: Question, looked_at: Sequence[Training]) -> tuple[Training | None, list[str]]:
    """The best way that fits, None where none does; and notes."""
    if train_step.known(question.spec):
        return best_that_fits(question, looked_at), []
    return best_by_simulation(question, looked_at)


def best_by_simulation(question: Question, looked_at: Sequence[Training]) -> tuple[Training | None, list[str]]:
    """The best way that fits by simulation, which corrects the closed form of the ways like it; and notes.

    Raises BadInput for a job with data where the model cannot be simulated: its memory would be a guess.
    """
    try:
        for _ in range(SIMULATIONS):
            training = best_that_fits(question, looked_at)
            if training is None or training in question.simulated:
                return training, [f"{question.spec.model_type}: planned by simulation"]
            question.simulate(training)
    except BadInput as problem:
        if question.job.data is not None:
            raise
        note = (
            f"{question.spec.model_type}: not simulated, memory is that of a Llama of these widths: {problem.problem}"
        )
        return best_that_fits(question, looked_at), [note]
    fitting = [one for one in question.simulated if question.high_bytes(one) <= question.budget_bytes]
    return min(fitting, key=question.key, default=None), [f"{question.spec.model_type}: planned by simulation"]


def best_that_fits(question: Question, looked_at: Sequence[Training]) -> Training | None:
    """The best way inside the budget and the time limit; where activations are recomputed, in as few layers as fit.

    Which of `looked_at` that is follows only once their layers are counted: each is taken up in the order of what it
    would be at its best, until none can be better than what was found.
    """
    found, best = None, (float("inf"), float("inf"))
    for hope, training in sorted(((question.hope(t), t) for t in looked_at), key=lambda pair: pair[0]):
        if hope >= best:
            break
        if question.least_bytes(training) > question.budget_bytes:  # most of those that do not fit, far more quickly
            continue
        if question.high_bytes(training) > question.budget_bytes:
            continue
        most = question.most_kept(training)
        while most > training.kept_layers:  # memory grows with the number of layers kept
            middle = (training.kept_layers + most + 1) // 2
            way = training.model_copy(update={"kept_layers": middle})
            if question.high_bytes(way) <= question.budget_bytes:
                training = way
            else:
                most = middle - 1
        if not question.too_slow(training) and question.key(training) < best:
            found, best = training, question.key(training)
    return found
