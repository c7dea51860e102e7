"""How many bytes does a training step hold at its highest moment? In closed form, microseconds per candidate.

What a layer keeps and holds follows from its operations (`edgeft.memory.dataflow`) and is the same for each layer of a
kind; here layers, weights, gradients and states are added up. Nothing of it is fitted: bench/closed_form.py compares it
with the simulated step. Symbols as in the field: h hidden, e bytes of the compute dtype, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple

from pydantic.dataclasses import dataclass

from edgeft.documents import Strict
from edgeft.memory.dataflow import Kind, Sizes, ends_bytes, is_masked, layer_bytes, mask_bytes
from edgeft.memory.operations import Way
from edgeft.memory.prompted import Read, read_bytes
from edgeft.memory.sharded import elsewhere_bytes, gathered_bytes, topmost_bytes
from edgeft.memory.streamed import away_bytes, layer_away_bytes, window_bytes
from edgeft.models.families import LIKE_LLAMA
from edgeft.models.spec import Linear, ModelSpec
from edgeft.settings.job import ENDS, Training
from edgeft.settings.tuners import TUNERS

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # codes, 8-bit scales per 64 weights, fp32 scales of 256 scales
NF4_PER_LINEAR = 1024 + 64 + 4  # the two code books and the offset of one quantised matrix
ADAM8_BYTES = 2 * (1 + 4 / 256)  # two states of a byte, one fp32 scale per 256
# bitsandbytes keeps the states of smaller tensors in fp32, and pages those of larger ones alone
EIGHT_BIT_ELEMENTS, PAGED_ELEMENTS = 4096, 100_000


class Term(Strict):
    """One part of a phase's peak: what it is, its bytes and the formula with its numbers filled in."""

    name: str
    bytes: int
    formula: str


class Phase(Strict):
    """One phase of a run: its terms add up to `expected_bytes`; `high_bytes` is the promise a budget is held to.

    `where` is whose memory: the training device's, the host's main memory (on a CPU profile the same), the target's.
    """

    name: str
    where: Literal["device", "host", "target"] = "device"
    terms: tuple[Term, ...]
    low_bytes: int
    expected_bytes: int
    high_bytes: int


@dataclass(frozen=True)
class Workload:
    """The largest batch of a job, in tokens: padded length and trained tokens of one sample."""

    longest: int
    longest_trained: int


def weight_bytes(spec: ModelSpec, training: Training) -> int:
    """Bytes of the base model that the plan keeps in memory; NF4 leaves embedding, head, norms and biases dense."""
    away = away_bytes(spec, training) + elsewhere_bytes(spec, training)
    if training.base_precision != "nf4":
        return spec.total_parameters * DTYPE_BYTES[training.base_precision] - away
    quantised = sum(linear.in_features * linear.out_features for linear in spec.linears) * spec.num_hidden_layers
    dense = spec.total_parameters - quantised
    codes = quantised * NF4_BYTES + NF4_PER_LINEAR * len(spec.linears) * spec.num_hidden_layers
    return int(dense * DTYPE_BYTES[training.compute_dtype] + codes) - away


def dropped_bytes(spec: ModelSpec, training: Training) -> int:
    """What of `weight_bytes` goes once the outputs of the lowest layers are kept: those layers, an untied embedding."""
    below, matrices = sum(spec.layer_parameters[: training.cached_layers]), 0
    each = sum(linear.in_features * linear.out_features for linear in spec.linears)
    if not training.cached_layers:
        return 0
    table = 0 if spec.tie_word_embeddings else spec.embedding_parameters
    if training.base_precision != "nf4":
        return (below + table) * DTYPE_BYTES[training.base_precision]
    matrices = each * training.cached_layers
    codes = matrices * NF4_BYTES + NF4_PER_LINEAR * len(spec.linears) * training.cached_layers
    return int((below - matrices + table) * DTYPE_BYTES[training.compute_dtype] + codes)


