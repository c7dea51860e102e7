"""How many bytes does each phase of a run need: loading, scoring, training, with what a process holds beside tensors?

What a step holds is `train_step`'s; here is what is fitted or measured, and the margins of the estimates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from edgeft.data.scoring_groups import MAX_ANSWER_TOKENS, Answers, Scoring, Shape, Size, scoring
from edgeft.memory.dataflow import is_masked, layer_bytes, mask_bytes
from edgeft.memory.operations import Way
from edgeft.memory.several import GLOO_BYTES
from edgeft.memory.sharded import gathered_bytes
from edgeft.memory.streamed import window_bytes
from edgeft.memory.train_step import (
    DTYPE_BYTES,
    Phase,
    Term,
    Workload,
    adapter_bytes,
    dense_bytes,
    optimizer_bytes,
    step_terms,
    weight_bytes,
    worst_sets,
)
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import Training
from edgeft.units import MIB

# cuBLAS's workspaces inside PyTorch's allocator, one for the caller's thread and one for autograd's: 32 MiB each on
# capability 9.0, 8.1 elsewhere. What the allocator reserves beyond what is alive: 15 to 50 MiB in runs of 0.2 to 10
# GiB; at most 171 with 4-bit weights and in fp32, which the share in the high estimate covers (bench/gpu_runs.json).
CUDA_WORKSPACES, CUDA_WORKSPACE_90 = 2 * 8_519_680, 2 * 32 * MIB
CUDA_RESERVED, CUDA_FLOOR = 36 * MIB, 32 * MIB
# Of what the highest moment makes and frees in many sizes: 23% stayed reserved beside it where logits of 256,000 words
# or 8,192 tokens at once are made (bench/results/cuda.json).
CUDA_PASSING = 0.25
# What earlier phases leave between the tensors of a CPU's heap beyond what is expected, at most: 22.3 MiB were seen,
# where 3,000 chats had been read and 200 rows of many lengths scored (bench/planner.py, random job 25 of seed 1).
CPU_HEAP = 24 * MIB

# What a training process holds on a CPU beyond the tiny run's and its tensors: the matrix library's buffers, Python's
# objects. Fitted on half of the runs of bench/planner.py; live tensor bytes and the head's buffer are not fitted.
CPU_BUFFERS, CPU_BYTES_PER_DOUBLING = 11_300_000, 1_460_000  # up to 128 tokens, and for each doubling of them
CPU_BYTES_PER_ADAPTER, CPU_BYTES_PER_NF4, CPU_RECOMPUTING = 100_000, 36_000, 4_650_000  # of each linear; of a run

HEAD_CHECK_TOKENS = 64  # of the sample whose loss is computed both ways before training

# malloc=fast (`machines.pool`): what may lie free between tensors, of what a step makes and frees; beyond it free pages
# are given back before the next layer runs. The heap's size is address space, not memory.
POOL_SHARE, POOL_RESERVE = 0.25, 2.0


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
    way, chunk = Way.of(spec, training, shape.tokens, shape.rows), min(training.loss_chunk_tokens, shape.trained)
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
    way = replace(Way.of(spec, training, longest, answers.rows), longest=longest)
    cached = 2 * key * spec.num_hidden_layers
    joined = 2 * key * (answers.tokens + way.past) if way.past else 0  # of one layer, a prefix's and the text's
    # a mask of booleans, and what positions and rotary tables are made from
    inputs = 24 * tokens + longest * tokens + 2 * e * spec.head_dim * tokens
    inputs += mask_bytes(spec, way, tokens) if spec.attn_logit_softcapping else joined
    height = _forward_bytes(spec, training, way, tokens, True) + inputs
    prompts = [
        Term(name="prompts", bytes=int(height), formula=f"{tokens} tokens of {longest} at most, under a mask"),
        Term(name="key-value cache", bytes=cached * tokens, formula=f"{tokens} tokens"),
    ]
    logits = (4 if e == 4 else 4 + e) * spec.vocab_size * answers.rows
    formula = f"{answers.tokens} tokens, and a layer's keys while they grow"
    last = [
        Term(name="key-value cache", bytes=(cached + key) * answers.tokens, formula=formula),
        Term(name="masks", bytes=32 * answers.tokens + joined, formula=f"{answers.tokens} tokens"),
        Term(name="logits", bytes=logits, formula=f"{answers.rows} rows, V = {spec.vocab_size}"),
    ]
    return max(prompts, last, key=_total)


def _forward_bytes(spec: ModelSpec, training: Training, way: Way, tokens: int, masked: bool) -> float:
    """Highest bytes of a forward pass through the layers without autograd, autocast's copies of weights included."""
    folded = training.quantize_aware is not None and training.adapts  # what is scored has no adapters left
    trained = set() if folded else set(training.adapted_layers)
    if training.layers == "lisa" and training.densely:  # those that do not train now are as the base holds them
        trained = set(training.trained_layers[: training.active_layers])
    places = Counter((n in trained, masked or is_masked(spec, n, way.longest)) for n in range(spec.num_hidden_layers))
    parts = {
        place: layer_bytes(spec, way, "scored" if place[0] else "idle", False, place[1], False) for place in places
    }
    embedded = way.itemsize * spec.hidden_size * tokens  # the model's code has a name for what the embedding gave
    casts = sum(count * parts[place].kept_forward.imag for place, count in places.items())
    return embedded + casts + max(_highest(part.forward, tokens) for part in parts.values())


