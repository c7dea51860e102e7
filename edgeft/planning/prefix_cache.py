"""When are the outputs of frozen layers kept on disk, why not, and what does it bring?

What lies below the lowest layer that trains is a constant of base, rows and code: it need run but once for each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeft.data.dataset import Measured
from edgeft.data.samples import HELD_OUT_SHARE, hold_out, validation_rows
from edgeft.documents import cache_folder
from edgeft.errors import BadInput
from edgeft.memory import train_step
from edgeft.memory.disk import free_bytes, prefix_disk
from edgeft.models.spec import ModelSpec
from edgeft.planning.costs import Question
from edgeft.settings.job import Job, Training
from edgeft.units import show_bytes, show_seconds


def obstacle(spec: ModelSpec, training: Training, rows_tokens: int) -> tuple[str, str]:
    """(why a way of training cannot start from its lower layers' outputs, what to do about it); empty where it can."""
    lowest = min(training.trained_layers, default=0)
    upper = max(1, spec.num_hidden_layers // 4)
    some = f"train upper layers alone, as in --set layers=sparse --set active_layers={upper}"
    if training.embedding != "off":
        tied = " (the head is tied to it)" if spec.tie_word_embeddings else ""
        return f"the embedding{tied} {'rotates' if training.embedding == 'rotate' else 'trains'}", "leave it off"
    if training.layers == "all":
        return "all layers train, the lowest too", some
    if not lowest:
        return "layer 0 trains: nothing lies below", some
    if training.quantize_aware is not None:
        return "the base is scored unrounded, and trained beside as the target rounds it", "drop quantize_aware"
    if training.prefix_tokens:
        return "every layer sees the keys and values of its own prefix", "use another tuner"
    if spec.stacked:
        return f"{spec.stacked[0]} and its like are put together from several tensors of the files", ""
    if not rows_tokens:
        return "the rows are not known", "plan with --data FILE (make: data=FILE)"
    return "", ""


def tokens_kept(job: Job, files: Mapping[str, Measured], most: int) -> int:
    """Tokens of all rows that a run trains on or scores, cut to `most` each; 0 where no file was read."""
    if job.data is None or not files:
        return 0
    rows = {source: [size.cut(most) for size in found.sizes] for source, found in files.items()}
    train, valid = rows[job.data], rows[job.valid] if job.valid else []
    if not job.valid:
        train, valid = hold_out(train, HELD_OUT_SHARE, job.seed)
    valid, stopping = validation_rows(valid, job.patience, job.eval_rows)
    scored = [*stopping, *valid[: job.eval_rows], *(rows[job.test] if job.test else [])]
    return sum(row.tokens for row in train if row.trained) + sum(row.tokens for row in scored)


def prefixes(job: Job, spec: ModelSpec, training: Training, rows_tokens: int) -> list[dict[str, Any]]:
    """The fields of Training that say which outputs are kept, faster first where there are epochs; as far as set."""
    ways: list[dict[str, Any]] = []
    if job.prefix_cache is not False and not obstacle(spec, training, rows_tokens)[0]:
        cut = cut_of(job, training, rows_tokens)
        if job.prefix_cache or fits_disk(spec, training.model_copy(update=cut)):
            ways.append(cut)
    return ways if job.prefix_cache else [*ways, {}]


def cut_of(job: Job, training: Training, rows_tokens: int) -> dict[str, Any]:
    """The fields of a Training that keeps all that it can."""
    dtype = "bf16" if job.prefix_cache == "bf16" else "computed"
    return {"cached_layers": min(training.trained_layers), "cached_tokens": rows_tokens, "cached_dtype": dtype}


def fits_disk(spec: ModelSpec, training: Training) -> bool:
    """Whether this machine has the room now: what nobody asked for must not be what a run fails of."""
    return prefix_disk(spec, training).peak_bytes <= free_bytes(cache_folder())


def check_prefix(job: Job, spec: ModelSpec, training: Training, rows_tokens: int) -> None:
    """Raise BadInput where outputs are to be kept and cannot be."""
    why, hint = obstacle(spec, training, rows_tokens)
    if job.prefix_cache and why:
        raise BadInput("prefix_cache", f"no outputs of lower layers can be kept: {why}", hint)


def prefix_notes(question: Question, training: Training, rows_tokens: int) -> list[str]:
    """What keeping the outputs brings or, where it could be done and was not, why not: one line."""
    spec, other = question.spec, training.model_copy(update={"cached_layers": 0})
    if not training.cached_layers and (question.job.prefix_cache is False or obstacle(spec, training, rows_tokens)[0]):
        return []
    kept = training.model_copy(update=cut_of(question.job, training, rows_tokens))
    disk, made = prefix_disk(spec, kept).peak_bytes, question.prefix_seconds(kept)
    before, after = (question.key(way)[1] * way.steps for way in (other, kept))
    what = (
        f"layers 0 to {kept.cached_layers - 1} run once for each row ({show_seconds(made)}, {show_bytes(disk)} on disk)"
    )
    if not fits_disk(spec, kept):
        what += f", {show_bytes(free_bytes(cache_folder()))} are free in {cache_folder()}"
        if kept.cached_dtype == "computed" and training.compute_dtype == "fp32":
            what += "; prefix_cache=bf16 takes half"
    if not training.cached_layers:
        return [f"prefix cache: none: with it {what}: {after / before - 1:+.0%} time (--set prefix_cache=true)"]
    freed = show_bytes(train_step.dropped_bytes(spec, kept))
    return [f"prefix cache: {what}, not in each epoch: {after / before - 1:+.0%} time; {freed} of weights leave memory"]
