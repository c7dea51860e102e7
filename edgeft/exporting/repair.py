"""Which is the smallest artifact that keeps a fine-tune, and what does each larger one buy?

A climb: rounded to nearest, calibrated, 8 bits where they are worth most on calibrated codes, then the runtime's larger
targets. Each one's weights are simulated in torch as the export would store them and compared with the merged model on
the validation rows, paired; only what passes its target's gate is built, and the parity ladder proves it. Where the
bundle fails all the same, the climb goes on.
"""

from __future__ import annotations

import functools
import math
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from edgeft.data.dataset import Sample, TextTokenizer
from edgeft.documents import saving, sha256_json
from edgeft.errors import BadInput, CacheLost, DoesNotFit, QualityLost
from edgeft.exporting.attempts import cost, left, shown
from edgeft.exporting.build import need_runtime
from edgeft.exporting.bundle import Bundle, failed_path
from edgeft.exporting.calibrate import calibrate, put_codes
from edgeft.exporting.drawn_rows import both
from edgeft.exporting.export import Chosen, calibration_samples, export, rows_of
from edgeft.exporting.form import Form
from edgeft.exporting.outputs import observe_drawn, observe_model
from edgeft.exporting.parity import Gain, Known, drawn_for
from edgeft.exporting.promotion import SENSITIVITY_ROWS, USED, choose, file_bytes, gate_rung, measure, too_small
from edgeft.exporting.proof_rows import ProofRows
from edgeft.exporting.room import check_room, loader, no_room_to_promote
from edgeft.machines import meter
from edgeft.memory.stages import CALIBRATION_ROWS
from edgeft.merging.merge import verify_merged
from edgeft.merging.result import MergedCheckpoint
from edgeft.models.intervals import paired_rates
from edgeft.models.metrics import Attempt, Difference, Promotion, Repair, Rung
from edgeft.planning.stage_checks import target_device
from edgeft.progress import Progress
from edgeft.settings.job import AUTO
from edgeft.targets.codes import Codes
from edgeft.targets.footprint import bundle_weights, choose_context
from edgeft.targets.rounding import round_as_target
from edgeft.targets.target import Target, Tolerance, climb, list_targets, promoted
from edgeft.training.job_data import Data
from edgeft.units import MIB, show_bytes

SAME_SIZE = 1.1  # a target that was named may become so much larger when it is repaired


class Step(NamedTuple):
    """One artifact to consider."""

    name: str
    target: Target
    promotion: Promotion | None = None


