"""What did a simulated training step hold in memory, and when? Data only: the simulation itself is in `simulate`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeft.documents import Strict

StepPhase = Literal["forward", "backward", "optimizer"]


class Moment(Strict):
    """One part of a step (a layer's MLP, the loss, ...) and the most that was alive during it."""

    phase: StepPhase
    name: str
    live_bytes: int


class TensorGroup(Strict):
    """Tensors alive at the same time that came from the same operation in the same part of the model."""

    operation: str
    part: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int = Field(description="of one of them")
    count: int


class Simulation(Strict):
    """Live tensor bytes of one optimizer step of a run whose optimizer states exist; on CUDA in units of 512 bytes."""

    live_peak_bytes: int
    phase: StepPhase
    moment: str
    weights_bytes: int = Field(description="base model with its buffers and quantisation states")
    adapter_bytes: int
    optimizer_bytes: int
    phase_peaks: tuple[Moment, ...] = Field(description="the highest moment of each phase, in the order of a step")
    timeline: tuple[Moment, ...] = Field(description="at most 200 moments in order, for a plot")
    largest: tuple[TensorGroup, ...] = Field(description="what is alive at the peak, the ten largest groups")
    seconds: float = Field(description="spent on simulating")
    extrapolated: bool = Field(description="from shallower models; exact all the same")
    layers_simulated: int
