"""Is the model as trained, loaded anew, the one that training scored?"""

from __future__ import annotations

import random

import torch

from edgeft.exporting.form import Form
from edgeft.memory.proof import scored_again
from edgeft.models.metrics import Metrics, Rung
from edgeft.settings.job import Training

# The same model loaded anew on the same rows: what the loss per token may differ by, in the dtype of its products.
# Measured where nothing was wrong in fp32, on NF4: 4e-8 of all rows, 7e-7 of any one. Half a layer's change, most of it
# below a step of NF4, moved one row by 2e-3 and their mean not at all.
AGAIN_NATS = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
ELSEWHERE_NATS = 2e-2  # of all rows, where training ran on a GPU and this is a CPU
ELSEWHERE_ROW_NATS = 0.2  # of any one row there


def rows_again(training: Training, recorded: Metrics, rows: int) -> list[int]:
    """Numbers of the rows that are scored again, of so many that training scored: at random, where not all are."""
    some = scored_again(training, rows) if len(recorded.row_losses) == rows else rows
    return sorted(random.Random(0).sample(range(rows), some))


def trained_rung(form: Form, recorded: Metrics, compute: torch.dtype, where: str, of_rows: int | None = None) -> Rung:
    """The rung between train.json's own score and the model as trained, loaded anew: all of some rows, and each.

    `recorded` are the scores of these rows, of the `of_rows` that training scored.
    """
    elsewhere = where != "cpu"
    nats = ELSEWHERE_NATS if elsewhere else AGAIN_NATS[compute]
    row_nats = ELSEWHERE_ROW_NATS if elsewhere else 10 * nats
    dtype = str(compute).removeprefix("torch.")
    how = f"trained on {where}, compared on the CPU in fp32" if elsewhere else f"computed in {dtype}"
    problems = []
    rows = len(form.losses)
    if recorded.rows != rows:
        problems.append(f"scored on {recorded.rows} rows, there are {rows} now")
    if not abs(form.loss - recorded.loss) <= nats * max(1.0, abs(recorded.loss)):
        problems.append(f"loss {recorded.loss:.6f} in train.json, {form.loss:.6f} now")
    tolerance = f"loss to {nats:g} nats ({how})"
    if recorded.row_losses and len(recorded.row_losses) == rows:
        tolerance += f", each row's to {row_nats:g}"
        apart = [
            abs(a - b) / max(1, count)
            for a, b, count in zip(form.losses, recorded.row_losses, form.tokens, strict=True)
        ]
        far = sum(not each <= row_nats * max(1.0, abs(recorded.loss)) for each in apart)
        problems += [f"{far} of {rows} rows differ, by up to {max(apart):.3g} nats a token"] if far else []
    return Rung(
        name="trained", against="train.json", tolerance=tolerance, loss=form.loss, loss_before=recorded.loss,
        compared=f"the score of {rows} {f'of {of_rows} ' if of_rows not in (None, rows) else ''}validation rows",
        problems=tuple(problems),
    )  # fmt: skip
