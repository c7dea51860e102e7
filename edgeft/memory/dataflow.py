"""What does each part of a model keep for the backward pass, and how high does it reach, forwards and backwards?

The parts are written after the model code of transformers, with its local names: what a name still refers to is alive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from edgeft.memory import prefixed
from edgeft.memory.adapters import AROUND
from edgeft.memory.operations import Gradients, Kept, Operations, Way
from edgeft.memory.rounded import rounded_table
from edgeft.memory.tape import Frame, Storage, Tape, Value, boundary
from edgeft.models.families import Role
from edgeft.models.spec import Linear, ModelSpec
from edgeft.settings.tuners import adapts

# no gradient is wanted; gradients pass, nothing trains; adapters compute and do not train now; it trains; what trained
# (or will) runs without autograd
Kind = Literal["idle", "through", "resting", "trained", "scored"]


@dataclass(frozen=True)
class LayerBytes:
    """A part's bytes: its highest moments, above what was alive before it, and what it leaves behind."""

    forward: tuple[complex, ...]
    body: tuple[complex, ...]  # those of them while the model's own code runs; the loss is outside of it
    kept_forward: complex  # while autocast's copies of weights live, which is until the loss is known
    kept: complex
    backward: tuple[complex, ...]  # above what was alive before its forward pass; its gradients are kept
    backward_again: tuple[complex, ...]  # in a later micro-batch: its gradients are added to those that are there
    gradients: complex
    keeps_input: bool
    tensors: int  # that it makes in a later micro-batch, forwards and backwards


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


def projections(spec: ModelSpec) -> dict[str, list[Linear]]:
    """A layer's projections by role; stand-ins of its widths where they are neither a Llama's nor fused (experts)."""
    found = {role: [linear for linear in spec.linears if linear.role == role] for role in (
        "attention_in", "attention_out", "mlp_in", "mlp_out")}  # fmt: skip
    h, i, query = spec.hidden_size, spec.intermediate_size, spec.num_attention_heads * spec.head_dim
    key = spec.num_key_value_heads * spec.head_dim

    def stand_ins(role: Role, *shapes: tuple[int, int]) -> list[Linear]:
        return [Linear(name=f"{role} {n}", in_features=a, out_features=b, has_bias=False, role=role)
                for n, (a, b) in enumerate(shapes)]  # fmt: skip

    if len(found["attention_in"]) not in (1, 3) or len(found["attention_out"]) != 1:
        found["attention_in"] = stand_ins("attention_in", (h, query), (h, key), (h, key))
        found["attention_out"] = stand_ins("attention_out", (query, h))
    if len(found["mlp_in"]) not in (1, 2) or len(found["mlp_out"]) != 1:
        found["mlp_in"] = stand_ins("mlp_in", (h, i), (h, i))
        found["mlp_out"] = stand_ins("mlp_out", (i, h))
    return found


