"""What does the base score on a run's rows, where an earlier run of the same base has scored them already?

Whatever the rank, the rate or the seed, the base is the same before the first step. Its scores are kept in the cache
under the hash of all that they depend on, where they took long enough, and a few rows are scored again before they are
believed.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from edgeft.data.samples import Sample
from edgeft.documents import Artifact, cache_folder, saving, sha256_file, sha256_json, unused, versions
from edgeft.errors import BadInput
from edgeft.models.evaluate import score_group
from edgeft.models.identity import WEIGHTS
from edgeft.models.metrics import Metrics
from edgeft.settings.job import Training
from edgeft.training.scoring import Scorer, Scores, scored_rows

FORM = 1  # of the file: another number where the same inputs would be scored otherwise
LEAST_SECONDS = 5.0  # that scores must have taken to be kept
AGAIN_ROWS = 8  # scored again before what is kept is believed
# What a row's loss may then differ by, a share of it or so many nats: other rows beside it change the order of sums.
APART = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
PACKAGES = ("edgeft", "torch", "transformers", "peft", "bitsandbytes")  # whose code computes them


class Kept(Artifact):
    """The scores of a base, and what they depend on."""

    key: dict[str, str]
    valid: Metrics
    test: Metrics | None
    answers: tuple[str, ...]


def key_of(scorer: Scorer, weights: str, folder: Path) -> dict[str, str]:
    """All that a base's scores depend on: `weights` is its hash. Tokenizer and template are in the rows' ids."""
    plan, data, code = scorer.plan, scorer.data, versions(PACKAGES)
    training, held = plan.training, plan.held_to
    said = [each.model_dump(mode="json") for each in (held if isinstance(held, tuple) else (held,))]
    return {
        "form": str(FORM),
        WEIGHTS: weights,
        "config.json": sha256_file(folder / "config.json"),
        "valid": rows_sha256(scored_rows(plan, data)),
        "test": rows_sha256(data.test),
        "answers held to": sha256_json(said),
        "stop ids": " ".join(map(str, data.tokenizer.stop_ids)),
        "scores": f"{plan.task_score}, {plan.sample_answers} answers",
        "base precision": training.base_precision,
        "computed in": str(scorer.compute).removeprefix("torch."),
        "states kept": training.cached_dtype if training.cached_layers else "none",
        "device": scorer.device.type,
        "begins as": begins_as(training),
        **{name: code[name] for name in PACKAGES if name in code},
    }


def begins_as(training: Training) -> str:
    """What a tuner makes of the base before its first step: nothing, or what its settings say."""
    if training.prefix_tokens or training.init != "random":
        names = ("tuner", "init", "rank", "lora_alpha", "target_modules", "prefix_tokens", "seed", "trained_layers")
        return sha256_json({name: getattr(training, name) for name in names})
    return "the base" if training.quantize_aware is None else f"rounded for {training.quantize_aware}"


def rows_sha256(rows: Sequence[Sample]) -> str:
    """One digest of the tokens of all rows, which of them are trained, and where their prompts end."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{len(row)} {row.prompt_tokens} {list(row.ids)} {list(row.labels)}\n".encode())
    return digest.hexdigest()


def base_scores(scorer: Scorer, weights: str, folder: Path) -> tuple[Scores, str]:
    """(the base's scores, the file of an earlier run that has them; empty where they were found now)."""
    key = key_of(scorer, weights, folder)
    path = cache_folder() / "base-scores" / f"{sha256_json(key)[:24]}.json"
    kept = read(path, key)
    if kept is not None and agrees(scorer, kept.valid):
        os.utime(path)
        return Scores(kept.valid, kept.test, list(kept.answers)), str(path)
    started = time.monotonic()
    found = scorer.scores("base on ")
    if time.monotonic() - started >= LEAST_SECONDS:
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for old in unused(path.parent, "*.json"):
                old.unlink(missing_ok=True)
            Kept(versions=versions(), key=key, valid=found.valid, test=found.test, answers=tuple(found.answers)).write(
                path
            )
    return found, ""


def read(path: Path, key: dict[str, str]) -> Kept | None:
    """What is kept under a key; None where that is nothing, damaged, or of something else."""
    try:
        kept = Kept.read(path)
    except BadInput:
        return None
    return kept if kept.key == key else None


@torch.no_grad()
def agrees(scorer: Scorer, kept: Metrics) -> bool:
    """Whether some rows, at random and the longest, have the losses that are kept of them."""
    rows, training = scored_rows(scorer.plan, scorer.data), scorer.plan.training
    if len(kept.row_losses) != len(rows):
        return False
    numbers = random.Random(kept.loss).sample(range(len(rows)), min(AGAIN_ROWS, len(rows)))
    for number in {*numbers, max(range(len(rows)), key=lambda i: len(rows[i]))}:
        nats, _ = score_group(
            scorer.model, scorer.parts, [rows[number]], scorer.device, scorer.compute, training.loss_chunk_tokens
        )
        if not abs(nats[0] - kept.row_losses[number]) <= APART[scorer.compute] * max(1.0, abs(nats[0])):
            return False
    return True
