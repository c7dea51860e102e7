"""Which attention kernel does a layer of a plan run? One rule for what is planned, what is simulated and what runs."""

from __future__ import annotations

from typing import Literal

from edgeft.settings.job import Training

# scores: S x S probabilities that the model's own code makes; flash and efficient keep none
Kernel = Literal["scores", "flash", "efficient"]
FLASH_HEAD = 256  # elements of the widest head that CUDA's flash kernel takes


def attention_kernel(training: Training, head_dim: int, *, masked: bool = False, capped: bool = False) -> Kernel:
    """The kernel of a layer: `masked` by a window that its samples outgrow, `capped` scores (Gemma 2).

    Flash attention alone knows grouped queries. On CUDA it wants half precision, no mask, heads of at most 256 and
    compute capability 8.0, which bf16 (a profile has it from there on) says of a plan. All else takes the
    memory-efficient kernel, whose keys and values are repeated first: with groups, PyTorch would take the math kernel.
    cuDNN's, which PyTorch prefers on capability 9.0, makes and keeps what the flash one does. On a CPU there is one.
    """
    if capped:
        return "scores"
    if training.device != "cuda" or (training.compute_dtype == "bf16" and not masked and head_dim <= FLASH_HEAD):
        return "flash"
    return "efficient"


def repeats_groups(training: Training, head_dim: int) -> bool:
    """Whether grouped key and value heads are repeated in layers without a mask: under one, transformers does that."""
    return attention_kernel(training, head_dim) == "efficient"
