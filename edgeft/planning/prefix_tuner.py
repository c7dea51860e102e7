"""Which models, and which other settings, go with keys and values before the text?"""

from __future__ import annotations

from edgeft.errors import BadInput
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import Job
from edgeft.settings.tuners import ADAPTERS, TUNERS, Tuning

PREFIX_TOKENS, SHORTEST = 16, 8  # where none are asked for; tokens of the shortest text that is planned for


def check_prefix_tuner(job: Job, spec: ModelSpec, row: Tuning) -> None:
    """Raise BadInput for a prefix of another tuner, and for a model whose layers cannot all see one."""
    other = f"use tuner={ADAPTERS}"
    if not row.prefixed:
        problem = f"{job.tuner or 'what is planned'} puts no tokens before the text"
        raise BadInput("prefix_tokens", problem, "use tuner=prefix or tuner=prompt, or leave it out")
    if row.embedded and job.layers in ("sparse", "lisa"):
        problem = f"{job.layers} says which layers train, and a soft prompt is in none: it lies before the first"
        raise BadInput("layers", problem, "use tuner=prefix, which is in every layer, or leave layers out")
    if spec.counted_from != "config":
        problem = f"{spec.architecture} is of no family whose attention is known to take keys from elsewhere"
        raise BadInput("tuner", problem, other)
    if spec.family.window_every is not None and spec.sliding_window:
        problem = f"layers that see a window of {spec.sliding_window} tokens would lose the prefix behind it"
        raise BadInput("tuner", problem, other)
    if spec.attn_logit_softcapping:
        raise BadInput("tuner", "attention that caps its scores takes no keys from elsewhere", other)


def tokens_of(job: Job) -> int:
    """Tokens of the prefix that a job trains; 0 where it trains none."""
    prefixed = job.tuner is not None and TUNERS[job.tuner].prefixed
    return (job.prefix_tokens or PREFIX_TOKENS) if prefixed else 0


def positions_left(job: Job, spec: ModelSpec) -> int | None:
    """The model's positions for a text; None: as many as one likes. Raises BadInput where a prefix takes them all."""
    most, tokens = spec.max_position_embeddings, tokens_of(job)
    if most is None or not tokens:
        return most
    if most - tokens < SHORTEST:
        problem = f"{tokens} leave a text {max(0, most - tokens)} of the model's {most} positions"
        raise BadInput("prefix_tokens", problem, f"at most {most - SHORTEST}")
    return most - tokens