@dataclass
class Climb:
    """A merged model, what its artifacts are compared on, what was found so far."""

    folder: Path
    merged: MergedCheckpoint
    out: Path
    scratch: Path
    device_bytes: int | None
    limit_bytes: int | None
    calibration: str | None
    progress: Progress
    attempts: list[Attempt] = field(default_factory=list)
    codes: dict[str, Codes] = field(default_factory=dict)
    simulated: tuple[Target, Form] | None = None  # the last one
    climbed: list[Rung] = field(default_factory=list)  # below every bundle
    cache_lost: bool = False  # by a KV cache of 8 bits, which was nobody's wish

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The merged checkpoint's."""
        return TextTokenizer(self.folder)

    @functools.cached_property
    def samples(self) -> list[Sample]:
        """What codes are chosen on, and the rows after them that say which tensors are worth 8 bits."""
        rows = CALIBRATION_ROWS + SENSITIVITY_ROWS
        return calibration_samples(self.folder, self.merged.train.plan, self.calibration, rows)

    @functools.cached_property
    def rows(self) -> list[Sample]:
        """The validation rows that training scored: what the gate takes."""
        plan = self.merged.train.plan
        return ProofRows.of(Data.read(plan, train=False), plan).trained

    @functools.cached_property
    def gain(self) -> Gain:
        """What the fine-tune gained on them."""
        return Gain.of(self.merged.train.base_valid, self.merged.train.valid)

    @functools.cached_property
    def exact(self) -> Form:
        """The merged model in fp32."""
        self.progress("repair: merged", 0, 1, {})
        model, plan = self.load(), self.merged.train.plan
        form = observe_model("merged", model, self.rows, self.tokenizer, answers=slice(None), held_to=plan.held_to)
        del model
        meter.give_back()
        return form

    def load(self) -> Any:
        """The merged model in fp32, as its proof has it."""
        return loader(self.merged.train.plan)(self.folder)

    def observe(self, model: Any, tolerance: Tolerance) -> Form:
        """What a rounded model says of as many rows as decide, its answers held as the plan holds them."""
        scored = slice(None) if self.exact.exact else None
        drawing = drawn_for(self.exact.tokens, tolerance, self.gain, gate=len(self.rows), scored=scored)
        held_to = self.merged.train.plan.held_to
        return observe_drawn("rounded", model, self.rows, self.tokenizer, drawing.follows(self.exact), held_to=held_to)

    def size(self, target: Target) -> int:
        """Predicted bytes of a target's whole bundle."""
        return file_bytes(self.merged.train.plan.spec, target, self.folder)

    def steps(self, targets: Sequence[Target]) -> Iterator[Step]:
        """The targets, the smallest first; before those of more bits, 8 bits for tensors of the last of 4."""
        small = [each for each in targets if each.weight_bits == targets[0].weight_bits]
        large = targets[len(small) :]
        for each in small:
            yield from self._with_cache(each)
        if small[-1].weight_bits == 4 and small[-1].method == "rtn":
            yield from self._promotions(small[-1], large)
        for each in large:
            yield from self._with_cache(each)

    def _with_cache(self, target: Target) -> Iterator[Step]:
        """The target; with its runtime's own cache where one of 8 bits lost too much, by then or in this step."""
        if not (self.cache_lost and target.kv_bits == 8):
            yield Step(target.name, target)
        if self.cache_lost and target.kv_bits == 8:
            yield Step(target.name, with_own_cache(target))

    def known(self, target: Target) -> Known:
        """What the proof of a target need not find again: torch with codes of calibration is no part of it."""
        return Known(self.exact, self._simulated(target) if target.calibration == "none" else None)

    def _simulated(self, target: Target) -> Form | None:
        """The last simulation, where it was of these weights."""
        known, form = self.simulated or (None, None)
        return form if known == with_own_cache(target) else None

    def _promotions(self, target: Target, larger: Sequence[Target]) -> Iterator[Step]:
        """The target with as few promotions as make the simulation pass; with more where the first choice failed."""
        limits = [self.limit_bytes, *(self.size(each) - 1 for each in larger[:1])]
        limit = min((each for each in limits if each is not None), default=None)
        if limit is not None and self.size(target) > limit:
            return
        plan = self.merged.train.plan
        if reason := no_room_to_promote(plan):
            name = f"{target.name}, 8 bits for some tensors"
            self._skip(name, target, reason)
            return
        codes = self.codes_of(target) if target.calibration != "none" else None
        held = self.samples[CALIBRATION_ROWS:] or self.samples[:SENSITIVITY_ROWS]
        described = (
            f"{len(held)} rows of {'the training data' if self.calibration is None else rows_of(self.calibration)}"
        )
        measured = measure(self.folder, target, held, described, self.progress, codes)
        before: Promotion | None = None
        for used in USED:
            chosen = choose(
                measured, self.rows, self.gain, size_budget_bytes=limit, used=used, progress=self.progress,
                exact=self.exact, observe=self.observe,
            )  # fmt: skip
            if not chosen.promoted or (before is not None and chosen.promoted == before.promoted):
                return
            before = chosen
            name = f"{target.name}, 8 bits for {len(chosen.promoted)} of {chosen.considered} tensors"
            yield Step(name, promoted(target, [each.module for each in chosen.promoted]), chosen)

    def room(self, target: Target) -> DoesNotFit | None:
        """Why a target's bundle has no room: in the size that was allowed, on the device, on this machine."""
        plan = self.merged.train.plan
        try:
            if self.limit_bytes is not None and (size := self.size(target)) > self.limit_bytes:
                raise too_small(target.name, size, self.limit_bytes)
            choose_context(plan.spec, target, bundle_weights(plan.spec, target), self.device_bytes)
            check_room(plan, target, self.out, computed=True)
        except DoesNotFit as problem:
            return problem
        return None

    def codes_of(self, target: Target) -> Codes:
        """The calibrated codes of a target, made once; those of the first target and of the last one are kept."""
        key = sha256_json(target.model_dump(mode="json"))[:16]
        if key not in self.codes:
            for old in list(self.codes)[1:]:
                shutil.rmtree(self.codes.pop(old).folder)
            place = self.scratch / key
            place.mkdir()
            self.codes[key] = calibrate(self.folder, target, self.samples[:CALIBRATION_ROWS], place, self.progress)
            meter.give_back()
        return self.codes[key]

    def simulate(self, step: Step) -> Form | None:
        """What a model with the artifact's very weights says of the rows; None where torch does not know them."""
        if step.target.method == "k_quant":
            return None
        if (form := self._simulated(step.target)) is not None:
            return form
        codes = self.codes_of(step.target) if step.target.calibration != "none" else None
        self.progress(f"repair: {step.name}", 0, 1, {})
        model = self.load()
        if codes is not None:
            put_codes(model, step.target, codes)
        elif not round_as_target(model, step.target) and step.target.weight_bits < 32:
            return None
        form = self.observe(model, step.target.parity)
        del model
        meter.give_back()
        self.simulated = with_own_cache(step.target), form
        return form

    def judge(self, step: Step) -> Attempt:
        """A step by its simulation: whether it passes its target's gate, and what it costs."""
        exact, form, tolerance = self.exact, self.simulate(step), step.target.parity
        found = Attempt(
            name=step.name, predicted_bytes=self.size(step.target), decision="passes", reason="not simulated",
            kv_bits=step.target.kv_bits,
        )  # fmt: skip
        if form is None:
            return found
        rung = gate_rung(exact, form, tolerance, self.gain)
        before, after = both(exact, form)
        match = Difference.of(paired_rates(before.exact, after.exact)) if before.exact and after.exact else None
        changes = {
            "loss": rung.loss_change, "exact_match": match, "decision": "fails" if rung.problems else "passes",
            "reason": "; ".join(rung.problems) or shown(rung.loss_change, match),
        }  # fmt: skip
        return found.model_copy(update=changes)

    def _skip(self, name: str, target: Target, reason: str) -> None:
        size, bits = self.size(target), target.kv_bits
        self.attempts.append(Attempt(name=name, predicted_bytes=size, decision="skipped", reason=reason, kv_bits=bits))

    def passing(self, targets: Sequence[Target]) -> Iterator[tuple[Step, DoesNotFit | None]]:
        """The steps whose simulation passes, or that have no room and why; each attempt is noted as it is made."""
        for step in self.steps(targets):
            lacking = self.room(step.target)
            if lacking is not None:
                self._skip(step.name, step.target, lacking.problem)
                yield step, lacking
                continue
            self.attempts.append(self.judge(step))
            if self.attempts[-1].decision == "passes":
                yield step, None


