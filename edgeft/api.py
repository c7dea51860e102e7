"""What can a program ask of edgeft? Each stage as a function that does nothing twice and gives what it wrote.

    plan = edgeft.plan(model="folder", data="rows.jsonl", profile="t4", rank=16)   # print(plan) is the table
    trained = edgeft.train(plan, "build/t4/train")
    merged = edgeft.merge(trained, wise_alpha=0.6)
    bundle = edgeft.export(merged, target="ort-int4", device="raspberrypi5-8gb")

A result is the stage's JSON document, knows its folder and shows itself as the command line would. Where a result is
taken, its folder or file does too. `progress` and `say` get what the command line prints to stderr; errors are
edgeft.errors.EdgeftError.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeft import current, processes
from edgeft.documents import sha256_file, sha256_json
from edgeft.errors import BadInput, EdgeftError, ParityFailed, of_exit_code
from edgeft.exporting import bundle as bundles
from edgeft.merging import result as merges
from edgeft.models.identity import cached_folder
from edgeft.models.layer_shares import Shares, parse_shares
from edgeft.planning import plan as plans
from edgeft.progress import Progress, Say, quiet, silent
from edgeft.results import Bundle, Merged, MergedForeign, OnDisk, Plan, TrainResult
from edgeft.settings import ALL_THAT_FIT, AUTO, Job, make_job
from edgeft.targets.runner import runner_module
from edgeft.training import result as trainings
from edgeft.units import parse_bytes, show_seconds

if TYPE_CHECKING:
    from edgeft.models.metrics import Sweep
    from edgeft.reporting.summary import Summary
    from edgeft.targets.target import Target
    from edgeft.training.result import Trial


@dataclass(frozen=True)
class SweepOptions:
    """How a merge finds its share itself: see `edgeft.merging.sweep.sweep`."""

    select: Literal["best", "bounded", "fixed"] = "best"
    general: str | None = None
    max_general_increase_nats: float | None = None
    golden: bool = False
    target: str = "ort-int4"
    groups: int = 1


def place(result: OnDisk | str | Path, document: str) -> Path:
    """The folder of a stage, of its result or of its name. Raises BadInput where the stage has not run."""
    folder = result.folder if isinstance(result, OnDisk) else Path(result)
    if folder.name == document:
        folder = folder.parent
    if not (folder / document).is_file():
        raise BadInput(folder / document, "no such file", "run the stage before this one first")
    return folder


def plan(
    *, out: str | Path | None = None, simulate: bool = False, progress: Progress = silent, say: Say = quiet,
    **settings: object,
) -> Plan:  # fmt: skip
    """How to train inside a profile's memory; `settings` are those of `edgeft show settings`, `model` at least.

    With `out` it is written there as plan.json, or read where it is current. Needs no torch, except for layers that
    are chosen by what they do on the data. Raises BadInput, and DoesNotFit when nothing fits.
    """
    from edgeft.planning.candidates import needs_importance

    job = make_job(**settings)
    path = None if out is None else Path(out)
    if path is not None and (old := _current_plan(job, path, simulate)) is not None:
        say(f"{path} is up to date")
        return old
    importance = None
    if needs_importance(job):
        from edgeft.planning.layer_scores import score_layers

        importance = score_layers(job, progress)
    made = plans.make_plan(job, importance=importance)
    if simulate:
        from edgeft.simulation.simulate import simulate as run_step

        say("simulating the step")
        made = made.model_copy(update={"simulation": run_step(made.spec, made.training, made.work)})
    if path is not None:
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
    target: str | None = None, progress: Progress = silent, say: Say = quiet,
) -> TrainResult:  # fmt: skip
    """Carry out a plan into `out` (train/ beside plan.json when absent), or go on from its last checkpoint.

    A result that is current is read. With `rehearsal`, two layers go the whole way to the bundle first: what cannot
    become one (`target`; the plan's when absent) fails before the first step. Raises as `training.train.train` does.
    """
    plan_file = _plan_file(plan, out)
    made, digest = plans.Plan.read(plan_file), sha256_file(plan_file)
    folder = Path(out) if out is not None else plan_file.parent / "train"
    record = folder / "train.json"
    if (old := current.held(record, digest)) and current.same_training(folder, old, say):
        say(f"{folder} is up to date")
        return TrainResult.at(record, trainings.TrainResult.read(record))
    current.replaceable(folder, "train.json")
    from edgeft.exporting.rehearsal import rehearse
    from edgeft.reporting.terminal import rehearsal_line
    from edgeft.targets.target import candidates
    from edgeft.training.prepare import choose_device
    from edgeft.training.train import MORE_MEMORY, work_folder
    from edgeft.training.train import train as carry_out

    _, _, deviations = choose_device(made, device)
    _announce(made, deviations, say)
    rehearsed = trainings.NOT_REHEARSED
    if rehearsal:
        named = made.job.target if target in (None, ALL_THAT_FIT) else target
        rehearsed = rehearse(made, candidates(str(named))[0], work_folder(folder), digest)
        say(rehearsal_line(rehearsed))
    result = carry_out(made, folder, plan_sha256=digest, progress=progress, wanted_device=device, rehearsal=rehearsed)
    for deviation in result.deviations:
        if deviation.what == MORE_MEMORY:
            say(f"WARNING: training took {deviation.done}, {deviation.planned} were planned: report this plan.json")
    return TrainResult.at(record, result)


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


def _announce(made: plans.Plan, deviations: Sequence[trainings.Deviation], say: Say) -> None:
    """What is about to run: estimates where it runs as planned, warnings where it does not."""
    from edgeft.machines.profile import why_absent

    if deviations:
        say(f"WARNING: profile {made.profile.name}: {why_absent(made.profile)}.")
        changes = ", ".join(f"{d.what} {d.done} instead of {d.planned}" for d in deviations)
        say(f"WARNING: the same plan runs on this machine's CPU, much slower: {changes}. It is recorded in train.json.")
    else:
        each = show_seconds(made.seconds_per_step)
        scoring = f"and {show_seconds(made.scoring_seconds)} of scoring before and after it"
        say(f"about {show_seconds(made.seconds)} of training ({each} a step) {scoring} are estimated")
    if made.lengths is not None:
        say("; ".join([f"{made.lengths.path}: {made.lengths.line}", *made.lengths.remarks]))


def merge(
    trained: TrainResult | str | Path, out: str | Path | None = None, *, wise_alpha: float | str = 1.0,
    base: str | None = None, sweep: SweepOptions | None = None, progress: Progress = silent, say: Say = quiet,
    swept: Any = None,
) -> Merged | MergedForeign:  # fmt: skip
    """Base and fine-tune as one standard checkpoint: W0 + wise_alpha (Wft - W0), tensor by tensor.

    `wise_alpha` may differ by layers ("0-3=0.5,rest=1"); with `sweep` it is measured and chosen. `base` is for an
    adapter or checkpoint that edgeft did not train. A result that is current is read. Raises as `merging.merge.merge`.
    """
    source = trained.folder if isinstance(trained, OnDisk) else Path(trained)
    folder = Path(out) if out is not None else source.parent / "merged"
    shares, digest = parse_shares(str(wise_alpha)), current.merge_digest(source, base)
    request = _sweep_request(digest, shares, sweep, base) if sweep else ""
    record = folder / "merged.json"
    old = current.held(record, digest)
    taken = Shares(rest=old.get("wise_alpha", -1.0), groups=tuple(old.get("groups", ())))
    same = (old.get("sweep") or {}).get("request_sha256") == request if sweep else taken == shares
    if old and same and current.same_merge(folder, old, say):
        say(f"{folder} is up to date")
        return _read_merged(record, "train" in old)
    current.replaceable(folder, "merged.json")
    from edgeft.merging.merge import merge as blend_all

    found = _sweep(source, sweep, shares, request, progress) if sweep else None
    if found is not None and swept is not None:
        swept(found)
    alpha = Shares(rest=found.wise_alpha, groups=found.groups) if found else shares
    blend_all(source, folder, wise_alpha=alpha, progress=progress, base=base, input_sha256=digest, sweep=found)
    return _read_merged(record, (source / "train.json").is_file() and base is None)


def _read_merged(record: Path, own: bool) -> Merged | MergedForeign:
    if own:
        return Merged.at(record, merges.MergedCheckpoint.read(record))
    return MergedForeign.at(record, merges.MergedForeign.read(record))


def _sweep_request(digest: str, shares: Shares, sweep: SweepOptions, base: str | None) -> str:
    """One hash of what a sweep is asked. Raises BadInput for what cannot be swept."""
    if shares.groups:
        raise BadInput("--wise-alpha", "a sweep takes one share to measure as well", "search groups with --groups")
    if base is not None:
        raise BadInput("--sweep", "needs the validation rows of `edgeft train`", "leave out --base")
    if sweep.select not in ("best", "bounded", "fixed"):
        raise BadInput("--select", f"must be best, bounded or fixed, got {sweep.select!r}")
    general = sweep.general
    texts = sha256_file(Path(general)) if general and Path(general).is_file() else ""
    return sha256_json([digest, vars(sweep) | {"wise_alpha": shares.rest}, texts])


def _sweep(source: Path, sweep: SweepOptions, shares: Shares, request: str, progress: Progress) -> Sweep:
    from edgeft.merging.sweep import sweep as measure
    from edgeft.targets.target import load_target

    options = {name: value for name, value in vars(sweep).items() if name != "target"}
    return measure(
        source, load_target(sweep.target), **options, wise_alpha=shares.rest, request_sha256=request, progress=progress
    )


def export(
    merged: Merged | str | Path, out: str | Path | None = None, *, target: str | None = None,
    device: str | None = None, promote: Sequence[str] = (), repair: str | None = None,
    size_budget: int | str | None = None, calibration: str | None = None, train: Path | None = None,
    progress: Progress = silent, say: Say = quiet,
) -> Bundle:  # fmt: skip
    """The on-device bundle of a merged checkpoint, proven to be what was trained; a current one is read.

    `target` is a name, a TOML file, or "auto" (the plan's when absent): the smallest that keeps the fine-tune within
    `size_budget` (bytes, or "5MiB") and `device`. With repair="auto" a named target may become 1.1 times its size.
    `train` is the folder that was merged, where `merged` does not say. Raises ParityFailed, DoesNotFit, BadInput.
    """
    from edgeft.exporting.repair import check_calibration, export_named, export_smallest

    source = merged.folder if isinstance(merged, OnDisk) else Path(merged)
    record = source / "merged.json"
    job = planned_job(source)
    asked, device = target or job.get("target", AUTO), device or job.get("device")
    found, climbs, same_size = _wanted(asked, promote, repair)
    limit = parse_bytes(size_budget) if isinstance(size_budget, str) else size_budget
    folder = Path(out) if out is not None else source.parent / "bundle"
    read = sha256_file(Path(calibration)) if calibration and Path(calibration).is_file() else calibration
    targets = [json.loads(each.model_dump_json()) for each in found]
    request = sha256_json([targets, same_size, limit, read]) if climbs else ""
    if _exported(folder, source, request or targets[0], limit, device, say):
        say(f"{folder} is up to date")
    else:
        current.replaceable(folder, "bundle.json")
        check_calibration(found, calibration)
        common: dict[str, Any] = {
            "device": device, "progress": progress, "size_budget_bytes": limit, "calibration": calibration,
            "train": train,
        }  # fmt: skip
        if climbs:
            export_smallest(source, found, folder, asked=asked, request_sha256=request, same_size=same_size, **common)
        else:
            named = f"--target {shlex.quote(asked)}" + (f" --promote {','.join(promote)}" if promote else "")
            export_named(source, found[0], folder, asked=named, **common)
    made = Bundle.at(folder / "bundle.json", bundles.Bundle.read(folder / "bundle.json"))
    made._merged = merges.MergedCheckpoint.read(record)
    return made


def planned_job(merged: Path) -> dict[str, Any]:
    """The settings that a merged folder was planned with; {} of one that edgeft did not train."""
    train = json.loads((merged / "merged.json").read_text(encoding="utf-8")).get("train")
    return dict(train["plan"]["job"]) if train else {}


def _wanted(asked: str, promote: Sequence[str], repair: str | None) -> tuple[tuple[Target, ...], bool, bool]:
    """(what an export may end in, whether it climbs, whether all must be of about the size of the first)."""
    from edgeft.targets.target import calibrated, candidates, promoted

    if repair not in (None, "none", "auto"):
        raise BadInput("--repair", f"must be none or auto, got {repair!r}")
    found = candidates(asked)
    if len(found) > 1:
        if promote or repair == "none":
            hint = "name a target: --target ort-int4"
            raise BadInput("--promote" if promote else "--repair none", "is for a target that is named", hint)
        return found, True, False
    target = promoted(found[0], list(promote))
    better = calibrated(target) if repair == "auto" else None
    return (target, better) if better else (target,), repair == "auto", repair == "auto"


def _exported(
    folder: Path, merged: Path, wanted: str | dict[str, Any], limit: int | None, device: str | None, say: Say
) -> bool:
    """Whether a folder's bundle is what was asked for (a request's hash, or a target) and still as recorded."""
    from edgeft.machines.profile import load_profile

    held = current.held(folder / "bundle.json", sha256_file(merged / "merged.json"))
    if not held or held.get("failed"):
        return False
    asked = (held.get("repair") or {}).get("request_sha256") if isinstance(wanted, str) else held["target"]
    small = limit is None or held["size_bytes"] + (folder / "bundle.json").stat().st_size <= limit
    device_name = load_profile(device).name if device else ""
    if asked != wanted or not small or held["provenance"]["device"] != device_name:
        return False
    return current.same_bundle(folder, held, merged, say)


def report(run: OnDisk | str | Path, out: str | Path | None = None) -> list[Path]:
    """One page on a plan and the stages after it: the paths of HTML, Markdown and JSON that were written."""
    from edgeft.reporting.pages import write_report

    source = run.path if isinstance(run, OnDisk) else Path(run)
    source = source / "plan.json" if source.is_dir() else source
    return write_report(summary(source), Path(out) if out is not None else source.parent / "report.html")


def summary(plan_file: Path) -> Summary:
    """What a report on a plan and the stages after it says, beside every device that edgeft ships a profile of."""
    from edgeft.reporting.matrix import find_profiles
    from edgeft.reporting.read_run import read_run
    from edgeft.reporting.summary import summarise

    devices = [profile for profile in find_profiles("all") if "deploy" in profile.roles]
    return summarise(read_run(plan_file), sorted(devices, key=lambda profile: profile.budget_bytes))


def run(
    bundle: Bundle | str | Path, prompt: str, *, max_tokens: int | None = None, system: str | None = None,
    adapter: str | None = None,
) -> str:  # fmt: skip
    """A bundle's greedy answer to one prompt, on this machine, by edgeft's own run.py.

    A chat model gets it as the user's message behind `system`: the one that was trained when absent, none for "".
    """
    runner = runner_module()
    folder = place(bundle, "bundle.json")
    wanted = {"--max-tokens": max_tokens, "--system": system, "--adapter": adapter}
    given = [part for name, value in wanted.items() if value is not None for part in (name, str(value))]
    try:
        options = runner.parse([*given, "--bundle", str(folder)])
        model = runner.ready(folder, options)
        made = runner.reply(model, options, runner.prompt_ids(model, options, runner.Asked(prompt)))
    except runner.RunError as problem:
        raise of_exit_code(problem.exit_code, problem.where, problem.problem, problem.hint) from None
    return str(made["text"])


def verify(
    bundle: Bundle | str | Path, *, public_key: str | Path | None = None, replay: bool = True, say: Say = quiet
) -> None:
    """Compare every file of a bundle with its hash, and its golden vectors with what it answers here.

    With `public_key` (a PEM file) it must be signed by that key. Raises ParityFailed naming all that differs.
    """
    runner = runner_module()
    folder, notes = place(bundle, "bundle.json"), list[str]()
    try:
        trusted = runner.read_public_key(Path(public_key)) if public_key is not None else None
        problems = runner.verify(folder, trusted, replay, notes)
    except runner.RunError as problem:
        raise of_exit_code(problem.exit_code, problem.where, problem.problem, problem.hint) from None
    for note in notes:
        say(f"note: {note}")
    if problems:
        raise ParityFailed(folder, "not what was exported\n" + "\n".join(problems))
