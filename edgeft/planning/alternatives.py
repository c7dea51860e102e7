"""Why this plan? What was given up, what each choice saves, what the alternatives cost, and what would fit if not."""

from __future__ import annotations

from collections.abc import Iterable

from edgeft.documents import Strict
from edgeft.errors import DoesNotFit
from edgeft.memory import train_step
from edgeft.planning.costs import Candidate, Question
from edgeft.planning.evidence import REFERENCE, Measured, method_of, nearest, of_layers
from edgeft.settings.job import Training
from edgeft.settings.tuners import WEIGHTS
from edgeft.units import show_bytes, show_seconds


class Alternative(Strict):
    """The chosen way with one choice changed, and what that costs (positive) or gains (negative)."""

    setting: str
    value: str
    high_bytes: int
    more_bytes: int
    more_seconds_per_step: float
    more_quality_cost: float
    fits: bool


class Saving(Strict):
    """What one memory-saving choice of the plan takes off its peak: the peak without it, less the plan's."""

    choice: str
    instead_of: str
    bytes: int


NOTHING_GIVEN_UP = "with nothing given up the fastest way"
CHOICES = ("tuner", "base_precision", "rank", "layers", "micro_batch_size", "checkpointing", "loss_chunk_tokens",
           "optimizer", "malloc", "stream_layers", "shard_base", "prefix_cache")  # fmt: skip


def describe(training: Training, name: str) -> str:
    """One choice of a plan in words."""
    if name == "layers":
        if training.layers == "lisa":
            return f"lisa, {training.active_layers} of {len(training.trained_layers)} at a time"
        return f"{training.layers}, {len(training.trained_layers)}"
    if name == "prefix_cache":
        return f"{training.cached_layers} layers" if training.cached_layers else "none"
    if name == "checkpointing" and training.kept_layers:
        return f"all but the top {training.kept_layers}"
    return str(getattr(training, name))


def alternatives(question: Question, chosen: Training, looked_at: Iterable[Training]) -> tuple[Alternative, ...]:
    """Every change of exactly one choice, once: of the ways that make it the one that the planner would choose."""
    quality, seconds = question.key(chosen)
    here = question.high_bytes(chosen)
    own = [(name, describe(chosen, name)) for name in CHOICES]
    near: list[tuple[Training, str]] = []
    for training in looked_at:
        changed = [name for name, value in own if describe(training, name) != value]
        if training.tuner != chosen.tuner:  # another tuner has no rank, or gets one
            changed = [name for name in changed if name not in ("rank", "base_precision")]
        if len(changed) == 1:
            near.append((training, changed[0]))
        if training.checkpointing and chosen.kept_layers:  # with as many layers kept, it recomputes as the chosen one
            changed = [name for name in changed if name != "checkpointing"]
            if len(changed) == 1:
                near.append((training.model_copy(update={"kept_layers": chosen.kept_layers}), changed[0]))
    found: dict[tuple[str, str], Alternative] = {}
    for training, name in near:
        high = question.high_bytes(training)
        other_quality, other_seconds = question.key(training)
        other = Alternative(
            setting=name, value=describe(training, name), high_bytes=high, more_bytes=high - here,
            more_seconds_per_step=round(other_seconds - seconds, 4),
            more_quality_cost=round(other_quality - quality, 3),
            fits=high <= question.budget_bytes and not question.too_slow(training),
        )  # fmt: skip
        old = found.setdefault((name, other.value), other)
        if _worth(other) < _worth(old):
            found[name, other.value] = other
    return tuple(sorted(found.values(), key=lambda a: (CHOICES.index(a.setting), a.high_bytes)))


def _worth(change: Alternative) -> tuple[bool, float, float, int]:
    """What decides between two ways of the same change: fitting, quality, time, memory."""
    return not change.fits, change.more_quality_cost, change.more_seconds_per_step, change.high_bytes


