"""Which tensors of a fine-tuned model are worth 8 bits, and how many of them fit a size?

Everything is decided in torch with weights rounded as the export rounds them, calibrated ones by their codes. Those of
a promoted tensor are to nearest here; the export calibrates them, and the rest on what they give: repair.py simulates
that before anything is built.

The order is by what each tensor costs alone: the mean KL of the model's answers on calibration rows with that tensor in
4 bits and all others exact, per byte that 8 bits would add. Measured on the example, half of the layers' bytes promoted
(mean KL on 200 other rows; all in 4 bits, random tensors, survival's order, this order): full fine-tuning 0.00205,
0.00102, 0.00135, 0.00051 nats; LoRA 0.00351, 0.00204, 0.00115, 0.00075. The gain of promoting each out of all in 4 bits
costs as much and orders worse (0.00060 and 0.00179). That KL is found to second order, for all tensors at once
(sensitivity.py), in an order as good. What would be lost altogether goes first, whatever it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgeft.data.samples import Sample
from edgeft.documents import shipped_folder
from edgeft.errors import BadInput, DoesNotFit
from edgeft.exporting.form import Form
from edgeft.exporting.outputs import observe_drawn, observe_model
from edgeft.exporting.parity import UNKNOWN, Gain, compare, drawn_for, exact_match_problem
from edgeft.exporting.sensitivity import costs
from edgeft.machines.runner import RUNNER
from edgeft.merging.change import find_tensor
from edgeft.merging.survival import TensorSurvival, survival
from edgeft.models.checkpoint import Checkpoint, load_plain
from edgeft.models.layer_shares import layer_of
from edgeft.models.metrics import Promoted, Promotion, Rung
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.progress import Progress, silent
from edgeft.targets.footprint import bundle_weights
from edgeft.targets.grid import Grid
from edgeft.targets.ort import TOKENIZER_FILES
from edgeft.targets.rounding import grid_of, round_
from edgeft.targets.runtimes import runtime_of
from edgeft.targets.target import Target, Tolerance, eight_bit_modules, promoted, to_nearest
from edgeft.units import show_bytes

if TYPE_CHECKING:
    from edgeft.targets.codes import Codes

SENSITIVITY_ROWS = 32
LOST_COSINE = 0.3  # between a change and what arrives of it: the noise is then three times the change
# Of the target's tolerance, what the simulated bundle may use: activations in 8 bits and another CPU add a little.
USED = (0.9, 0.5)  # the second after a bundle failed that the first had let pass
# Beside its weights a bundle holds the graph (9 to 11 kB a layer measured), configs, bill of materials and manifest.
GRAPH_BYTES, GRAPH_BYTES_PER_LAYER, OTHER_BYTES = 10_000, 13_000, 48_000


def file_bytes(spec: ModelSpec, target: Target, folder: Path) -> int:
    """Bytes of a whole bundle folder, at most a few kB more than it takes; `folder` holds the model's tokenizer."""
    stored = bundle_weights(spec, target).stored_bytes
    if runtime_of(target).casts_half and target.weight_bits == 16:
        stored //= 2  # fp32 only once it is loaded
    side = [folder / name for name in (*TOKENIZER_FILES, "tokenizer_config.json")] + [shipped_folder("export") / RUNNER]
    sizes = sum(path.stat().st_size for path in side if path.is_file())
    return stored + sizes + GRAPH_BYTES + GRAPH_BYTES_PER_LAYER * spec.num_hidden_layers + OTHER_BYTES


def too_small(name: str, need_bytes: int, size_budget_bytes: int) -> DoesNotFit:
    """The error for a budget that not even the smallest bundle of the choice fits."""
    problem = f"a bundle for {name} takes {show_bytes(need_bytes)}, the budget is {show_bytes(size_budget_bytes)}"
    return DoesNotFit("--size-budget", problem, "give more room, or fine-tune a smaller model")


@dataclass(frozen=True)
class Tensor:
    """One 4-bit tensor of a decoder layer: where it is, and what it would take and lose."""

    name: str  # of the model's parameter
    module: str  # as a target names it: layers.3.down_proj
    stored: str  # its name in the checkpoint's files
    grid: Grid


