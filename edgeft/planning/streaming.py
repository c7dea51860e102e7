"""When do frozen layers stay in their files, why not, and what does it take?

It is taken where nothing fits whose weights are all in memory, where what fits gives up a point more (choice.py), or
where a user asks for it: it costs reading every layer twice in a micro-batch, and changes no result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgeft.errors import BadInput
from edgeft.memory.disk import turns_in_files
from edgeft.memory.streamed import away_bytes, files_bytes, layer_file_bytes, window_bytes
from edgeft.memory.timing import READ_BYTES_PER_SECOND, read_rate
from edgeft.models.spec import ModelSpec
from edgeft.planning.costs import Question
from edgeft.planning.early_stopping import cannot_keep
from edgeft.settings.job import Job, Training
from edgeft.units import show_bytes

DEVICES = ("cpu", "cuda")  # which layers come to from their files


def obstacle(spec: ModelSpec, training: Training) -> tuple[str, str]:
    """(why a way of training cannot leave its layers in their files, what to do about it); empty where it can."""
    if training.device not in DEVICES:
        return f"they come to CPUs and CUDA devices, and this is a {training.device} profile", "drop stream_layers"
    if training.device == "cuda" and training.embeds:
        return "a GPU would hold every layer that read a soft prompt until its gradient comes", "use tuner=prefix"
    if spec.stacked:
        return f"{spec.stacked[0]} and its like are put together from several tensors of the files", ""
    if not training.adapts and training.layers == "all":
        return "all weights train, none is only read", "use tuner=lora, layers=sparse or layers=lisa"
    if (reason := cannot_keep(training.model_copy(update={"stream_layers": True}))) is not None:
        return reason.problem, "use tuner=lora, or leave patience or stream_layers out"
    if training.quantize_aware is not None:
        return "rounded weights are copies in memory", "drop quantize_aware"
    return "", ""


def executions(job: Job, spec: ModelSpec, training: Training, ways: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the `ways` to compute a step those that a way of training has as the job asks; none where it cannot stream."""
    if not job.stream_layers:
        return ways
    if job.prefix_cache or obstacle(spec, training)[0]:
        return []
    return [
        {**way, "stream_layers": True} for way in ways
        if way["checkpointing"] and not way["kept_layers"] and way["malloc"] == "tight"
    ]  # fmt: skip


def in_groups(question: Question, ways: list[Training]) -> Iterator[list[Training]]:
    """Ways without all of a base in memory, those first that are chosen among as long as one of them fits.

    What processes have together comes before files. Beside a GPU those come first whose files the host keeps in its
    memory, then those of 4 bits: what comes from a disk in every pass decides a step's time, four times as much of it
    for half a point of quality.
    """
    yield [way for way in ways if way.shard_base]
    ways = [way for way in ways if way.stream_layers]
    if question.profile.device == "cuda":
        yield [way for way in ways if host_keeps(question, way)]
        yield [way for way in ways if way.base_precision == "nf4"]
    yield ways


def host_keeps(question: Question, training: Training) -> bool:
    """Whether layers come to a GPU out of its host's memory, not from a disk."""
    files = files_bytes(question.spec, training)
    return read_rate(question.profile, training, files) > READ_BYTES_PER_SECOND


def goes_on(before: Training, after: Training) -> bool:
    """Whether a run that trains the same can go on from the other's checkpoints.

    Layers that wait for their turn are in those, or in files beside them.
    """
    return before.layers != "lisa" or turns_in_files(before) == turns_in_files(after)


def check_streaming(job: Job, spec: ModelSpec, training: Training) -> None:
    """Raise BadInput where layers are to stay in their files and cannot."""
    if not job.stream_layers:
        return
    why, hint = obstacle(spec, training)
    if not why and job.prefix_cache:
        why, hint = "the outputs of the lower ones are to be kept on disk", "leave out prefix_cache or stream_layers"
    if not why and (job.checkpointing is False or job.kept_layers):
        why, hint = "each is read once more when it is recomputed, and not all are to be", "drop checkpointing=false"
        hint = "drop kept_layers" if job.kept_layers else hint
    if not why and job.malloc == "fast":
        why, hint = "malloc=fast counts what is resident, and their pages come and go", "drop malloc=fast"
    if why:
        raise BadInput("stream_layers", f"no layers can stay in their files: {why}", hint)


def streaming_notes(question: Question, training: Training, whole: bool = False) -> list[str]:
    """What streaming takes and saves: one line, where layers stream; `whole`: whether a way fits that does not."""
    if not training.stream_layers:
        return []
    spec, resident = question.spec, training.model_copy(update={"stream_layers": False})
    counted = question.counted(training)
    asked = "as set" if question.job.stream_layers else "nothing fits with all weights in memory"
    if whole and not question.job.stream_layers:
        asked = "better than what fits with all weights in memory"
    away, window = away_bytes(spec, training), window_bytes(spec, training)
    rate, keeps = read_rate(question.profile, training, counted.files), host_keeps(question, training)
    kept = "the host keeps them in its memory" if keeps else "the system keeps none of them"
    reading = f"{show_bytes(round(counted.read))} are read in a step, at {rate / 1e9:g} GB/s if {kept}"
    what = f"{show_bytes(away - window)} less memory than with all of them there"
    slower = question.seconds(training) / question.seconds(resident) - 1
    there = "there" if training.device == "cpu" else "on the GPU"
    lines = [
        f"layers stay in their files ({asked}): two of {spec.num_hidden_layers} are {there} at a time, "
        f"{show_bytes(layer_file_bytes(spec, training))} each, {what}; {reading}: {slower:+.0%} time"
    ]
    if training.device == "cuda":
        lines.append(
            "copies of layers are proven on a CPU in the GPU's place; no GPU's bytes and seconds were measured yet"
        )
    half = training.model_copy(update={"base_precision": training.compute_dtype})
    open_to = training.device == "cuda" and question.job.base_precision is None and half != training
    if open_to and not host_keeps(question, half):
        lines.append(
            f"in 4 bits: in {training.compute_dtype} {show_bytes(files_bytes(spec, half))} of layers would come "
            f"from the host's disk in every pass (--set base_precision={training.compute_dtype})"
        )
    return lines
