"""What should come out of an export: which format, bits, context and tolerances, as its TOML file says?"""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from edgeft.artifacts import Strict, read_toml, shipped_folder, shipped_path

Bits = Literal[4, 8, 32]


class Tolerance(Strict):
    """How far an artifact may be from the merged model in fp32 before the export counts as failed."""

    min_top1_agreement: float = Field(ge=0, le=1, description="share of positions with the same likeliest token")
    max_mean_kl_nats: float = Field(ge=0, description="mean KL(merged || artifact) per position")
    max_loss_increase_nats: float = Field(ge=0, description="per token, on held-out data")
    max_exact_match_drop_points: float = Field(ge=0, le=100, description="in points of 100")


class Target(Strict):
    """One kind of artifact."""

    name: str = Field(description="the file's name without .toml")
    description: str = Field(description="the target in one line")
    format: Literal["onnxruntime-genai"] = Field(description="the runtime and folder layout")
    weight_bits: Bits = Field(description="bits per weight of the matmuls")
    block_size: Literal[16, 32, 64, 128, 256] = Field(description="weights that share one scale")
    symmetric: bool = Field(description="no zero points")
    head_bits: Bits = Field(description="bits per weight of the output head, and of embeddings tied to it")
    embedding_bits: Literal[4, 32] = Field(description="bits per weight of embeddings that are not tied to the head")
    accuracy_level: Literal[0, 1, 2, 3, 4] = Field(description="activations in a matmul: 0 or 1 fp32, 4 int8")
    context_tokens: int = Field(ge=16, description="longest context; a model or a device may allow less")
    golden_logit_tolerance: float = Field(gt=0, description="absolute difference that another CPU may show")
    parity: Tolerance

    @pydantic.model_validator(mode="after")
    def _buildable(self) -> Target:
        if self.head_bits != self.weight_bits and (self.weight_bits, self.head_bits) != (4, 8):
            raise ValueError("head_bits must equal weight_bits, or be 8 where weight_bits is 4")
        if self.embedding_bits == 4 and self.weight_bits != 4:
            raise ValueError("embedding_bits can be 4 only where weight_bits is 4")
        return self


def list_targets() -> list[Target]:
    """The shipped targets, by name."""
    return [load_target(str(path)) for path in sorted(shipped_folder("export").glob("*.toml"))]


def load_target(name_or_path: str) -> Target:
    """The shipped target of that name, or a user's own file: anything with a slash or ending in .toml.

    Raises BadInput for an unknown name, a file that is no TOML, an unknown key or a value that does not fit.
    """
    return read_toml("target", shipped_path("target", "export", name_or_path), Target, ("name",))