def dense_bytes(spec: ModelSpec, training: Training) -> int:
    """What layers that train as dense fp32 ones take beyond what they take in the base: their matrices, no vectors.

    Nothing where none does.
    """
    if not training.densely:
        return 0
    matrices = sum(linear.in_features * linear.out_features for linear in spec.linears)
    if training.base_precision == "nf4":
        each = matrices * (4 - NF4_BYTES) - NF4_PER_LINEAR * len(spec.linears)
    else:
        each = matrices * (4 - DTYPE_BYTES[training.base_precision])
    each += layer_away_bytes(spec, training)
    return int(each * len(training.trained_layers))


def worst_dense_bytes(spec: ModelSpec, training: Training) -> int:
    """`dense_bytes` of the layers that train at a time, at most."""
    return max(dense_bytes(spec, one) for one in worst_sets(spec, training))


def trained_parameters(spec: ModelSpec, training: Training) -> int:
    """Parameters that get a gradient: r * (in + out) per target and layer, or whole layers, or everything."""
    if training.adapts:
        return sum(size * count for size, count in trained_tensors(spec, training).items())
    return sum(spec.layer_parameters[i] for i in training.trained_layers) + sum(
        size for end, size in end_parameters(spec).items() if getattr(training, end) == "on"
    )


def end_parameters(spec: ModelSpec) -> dict[str, int]:
    """Parameters outside the layers by unit: a tied head and learned positions count as the embedding's."""
    positions = position_parameters(spec)
    return {
        "embedding": spec.embedding_parameters + positions,
        "norm": spec.other_parameters - positions,
        "head": spec.head_parameters,
    }


def position_parameters(spec: ModelSpec) -> int:
    """Parameters of a table of learned positions."""
    offset = spec.family.position_offset
    if spec.counted_from != "config" or offset is None:
        return 0
    return ((spec.max_position_embeddings or 0) + offset) * spec.hidden_size


def worst_sets(spec: ModelSpec, training: Training) -> list[Training]:
    """The plan with each set of trained units that can need most at a time: itself, except under LISA.

    Memory grows with how low the lowest layer lies, and hardly depends on where the others are: the n lowest layers,
    and the lowest with the n - 1 topmost. An end that rotates takes the place of the layers that need least.
    """
    if training.layers != "lisa":
        return [training]
    pool, rotating = training.trained_layers, [end for end in ENDS if getattr(training, end) == "rotate"]
    found = []
    for ends in dict.fromkeys([(), *((end,) for end in rotating), tuple(rotating)]):  # in the same order every time
        layers = training.active_layers - len(ends)
        if layers < 0:
            continue
        modes = {end: "on" if end in ends or getattr(training, end) == "on" else "off" for end in ENDS}
        for chosen in {pool[:layers], pool[:1] + pool[len(pool) - layers + 1 :] if layers else ()}:
            rest = tuple(n for n in pool if n not in chosen) if training.adapts and not training.quantize_aware else ()
            rest += training.resting_layers
            one = {"layers": "sparse", "trained_layers": chosen, "resting_layers": rest}
            found.append(training.model_copy(update={**modes, **one}))
    return found


def targets(spec: ModelSpec, training: Training) -> list[Linear]:
    """The projections of one layer that carry an adapter."""
    return [linear for linear in spec.linears if linear.name in training.target_modules]


def beside(spec: ModelSpec, training: Training) -> list[Linear]:
    """The projections that a bundle has beside the model's own: adapters that no weight can hold."""
    if training.folds:
        return []
    each = [
        linear.model_copy(update={"in_features": inner, "out_features": outer, "has_bias": False})
        for linear in targets(spec, training)
        for inner, outer in ((linear.out_features, training.rank), (training.rank, linear.out_features))
    ]
    return each * len(training.trained_layers)


