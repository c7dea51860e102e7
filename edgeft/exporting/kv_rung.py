"""Does a KV cache of 8 bits hold what its runtime puts into it, and what does it cost where rows are long?

Both questions are put to the same bundle with its runtime's own cache, over the same weights:

    scales  against runtime      the scale of each channel, and what that channel really reaches on the same rows
    cache   against full cache   every position of rows as long as half of the context, and all of it

The scales were found in torch (kv_scales.py); what a channel reaches here is read out of the runtime's cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy
import torch

from edgeft.data.samples import Sample
from edgeft.errors import BadInput
from edgeft.exporting.kv_scales import rows_for_scales
from edgeft.models.intervals import paired_losses
from edgeft.models.metrics import Difference, Rung
from edgeft.models.spec import ModelSpec
from edgeft.targets.kv_cache import CODES, CacheScales, longest_pairs, rotary_channels, stored_scales
from edgeft.targets.onnx_file import MODEL, read_graph
from edgeft.targets.target import Target, Tolerance

TIE_NATS = 0.1  # two tokens whose log-probabilities differ by less are a tie
# A scale may be so many times what the runtime's own keys and values ask for. Activations of 8 bits move what a channel
# reaches by up to 10% (ort-int4 of a real 135M model), a scale of another layer is up to 1.6 times its own.
NEAR = 1.25
LONG_TOKENS = 8192  # of all long rows together; one of each length at least
SHOWN = 4


class Cached(Protocol):
    """What a runtime must offer of its cache."""

    folder: Path

    def cached(self, ids: list[int], layers: int) -> list[tuple[Any, Any]]: ...
    def each_pass(self, ids: list[int]) -> Iterator[Any]: ...


class CacheRows(NamedTuple):
    """Rows as tokens: those that scales were found on, and long ones that nothing was found on."""

    tuned: list[list[int]]
    long: list[list[int]]


def long_rows(rows: Sequence[Sample], context_tokens: int) -> list[list[int]]:
    """Rows of half and of all the context, made of whole rows one behind the other, each from another one on."""
    made = []
    for length in (max(2, context_tokens // 2), context_tokens):
        count = max(1, min(8, LONG_TOKENS // 2 // length))
        for number in range(count):
            first = (2 * number + (length == context_tokens)) * len(rows) // (2 * count)
            again = chain.from_iterable(chain(rows[first:], rows[:first]) for _ in range(length))
            made.append(list(islice(chain.from_iterable(each.ids for each in again), length)))
    return made


def cache_rows(
    target: Target, tuning: Callable[[], Sequence[Sample]], spec: ModelSpec, rows: Sequence[Sample], context_tokens: int
) -> CacheRows | None:
    """What a KV cache of 8 bits is proven on, `tuning` being what its scales were found on; None for another target."""
    if target.kv_bits != 8:
        return None
    tuned = rows_for_scales(tuning(), spec) if target.has_cache_scales else []
    return CacheRows([each.ids for each in tuned], long_rows(rows, context_tokens))


def scales_rung(full: Cached, scales: CacheScales, rows: Sequence[list[int]]) -> Rung:
    """The rung between a bundle's scales and what its runtime keeps of the same rows in fp32."""
    reach = reached(full, rows, len(scales.keys))
    problems, worst = list[str](), 1.0
    for what, own, seen in (("key", scales.keys, reach.keys), ("value", scales.values, reach.values)):
        for layer, (each, wanted) in enumerate(zip(own, seen, strict=True)):
            off, problem = _off(each, wanted)
            worst = max(worst, off)
            problems += [f"layer {layer}: {problem.format(what)}"] if problem else []
    count, tokens = sum(len(each) for each in (*scales.keys, *scales.values)), sum(map(len, rows))
    return Rung(
        name="scales", against="runtime", compared=f"{count} scales, {tokens} tokens of the training data",
        tolerance=f"within {NEAR:g} times; {worst:.3g} found", tensors=2 * len(scales.keys),
        problems=(*problems[:SHOWN], *([f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])),
    )  # fmt: skip


def reached(full: Cached, rows: Sequence[list[int]], layers: int) -> CacheScales:
    """What each channel may reach of what a runtime keeps of some rows in fp32, as scales would have it times CODES."""
    graph, found = read_graph(full.folder).graph, list[list[Any]]()
    for ids in rows:
        kept = full.cached(ids, layers)
        rotary = rotary_channels(graph, kept[0][0].shape[-1])
        keys = [longest_pairs(each.transpose(1, 0, 2), rotary) for each, _ in kept]
        values = [numpy.abs(each).max(axis=1).reshape(-1) for _, each in kept]
        found.append([*keys, *values])
    most = [numpy.maximum.reduce(each) for each in zip(*found, strict=True)]
    return CacheScales(most[:layers], most[layers:])


