"""Which settings of a job contradict one another, or the model?"""

from __future__ import annotations

from edgeft.errors import BadInput
from edgeft.models.spec import ModelSpec
from edgeft.planning.early_stopping import check_patience
from edgeft.planning.output_bias import check_shift
from edgeft.planning.prefix_tuner import check_prefix_tuner
from edgeft.planning.projections import check_modules
from edgeft.planning.quantize_aware import rounding_of
from edgeft.planning.rank_budget import check_target_rank
from edgeft.settings.job import ENDS, Job, Training
from edgeft.settings.tuners import ADAPTERS, TUNERS, WEIGHTS, Form, Tuning, adapts

SMALL_PRECISIONS = ("nf4", "bf16", "fp16")  # of weights that do not train: updates of a few 1e-4 would be rounded away
ADAPTERS_OWN = ("rank", "lora_alpha", "lora_scale", "lora_plus", "init", "adapter_at", "target_modules")
DATA_SCORES = ("gradient", "hidden", "ablation", "progressive")  # edgeft/training/importance.py measures them


def needs_importance(job: Job) -> bool:
    """Whether a plan of this job needs scores of layers that are measured on its data."""
    weighted = job.layers == "lisa" and job.lisa_schedule == "weighted"
    chooses = job.layers == "sparse" and not job.trained_layers
    return (weighted or chooses) and job.layer_score in DATA_SCORES


def untrainable(precision: str) -> BadInput:
    """What to say of full fine-tuning in a precision that takes no small updates."""
    what = "4-bit" if precision == "nf4" else precision
    hint = "use tuner=lora, layers=lisa or layers=sparse (those that train are dense then), or base_precision=fp32"
    return BadInput("base_precision", f"{what} weights cannot be trained themselves", hint)


def pages_pile_up() -> BadInput:
    problem = "paged_adamw8bit never frees the paged states of layers that leave, and lisa's layers come and go"
    return BadInput("optimizer", problem, "use optimizer=adamw8bit or adamw with layers=lisa")


def check_job(job: Job, spec: ModelSpec) -> None:
    """Raise BadInput for settings that contradict one another or the model."""
    rounding_of(job, spec)
    if job.micro_batch_size is not None and job.micro_batch_size > job.batch_size:
        problem = f"{job.micro_batch_size} samples at a time are more than the {job.batch_size} of a step"
        raise BadInput("micro_batch_size", problem, "leave it to the planner, or raise batch_size")
    if adapts(job.tuner) is False and job.base_precision in SMALL_PRECISIONS and job.layers not in ("lisa", "sparse"):
        raise untrainable(job.base_precision)
    if job.optimizer == "paged_adamw8bit" and job.layers == "lisa":
        raise pages_pile_up()
    _check_layers(job, spec)
    _check_tuner(job, spec)
    _check_form(job, spec)
    _check_ends(job, spec)
    _check_scores(job)
    check_patience(job)


def _check_layers(job: Job, spec: ModelSpec) -> None:
    count = spec.num_hidden_layers
    for name, most in (("active_layers", job.active_layers), ("trained_layers", max(job.trained_layers or (0,)) + 1)):
        if getattr(job, name) is not None and most is not None and most > count:
            raise BadInput(name, f"{most} is more than the model's {count} layers", f"at most {count}")
    if job.trained_layers == ():
        raise BadInput("trained_layers", "names no layer", f"name some of 0 to {count - 1}, as in 0,5,12-15")
    for name in ("active_layers", "trained_layers"):
        if getattr(job, name) is not None and job.layers in (None, "all"):
            raise BadInput(name, "says which layers train, but all do", "add --set layers=sparse or layers=lisa")
    if job.layers == "sparse" and job.trained_layers and job.active_layers not in (None, len(job.trained_layers)):
        raise BadInput("active_layers", f"{job.active_layers}, but trained_layers names {len(job.trained_layers)}",
                       "leave one of them out")  # fmt: skip


def _check_tuner(job: Job, spec: ModelSpec) -> None:
    if spec.stacked and adapts(job.tuner) is False:
        problem = f"{spec.stacked[0]} and its like are put together from several tensors of the checkpoint's files"
        raise BadInput("tuner", f"{problem}: what they learn cannot be saved under a name there", "use tuner=lora")
    if job.lora_plus != 1 and job.tuner is not None and not TUNERS[job.tuner].faster:
        problem = f"{job.tuner} has no second factor that could learn faster than the first"
        raise BadInput("lora_plus", problem, "use tuner=lora, or leave lora_plus out")


