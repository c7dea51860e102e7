"""Which layers train? All, the best by a score, or some in turn: what of it a job leaves open, best first."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from edgeft.models.spec import ModelSpec
from edgeft.settings.job import ENDS, Job, Tuner
from edgeft.settings.tuners import TUNERS, adapts

LISA_INTERVAL = 20  # optimizer steps, when there are enough for two rounds over all layers (LMFlow's default too)
Fields = dict[str, Any]  # those of Training that say which layers and ends train


def layer_choices(job: Job, spec: ModelSpec, tuner: Tuner, steps: int, scores: Sequence[float] | None) -> list[Fields]:
    """Every choice of layers and ends; `scores`: one per layer, where the job chooses by its data."""
    given = {end: getattr(job, end) or "off" for end in ENDS}
    if TUNERS[tuner].embedded:
        return [_all(job, spec, tuner, given)]
    if spec.tie_word_embeddings:
        given["head"] = given["embedding"] = job.embedding or job.head or "off"
    found = []
    if job.layers in (None, "all"):
        found.append(_all(job, spec, tuner, given))
    if job.layers == "sparse" or (job.layers is None and adapts(tuner)):
        found += _some(job, spec, scores, given)
    if job.layers == "lisa" or (job.layers is None and not adapts(tuner)):
        found += _in_turn(job, spec, steps, scores, given)
    if TUNERS[tuner].prefixed:  # a past is as long in every layer: those that never train keep what theirs begins as
        for each in found:
            each["resting_layers"] = tuple(n for n in range(spec.num_hidden_layers) if n not in each["trained_layers"])
    return found


def _all(job: Job, spec: ModelSpec, tuner: Tuner, given: dict[str, str]) -> Fields:
    """All layers; the ends too where weights train themselves, unless the job says otherwise."""
    ends = {} if adapts(tuner) else dict.fromkeys(ENDS, "on")
    set_by_job = {end: mode for end, mode in given.items() if getattr(job, end)}
    return {"layers": "all", "trained_layers": tuple(range(spec.num_hidden_layers)), **ends, **set_by_job}


def _some(job: Job, spec: ModelSpec, scores: Sequence[float] | None, given: dict[str, str]) -> list[Fields]:
    """The best layers: as many as the job says, or three quarters, half and a quarter of all."""
    count = spec.num_hidden_layers
    counts = [job.active_layers] if job.active_layers else sorted({max(1, count * k // 4) for k in (1, 2, 3)})[::-1]
    if job.layer_score == "progressive" and scores and not job.active_layers:
        counts = [max(1, sum(score > 0 for score in scores))]  # the search says itself how far down it pays
    sets = [job.trained_layers] if job.trained_layers else [_best(job, count, n, scores) for n in counts]
    return [{"layers": "sparse", "trained_layers": chosen, **given} for chosen in sets]


def _in_turn(
    job: Job, spec: ModelSpec, steps: int, scores: Sequence[float] | None, given: dict[str, str]
) -> list[Fields]:
    """LISA: so many layers at a time, drawn anew after each interval."""
    pool = job.trained_layers or tuple(range(spec.num_hidden_layers))
    size = len(pool) + sum(mode == "rotate" for mode in given.values())
    weights = draw_weights([scores[i] for i in pool]) if scores else ()
    found = []
    for active in [job.active_layers] if job.active_layers else sorted({min(n, len(pool)) for n in (4, 2)})[::-1]:
        interval = job.lisa_interval or max(1, min(LISA_INTERVAL, steps // (2 * -(-size // active))))
        found.append({
            "layers": "lisa", "trained_layers": pool, "active_layers": active, "lisa_interval": interval,
            "lisa_schedule": job.lisa_schedule, "lisa_state": job.lisa_state, **given, "layer_weights": weights,
        })  # fmt: skip
    return found


def _best(job: Job, layers: int, count: int, scores: Sequence[float] | None) -> tuple[int, ...]:
    """The `count` layers that sparse training takes: the topmost, random ones, or those of the highest scores."""
    if job.layer_score == "random":
        return random_layers(job.seed, layers, count)
    if scores:  # of equal ones the upper: what lies below the lowest that trains costs no memory
        return tuple(sorted(sorted(range(layers), key=lambda i: (-scores[i], -i))[:count]))
    return top_layers(layers, count)


def top_layers(layers: int, count: int) -> tuple[int, ...]:
    """The `count` layers nearest to the head."""
    return tuple(range(layers - count, layers))


def random_layers(seed: int, layers: int, count: int) -> tuple[int, ...]:
    """`count` layers drawn by the seed alone."""
    return tuple(sorted(random.Random(f"layers {seed}").sample(range(layers), count)))


def draw_weights(scores: Sequence[float]) -> tuple[float, ...]:
    """Weights of LISA's draws: the scores, no less than a tenth of their mean, so that every layer has its turn.

    Scores that are not positive say that a layer brings nothing; if all say so, the draws are uniform.
    """
    positive = [max(0.0, score) for score in scores]
    mean = sum(positive) / len(positive)
    return tuple(max(score, mean / 10) for score in positive) if mean > 0 else (1.0,) * len(positive)