def adapter_sizes(spec: ModelSpec, training: Training) -> list[tuple[int, ...]]:
    """Elements of the tensors of each adapter of a layer."""
    sizes = TUNERS[training.tuner].sizes
    if training.embeds:
        return []
    if training.prefix_tokens:  # keys, and values
        return [(training.prefix_tokens * spec.num_key_value_heads * spec.head_dim,)] * 2
    return [
        sizes(linear.in_features, linear.out_features, training.rank, linear.role == "mlp_out")
        for linear in targets(spec, training)
    ]


def prompt_parameters(spec: ModelSpec, training: Training) -> int:
    """Elements of a soft prompt; none of another tuner."""
    return training.prefix_tokens * spec.hidden_size if training.embeds else 0


def adapter_bytes(spec: ModelSpec, training: Training) -> int:
    """Bytes of adapters, in fp32: what trains of them and what they hold beside that; nothing where there are none."""
    if not training.adapts:
        return 0
    if training.embeds:
        return 4 * prompt_parameters(spec, training)
    beside, rank = training.form.beside, training.rank
    more = sum(beside(linear.in_features, linear.out_features, rank) for linear in targets(spec, training))
    each = sum(sum(sizes) for sizes in adapter_sizes(spec, training)) + more
    return 4 * each * len(training.adapted_layers)