class Rounding:
    """A merged model in fp32 whose decoder layers' tensors can be rounded to 4 or 8 bits, or given back."""

    def __init__(self, merged: Path, target: Target, spec: ModelSpec, codes: Codes | None = None) -> None:
        self.spec, self.checkpoint, self.codes = spec, Checkpoint(merged), codes
        self.model: Any = load_plain(merged)
        self.parameters = dict(self.model.named_parameters())
        names = tuple(linear.name for linear in spec.linears)
        self.given = set(eight_bit_modules(target, spec.num_hidden_layers, names))
        plain = plainly(target)
        self.tensors: list[Tensor] = []
        self.others: list[Tensor] = []  # head and embedding: rounded, never promoted
        for name, parameter in self.parameters.items():
            grid = grid_of(name, tuple(parameter.shape), plain, spec.tie_word_embeddings)
            if grid is None:
                continue
            layer, stored = layer_of(name), find_tensor(self.checkpoint, name)
            assert stored is not None  # a tied head is no parameter of its own
            module = f"layers.{layer}.{name.split('.')[-2]}"
            of_layer = layer is not None and grid.bits == 4 and module.rpartition(".")[2] in names
            (self.tensors if of_layer else self.others).append(Tensor(name, module, stored, grid))

    @torch.no_grad()
    def exact(self, tensor: Tensor) -> None:
        """The tensor as merged."""
        self.parameters[tensor.name].copy_(self.checkpoint.read(tensor.stored))

    @torch.no_grad()
    def rounded(self, tensor: Tensor, *, eight: bool) -> None:
        """The tensor as a bundle computes with it."""
        if self.codes is not None and tensor.stored in self.codes and (not eight or tensor.module in self.given):
            self.parameters[tensor.name].copy_(self.codes.read(tensor.stored).weight())
            return
        self.exact(tensor)
        round_(self.parameters[tensor.name].data, tensor.grid.in_eight_bits() if eight else tensor.grid)

    @torch.no_grad()
    def move(self, tensor: Tensor) -> torch.Tensor:
        """What a bundle adds to an exact tensor by rounding it to 4 bits, in bf16."""
        weight: torch.Tensor = self.parameters[tensor.name]
        before = weight.detach().clone()
        self.rounded(tensor, eight=False)
        moved = (weight - before).to(torch.bfloat16)
        weight.copy_(before)
        return moved

    def as_bundle(self, modules: set[str]) -> None:
        """Every weight as in a bundle with 8 bits for these modules and those that the target names."""
        for tensor in self.others:
            self.rounded(tensor, eight=tensor.grid.bits == 8)
        for tensor in self.tensors:
            self.rounded(tensor, eight=tensor.module in modules | self.given)


def plainly(target: Target) -> Target:
    """The target with every tensor in its own bits, to nearest."""
    return to_nearest(target).model_copy(update={"mixed_layers": False, "eight_bit": ()})


@dataclass(frozen=True)
class Measured:
    """What promoting each tensor is worth: all of them, in the order in which to promote."""

    order: tuple[Promoted, ...]
    target: Target
    merged: Path
    spec: ModelSpec
    calibration: str
    codes: Codes | None = None


def measure(
    merged: Path, target: Target, samples: Sequence[Sample], described: str, progress: Progress = silent,
    codes: Codes | None = None,
) -> Measured:  # fmt: skip
    """Every 4-bit tensor of the decoder layers, by what rounding it alone costs on the samples (sensitivity.py).

    `codes` are those of a calibrated target. Raises BadInput for a target without 4-bit weights or whose rounding is
    not computed here, and for a merge that does not name its base.
    """
    if target.weight_bits != 4:
        raise BadInput(f"target {target.name}", "no tensor of it has 4 bits: nothing can be promoted")
    spec = read_model_spec(str(merged))
    survives = {found.name: found for found in survival(merged, plainly(target)).tensors}
    model = Rounding(merged, target, spec, codes)
    candidates = [tensor for tensor in model.tensors if tensor.module not in model.given]
    moves = {tensor.name: model.move(tensor) for tensor in candidates}
    cost = costs(model.model, moves, samples, lambda done, total: progress("sensitivity", done, total, {}))
    found = [
        _facts(tensor, cost[tensor.name], survives.get(tensor.stored), moves[tensor.name].numel())
        for tensor in candidates
    ]
    order = sorted(found, key=lambda each: (each.why != "lost", -each.mean_kl_nats / each.extra_bytes, each.tensor))
    return Measured(tuple(order), target, merged, spec, described, codes)


