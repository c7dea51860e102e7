"""What does each stage take on the command line? From a plan to a bundle; the functions behind are in edgeft.api."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeft.api import current, deploying, merging, plan_and_train
from edgeft.cli import next_steps
from edgeft.cli.options import DeviceOption, TrackOption
from edgeft.cli.screen import (
    JsonOption,
    OutOption,
    Reporter,
    need,
    part_of_job,
    say,
    show,
    stderr,
    stopping,
)
from edgeft.documents import sha256_file
from edgeft.errors import BadInput
from edgeft.planning.plan import Plan
from edgeft.settings.job import ALL_THAT_FIT
from edgeft.units import show_bytes

if TYPE_CHECKING:
    from edgeft.exporting.bundle import Bundle
    from edgeft.models.metrics import Sweep
    from edgeft.targets.target import Target


def train(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json as `edgeft plan` wrote it")],
    out: OutOption = None,
    on: Annotated[
        str | None,
        typer.Option(
            help="refuse unless the plan is for this machine, and runs on it here: its profile, or cpu, cuda, mps"
        ),
    ] = None,
    device: DeviceOption = None,
    rehearsal: Annotated[
        bool, typer.Option(help="first let two layers go the whole way to the bundle: what it cannot be fails now")
    ] = True,
    target: Annotated[
        str | None,
        typer.Option(help="what the rehearsal exports to: a name in export/, or a TOML file; the plan's when absent"),
    ] = None,
    smaller: Annotated[
        bool, typer.Option("--smaller", help="after memory ran out: go on in the next smaller way that trains the same")
    ] = False,
    track: TrackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Carry out a plan. A killed run goes on from its last checkpoint when the same command runs again."""
    from edgeft.machines.limits import settle_allocator

    plan_file = plan_file / "plan.json" if plan_file.is_dir() else plan_file
    made = Plan.read(plan_file)
    settle_allocator(made.training.device)  # before anything imports torch
    with stopping("what was done is kept: run the same command again to go on"), Reporter(stderr) as progress:
        progress.budget_bytes = made.budget_bytes
        result = plan_and_train.train(
            plan_file, out, device=_computes(on, made), runs_on=device, rehearsal=rehearsal, target=target,
            smaller=smaller, track=track or (), progress=progress, say=say,
        )  # fmt: skip
    show(as_json, result, result.text())
    next_steps.after_train(result.folder)


def _computes(on: str | None, made: Plan) -> str | None:
    """The PyTorch device that `--on` asks for. Raises BadInput where the plan is for another machine."""
    if on is None or on in ("cpu", "cuda", "mps"):
        return on
    from edgeft.machines.profile import load_profile

    wanted = load_profile(on)
    if wanted.name != made.profile.name:
        hint = f"leave --on out, or plan for it: edgeft plan {shlex.quote(made.job.model)} --on {shlex.quote(on)}"
        raise BadInput("--on", f"the plan is for {made.profile.name}, not {wanted.name}", hint)
    return wanted.device