class DecoderLayer(Operations):
    """One decoder layer."""

    def __init__(self, tape: Tape, spec: ModelSpec, way: Way, trained: bool, masked: bool) -> None:
        super().__init__(tape, spec, way, trained)
        self.masked, self.family = masked, spec.family
        self.roles = projections(spec)
        if adapts(way.tuner) and trained:  # a stand-in carries an adapter as what it stands for does
            self.targets = self.targets | {
                x.name for role in self.roles.values() for x in role if x not in spec.linears
            }

    def norm(self, x: Value, width: int, groups: int = 1) -> Value:
        if self.family.norm == "layer":
            return self.layer_norm(x, width)
        from_one = self.family.norm == "rms_from_one"
        return self.gemma_norm(x, width, groups) if from_one else self.rms_norm(x, width, groups)

    def attention(self, hidden: Value) -> tuple[Value, Value | None]:
        """(result, weights): the weights only where scores exist, held by the layer until it ends."""
        spec, family = self.spec, self.family
        if len(self.roles["attention_in"]) == 1:
            return self.fused_attention(hidden), None
        queries, keys = spec.num_attention_heads, spec.num_key_value_heads
        q_proj, k_proj, v_proj = self.roles["attention_in"]
        query = self.heads(self.project(hidden, q_proj))
        if family.scales_query:
            query = self.scaled(query)
        if spec.qk_norm and family.norm != "rms_from_one":
            query = self.norm(query, queries * spec.head_dim, queries)
        key = self.heads(self.project(hidden, k_proj))
        if spec.qk_norm and family.norm != "rms_from_one":
            key = self.norm(key, keys * spec.head_dim, keys)
        value = self.project(hidden, v_proj)
        if self.masked or spec.attn_logit_softcapping:
            value = self.heads(value)
        if spec.qk_norm and family.norm == "rms_from_one":
            query = self.norm(query, queries * spec.head_dim, queries)
            key = self.norm(key, keys * spec.head_dim, keys)
        if family.rotates:
            query, key = self.both_rotary(query, key)
        weights = None
        if spec.attn_logit_softcapping:
            result, weights = self.attend_eagerly(query, key, value)
        else:
            result = self.attended(query, key, value)
        result = self.project(result, self.roles["attention_out"][0])
        return result, weights

    def attended(self, query: Value, key: Value, value: Value) -> Value:
        """Attention by a kernel that keeps no scores, to what lies before the text too."""
        if self.way.past:
            return prefixed.attend(self, query, key, value, masked=self.masked)
        return self.attend(query, key, value, masked=self.masked)

    def heads(self, x: Value) -> Value:
        """A projection seen as heads; its gradient comes back transposed and is copied into rows of tokens."""
        return self.view(x, x.size) if self.family.rotates else x

    def both_rotary(self, query: Value, key: Value) -> tuple[Value, Value]:
        query_turned = self.rotary(query, query.size)
        key_turned = self.rotary(key, key.size)
        return query_turned, key_turned

    def fused_attention(self, hidden: Value) -> Value:
        """Query, key and value out of one projection: they are parts of its result, which lives as long as any."""
        spec = self.spec
        joint = self.project(hidden, self.roles["attention_in"][0])
        heads = (spec.num_attention_heads, spec.num_key_value_heads, spec.num_key_value_heads)
        total, sizes = joint.size, [joint.size * count / sum(heads) for count in heads]
        if self.family.fused_as != "views":
            if self.family.fused_as == "heads":
                joint = self.view(joint, total)  # head by head
            query, key, value = self.parts(joint, total, sizes[0], 3)
        else:
            query, key, value = (self.view(joint, total, size) for size in sizes)
            query, key = self.view(query, sizes[0]), self.view(key, sizes[1])
        if not self.family.rotates:
            result = self.attended(query, key, value)
        else:
            query, key = self.partly_rotary(query), self.partly_rotary(key)
            result = self.attended(query, key, value)
            if (
                self.way.flash and not self.way.past
            ):  # it lies head by head, as the parts did, and is copied token by token
                result = self.one(result, result.size, None)
        result = self.project(result, self.roles["attention_out"][0])
        return result

    def partly_rotary(self, x: Value) -> Value:
        """The first part of each head turned, and joined to the rest: a new tensor also where there is no rest."""
        share = self.family.rotary_share
        turning = self.view(x, x.size, share * x.size) if share < 1 else x
        rest = self.view(x, x.size, (1 - share) * x.size)

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            return [own[0] if want else None for want in wanted]

        return self.tape.run(x.size, [self.rotary(turning, share * x.size), rest], [], back)

    def mlp(self, x: Value) -> Value:
        """The MLP with what lies beside it."""
        last = self.roles["mlp_out"][0]
        around = AROUND.get(self.way.operation) if last.name in self.targets else None
        result = self.inner_mlp(x)
        return self.add(result, around(self, x, last)) if around else result

    def inner_mlp(self, x: Value) -> Value:
        *gate_proj, up_proj = self.roles["mlp_in"]
        down_proj = self.roles["mlp_out"][0]
        if gate_proj:  # in one expression, as there: a name would hold on to the activation
            return self.project(
                self.multiply(self.activation(self.project(x, gate_proj[0])), self.project(x, up_proj)), down_proj
            )
        hidden = self.project(x, up_proj)
        if self.spec.gated_mlp:
            gate, hidden = self.parts(hidden, hidden.size, hidden.size / 2, 2)
            hidden = self.multiply(hidden, self.activation(gate))
        else:
            hidden = self.activation(hidden)
        return self.project(hidden, down_proj)

    def residual(self, x: Value, added: Value) -> Value:
        if self.family.scales_residual:
            return self.add(x, self.scaled(added))
        return self.add(x, added)

    def __call__(self, hidden: Value) -> Value:
        width, four = self.spec.hidden_size, self.spec.norms_per_layer == 4
        if self.family.parallel:
            attended, _ = self.attention(self.norm(hidden, width))
            made = self.mlp(self.norm(hidden, width))
            return self.add(self.add(made, attended), hidden)
        residual = hidden
        hidden = self.norm(hidden, width)
        if self.family.keeps_names:
            attended, _ = self.attention(hidden)
            hidden = self.add(attended, residual)
            residual = hidden
            hidden = self.norm(hidden, width)
            made = self.mlp(hidden)
            return self.add(residual, made)
        hidden, _weights = self.attention(hidden)
        if four:
            hidden = self.norm(hidden, width)
        hidden = self.residual(residual, hidden)
        residual = hidden
        hidden = self.norm(hidden, width)
        if self.family.inline_mlp:  # no module of its own, whose caller would hold on to its input
            hidden = self.project(hidden, self.roles["mlp_in"][0])
            hidden = self.activation(hidden)
            hidden = self.project(hidden, self.roles["mlp_out"][0])
            return self.add(residual, hidden)
        hidden = self.mlp(hidden)
        if four:
            hidden = self.norm(hidden, width)
        return self.residual(residual, hidden)