def _facts(tensor: Tensor, kl: float, arrives: TensorSurvival | None, parameters: int) -> Promoted:
    """What is reported of one tensor; None: fine-tuning left it as it was."""
    return Promoted(
        module=tensor.module,
        tensor=tensor.stored,
        why="lost" if arrives is not None and arrives.cosine < LOST_COSINE else "sensitive",
        mean_kl_nats=kl,
        extra_bytes=parameters // 2,
        cosine=arrives.cosine if arrives else None,
        projection=arrives.projection if arrives else None,
        delta_in_steps=arrives.delta_in_steps if arrives else None,
    )


def gate_rung(exact: Form, form: Form, tolerance: Tolerance, gain: Gain) -> Rung:
    """What a climb's gate says of a rounded model: its loss, its words, its exact answers where both have them."""
    rung, drop = compare(exact, form, tolerance, gain), exact_match_problem(exact, form, tolerance, slice(None))
    return rung.model_copy(update={"problems": (*rung.problems, drop)}) if drop else rung


def choose(
    measured: Measured, gate: Sequence[Sample], gain: Gain = UNKNOWN, *, size_budget_bytes: int | None = None,
    used: float = USED[0], progress: Progress = silent, exact: Form | None = None,
    observe: Callable[[Any, Tolerance], Form] | None = None,
) -> Promotion:  # fmt: skip
    """As few promotions as make the simulated bundle pass the parity gate, or all that the size allows.

    `used` is the share of the tolerance that may be used, `exact` the merged model where it is known, `observe` how a
    rounded one is read (without it, its answers are not). Found by halving: more 8-bit tensors are never much worse.
    Raises DoesNotFit when the target itself takes more than the budget.
    """
    target, spec, merged = measured.target, measured.spec, measured.merged

    def size(count: int) -> int:
        return file_bytes(spec, promoted(target, [each.module for each in measured.order[:count]]), merged)

    if size_budget_bytes is not None and size(0) > size_budget_bytes:
        raise too_small(target.name, size(0), size_budget_bytes)
    most = max(
        count
        for count in range(len(measured.order) + 1)
        if size_budget_bytes is None or size(count) <= size_budget_bytes
    )
    model = Rounding(merged, target, spec, measured.codes)
    merged_form = exact or observe_model("merged", model.model, gate)
    tolerance = tightened(target.parity, used)
    observe = observe or partial(_without_answers, merged_form, gate, gain)
    seen: dict[int, Form] = {}

    def passes(count: int) -> bool:
        if count not in seen:
            progress("promotion", len(seen), most.bit_length() + 2, {})
            model.as_bundle({each.module for each in measured.order[:count]})
            seen[count] = observe(model.model, tolerance)
        return not gate_rung(merged_form, seen[count], tolerance, gain).problems

    low, high = 0, most
    if passes(0):
        high = 0
    else:
        passed = passes(most)
        while passed and high - low > 1:  # low fails, high passes
            middle = (low + high) // 2
            low, high = (low, middle) if passes(middle) else (middle, high)
    before, after = (gate_rung(merged_form, seen[count], tolerance, gain) for count in (0, high))
    ended = "the simulated bundle passes" if not after.problems else "the size budget ends"
    if after.problems and most == len(measured.order):
        ended = "every tensor has 8 bits"
    return Promotion(
        calibration=measured.calibration,
        size_budget_bytes=size_budget_bytes,
        considered=len(measured.order),
        used_of_tolerance=used,
        simulated_before=before,
        simulated=after,
        ended=ended,
        promoted=measured.order[:high],
        predicted_bytes=size(high),
    )


def _without_answers(exact: Form, gate: Sequence[Sample], gain: Gain, model: Any, tolerance: Tolerance) -> Form:
    """What a rounded model says of as many rows as decide, but for its answers."""
    drawing = drawn_for(exact.tokens, tolerance, gain, gate=len(gate), scored=None)
    return observe_drawn("simulated", model, gate, None, drawing.follows(exact))


def tightened(tolerance: Tolerance, share: float) -> Tolerance:
    """The same tolerance, of which only a share may be used."""
    return Tolerance(
        min_top1_agreement=1 - share * (1 - tolerance.min_top1_agreement),
        max_mean_kl_nats=share * tolerance.max_mean_kl_nats,
        max_gain_lost=share * tolerance.max_gain_lost,
        max_loss_increase_nats=share * tolerance.max_loss_increase_nats,
        max_exact_match_drop_points=share * tolerance.max_exact_match_drop_points,
    )