def merge(
    trained: Annotated[
        Path, typer.Argument(metavar="TRAIN", help="folder that `edgeft train` wrote, or any PEFT adapter's")
    ],
    wise_alpha: Annotated[
        str, typer.Option(help="share of the change that is taken: 0 base, 1 fine-tuned; by layers: 0-3=0.5,rest=1")
    ] = "1",
    base: Annotated[
        str | None, typer.Option(help="base model, for an adapter or checkpoint that edgeft did not train")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="measure shares from 0 to 1 and choose one")] = False,
    select: Annotated[
        str | None, typer.Option(help="best: on the task; bounded: best that keeps general text; fixed: --wise-alpha")
    ] = None,
    general: Annotated[str | None, typer.Option(help="data file of text as the base knows it, for --sweep")] = None,
    max_general_increase: Annotated[
        float | None,
        typer.Option(help="nats per token that general text may lose under --select bounded; half of what 1 costs"),
    ] = None,
    groups: Annotated[int, typer.Option(help="--sweep also searches a share for each of so many groups of layers")] = 1,
    golden: Annotated[bool, typer.Option("--golden", help="search the share, instead of every tenth")] = False,
    target: Annotated[str | None, typer.Option(help="whose rounding --sweep simulates; ort-int4")] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw the sweep, as an SVG file")] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge base and fine-tune into a standard checkpoint folder, tensor by tensor."""
    if not sweep and any((select, general, max_general_increase, golden, target, plot, groups > 1)):
        raise BadInput("--select, --general, --groups, --golden, --target, --plot", "belong to a sweep", "add --sweep")
    options: Any = {
        "select": select, "general": general, "max_general_increase_nats": max_general_increase, "golden": golden,
        "target": target, "groups": groups,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    trained = part_of_job(trained, "train/train.json")
    with Reporter(stderr) as progress:
        made = merging.merge(
            trained, out, wise_alpha=wise_alpha, base=base, sweep=merging.SweepOptions(**given) if sweep else None,
            progress=progress, say=say, swept=lambda found: _show_sweep(found, plot),
        )  # fmt: skip
    show(as_json, made, made.text())
    next_steps.after_merge(made)


def _show_sweep(found: Sweep, plot: Path | None) -> None:
    """The table goes to stderr, since stdout is the merge's."""
    from edgeft.reporting.terminal import sweep_text

    if plot is not None:
        from edgeft.reporting.sweep_charts import plot_sweep

        plot_sweep(found, plot)
    stderr.print(sweep_text(found))


def survival(
    merged: Annotated[Path, typer.Argument(metavar="MERGED", help="folder that `edgeft merge` wrote")],
    target: Annotated[str, typer.Option(help="whose rounding: a name in export/, or a TOML file")] = "ort-int4",
    base: Annotated[str | None, typer.Option(help="base model, when merged.json does not name it")] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw it, as an SVG file")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file; default survival.json beside MERGED")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say how much of a fine-tune survives a target's rounding, and which tensors lose most of it."""
    from edgeft.merging.survival import survival as run
    from edgeft.reporting.terminal import survival_text
    from edgeft.targets.target import load_target

    with Reporter(stderr) as progress:
        found = run(merged, load_target(target), base=base, progress=progress)
    found.write(out or merged.parent / "survival.json")
    if plot is not None:
        from edgeft.reporting.sweep_charts import plot_survival

        plot_survival(found, plot)
    show(as_json, found, survival_text(found))


ExportTarget = Annotated[
    str | None,
    typer.Option(
        help="auto: the smallest that keeps the fine-tune; a name in export/ or a TOML file; all-that-fit: compare "
        "them; the plan's when absent"
    ),
]


def export(
    merged: Annotated[
        Path, typer.Argument(metavar="MERGED", help="folder that `edgeft merge` wrote; with --add a bundle of adapters")
    ],
    target: ExportTarget = None,
    device: DeviceOption = None,
    promote: Annotated[str | None, typer.Option(help="modules with 8 bits: layers.0,layers.3.mlp.down_proj")] = None,
    repair: Annotated[
        str | None,
        typer.Option(
            help="none: the target as it is; auto: what keeps the fine-tune, at most 1.1 times its size; none for a "
            "target that is named"
        ),
    ] = None,
    auto_promote: Annotated[bool, typer.Option("--auto-promote", hidden=True)] = False,
    size_budget: Annotated[str | None, typer.Option(help="most that the bundle may take, as in 5MiB")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="data file that codes and 8-bit tensors are chosen on; the training data when absent"),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="an encoder's: texts to prove it with, a line each or .jsonl")
    ] = None,
    trained: Annotated[
        Path | None, typer.Option("--train", help="the folder that was merged, where MERGED does not say where it lies")
    ] = None,
    add: Annotated[
        str | None, typer.Option(metavar="NAME=TRAIN", help="put one more LoRA adapter into the bundle, and no more")
    ] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build the on-device bundle and prove that it is what was trained (exit 4 when it is not).

    MERGED may be the folder of an encoder (classifier or embedding model), which a portable target takes as it is.
    """
    if add is not None:
        _add_adapter(part_of_job(merged, "bundle/bundle.json"), add, out, as_json)
        return
    merged = part_of_job(merged, "merged/merged.json")
    if _is_encoder(merged):
        _export_encoder(merged, target or "onnx-portable-fp32", out, texts, device, as_json)
        return
    need(merged / "merged.json", "edgeft merge TRAIN")
    if auto_promote:
        raise BadInput("--auto-promote", "is a part of repair now", "leave it out, or name a target with --repair auto")
    if target == ALL_THAT_FIT:
        if repair == "auto" or size_budget is not None or calibration is not None:
            hint = "name one target, or leave --repair, --size-budget and --calibration out"
            raise BadInput(f"--target {ALL_THAT_FIT}", "builds every target as it is", hint)
        _export_all(merged, out, device, trained, as_json)
        return
    with Reporter(stderr) as progress:
        bundle = deploying.export(
            merged, out, target=target, device=device, promote=[name for name in (promote or "").split(",") if name],
            repair=repair, size_budget=size_budget, calibration=calibration, train=trained, progress=progress, say=say,
        )  # fmt: skip
    show(as_json, bundle, bundle.text())
    next_steps.after_export(bundle, bundle.folder, learnt=bundle.learnt)


def _is_encoder(folder: Path) -> bool:
    if (folder / "merged.json").is_file():
        return False
    from edgeft.exporting.encoder import is_encoder

    return is_encoder(folder)


def _export_encoder(
    folder: Path, target: str, out: Path | None, texts: Path | None, device: str | None, as_json: bool
) -> None:
    from edgeft.exporting.encoder import export_encoder, read_texts
    from edgeft.targets.target import load_target

    if texts is None:
        raise BadInput("--texts", "is missing: an encoder is proven on real texts", "--texts FILE, a text on each line")
    out = out or folder.resolve().with_name(f"{folder.resolve().name}-bundle")
    current.replaceable(out, "bundle.json")
    made = export_encoder(folder, load_target(target), out, texts=read_texts(texts), device=device)
    proof = made.encoder_proof
    assert proof is not None
    labels = f", labels agree on {proof.label_agreement:.1%}" if proof.label_agreement is not None else ""
    text = f"{made.task} in {out}, {show_bytes(made.size_bytes)}; against PyTorch on {proof.texts} texts: "
    show(as_json, made, f"{text}values differ by at most {proof.max_difference:.2g}{labels}")
    next_steps.after_export(made, out)


def adapters(
    trained: Annotated[list[str], typer.Argument(metavar="NAME=TRAIN...", help="folders that `edgeft train` wrote")],
    target: Annotated[str, typer.Option(help="what to build: a name in export/, or a TOML file")] = "ort-int4",
    device: DeviceOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build one bundle of a base and what run.py --adapter NAME switches between, each proven: LoRA adapters on ort-
    targets; prefixes, prompts and bottlenecks on onnx-portable- ones."""
    folders = _named("adapters", trained)
    from edgeft.exporting.bundle import adapters_digest, measurement_of
    from edgeft.machines.profile import load_profile
    from edgeft.targets.target import load_target

    wanted = load_target(target)
    folder = out or next(iter(folders.values())).parent / "adapters"
    device_name = load_profile(device).name if device else ""
    digest = adapters_digest({name: sha256_file(place / "train.json") for name, place in folders.items()})
    if held := current.held(folder / "bundle.json", digest):
        same = held["target"] == json.loads(wanted.model_dump_json()) and held["provenance"]["device"] == device_name
        recorded = {place: json.loads((place / "train.json").read_text()) for place in folders.values()}
        if same and all(current.same_training(place, train, say) for place, train in recorded.items()):
            say(f"{folder} is up to date")
            return
    current.replaceable(folder, "bundle.json")
    from edgeft.exporting.export import export_adapters as run
    from edgeft.reporting.bundle_tables import adapters_text

    with Reporter(stderr) as progress:
        bundle = run(folders, wanted, folder, device=device, progress=progress)
    show(as_json, bundle, adapters_text(bundle, measurement_of(folder)))
    next_steps.after_export(bundle, folder)


