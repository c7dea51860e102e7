"""How is a plan made, tried and carried out from Python? Each does nothing twice and gives what it wrote."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.api import current, folders
from edgeft.api.results import OnDisk, Plan, TrainResult
from edgeft.documents import sha256_file
from edgeft.errors import BadInput, EdgeftError, of_exit_code
from edgeft.machines import processes
from edgeft.machines.extras import need
from edgeft.models.identity import cached_folder
from edgeft.planning import plan as plans
from edgeft.progress import Progress, Say, quiet, silent
from edgeft.settings.job import ALL_THAT_FIT, Job, make_job
from edgeft.training import result as trainings
from edgeft.units import show_seconds

if TYPE_CHECKING:
    from edgeft.training.result import Trial


def plan(
    *, out: str | Path | None = None, simulate: bool = False, job_file: Path | None = None,
    progress: Progress = silent, say: Say = quiet, **settings: object,
) -> Plan:  # fmt: skip
    """How to train inside a profile's memory; `settings` are those of `edgeft show settings`, `model` at least.

    With `out` it is written there as plan.json, or read where it is current; it has the hash of `job_file`. Needs no
    torch, except for layers that are chosen by what they do on the data. Raises BadInput, also where `out` would
    replace the plan of another job that has results beside it, and DoesNotFit when nothing fits.
    """
    from edgeft.planning.job_checks import needs_importance

    job = make_job(**settings)
    path = None if out is None else Path(out)
    if path is not None and (old := _current_plan(job, path, simulate)) is not None:
        say(f"{path} is up to date")
        return old
    importance = None
    if needs_importance(job):
        need("train")
        from edgeft.planning.layer_scores import score_layers

        importance = score_layers(job, progress)
    made = plans.make_plan(job, importance=importance, compare_tuners=True)
    if job_file is not None:
        made = made.model_copy(update={"job_file_sha256": sha256_file(job_file)})
    if simulate:
        need("train")
        from edgeft.simulation.simulate import simulate as run_step

        say("simulating the step")
        made = made.model_copy(update={"simulation": run_step(made.spec, made.training, made.work)})
    if path is not None:
        folders.refuse_others_plan(path, made)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise BadInput(path, f"cannot write: {problem.strerror}", "choose another place with --out") from None
        made.write(path)
    return Plan.at(path, made)


def _current_plan(job: Job, path: Path, simulate: bool) -> Plan | None:
    try:
        old = plans.Plan.read(path)
    except EdgeftError:
        return None
    digest = plans.request_digest(job, cached_folder(job.model))
    return Plan.at(path, old) if old.request_sha256 == digest and (old.simulation or not simulate) else None


def try_plan(plan_file: Path, say: Say = quiet) -> Trial:
    """The plan's own steps with random weights, measured in a process of their own, whose memory is theirs alone."""
    from edgeft.training.result import Trial

    need("train")
    out = plan_file.with_name("trial.json")
    say("measuring the plan's steps with random weights")
    done = subprocess.run(
        processes.command("from edgeft.training.try_plan import main; main()", plan_file, out), check=False
    )
    if done.returncode:
        raise of_exit_code(done.returncode, plan_file, "its trial ended early: see above")
    return Trial.read(out)


def train(
    plan: Plan | str | Path, out: str | Path | None = None, *, device: str | None = None, rehearsal: bool = True,
    target: str | None = None, runs_on: str | None = None, smaller: bool = False, track: Sequence[str] = (),
    progress: Progress = silent, say: Say = quiet,
) -> TrainResult:  # fmt: skip
    """Carry out a plan into `out` (train/ beside plan.json when absent), or go on from its last checkpoint.

    `smaller`: after memory ran out, in the next smaller way that trains the same. A result that is current is read.
    `track` names trackers that are told each step and the scores (`edgeft.training.tracking`).
    `device`: cpu, cuda or mps; where the plan cannot run on it, nothing runs. With `rehearsal`, two layers go the whole
    way to the bundle first: what cannot become one (`target`, on the device `runs_on`; the plan's when absent) fails
    before the first step. Raises as `training.train.train` does.
    """
    from edgeft.training.tracking import check_trackers, tracking, watch_of

    check_trackers(track)
    plan_file = _plan_file(plan, out)
    made, digest = plans.Plan.read(plan_file), sha256_file(plan_file)
    folder = Path(out) if out is not None else plan_file.parent / "train"
    record = folder / "train.json"

    def is_current() -> bool:
        old = current.held(record, digest)
        return bool(old) and current.same_training(folder, old, say)

    several = made.training.processes > 1  # one of them looks, for all
    if not several and is_current():
        say(f"{folder} is up to date")
        return TrainResult.at(record, trainings.TrainResult.read(record))
    need("train")
    from edgeft.training.join import together
    from edgeft.training.prepare import choose_device
    from edgeft.training.train import train as carry_out

    here, _, deviations = choose_device(made, device)
    with together(made, here, plan_file) as ranks:
        say = say if ranks.first else quiet
        if several and ranks.told(is_current):
            ranks.part()
            say(f"{folder} is up to date")
            return TrainResult.at(record, trainings.TrainResult.read(record))
        rehearsed = trainings.NOT_REHEARSED
        if ranks.first:
            current.replaceable(folder, "train.json")
            folders.refuse_others_training(folder, made)
            _announce(made, deviations, say, rehearsal=rehearsal)
            if smaller:
                _step_down(made, folder, digest, say)
            if rehearsal:
                rehearsed = _rehearse(made, folder, digest, (target, runs_on), progress, say)
        with tracking(track if ranks.first else (), made, folder, say) as tracker:
            ranks.wait()
            result = carry_out(
                made, folder, plan_sha256=digest, progress=progress, wanted_device=device, rehearsal=rehearsed,
                ranks=ranks, watch=watch_of(tracker),
            )  # fmt: skip
            if tracker:
                tracker.scores(result)
    _warn(result, say)
    return TrainResult.at(record, result)


