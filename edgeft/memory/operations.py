"""Which tensors does each operation of a decoder layer make, keep for the backward pass, and hold on the way back?

After the derivatives of PyTorch and the layers of PEFT and bitsandbytes, in their order: it decides what is alive
together. Widths are bytes per token unless they come with a 1j (see tape).
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeft.memory.adapters import FORMS
from edgeft.memory.rounded import rounded_product, rounds
from edgeft.memory.streamed import casts
from edgeft.memory.tape import Storage, Tape, Value, parameter
from edgeft.models.spec import Linear, ModelSpec
from edgeft.settings.attention import repeats_groups
from edgeft.settings.job import Training
from edgeft.settings.tuners import adapts
from edgeft.targets.kinds import Kind

Kept = list[Storage]
Gradients = list[Storage | None]


@dataclass(frozen=True)
class Way:
    """What of a plan decides a layer's operations. `longest` is set where scores or masks of S x S exist, else 0."""

    tuner: str
    operation: str
    rank: int
    targets: tuple[str, ...]
    itemsize: int
    nf4: bool  # or as those: made dense for every product
    densely: bool
    cuda: bool
    flash: bool  # the kernel of CUDA devices from compute capability 8.0 on, and of CPUs: knows grouped queries
    longest: int = 0
    # products that see their weight rounded, and a head that does; bytes of a weight as it is kept and as it is stored
    rounded: tuple[tuple[str, Kind], ...] = ()
    head: Kind | None = None
    held: int = 4
    stored: int = 4
    prefix_tokens: int = 0
    past: int = 0  # of the prefixes of `rows`, or of a micro-batch
    scale: int = 4  # bytes of one of a matrix that is made dense; none where it is cast

    @classmethod
    def of(cls, spec: ModelSpec, training: Training, longest: int, rows: int = 0) -> Way:
        squares = bool(spec.attn_logit_softcapping) or (spec.sliding_window or longest + 1) <= longest
        return cls(
            training.tuner, training.form.operation, training.rank, training.target_modules,
            4 if training.compute_dtype == "fp32" else 2,
            training.base_precision == "nf4" or casts(spec, training), training.densely, training.device == "cuda",
            not repeats_groups(training, spec.head_dim), longest if squares else 0, *rounds(spec, training),
            training.prefix_tokens, training.prefix_tokens * (rows or training.micro_batch_size),
            0 if casts(spec, training) else 4,
        )  # fmt: skip


