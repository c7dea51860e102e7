"""How is a plan carried out, so that what was planned is what runs, and a killed run goes on where it stopped?"""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeft.data.dataset import Sample
from edgeft.documents import staging, versions
from edgeft.engine.fp32_layers import DenseTurns
from edgeft.engine.lisa import state_bytes
from edgeft.engine.loop import Run, learning_rate, make_run, remaining_steps
from edgeft.engine.nf4_base import keep_base
from edgeft.engine.quantized_layers import settle
from edgeft.engine.ranks import Ended, Ranks
from edgeft.engine.sharded import by_first, check_gathered
from edgeft.engine.trainable import save_tuned, trained_units, unit_changes
from edgeft.machines import meter
from edgeft.machines.pool import Pool, pool_ends
from edgeft.memory import disk
from edgeft.models.checkpoint import Checkpoint, local_folder
from edgeft.models.identity import WEIGHTS, Inputs, written_files
from edgeft.models.metrics import Metrics, UnitRecord
from edgeft.models.parts import units
from edgeft.planning.plan import Plan
from edgeft.progress import Progress, silent
from edgeft.settings.job import Training
from edgeft.training.base_scores import base_scores
from edgeft.training.job_data import Data
from edgeft.training.join import check_agree, check_folder, check_same, digest, together
from edgeft.training.out_of_memory import capped, explained, is_out_of_memory
from edgeft.training.prefix import FrozenPrefix
from edgeft.training.prepare import (
    carried_out,
    check_head,
    choose_device,
    hold_to,
    make_pool,
    prepare,
    tf32,
)
from edgeft.training.promise import above, check_budget, highest, promise
from edgeft.training.result import NOT_REHEARSED, Deviation, Rehearsal, SampleAnswer, TrainResult
from edgeft.training.scoring import Scorer, Scores, side_by_side
from edgeft.training.step_down import taken
from edgeft.training.step_log import STEPS, StepLog, StepRecord, Watch, unwatched
from edgeft.training.stop import Stop
from edgeft.training.stopping import Stopping, facts
from edgeft.training.work import open_work, work_folder

SECONDS_BETWEEN_CHECKPOINTS = 60.0


