"""When does each of several processes hold a part of the base alone, why not, and what does it take?

It is looked at where nothing fits whose whole base is in every process, or where a user asks for it: it costs gathering
every layer twice in a micro-batch, and changes no result.
"""

from __future__ import annotations

from typing import Any

from edgeft.errors import BadInput
from edgeft.memory.sharded import elsewhere_bytes, gathered_bytes, uncut
from edgeft.models.spec import ModelSpec
from edgeft.planning.costs import Question
from edgeft.settings.job import Job, Training
from edgeft.units import show_bytes


def obstacle(job: Job, spec: ModelSpec, training: Training) -> tuple[str, str]:
    """(why a way of training cannot have its base in parts, what to do about it); empty where it can."""
    if training.processes == 1:
        return "one process has all of it", "plan with --processes N"
    if spec.stacked:
        return f"{spec.stacked[0]} and its like are put together from several tensors of the files", ""
    if not training.adapts:
        return "its own weights train, and each process needs those that do", "use tuner=lora"
    if training.embeds:
        return "a soft prompt runs through all layers once more than others' rows do", "use tuner=prefix or lora"
    if training.quantize_aware is not None:
        return "weights are rounded for the target where they are whole", "drop quantize_aware"
    if job.stream_layers:
        return "its layers are to stay in their files", "leave out stream_layers or shard_base"
    if job.prefix_cache:
        return "the lower layers' outputs are to be kept on disk", "leave out prefix_cache or shard_base"
    if job.malloc == "fast":
        return "malloc=fast counts what is resident, and layers come and go", "drop malloc=fast"
    return "", ""


def executions(job: Job, spec: ModelSpec, training: Training, ways: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the `ways` to compute a step those that a way of training has as the job asks; none where it cannot be cut."""
    if not job.shard_base:
        return ways
    if obstacle(job, spec, training)[0]:
        return []
    return [{**way, "shard_base": True} for way in ways if way["malloc"] == "tight"]


def check_sharding(job: Job, spec: ModelSpec, training: Training) -> None:
    """Raise BadInput where a base is to be in parts and cannot."""
    if not job.shard_base:
        return
    why, hint = obstacle(job, spec, training)
    if why:
        raise BadInput("shard_base", f"the base cannot be cut into parts: {why}", hint)


def sharding_notes(question: Question, training: Training) -> list[str]:
    """What parts take and save: one line, where a base is cut."""
    if not training.shard_base:
        return []
    spec, count = question.spec, training.processes
    asked = "as set" if question.job.shard_base else "nothing fits with all of it in each process"
    elsewhere, window = elsewhere_bytes(spec, training), gathered_bytes(spec, training)
    slower = question.seconds(training) / question.seconds(uncut(training)) - 1
    return [
        f"each process holds 1/{count} of every layer of the base ({asked}), and two of "
        f"{spec.num_hidden_layers} layers whole at a time, {show_bytes(window // 2)} each: "
        f"{show_bytes(elsewhere - window)} less memory than with all of them; "
        f"{show_bytes(round(question.counted(training).gathered))} are gathered in a step: {slower:+.0%} time "
        "(by the same guess)"
    ]
