"""How is a model scored before and after training, and what does it answer, with no more at once than a step holds?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from edgeft.data.dataset import Sample
from edgeft.data.scoring_groups import sampled
from edgeft.engine.grammar_scores import held_rows
from edgeft.engine.written import answer_text, expected_text, written
from edgeft.errors import EdgeftError
from edgeft.models.evaluate import evaluate
from edgeft.models.metrics import Metrics
from edgeft.models.parts import Parts
from edgeft.models.token_f1 import with_f1
from edgeft.planning.plan import Plan
from edgeft.progress import Progress
from edgeft.training.job_data import Data
from edgeft.training.prefix import FrozenPrefix
from edgeft.training.result import SampleAnswer

PROMPT_CHARACTERS = 2000  # of a prompt that is kept beside its answers, the last ones


class Scores(NamedTuple):
    """Of one model: on validation rows, on test rows where there are any, and answers to some validation rows."""

    valid: Metrics
    test: Metrics | None
    answers: list[str]


@dataclass
class Scorer:
    """What scores a model, by the plan that is carried out."""

    plan: Plan
    data: Data
    model: Any
    parts: Parts
    device: torch.device
    compute: torch.dtype
    progress: Progress
    prefix: FrozenPrefix | None = None

    def scores(self, whose: str = "") -> Scores:
        """All scores of the model as it is now; `whose` goes before the names of stages."""
        valid, answers = self.score(f"{whose}valid", scored_rows(self.plan, self.data))
        test = self.score(f"{whose}test", self.data.test)[0] if self.data.test else None
        return Scores(valid, test, answers)

    def score(self, name: str, samples: list[Sample]) -> tuple[Metrics, list[str]]:
        """(scores, the answers to some of the rows). Raises EdgeftError for a loss that is not finite."""
        training, data = self.plan.training, self.data
        found = evaluate(
            self.model, self.parts, samples, data.tokenizer, device=self.device, compute=self.compute,
            chunk_tokens=training.loss_chunk_tokens, group_tokens=training.group_tokens,
            held=held_rows(data.held_to, samples, data.tokenizer, self.model),
            progress=lambda done, total: self.progress(name, done, total, {}), whole=self._whole,
        )  # fmt: skip
        if not math.isfinite(found.loss):
            hint = "plan again in another precision (--set base_precision=fp32) or with a lower learning rate"
            raise EdgeftError("training", f"the loss of {name} is {found.loss}: nothing is written as a result", hint)
        rows = sample_rows(samples, self.plan.sample_answers)
        answers = self._written(rows)
        if self.plan.task_score == "f1":
            expected = [expected_text(data.tokenizer, row) for row in rows]
            found = with_f1(found, list(zip(expected, answers, strict=True)))
        return found, answers

    def _written(self, rows: Sequence[Sample]) -> list[str]:
        if not rows:
            return []
        self.progress("answers", 0, 1, {})
        self._whole()
        training, tokenizer = self.plan.training, self.data.tokenizer
        found = written(
            self.model, self.parts, rows, tokenizer, self.data.held_to, device=self.device, compute=self.compute,
            chunk_tokens=training.loss_chunk_tokens, group_tokens=training.group_tokens,
        )  # fmt: skip
        return [answer_text(tokenizer, ids) for ids in found]

    def _whole(self) -> None:
        """Have all layers there, for tokens that are no row's own."""
        if self.prefix is not None:
            self.prefix.restore()


def scored_rows(plan: Plan, data: Data) -> list[Sample]:
    """The validation rows that are scored."""
    return data.valid[: plan.training.eval_rows]


def sample_rows(samples: Sequence[Sample], most: int) -> list[Sample]:
    """The rows whose answers are written out: the same ones every time, none that asks for nothing."""
    return [samples[number] for number in sampled(len(samples), most) if samples[number].has_prompt]


def side_by_side(plan: Plan, data: Data, base: Sequence[str], tuned: Sequence[str]) -> tuple[SampleAnswer, ...]:
    """Validation rows with what was asked, expected and answered; none where the base's answers were not kept."""
    rows, tokenizer = sample_rows(scored_rows(plan, data), plan.sample_answers), data.tokenizer
    if not len(rows) == len(base) == len(tuned):
        return ()
    return tuple(
        SampleAnswer(
            prompt=tokenizer.spell(row.prompt)[-PROMPT_CHARACTERS:], expected=expected_text(tokenizer, row),
            base=before, tuned=after,
        )
        for row, before, after in zip(rows, base, tuned, strict=True)
    )  # fmt: skip