def train(
    plan: Plan, out: Path, *, plan_sha256: str, progress: Progress, wanted_device: str | None = None,
    rehearsal: Rehearsal = NOT_REHEARSED, emulate: bool = False, ranks: Ranks | None = None, watch: Watch = unwatched,
) -> TrainResult:  # fmt: skip
    """Run a plan and write `out`/train.json beside what was trained; `rehearsal` is what came of one, to be recorded.

    `emulate` runs a GPU's plan on the CPU in the plan's own dtypes (autocast, scaled gradients): slow, for tests.
    `ranks`: the processes that this one is of, where it has joined them already; all give what the first one wrote.
    `watch` is told each step as steps.jsonl has it, of a run that goes on those before as well.
    Raises BadInput for data or a model that cannot be used, DoesNotFit when this machine has less memory or disk than
    the plan needs or memory runs out, EdgeftError when loss, gradients or scores are not finite, KeyboardInterrupt
    after saving when asked to stop.
    """
    meter.import_all()
    meter.control_malloc()
    started = time.monotonic()
    device, compute, deviations = choose_device(plan, wanted_device, emulate=emulate)
    if ranks is None:
        with together(plan, device, out.parent / "plan.json") as ranks:
            return train(plan, out, plan_sha256=plan_sha256, progress=progress, wanted_device=wanted_device,
                         rehearsal=rehearsal, emulate=emulate, ranks=ranks, watch=watch)  # fmt: skip
    if ranks.first:
        disk.require(disk.train_disk(plan.spec, plan.training), out, there=disk.size_of(work_folder(out)))
    progress = progress if ranks.first else silent
    smaller = taken(work_folder(out), plan, plan_sha256)
    here, phase = carried_out(smaller.plan, deviations), ["start"]
    deviations = [*deviations, *smaller.deviations]

    def report(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        phase[0] = stage
        progress(stage, done, total, numbers)

    with explained(here, device, phase), capped(here.budget_bytes, device), tf32(here.training, device), pool_ends():
        session = Session.open(plan, here, out, plan_sha256, report, device, compute, deviations, ranks, watch)
        scored = bool(session.scores)
        if not ranks.told(lambda: scored):  # every checkpoint there was had become unreadable
            if ranks.first:
                shutil.rmtree(session.work)
            del session
            session = Session.open(plan, here, out, plan_sha256, report, device, compute, deviations, ranks, watch)
        session.loop()
        session.compare()
        with by_first(session.run.model, ranks) as computes:
            result = session.finish(out, plan_sha256, rehearsal) if computes else None
        del session
        ranks.part()
    progress("done", 1, 1, {"seconds": time.monotonic() - started})
    return result or TrainResult.read(out / "train.json")


@dataclass
class Session:
    """One call of `train`: what was read, what runs, and what is said about it at the end."""

    plan: Plan
    here: Plan  # as it is carried out
    device: torch.device
    compute: torch.dtype
    deviations: list[Deviation]
    data: Data
    work: Path
    progress: Progress
    run: Run
    pool: Pool
    inputs: Inputs
    scores: dict[str, Any]
    phases: dict[str, int]
    resumed: list[int]
    seconds: float
    interval_peaks: list[int]
    prefix: FrozenPrefix | None
    stopping: Stopping
    log: StepLog
    ranks: Ranks
    process_peaks: tuple[int, ...] = ()

    @property
    def training(self) -> Training:
        return self.here.training

    @classmethod
    def open(
        cls, plan: Plan, here: Plan, out: Path, plan_sha256: str, progress: Progress, device: torch.device,
        compute: torch.dtype, deviations: list[Deviation], ranks: Ranks, watch: Watch,
    ) -> Session:  # fmt: skip
        """Data, model and the newest checkpoint; the base is scored when there is none."""
        training = here.training
        work, folder = work_folder(out), local_folder(plan.job.model)
        check_budget(here, device, going_on=any(work.glob("step-*")), neighbours=ranks.local_size)
        data = Data.read(plan)
        with ranks.in_turn():
            inputs = open_work(work, plan, plan_sha256, folder, writes=ranks.first)
        check_folder(ranks, work)
        check_same(ranks, plan_sha256, inputs, device)
        progress("load", 0, 1, {})
        with ranks.in_turn():
            keep_base(folder, training, device, progress)
        model, parts = prepare(here, device, compute, folder, progress, ranks)
        check_head(model, parts, data.train[0], device, compute)
        check_gathered(model)
        phases = {"load": meter.peak_bytes(device)}
        pool = make_pool(here, parts)
        fresh: dict[str, Any] = {}
        prefix = None
        if training.cached_layers:
            meter.reset_peak(device)
            with ranks.in_turn():
                prefix = FrozenPrefix.open(here, data, model, parts, folder, device, compute, progress)
            parts = prefix.above(parts)
            phases["prefix"] = meter.peak_bytes(device)
        with by_first(model, ranks) as computes:
            if computes and not any(work.glob("step-*")):
                meter.reset_peak(device)
                scorer = Scorer(here, data, model, parts, device, compute, progress, prefix)
                found, earlier = base_scores(scorer, inputs[WEIGHTS], folder)
                fresh = {"base_valid": found.valid.model_dump(), "base_answers": found.answers, "base_kept": earlier,
                         "base_test": found.test.model_dump() if found.test else None}  # fmt: skip
                phases["evaluate"] = meter.peak_bytes(device)
        if prefix is not None:
            prefix.drop()
            pool.give_back()
        meter.reset_peak(device)
        hold_to(pool, here, "train")
        ranks.wait()  # for scores
        run = make_run(training, device, compute, model, parts, folder, work, ranks)
        check_agree(ranks, "steps behind it", str(run.step))
        resumed = [run.step] if run.step else []
        if resumed:
            progress("resume", run.step, training.steps, {})
            phases["resume"] = meter.peak_bytes(device)
            meter.reset_peak(device)
        before = run.counters or {"scores": fresh, "resumed_at": [], "seconds": 0.0, "phases": {}, "peaks": []}
        stopping = Stopping(training, data.stopping, work, ranks=ranks)
        stopping.go_on(before.get("validations", ()))
        log = StepLog(work, run.step, writes=ranks.first, watch=watch)
        return cls(
            plan, here, device, compute, deviations, data, work, progress, run, pool, inputs,
            before["scores"], highest(phases, before["phases"]), [*before["resumed_at"], *resumed],
            before["seconds"], before["peaks"], prefix, stopping, log, ranks,
        )  # fmt: skip

    def loop(self) -> None:
        """Every step that is left, with checkpoints; raises KeyboardInterrupt after saving when asked to stop."""
        run, training, device = self.run, self.training, self.device
        before, started = self.seconds, time.monotonic()

        def note() -> dict[str, Any]:
            self.phases["train"] = max(self.phases.get("train", 0), meter.peak_bytes(device), *self.interval_peaks, 0)
            self.seconds = before + time.monotonic() - started
            self.log.sync()
            return {"scores": self.scores, "resumed_at": self.resumed, "seconds": self.seconds, "phases": self.phases,
                    "peaks": self.interval_peaks, "validations": self.stopping.state()}  # fmt: skip

        with Stop() as stop:
            last_saved, first = time.monotonic(), run.step + 1
            self.progress("train", run.step, training.steps, {})
            for samples in remaining_steps(training, self.data.train, run.step):
                if self.stopping.ends:
                    break
                if run.lisa is not None and run.lisa.due(run.step):
                    self.interval_peaks.append(meter.peak_bytes(device))
                    meter.reset_peak(device)
                run.asked = stop.asked
                loss = self.step(samples, note)
                run.curve.append((run.step, round(loss, 6)))
                if run.step == first and not self.ranks.alone:
                    check_agree(self.ranks, "weights", digest(run.chosen))
                self.tell(loss, before + time.monotonic() - started)
                due = time.monotonic() - last_saved > SECONDS_BETWEEN_CHECKPOINTS
                if training.checkpoint_steps is not None:
                    due = run.step % training.checkpoint_steps == 0
                asked = stop.asked if self.ranks.alone else run.asked  # all stop after the same step
                if self.ranks.first and (((due or run.replaced) and run.step < training.steps) or asked):
                    run.save(self.work, note())
                    last_saved = time.monotonic()
                if asked:
                    self.ranks.part()  # a process that ends first would have this one ended
                    raise KeyboardInterrupt
        note()
        if run.lisa is not None:
            self.interval_peaks.append(meter.peak_bytes(device))
            run.lisa.optimizer_bytes.append(state_bytes(run.optimizer))
        self.stopping.take_best(run)
        run.optimizer.state.clear()  # scoring needs no optimizer states
        self.pool.give_back()  # its pages are as many as training made them
        hold_to(self.pool, self.here, "evaluate")

    def tell(self, loss: float, seconds: float) -> None:
        """Show and write down what a step came to; before that the rows are scored that say when to stop, if due."""
        run, training = self.run, self.training
        rate, taken = learning_rate(training, run.step - 1), meter.bytes_now(self.device)
        self.progress("train", run.step, training.steps, {
            "loss": loss, "learning_rate": rate, "tokens_per_second": run.tokens / seconds, "bytes_now": taken,
            "seconds_left": seconds / run.step * (training.steps - run.step), **self.stopping.newest(),
        })  # fmt: skip
        scored = self.validate() if self.stopping.due(run.step) else None
        self.log.add(StepRecord(
            step=run.step, loss=round(loss, 6), learning_rate=rate, tokens=run.tokens, seconds=round(seconds, 3),
            memory_bytes=taken, valid_loss=scored,
        ))  # fmt: skip

    def validate(self) -> float:
        """Loss of the rows that say when to stop, with a step's memory given back and the optimizer's states there."""
        self.phases["train"] = max(self.phases.get("train", 0), meter.peak_bytes(self.device))
        hold_to(self.pool, self.here, "validate")
        self.pool.give_back()
        meter.reset_peak(self.device)
        self.stopping.validate(self.run, lambda done, total: self.progress("validate", done, total, {}))
        self.phases["validate"] = max(self.phases.get("validate", 0), meter.peak_bytes(self.device))
        meter.reset_peak(self.device)
        hold_to(self.pool, self.here, "train")
        return self.stopping.newest()["valid_loss"]

    def step(self, samples: list[Sample], note: Callable[[], dict[str, Any]]) -> float:
        """One step's loss. Where memory, or another process, is lost before an update, the steps so far are kept."""
        run = self.run
        turning = run.lisa is not None and run.lisa.due(run.step)
        try:
            return run.train_step(samples)
        except (MemoryError, RuntimeError, Ended) as problem:
            lost = is_out_of_memory(problem) or isinstance(problem, Ended)
            if run.step and lost and not run.updating and not turning and self.ranks.first:
                traceback.clear_frames(problem.__traceback__)  # they hold the step's tensors
                run.save(self.work, note())
            raise

    def compare(self) -> None:
        """Note what each process took, and whether any has other weights than the first one."""
        peaks = self.ranks.gathered(self.phases)
        digests = self.ranks.gathered(digest(self.run.chosen) if not self.ranks.alone else "")
        self.phases = highest(*peaks)
        if len(peaks) > 1:
            self.process_peaks = tuple(max(each.values()) for each in peaks)
        apart = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if apart:
            done = f"process {apart[0]} has others than process 0, whose are kept"
            self.deviations.append(Deviation(what="trained weights", planned="the same in all processes", done=done))

    def finish(self, out: Path, plan_sha256: str, rehearsal: Rehearsal) -> TrainResult:
        """Score what was trained and write it, whole or not at all."""
        meter.reset_peak(self.device)
        with staging(out) as temporary:
            self.save(temporary)
            self.log.put(temporary)
            self.phases["save"] = meter.peak_bytes(self.device)
            meter.reset_peak(self.device)
            settle(self.run.model)  # what is scored is what will be shipped
            scores = self.score()
            self.phases["evaluate"] = max(self.phases.get("evaluate", 0), meter.peak_bytes(self.device))
            result = TrainResult(
                input_sha256=plan_sha256, versions=versions(), plan=self.plan, inputs=self.inputs,
                files=written_files(temporary, "train.json", STEPS), valid=scores.valid, test=scores.test,
                rehearsal=rehearsal, samples=self.samples(scores.answers),
                units=self.unit_records(temporary), **self.base_facts(), **self.step_facts(), **self.memory_facts(),
            )  # fmt: skip
            result.write(temporary / "train.json")
        shutil.rmtree(self.work, ignore_errors=True)
        return result

    def save(self, folder: Path) -> None:
        """What was trained, as PEFT or transformers read it; of layers that took turns on disk, the very files."""
        run = self.run
        run.keep_newest(self.work)
        if run.lisa is not None and isinstance(run.lisa.turns, DenseTurns):
            run.lisa.turns.hand_over((*run.lisa.always, *run.lisa.active), run.lisa.visited(), folder)
            return
        kept = run.chosen if run.lisa is None else run.lisa.in_memory()
        save_tuned(run.model, run.parts, self.training, kept, self.plan.job.model, folder)

    def score(self) -> Scores:
        """Of the trained model."""
        run = self.run
        return Scorer(
            self.here, self.data, run.model, run.parts, self.device, self.compute, self.progress, self.prefix
        ).scores()

    def samples(self, tuned: list[str]) -> tuple[SampleAnswer, ...]:
        """Answers before and after; none where a checkpoint of another version has none of before."""
        return side_by_side(self.here, self.data, self.scores.get("base_answers", ()), tuned)

    def unit_records(self, folder: Path) -> tuple[UnitRecord, ...]:
        """How often each part of the model trained, and how far what lies in `folder` moved it."""
        run, base = self.run, Checkpoint(local_folder(self.plan.job.model))
        steps = (
            run.lisa.steps if run.lisa else dict.fromkeys(trained_units(run.model, run.parts, self.training), run.step)
        )
        changes = unit_changes(folder, base, run.model, run.parts, self.training)
        return tuple(
            UnitRecord(
                unit=unit,
                steps=steps.get(unit, 0),
                relative_change=changes.get(unit, 0.0) if self.training.folds else None,
            )
            for unit in units(run.model, run.parts)
        )

    def base_facts(self) -> dict[str, Any]:
        """The fields of the result that say what the base did, and as what both were scored."""
        test, rounding = self.scores["base_test"], self.training.quantize_aware
        return {
            "base_valid": Metrics.model_validate(self.scores["base_valid"]),
            "base_test": Metrics.model_validate(test) if test else None,
            "base_kept": self.scores.get("base_kept", ""),
            "scored_as": rounding.name if rounding else "",
        }

    def step_facts(self) -> dict[str, Any]:
        """The fields of the result that say how the steps went."""
        run = self.run
        return {
            "steps": run.step,
            "trained_parameters": sum(p.numel() for _, p in run.chosen),
            "trained_tokens": run.tokens,
            "micro_batches": run.micro_batches,
            "padding": round(1 - run.tokens / run.padded_tokens, 4),
            "seconds": round(self.seconds, 2),
            "tokens_per_second": round(run.tokens / self.seconds, 1),
            "loss_curve": tuple(run.curve),
            **facts(self.stopping),
            "cut_rows": sum(sample.cut_tokens > 0 for sample in self.data.train),
            "prefix_cache": str(self.prefix.cache.path.parent) if self.prefix else "",
            "prefix_seconds": self.prefix.seconds if self.prefix else 0.0,
            "skipped_steps": run.skipped_steps,
            "resumed_at": tuple(self.resumed),
        }

    def memory_facts(self) -> dict[str, Any]:
        """The fields of the result that say what the plan promised and what was taken."""
        again, lisa = bool(self.resumed), self.run.lisa
        return {
            "deviations": (*self.deviations, *above(self.here, self.phases, going_on=again)),
            "predicted_peak_bytes": promise(self.here, going_on=again),
            "predicted_expected_bytes": max(phase.expected_bytes for phase in self.here.phases),
            "measured_peak_bytes": max(self.phases.values()),
            "phase_peak_bytes": self.phases,
            "process_peak_bytes": self.process_peaks,
            "interval_peak_bytes": tuple(self.interval_peaks),
            "interval_optimizer_bytes": () if lisa is None else tuple(lisa.optimizer_bytes),
        }