class Operations:
    """The operations of one part of a model, on a tape."""

    def __init__(self, tape: Tape, spec: ModelSpec, way: Way, trained: bool) -> None:
        self.tape, self.spec, self.way, self.e, self.half = tape, spec, way, way.itemsize, way.itemsize == 2
        self.constant = Value(Storage(tape, 0, silently=True), 0)
        # CUDA's autocast computes some functions in fp32 that a CPU's leaves alone
        self.widens = self.half and way.cuda
        self.full = trained and not adapts(way.tuner)
        self.frozen = self.rests = False  # what trains is there and takes no gradient; rests: now, while others do
        # a dense layer of another precision's base trains its matrices alone under half-precision compute
        self.full_vectors = self.full and not (way.densely and self.half)
        self.targets = set(way.targets) if trained and adapts(way.tuner) else set()
        self.kinds = dict(way.rounded)

    # of any width

    def one(self, x: Value, size: complex, gradient: complex | None, *, saved: bool = False,
            saves_result: bool = False, saves_constant: bool = False, viewed: bool = False) -> Value:  # fmt: skip
        """An operation on one tensor; `gradient` is what its input's takes (None: it is the result's own).

        A constant (a frozen weight, a cosine) takes nothing, but asking for it is what starts a recomputation.
        """

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            return [own.pop() if gradient is None else Storage(tape, gradient, viewed=viewed)]

        kept = [x] if saved else [self.constant] if saves_constant else []
        return self.tape.run(size, [x], kept, back, saves_result=saves_result)

    def scaled(self, x: Value) -> Value:
        return self.one(x, x.size, x.size)

    def view(self, x: Value, gradient: complex, size: complex | None = None) -> Value:
        """All or a part of a tensor seen otherwise; on the way back its gradient becomes a tensor of `gradient`."""
        return self.parts(x, gradient, size)[0]

    def parts(self, x: Value, gradient: complex, size: complex | None = None, count: int = 1) -> list[Value]:
        """Several parts of a tensor whose gradients are joined on the way back."""

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            return [Storage(tape, gradient)]

        return self.tape.view(x, back, size, count=count)

    def add(self, a: Value, b: Value) -> Value:
        """a + b, in fp32 where one of them is."""
        size = max(a.size, b.size, key=abs)

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            return [(own[0] if each == size else Storage(tape, each)) if want else None
                    for each, want in zip(sizes, wanted, strict=True)]  # fmt: skip

        sizes = [a.size, b.size]
        return self.tape.run(size, [a, b], [], back)

    def multiply(self, a: Value, b: Value) -> Value:
        """a b, in fp32 where one of them is; each is kept for the other's gradient, where that is wanted."""
        first, second = a.size, b.size

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            other = Storage(tape, second) if wanted[1] else None
            return [Storage(tape, first) if wanted[0] else None, other]

        return self.tape.run(max(first, second, key=abs), [a, b], [x for x, y in ((a, b), (b, a)) if y.node], back)

    def power(self, x: Value) -> Value:
        size = x.size

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            return [[Storage(tape, size) for _ in range(3)][2]]  # the lower power, times its exponent, times own

        return self.tape.run(size, [x], [x], back)

    def widened(self, x: Value) -> Value:
        """In fp32 what is in half precision."""
        return self.one(x, 2 * x.size, x.size)

    def narrowed(self, x: Value) -> Value:
        """In half precision what is in fp32."""
        return self.one(x, x.size / 2, x.size)

    # projections

    def weight(self, elements: int, *, copied: bool = False) -> Value:
        """A trained weight; autocast keeps a half copy until it ends, or, of one that rests, while it is needed."""
        own = Value(Storage(self.tape, 0, silently=True), 0, None if self.frozen else parameter())
        if not copied or not self.half:
            return own
        copy = self.one(own, 2j * elements, 4j * elements)
        if not self.rests:
            self.tape.casts.append(copy.storage)
        return copy

    def matmul(self, x: Value, linear: Linear, weight: Value | None, bias: bool = False) -> Value:
        """x W^T + b; `weight` is None where it does not train."""
        e, inputs, outputs = self.e, linear.in_features, linear.out_features
        if self.half and x.size == 4 * inputs:  # an fp32 input, which autocast copies for each product
            x = self.narrowed(x)
        # the gradient of rows in batches is a view of a matrix; an MLP in the layer's own code has it flat
        viewed = not self.spec.family.inline_mlp or linear.role not in ("mlp_in", "mlp_out")
        if weight is None:
            return self.one(x, e * outputs, e * inputs, saves_constant=True, viewed=viewed)

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            into = Storage(tape, e * inputs, viewed=viewed) if wanted[0] and bias else None
            matrix = Storage(tape, 1j * e * inputs * outputs) if wanted[1] else None
            if wanted[0] and not bias:
                into = Storage(tape, e * inputs, viewed=viewed)
            kept.clear()
            return [into, matrix, *([Storage(tape, 1j * e * outputs)] if bias else [])]

        vectors = [self.weight(outputs)] if bias else []
        saved = [x] if weight.node or not x.node else []
        return self.tape.run(e * outputs, [x, weight, *vectors], [*saved, weight] if x.node else saved, back)

    def base(self, x: Value, linear: Linear) -> Value:
        """A frozen projection, dense or in 4 bits: those are dense again while they multiply."""
        e, elements = self.e, linear.in_features * linear.out_features
        if not self.way.nf4:
            return self.matmul(x, linear, None)
        dense, scales = 1j * e * elements, 1j * self.way.scale * -(-elements // 64)
        wide = self.half and x.size == 4 * linear.in_features
        x = self.narrowed(x) if wide else x

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            matrix = self.dense(tape, linear, e)
            into = Storage(tape, e * linear.in_features)
            del matrix
            return [into]

        result = self.tape.run(e * linear.out_features, [x], [], back, hidden=dense + scales)
        return self.widened(result) if wide else result  # bitsandbytes gives back the dtype that it was given

    def dense(self, tape: Tape, linear: Linear, itemsize: int) -> Storage | None:
        """A 4-bit weight made dense beside its unpacked scales, which go at once; nothing for a dense one."""
        if not self.way.nf4:
            return None
        elements = linear.in_features * linear.out_features
        scales = 1j * self.way.scale * -(-elements // 64)
        return [Storage(tape, size) for size in (scales, 1j * itemsize * elements)][1]

    def project(self, x: Value, linear: Linear) -> Value:
        """A projection as it trains: wholly, beside an adapter, or not at all."""
        if (self.full or linear.name in self.targets) and linear.name in self.kinds and not self.frozen:
            return rounded_product(self, x, linear, self.kinds[linear.name])
        if self.full:
            weight = self.weight(linear.in_features * linear.out_features, copied=self.way.densely)
            return self.matmul(x, linear, weight, linear.has_bias and self.full_vectors)
        if linear.name not in self.targets:
            return self.base(x, linear)
        return FORMS[self.way.operation](self, x, linear)

    # norms

    def rms_norm(self, x: Value, width: int, groups: int = 1) -> Value:
        """Llama's RMSNorm over `groups` parts of `width` elements: in fp32, the weight after the cast back."""
        wide = self.widened(x) if self.half else x
        variance = self.mean(self.power(wide), width, groups)
        wide = self.by_deviation(wide, self.inverse_root(variance, groups), width, groups)
        return self.weighted(self.narrowed(wide) if self.half else wide, self.e * width, width // groups)

    def gemma_norm(self, x: Value, width: int, groups: int = 1) -> Value:
        """Gemma's RMSNorm: one plus the weight, which is a tensor of its own, before the cast back."""
        output = self._gemma_normed(self.widened(x) if self.half else x, width, groups)
        output = self.weighted(output, 4 * width, width // groups, added=True)
        return self.narrowed(output) if self.half else output

    def _gemma_normed(self, wide: Value, width: int, groups: int) -> Value:
        raised = self.one(self.mean(self.power(wide), width, groups), 4 * groups, None)
        return self.by_deviation(wide, self._root(raised, groups), width, groups)

    def mean(self, x: Value, width: int, groups: int) -> Value:
        return self.one(x, 4 * groups, 4 * width)

    def inverse_root(self, variance: Value, groups: int) -> Value:
        return self._root(self.one(variance, 4 * groups, None), groups)

    def _root(self, x: Value, groups: int) -> Value:
        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            return [[Storage(tape, 4 * groups) for _ in range(3)][2]]

        return self.tape.run(4 * groups, [x], [], back, saves_result=True)

    def by_deviation(self, x: Value, deviation: Value, width: int, groups: int) -> Value:
        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            summed = Storage(tape, 4 * width)
            into = Storage(tape, 4 * width)
            kept.clear()
            total = Storage(tape, 4 * groups)
            del summed
            return [into, total]

        return self.tape.run(4 * width, [x, deviation], [x, deviation], back)

    def weighted(self, x: Value, size: float, elements: int, *, added: bool = False) -> Value:
        """x times a norm's weight, or one more than it."""
        weight = self.weight(0) if self.full_vectors else self.constant
        itemsize = 4 if added else self.e
        if added:
            if self.half:
                weight = self.one(weight, 4j * elements, 2j * elements)
            weight = self.one(weight, 4j * elements, None)

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            into = Storage(tape, size) if wanted[1] else None
            if not wanted[0]:
                return [None, into]
            summed = Storage(tape, size)
            kept.clear()
            total = Storage(tape, 1j * itemsize * elements)
            del summed
            return [total, into]

        saved = [x] if weight.node else []
        return self.tape.run(size, [weight, x], [*saved, weight] if x.node else saved, back)

    def layer_norm(self, x: Value, width: int) -> Value:
        """torch's LayerNorm, one operation; CUDA's autocast runs it on an fp32 copy and leaves its result in fp32."""
        if self.widens and x.size == self.e * width:
            x = self.widened(x)
        size, vectors = x.size, self.full_vectors

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            into = Storage(tape, size) if wanted[0] else None
            return [into, *[Storage(tape, 1j * size) for _ in wanted[1:]]]

        weights = [self.weight(width), self.weight(width)] if vectors else []
        return self.tape.run(size, [x, *weights], [x], back, beside=2 * (4 if self.widens else self.e))

    # activations

    def activation(self, x: Value) -> Value:
        if self.spec.hidden_act == "relu":
            return self.one(x, x.size, x.size, saves_result=True)
        if self.spec.hidden_act == "gelu_new":
            return self.gelu_new(x)
        return self.one(x, x.size, x.size, saved=True)

    def gelu_new(self, x: Value) -> Value:
        """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), term by term."""
        half = self.scaled(x)
        wide = self.widened(x) if self.widens and x.size != 4 * self.spec.intermediate_size else x
        size = wide.size
        # one expression, as there: a name would hold on to what it stands for
        return self.multiply(half, self.one(self.one(
            self.one(self.add(x, self.scaled(self.power(wide))), size, size),
            size, size, saves_result=True), size, None))  # fmt: skip

    # attention

    def rotary(self, x: Value, size: complex) -> Value:
        straight = self.one(x, size, size, saves_constant=True)
        return self.add(straight, self.one(self.rotated(x, size), size, size, saves_constant=True))

    def rotated(self, x: Value, size: complex) -> Value:
        """(-x2, x1) of the halves (x1, x2)."""

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            negated = Storage(tape, size / 2)
            second = Storage(tape, size)
            del negated
            first = Storage(tape, size)
            own.clear()
            del first  # added to the second in place
            return [second]

        negated = Storage(self.tape, size / 2)
        result = self.tape.run(size, [x], [], back)
        del negated
        return result

    def attend(self, query: Value, key: Value, value: Value, *, masked: bool = False) -> Value:
        """Attention by a kernel that keeps no scores: its result and the log-sum-exp of each head.

        Where a mask says what is seen, or the kernel does not know grouped queries, keys and values are repeated; a
        boolean mask becomes a number for each pair of tokens, in every layer.
        """
        queries, keys = self.spec.num_attention_heads, self.spec.num_key_value_heads
        if self.half and query.size == 4 * queries * self.spec.head_dim:  # autocast's copies
            query, key, value = self.narrowed(query), self.narrowed(key), self.narrowed(value)
        if queries > keys and (masked or not self.way.flash):
            key, value = self.repeated(key), self.repeated(value)
        sizes = [query.size, key.size, value.size]
        pairs = self.e * self.way.longest
        bias = [Value(Storage(self.tape, pairs), pairs)] if masked else []

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            return [Storage(tape, size, silently=n < 2) for n, size in enumerate(sizes)]

        saved = [query, key, value, *bias]
        return self.tape.run(sizes[0], [query, key, value], saved, back, saves_result=True, beside=4 * queries)

    def repeated(self, x: Value) -> Value:
        """Key or value heads, one for each query head; transformers needs no copy for that where there is only one."""
        spec, size = self.spec, x.size
        more = size * spec.num_attention_heads / spec.num_key_value_heads
        if spec.num_key_value_heads == 1 and self.way.flash:
            return self.view(x, size, more)
        return self.one(x, more, size)

    def attend_eagerly(self, query: Value, key: Value, value: Value) -> tuple[Value, Value]:
        """Attention by scores, which are capped: the result, and the weights that the model's code holds on to."""
        spec, e, longest = self.spec, self.e, self.way.longest
        size = e * spec.num_attention_heads * longest
        if spec.num_attention_heads > spec.num_key_value_heads:
            key, value = self.repeated(key), self.repeated(value)
        scores = self.scaled(self.scores(query, key, size))
        if spec.attn_logit_softcapping:
            scores = self.scaled(scores)
            scores = self.one(scores, size, size, saves_result=True)
            scores = self.scaled(scores)
        scores = self.one(scores, size, None)  # the mask
        if self.half:
            weights = self.one(self.softmax(self.widened(scores), 2 * size), size, 2 * size)
        else:
            weights = self.softmax(scores, size)
        del scores
        result = self.one(self.weighted_sum(weights, value, query.size), query.size, None)
        return result, weights

    def softmax(self, x: Value, size: float) -> Value:
        return self.one(x, size, size, saves_result=True)

    def scores(self, query: Value, key: Value, size: float) -> Value:
        return self.product(query, key, size)

    def weighted_sum(self, weights: Value, value: Value, size: complex) -> Value:
        return self.product(weights, value, size)

    def product(self, left: Value, right: Value, size: complex) -> Value:
        """A matrix product of two values, which keeps both; on the way back the right one's gradient is made first."""
        sizes = [left.size, right.size]

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            second = Storage(tape, sizes[1])
            return [Storage(tape, sizes[0]), second]

        return self.tape.run(size, [left, right], [left, right], back)