def _highest(sizes: Sequence[complex], tokens: int) -> float:
    return max(size.real * tokens + size.imag for size in sizes)


def buffers(spec: ModelSpec, training: Training, tokens: int, trained: int, head_buffers: Mapping[int, int]) -> Term:
    """What a CPU's training process holds that is neither there before it has a model nor a tensor.

    Of a group of so many tokens, of which the head reads those that train.
    """
    rows = min(training.loss_chunk_tokens, trained)
    measured = min((count for count in head_buffers if count >= rows), default=max(head_buffers, default=0))
    head = head_buffers.get(measured, 0) * spec.vocab_size
    adapted = len(training.target_modules) * len(training.trained_layers) if training.adapts else 0
    quantised = len(spec.linears) * spec.num_hidden_layers if training.base_precision == "nf4" else 0
    fixed = CPU_BUFFERS + int(CPU_BYTES_PER_DOUBLING * max(0.0, math.log2(tokens / 128)))
    fixed += CPU_RECOMPUTING if training.checkpointing else 0
    fixed += CPU_BYTES_PER_ADAPTER * adapted + CPU_BYTES_PER_NF4 * quantised
    formula = f"the matrix library's: V = {spec.vocab_size}, {tokens} tokens; {adapted} adapters, {quantised} in NF4"
    return Term(name="buffers", bytes=fixed + head, formula=formula)


class PoolSize(NamedTuple):
    """What malloc=fast keeps: bytes that may lie free between tensors, and the size of the heap that they lie in."""

    kept: int
    reserve: int


def pool_size(spec: ModelSpec, training: Training, work: Workload) -> PoolSize:
    """The pool of a plan with malloc=fast; nothing for any other plan."""
    if training.malloc != "fast" or training.device != "cpu":
        return PoolSize(0, 0)
    passing = max(_passing(step_terms(spec, one, work)) for one in worst_sets(spec, training))
    return PoolSize(int(POOL_SHARE * passing), int(POOL_RESERVE * passing))


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
    read = max((shape.trained for shape in scored.shapes), default=0) if scored else training.max_trained
    start, fixed = _beside_tensors(
        spec, training, work, read, baseline_bytes, data_bytes, head_buffers or {}, capability
    )
    sets, pool = worst_sets(spec, training), pool_size(spec, training, work).kept
    held = [*fixed, *_kept(spec, training, sets)]
    evaluate = [_evaluate(spec, training, held, scored, pool), *_validate(spec, training, sets, held, scored, pool)]
    if more is not None:
        # a group has no more tokens than a micro-batch, and keeps less of each
        evaluate = [each.model_copy(update={"high_bytes": each.high_bytes + max(0, more.bytes)}) for each in evaluate]
    steps = max((step_terms(spec, one, work) for one in sets), key=_total)
    step = [*fixed, *steps, _pool_term(pool)]
    if more is not None:
        formula = "what this model's code holds beyond a Llama's, or less than it"
        step.append(Term(name="simulated", bytes=more.bytes, formula=formula))
    return (
        phase("load", [*start, *_loading(spec, training)], spec, training),
        *_prefix(spec, training, fixed, pool),
        *evaluate,
        phase("train", [term for term in step if term.bytes], spec, training, more is not None and more.exact),
    )


