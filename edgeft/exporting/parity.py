"""Is what runs on the device what was trained? A ladder; its first failing rung names the culprit.

It starts at the model that trained, in the precision in which it trained, which must give train.json's own score:

    trained   against train.json          the model as it was scored, loaded anew
    original  against trained             the same change on the original weights, where training held rounded ones
    merged    against W0 + a (Wft - W0)   every tensor of the checkpoint, by its bits
    stored    against merged              every matrix of the bundle, by its codes, where the rounding is known
    artifact  against rounded             the bundle in its runtime, and torch on the very weights that it holds
    labels    against rounded             its choice among labels, where answers are held to them
    scales    against runtime             those of a KV cache of 8 bits, where the target has one (kv_rung.py)
    cache     against full cache          the bundle, and the bundle with its runtime's own cache, on long rows
    artifact  against merged              what rounding costs, beside what the fine-tune gained

A rung that would compare a thing with itself is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from edgeft.data.dataset import Sample, TextTokenizer
from edgeft.data.grammar import HeldTo
from edgeft.errors import CacheLost, ParityFailed, QualityLost
from edgeft.exporting.artifact_answers import Artifact
from edgeft.exporting.drawn_rows import Drawing, both
from edgeft.exporting.form import Form, first, joined, with_more
from edgeft.exporting.kv_rung import TIE_NATS, CacheRows, cache_rungs
from edgeft.exporting.label_rung import label_rung, referee, rows_for
from edgeft.exporting.outputs import (
    Asked,
    load_as_trained,
    load_changed,
    observe_artifact,
    observe_model,
    observe_numbers,
    trained_settings,
)
from edgeft.exporting.stored_codes import stored_rung
from edgeft.exporting.trained_rung import rows_again, trained_rung
from edgeft.machines import meter
from edgeft.memory.proof import PASS_POSITIONS, keeps_original
from edgeft.memory.stages import PARITY_PROMPTS
from edgeft.models.checkpoint import load_plain, local_folder
from edgeft.models.intervals import paired_losses, paired_rates
from edgeft.models.metrics import Difference, Metrics, Rung, of_some_rows
from edgeft.models.streamed import Load
from edgeft.progress import Progress
from edgeft.targets.rounding import round_as_target
from edgeft.targets.target import Target, Tolerance
from edgeft.training.result import TrainResult

NOISE_NATS = 1e-5  # of a loss, by the order of fp32 sums
# The same change on weights that training held rounded. Measured on the example with NF4: KL 0.0045 nats, loss -0.002.
ORIGINAL = Tolerance(
    min_top1_agreement=0.9, max_mean_kl_nats=0.1, max_loss_increase_nats=0.05, max_gain_lost=0.1,
    max_exact_match_drop_points=100.0,
)  # fmt: skip
# Torch on the very weights that the bundle holds: activations of 8 bits and the order of sums are all that differs.
ALIKE = Tolerance(
    min_top1_agreement=0.98, max_mean_kl_nats=0.002, max_loss_increase_nats=0.01, max_gain_lost=0.01,
    max_exact_match_drop_points=100.0,
)  # fmt: skip
# the same weights in another order of operations: fp32 rounding only
SAME = Tolerance(
    min_top1_agreement=0.999, max_mean_kl_nats=1e-5, max_loss_increase_nats=1e-4, max_gain_lost=1.0,
    max_exact_match_drop_points=0.5,
)  # fmt: skip

# A cache of 8 bits beside the full one, in the same bundle: what attention reads differs by half a scale at most.
# SmolLM2-135M-Instruct in ort-int4: KL 0.0060 nats, 98.0% the same token or a tie, loss -0.007 (bench/kv_cache.py).
CACHE = Tolerance(
    min_top1_agreement=0.95, max_mean_kl_nats=0.02, max_loss_increase_nats=0.01, max_gain_lost=1.0,
    max_exact_match_drop_points=100.0,
)  # fmt: skip

HINTS = {
    "trained": "train again: what lies in train/ is not what was scored",
    "original": "4 or 16 bits hid weights that the fine-tune leans on: plan with --set base_precision=fp32",
    "merged": "run edgeft merge again; if that does not help, report this",
    "stored": "report this: the builder did not store what was merged",
    "rounded": "report this: the runtime does not compute what this model does",
    "labels": "report this: the runtime does not choose the label that this model does",
    "scales": "report this: the KV cache does not hold what the runtime puts into it",
    "cache": "8 bits are too few for this model's keys and values: export with --set kv_bits=32 (llama.cpp: 16)",
    "artifact": "quantisation loses too much: try --target ort-int8 or gguf-q8_0, or loosen [parity] in a target file",
}


@dataclass(frozen=True)
class Gain:
    """What the fine-tune gained on the rows of the ladder: loss of the base less its own, in nats per token."""

    nats: float
    shown: bool

    @classmethod
    def of(cls, base: Metrics, tuned: Metrics) -> Gain:
        """By the scores of training; shown where the rows' own interval leaves zero out, or no rows were kept."""
        nats = base.loss - tuned.loss
        if base.row_losses and base.row_tokens == tuned.row_tokens and len(base.row_losses) > 1:
            return cls(nats, paired_losses(tuned.row_losses, base.row_losses, base.row_tokens).low > 0)
        return cls(nats, nats > 0)


