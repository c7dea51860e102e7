"""How many bytes does each phase of a run need at its highest moment? In closed form, microseconds per candidate.

What a layer keeps and holds follows from its operations (`edgeft.memory.dataflow`) and is the same for each layer of a
kind; here layers, weights, gradients and states are added up. Nothing of it is fitted: bench/closed_form.py compares it
with the simulated step. Symbols as in the field: h hidden, e bytes of the compute dtype, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from pydantic.dataclasses import dataclass

from edgeft.data.scoring_groups import MAX_ANSWER_TOKENS, Answers, Scoring, Shape, Size, scoring
from edgeft.documents import Strict
from edgeft.memory.dataflow import Kind, LayerBytes, ends_bytes, is_masked, layer_bytes, mask_bytes
from edgeft.memory.operations import Way
from edgeft.models.families import LIKE_LLAMA
from edgeft.models.spec import Linear, ModelSpec
from edgeft.settings import ENDS, Training
from edgeft.tuners import TUNERS
from edgeft.units import MIB

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # codes, 8-bit scales per 64 weights, fp32 scales of 256 scales
NF4_PER_LINEAR = 1024 + 64 + 4  # the two code books and the offset of one quantised matrix
ADAM8_BYTES = 2 * (1 + 4 / 256)  # two states of a byte, one fp32 scale per 256
# bitsandbytes keeps the states of smaller tensors in fp32, and pages those of larger ones alone
EIGHT_BIT_ELEMENTS, PAGED_ELEMENTS = 4096, 100_000
# cuBLAS's workspaces inside PyTorch's allocator, one for the caller's thread and one for autograd's: 32 MiB each on
# capability 9.0, 8.1 elsewhere. What the allocator reserves beyond what is alive: 15 to 50 MiB in runs of 0.2 to 10
# GiB; at most 171 with 4-bit weights and in fp32, which the share in the high estimate covers (bench/gpu_runs.json).
CUDA_WORKSPACES, CUDA_WORKSPACE_90 = 2 * 8_519_680, 2 * 32 * MIB
CUDA_RESERVED, CUDA_FLOOR = 36 * MIB, 32 * MIB
# What earlier phases leave between the tensors of a CPU's heap beyond what is expected, at most: 13.6 MiB were seen,
# where 200 rows of many lengths had been scored (bench/planner.py, random job 25 of seed 1), 5 elsewhere.
CPU_HEAP = 16 * MIB

# What a training process holds on a CPU beyond the tiny run's and its tensors: the matrix library's buffers, Python's
# objects. Fitted on half of the runs of bench/planner.py; live tensor bytes and the head's buffer are not fitted.
CPU_BUFFERS, CPU_BYTES_PER_DOUBLING = 11_300_000, 1_460_000  # up to 128 tokens, and for each doubling of them
CPU_BYTES_PER_ADAPTER, CPU_BYTES_PER_NF4, CPU_RECOMPUTING = 100_000, 36_000, 4_650_000  # of each linear; of a run

# malloc=fast (`meter.keep_pool`): its part of what a step makes and frees, beyond which hardly a page is mapped anew,
# and at most so much; of a pool in use POOL_WASTE lies between tensors, at most POOL_WORST. Measured on the example's
# step with pools of 120, 176, 224 and 280 MiB: 0.39 to 0.46. Not fitted: 0.42 on layers of 135M's
# shape at 2 x 512 tokens, pool of 512 MiB.
POOL_SHARE, POOL_MOST, POOL_WASTE, POOL_WORST = 0.75, 256 * MIB, 0.42, 0.6


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
    """Bytes of the base model as the plan keeps it; NF4 leaves embedding, head, norms and biases dense."""
    if training.base_precision != "nf4":
        return spec.total_parameters * DTYPE_BYTES[training.base_precision]
    quantised = sum(linear.in_features * linear.out_features for linear in spec.linears) * spec.num_hidden_layers
    dense = spec.total_parameters - quantised
    codes = quantised * NF4_BYTES + NF4_PER_LINEAR * len(spec.linears) * spec.num_hidden_layers
    return int(dense * DTYPE_BYTES[training.compute_dtype] + codes)


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
    return int(each * len(training.trained_layers))


def trained_parameters(spec: ModelSpec, training: Training) -> int:
    """Parameters that get a gradient: r * (in + out) per target and layer, or whole layers, or everything."""
    if training.adapts:
        return sum(sum(sizes) for sizes in adapter_sizes(spec, training)) * len(training.trained_layers)
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
            found.append(training.model_copy(update={**modes, "layers": "sparse", "trained_layers": chosen}))
    return found


def targets(spec: ModelSpec, training: Training) -> list[Linear]:
    """The projections of one layer that carry an adapter."""
    return [linear for linear in spec.linears if linear.name in training.target_modules]


def adapter_sizes(spec: ModelSpec, training: Training) -> list[tuple[int, ...]]:
    """Elements of the tensors of each adapter of a layer."""
    sizes = TUNERS[training.tuner].sizes
    return [sizes(linear.in_features, linear.out_features, training.rank) for linear in targets(spec, training)]


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
        return Counter({size: count * len(training.trained_layers) for size, count in layer.items()})
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
    way, count = Way.of(spec, training, work.longest), spec.num_hidden_layers
    e, tokens = way.itemsize, training.micro_batch_size * work.longest
    loss_tokens = training.micro_batch_size * min(work.longest_trained, work.longest - 1)
    trained, lowest = set(training.trained_layers), min(training.trained_layers, default=count)
    if training.embedding == "on":
        lowest = -1
    again = training.batch_size > training.micro_batch_size
    head = training.embedding if spec.tie_word_embeddings else training.head
    after = ends_bytes(
        spec, way, lowest < count, training.norm == "on", head == "on", spec.tie_word_embeddings, loss_tokens,
        training.loss_chunk_tokens,
    )  # fmt: skip
    places: list[tuple[Kind, bool, bool, bool]] = [
        (
            "trained" if n in trained else "through" if n > lowest else "idle",
            n > lowest,
            is_masked(spec, n, work.longest),
            training.recomputes(n, count),
        )
        for n in range(count)
    ]
    sizes = {place: Sizes.of(layer_bytes(spec, way, *place), tokens, again) for place in set(places)}
    parts = [*(sizes[place] for place in places), Sizes.of(after, tokens, again)]
    on = training.embedding == "on"
    table, positions = (e * spec.embedding_parameters, e * position_parameters(spec)) if on else (0, 0)
    there = sum(part.gradients for part in parts) + table + positions if again else 0.0  # from the micro-batch before

    moments: list[tuple[str, float, float, float]] = []  # name, activations, gradients, what else is held
    # while the layers run, the model's code has a name for what the embedding gave: learned positions make another
    embedded = e * spec.hidden_size * tokens
    if learned := position_parameters(spec):
        embedded += e * spec.hidden_size * (tokens if spec.family.positions_of_rows else work.longest)
    elif layer_bytes(spec, way, *places[0]).keeps_input:
        embedded = 0
    kept = 0.0
    for n, part in enumerate(parts):
        named = embedded if n or learned else 0
        moments.append((f"forward, {_name(n, count)}", kept, there, max(part.forward, part.body + named)))
        kept += part.kept_forward
    kept, made, waiting = sum(part.kept for part in parts), 0.0, 0.0
    for n, part in reversed(list(enumerate(parts))):
        kept -= part.kept
        if part.backward:
            moments.append((f"backward, {_name(n, count)}", kept, (there or made) + waiting, part.backward))
        made += part.gradients
        waiting = table if spec.tie_word_embeddings else 0.0  # a tied head's gradient, for the embedding's own
    if table:
        # its own gradient, to which a tied head's is added in place
        height = e * spec.hidden_size * tokens + table + positions
        moments.append(("backward, embedding", 0, (there or made) + waiting, height))
    moments.append(("optimizer", 0, there or made + table + positions, 0))

    name, activations, present, held = max(moments, key=lambda moment: sum(moment[1:]))
    parameters = trained_parameters(spec, training)
    weights, itemsize = weight_bytes(spec, training), trained_itemsize(training)
    dense = dense_bytes(spec, training)
    inputs = 8 * tokens + 8 * work.longest + 16 * loss_tokens + mask_bytes(spec, way, tokens)
    inputs += 0 if learned else 2 * e * spec.head_dim * work.longest
    recomputed = f", layers recomputed: {count - training.kept_layers} of {count}" if training.checkpointing else ""
    terms = [
        ("weights", weights, f"{spec.total_parameters} parameters in {training.base_precision}"),
        ("dense layers", dense, f"{len(trained)} layers of {spec.num_hidden_layers} in fp32 while they train"),
        ("adapters", parameters * itemsize if training.adapts else 0, f"{parameters} x {itemsize} B"),
        ("optimizer", optimizer_bytes(spec, training), f"{parameters} parameters, {training.optimizer}"),
        ("gradients", present, f"{parameters} x {itemsize} B when all are there"),
        ("activations", activations, f"{tokens} tokens{recomputed}"),
        (f"height: {name}", held, f"{tokens} tokens, {loss_tokens} trained, V = {spec.vocab_size}"),
        ("inputs", inputs, "ids, positions, rotary tables, masks"),
    ]
    return [Term(name=n, bytes=int(b), formula=f) for n, b, f in terms if b]


class Sizes(NamedTuple):
    """What a part of the model keeps and holds, in bytes, for one number of tokens."""

    forward: float
    body: float
    kept_forward: float
    kept: float
    backward: float
    gradients: float

    @classmethod
    def of(cls, part: LayerBytes, tokens: int, again: bool) -> Sizes:
        def at(size: complex) -> float:
            return size.real * tokens + size.imag

        back = part.backward_again if again else part.backward
        return cls(
            max(map(at, part.forward)), max(map(at, part.body)), at(part.kept_forward), at(part.kept),
            max(map(at, back), default=0.0), at(part.gradients),
        )  # fmt: skip


def _name(number: int, layers: int) -> str:
    return "loss" if number == layers else f"layer {number}"


def scoring_terms(spec: ModelSpec, training: Training, scored: Scoring | None) -> tuple[list[Term], list[Term]]:
    """(what losses, what answers hold beyond the model at the highest moment); `scored`: None without data."""
    if scored is None or not scored.rows:
        longest = training.max_length
        rows = max(1, training.group_tokens // longest)
        size = Size(longest, max(1, longest - MAX_ANSWER_TOKENS), training.max_trained)
        scored = scoring([[size] * rows], training.group_tokens)
    losses = max((_loss_terms(spec, training, shape) for shape in scored.shapes), key=_total)
    return losses, _answer_terms(spec, training, scored.answers) if scored.answers else []


def _total(terms: Sequence[Term]) -> int:
    return sum(term.bytes for term in terms)


def _loss_terms(spec: ModelSpec, training: Training, shape: Shape) -> list[Term]:
    """A group's losses: the layers one after the other, or the logits of a chunk of its trained tokens."""
    e, tokens = DTYPE_BYTES[training.compute_dtype], shape.rows * shape.tokens
    way, chunk = Way.of(spec, training, shape.tokens), min(training.loss_chunk_tokens, shape.trained)
    forward = _forward_bytes(spec, training, way, tokens, False)
    wide = 4 if e == 4 else 4 + e  # half-precision logits are there beside their fp32 ones
    logits = wide * spec.vocab_size * chunk + 2 * e * spec.hidden_size * shape.trained
    inputs = 16 * tokens + 16 * shape.trained + mask_bytes(spec, way, tokens) + 2 * e * spec.head_dim * shape.tokens
    formula = f"{shape.rows} x {shape.tokens} tokens, {shape.trained} trained, V = {spec.vocab_size}"
    name = "logits" if logits > forward else "forward"
    return [Term(name=name, bytes=int(max(logits, forward) + inputs), formula=formula)]


