"""Does a bundle choose the label that torch does on the very weights it holds, and give it the same probability?

Torch gives each label a pass of its own and compares them all: no tree and no search, which the bundle's own has to
agree with. A pass a label is dear, so a few rows have to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edgeft.data.labels import Label
from edgeft.data.samples import Sample
from edgeft.data.scoring_groups import EVAL_TOKENS
from edgeft.engine.label_scores import whole_scores
from edgeft.exporting.artifact_answers import Artifact
from edgeft.exporting.row_logits import row_logits
from edgeft.models.metrics import Rung
from edgeft.models.parts import find_parts
from edgeft.targets.target import Tolerance

PASSES, MOST_ROWS, FEWEST_ROWS = 1024, 32, 4  # labels x rows that torch reads
TIE_NATS = 0.1  # two labels whose scores differ by less are a tie, as two tokens are


def rows_for(labels: Sequence[Label], rows: Sequence[Sample]) -> Sequence[Sample]:
    """The rows that so many labels leave time for."""
    return rows[: max(FEWEST_ROWS, min(MOST_ROWS, PASSES // max(1, len(labels))))]


def referee(model: Any, rows: Sequence[Sample], labels: Sequence[Label]) -> torch.Tensor:
    """(rows, labels): torch's score of each label."""
    parts = find_parts(model)
    return whole_scores(labels, rows, lambda some: row_logits(model, parts, some, torch.float32, EVAL_TOKENS))


def label_rung(
    expected: torch.Tensor, against: str, artifact: Artifact, rows: Sequence[Sample], tolerance: Tolerance
) -> Rung:
    """The rung between torch's scores and the artifact's: which label its search chooses, and how probable all are.

    The KL of labels may be the tolerance's for each token of the longest label.
    """
    wins, kl, longest = list[bool](), list[float](), 1
    ties = 0
    for scores, row in zip(expected, rows, strict=True):
        chosen = artifact.choose(row.prompt).found[0][1]
        wins.append(chosen == int(scores.argmax()))
        ties += float(scores.max() - scores[chosen]) <= TIE_NATS
        every = artifact.choose(row.prompt, lambda search: False)
        longest = max(longest, every.labels.longest + 1)
        made = torch.empty_like(scores)
        for score, number in every.found:
            made[number] = score
        p, q = torch.log_softmax(scores, -1), torch.log_softmax(made, -1)
        kl.append(float((p.exp() * (p - q)).sum()))
    mean, most = sum(kl) / len(kl), longest * tolerance.max_mean_kl_nats
    agreement, or_tie = sum(wins) / len(rows), ties / len(rows)
    problems = []
    if or_tie < tolerance.min_top1_agreement and len(rows) - ties > 1:  # one row is no evidence on a few
        problems.append(f"{len(rows) - ties} of {len(rows)} rows get a label that torch clearly puts behind another")
    if not mean <= most:
        problems.append(f"mean KL of the labels {mean:.2e} nats, at most {most:.0e}")
    return Rung(
        name="labels", against=against, compared=f"{len(rows)} rows, {expected.shape[1]} labels each",
        tolerance=f"KL {most:g} over labels, the same label or one within {TIE_NATS:g} nats",
        top1_agreement=agreement, top1_or_tie=or_tie, mean_kl_nats=mean, problems=tuple(problems),
    )  # fmt: skip