def _beside_tensors(
    spec: ModelSpec, training: Training, work: Workload, read: int, baseline_bytes: int, data_bytes: int,
    head_buffers: Mapping[int, int], capability: float | None,
) -> tuple[list[Term], list[Term]]:  # fmt: skip
    """(before a model is there, once it computes) what is held that is no tensor; `read`: tokens scored at a time."""
    if training.device == "cuda":
        workspaces = CUDA_WORKSPACE_90 if capability == 9.0 else CUDA_WORKSPACES
        fixed = [
            Term(name="cuBLAS workspace", bytes=workspaces, formula="the caller's thread and autograd's"),
            Term(name="reserved", bytes=CUDA_RESERVED, formula="by the allocator beyond what is alive, as measured"),
        ]
        return fixed, fixed
    start = [Term(name="process", bytes=baseline_bytes, formula="Python, torch, transformers, one tiny step")]
    if training.processes > 1:
        start.append(Term(name="gloo", bytes=GLOO_BYTES, formula=f"what connects {training.processes} processes"))
    if data_bytes:
        start.append(Term(name="data", bytes=data_bytes, formula="samples as arrays of ids, the tokenizer"))
    if training.device != "cpu":
        return start, start
    tokens, trained = (each * training.micro_batch_size for each in (work.longest, work.longest_trained))
    return start, [*start, buffers(spec, training, tokens, max(trained, read), head_buffers)]


def _weights(spec: ModelSpec, training: Training) -> Term:
    weights = weight_bytes(spec, training)
    return Term(name="weights", bytes=weights, formula=f"{spec.total_parameters} in {training.base_precision}")


def _window(spec: ModelSpec, training: Training) -> list[Term]:
    """Layers that are read, or gathered from other processes, as they compute."""
    found = [
        Term(name="streamed layers", bytes=window_bytes(spec, training), formula="two layers at a time"),
        Term(name="gathered layers", bytes=gathered_bytes(spec, training), formula="two layers at a time"),
    ]
    return [term for term in found if term.bytes]


def _first_look(spec: ModelSpec, training: Training) -> list[Term]:
    """What checking the head takes, the first time that layers compute: a dense matrix, logits of 64 tokens twice."""
    way = Way.of(spec, training, HEAD_CHECK_TOKENS)
    largest = max(linear.in_features * linear.out_features for linear in spec.linears)
    dense = way.itemsize * largest if way.nf4 else 0
    logits = 2 * 4 * HEAD_CHECK_TOKENS * spec.vocab_size
    return [Term(name="forward", bytes=dense + logits, formula=f"{HEAD_CHECK_TOKENS} tokens, to check the head")]


def _loading(spec: ModelSpec, training: Training) -> list[Term]:
    """The weights, and what they are made from while they are."""
    weights, nf4 = _weights(spec, training), training.base_precision == "nf4"
    stored = weights.bytes if nf4 else spec.stored_bytes
    if not spec.stacked and (nf4 or stored == weights.bytes):
        stored = 0  # 4-bit weights are read one at a time; those that stay as they are stored stay pages of their file
    found = [weights, *_window(spec, training)]
    if training.stream_layers or training.shard_base:
        return [*found, *_first_look(spec, training)]
    if training.device == "cuda" and nf4 and spec.stacked:
        # what stays dense is cast tensor by tensor, each beside its old self
        table = DTYPE_BYTES[training.compute_dtype] * spec.vocab_size * spec.hidden_size
        found.append(Term(name="cast", bytes=table, formula=f"{spec.vocab_size} x {spec.hidden_size}, twice"))
    if training.device == "cpu" and stored:
        found.append(Term(name="weight file", bytes=stored, formula=f"pages of the file, {spec.dtype}"))
    return found


def _prefix(spec: ModelSpec, training: Training, fixed: Sequence[Term], pool: int) -> list[Phase]:
    """Making the outputs that are kept of the lowest layers, with the whole model in memory; no phase without them.

    A group is as large as one that is scored, and is there until the next one is.
    """
    if not training.cached_layers:
        return []
    tokens, way = training.group_tokens, Way.of(spec, training, training.max_length)
    forward = int(_forward_bytes(spec, training, way, tokens, False))
    states = 2 * way.itemsize * spec.hidden_size * tokens
    terms = [
        Term(name="forward", bytes=forward + 16 * tokens + mask_bytes(spec, way, tokens), formula=f"{tokens} tokens"),
        Term(name="layer outputs", bytes=states, formula=f"{tokens} x {spec.hidden_size}, twice"),
    ]
    kept = _pool_term(min(pool, _total(terms)))
    held = [*fixed, _weights(spec, training), *terms, kept]
    return [phase("prefix", [term for term in held if term.bytes], spec, training)]