def with_own_cache(target: Target) -> Target:
    """The target with the KV cache that its runtime has by itself: the same weights."""
    return target.model_copy(update={"kv_bits": None})


def export_smallest(
    merged_folder: Path, targets: Sequence[Target], out: Path, *, asked: str, device: str | None, progress: Progress,
    size_budget_bytes: int | None = None, calibration: str | None = None, train: Path | None = None,
    request_sha256: str = "", same_size: bool = False,
) -> Bundle:  # fmt: skip
    """The bundle of the first of `targets`, or of promotions between them, that passes its simulation and its ladder.

    `same_size`: none may be more than SAME_SIZE times the first. A bundle that failed on the way, the last one, stays
    beside `out` where none passes.

    Raises QualityLost (exit 4) naming all that was tried, DoesNotFit (exit 3) where nothing has room, ParityFailed for
    a fault that no rounding explains.
    """
    need_runtime(targets[0])
    with climbing(merged_folder, out, device, size_budget_bytes, calibration, train, progress) as found:
        if same_size:
            most = int(SAME_SIZE * found.size(targets[0]))
            found.limit_bytes = min(most, size_budget_bytes or most)
        no_room: list[tuple[Step, DoesNotFit]] = []
        by_test_rows = False
        for step, lacking in found.passing(targets):
            if lacking is not None:
                no_room.append((step, lacking))
                continue
            found.attempts[-1] = found.attempts[-1].model_copy(update={"built": True})
            repair = Repair(
                request_sha256=request_sha256, asked=asked, compared=f"{len(found.rows)} validation rows",
                by_test_rows=by_test_rows, attempts=tuple(found.attempts),
            )  # fmt: skip
            codes = found.codes_of(step.target) if step.target.calibration != "none" else None
            try:
                return export(
                    merged_folder, step.target, out, device=device, progress=progress, train=train, keep_failed=True,
                    size_budget_bytes=size_budget_bytes, calibration=calibration,
                    chosen=Chosen(repair, step.promotion, codes, found.known(step.target), found.climbed),
                )  # fmt: skip
            except CacheLost as problem:
                if found.merged.train.plan.job.kv_bits != AUTO:
                    raise
                found.cache_lost, reason = True, f"the bundle's cache: {problem.problem}"
            except QualityLost as problem:
                by_test_rows = by_test_rows or problem.rows == "test"
                reason = f"the bundle: {problem.problem}"
            except DoesNotFit as problem:  # larger than predicted
                no_room.append((step, problem))
                reason = problem.problem
            found.attempts[-1] = found.attempts[-1].model_copy(update={"decision": "fails", "reason": reason})
        if len(no_room) == len(found.attempts) and no_room:
            raise no_room[0][1]
        raise nothing_passes(found, [step for step, _ in no_room])


