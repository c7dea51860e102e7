"""How many bytes does each phase of a run need at its highest moment? A closed form, microseconds per candidate.

Every coefficient was found by counting the live tensor bytes of edgeft's own training step (tests/test_memory.py counts
them again); none is fitted to a total. Symbols as in the field: h hidden, i intermediate, q and kv the widths of query
and key, V vocabulary, L layers, T tokens of one micro-batch, r rank, e bytes of the compute dtype.
"""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from edgeft.artifacts import Strict
from edgeft.model_spec import Linear, ModelSpec
from edgeft.settings import ENDS, Training
from edgeft.units import MIB

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # codes, 8-bit scales per 64 weights, fp32 scales of 256 scales
NF4_PER_LINEAR = 1024 + 64 + 4  # the two code books and the offset of one quantised matrix
ADAM8_BYTES = 2 * (1 + 4 / 256)  # two states of a byte, one fp32 scale per 256
PAGED_ELEMENTS = 100_000  # bitsandbytes pages the 8-bit states of tensors of at least this many elements, no others
CUDA_WORKSPACE_BYTES = 8_519_680  # cuBLAS, one handle and stream, inside PyTorch's allocator

# What a training process holds on a CPU beyond the tiny run's: the matrix library keeps buffers that grow with its
# products, the head's by 512 bytes per word of the vocabulary; scoring and reading data leave some of their own. Both
# numbers are fitted on the six jobs of bench/memory.py; live tensor bytes are not.
CPU_BUFFERS, CPU_BYTES_PER_WORD = 20_000_000, 512

# families whose decoder layer the closed form below describes term by term; others get the wider margin
EXACT_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "granite")


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
    if training.densely:  # the layers that train are fp32 matrices instead of codes
        each = quantised // spec.num_hidden_layers
        active = training.active_layers or len(training.trained_layers)
        codes += active * (each * (4 - NF4_BYTES) - NF4_PER_LINEAR * len(spec.linears))
    return int(dense * DTYPE_BYTES[training.compute_dtype] + codes)


def trained_parameters(spec: ModelSpec, training: Training) -> int:
    """Parameters that get a gradient: r * (in + out) per target and layer, or whole layers, or everything."""
    if training.tuner == "lora":
        per_layer = sum(
            training.rank * (linear.in_features + linear.out_features) for linear in targets(spec, training)
        )
        return per_layer * len(training.trained_layers)
    return sum(spec.layer_parameters[i] for i in training.trained_layers) + sum(
        size for end, size in end_parameters(spec).items() if getattr(training, end) == "on"
    )


def end_parameters(spec: ModelSpec) -> dict[str, int]:
    """Parameters outside the layers by unit: a tied head counts as the embedding's."""
    return {"embedding": spec.embedding_parameters, "norm": spec.other_parameters, "head": spec.head_parameters}


def worst_sets(spec: ModelSpec, training: Training) -> list[Training]:
    """The plan with each set of trained units that can need most at a time: itself, except under LISA.

    Memory grows with how low the lowest layer lies, and hardly depends on where the others are: the n lowest layers,
    and the lowest with the n - 1 topmost. An end that rotates takes the place of the layers that need least.
    """
    if training.layers != "lisa":
        return [training]
    pool, rotating = training.trained_layers, [end for end in ENDS if getattr(training, end) == "rotate"]
    found = []
    for ends in {(), *((end,) for end in rotating), tuple(rotating)}:
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


def optimizer_bytes(spec: ModelSpec, training: Training, trained: int) -> int:
    """AdamW keeps two states in the parameter's dtype; paged states live on the host, not here."""
    if training.optimizer == "adamw":
        return trained * 2 * trained_itemsize(training)
    return 0 if training.optimizer == "paged_adamw8bit" else int(trained * ADAM8_BYTES)


def trained_itemsize(training: Training) -> int:
    """Bytes of one trained parameter: adapters are fp32, fully trained weights have the base's dtype."""
    if training.tuner == "lora" or training.densely:
        return 4
    return DTYPE_BYTES[training.base_precision]


def saved_bytes(spec: ModelSpec, training: Training) -> float:
    """Activation bytes per token that one trained decoder layer keeps for the backward pass, recomputation aside.

    8h + 8: the fp32 inputs and inverse deviations of two norms; 2e(q + kv) + 4 heads: rotated query and key, value,
    attention output and its log-sum-exp; gate, up and their product. LoRA keeps each adapted input (once per shared
    input) and r per target; full fine-tuning keeps both norms' outputs before and after their weight.
    """
    e, h, i = DTYPE_BYTES[training.compute_dtype], spec.hidden_size, spec.intermediate_size
    query, key = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    saved = spec.norms_per_layer * (4.0 * h + 4) + 2 * e * (query + key) + 4 * spec.num_attention_heads
    saved += (3 if spec.gated_mlp else 2) * e * i
    if spec.qk_norm:
        saved += 4 * (query + key)
    if training.tuner == "lora":
        roles = {linear.role for linear in targets(spec, training)}
        saved += e * h * (("attention_in" in roles) + ("mlp_in" in roles)) + e * i * ("mlp_out" in roles)
        saved += e * training.rank * len(targets(spec, training))
    else:
        saved += 2 * e * h * spec.norms_per_layer + e * i + (e * (query + key) if spec.qk_norm else 0)
    return saved


