"""What should come out of an export: which format, bits, context and tolerances, as its TOML file says?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from edgeft.documents import NameIn, Strict, invalid, read_toml, shipped_folder, shipped_path
from edgeft.errors import BadInput, did_you_mean
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import AUTO, Rounding
from edgeft.targets.runtimes import RUNTIMES, cannot_build, kv_bits_problem, runtime_of

RuntimeName = Annotated[str, NameIn(RUNTIMES)]
SMALLEST = "ort-int4"  # where the search for the smallest artifact that keeps the fine-tune starts


class Tolerance(Strict):
    """How far an artifact may be from the merged model in fp32 before the export counts as failed."""

    min_top1_agreement: float = Field(
        ge=0, le=1, description="share of positions with the same likeliest token, or one within 0.1 nats of it"
    )
    max_mean_kl_nats: float = Field(ge=0, description="mean KL(merged || artifact) per position")
    max_gain_lost: float = Field(
        default=0.1, ge=0, description="the loss may rise by this share of what the fine-tune gained over its base"
    )
    max_loss_increase_nats: float = Field(ge=0, description="nor may it rise by more than this, per token")
    max_exact_match_drop_points: float = Field(ge=0, le=100, description="in points of 100")


class Target(Rounding):
    """One kind of artifact."""

    description: str = Field(description="the target in one line")
    runtime: RuntimeName = Field(description="what runs it on the device")
    accuracy_level: Literal[0, 1, 2, 3, 4] = Field(
        default=0, description="activations in an ONNX Runtime matmul: 0 or 1 fp32, 4 int8; llama.cpp chooses by type"
    )
    opset: int = Field(default=0, description="version of ONNX's operators; 0: what the runtime's own builder writes")
    context_tokens: int = Field(ge=16, description="longest context; a model or a device may allow less")
    kv_bits: Literal[8, 16, 32] | None = Field(
        default=None, description="of each key and value that the device keeps: 8, or what the runtime's own are"
    )
    golden_logit_tolerance: float = Field(gt=0, description="absolute difference that another CPU may show")
    parity: Tolerance

    @property
    def rounding(self) -> Rounding:
        """What of it decides codes."""
        return Rounding.model_validate({name: getattr(self, name) for name in Rounding.model_fields})

    @property
    def has_cache_scales(self) -> bool:
        """Whether its bundle holds scales of a KV cache, which are found on training rows."""
        return self.kv_bits == 8 and RUNTIMES[self.runtime].cache_scales

    @pydantic.model_validator(mode="after")
    def _buildable(self) -> Target:
        if self.weight_bits >= 8 and (self.mixed_layers or self.eight_bit):
            raise ValueError("mixed_layers and eight_bit promote to 8 bits: weight_bits must be less")
        runtime = RUNTIMES[self.runtime]
        codes = self.method == "rtn" and self.weight_bits < 16 and runtime.calibrates
        if self.calibration == "imatrix" and self.method != "k_quant":
            raise ValueError("calibration imatrix weighs inputs for llama.cpp's own quantiser: it needs method k_quant")
        if self.calibration == "gptq" and not codes:
            names = " or ".join(name for name, each in RUNTIMES.items() if each.calibrates)
            raise ValueError(f"calibration needs method rtn, weight_bits below 16, and runtime {names}")
        if problem := runtime.problem(self) or kv_bits_problem(self):
            raise ValueError(problem)
        return self


def promoted(target: Target, modules: Sequence[str]) -> Target:
    """The target with 8 bits for these modules too. Raises BadInput where its bits cannot be mixed."""
    if not modules:
        return target
    try:
        return Target.model_validate(target.model_dump() | {"eight_bit": (*target.eight_bit, *modules)})
    except pydantic.ValidationError as problem:
        raise invalid(f"target {target.name}", problem, Target) from None


def to_nearest(target: Target) -> Target:
    """The target on the same grids, each weight rounded to nearest."""
    return target.model_copy(update={"calibration": "none"})


def calibrated(target: Target) -> Target | None:
    """The target on the same grids with calibrated codes: as small, nearer to the model. None where there is none."""
    name = f"{target.name}-calibrated"
    if target.method == "k_quant" and target.calibration == "none":
        return target.model_copy(update={"name": name, "calibration": "imatrix"})
    shipped = next((each for each in list_targets() if each.name == name), None)
    of_layers = target.weight_bits == 4 and target.method == "rtn" and not target.mixed_layers
    known = shipped is not None or runtime_of(target).climbs_calibrated
    if target.calibration != "none" or not of_layers or not known:
        return None
    changes: dict[str, object] = {"name": name, "calibration": "gptq"}
    return target.model_copy(update=changes | ({"description": shipped.description} if shipped else {}))


def climb(target: Target) -> tuple[Target, ...]:
    """What to try when a target loses too much: itself, calibrated, then its runtime's shipped ones of more bits."""
    more = [each for each in list_targets() if each.runtime == target.runtime and each.weight_bits > target.weight_bits]
    better = calibrated(target)
    return (target, *([better] if better else []), *sorted(more, key=lambda each: each.weight_bits))


