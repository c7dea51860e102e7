"""How do scores of answers, and the answers themselves, read side by side: before and after, and from the device?

Pages ask this in a browser too, where rich is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from edgeft.data.scoring_groups import sampled
from edgeft.data.task_score import SHOWN
from edgeft.models.metrics import Metrics, Pair
from edgeft.reporting.words import difference_text, percent

if TYPE_CHECKING:
    from edgeft.training.result import SampleAnswer

PROMPT_SHOWN, ANSWER_SHOWN = 26, 200  # characters: of a prompt the last ones, of an answer the first
F1 = "F1, {rows} rows"  # of words, as SQuAD defines it


def score_head(scores: Iterable[Metrics]) -> tuple[str, ...]:
    """The columns of scores: F1 beside the loss where it suits the task."""
    rows = max((found.f1_rows for found in scores), default=0)
    return ("loss", "perplexity", *([F1.format(rows=rows)] if rows else []), "exact match")


def score_cells(metrics: Metrics, head: Sequence[str]) -> tuple[str, ...]:
    """One model's scores under that head."""
    words = [percent(metrics.f1)] if len(head) > 3 else []
    return (f"{metrics.loss:.4f}", f"{metrics.perplexity:.2f}", *words, percent(metrics.exact_match))


def pair_head(pairs: Iterable[Pair]) -> tuple[str, ...]:
    """The columns of what changed between two forms of a model."""
    return ("loss, nats", *(["F1, points"] if any(each.f1 for each in pairs) else []), "exact match, points")


def pair_cells(found: Pair, head: Sequence[str]) -> tuple[str, ...]:
    """One pair's changes under that head, with their 95% intervals."""
    words = [difference_text(found.f1, 100, 1)] if len(head) > 2 else []
    return (difference_text(found.loss), *words, difference_text(found.exact_match, 100, 1))


def changes_text(found: Pair) -> str:
    """A pair's changes in one line."""
    text = f"loss {difference_text(found.loss)}"
    text += f", F1 {difference_text(found.f1, 100, 1, 'points')}" if found.f1 else ""
    return text + (f", exact match {difference_text(found.exact_match, 100, 1, 'points')}" if found.exact_match else "")


def without_common_end(prompts: Sequence[str]) -> list[str]:
    """Prompts without what all of them end with (a chat's next turn, a form's last line), which tells none apart.

    It begins at a mark or a line, so that no word is cut: `turn it on<|im_end|>...` keeps its words.
    """
    turned = [prompt[::-1] for prompt in prompts] if len(prompts) > 1 else [""]
    first, last = min(turned), max(turned)  # what these two begin with all others do
    length = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    common = first[:length][::-1]
    begins = re.search(r"[<\[\n]", common)
    cut = len(common) - begins.start() if begins else 0
    return [prompt[: len(prompt) - cut] or prompt for prompt in prompts]


def shown(samples: Sequence[SampleAnswer], bundle: Sequence[str] = ()) -> list[tuple[SampleAnswer, str]]:
    """The rows that are shown, each with the bundle's answer, or nothing where there is none."""
    given = bundle if len(bundle) == len(samples) else [""] * len(samples)
    prompts = without_common_end([row.prompt for row in samples])
    told = [row.model_copy(update={"prompt": prompt}) for row, prompt in zip(samples, prompts, strict=True)]
    return [(told[number], given[number]) for number in sampled(len(samples), SHOWN)]


def in_a_line(text: str, most: int = ANSWER_SHOWN) -> str:
    """The start of a text without line breaks."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def end_of(prompt: str, most: int = PROMPT_SHOWN) -> str:
    """The end of a prompt without line breaks."""
    line = " ".join(prompt.split())
    return line if len(line) <= most else "..." + line[3 - most :]
