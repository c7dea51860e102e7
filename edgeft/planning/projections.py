"""Which projections of a layer does a tuner adapt: its own, or those that the job names?"""

from __future__ import annotations

from edgeft.errors import BadInput, did_you_mean
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import Job, Tuner
from edgeft.settings.tuners import ADAPTERS, TUNERS, Form, Tuning

# what target_modules calls by one word, by the parts of a layer that projections play
ATTENTION, MLP = ("attention_in", "attention_out"), ("mlp_in", "mlp_out")
PARTS: dict[str, tuple[str, ...]] = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}


def target_modules(
    spec: ModelSpec, tuner: Tuner, form: Form | None = None, chosen: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    """The projections of a layer that a tuner adapts, in the layer's order; none where weights train themselves.

    `chosen`: names of projections or of PARTS. Raises BadInput for one that no projection of the model has.
    """
    row = TUNERS[tuner]
    if not row.adapters:
        return ()
    if chosen:
        wanted = {name for each in chosen for name in _named(spec, each)}
        return tuple(linear.name for linear in spec.linears if linear.name in wanted)
    roles = (form or next(iter(row.forms.values()))).roles
    asking = [linear.name for linear in spec.linears if linear.role == "attention_in"]
    left_out = asking[:1] if len(asking) == 3 and not row.asks else []
    return tuple(linear.name for linear in spec.linears if linear.role in roles and linear.name not in left_out)


def _named(spec: ModelSpec, asked: str) -> list[str]:
    """The projections that a word means: of a part, or of this name, or whose name ends so, as in c_proj."""
    if asked in PARTS:
        found = [linear.name for linear in spec.linears if linear.role in PARTS[asked]]
    else:
        found = [linear.name for linear in spec.linears if f".{linear.name}".endswith(f".{asked}")]
    if not found:
        known = [*PARTS, *(linear.name for linear in spec.linears)]
        raise BadInput("target_modules", f"a layer of this model has no projection {asked!r}",
                       did_you_mean(asked, known) + f"; it has {', '.join(known[len(PARTS):])}")  # fmt: skip
    return found


def check_modules(job: Job, row: Tuning) -> None:
    """Raise BadInput where a job chooses projections for a tuner whose places are its definition."""
    if job.target_modules is not None and not row.placed:
        able = ", ".join(name for name, each in TUNERS.items() if each.placed)
        problem = f"chooses the projections of {able}; where {job.tuner} lies is part of what it is"
        raise BadInput("target_modules", problem, f"leave it out, or use tuner={ADAPTERS}")