UNKNOWN = Gain(0.0, shown=False)


def allowed_loss(tolerance: Tolerance, gain: Gain) -> tuple[float, str]:
    """(nats by which the loss may rise, how that is said): absolute, and no more than a share of a gain that is shown.

    A share alone allows too much: most of a large gain is often the form of the answers, which any rounding keeps.
    """
    nats = max(NOISE_NATS, tolerance.max_gain_lost * gain.nats)
    if gain.shown and nats < tolerance.max_loss_increase_nats:
        return nats, f"{100 * tolerance.max_gain_lost:g}% of the {gain.nats:.4g} nats that the fine-tune gained"
    return tolerance.max_loss_increase_nats, f"{tolerance.max_loss_increase_nats:g} nats"


def compare(before: Form, form: Form, tolerance: Tolerance, gain: Gain = UNKNOWN) -> Rung:
    """The rung between two forms on the rows that the second one read, `problems` a line for each tolerance broken."""
    every = len(form.losses)
    before, form = both(before, form)
    p, q = before.log_probabilities, form.log_probabilities
    kl = float(kl_of_positions(p, q).mean())
    top = q.argmax(dim=-1, keepdim=True)
    # a near tie has no right answer: the choice counts as another one only where the first form clearly prefers its own
    or_tie = float((p.amax(dim=-1) - p.gather(1, top)[:, 0] <= TIE_NATS).float().mean())
    agreement = float((p.argmax(dim=-1) == top[:, 0]).float().mean())
    nats, said = allowed_loss(tolerance, gain)
    share = f": {said}" if "%" in said else ""
    checks = (
        (  # one position is no evidence on a few
            or_tie < tolerance.min_top1_agreement and (1 - or_tie) * len(p) > 1.5,
            f"top-1 agreement {or_tie:.4f} ({agreement:.4f} without ties), at least {tolerance.min_top1_agreement}",
        ),
        (
            not kl <= tolerance.max_mean_kl_nats,
            f"mean KL {kl:.2e} nats, at most {tolerance.max_mean_kl_nats:.0e}",
        ),
        (
            not form.loss - before.loss <= nats,
            f"loss {before.loss:.4f} to {form.loss:.4f} nats, at most {nats:.4f} more{share}",
        ),
    )
    return Rung(
        name=form.name,
        against=before.name,
        compared=f"{rows_read(len(before.losses), every)}, {len(p)} positions",
        tolerance=f"KL {tolerance.max_mean_kl_nats:g}, loss at most {said} more",
        top1_agreement=agreement,
        top1_or_tie=or_tie,
        mean_kl_nats=kl,
        loss=form.loss,
        loss_before=before.loss,
        loss_change=Difference.of(paired_losses(before.losses, form.losses, before.tokens)),
        problems=tuple(text for failed, text in checks if failed),
    )


def drawn_for(
    tokens: Sequence[int], tolerance: Tolerance, gain: Gain, *, gate: int, scored: slice | None,
    taken: Sequence[int] = (),
) -> Drawing:  # fmt: skip
    """The rows that decide whether a form keeps within a tolerance; those whose positions are compared are taken."""
    nats, points = allowed_loss(tolerance, gain)[0], tolerance.max_exact_match_drop_points
    taken = [*range(min(PARITY_PROMPTS, len(tokens))), *taken]
    return Drawing(tokens, nats, points, gate=gate, scored=scored, taken=taken)


def rows_read(read: int, every: int) -> str:
    """`116 of 200 rows`, where those were enough."""
    return f"{read} rows" if read == every else f"{read} of {every} rows"