def _answer_terms(spec: ModelSpec, training: Training, answers: Answers) -> list[Term]:
    """Answers: their prompts under a mask, or the last token, with a full cache and a layer's keys twice.

    Prompts are padded on the left, and transformers' cache grows by a copy.
    """
    e = DTYPE_BYTES[training.compute_dtype]
    key = e * spec.num_key_value_heads * spec.head_dim  # of one layer, for each token
    tokens, longest = answers.prompt_tokens, answers.longest_prompt
    way = replace(Way.of(spec, training, longest), longest=longest)
    cached = 2 * key * spec.num_hidden_layers
    # a mask of booleans, and what positions and rotary tables are made from
    inputs = 24 * tokens + longest * tokens + 2 * e * spec.head_dim * tokens
    inputs += mask_bytes(spec, way, tokens) if spec.attn_logit_softcapping else 0
    height = _forward_bytes(spec, training, way, tokens, True) + inputs
    prompts = [
        Term(name="prompts", bytes=int(height), formula=f"{tokens} tokens of {longest} at most, under a mask"),
        Term(name="key-value cache", bytes=cached * tokens, formula=f"{tokens} tokens"),
    ]
    logits = (4 if e == 4 else 4 + e) * spec.vocab_size * answers.rows
    formula = f"{answers.tokens} tokens, and a layer's keys while they grow"
    last = [
        Term(name="key-value cache", bytes=(cached + key) * answers.tokens, formula=formula),
        Term(name="masks", bytes=32 * answers.tokens, formula=f"{answers.tokens} tokens"),
        Term(name="logits", bytes=logits, formula=f"{answers.rows} rows, V = {spec.vocab_size}"),
    ]
    return max(prompts, last, key=_total)


