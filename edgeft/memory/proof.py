"""What does the parity ladder hold in the host's memory at its highest moment?

It has two sides, one after the other: the model in torch, in one form after the other, and the bundle in its runtime.
Beside each lie the tables of log-probabilities that are compared at the end. Last the bundle is measured in a process
of its own, while this one waits. Whichever holds most decides.
"""

from __future__ import annotations

from edgeft.data.scoring_groups import EVAL_TOKENS
from edgeft.machines.runner import runner_module
from edgeft.memory import train_step
from edgeft.memory.disk import learnt_parameters
from edgeft.memory.sharded import uncut
from edgeft.memory.stages import (
    LOGIT_BYTES,
    PARITY_PROMPTS,
    ROUNDING_BLOCKS,
    RUNTIME_LIBRARIES_BYTES,
    Planned,
    file_bytes,
    file_term,
    needed_bytes,
    process_term,
    processes,
    stage,
)
from edgeft.memory.streamed import stored_as, window_bytes
from edgeft.memory.train_step import DTYPE_BYTES, Phase, Term
from edgeft.models.headers import BLOCK_BYTES
from edgeft.models.spec import STORED_BYTES, ModelSpec
from edgeft.settings.job import AUTO, Training
from edgeft.targets.footprint import bundle_weights, predict
from edgeft.targets.matrices import linear_weights
from edgeft.targets.runtimes import runtime_of
from edgeft.targets.target import Target

NAME = "export: prove"
CLIMB_FORMS = 2  # whose tables an export keeps that chooses its target: the merged model's, and its last simulation's
POSITIONS = 256  # of a row in torch, whose logits are held at a time
LOGIT_FORMS = 3  # of those: as they come, scaled, as log-probabilities
BENCH_TOKENS, BENCH_BYTES = 192, 64 * 2**20  # what run.py --bench reads and writes; of an array that a thread reads
PASS_POSITIONS = 64  # of a pass of the bundle, which become log-probabilities at a time


def prove(planned: Planned, training: Training, target: Target, have_bytes: int | None) -> Phase:
    """The parity ladder; `have_bytes`: what the host has, pages of files aside. None: not known.

    What of the other side would be resident beyond the deciding one, pages of files, counts as that. Twice the usual
    margin: this process uses glibc's own malloc, which kept 0 to 100 MB of freed arrays until a rung ended. To return
    each at once took the proof of a 135M model from 45 to 86 seconds of CPU time.
    """
    spec = planned.spec
    sides = [
        *_models(planned, training, streamed=streams(planned, training, have_bytes)),
        _bundle(planned, training, target),
        _measuring(planned, training, target),
    ]
    if target.kv_bits == 8:
        sides.append(_both_caches(planned, training, target))
    made = [_phase(planned, terms) for terms in sides]
    highest = max(made, key=lambda phase: phase.expected_bytes - file_bytes(phase))
    more = max(phase.expected_bytes for phase in made) - highest.expected_bytes
    pages = Term(name="weight file", bytes=more, formula=f"pages of the file, {spec.dtype}, while the model is read")
    return stage(NAME, "host", [*highest.terms, pages], spec, margins=2)


def streams(planned: Planned, training: Training, have_bytes: int | None) -> bool:
    """Whether the ladder's models keep their layers in their files: whole ones would need more than there is."""
    if have_bytes is None:
        return False
    whole = [_phase(planned, terms) for terms in _models(planned, training, streamed=False)]
    return max(needed_bytes(moment) for moment in whole) > have_bytes


def _phase(planned: Planned, terms: list[Term]) -> Phase:
    """One side of the ladder in the process that has all of it."""
    process = processes(planned.profile).training_bytes + RUNTIME_LIBRARIES_BYTES
    return stage(NAME, "host", [
        process_term(process, "Python, torch, transformers, peft, onnxruntime"),
        Term(name="data", bytes=planned.data_bytes, formula="samples as arrays of ids, the tokenizer"), *terms,
    ], planned.spec, margins=2)  # fmt: skip


