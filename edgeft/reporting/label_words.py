"""How does a report say what answers are held to, and how far their probabilities can be trusted?"""

from __future__ import annotations

from collections.abc import Iterator

from edgeft.data.grammar import held_name
from edgeft.data.labels import FEWEST_TO_CALIBRATE
from edgeft.exporting.answers import WANTED_RIGHT, Answers, Calibration, HeldToGrammar
from edgeft.reporting.words import difference_text, percent

BIN_HEAD = ("probability", "answers", "mean probability", "right")
CERTAIN_HEAD = ("of the answers, the most certain", "answers", "right")
PARTS = {0.25: "quarter", 0.5: "half", 0.75: "three quarters", 1.0: "all"}


def calibration_of(answers: Answers | HeldToGrammar) -> Calibration | None:
    """What labels' probabilities are worth, where it was found."""
    return answers.calibration if isinstance(answers, Answers) else None


def bin_rows(made: Calibration) -> Iterator[tuple[str, ...]]:
    """The reliability table: what answers of each probability get right."""
    for each in made.bins:
        span = f"{100 * each.low:.0f} to {100 * each.high:.0f}%"
        yield span, f"{each.rows}", percent(each.probability), percent(each.right)


def certain_rows(made: Calibration) -> Iterator[tuple[str, ...]]:
    """What the most certain answers get right."""
    for each in made.certain:
        yield PARTS.get(each.share, percent(each.share)), f"{each.rows}", percent(each.right)


def answers_lines(answers: Answers | HeldToGrammar) -> list[str]:
    """What is said of held answers beside the tables."""
    if isinstance(answers, HeldToGrammar):
        return [f"answers are held to {held_name(answers.source)}, those that exact match counts too"]
    lines = [f"answers are one of {answers.labels:,} labels; exact match counts the most probable one"]
    made = answers.calibration
    if made is None:
        few = f"{FEWEST_TO_CALIBRATE} validation rows are needed (--valid FILE)"
        return [*lines, f"their probabilities are not calibrated: {few}"]
    change = f", {difference_text(made.change, unit='nats')}" if made.change else ""
    loss = f"log loss {made.log_loss_plain:.4f} without it, {made.log_loss:.4f} with it{change}"
    lines.append(
        f"temperature {answers.temperature:g}, fitted on {made.fitted_rows} validation rows; on {made.compared}: {loss}"
    )
    if made.threshold is None:
        return [*lines, f"no --min-probability is suggested: {_none_to_suggest(made)}"]
    found = made.threshold
    wanted = f"chosen on validation rows for {percent(found.wanted_right)} right"
    held = f"on {made.compared} {percent(found.answered)} are answered, {percent(found.right)} of them right"
    return [*lines, f"suggested: --min-probability {found.min_probability:g}, {wanted}; {held}"]


def _none_to_suggest(made: Calibration) -> str:
    """Why no threshold was found: these rows have nothing to be refused, or nothing that is sure enough."""
    right = sum(each.rows * each.right for each in made.bins) / made.rows
    if right >= WANTED_RIGHT:
        return f"{percent(right)} of {made.rows} rows are right without one, they do not show where to refuse"
    return f"no part of {made.rows} rows is {percent(WANTED_RIGHT)} right"
