"""On which device does a plan run here, what changes where its own is absent, and is its model as it is counted on?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from edgeft.data.dataset import IGNORED, Sample
from edgeft.engine.nf4_base import load_base
from edgeft.engine.ranks import ALONE, Ranks
from edgeft.errors import BadInput
from edgeft.machines.pool import Pool
from edgeft.machines.profile import detect, load_profile
from edgeft.memory import stages, train_step
from edgeft.memory.phases import CPU_HEAP, HEAD_CHECK_TOKENS, pool_size
from edgeft.models.checkpoint import DTYPES
from edgeft.models.evaluate import autocast, token_losses
from edgeft.models.parts import Parts, find_parts, repeat_groups
from edgeft.planning.costs import Question
from edgeft.planning.plan import Plan
from edgeft.planning.processes import budget_of_one
from edgeft.progress import Progress, silent
from edgeft.settings.attention import repeats_groups
from edgeft.settings.job import Training
from edgeft.training.result import Deviation, deviating


def choose_device(
    plan: Plan, wanted: str | None, *, emulate: bool = False
) -> tuple[torch.device, torch.dtype, list[Deviation]]:
    """(device, compute dtype, deviations): the plan's own, or the CPU in a dtype it computes at full rate.

    `emulate`: on the CPU in the plan's dtypes, slowly: what a GPU's plan computes, seen without one. Raises BadInput
    when `wanted` names a device that is not there.
    """
    training = plan.training
    here = {"cpu": True, "cuda": cuda_computes(training.compute_dtype), "mps": torch.backends.mps.is_available()}
    if wanted is not None and not here.get(wanted, False):
        raise BadInput("--on", f"{wanted} is not available here", "leave --on out to train on the CPU")
    if wanted is not None and wanted != training.device:
        raise BadInput("--on", f"the plan is for {training.device}, not {wanted}", "plan for another machine: --on")
    compute = DTYPES[training.compute_dtype]
    if here[training.device] and not emulate:
        return torch.device(training.device), compute, []
    instead = {"device": "cpu", "optimizer": "adamw"}
    if not emulate:
        kept = "nf4" if training.base_precision == "nf4" else "fp32"
        instead |= {"compute_dtype": "fp32", "base_precision": kept}
    deviations = [Deviation(what=what, planned=planned, done=done)
                  for what, done in instead.items() if (planned := getattr(training, what)) != done]  # fmt: skip
    return torch.device("cpu"), compute if emulate else torch.float32, deviations


def cuda_computes(dtype: str) -> bool:
    """Whether there is a CUDA device that computes in a dtype at hardware rate."""
    return torch.cuda.is_available() and (dtype != "bf16" or torch.cuda.get_device_capability() >= (8, 0))


def carried_out(plan: Plan, deviations: Sequence[Deviation]) -> Plan:
    """The plan as it is carried out: itself, or on the CPU in place of a GPU, with what that takes there.

    Scoring is of the groups that the plan keeps. A family that the closed form does not hold for is simulated anew;
    raises BadInput where it cannot be.
    """
    training = deviating(plan.training, deviations)
    if training.device == plan.training.device:
        return plan
    machine, data_bytes = detect(load_profile("cpu")), plan.stages.data_bytes
    budget = budget_of_one(plan.job, machine)
    scorings = {(training.group_tokens, training.max_length, plan.sample_answers): plan.scoring}
    question = Question(
        plan.job, machine, plan.spec, plan.lengths, plan.work, data_bytes, budget, task_score=plan.task_score,
        scorings=scorings,
    )  # fmt: skip
    if not train_step.known(plan.spec):
        question.simulate(training)
    phases = question.phases(training)
    resume = stages.resume(plan.spec, training, stages.processes(machine), data_bytes)
    around = tuple(resume if phase.name == "resume" else phase for phase in plan.stages.phases)
    return plan.model_copy(update={
        "training": training, "phases": phases, "peak_bytes": max(phase.high_bytes for phase in phases),
        "budget_bytes": budget, "stages": plan.stages.model_copy(update={"phases": around}),
    })  # fmt: skip


def prepare(
    plan: Plan, device: torch.device, compute: torch.dtype, folder: Path, progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> tuple[Any, Parts]:  # fmt: skip
    """The base model on its device, frozen, with the attention the plan counts on."""
    model = load_base(folder, plan.training, device, compute, progress, ranks)
    if repeats_groups(plan.training, plan.spec.head_dim):
        repeat_groups(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, find_parts(model)


def check_head(model: Any, parts: Parts, sample: Sample, device: torch.device, compute: torch.dtype) -> None:
    """Compare the chunked loss with the model's own logits on one sample; raises BadInput where they differ.

    It catches a model that does something to its hidden states or logits that edgeft does not know of.
    """
    short = Sample(sample.ids[:HEAD_CHECK_TOKENS], [IGNORED, *sample.ids[1:HEAD_CHECK_TOKENS]], 0)
    with torch.no_grad(), autocast(device, compute):
        logits = model(input_ids=torch.tensor([short.ids], device=device), use_cache=False).logits[0, :-1].float()
    targets = torch.tensor(short.ids[1:], device=device)
    own = float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    with torch.no_grad():
        ours = float(token_losses(model, parts, [short], device, compute, 16))
    # half precision: the model's own logits are rounded once more than ours
    if abs(own - ours) > (1e-3 if compute == torch.float32 else 2e-2) * max(1.0, abs(own)):
        name = type(model).__name__
        raise BadInput(
            name,
            f"its own loss on one sample is {own:.4f}, computed in chunks {ours:.4f}",
            "report this model",
        )


@contextlib.contextmanager
def tf32(training: Training, device: torch.device) -> Iterator[None]:
    """Let fp32 products run on tensor cores, which round their inputs to 10 bits (bf16 has 7): CUDA from 8.0 on."""
    before = torch.get_float32_matmul_precision()
    if (
        training.compute_dtype == "fp32"
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
    ):
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def make_pool(plan: Plan, parts: Parts) -> Pool:
    """The pool of freed memory that a plan wants, watched from the model's layers."""
    size = pool_size(plan.spec, plan.training, plan.work)
    pool = Pool(size.reserve, least=size.kept)
    pool.watch([layer for stack in parts.stacks for layer in stack.layers], parts.body)
    hold_to(pool, plan, "evaluate")
    return pool


def hold_to(pool: Pool, plan: Plan, name: str) -> None:
    """Let the pool keep what the plan's phase expects; of one with answers in it, what its high estimate has room for.

    `most` stays half way below the high estimate: what a layer takes is what was seen of it.
    """
    phase = next(phase for phase in plan.phases if phase.name == name)
    pool.limit = max(phase.expected_bytes, phase.high_bytes - CPU_HEAP) if name == "evaluate" else phase.expected_bytes
    pool.most = (pool.limit + phase.high_bytes) / 2
