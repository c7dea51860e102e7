"""Which rows does a proof take, of which are answers written out, and what do forms of the model score on them?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeft.data.dataset import Sample, TextTokenizer
from edgeft.data.scoring_groups import sampled
from edgeft.engine.written import expected_text
from edgeft.exporting.form import Form
from edgeft.models.metrics import Metrics
from edgeft.models.token_f1 import with_f1
from edgeft.planning.plan import Plan
from edgeft.training.job_data import Data


@dataclass(frozen=True)
class ProofRows:
    """The rows a proof takes: those that training scored, and those whose scores are shown, each read once."""

    trained: list[Sample]
    every: list[Sample]
    scored: slice
    source: str

    @classmethod
    def of(cls, data: Data, plan: Plan) -> ProofRows:
        """The validation rows that training scored, and the test rows after them where there are any."""
        trained = data.valid[: plan.training.eval_rows]
        if data.test:
            return cls(trained, [*trained, *data.test], slice(len(trained), None), "test")
        return cls(trained, trained, slice(None), "validation")

    def shown(self, plan: Plan) -> list[int]:
        """Numbers of the validation rows whose answers train.json has."""
        return self._sampled(plan, slice(len(self.trained)))

    def write(self, plan: Plan) -> list[int]:
        """Numbers of all rows whose answers are written out: those that are shown, and those that F1 is of."""
        more = self._sampled(plan, self.scored) if plan.task_score == "f1" else []
        return sorted({*self.shown(plan), *more})

    def metrics(self, form: Form, tokenizer: TextTokenizer, plan: Plan) -> Metrics:
        """A form's scores, with F1 where it suits the task and answers were written."""
        found = form.metrics(self.every, tokenizer, self.scored)
        if plan.task_score != "f1":
            return found
        numbers = self._sampled(plan, self.scored)
        given = form.answers(numbers)
        return with_f1(found, [(expected_text(tokenizer, self.every[number]), answer)
                               for number, answer in zip(numbers, given, strict=False)])  # fmt: skip

    def _sampled(self, plan: Plan, part: slice) -> list[int]:
        numbers: Sequence[int] = range(len(self.every))[part]
        taken = [numbers[number] for number in sampled(len(numbers), plan.sample_answers)]
        return [number for number in taken if self.every[number].has_prompt]