def export_named(
    merged_folder: Path, target: Target, out: Path, *, asked: str, device: str | None, progress: Progress,
    size_budget_bytes: int | None = None, calibration: str | None = None, train: Path | None = None,
) -> Bundle:  # fmt: skip
    """`export`, and where rounding loses too much the bundle stays beside `out`, and the hint names what would pass.

    `asked` are the options that named the target.
    """
    try:
        return export(
            merged_folder, target, out, device=device, progress=progress, size_budget_bytes=size_budget_bytes,
            calibration=calibration, train=train, keep_failed=True,
        )  # fmt: skip
    except QualityLost as problem:
        left = f"\nthe bundle that failed is kept in {failed_path(out.resolve()).name}, beside {out.name}"
        with climbing(merged_folder, out, device, None, calibration, train, progress) as found:
            shipped = {each.name: each for each in list_targets()}

            def options(step: Step) -> str:
                return f"--target {step.name}" if shipped.get(step.name) == step.target else f"{asked} --repair auto"

            hint = next_command(found, (Step(each.name, each) for each in climb(target)[1:]), options)
        lost = QualityLost(problem.where, problem.problem + left, hint)
        lost.rows = problem.rows
        raise lost from None


def next_command(found: Climb, steps: Iterator[Step] | Sequence[Step], options: Callable[[Step], str]) -> str:
    """The command of the first step that passes its simulation, with its size and what it costs; else what is left."""
    for step in steps:
        if step.target.weight_bits < 16:  # what more bits than these lose is nothing
            made = found.judge(step)
            if made.decision == "fails":
                continue
        else:
            made = Attempt(name=step.name, predicted_bytes=found.size(step.target), decision="passes", reason="")
        command = f"edgeft export {shlex.quote(str(found.folder))} {options(step)}"
        return f"{command}  # {show_bytes(made.predicted_bytes)}{cost(made)}"
    return left(found.merged.train.plan)


def nothing_passes(found: Climb, no_room: Sequence[Step]) -> QualityLost:
    """The error of a climb that ended: every attempt, and the budget that the next one would need."""
    lines = [f"{each.name}, {show_bytes(each.predicted_bytes)}{cost(each)}: {each.reason}" for each in found.attempts]
    hint = left(found.merged.train.plan)
    larger = [step for step in no_room if found.limit_bytes is not None and found.size(step.target) > found.limit_bytes]
    if larger:
        hint = next_command(found, larger, lambda step: f"--size-budget {math.ceil(found.size(step.target) / MIB)}MiB")
    return QualityLost("repair", "\n".join(["nothing that fits keeps the fine-tune", *lines]), hint)


@contextmanager
def climbing(
    merged_folder: Path, out: Path, device: str | None, limit_bytes: int | None, calibration: str | None,
    train: Path | None, progress: Progress,
) -> Iterator[Climb]:  # fmt: skip
    """A climb with a folder of its own for codes beside `out`, which goes away with it. Raises as `verify_merged`."""
    merged, _ = verify_merged(merged_folder, train)
    profile = target_device(device)
    place = out.resolve()
    scratch = place.with_name(f".{place.name}.repair")
    with saving(scratch):
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        scratch.mkdir(parents=True)
    try:
        yield Climb(
            merged_folder, merged, out, scratch, profile.budget_bytes if profile else None, limit_bytes, calibration,
            progress,
        )  # fmt: skip
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_calibration(targets: Sequence[Target], calibration: str | None) -> None:
    """Nothing. Raises BadInput for calibration rows where no target takes any and none can be promoted."""
    if calibration is not None and all(each.calibration == "none" and not each.has_cache_scales for each in targets):
        problem = f"is what codes are chosen on, {targets[0].name} takes the nearest"
        raise BadInput("--calibration", problem, "name no target, a calibrated one, or add --repair auto")