def _warn(result: trainings.TrainResult, say: Say) -> None:
    """Say where a run took more memory than was planned."""
    from edgeft.training.promise import MORE_MEMORY

    for deviation in result.deviations:
        if deviation.what == MORE_MEMORY:
            say(f"WARNING: training took {deviation.done}, {deviation.planned} were planned: report this plan.json")


def _step_down(made: plans.Plan, folder: Path, digest: str, say: Say) -> None:
    """Let the run go on in the next smaller way."""
    from edgeft.training.step_down import step_down, taken, told
    from edgeft.training.work import work_folder

    before = taken(work_folder(folder), made, digest).plan
    say(told(before, step_down(work_folder(folder), made, digest)))


def _rehearse(
    made: plans.Plan, folder: Path, digest: str, asked: tuple[str | None, str | None], progress: Progress, say: Say
) -> trainings.Rehearsal:
    """Let two layers go the whole way to the bundle, of a target and for a device, the plan's where none is asked."""
    from edgeft.exporting.rehearsal import rehearse
    from edgeft.planning.stage_checks import on_device, target_device
    from edgeft.reporting.words import rehearsal_line
    from edgeft.targets.footprint import choose_cache
    from edgeft.targets.target import candidates
    from edgeft.training.work import work_folder

    target, runs_on = asked
    named, device = made.job.target if target in (None, ALL_THAT_FIT) else target, target_device(runs_on)
    has = device.budget_bytes if device else made.stages.target_bytes
    first = candidates(str(named), beside=not made.training.folds)[0]
    cached = choose_cache(first, made.spec, made.job.kv_bits, has)
    if device is not None:
        on_device(made.spec, made.training, cached, device.budget_bytes)
    progress("rehearse", 0, 1, {})
    rehearsed = rehearse(made, cached, work_folder(folder), digest)
    say(rehearsal_line(rehearsed))
    return rehearsed


def _plan_file(plan: Plan | str | Path, out: str | Path | None) -> Path:
    """The file of a plan; one that lies in none is written beside what it will train."""
    if not isinstance(plan, plans.Plan):
        path = Path(plan)
        return path / "plan.json" if path.is_dir() else path
    if isinstance(plan, OnDisk) and plan._path is not None and plans.Plan.read(plan._path) == _bare(plan):
        return plan._path
    if out is None:
        raise BadInput("train", "the plan lies in no file", "give out=, the folder to train into")
    path = Path(out).parent / "plan.json"
    if not path.is_file() or plans.Plan.read(path) != _bare(plan):
        path.parent.mkdir(parents=True, exist_ok=True)
        plan.write(path)
    return path


def _bare(plan: plans.Plan) -> plans.Plan:
    return plans.Plan.model_construct(plan.model_fields_set, **dict(plan))


def _announce(made: plans.Plan, deviations: Sequence[trainings.Deviation], say: Say, *, rehearsal: bool) -> None:
    """What is about to run: estimates where it runs as planned, warnings where it does not."""
    from edgeft.machines.profile import why_absent
    from edgeft.reporting.words import data_text

    if deviations:
        say(f"WARNING: profile {made.profile.name}: {why_absent(made.profile)}.")
        changes = ", ".join(f"{d.what} {d.done} instead of {d.planned}" for d in deviations)
        say(f"WARNING: the same plan runs on this machine's CPU, much slower: {changes}. It is recorded in train.json.")
    else:
        each = show_seconds(made.seconds_per_step)
        scoring = f"and {show_seconds(made.scoring_seconds + made.answering_seconds)} of scoring before and after it"
        first = made.stages.rehearsal_seconds if rehearsal else 0.0
        scoring += f", and {show_seconds(first)} of a rehearsal where none is kept," if first else ""
        say(f"about {show_seconds(made.seconds)} of training ({each} a step) {scoring} are estimated")
    if made.lengths is not None:
        say("; ".join([f"{made.lengths.path}: {data_text(made)}", *made.lengths.remarks]))
