"""What differs between ways of tuning? A tuner is a row of TUNERS: what trains, its sizes, its scale, its words.

Adapters are what PEFT's LoraConfig makes: two low-rank factors beside each projection, under PEFT's names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

# Names of what an adapter holds: all of it, its factors' weights; and those of modules in a saved adapter's file.
ADAPTER, DOWN, UP, SAVED = ".lora_", ".lora_A.", ".lora_B.", "base_model.model."


@dataclass(frozen=True)
class Tuning:
    """One tuner. Sizes are in elements, `made` in elements for each token: see `memory.timing`."""

    adapters: bool  # what trains lies beside frozen weights, on projections; else the weights themselves train
    sizes: Callable[[int, int, int], tuple[int, ...]]  # of what trains of a projection: inputs, outputs, rank
    made: tuple[float, ...]  # tensors of a layer that trains, of hidden, MLP, query and key widths and the rank
    rate: Callable[[int], float]  # default learning rate, by the hidden size
    title: str
    short: str  # with {rank}
    method: str  # with {rank} and {layers}
    sentence: str  # with {rank}, {layers} and {ends}, for somebody who does not know the library's names
    scale: Callable[[float, int], float] = lambda alpha, rank: 0.0  # of an adapter's product
    peft: Mapping[str, object] = field(default_factory=dict)  # options of LoraConfig beside rank, alpha and modules


TUNERS: dict[str, Tuning] = {
    # rsLoRA (arXiv 2312.03732): alpha / sqrt(rank), so that the same learning rate serves every rank
    "lora": Tuning(
        adapters=True,
        sizes=lambda inputs, outputs, rank: (rank * inputs, rank * outputs),
        made=(31, 8, 14, 14, 14),
        rate=lambda hidden: 2e-4 * (2000 / hidden) ** 0.775,
        scale=lambda alpha, rank: alpha / rank**0.5,
        peft={"use_rslora": True},
        title="LoRA",
        short="LoRA r{rank}",
        method="LoRA rank {rank} in {layers}",
        sentence="Small adapter matrices of rank {rank} (LoRA) train in {layers}; the model itself stays as it is",
    ),
    "full": Tuning(
        adapters=False,
        sizes=lambda inputs, outputs, rank: (inputs * outputs,),
        made=(35, 8, 14, 14, 0),
        rate=lambda hidden: 0.075 / hidden,
        title="Full fine-tuning",
        short="full",
        method="full fine-tuning of {layers}",
        sentence="The model's own weights train: {layers}{ends}",
    ),
}
# What is planned where none is named: adapters; the weights where ends train, or the model is small.
ADAPTERS, WEIGHTS = "lora", "full"


def adapts(name: str | None) -> bool | None:
    """Whether a tuner trains adapters; None where none is named."""
    return None if name is None else TUNERS[name].adapters


def module_of(saved: str) -> str | None:
    """The module that a tensor of a saved adapter is the first factor of; None for any other tensor."""
    module = saved.removeprefix(SAVED).removesuffix(f"{DOWN}weight")
    return module if saved.endswith(f"{DOWN}weight") else None


def other_factor(saved: str) -> str:
    """The name of an adapter's second factor by its first one's."""
    return saved.replace(DOWN, UP)