def _forward_bytes(spec: ModelSpec, training: Training, way: Way, tokens: int, masked: bool) -> float:
    """Highest bytes of a forward pass through the layers without autograd, autocast's copies of weights included."""
    trained = set(training.trained_layers)
    places = Counter((n in trained, masked or is_masked(spec, n, way.longest)) for n in range(spec.num_hidden_layers))
    parts = {
        place: layer_bytes(spec, way, "scored" if place[0] else "idle", False, place[1], False) for place in places
    }
    embedded = way.itemsize * spec.hidden_size * tokens  # the model's code has a name for what the embedding gave
    casts = sum(count * parts[place].kept_forward.imag for place, count in places.items())
    return embedded + casts + max(_highest(part.forward, tokens) for part in parts.values())


def _highest(sizes: Sequence[complex], tokens: int) -> float:
    return max(size.real * tokens + size.imag for size in sizes)


def buffers(spec: ModelSpec, training: Training, tokens: int, head_buffers: Mapping[int, int]) -> Term:
    """What a CPU's training process holds that is neither there before it has a model nor a tensor."""
    rows = min(training.loss_chunk_tokens, tokens)
    measured = min((count for count in head_buffers if count >= rows), default=max(head_buffers, default=0))
    head = head_buffers.get(measured, 0) * spec.vocab_size
    adapted = len(training.target_modules) * len(training.trained_layers) if training.adapts else 0
    quantised = len(spec.linears) * spec.num_hidden_layers if training.base_precision == "nf4" else 0
    fixed = CPU_BUFFERS + int(CPU_BYTES_PER_DOUBLING * max(0.0, math.log2(tokens / 128)))
    fixed += CPU_RECOMPUTING if training.checkpointing else 0
    fixed += CPU_BYTES_PER_ADAPTER * adapted + CPU_BYTES_PER_NF4 * quantised
    formula = f"the matrix library's: V = {spec.vocab_size}, {tokens} tokens; {adapted} adapters, {quantised} in NF4"
    return Term(name="buffers", bytes=fixed + head, formula=formula)


