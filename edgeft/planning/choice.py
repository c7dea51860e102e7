"""Which candidate is taken? The best that fits the budget and the time limit, counted or simulated."""

from __future__ import annotations

from collections.abc import Sequence

from edgeft.errors import BadInput
from edgeft.memory import train_step
from edgeft.planning.costs import Question
from edgeft.settings.job import Training

SIMULATIONS = 8  # of a family that is planned by simulation, at most


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