def _kept(spec: ModelSpec, training: Training, sets: Sequence[Training]) -> list[Term]:
    """What of the model is there while it is scored."""
    adapter, made = adapter_bytes(spec, training), 0
    if training.embeds:  # keys and values of a soft prompt
        widths = 2 * spec.num_key_value_heads * spec.head_dim * training.prefix_tokens
        made = DTYPE_BYTES[training.compute_dtype] * spec.num_hidden_layers * widths
    dense = max(dense_bytes(spec, one) for one in sets)
    return [
        _weights(spec, training),
        *_window(spec, training),
        Term(name="adapters", bytes=adapter + made, formula="kept while scoring"),
        Term(name="dense layers", bytes=dense, formula="layers in fp32 that trained last"),
    ]


def _evaluate(
    spec: ModelSpec, training: Training, held: Sequence[Term], scored: Scoring | None, pool: int
) -> Phase:  # fmt: skip
    """Scoring: the losses, whose high estimate covers answers where rows have some."""

    def scored_phase(terms: Sequence[Term]) -> Phase:
        kept = _pool_term(min(pool, _total(terms)))
        return phase("evaluate", [term for term in (*held, *terms, kept) if term.bytes], spec, training)

    losses, answered = scoring_terms(spec, training, scored)
    evaluate = scored_phase(losses)
    if scored is not None and scored.written is not None:
        evaluate = max(
            evaluate, scored_phase(_answer_terms(spec, training, scored.written)), key=lambda one: one.expected_bytes
        )
    if answered:  # for rows that a pass leaves open; there may be none
        most = scored_phase(answered).high_bytes
        evaluate = evaluate.model_copy(update={"high_bytes": max(evaluate.high_bytes, most)})
    return evaluate


def _validate(
    spec: ModelSpec, training: Training, sets: Sequence[Training], held: Sequence[Term], scored: Scoring | None,
    pool: int,
) -> list[Phase]:  # fmt: skip
    """Losses of validation rows between two steps, beside the optimizer's states; no phase where none are validated."""
    if not training.patience:
        return []
    losses = scoring_terms(spec, training, scored)[0]
    states = max(optimizer_bytes(spec, one) for one in sets)
    optimizer = Term(name="optimizer", bytes=states, formula="its states, kept between steps")
    terms = [*held, optimizer, *losses, _pool_term(min(pool, _total(losses)))]
    return [phase("validate", [term for term in terms if term.bytes], spec, training)]


def _pool_term(kept: int) -> Term:
    return Term(name="pool", bytes=kept, formula="freed memory that is kept for the tensors to come")


class Simulated(NamedTuple):
    """Bytes that a model's own code was found to hold beyond the closed form in a step, or fewer than it.

    `exact`: found for this very way of training, not for one like it.
    """

    bytes: int
    exact: bool


def phase(name: str, terms: list[Term], spec: ModelSpec, training: Training, simulated: bool = False) -> Phase:
    """A phase with its low and high estimate: 2% for families known operation by operation on a CPU, 5% on CUDA.

    CUDA's 5%, at least 32 MiB or a share of what passes, is what the allocator reserves in pieces that do not fit.
    Families like a Llama get 15%, as do ways that were not simulated of families that must be.
    """
    expected = sum(term.bytes for term in terms)
    exact = simulated or spec.exact
    margin = 0.15 if not exact else 0.02 if training.device == "cpu" else 0.05
    high = int(expected * (1 + margin)) + (CPU_HEAP if training.device != "cuda" else 0)
    if training.device == "cuda":
        passing = sum(term.bytes for term in terms if term.name.startswith("height"))
        high = max(high, expected + CUDA_FLOOR, expected + int(CUDA_PASSING * passing))
    pool = sum(term.bytes for term in terms if term.name == "pool")  # which nothing need fill
    return Phase(
        name=name,
        terms=tuple(terms),
        low_bytes=int(expected * (1 - margin)) - pool,
        expected_bytes=expected,
        high_bytes=high,
    )