def _positions(planned: Planned, training: Training) -> int:
    """How many positions' log-probabilities are kept of one form."""
    spec, lengths = planned.spec, planned.lengths
    prompts = PARITY_PROMPTS if planned.job.test else min(PARITY_PROMPTS, training.eval_rows)
    trained = lengths.trained_tokens / lengths.rows if lengths else planned.work.longest_trained
    return min(LOGIT_BYTES // 4 // spec.vocab_size, round(prompts * trained))


def _tables(planned: Planned, training: Training, count: float) -> Term:
    """Tables of log-probabilities of so many forms."""
    vocabulary, positions = planned.spec.vocab_size, _positions(planned, training)
    formula = f"{count:.3g} x {positions} positions, V = {vocabulary}"
    return Term(name="probabilities", bytes=int(count * 4 * vocabulary * positions), formula=formula)


def _models(planned: Planned, training: Training, *, streamed: bool) -> list[list[Term]]:
    """The moments of the model in torch: whole in fp32 or with its layers in their files, before that as it trained.

    Passes over the rows follow one another: as it trained, the same change on the original weights, merged, rounded.
    The second and the last have the table of the one before beside their own. A climb has found the last two by then,
    and keeps both tables.
    """
    spec = planned.spec
    kept = CLIMB_FORMS if planned.job.target == AUTO else 0
    changed = 4 * learnt_parameters(spec, training)
    adapters = Term(name="adapters", bytes=changed if training.adapts else 0, formula=f"{changed // 4} x 4 B")
    held, layer = _one_layer(spec, training) if streamed else _whole(spec)
    matrix = max(linear.in_features * linear.out_features for linear in spec.linears)
    outside = spec.vocab_size * spec.hidden_size
    moments = _pass(planned, training, [*_as_trained(spec, training), adapters], [], kept)
    if not keeps_original(training):
        file = spec.stored_bytes if STORED_BYTES.get(spec.dtype, 4) != 4 else 0
        learnt = 0 if training.adapts else changed
        reading = Term(name="weight file", bytes=0 if streamed else max(file, learnt), formula="read beside it")
        moments += [[*held, adapters, reading, _tables(planned, training, kept + 1)]]
        moments += _pass(planned, training, [*held, adapters], layer, kept + 1)
    last = max(kept, 1)
    moments += _pass(planned, training, held, layer, last, rounded=matrix if streamed else 0)
    return [*moments, [*held, _rounding(outside), _tables(planned, training, last)]]


def keeps_original(training: Training) -> bool:
    """Whether training held the original weights, unrounded: then nothing lies between them and what trained."""
    return training.base_precision != "nf4" and training.compute_dtype == "fp32"


def scored_again(training: Training, rows: int) -> int:
    """How many of the rows that training scored the model as trained is scored on again.

    What is missing of unrounded weights moves every row: some tell. Beside rounded ones all: half a layer's change,
    most of it below a step of NF4, moved one row.
    """
    return min(rows, PARITY_PROMPTS) if keeps_original(training) else rows


def _pass(
    planned: Planned, training: Training, held: list[Term], layer: list[Term], forms: int, rounded: int = 0
) -> list[list[Term]]:
    """The moments of one pass over the rows beside the tables of `forms` others: in a layer, at the head, at its end.

    Its own table grows with each group of rows, and is there twice while its parts are joined. Of a matrix that is
    rounded whenever a layer is read `rounded` weights.
    """
    spec, longest = planned.spec, planned.work.longest
    every, positions = longest * min(PARITY_PROMPTS, training.eval_rows), min(POSITIONS, longest)
    tokens = max(longest, min(EVAL_TOKENS, every))
    widest = max(linear.in_features for linear in spec.linears)
    activations = 4 * tokens * (3 * widest + 4 * spec.hidden_size)
    logits = 4 * LOGIT_FORMS * spec.vocab_size * positions
    before = _tables(planned, training, forms + 1 - tokens / max(tokens, every))
    return [
        [*held, *layer, Term(name="activations", bytes=activations, formula=f"fp32, {tokens} tokens"), before],
        [*held, *layer, _rounding(rounded), before],
        [*held, Term(name="logits", bytes=logits, formula=f"{LOGIT_FORMS} x {positions} x {spec.vocab_size} x 4 B"),
         _tables(planned, training, forms + 1)],
        [*held, _tables(planned, training, forms + 2)],
    ]  # fmt: skip


def _rounding(elements: int) -> Term:
    count = min(BLOCK_BYTES, 4 * elements)
    return Term(name="rounding", bytes=int(ROUNDING_BLOCKS * count), formula=f"{ROUNDING_BLOCKS} forms of {count} B")


def _whole(spec: ModelSpec) -> tuple[list[Term], list[Term]]:
    """(what is held of a whole model, what a layer takes beyond that)."""
    return [Term(name="model", bytes=4 * spec.total_parameters, formula=f"{spec.total_parameters} x 4 B")], []


def _as_trained(spec: ModelSpec, training: Training) -> list[Term]:
    """The base as a run held it, computing on a CPU: 4 bits, or pages of its file where nothing is cast."""
    nf4, training = training.base_precision == "nf4", uncut(training)
    if training.device == "cuda":
        if not nf4:  # a layer at a time, each rounded as it was
            return []
        training = training.model_copy(update={"compute_dtype": "fp32", "device": "cpu"})
    held = train_step.weight_bytes(spec, training)
    beside = training.stream_layers and training.densely  # layers in fp32
    if not nf4 and not beside and stored_as(training) == spec.dtype:
        return [Term(name="weight file", bytes=held, formula=f"pages of the file, {spec.dtype}")]
    largest = max(linear.in_features * linear.out_features for linear in spec.linears)
    one = largest * DTYPE_BYTES[training.compute_dtype] if nf4 else 0
    more = train_step.worst_dense_bytes(spec, training) + window_bytes(spec, training)
    return [
        Term(name="model", bytes=held + more, formula=f"{spec.total_parameters} in {training.base_precision}"),
        Term(name="one matrix", bytes=one, formula=f"{largest} out of its 4 bits"),
    ]


def _one_layer(spec: ModelSpec, training: Training) -> tuple[list[Term], list[Term]]:
    """(what is held of a model whose layers stay in their files: its head; what a layer takes while it computes)."""
    outside, layer = spec.vocab_size * spec.hidden_size, linear_weights(spec) // spec.num_hidden_layers
    learnt = 0 if training.adapts else max(each.in_features * each.out_features for each in spec.linears)
    if learnt and training.embedding != "off":
        learnt = max(learnt, outside)
    return [file_term(spec), Term(name="head", bytes=4 * outside, formula=f"{outside} x 4 B")], [
        Term(name="one layer", bytes=4 * layer, formula=f"{layer} x 4 B"),
        Term(name="learnt tensor", bytes=4 * learnt, formula=f"{learnt} x 4 B, read beside it"),
    ]


def _bundle(planned: Planned, training: Training, target: Target) -> list[Term]:
    """The bundle in its runtime, and the tables of two forms of the model beside its own."""
    spec, work, runtime = planned.spec, planned.work, runtime_of(target)
    context = min(work.longest + work.longest_trained + 1, target.context_tokens)
    found = predict(spec, target, bundle_weights(spec, target), context, before=training.prefix_tokens)
    logits = 0
    if runtime.widened_proof:
        a_pass = min(runner_module().PREFILL_TOKENS, context)
        logits = 4 * spec.vocab_size * (2 * a_pass - 1)
    return [
        Term(name="bundle", bytes=found.memory_bytes - runtime.process_bytes,
             formula=f"weights, cache of {context} tokens and graph in their runtime"),
        Term(name="logits", bytes=logits, formula="of a pass, in the runtime and out of it"),
        _tables(planned, training, 4),
    ]  # fmt: skip


def _measuring(planned: Planned, training: Training, target: Target) -> list[Term]:
    """The finished bundle in a process of its own, which measures its speed and that of the memory."""
    spec = planned.spec
    found = predict(spec, target, bundle_weights(spec, target), BENCH_TOKENS, before=training.prefix_tokens)
    threads = planned.profile.cores or 1
    return [
        Term(name="bundle", bytes=found.memory_bytes, formula=f"run.py --bench, {BENCH_TOKENS} tokens"),
        Term(name="bandwidth", bytes=threads * BENCH_BYTES, formula=f"{threads} threads read 64 MiB each"),
    ]


def _both_caches(planned: Planned, training: Training, target: Target) -> list[Term]:
    """A KV cache of 8 bits beside the full one, with all of the context: the bundle twice.

    Of one pass, four forms of logits in each of the two.
    """
    spec = planned.spec
    context = min(target.context_tokens, spec.max_position_embeddings or target.context_tokens)
    weights, logits = bundle_weights(spec, target), 8 * 4 * spec.vocab_size * runner_module().PREFILL_TOKENS
    forms = (target, target.model_copy(update={"kv_bits": None}))
    process = runtime_of(target).process_bytes
    twice = sum(predict(spec, each, weights, context).memory_bytes - process for each in forms)
    return [
        Term(name="both caches", bytes=twice + logits, formula=f"the bundle twice, {context} tokens, logits of a pass"),
        _tables(planned, training, 2),
    ]