def frontier(question: Question, chosen: Training, looked_at: list[Training]) -> tuple[Candidate, ...]:
    """For each quality the smallest candidate, as far as no better one is as small; the chosen one is among them.

    `looked_at` is sorted best first.
    """
    smallest: dict[float, Training] = {}
    for training in looked_at:  # within a quality, the way that needs least memory is known without counting
        quality = round(question.key(training)[0], 6)
        old = smallest.get(quality)
        if old is None or _frugal(training) < _frugal(old):
            smallest[quality] = training
    rows, lowest = [], None
    for _, training in sorted(smallest.items()):
        row = question.candidate(training)
        if lowest is None or row.high_bytes < lowest:
            rows.append(row)
            lowest = row.high_bytes
    mine = question.candidate(chosen)
    return tuple(sorted({*rows, mine}, key=lambda row: (row.quality_cost, -row.high_bytes)))


def smallest(of_each_quality: Iterable[Candidate], chosen: Candidate) -> Candidate:
    """The way of at least the chosen one's quality that takes least memory."""
    as_good = [row for row in of_each_quality if row.quality_cost <= chosen.quality_cost + 1e-6]
    return min(as_good, key=lambda row: (row.high_bytes, row.seconds_per_step))


def _frugal(training: Training) -> tuple[int, int, int, int, bool, int]:
    return (
        training.micro_batch_size, -int(training.checkpointing), training.kept_layers, training.loss_chunk_tokens,
        training.malloc == "fast", -training.cached_layers,
    )  # fmt: skip


def savings(question: Question, chosen: Training) -> tuple[Saving, ...]:
    """What each memory-saving choice takes off the peak, largest first; choices that save nothing are left out."""
    spec, here = question.spec, question.high_bytes(chosen)
    count = spec.num_hidden_layers
    tokens = chosen.micro_batch_size * question.work.longest_trained
    half = chosen.compute_dtype
    ways: list[tuple[str, str, dict[str, object]]] = []
    if chosen.loss_chunk_tokens < tokens:
        ways.append((f"loss in chunks of {chosen.loss_chunk_tokens} tokens", f"logits of {tokens} tokens at once",
                     {"loss_chunk_tokens": tokens}))  # fmt: skip
    if chosen.checkpointing:
        ways.append(("activations recomputed", "activations kept", {"checkpointing": False, "kept_layers": 0}))
    if chosen.base_precision == "nf4":
        ways.append(("base weights in nf4", f"base weights in {half}", {"base_precision": half}))
    if chosen.malloc == "tight" and chosen.device == "cpu":
        ways.append(("freed memory returned at once", "kept for reuse (malloc=fast)", {"malloc": "fast"}))
    if chosen.optimizer != "adamw":
        ways.append((chosen.optimizer, "adamw with 32-bit states", {"optimizer": "adamw"}))
    if chosen.layers == "lisa" or len(chosen.trained_layers) < count:
        whole: dict[str, object] = {
            "layers": "all", "trained_layers": tuple(range(count)), "active_layers": 0, "cached_layers": 0,
        }  # fmt: skip
        if not chosen.adapts:
            whole |= {"embedding": "on", "norm": "on", "head": "on", "base_precision": "fp32"}
        ways.append((f"layers: {describe(chosen, 'layers')}", f"all {count} layers", whole))
    if chosen.stream_layers:
        ways.append(("layers read from their files", "all of them in memory", {"stream_layers": False}))
    if chosen.shard_base:
        ways.append(("a part of each layer in a process", "all of them in each", {"shard_base": False}))
    if chosen.cached_layers:
        ways.append((f"outputs of layers 0 to {chosen.cached_layers - 1} on disk", "those layers in memory",
                     {"cached_layers": 0}))  # fmt: skip
    if chosen.micro_batch_size < chosen.batch_size:
        ways.append((f"micro-batches of {chosen.micro_batch_size}", f"the whole batch of {chosen.batch_size} at once",
                     {"micro_batch_size": chosen.batch_size}))  # fmt: skip
    found = [
        Saving(choice=choice, instead_of=other, bytes=question.high_bytes(chosen.model_copy(update=update)) - here)
        for choice, other, update in ways
    ]
    return tuple(sorted((saving for saving in found if saving.bytes > 0), key=lambda saving: -saving.bytes))