def _named(where: str, given: list[str]) -> dict[str, Path]:
    """Training results by the names that they are given as NAME=TRAIN. Raises BadInput."""
    folders: dict[str, Path] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals or not name or not place or name in folders:
            raise BadInput(where, f"cannot use {text!r}", "give each one as NAME=TRAIN, with a name of its own")
        folders[name] = Path(place)
        need(folders[name] / "train.json", "edgeft train PLAN")
    return folders


def _add_adapter(bundle: Path, given: str, out: Path | None, as_json: bool) -> None:
    need(bundle / "bundle.json", "edgeft adapters NAME=TRAIN ...")
    [(name, folder)] = _named("--add", [given]).items()
    if out is not None:
        current.replaceable(out, "bundle.json")
    from edgeft.exporting.add_adapter import add_adapter
    from edgeft.reporting.bundle_tables import adapters_text

    with Reporter(stderr) as progress:
        made = add_adapter(bundle, name, folder, out or bundle, progress)
    show(as_json, made, adapters_text(made, None))
    next_steps.after_export(made, out or bundle)


def _export_all(merged: Path, out: Path | None, device: str | None, trained: Path | None, as_json: bool) -> None:
    from edgeft.exporting.choose_target import COMPARISON, compare_targets
    from edgeft.exporting.export import export as run
    from edgeft.merging.merge import verify_merged
    from edgeft.planning.stage_checks import target_device
    from edgeft.reporting.bundle_tables import comparison_text

    out, device = out or merged.parent / "bundles", device or deploying.planned_job(merged).get("device")
    target_device(device)  # what is wrong for every target is said once
    verify_merged(merged, trained)
    current.replaceable(out, COMPARISON)
    with Reporter(stderr) as progress:

        def build(target: Target, folder: Path) -> Bundle:
            (given,) = deploying.cached([target], merged, device)
            return run(merged, given, folder, device=device, progress=progress, train=trained)

        made = compare_targets(
            merged,
            out,
            device=device,
            build=build,
        )
    show(as_json, made, comparison_text(made))