def kl_of_positions(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each position, some at a time: tables are large."""
    pairs = zip(torch.split(p, PASS_POSITIONS), torch.split(q, PASS_POSITIONS), strict=True)
    return torch.cat([(one.exp() * (one - other)).sum(dim=-1) for one, other in pairs])


def check(rung: Rung) -> Rung:
    """The rung itself. Raises ParityFailed (exit 4) with every tolerance that it breaks.

    CacheLost on what a KV cache of 8 bits costs, QualityLost on the last.
    """
    if rung.problems:
        where = f"parity ladder, rung {rung.name!r} against {rung.against!r}"
        hint = HINTS["rounded"] if rung.against == "rounded" else HINTS.get(rung.name, HINTS["artifact"])
        kinds = {("artifact", "merged"): QualityLost, ("cache", "full cache"): CacheLost}
        raise kinds.get((rung.name, rung.against), ParityFailed)(where, "\n".join(rung.problems), hint)
    return rung


class Known(NamedTuple):
    """What a climb has found of the merged model on the rows of the gate: as it is, and with the artifact's weights."""

    merged: Form
    rounded: Form | None


@dataclass
class Ladder:
    """The rungs climbed so far, each checked as it is made, and the forms that scores are taken from."""

    target: Target
    tokenizer: TextTokenizer
    progress: Progress
    rungs: list[Rung] = field(default_factory=list)
    gain: Gain = UNKNOWN
    load: Load = load_plain  # of whole models in fp32
    held_to: HeldTo = ()
    every_row: bool = False  # whether a bundle reads all rows, also where some decide

    def add(self, rung: Rung | None) -> None:
        """One more rung, unless there is none; what making it took is given back. Raises ParityFailed."""
        meter.give_back()
        if rung is not None:
            self.rungs.append(rung)
            check(rung)

    def go_on(self, rungs: Sequence[Rung], result: TrainResult) -> None:
        """Above rungs that were climbed for another target of the same checkpoint."""
        self.rungs += rungs
        self.gain = Gain.of(result.base_valid, result.valid)

    def climb_training(self, trained: Path, result: TrainResult, rows: Sequence[Sample]) -> None:
        """From train.json's own score to the change on the original weights; `rows` are those that training scored.

        Raises ParityFailed.
        """
        training, _, where = trained_settings(result)
        self.gain = Gain.of(result.base_valid, result.valid)
        self.progress("parity: trained", 0, 1, {})
        model, here = load_as_trained(trained, result, self.load)
        numbers = rows_again(training, result.valid, len(rows))
        again = [rows[i] for i in numbers]
        form = observe_model("trained", model, again, compute=here, group_tokens=training.group_tokens)
        del model
        meter.give_back()
        recorded = of_some_rows(result.valid, numbers) if len(again) < len(rows) else result.valid
        self.add(trained_rung(form, recorded, here, where, len(rows)))
        if keeps_original(training):
            return
        self.progress("parity: original", 0, 1, {})
        base = local_folder(result.plan.job.model)
        tuned = load_changed(base, trained, result.training, load=self.load, rounded=True)
        original = observe_model("original", tuned, rows)
        del tuned
        meter.give_back()
        self.add(compare(form, original, ORIGINAL, self.gain))

    def climb_artifact(
        self, merged_folder: Path, bundle: Path, artifact: Artifact, rows: Sequence[Sample], *, tied: bool,
        answers: slice | None = None, gate: int | None = None, alike: Tolerance = ALIKE,
        quality: Tolerance | None = None, cache: CacheRows | None = None, near: Tolerance = CACHE,
        known: Known | None = None, write: Sequence[int] = (),
    ) -> tuple[Form, Form]:  # fmt: skip
        """(merged, artifact) on as many rows as decide, after proving the bundle; rungs take the first `gate` rows.

        The model in torch comes first and is gone when the artifact is first asked: no memory has to hold both. Where
        the rows that it has read are not enough, the artifact goes and both read more.
        `cache` are rows for what is proven of a KV cache of 8 bits. Its bundle computes as torch does with the
        runtime's own cache, and comes `near` to that with its own. `known` forms are not found again. Answers to the
        rows numbered in `write` are written out by the artifact, and by a merged model that is in memory as a whole.

        Raises ParityFailed.
        """
        self.add(stored_rung(bundle, merged_folder, self.target, tied=tied))
        count = len(rows) if gate is None else gate
        few = rows_for(self.held_to, rows[:count]) if isinstance(self.held_to, tuple) else []
        if known is not None and count < min(PARITY_PROMPTS, len(rows)):  # tables are of the first rows of all
            known = None
        gain, tolerance = self.gain, quality or self.target.parity
        tokens, scored = [row.trained_tokens for row in rows], answers if rows[0].has_prompt else None
        drawing = drawn_for(tokens, tolerance, gain, gate=count, scored=scored, taken=write)
        numbers = list(range(len(rows))) if self.every_row else drawing.ahead()
        asked = Asked(rows, answers, write)
        merged, rounded, scores = self._climb_models(merged_folder, asked, few, known, count, numbers)
        meter.give_back()
        whole = self._climb_cache(artifact, cache, near)
        drawing.follows(merged)

        def observe() -> Form:
            return observe_artifact(
                "artifact", artifact, rows, self.tokenizer, answers=answers, held_to=self.held_to, write=write,
                progress=self._told("parity: artifact"), drawing=None if self.every_row else drawing,
            )  # fmt: skip

        made = observe()
        if rounded is not None:
            count_rounded = len(rounded.losses)
            full = made if whole is None else observe_artifact("artifact", whole, rows[:count_rounded], self.tokenizer)
            self.add(compare(rounded, first(full, count_rounded), alike, self.gain))
        if scores is not None:
            self.add(label_rung(scores, "rounded" if rounded else "merged", whole or artifact, few, alike))
        if whole is not None:
            whole.close()
        del rounded, scores
        merged, made = self._go_on(merged_folder, artifact, asked, drawing, merged, made, observe)
        self.add(compare(first(merged, count), first(made, count), tolerance, gain))
        return merged, made

    def _climb_models(
        self, folder: Path, asked: Asked, few: Sequence[Sample], known: Known | None, count: int,
        numbers: Sequence[int],
    ) -> tuple[Form, Form | None, torch.Tensor | None]:  # fmt: skip
        """(merged on the rows of these numbers, on the bundle's very weights where torch has them, labels' scores).

        Each row goes once through each form; of what is `known` on the first `count` rows none does again.
        """
        labels = self.held_to if isinstance(self.held_to, tuple) else ()
        unseen = [number for number in numbers if known is None or number >= count]
        rounded = known.rounded if known is not None else None
        if known is not None and count == len(asked.rows) and rounded is not None and not labels:
            return known.merged, first(rounded, PARITY_PROMPTS), None
        model, merged = self.load(folder), None
        if known is not None:
            merged = joined("merged", len(asked.rows), [(range(count), known.merged)])
            asked = asked._replace(write=())  # of known rows no answers are written, nor of these then
        if unseen or merged is None:
            more = self._read(folder, asked, unseen, model)
            merged = more if merged is None else with_more(merged, more)
        changed = (labels or rounded is None) and round_as_target(model, self.target)
        if rounded is None and changed:
            rounded = observe_model("rounded", model, asked.rows[:PARITY_PROMPTS])  # whose tables the artifact keeps
        scores = None
        if labels and (changed or self.target.weight_bits == 32):  # the bundle's very weights
            self._told("parity: labels")(0, 1)
            scores = referee(model, few, labels)
        return merged, None if rounded is None else first(rounded, PARITY_PROMPTS), scores

    def _read(self, folder: Path, asked: Asked, numbers: Sequence[int], model: Any = None) -> Form:
        """What the merged model says of the rows of these numbers; answers are written by one that is in memory."""
        some = asked if self.load is load_plain else asked._replace(write=())
        model = self.load(folder) if model is None else model
        told = self._told("parity: merged")
        return observe_numbers("merged", model, some, numbers, self.tokenizer, held_to=self.held_to, progress=told)

    def _go_on(
        self, folder: Path, artifact: Artifact, asked: Asked, drawing: Drawing, merged: Form, made: Form,
        observe: Callable[[], Form],
    ) -> tuple[Form, Form]:  # fmt: skip
        """Both forms on as many rows more as it takes until they decide, never both models in memory."""
        while drawing.open and (more := drawing.more()):
            artifact.close()
            meter.give_back()
            merged = with_more(merged, self._read(folder, asked, more))
            meter.give_back()
            drawing.follows(merged)
            made = with_more(made, observe())
        return merged, made

    def _told(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(stage, done, total, {})

    def _climb_cache(self, artifact: Artifact, rows: CacheRows | None, near: Tolerance) -> Artifact | None:
        """The artifact with its runtime's own cache, after proving its 8-bit one; None where it has no other."""
        if self.target.kv_bits != 8:
            return None
        if rows is None:
            raise ValueError("a KV cache of 8 bits is proven on rows of its own")
        self.progress("parity: cache", 0, 1, {})
        whole = artifact.with_full_cache()
        for rung in cache_rungs(whole, artifact, rows, near):
            self.add(rung)
        return whole


def exact_match_problem(merged: Form, made: Form, tolerance: Tolerance, rows: slice) -> str:
    """How much fewer answers are exact than the tolerance allows, or nothing; one row is no evidence on a few.

    The drop itself is judged, not the end of its interval: on a few rows that would pass anything or nothing.
    """
    if not merged.exact or not made.exact:
        return ""
    before, after = (form.on(made.read(rows)).exact for form in (merged, made))
    drop = 100 * (sum(before) - sum(after)) / len(before)
    if drop <= max(tolerance.max_exact_match_drop_points, 100 / len(before)):
        return ""
    low, high = (-100 * end for end in paired_rates(before, after)[:0:-1])
    reach = f"95% interval {low:.1f} to {high:.1f}"
    return f"exact match falls by {drop:.1f} points ({reach}), at most {tolerance.max_exact_match_drop_points:g}"