def length_hints(question: Question, chosen: Training) -> list[str]:
    """What cutting the longest samples would save: offered, never done unasked."""
    lengths, longest = question.lengths, question.work.longest
    if lengths is None or not lengths.quantiles:
        return []
    here, lines = question.high_bytes(chosen), []
    for share in ("0.99", "0.95"):
        cut = lengths.quantiles[share]
        if cut > 0.8 * longest:
            continue
        work = train_step.Workload(cut, min(cut, question.work.longest_trained))
        saved = here - question.high_bytes(chosen.model_copy(update={"max_length": cut}), work)
        if saved > 0.03 * here:
            rows = round(lengths.rows * (1 - float(share)))
            lines.append(f"{rows} of {lengths.rows} samples have {cut} to {longest} tokens: cutting them "
                         f"(--set max_length={cut}) would save {show_bytes(saved)}")  # fmt: skip
    return lines


def unused_budget(question: Question, best: Training, chosen: Training, better: list[Training]) -> list[str]:
    """Why a plan leaves more than 15% of its budget unused; nothing when it does not."""
    high = question.high_bytes(chosen)
    if high >= 0.85 * question.budget_bytes:
        return []
    share = f"{100 * high / question.budget_bytes:.0f}% of the budget is used"
    if chosen == best:
        return [f"{share}: the best way that is known needs no more"]
    if fitting := [way for way in better if question.high_bytes(way) <= question.budget_bytes]:
        quickest = min(fitting, key=question.seconds)
        longer = question.seconds(quickest) / question.seconds(chosen)
        return [f"{share}: what fits and is better takes {longer:.1f} times as long{_asked_by(quickest, chosen)}"]
    next_up = min(better, key=question.high_bytes)
    return [f"{share}: the next better way needs {show_bytes(question.high_bytes(next_up))}"]


def _asked_by(way: Training, chosen: Training) -> str:
    """The settings that ask for a way, as far as it differs from the chosen one in what decides quality or memory."""
    differing = [name for name in ("tuner", "base_precision", "rank", "layers", "stream_layers")
                 if getattr(way, name) != getattr(chosen, name)]  # fmt: skip
    said = " ".join(f"--set {name}={str(getattr(way, name)).lower()}" for name in differing)
    return f" ({said})" if said else ""


def gave_up(question: Question, best: Training, chosen: Training) -> list[str]:
    """One line for each thing the budget took from the best candidate, worst first."""
    spec, method = question.spec, method_of(chosen)
    near, lines = (question.rows, spec.total_parameters), []
    if chosen.tuner != best.tuner:
        lines.append("LoRA instead of full fine-tuning" + _cited(nearest(f"{WEIGHTS}, all", REFERENCE, *near)))
    if chosen.base_precision != best.base_precision:
        lines.append(f"base weights in {chosen.base_precision} instead of {best.base_precision}")
    if chosen.layers == "lisa" != best.layers:
        measured = _cited(of_layers(method, "lisa", *near))
        lines.append(f"LISA: {chosen.active_layers} of {len(chosen.trained_layers)} layers train at a time{measured}")
    elif len(chosen.trained_layers) != len(best.trained_layers):
        measured = _cited(of_layers(method, "sparse", *near))
        lines.append(f"{len(chosen.trained_layers)} of {spec.num_hidden_layers} layers train{measured}")
    if chosen.rank != best.rank and best.rank:
        lines.append(f"LoRA rank {chosen.rank} instead of {best.rank}")
    if chosen.optimizer != best.optimizer:
        lines.append(f"{chosen.optimizer} instead of {best.optimizer}")
    if chosen.checkpointing and not best.checkpointing:
        count = spec.num_hidden_layers
        where = f" in {count - chosen.kept_layers} of {count} layers" if chosen.kept_layers else ""
        kept = chosen.model_copy(update={"checkpointing": False, "kept_layers": 0})
        more = question.seconds(chosen) / question.seconds(kept) - 1
        lines.append(f"activations are computed twice (checkpointing){where}: {more:.0%} more time, same result")
    if chosen.micro_batch_size != best.micro_batch_size:
        lines.append(
            f"micro-batches of {chosen.micro_batch_size} instead of {best.micro_batch_size}: slower, same result"
        )
    if chosen.loss_chunk_tokens != best.loss_chunk_tokens:
        lines.append(
            f"loss in chunks of {chosen.loss_chunk_tokens} tokens instead of {best.loss_chunk_tokens}: same result"
        )
    if chosen.malloc != best.malloc:
        more = question.seconds(chosen) / question.seconds(chosen.model_copy(update={"malloc": best.malloc})) - 1
        lines.append(f"freed memory is returned at once (malloc=tight): {more:.0%} more time, same result")
    return [*lines, f"{NOTHING_GIVEN_UP} takes {show_bytes(question.high_bytes(best))}"] if lines else []