def pool_bytes(spec: ModelSpec, training: Training, work: Workload) -> int:
    """What malloc=fast keeps of the memory of a step's tensors for the next ones; 0 for any other plan."""
    if training.malloc != "fast" or training.device != "cpu":
        return 0
    return max(_pool_bytes(step_terms(spec, one, work)) for one in worst_sets(spec, training))


def _pool_bytes(terms: list[Term]) -> int:
    return min(POOL_MOST, int(POOL_SHARE * _passing(terms)))


def _passing(terms: list[Term]) -> int:
    """Bytes of a step's tensors that are gone when it ends."""
    return sum(term.bytes for term in terms if term.name in ("activations", "gradients") or ":" in term.name)


def phases(
    spec: ModelSpec,
    training: Training,
    work: Workload,
    *,
    baseline_bytes: int,
    data_bytes: int = 0,
    head_buffers: Mapping[int, int] | None = None,
    scored: Scoring | None = None,
    capability: float | None = None,
    more: Simulated | None = None,
) -> tuple[Phase, ...]:
    """Every phase of `train` with its terms; `baseline_bytes` is what the process holds before any model.

    `head_buffers` is what the matrix library keeps per word of the vocabulary after so many rows (`Profile`).

    On a CPU, and on an Apple GPU that shares its memory, a phase's bytes are the process's RSS: baseline, data,
    tensors. On CUDA they are the allocator's: tensors, cuBLAS's workspaces by `capability`, what is reserved and not
    used; the CUDA context is the profile's.
    """
    on_cpu = training.device == "cpu"
    if training.device != "cuda":
        first = "Python, torch, transformers, one tiny step"
        start = [Term(name="process", bytes=baseline_bytes, formula=first)]
        if data_bytes:
            start.append(Term(name="data", bytes=data_bytes, formula="samples as arrays of ids, the tokenizer"))
        tokens = work.longest * training.micro_batch_size
        fixed = [*start, *([buffers(spec, training, tokens, head_buffers or {})] if on_cpu else [])]
    else:
        workspaces = CUDA_WORKSPACE_90 if capability == 9.0 else CUDA_WORKSPACES
        start = fixed = [
            Term(name="cuBLAS workspace", bytes=workspaces, formula="the caller's thread and autograd's"),
            Term(name="reserved", bytes=CUDA_RESERVED, formula="by the allocator beyond what is alive, as measured"),
        ]
    weights = weight_bytes(spec, training)
    weights_term = Term(name="weights", bytes=weights, formula=f"{spec.total_parameters} in {training.base_precision}")
    stored = spec.stored_bytes if training.base_precision != "nf4" else weights
    if training.base_precision != "nf4" and stored == weights and not spec.stacked:
        stored = 0  # weights that stay as they are stored stay pages of their file
    load = [*start, weights_term]
    if training.device == "cuda" and training.base_precision == "nf4":
        # what stays dense is cast tensor by tensor, each beside its old self
        table = DTYPE_BYTES[training.compute_dtype] * spec.vocab_size * spec.hidden_size
        load.append(Term(name="cast", bytes=table, formula=f"{spec.vocab_size} x {spec.hidden_size}, twice"))
    if on_cpu and stored:
        load.append(Term(name="weight file", bytes=stored, formula=f"pages of the file, {spec.dtype}"))
    sets = worst_sets(spec, training)
    adapter = trained_parameters(spec, training) * 4 if training.adapts else 0
    dense = max(dense_bytes(spec, one) for one in sets)
    pool = pool_bytes(spec, training, work)
    held = [
        *fixed,
        weights_term,
        Term(name="adapters", bytes=adapter, formula="kept while scoring"),
        Term(name="dense layers", bytes=dense, formula="layers in fp32 that trained last"),
    ]

    def scored_phase(terms: Sequence[Term]) -> Phase:
        kept = _pool_term(min(pool, sum(term.bytes for term in terms)))
        return phase("evaluate", [term for term in (*held, *terms, kept) if term.bytes], spec, training)

    losses, answered = scoring_terms(spec, training, scored)
    evaluate = scored_phase(losses)
    if answered:  # for rows that a pass leaves open; there may be none
        most = scored_phase(answered).high_bytes
        evaluate = evaluate.model_copy(update={"high_bytes": max(evaluate.high_bytes, most)})
    if more is not None:
        # a group has no more tokens than a micro-batch, and keeps less of each
        high = evaluate.high_bytes + max(0, more.bytes)
        evaluate = evaluate.model_copy(update={"high_bytes": high})
    steps = max((step_terms(spec, one, work) for one in sets), key=lambda terms: sum(term.bytes for term in terms))
    step = [*fixed, *steps, _pool_term(min(pool, _passing(steps)))]
    if more is not None:
        formula = "what this model's code holds beyond a Llama's, or less than it"
        step.append(Term(name="simulated", bytes=more.bytes, formula=formula))
    return (
        phase("load", load, spec, training),
        evaluate,
        phase("train", [term for term in step if term.bytes], spec, training, more is not None and more.exact),
    )


