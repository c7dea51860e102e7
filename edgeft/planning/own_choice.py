"""What would a plan have taken, had nothing been asked for that says how much is learnt?"""

from __future__ import annotations

from edgeft.planning.candidates import candidates
from edgeft.planning.choice import best_that_fits
from edgeft.planning.costs import Question
from edgeft.planning.plan import Plan
from edgeft.planning.rows_read import DATA_BYTES, steps_of
from edgeft.settings.job import Job, Training

# Settings that say what trains, how fast and for how long.
LEARNS = (
    "tuner", "rank", "lora_alpha", "lora_scale", "target_modules", "layers", "active_layers", "layer_score",
    "trained_layers", "prefix_tokens", "learning_rate", "epochs", "max_steps", "batch_size", "max_grad_norm",
)  # fmt: skip


def own_choice(plan: Plan) -> Training | None:
    """How the job of a plan would train with those settings left out, from the plan alone; None where nothing fits."""
    job = plan.job.model_copy(update={name: Job.model_fields[name].default for name in LEARNS})
    question = Question(
        job, plan.profile, plan.spec, plan.lengths, plan.work, DATA_BYTES, plan.budget_bytes, (), plan.labels,
        plan.task_score,
    )  # fmt: skip
    steps = steps_of(job, plan.lengths)
    return best_that_fits(
        question, sorted(candidates(job, plan.profile, plan.spec, plan.work, steps), key=question.key)
    )