def step_terms(spec: ModelSpec, training: Training, work: Workload) -> list[Term]:
    """What is alive at the highest moment of a training step, bytes of live tensors.

    The moments that can be highest: the loss, the backward pass of the final norm, of the topmost MLP, of the lowest
    layer when all gradients exist, and the end of the backward pass.
    """
    e, h, i = DTYPE_BYTES[training.compute_dtype], spec.hidden_size, spec.intermediate_size
    query, key = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    tokens = training.micro_batch_size * work.longest
    loss_tokens = training.micro_batch_size * work.longest_trained
    lowest = 0 if training.embedding == "on" else min(training.trained_layers, default=spec.num_hidden_layers)
    layers = spec.num_hidden_layers - lowest
    trained = trained_parameters(spec, training)
    trained_weights = trained * trained_itemsize(training)
    adapters = trained_weights if training.tuner == "lora" else 0
    copies = trained * e if adapters and e == 2 else 0  # autocast's casts of the fp32 adapters, kept like activations
    above = (len(training.trained_layers) - 1) / max(
        1, len(training.trained_layers)
    )  # share of layers done at the lowest one
    optimizer = optimizer_bytes(spec, training, trained)
    saved = saved_bytes(spec, training)
    through = saved if len(training.trained_layers) == layers else min(saved, frozen_bytes(spec, training))
    all_saved = len(training.trained_layers) * saved + (layers - len(training.trained_layers)) * through
    # nothing below the lowest trained layer wants a gradient: its first norm keeps no input
    unneeded = 0 if training.trains_ends else 4 * h + 4
    all_saved -= unneeded
    kept = e * h * layers if training.checkpointing else all_saved
    # bytes per token that one layer's backward pass holds beyond what it saved
    adapts_down = "mlp_out" in {target.role for target in targets(spec, training)}
    # a frozen down projection keeps no input, so its input's gradient comes on top of the two others
    mlp = e * h + 2 * e * i + (-e * training.rank if adapts_down else 0 if training.tuner == "full" else e * i)
    half = e == 2
    recomputed = max(
        (14 if half else 16) * h + 6 * e * i + 2 * e * (query + key),
        (32 * h if half else 28 * h + 8 * i) + 2 * e * (query + key),
    ) + 4 * spec.num_attention_heads + 8 + e * training.rank * len(targets(spec, training))  # fmt: skip
    layer_peak = recomputed if training.checkpointing else mlp
    low_layer = recomputed + e * h if training.checkpointing else saved - unneeded + mlp
    if training.base_precision == "nf4":  # one matrix at a time is dense again
        matrix = max(linear.in_features * linear.out_features for linear in spec.linears)
        dequantised = int(matrix * (e + 2 * 4 / 64))
    else:
        dequantised = 0
    # of the layer being worked on, the down projection's gradient is there when the MLP's activations are highest
    down = sum(t.parameters for t in spec.linears if t.role == "mlp_out") * e if training.tuner == "full" else 0
    ends = training.trains_ends
    head_gradient = e * spec.vocab_size * h if ends else 0
    chunk = min(training.loss_chunk_tokens, loss_tokens)
    logits = (4 if e == 4 else 6) * spec.vocab_size * chunk * (2 if spec.final_logit_softcapping else 1)
    loss = (4 * h + 4 + (2 * e * h if ends else 0)) * tokens + 2 * e * h * loss_tokens + logits + head_gradient
    inputs = 8 * tokens + 2 * e * spec.head_dim * work.longest + 24 * loss_tokens
    # a tied embedding's two gradients meet: the head's, the embedding's and their sum
    meeting = e * spec.vocab_size * h * (2 if spec.tie_word_embeddings else 0) if ends else 0
    moments = {
        "loss": (kept * tokens + copies, loss, 0),
        "final norm": (kept * tokens + copies, (24 * h + 4) * tokens + head_gradient, 0),
        "top layer": (kept * tokens + copies, layer_peak * tokens + head_gradient + down + dequantised, 0),
        "lowest MLP": (
            copies * (1 - above),
            low_layer * tokens + down + dequantised,
            trained_weights * above,
        ),
        "end of backward": (0, e * (4 * h + 4 * query) * tokens + meeting, trained_weights),
    }
    name, (activations, temporary, gradients) = max(moments.items(), key=lambda item: sum(item[1]))
    kept_formula = f"{kept:.0f} B x {tokens} tokens" + (
        f", {layers} layers recomputed" if training.checkpointing else ""
    )
    terms = [
        (
            "weights",
            weight_bytes(spec, training),
            f"{spec.total_parameters} parameters in {training.base_precision}",
        ),
        ("adapters", adapters, f"{trained} x {trained_itemsize(training)} B"),
        ("optimizer", optimizer, f"{trained} parameters, {training.optimizer}"),
        ("gradients", gradients, f"{trained} x {trained_itemsize(training)} B"),
        ("activations", activations, kept_formula if activations else "released"),
        (f"height: {name}", temporary, f"{tokens} tokens, {loss_tokens} trained, V = {spec.vocab_size}"),
        ("inputs", inputs, "ids, positions, rotary tables"),
    ]
    return [Term(name=n, bytes=int(b), formula=f) for n, b, f in terms if b]