def _check_form(job: Job, spec: ModelSpec) -> None:
    """Raise BadInput for settings of another tuner than the job's, and for a model that has no place for its own."""
    row, out = TUNERS[job.tuner or ADAPTERS], f"use tuner={ADAPTERS}, or leave it out"
    if job.rank is not None and row.adapters and not row.ranked:
        raise BadInput("rank", f"{job.tuner} has no factors of a rank", out)
    if job.lora_alpha is not None and row.adapters and not row.scaled:
        raise BadInput("lora_alpha", f"{job.tuner} has no product that it would scale", out)
    if job.adapter_at not in ("both", *(row.forms if row.chosen_by == "adapter_at" else ())):
        problem = f"says where adapters lie that no weight can hold, and {job.tuner or 'what is planned'} has none"
        raise BadInput("adapter_at", problem, "use tuner=adapter, or leave it out")
    if job.init not in ("random", *(row.forms if row.chosen_by == "init" else ())):
        hint = f"use tuner={ADAPTERS}, or leave init out"
        raise BadInput("init", f"{job.tuner} has nothing that could begin as {job.init} does", hint)
    if row.prefixed or job.prefix_tokens:
        check_prefix_tuner(job, spec, row)
    check_modules(job, row)
    check_shift(job, spec, row)
    check_target_rank(job, row)
    form = form_of(job, row)
    missing = sorted(set(form.roles) - {linear.role for linear in spec.linears})
    if missing and row.needs_roles:
        problem = f"{job.tuner} changes what this model has no projection of its own for: {', '.join(missing)}"
        raise BadInput("tuner", problem, f"use tuner={ADAPTERS}")
    if form.around and spec.family.inline_mlp:
        problem = "this model's MLP is in its layers' own code, no module that an adapter could lie beside"
        raise BadInput("adapter_at", problem, "use adapter_at=both or adapter_at=mlp")


def form_of(job: Job, row: Tuning) -> Form:
    """How a tuner trains what a job asks for."""
    return row.forms[getattr(job, row.chosen_by)]


def _check_ends(job: Job, spec: ModelSpec) -> None:
    ends = [end for end in ENDS if getattr(job, end) not in (None, "off")]
    if ends and adapts(job.tuner):
        raise BadInput(ends[0], "embedding, norm and head have no adapters", "use tuner=full, or leave it off")
    if ends and job.tuner is None and (asked := of_adapters(job)):
        problem = f"trains in full fine-tuning alone, and {', '.join(asked)} would have no effect there"
        raise BadInput(ends[0], problem, f"leave {ends[0]} out, or add --set tuner=full and leave out the others")
    if "rotate" in (job.embedding, job.norm, job.head) and job.layers != "lisa":
        raise BadInput("rotate", "embedding, norm and head rotate only with the layers", "add --set layers=lisa")
    if spec.tie_word_embeddings and job.head is not None and job.embedding is not None and job.head != job.embedding:
        problem = f"{job.head}, the embedding {job.embedding}: they are one tied tensor in this model"
        raise BadInput("head", problem, "leave head out: it follows the embedding")


def of_adapters(job: Job) -> list[str]:
    """The settings of adapters that a job asks for."""
    return [name for name in ADAPTERS_OWN if getattr(job, name) != Job.model_fields[name].default]


def unused_notes(job: Job, training: Training) -> list[str]:
    """A line where settings of adapters were asked for and none train."""
    asked = of_adapters(job) if training.tuner == WEIGHTS else []
    return [f"{', '.join(asked)}: of adapters, without effect where all weights train"] if asked else []


def _check_scores(job: Job) -> None:
    if job.lisa_schedule == "weighted" and job.layer_score in ("top", "random"):
        raise BadInput("lisa_schedule", "weighted draws need scores", "add --set layer_score=gradient (or another)")
    if job.layer_score in DATA_SCORES and job.layers != "sparse" and not needs_importance(job):
        hint = "add --set layers=sparse, or layers=lisa and lisa_schedule=weighted"
        raise BadInput("layer_score", f"{job.layer_score} chooses layers, but nothing here asks for a choice", hint)
    if needs_importance(job) and job.data is None:
        hint = "plan with --data FILE (make: data=FILE), or use layer_score=top"
        raise BadInput("layer_score", f"{job.layer_score} is measured on training data, and none was given", hint)