def _cited(measured: Measured | None) -> str:
    """What was measured of it, behind a line."""
    if measured is None:
        return ""
    kind = measured.comparison.way.partition(", ")[2]
    share = measured.study.shares.get(kind)
    of = f" of {round(share * measured.study.layers)} of {measured.study.layers} layers" if share else " of the latter"
    return f"; measured{of}: {measured.line}"


def does_not_fit(question: Question, looked_at: list[Training], change: str | None) -> DoesNotFit:
    """The error (exit 3): the smallest candidate, its size, and the cheapest change that would fit."""
    budget, quick = question.budget_bytes, [t for t in looked_at if not question.too_slow(t)]
    if not quick:
        fastest = min(looked_at, key=question.seconds)
        seconds = question.seconds(fastest) * fastest.steps
        problem = f"nothing ends within {show_seconds(question.job.max_seconds or 0)}: the fastest of {len(looked_at)} "
        problem += f"candidates takes about {show_seconds(seconds)} for {fastest.steps} steps"
        fits = int(fastest.steps * (question.job.max_seconds or 0) / seconds)
        return DoesNotFit("plan", problem, f"fewer steps would end in time: --set max_steps={max(1, fits)}")
    smallest = min(with_smallest_passes(quick), key=question.high_bytes)
    need = question.high_bytes(smallest)
    highest = max(question.phases(smallest), key=lambda phase: phase.high_bytes)
    terms = ", ".join(
        f"{term.name} {show_bytes(term.bytes)}" for term in sorted(highest.terms, key=lambda t: -t.bytes)[:3]
    )
    way = (
        f"{smallest.base_precision}, {'rank ' + str(smallest.rank) if smallest.rank else smallest.tuner}, "
        f"{smallest.active_layers or len(smallest.trained_layers)} layers, micro-batch {smallest.micro_batch_size}"
        f"{', layers in their files' if smallest.stream_layers else ''}"
    )
    problem = (
        f"nothing fits {show_bytes(budget)}: the smallest of {len(looked_at)} candidates ({way}) needs "
        f"{show_bytes(need)} in phase {highest.name} ({terms})"
    )
    hint = _shorter(question, quick) or change
    error = DoesNotFit(
        "plan",
        problem,
        hint
        or f"a budget of {show_bytes(need)} would do (now {show_bytes(budget)}{_budget_of(question)}), or a smaller "
        "model",
    )
    error.need_bytes = need
    return error


def _budget_of(question: Question) -> str:
    """Where a budget comes from, where nobody named one."""
    return "" if question.job.max_memory_bytes else f": {question.profile.budget_reason}"


def with_smallest_passes(looked_at: Iterable[Training]) -> list[Training]:
    """The ways of the smallest micro-batch and loss chunk, as larger ones need no less at any length.

    But where a micro-batch is all that a step has no gradients of others wait: those are there too.
    """
    ways = list(looked_at)
    batch, chunk = (min(getattr(way, name) for way in ways) for name in ("micro_batch_size", "loss_chunk_tokens"))
    return [
        way for way in ways
        if way.loss_chunk_tokens == chunk and (way.micro_batch_size == batch or way.micro_batch_size >= way.share)
    ]  # fmt: skip


def _shorter(question: Question, looked_at: list[Training]) -> str | None:
    """The longest samples that some candidate would fit with; None when none does at even 32 tokens.

    The candidate that is smallest at full length need not be at a shorter one: there other terms, the optimizer's
    states first, outweigh what grows with the length. So every candidate is asked at each length of the halving.
    """
    left = with_smallest_passes(looked_at)

    def fitting(length: int) -> list[Training]:
        work, cut = train_step.Workload(length, min(length, question.work.longest_trained)), {"max_length": length}
        return [t for t in left if question.high_bytes(t.model_copy(update=cut), work) <= question.budget_bytes]

    low, high = 32, question.work.longest
    if high <= low or not (left := fitting(low)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        found = fitting(middle)
        low, high, left = (middle, high, found) if found else (low, middle, left)
    longest = question.work.longest
    return f"samples of at most {low} tokens would fit: --set max_length={low} (the longest has {longest})"