def frozen_bytes(spec: ModelSpec, training: Training) -> float:
    """Activation bytes per token of a layer that gradients pass through although nothing in it trains."""
    nothing = training.model_copy(update={"tuner": "lora", "target_modules": (), "rank": 0})
    return saved_bytes(spec, nothing)


def forward_bytes(spec: ModelSpec, training: Training, tokens: int) -> int:
    """Highest temporary bytes of a forward pass without autograd: the MLP's three products, or attention's inputs."""
    e = DTYPE_BYTES[training.compute_dtype]
    query, key = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    mlp = 3 * e * spec.intermediate_size + 2 * e * spec.hidden_size
    attention = 3 * e * query + 4 * e * key + 2 * e * spec.hidden_size
    return int(tokens * max(mlp, attention, 4 * spec.hidden_size * 3))


def phases(
    spec: ModelSpec, training: Training, work: Workload, *, baseline_bytes: int, data_bytes: int = 0
) -> tuple[Phase, ...]:
    """Every phase of `train` with its terms; `baseline_bytes` is what the process holds before any model.

    On a CPU a phase's bytes are the process's RSS: baseline, data, tensors. On CUDA they are the allocator's: tensors
    and cuBLAS's workspace, fragmentation in the high estimate; the CUDA context is the profile's.
    """
    on_cpu = training.device == "cpu"
    process = Term(
        name="process",
        bytes=baseline_bytes + CPU_BUFFERS + CPU_BYTES_PER_WORD * spec.vocab_size,
        formula="Python, torch, transformers, one tiny step, the matrix library's buffers",
    )
    workspace = Term(name="cuBLAS workspace", bytes=CUDA_WORKSPACE_BYTES, formula="one handle and stream")
    fixed = [process if on_cpu else workspace]
    if data_bytes and on_cpu:
        fixed.append(Term(name="data", bytes=data_bytes, formula="samples as lists of ids"))
    weights = weight_bytes(spec, training)
    weights_term = Term(name="weights", bytes=weights, formula=f"{spec.total_parameters} in {training.base_precision}")
    stored = spec.total_parameters * STORED_BYTES.get(spec.dtype, 4) if training.base_precision != "nf4" else weights
    load = [*fixed, weights_term]
    if on_cpu:
        load.append(Term(name="weight file", bytes=stored, formula=f"pages of the file, {spec.dtype}"))
    key = spec.num_key_value_heads * spec.head_dim
    e = DTYPE_BYTES[training.compute_dtype]
    adapter = trained_parameters(spec, training) * 4 if training.tuner == "lora" else 0
    tokens = training.group_tokens
    kv = 2 * e * key * spec.num_hidden_layers * 2 * tokens
    logits = 4 * spec.vocab_size * min(training.loss_chunk_tokens, tokens)
    scoring = [
        *fixed,
        weights_term,
        Term(name="adapters", bytes=adapter, formula="kept while scoring"),
        Term(
            name="forward",
            bytes=forward_bytes(spec, training, tokens),
            formula=f"{tokens} tokens, no autograd",
        ),
        Term(name="key-value cache", bytes=kv, formula="two copies while it grows"),
        Term(
            name="logits", bytes=logits, formula=f"at most {training.loss_chunk_tokens} tokens, V = {spec.vocab_size}"
        ),
    ]
    sets = (step_terms(spec, worst, work) for worst in worst_sets(spec, training))
    step = [*fixed, *max(sets, key=lambda terms: sum(term.bytes for term in terms))]
    return (
        phase("load", load, spec, training),
        phase("evaluate", scoring, spec, training),
        phase("train", step, spec, training),
    )


def phase(name: str, terms: list[Term], spec: ModelSpec, training: Training) -> Phase:
    """A phase with its low and high estimate: 2% for families known term by term on a CPU, 5% on CUDA, 15% for others.

    CUDA's 5% is the fragmentation of expandable segments; families without a closed form are approximated by a Llama's.
    """
    expected = sum(term.bytes for term in terms)
    known = spec.model_type in EXACT_FAMILIES and spec.counted_from == "config"
    margin = 0.15 if not known else 0.02 if training.device == "cpu" else 0.05
    high = int(expected * (1 + margin)) + (8 * MIB if training.device == "cpu" else 0)
    return Phase(
        name=name,
        terms=tuple(terms),
        low_bytes=int(expected * (1 - margin)),
        expected_bytes=expected,
        high_bytes=high,
    )
