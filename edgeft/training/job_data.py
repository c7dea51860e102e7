"""Which rows does a job train on, which is it judged by? Read once, as samples. (no torch)"""

from __future__ import annotations

from dataclasses import dataclass, field

from edgeft.data.dataset import Sample, TextTokenizer, hold_out, read_samples
from edgeft.data.grammar import HeldTo
from edgeft.data.samples import HELD_OUT_SHARE, validation_rows
from edgeft.errors import BadInput
from edgeft.machines import meter
from edgeft.models.headers import local_folder
from edgeft.models.identity import check_inputs
from edgeft.planning.plan import Plan

PLAN_AGAIN = "put the files back, or plan and train again on these: run the same edgeft plan once more"


@dataclass
class Data:
    """The samples of one job; `valid` is held out of the training file when no file is given for it."""

    train: list[Sample]
    valid: list[Sample]
    test: list[Sample]
    tokenizer: TextTokenizer
    held_to: HeldTo = ()  # what answers are held to, labels or a grammar; nothing: they are free
    stopping: list[Sample] = field(default_factory=list)  # validation rows that say when a run stops, none of `valid`

    @classmethod
    def read(cls, plan: Plan, *, train: bool = True) -> Data:
        """The samples of a plan's files. Without `train` no training rows: a proof needs the others."""
        if plan.job.data is None:
            raise BadInput("plan", "was made without training data", "plan again with --data FILE (make: data=FILE)")
        check_inputs(plan.inputs, plan.job, "plan", PLAN_AGAIN)
        tokenizer = TextTokenizer(local_folder(plan.job.model))

        def samples(source: str) -> list[Sample]:
            return read_samples(source, tokenizer, plan.training.max_length)

        valid = samples(plan.job.valid) if plan.job.valid else []
        found = samples(plan.job.data) if train or not valid else []
        if not valid:
            found, valid = hold_out(found, HELD_OUT_SHARE, plan.training.seed)
        valid, stopping = validation_rows(valid, plan.training.patience, plan.training.eval_rows)
        test = samples(plan.job.test) if plan.job.test else []
        if not train:
            return cls([], valid, test, tokenizer, plan.held_to)
        found = [sample for sample in found if sample.trained_tokens]
        if not found:
            hint = "raise max_length: every sample was cut before its first trained token"
            raise BadInput(plan.job.data, "no sample has a token to train on", hint)
        meter.give_back()  # what encoding took and left between the samples: half of their size again
        if plan.training.patience and not any(sample.trained_tokens for sample in stopping):
            raise BadInput("patience", "no validation row has a token to score", "raise max_length, or leave it out")
        return cls(found, valid, test, tokenizer, plan.held_to, stopping)