def candidates(name_or_path: str, *, beside: bool = False) -> tuple[Target, ...]:
    """What an export to this name may end in, the smallest first: one target, or for `auto` all that it climbs to.

    `beside`: of a model with adapters that no weight can hold. Raises as `load_target` does, and for a target whose
    runtime computes with weights alone.
    """
    if name_or_path == AUTO:
        return climb(_running_beside()[0] if beside else load_target(SMALLEST))
    found = (load_target(name_or_path),)
    check_beside(found, beside=beside)
    return found


def check_beside(targets: Sequence[Target], *, beside: bool) -> None:
    """Nothing. Raises BadInput where something lies beside a model's weights, for a target that cannot run it."""
    for target in targets if beside else ():
        if not runtime_of(target).runs_beside:
            problem = f"runs in {target.runtime}, which computes with a model's weights: these adapters lie beside them"
            able = " or ".join(each.name for each in _running_beside())
            hint = f"name {able}, or train what a weight can hold (tuner=lora)"
            raise BadInput(f"target {target.name}", problem, hint)


def _running_beside() -> list[Target]:
    """The shipped targets that run adapters beside the weights, the smallest first."""
    found = [each for each in list_targets() if runtime_of(each).runs_beside]
    return sorted(found, key=lambda each: each.weight_bits)


def eight_bit_modules(target: Rounding, layers: int, projections: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that get 8 bits, as `layers.N.name`: `eight_bit`, whole layers written out, and `mixed_layers`.

    `mixed_layers` are those where a 4-bit error weighs most by llama.cpp's rule: the first and last eighth and every
    third between. `projections` are the names of one layer's matmuls. Raises BadInput for a module that is not there.
    """
    known = {f"layers.{layer}.{name}": None for layer in range(layers) for name in projections}
    chosen: dict[str, None] = {}
    for module in target.eight_bit:
        short = "layers." + module.rpartition("layers.")[2]
        parts = short.split(".")
        found = [name for name in known if name == f"layers.{parts[1]}.{parts[-1]}" or short == name.rpartition(".")[0]]
        if not found:
            raise BadInput("eight_bit", f"no such module: {module}", did_you_mean(short, known))
        chosen |= dict.fromkeys(found)
    if target.mixed_layers:
        sensitive = [name for name in projections if name in ("v_proj", "qkv_proj", "down_proj")]
        for i in range(layers):
            if i < layers / 8 or i >= 7 * layers // 8 or (i - round(layers / 8)) % 3 == 2:
                chosen |= dict.fromkeys(f"layers.{i}.{name}" for name in sensitive)
    return tuple(chosen)


def list_targets() -> list[Target]:
    """The shipped targets, by name."""
    return [
        load_target(str(path)) for path in sorted(shipped_folder("export").glob("*.toml"), key=lambda path: path.stem)
    ]


def instead(target: Target, spec: ModelSpec) -> list[Target]:
    """Of each other runtime that can build this model its smallest shipped target."""
    able = [each for each in list_targets() if each.runtime != target.runtime and not cannot_build(each, spec)]
    of_each: dict[str, Target] = {}
    for each in sorted(able, key=lambda each: each.weight_bits):
        of_each.setdefault(each.runtime, each)
    return list(of_each.values())


def load_target(name_or_path: str) -> Target:
    """The shipped target of that name, or a user's own file: anything with a slash or ending in .toml.

    Raises BadInput for an unknown name, a file that is no TOML, an unknown key or a value that does not fit.
    """
    return read_toml("target", shipped_path("target", "export", name_or_path), Target, ("name",))
