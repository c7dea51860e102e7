"""What may an export hold on this machine, and how does its proof load models there: whole, or a layer at a time?"""

from __future__ import annotations

from pathlib import Path

from edgeft.exporting.sensitivity import MOVE_BYTES
from edgeft.machines.limits import memory_limit
from edgeft.memory import disk, proof, stages
from edgeft.memory.train_step import Phase
from edgeft.models.checkpoint import load_plain
from edgeft.models.streamed import Load, load_streamed
from edgeft.planning.costs import Question
from edgeft.planning.plan import Plan
from edgeft.targets.target import Target
from edgeft.units import show_bytes


def check_room(plan: Plan, target: Target, out: Path, *, computed: bool, calibrate: bool = True) -> int:
    """Expected highest bytes of an export; `computed`: this process has used torch. Codes may have been made already.

    Raises DoesNotFit where this machine has too little memory or disk for a stage of it.
    """
    question = question_of(plan)
    proven = proof_phase(plan, target)
    phases = [stages.build(question, target, stages.process_bytes(proven) if computed else 0), proven]
    phases += stages.calibrate_phases(question, target) if calibrate else ()
    for phase in phases:
        stages.check_host(phase.name, phase.low_bytes - stages.file_bytes(phase))
    disk.require(disk.export_disk(plan.spec, target, training=plan.training), out)
    return max(phase.expected_bytes for phase in phases)


def question_of(plan: Plan) -> Question:
    """What a plan's stages after training depend on."""
    data_bytes, budget = plan.stages.data_bytes, plan.budget_bytes
    return Question(plan.job, plan.profile, plan.spec, plan.lengths, plan.work, data_bytes, budget)


def room_bytes(plan: Plan) -> int:
    """What a proof here may hold: what its plan counts on, less where this process can have less."""
    here, planned = memory_limit().bytes, plan.stages.host_bytes
    return here if planned is None else min(planned, here)


def proof_phase(plan: Plan, target: Target) -> Phase:
    """The parity ladder as it was planned, or in the memory that this process can have where that is less."""
    return proof.prove(question_of(plan), plan.training, target, room_bytes(plan))


def loader(plan: Plan) -> Load:
    """How a proof here loads models in fp32: whole, or a layer at a time."""
    return load_streamed if proof.streams(question_of(plan), plan.training, room_bytes(plan)) else load_plain


def no_room_to_promote(plan: Plan) -> str:
    """Why it cannot be measured here which tensors are worth 8 bits; empty where it can."""
    whole, there = (4 + MOVE_BYTES) * plan.spec.total_parameters, room_bytes(plan)
    if loader(plan) is load_plain and whole <= there:
        return ""
    what = f"a whole model in fp32 and what rounding moves it by, {show_bytes(whole)}"
    return f"takes {what}, and more than the {show_bytes(there)} here"


def less_room(plan: Plan) -> str:
    """What is to be said where a proof here reads a layer at a time and its plan has whole models; else nothing."""
    planned, here = plan.stages.host_bytes, memory_limit()
    if loader(plan) is load_plain or proof.streams(question_of(plan), plan.training, planned):
        return ""
    counted = "whole models do not fit" if planned is None else f"the plan counts on {show_bytes(planned)}"
    there = f"this process can have {show_bytes(here.bytes)} ({here.reason})"
    return f"{counted}, {there}: the proof reads models a layer at a time, which takes longer"