class _Ends(DecoderLayer):
    """What follows the decoder layers: the final norm, the trained tokens' hidden states, the loss in chunks."""

    def __init__(
        self, tape: Tape, spec: ModelSpec, way: Way, norm: bool, trained_tokens: int, chunk_tokens: int
    ) -> None:
        super().__init__(tape, spec, way, False, False)
        self.full_vectors = norm
        self.trained_tokens, self.chunk_tokens = trained_tokens, chunk_tokens

    def select(self, hidden: Value) -> Value:
        """The hidden states whose next token is trained; on the way back they are put among zeros, by a copy."""
        size = hidden.size

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            zeros = Storage(tape, size)
            result = Storage(tape, size)
            del zeros
            return [result]

        return self.tape.run(1j * size * self.trained_tokens, [hidden], [], back)

    def loss(self, hidden: Value, head: Value | None) -> Value:
        """edgeft.models.loss: gradients are made chunk by chunk on the way forwards, and wait."""
        tape, spec = self.tape, self.spec
        rows = min(self.chunk_tokens, self.trained_tokens)
        table = rounded_table(self) if head is not None and self.way.head is not None else None
        waiting: list[Storage | None] = [Storage(tape, hidden.size) if hidden.node else None]
        if head is not None:
            waiting.append(Storage(tape, 1j * self.e * spec.embedding_parameters))
        if hidden.node or head is not None:
            words = spec.vocab_size * rows
            logits = Storage(tape, 1j * self.e * words)
            if self.half:
                logits = Storage(tape, 4j * words)
            slope = None
            if spec.final_logit_softcapping:
                divided = Storage(tape, 4j * words)
                slope = Storage(tape, 4j * words)
                del divided
                slope = Storage(tape, 4j * words)
            columns = [Storage(tape, 4j * rows) for _ in range(6)]
            if self.half:
                gradient = Storage(tape, 2j * words)
                del gradient
            del logits, columns, slope
        del table

        def back(tape: Tape, kept: Kept, own: Kept, wanted: list[bool]) -> Gradients:
            results = list(waiting)
            waiting.clear()
            return results

        return tape.run(4j, [hidden] if head is None else [hidden, head], [], back)


def highest(heights: list[complex]) -> tuple[complex, ...]:
    """Of sizes a + b T, those that are the largest for some number of tokens T."""
    kept: list[complex] = []
    for size in sorted(set(heights), key=lambda size: (-size.imag, -size.real)):
        if not kept or size.real > kept[-1].real:
            kept.append(size)
    return tuple(kept)


