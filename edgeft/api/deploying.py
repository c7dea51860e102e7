"""How does a merged checkpoint become a bundle from Python, and how is a bundle run and verified?"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.api import current, folders
from edgeft.api.results import Bundle, Merged, OnDisk, place
from edgeft.documents import sha256_file, sha256_json
from edgeft.errors import BadInput, ParityFailed, of_exit_code
from edgeft.exporting import bundle as bundles
from edgeft.machines.extras import need
from edgeft.machines.runner import runner_module
from edgeft.merging import result as merges
from edgeft.models.headers import lies_beside
from edgeft.progress import Progress, Say, quiet, silent, with_time_left
from edgeft.settings.job import AUTO
from edgeft.units import parse_bytes

if TYPE_CHECKING:
    from edgeft.memory.export_time import Timed
    from edgeft.targets.target import Target


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
    source = merged.folder if isinstance(merged, OnDisk) else Path(merged)
    record = source / "merged.json"
    job = planned_job(source)
    asked, device = target or job.get("target", AUTO), device or job.get("device")
    beside = lies_beside(source) is not None
    found, climbs, same_size = _wanted(asked, promote, repair, beside=beside)
    found = cached(found, source, device)
    limit = parse_bytes(size_budget) if isinstance(size_budget, str) else size_budget
    folder = Path(out) if out is not None else source.parent / "bundle"
    read = sha256_file(Path(calibration)) if calibration and Path(calibration).is_file() else calibration
    targets = [json.loads(each.model_dump_json()) for each in found]
    request = sha256_json([targets, same_size, limit, read]) if climbs else ""
    if _exported(folder, source, request or targets[0], limit, device, say):
        say(f"{folder} is up to date")
    else:
        current.replaceable(folder, "bundle.json")
        folders.refuse_others_bundle(folder, source)
        need("export")
        from edgeft.exporting.repair import check_calibration, export_named, export_smallest
        from edgeft.exporting.room import less_room

        check_calibration(found, calibration)
        plan = merges.MergedCheckpoint.read(record).train.plan
        if less := less_room(plan):
            say(less)
        told = with_time_left(progress, planned_seconds(plan.stages.export, climbs=climbs))
        common: dict[str, Any] = {
            "device": device, "progress": told, "size_budget_bytes": limit, "calibration": calibration, "train": train,
        }  # fmt: skip
        if climbs:
            export_smallest(source, found, folder, asked=asked, request_sha256=request, same_size=same_size, **common)
        else:
            named = f"--target {shlex.quote(asked)}" + (f" --promote {','.join(promote)}" if promote else "")
            export_named(source, found[0], folder, asked=named, **common)
    made = Bundle.at(folder / "bundle.json", bundles.Bundle.read(folder / "bundle.json"))
    made._merged = merges.MergedCheckpoint.read(record)
    from edgeft.reporting.model_card import merged_card, write_card

    write_card(source, merged_card(source, made._merged, made))
    return made


def planned_job(merged: Path) -> dict[str, Any]:
    """The settings that a merged folder was planned with; {} of one that edgeft did not train."""
    train = json.loads((merged / "merged.json").read_text(encoding="utf-8")).get("train")
    return dict(train["plan"]["job"]) if train else {}


def planned_seconds(stages: Sequence[Timed], *, climbs: bool) -> dict[str, float]:
    """Of each stage of an export, as it was planned; those of a climb only where there is one."""
    return {each.stage: each.seconds for each in stages if climbs or not each.stage.startswith("repair")}


def cached(targets: Sequence[Target], merged: Path, device: str | None) -> tuple[Target, ...]:
    """The targets with the KV cache that the plan asks for, on this device. Raises BadInput for one that cannot."""
    from edgeft.models.spec import read_model_spec
    from edgeft.planning.stage_checks import target_device
    from edgeft.targets.footprint import choose_cache

    profile, asked = target_device(device), planned_job(merged).get("kv_bits", AUTO)
    spec, has = read_model_spec(str(merged)), profile.budget_bytes if profile else None
    return tuple(choose_cache(each, spec, asked, has) for each in targets)


def _wanted(
    asked: str, promote: Sequence[str], repair: str | None, *, beside: bool
) -> tuple[tuple[Target, ...], bool, bool]:
    """(what an export may end in, whether it climbs, whether all must be of about the size of the first)."""
    from edgeft.targets.target import calibrated, candidates, promoted

    if repair not in (None, "none", "auto"):
        raise BadInput("--repair", f"must be none or auto, got {repair!r}")
    found = candidates(asked, beside=beside)
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
