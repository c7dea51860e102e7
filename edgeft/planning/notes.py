"""What does a chosen way of training amount to where its name promises more?"""

from __future__ import annotations

from edgeft.machines.profile import Profile
from edgeft.models.families import overflows_fp16
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import ENDS, Training


def training_notes(spec: ModelSpec, training: Training) -> list[str]:
    """What the chosen way amounts to where its name promises more."""
    lines = []
    if training.layers == "lisa":
        rotating = sum(getattr(training, end) == "rotate" for end in ENDS)
        if training.active_layers >= len(training.trained_layers) + rotating:
            lines.append("lisa: only one draw is possible, every layer trains all the time")
        elif training.lisa_interval >= training.steps:
            lines.append(
                f"lisa never switches: the run has {training.steps} steps, an interval {training.lisa_interval}; "
                f"the first {training.active_layers} layers that are drawn train alone"
            )
    if training.compute_dtype == "fp16" and overflows_fp16(spec.model_type):
        lines.append(f"{spec.model_type} overflows in fp16: drop --set base_precision=fp16, and it computes in fp32")
    return lines


def machine_notes(profile: Profile) -> list[str]:
    """What the seconds of a plan rest on where this machine was busy when its CPU was measured."""
    if not (profile.probe and profile.probe.busy):
        return []
    return [
        f"this CPU was measured while other work ran beside it ({profile.probe.share:.0%} of its cores were left): "
        "seconds are as if that stayed so: fewer where it is quiet, more where busier; a later plan measures again"
    ]