def _off(own: Any, wanted: Any) -> tuple[float, str]:
    """(by how many times the worst of a layer's scales is another than wanted, what is wrong with them or nothing)."""
    used = numpy.flatnonzero(wanted > 0)
    times = own[used] * CODES / wanted[used]
    off = numpy.maximum(times, 1 / times)
    wrong = ~(off <= NEAR)
    worst = float(off.max(initial=1.0))
    if not wrong.any():
        return worst, ""
    at = used[numpy.where(wrong, off, 0).argmax()]
    problem = f"{wrong.sum()} {{}} channels have another scale, channel {at} one of {own[at]:.3g}"
    return worst, f"{problem} where {wanted[at] / CODES:.3g} holds all that the runtime keeps"


class Seen:
    """Two forms of a bundle over long rows: losses of each pass, and sums over positions."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.tokens: list[int] = []  # that each pass predicts
        self.before: list[float] = []
        self.after: list[float] = []
        self.kl = self.same = self.ties = 0.0

    def row(self, full: Cached, made: Cached, ids: list[int]) -> None:
        """One more row, pass by pass: of one pass alone the logits are held."""
        first = 0
        self.rows.append(len(ids))
        for one, other in zip(full.each_pass(ids), made.each_pass(ids), strict=True):
            p, q = (torch.log_softmax(torch.from_numpy(numpy.asarray(each)).float(), -1) for each in (one, other))
            following = torch.tensor(ids[first + 1 : first + 1 + len(p)], dtype=torch.long)[:, None]
            for form, losses in ((p, self.before), (q, self.after)):
                losses.append(-float(form[: len(following)].gather(1, following).sum()))
            self.tokens.append(len(following))
            self._positions(p, q)
            first += len(p)

    def _positions(self, p: torch.Tensor, q: torch.Tensor) -> None:
        top = q.argmax(dim=-1, keepdim=True)
        self.kl += float((p.exp() * (p - q)).sum())
        self.same += int((p.argmax(dim=-1) == top[:, 0]).sum())
        self.ties += int((p.amax(dim=-1) - p.gather(1, top)[:, 0] <= TIE_NATS).sum())

    @property
    def lengths(self) -> str:
        """`4 of 2048 and 2 of 4096 tokens`."""
        counts = Counter(self.rows)
        return " and ".join(f"{counts[length]} of {length}" for length in sorted(counts)) + " tokens"


def cache_rung(full: Cached, made: Cached, rows: Sequence[list[int]], tolerance: Tolerance) -> Rung:
    """The rung between a bundle with its runtime's own cache and the bundle as it is, at all positions of long rows.

    The interval of the loss is over passes: a row is made of many texts, and a pass of some.
    """
    seen = Seen()
    for ids in rows:
        seen.row(full, made, ids)
    positions = sum(seen.rows)
    before, after = (sum(losses) / sum(seen.tokens) for losses in (seen.before, seen.after))
    kl, same, or_tie = (each / positions for each in (seen.kl, seen.same, seen.ties))
    checks = (
        (
            or_tie < tolerance.min_top1_agreement,
            f"top-1 agreement {or_tie:.4f} ({same:.4f} without ties), at least {tolerance.min_top1_agreement}",
        ),
        (not kl <= tolerance.max_mean_kl_nats, f"mean KL {kl:.2e} nats, at most {tolerance.max_mean_kl_nats:.0e}"),
        (
            not after - before <= tolerance.max_loss_increase_nats,
            f"loss {before:.4f} to {after:.4f} nats, at most {tolerance.max_loss_increase_nats:g} more",
        ),
    )
    return Rung(
        name="cache", against="full cache", compared=f"rows: {seen.lengths}; {positions} positions",
        tolerance=f"KL {tolerance.max_mean_kl_nats:g}, loss at most {tolerance.max_loss_increase_nats:g} nats more",
        top1_agreement=same, top1_or_tie=or_tie, mean_kl_nats=kl, loss=after, loss_before=before,
        loss_change=Difference.of(paired_losses(seen.before, seen.after, seen.tokens)),
        problems=tuple(text for failed, text in checks if failed),
    )  # fmt: skip


def cache_rungs(full: Cached, made: Cached, rows: CacheRows, tolerance: Tolerance) -> Iterator[Rung]:
    """Both rungs; that of scales where the runtime has them in its graph."""
    if (full.folder / MODEL).is_file():
        scales = stored_scales(full.folder)
        if scales is None:
            raise BadInput(full.folder / MODEL, "keeps no keys and values of 8 bits", "export again")
        yield scales_rung(full, scales, rows.tuned)
    yield cache_rung(full, made, rows.long, tolerance)