def _pool_term(used: int) -> Term:
    formula = f"{POOL_WASTE} of {used} B that are kept for reuse"
    return Term(name="pool", bytes=int(POOL_WASTE * used), formula=formula)


class Simulated(NamedTuple):
    """Bytes that a model's own code was found to hold beyond the closed form in a step, or fewer than it.

    `exact`: found for this very way of training, not for one like it.
    """

    bytes: int
    exact: bool


def known(spec: ModelSpec) -> bool:
    """Whether the closed form holds for a model's family."""
    return spec.exact or spec.model_type in LIKE_LLAMA


def phase(name: str, terms: list[Term], spec: ModelSpec, training: Training, simulated: bool = False) -> Phase:
    """A phase with its low and high estimate: 2% for families known operation by operation on a CPU, 5% on CUDA.

    CUDA's 5%, at least 32 MiB, is what the allocator reserves in pieces that do not fit. Families
    like a Llama get 15%, as do ways that were not simulated of families that must be.
    """
    expected = sum(term.bytes for term in terms)
    exact = simulated or spec.exact
    margin = 0.15 if not exact else 0.02 if training.device == "cpu" else 0.05
    pool = next((term.bytes for term in terms if term.name == "pool"), 0)
    high = int(expected * (1 + margin)) + (CPU_HEAP if training.device != "cuda" else 0)
    high += int(pool * (POOL_WORST / POOL_WASTE - 1))
    if training.device == "cuda":
        high = max(high, expected + CUDA_FLOOR)
    return Phase(
        name=name,
        terms=tuple(terms),
        low_bytes=int(expected * (1 - margin)) - pool,
        expected_bytes=expected,
        high_bytes=high,
    )
