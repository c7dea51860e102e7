"""Where do the scores of layers come from that a plan needs: from an earlier time, or measured now in a process apart?

The planning half: torch is loaded in the process that measures only, and gone with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pydantic

from edgeft import errors
from edgeft.data.sources import files
from edgeft.documents import cache_folder, saving, sha256_json, versions
from edgeft.errors import BadInput, DoesNotFit, EdgeftError
from edgeft.machines import processes
from edgeft.models.headers import local_folder
from edgeft.models.identity import data_inputs, model_inputs
from edgeft.models.metrics import Importance
from edgeft.models.spec import read_model_spec
from edgeft.planning.job_checks import check_job, needs_importance
from edgeft.planning.plan import Plan, make_plan
from edgeft.progress import Progress
from edgeft.settings.job import Job
from edgeft.settings.tuners import ADAPTERS, TUNERS

# of a job, what holds for the training that scores its layers as well; the rest is LoRA in all layers, as planned
KEPT = ("model", "data", "valid", "profile", "base_precision", "micro_batch_size", "batch_size", "max_length",
        "checkpointing", "kept_layers", "loss_chunk_tokens", "optimizer", "weight_decay", "max_grad_norm", "seed",
        "max_memory_bytes")  # fmt: skip
KEPT_OF_LORA = ("rank", "lora_alpha", "lora_scale", "lora_plus", "learning_rate")
# of its plan, what scores follow: how much fits at a time changes none
MATTERS = ("base_precision", "compute_dtype", "max_length", "seed")
MATTERS_WHERE_ADAPTERS_TRAIN = ("rank", "lora_alpha", "lora_scale", "lora_plus", "target_modules", "learning_rate",
                                "batch_size", "optimizer", "weight_decay", "max_grad_norm")  # fmt: skip


def scoring_plan(job: Job) -> Plan:
    """How a job's layers are scored inside its budget: as LoRA in all layers trains.

    Hidden states need no backward pass: where LoRA in all layers does not fit, any plan with LoRA does for them.
    Raises DoesNotFit for the other scores.
    """
    kept = KEPT + KEPT_OF_LORA if job.tuner is None or TUNERS[job.tuner].scaled else KEPT
    every = Job(**{name: getattr(job, name) for name in kept}, tuner=ADAPTERS, layers="all", prefix_cache=False)
    try:
        return make_plan(every)
    except DoesNotFit as problem:
        if job.layer_score == "hidden":
            return make_plan(every.model_copy(update={"layers": None}))
        hint = "use layer_score=hidden, which needs no backward pass, or name the layers: trained_layers=12-15"
        raise DoesNotFit(
            "layer_score", f"{job.layer_score} needs all layers at once: {problem.problem}", hint
        ) from None


def score_layers(job: Job, progress: Progress = lambda stage, done, total, numbers: None) -> Importance:
    """The scores of a job's layers by its `layer_score`: kept ones of the same weights, data, method and seed, or new.

    Raises BadInput for a job that needs none or has no data, DoesNotFit when scoring does not fit the budget.
    """
    spec = read_model_spec(job.model)
    check_job(job, spec)
    if not needs_importance(job):
        raise BadInput("layer_score", f"a plan of this job needs no scores ({job.layer_score})", "call make_plan alone")
    plan = scoring_plan(job)
    kept = cache_folder() / "importance" / f"{_digest(plan, job)[:24]}.json"
    try:
        return Importance.model_validate_json(kept.read_bytes())
    except (OSError, pydantic.ValidationError):
        pass  # never scored, or by a version that wrote something else
    made = _measure(plan, job, progress)
    with saving(kept):
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
        temporary.write_text(made.model_dump_json() + "\n")
        temporary.replace(kept)
    return made


def _digest(plan: Plan, job: Job) -> str:
    """One digest of all that scores follow: weights, tokenizer, rows, method, seed, precision, how adapters train."""
    folder = local_folder(job.model)
    names = MATTERS + (MATTERS_WHERE_ADAPTERS_TRAIN if job.layer_score in ("ablation", "progressive") else ())
    how = {name: value for name, value in plan.training.model_dump(mode="json").items() if name in names}
    read = model_inputs(folder, weights=True) | data_inputs(plan.job)
    elsewhere = [source for source in (plan.job.data, plan.job.valid) if source and not files(source)]
    return sha256_json([job.layer_score, read, elsewhere, how, versions().get("edgeft", "")])


def _measure(plan: Plan, job: Job, progress: Progress) -> Importance:
    """Score in a process of its own, which ends when this one is interrupted. Raises what was raised there."""
    code = "import sys; from edgeft.training.importance import main; main(*sys.argv[1:])"
    with tempfile.TemporaryDirectory(prefix="edgeft-") as folder, open(Path(folder) / "log", "w+") as log:
        plan.write(Path(folder) / "plan.json")
        command = processes.command(code, f"{folder}/plan.json", job.layer_score)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as child:
            try:
                found = _listen(child.stdout or (), progress)
            except BaseException:
                child.terminate()
                raise
        if found is None:
            log.seek(0)
            reason = processes.reason(child.returncode, log.read())
            raise EdgeftError("layer_score", f"scoring by {job.layer_score} stopped: {reason}", "try another score")
    return found


def _listen(lines: Iterable[str], progress: Progress) -> Importance | None:
    """What a scoring process says, line by line, until it ends; None when it ended without a result."""
    found: Importance | None = None
    for line in lines:
        kind, value = json.loads(line)
        if kind == "progress":
            progress(*value)
        elif kind == "error":
            name, *parts = value
            raise getattr(errors, name)(*parts)
        else:
            found = Importance.model_validate(value)
    return found
