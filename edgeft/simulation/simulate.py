"""How many bytes does a training step hold, moment by moment, found by running it without weights or its device?

The step is the project's own (`edgeft.engine.loop.Run.train_step`) on the model that transformers builds from
config.json, with fake tensors. Counting their live bytes gives what a real run on a CPU holds, to the byte.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from edgeft.data.dataset import IGNORED, Sample
from edgeft.engine import loop
from edgeft.engine.trainable import apply_tuner
from edgeft.errors import BadInput
from edgeft.memory import depth
from edgeft.memory.simulated import Moment, Simulation, StepPhase, TensorGroup
from edgeft.memory.train_step import Workload, worst_sets
from edgeft.models.boundary import Boundary
from edgeft.models.checkpoint import DTYPES, quiet_transformers
from edgeft.models.parts import Parts
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import Training
from edgeft.settings.tuners import is_adapter
from edgeft.simulation.fake import as_planned, build_meta, leave_in_files, make_fake, quantisation_states
from edgeft.simulation.trace import Trace

CPU = torch.device("cpu")
PHASES: tuple[StepPhase, ...] = ("forward", "backward", "optimizer")
POINTS, GROUPS = 200, 10
CUDA_UNIT = 512  # the CUDA allocator rounds every block up to a multiple of this


@dataclass
class _Step:
    """One traced step and what was there before it."""

    trace: Trace
    weights_bytes: int
    adapter_bytes: int
    optimizer_bytes: int


def _run(config: Any, spec: ModelSpec, training: Training, work: Workload) -> _Step:
    """Trace one optimizer step of a model, its optimizer's states made before."""
    compute = DTYPES[training.compute_dtype]
    model, parts = build_meta(config, spec, training, compute)
    chosen = apply_tuner(model, parts, training)
    for _, parameter in chosen:
        parameter.requires_grad_(not training.densely or parameter.dtype == torch.float32)
    names = [name for name, parameter in chosen if parameter.requires_grad]
    samples = min(training.batch_size, 2 * training.micro_batch_size)
    micro_batches = -(-samples // training.micro_batch_size)
    trace = Trace(micro_batches, CUDA_UNIT if training.device == "cuda" else 1)
    trained = min(work.longest_trained, work.longest - 1)
    labels = [IGNORED] * (work.longest - trained) + [0] * trained
    fake = FakeTensorMode()
    with fake:
        make_fake(model)
        trace.overlook(leave_in_files(model, parts, spec, training))
    parameters = dict(model.named_parameters())
    chosen = [(name, parameters[name]) for name in names]
    adapters = {id(p) for name, p in parameters.items() if is_adapter(name)}
    with as_planned(spec, training, fake, trace.begin):
        if training.cached_layers:
            parts = _start_above(model, parts, training.cached_layers)
        run = loop.Run(training, CPU, compute, model, parts, chosen)
        for _, parameter in chosen:
            parameter.grad = torch.empty_like(parameter)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        base = [p for p in model.parameters() if id(p) not in adapters]
        sizes = []
        for what, tensors in (
            ("base weights", [base, list(model.buffers()), quantisation_states(model)]),
            ("adapters", [p for p in model.parameters() if id(p) in adapters]),
            ("optimizer states", list(run.optimizer.state.values())),
        ):
            sizes.append(trace.count_as(what, tensors))
        trace.watch(model, parts)
        with trace:
            run.train_step([Sample([0] * work.longest, labels, work.longest - trained)] * samples)
    return _Step(trace, *sizes)


def _start_above(model: Any, parts: Parts, cut: int) -> Parts:
    """A model without its lowest layers, whose outputs are there for any sample."""
    boundary = Boundary(parts, cut)
    with Trace(1, 1):  # values that are read have one there
        one = boundary.reach(torch.zeros(1, 1, dtype=torch.int64))
    boundary.drop(model)
    return boundary.above(parts, lambda samples: one.new_empty(len(samples), max(map(len, samples)), one.shape[-1]))


@contextlib.contextmanager
def _refused(spec: ModelSpec) -> Iterator[None]:
    """Any failure inside as BadInput: a model's code may do anything with a tensor that has no values."""
    try:
        yield
    except BadInput:
        raise
    except Exception as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        hint = "give a model of a family that is known: edgeft cannot say what memory this one takes"
        raise BadInput(spec.model, f"{spec.architecture} cannot be simulated: {reason:.200}", hint) from problem


def _kinds(config: Any, spec: ModelSpec, training: Training, work: Workload) -> list[Hashable]:
    """What may tell one decoder layer's memory from another's: its parameters, whether it trains, the config."""
    text = config.get_text_config(decoder=True)
    lists = _layer_lists(text)
    if (getattr(text, "sliding_window", None) or 0) > work.longest:
        lists.pop("layer_types", None)  # no window is ever full: its layers keep what the others keep
    lowest = min(training.trained_layers, default=spec.num_hidden_layers)
    trained, resting = set(training.trained_layers), set(training.resting_layers)
    return [
        (
            layer in trained,
            layer in resting,
            layer >= lowest,
            layer < training.cached_layers,
            training.recomputes(layer, spec.num_hidden_layers),
            spec.layer_parameters[layer],
            *(values[layer] for values in lists.values()),
        )
        for layer in range(spec.num_hidden_layers)
    ]


def _layer_lists(text: Any) -> dict[str, list[Any]]:
    """The entries of a config that have a value for each decoder layer."""
    return {key: list(value) for key, value in vars(text).items()
            if isinstance(value, (list, tuple)) and len(value) == text.num_hidden_layers}  # fmt: skip


def _with_layers(config: Any, training: Training, layers: list[int]) -> tuple[Any, Training]:
    """The config and plan of a model that has only these decoder layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    lists = _layer_lists(text)
    kept = sum(layer >= text.num_hidden_layers - training.kept_layers for layer in layers)
    text.num_hidden_layers = len(layers)
    for key, values in lists.items():
        setattr(text, key, [values[layer] for layer in layers])
    trained, resting = (
        tuple(n for n, layer in enumerate(layers) if layer in set(those))
        for those in (training.trained_layers, training.resting_layers)
    )
    cached = sum(layer < training.cached_layers for layer in layers)
    changes = {"trained_layers": trained, "resting_layers": resting, "kept_layers": kept, "cached_layers": cached}
    return config, training.model_copy(update=changes)


def _summary(
    stretches: list[depth.Stretch], steps: list[_Step], weights: list[int], simulated: int, extrapolated: bool,
    seconds: float,
) -> Simulation:  # fmt: skip
    """The result of the operations of a step; `weights` are the factors by which the traces add up to the model."""
    live, places = [step.trace.live for step in steps], steps[0].trace.places
    found: list[tuple[str, str, int]] = []  # phase, part, bytes
    peak, peak_terms = 0, stretches[0].terms
    last: tuple[Any, ...] = ()
    for stretch in stretches:
        for n, size in enumerate(depth.live_bytes(stretch, live)):
            place = places[stretch.first + n]
            if (here := (place.phase, place.micro_batch, stretch.layer, place.part)) != last:
                name = place.part if stretch.layer is None else f"layer {stretch.layer} {place.part}".strip()
                found.append((place.phase, name, size))
                last = here
            elif size > found[-1][2]:
                found[-1] = (*found[-1][:2], size)
            if size > peak:
                peak, peak_terms = size, tuple((trace, first + n, factor) for trace, first, factor in stretch.terms)
    moments = [Moment(phase=cast(StepPhase, phase), name=name, live_bytes=size) for phase, name, size in found]
    highest = max(moments, key=lambda moment: moment.live_bytes)
    alive: Counter[tuple[Any, ...]] = Counter()
    for number, event, factor in peak_terms:
        for kind, count in steps[number].trace.alive(event).items():
            alive[kind] += factor * count
    groups = [
        TensorGroup(operation=operation, part=f"layers {part}".strip() if in_layer else part, shape=shape, dtype=dtype,
                    bytes=size, count=count)
        for (operation, part, in_layer, shape, dtype, size), count in alive.items() if count
    ]  # fmt: skip
    groups.sort(key=lambda group: (-group.bytes * group.count, group.operation, group.part, group.shape))
    width = -(-len(moments) // POINTS)

    def total(values: Sequence[int]) -> int:
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    def top(some: Sequence[Moment]) -> Moment:
        return max(some, key=lambda moment: moment.live_bytes)

    return Simulation(
        live_peak_bytes=peak,
        phase=highest.phase,
        moment=highest.name,
        weights_bytes=total([step.weights_bytes for step in steps]),
        adapter_bytes=total([step.adapter_bytes for step in steps]),
        optimizer_bytes=total([step.optimizer_bytes for step in steps]),
        phase_peaks=tuple(
            top(some) for phase in PHASES if (some := [moment for moment in moments if moment.phase == phase])
        ),
        timeline=tuple(top(moments[start : start + width]) for start in range(0, len(moments), width)),
        largest=tuple(groups[:GROUPS]),
        seconds=round(seconds, 3),
        extrapolated=extrapolated,
        layers_simulated=simulated,
    )


def simulate(spec: ModelSpec, training: Training, work: Workload, *, full_depth: bool = False) -> Simulation:
    """The live tensor bytes of one optimizer step of a plan, from fake tensors: nothing of that size is allocated.

    The micro-batches are the largest that `work` allows; of many only two run, since from the second on all are alike.
    Equal to the byte to what a real step on a CPU holds (tests/simulation/test_simulate.py); a few layers are run and
    the rest computed, equally exact, unless `full_depth`. Raises BadInput when transformers cannot build or run the
    model so.
    """
    if training.layers == "lisa":  # the set of layers that needs most, as far as a set is known to
        each = [simulate(spec, one, work, full_depth=full_depth) for one in worst_sets(spec, training)]
        highest = max(each, key=lambda simulation: simulation.live_peak_bytes)
        return highest.model_copy(update={"seconds": round(sum(simulation.seconds for simulation in each), 3)})
    from transformers import AutoConfig

    started = time.monotonic()
    with _refused(spec), quiet_transformers():
        config = AutoConfig.from_pretrained(spec.model)
        regions = depth.find_regions(_kinds(config, spec, training, work))
        shallow = depth.shallow_models(regions)
        layers = [depth.kept_layers(regions, units) for units in shallow]
        steps: list[_Step] = []
        stretches = None
        if not full_depth and sum(map(len, layers)) < spec.num_hidden_layers:
            for kept in layers:
                less, plan = _with_layers(config, training, kept)
                steps.append(_run(less, spec, plan, work))
            places, live = [step.trace.places for step in steps], [step.trace.live for step in steps]
            stretches = depth.deepen(regions, shallow, places, live)
        weights, simulated = depth.weights_of(regions, shallow), sum(map(len, layers))
        extrapolated = stretches is not None
        if stretches is None:
            weights, simulated, steps = [1], spec.num_hidden_layers, [_run(config, spec, training, work)]
            stretches = depth.whole(steps[0].trace.places)
    return _summary(stretches, steps, weights, simulated, extrapolated, time.monotonic() - started)
