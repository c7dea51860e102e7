"""How is a model scored before and after training, with no more at once than a training step holds?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from edgeft.data.dataset import Sample
from edgeft.engine.grammar_scores import held_rows
from edgeft.errors import EdgeftError
from edgeft.models.evaluate import evaluate
from edgeft.models.metrics import Metrics
from edgeft.models.parts import Parts
from edgeft.progress import Progress
from edgeft.settings.job import Training
from edgeft.training.job_data import Data
from edgeft.training.prefix import FrozenPrefix


def scorer(
    model: Any, parts: Parts, data: Data, training: Training, device: torch.device, compute: torch.dtype,
    progress: Progress, prefix: FrozenPrefix | None = None,
) -> Callable[[str, list[Sample]], Metrics]:  # fmt: skip
    """A function (name, samples) -> Metrics that scores no more at once than a training step holds."""

    def score(name: str, samples: list[Sample]) -> Metrics:
        found = evaluate(
            model, parts, samples, data.tokenizer, device=device, compute=compute,
            chunk_tokens=training.loss_chunk_tokens, group_tokens=training.group_tokens,
            held=held_rows(data.held_to, samples, data.tokenizer, model),
            progress=lambda done, total: progress(name, done, total, {}),
            whole=prefix.restore if prefix else lambda: None,
        )  # fmt: skip
        if not math.isfinite(found.loss):
            hint = "plan again in another precision (--set base_precision=fp32) or with a lower learning rate"
            raise EdgeftError("training", f"the loss of {name} is {found.loss}: nothing is written as a result", hint)
        return found

    return score