def optimizer_bytes(spec: ModelSpec, training: Training) -> int:
    """Bytes of the optimizer's states on the training device.

    AdamW keeps two in the parameter's dtype. The 8-bit one keeps two of a byte an element and an fp32 scale for each
    256, and tensors below 4,096 elements in fp32; paged, those of 100,000 elements and more are the host's.
    """
    total, paged = 0, training.optimizer == "paged_adamw8bit"
    for size, count in trained_tensors(spec, training).items():
        if training.optimizer == "adamw":
            total += count * 2 * size * trained_itemsize(training)
        elif size < EIGHT_BIT_ELEMENTS:
            total += count * 2 * 4 * size
        else:
            total += count * 2 * (4 * -(-size // 256) + (0 if paged and size >= PAGED_ELEMENTS else size))
    return total


def trained_tensors(spec: ModelSpec, training: Training) -> Counter[int]:
    """Elements of the tensors that train, each size with how many there are."""
    layer: Counter[int] = Counter()
    if training.adapts:
        for sizes in adapter_sizes(spec, training):
            layer.update(sizes)
        whole = Counter({size: count * len(training.trained_layers) for size, count in layer.items()})
        return Counter({prompt_parameters(spec, training): 1}) if training.embeds else whole
    for linear in spec.linears:
        layer.update([linear.in_features * linear.out_features] + [linear.out_features] * linear.has_bias)
    found: Counter[int] = Counter()
    for index in training.trained_layers:
        found.update(layer)
        rest = spec.layer_parameters[index] - sum(size * count for size, count in layer.items())
        found.update([spec.hidden_size] * (rest // spec.hidden_size) + [rest % spec.hidden_size])
    ends = {**end_parameters(spec), "embedding": spec.embedding_parameters}
    found.update(size for end, size in ends.items() if getattr(training, end) == "on")
    found.update([position_parameters(spec)] if training.embedding == "on" else [])
    return Counter({size: count for size, count in found.items() if size})


def trained_itemsize(training: Training) -> int:
    """Bytes of one trained parameter: adapters are fp32, fully trained weights have the base's dtype."""
    if training.adapts or training.densely:
        return 4
    return DTYPE_BYTES[training.base_precision]


def step_terms(spec: ModelSpec, training: Training, work: Workload) -> list[Term]:
    """What is alive at the highest moment of a training step, in bytes of live tensors.

    A layer keeps and holds what `edgeft.memory.dataflow` says; here the layers are stacked. While micro-batches after
    the first run, every gradient is there already.
    """
    way, tokens = Way.of(spec, training, work.longest), training.micro_batch_size * work.longest
    loss_tokens = training.micro_batch_size * min(work.longest_trained, work.longest - 1)
    moments = _moments(spec, training, work, way, loss_tokens)
    whole = gathered_bytes(spec, training), topmost_bytes(spec, training)
    highest = max(moments, key=lambda moment: sum(moment[1:]) + whole[moment.name.endswith(", loss")])
    name, activations, present, held = highest
    parameters = trained_parameters(spec, training)
    weights, itemsize = weight_bytes(spec, training) - dropped_bytes(spec, training), trained_itemsize(training)
    adapters, dense, count = adapter_bytes(spec, training), dense_bytes(spec, training), spec.num_hidden_layers
    inputs = 8 * tokens + 8 * work.longest + 16 * loss_tokens + mask_bytes(spec, way, tokens)
    inputs += 0 if position_parameters(spec) else 2 * way.itemsize * spec.head_dim * work.longest
    recomputed = f", layers recomputed: {count - training.kept_layers} of {count}" if training.checkpointing else ""
    trained = len(set(training.trained_layers))
    terms = [
        ("weights", weights, weights_formula(spec, training)),
        ("streamed layers", window_bytes(spec, training), "two layers at a time"),
        ("gathered layers", whole[name.endswith(", loss")], "two at a time, one while there is a loss"),
        ("dense layers", dense, f"{trained} layers of {count} in fp32 while they train"),
        ("adapters", adapters, f"{adapters // 4} x 4 B"),
        ("optimizer", optimizer_bytes(spec, training), f"{parameters} parameters, {training.optimizer}"),
        ("gradients", present, f"{parameters} x {itemsize} B when all are there"),
        ("activations", activations, f"{tokens} tokens{recomputed}"),
        (f"height: {name}", held, f"{tokens} tokens, {loss_tokens} trained, V = {spec.vocab_size}"),
        ("inputs", inputs, "ids, positions, rotary tables, masks"),
    ]
    return [Term(name=n, bytes=int(b), formula=f) for n, b, f in terms if b]


def weights_formula(spec: ModelSpec, training: Training) -> str:
    """Which weights are there while a step runs."""
    without = f" without layers 0 to {training.cached_layers - 1}" if training.cached_layers else ""
    without = " without the layers' matrices" if training.stream_layers else without
    without = f", 1/{training.processes} of each layer," if training.shard_base else without
    return f"{spec.total_parameters} parameters{without} in {training.base_precision}"


class Moment(NamedTuple):
    """One moment of a step, in bytes: activations that are kept, gradients that are there, what else is held."""

    name: str
    activations: float
    gradients: float
    held: float


def _moments(spec: ModelSpec, training: Training, work: Workload, way: Way, loss_tokens: int) -> list[Moment]:
    """Every moment that can be the highest: each part of the model forwards and backwards, the optimizer."""
    e, tokens = way.itemsize, training.micro_batch_size * work.longest
    again, on = training.share > training.micro_batch_size, training.embedding == "on"
    parts, embedded_is_kept = _parts(spec, training, work, way, loss_tokens, again)
    table, positions = (e * spec.embedding_parameters, e * position_parameters(spec)) if on else (0, 0)
    there = sum(part.gradients for part in parts) + table + positions if again else 0.0  # from the micro-batch before
    read = read_bytes(spec, way) if training.embeds else Read(0.0, 0.0)
    if training.embeds:  # the layers' gradients are its keys' and values', which go on to its own
        there = 4.0 * prompt_parameters(spec, training) if again else 0.0
    # while the layers run, the model's code has a name for what the embedding gave: learned positions make another
    embedded = e * spec.hidden_size * tokens
    if learned := position_parameters(spec):
        embedded += e * spec.hidden_size * (tokens if spec.family.positions_of_rows else work.longest)
    elif embedded_is_kept:
        embedded = 0
    moments, kept, names = list[Moment](), read.kept, _names(spec, training)
    for n, part in enumerate(parts):
        named = embedded if n or learned else 0
        moments.append(Moment(f"forward, {names[n]}", kept, there, max(part.forward, part.body + named)))
        kept += part.kept_forward
    kept, made, waiting = sum(part.kept for part in parts) + read.kept, 0.0, 0.0
    for n, part in reversed(list(enumerate(parts))):
        kept -= part.kept
        if part.backward:
            beside = there + made if training.embeds else there or made
            moments.append(Moment(f"backward, {names[n]}", kept, beside + waiting, part.backward))
        made += part.gradients
        waiting = table if spec.tie_word_embeddings else 0.0  # a tied head's gradient, for the embedding's own
    if table:
        # its own gradient, to which a tied head's is added in place
        height = e * spec.hidden_size * tokens + table + positions
        moments.append(Moment("backward, embedding", 0, (there or made) + waiting, height))
    gradients = there or made + table + positions
    if training.embeds:
        moments.append(Moment("backward, prompt", read.kept, there + made, read.backward))
        gradients = 4.0 * prompt_parameters(spec, training)
    return [*moments, *_added_up(spec, training, gradients), Moment("optimizer", 0, gradients, 0)]


def _added_up(spec: ModelSpec, training: Training, gradients: float) -> list[Moment]:
    """The moment when gradients go into the buffer that several processes add up; none of one process.

    A CPU's pages of the buffer come as each gradient goes; a GPU's allocator has both in full.
    """
    if training.processes == 1:
        return []
    largest = trained_itemsize(training) * max(trained_tensors(spec, training), default=0)
    return [Moment("adding up", 0, gradients, gradients if training.device == "cuda" else largest)]


def lowest_trained(spec: ModelSpec, training: Training) -> int:
    """The lowest layer that trains, -1 where the embedding does, the number of layers where none does."""
    return -1 if training.embedding == "on" else min(training.trained_layers, default=spec.num_hidden_layers)


def layer_places(spec: ModelSpec, training: Training, work: Workload) -> list[tuple[Kind, bool, bool, bool]]:
    """What decides each layer's tensors: its kind, whether its input wants a gradient, has a mask, is recomputed."""
    trained, resting = set(training.trained_layers), set(training.resting_layers)
    lowest, count = lowest_trained(spec, training), spec.num_hidden_layers
    return [
        (
            "trained" if n in trained else "resting" if n in resting else "through" if n > lowest else "idle",
            n > lowest,
            is_masked(spec, n, work.longest),
            training.recomputes(n, count),
        )
        for n in range(training.cached_layers, count)
    ]


def _parts(
    spec: ModelSpec, training: Training, work: Workload, way: Way, loss_tokens: int, again: bool
) -> tuple[list[Sizes], bool]:  # fmt: skip
    """(each layer that runs and what follows them, whether the first of them keeps its input)."""
    count, tokens = spec.num_hidden_layers, training.micro_batch_size * work.longest
    lowest = lowest_trained(spec, training)
    head = training.embedding if spec.tie_word_embeddings else training.head
    after = ends_bytes(
        spec, way, lowest < count, training.norm == "on", head == "on", spec.tie_word_embeddings, loss_tokens,
        training.loss_chunk_tokens,
    )  # fmt: skip
    places = layer_places(spec, training, work)
    later = again and not training.embeds  # of a prompt no layer has gradients of its own that stay
    sizes = {place: Sizes.of(layer_bytes(spec, way, *place), tokens, later) for place in set(places)}
    first = layer_bytes(spec, way, *places[0]).keeps_input
    return [*(sizes[place] for place in places), Sizes.of(after, tokens, again)], first


def _names(spec: ModelSpec, training: Training) -> list[str]:
    """The names of `_parts`."""
    return [*(f"layer {n}" for n in range(training.cached_layers, spec.num_hidden_layers)), "loss"]


def known(spec: ModelSpec) -> bool:
    """Whether the closed form holds for a model's family."""
    return spec.exact or spec.model_type in LIKE_LLAMA