def stream_bytes(spec: ModelSpec, way: Way) -> int:
    """Bytes per token of what goes from layer to layer.

    On CUDA in half precision a LayerNorm gives fp32, bitsandbytes' layers give back what they were given, and so the
    stream is fp32 from the first layer on.
    """
    wide = way.nf4 and way.cuda and spec.family.norm == "layer"
    return (4 if wide else way.itemsize) * spec.hidden_size


def is_masked(spec: ModelSpec, layer: int, longest: int) -> bool:
    """Whether a layer sees only a window of the longest samples: it needs a mask that says so."""
    every = spec.family.window_every
    if every is None or (spec.sliding_window or longest + 1) > longest:
        return False
    return not every or (layer + 1) % every != 0


def mask_bytes(spec: ModelSpec, way: Way, tokens: int) -> int:
    """Masks that live as long as the step: two of numbers where scores are computed, one of booleans for a window."""
    if spec.attn_logit_softcapping:
        return 2 * way.itemsize * way.longest * tokens
    return way.longest**2


@lru_cache(maxsize=512)
def layer_bytes(spec: ModelSpec, way: Way, kind: Kind, wants: bool, masked: bool, recomputed: bool) -> LayerBytes:
    """The bytes of one decoder layer; `wants` says whether its input wants a gradient."""
    size = stream_bytes(spec, way)

    def run(tape: Tape, x: list[Value]) -> Value:
        adapted = kind in ("trained", "resting", "scored")
        layer = DecoderLayer(tape, spec, way, adapted, masked and not spec.attn_logit_softcapping)
        layer.frozen, layer.rests = kind in ("scored", "resting"), kind == "resting"
        if recomputed and (wants or kind == "trained"):
            tape.frame = Frame(lambda value=x[0]: layer(value))  # type: ignore[misc]
        result = layer(x[0])
        tape.frame = None
        return result

    return _bytes_of(run, size, size, wants)


@lru_cache(maxsize=512)
def ends_bytes(
    spec: ModelSpec, way: Way, wants: bool, norm: bool, head: bool, tied: bool, trained_tokens: int, chunk_tokens: int
) -> LayerBytes:
    """The bytes of what follows the layers, where the norm's and the head's weights train or do not.

    A tied head's gradient waits for the embedding's; it is not among the gradients.
    """

    def run(tape: Tape, x: list[Value]) -> Value:
        ends = _Ends(tape, spec, way, norm, trained_tokens, chunk_tokens)
        hidden = ends.norm(x[0], spec.hidden_size)
        x.clear()
        tape.body = len(tape.heights)
        hidden = ends.select(hidden)
        if ends.widens and spec.family.norm == "layer":
            hidden = ends.narrowed(hidden)
        weight = None
        if head:
            weight = ends.weight(0)
            if tied:
                weight.node, tape.waiting = boundary()
        return ends.loss(hidden, weight)

    return _bytes_of(run, stream_bytes(spec, way), 4j, wants)


def _bytes_of(run: Callable[[Tape, list[Value]], Value], entry: complex, result: complex, wants: bool) -> LayerBytes:
    """Run a part of the model forwards and backwards, once with its gradients kept and once without."""
    found = []
    for keeps_gradients in (True, False):
        tape = Tape(keeps_gradients=keeps_gradients)
        node, _ = boundary()
        x = [Value(Storage(tape, entry, silently=True), entry, node if wants else None)]
        out = [run(tape, x)]
        held = tape.live
        x.clear()
        forward, kept_forward = tape.heights, tape.live - result
        tape.heights = []
        tape.casts.clear()
        kept = tape.live - result
        if out[0].node is not None:
            out[0].storage = Storage(tape, result, silently=True)
            tape.backward(out, [out[0].storage])
        found.append((forward, kept_forward, kept, tape.heights, sum(g.size for g in tape.gradients), tape.made))
    (forward, kept_forward, kept, backward, gradients, _), (_, _, _, again, _, made) = found
    return LayerBytes(
        highest(forward), highest(forward[: tape.body]), kept_forward, kept, highest(backward), highest(again),
        complex(gradients), kept_forward + result == held, made,
    )  # fmt: skip
