"""Which verbs are there? The only place that prints or exits: results on stdout, progress and errors on stderr.

Every stage is skipped, in a fraction of a second, when its output is already what its inputs say: content decides, not
file dates. torch is imported by the verbs that need it only.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from edgeft import api, current
from edgeft.documents import Artifact, cache_folder, sha256_file
from edgeft.errors import BadInput, EdgeftError
from edgeft.progress import Reporter
from edgeft.settings import ALL_THAT_FIT, parse_settings
from edgeft.units import parse_bytes, show_bytes

if TYPE_CHECKING:
    from edgeft.models.metrics import Sweep
    from edgeft.planning.plan import Plan

app = typer.Typer(
    name="edgeft",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model inside a memory budget and ship it to a small device, proven equal.",
)
# one width for logs and pipes; a terminal has its own
stdout, stderr = (Console(stderr=e, width=None if sys.stdout.isatty() else 140, highlight=False) for e in (False, True))

OutOption = Annotated[Path | None, typer.Option("--out", help="where to write; default build/<profile>/<stage>")]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on stdout instead of text")]


def show(as_json: bool, artifact: Artifact, text: RenderableType) -> None:
    if as_json:
        sys.stdout.write(artifact.model_dump_json() + "\n")
    else:
        stdout.print(text)


def say(message: str) -> None:
    stderr.print(message, soft_wrap=True, markup=False)


def default_out(profile: str, stage: str) -> Path:
    name = Path(profile).stem if profile.endswith(".toml") else profile
    return Path("build") / name / stage


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="folder of a Hugging Face checkpoint, or a hub id")],
    profile: Annotated[
        str, typer.Option(help="hardware profile: a name from `edgeft show profiles`, or a TOML file")
    ] = "cpu",
    data: Annotated[str | None, typer.Option(help="training data: jsonl, csv, parquet or a hub dataset id")] = None,
    valid: Annotated[
        str | None, typer.Option(help="validation data; held out of the training data when absent")
    ] = None,
    test: Annotated[str | None, typer.Option(help="test data, scored before and after every stage")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="pin a setting: key=value; see edgeft show settings")
    ] = None,
    max_memory: Annotated[str | None, typer.Option(help="memory budget, as in 9GiB; the profile's when absent")] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="time limit for all training steps, by the estimate")
    ] = None,
    verify_here: Annotated[
        bool, typer.Option("--verify", help="measure the plan's own steps here, with random weights")
    ] = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="run the chosen way's step without memory, and count its bytes")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="show what else was looked at, and what it costs")] = False,
    out: Annotated[
        Path | None, typer.Option(help="plan file; default build/<profile>/plan.json, - writes none")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose how to train inside the profile's memory, and say what it takes.

    Needs no torch, data or weights, except where layers are chosen by what they do on the data (layer_score).
    """
    values = parse_settings(settings or [])
    if max_memory is not None:
        values["max_memory_bytes"] = parse_bytes(max_memory)
    if max_seconds is not None:
        values["max_seconds"] = max_seconds
    values |= {"model": model, "profile": profile, "data": data, "valid": valid, "test": test}
    path = out or default_out(profile, "plan.json")
    written = None if str(path) == "-" else path
    if verify_here and written is None:
        raise BadInput("--verify", "needs the plan as a file", "leave --out - out")
    with stopping("no plan was made"), Reporter(stderr) as progress:
        made = api.plan(out=written, simulate=simulate, progress=progress, say=say, **values)
    _say_shortages(made, path)
    from edgeft.reporting.terminal import explain_text

    show(as_json, made, Group(made.text(), explain_text(made)) if explain else made.text())
    if written is not None and verify_here:
        trial = api.try_plan(written, say)
        from edgeft.reporting.terminal import trial_text

        show(as_json, trial, trial_text(trial))


@contextlib.contextmanager
def stopping(what: str) -> Iterator[None]:
    """Ctrl-C is said with what it leaves, and ends with its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"\nstopped; {what}")
        raise typer.Exit(130) from None


def _say_shortages(made: Plan, path: Path) -> None:
    """Warn when the disk of the stages' folder has too little room: of this machine now, so not a part of the plan."""
    from edgeft.memory.disk import shortages

    folder = default_out(made.job.profile, "") if str(path) == "-" else path.parent
    for line in shortages(made.stages.disk, folder, cache_folder()):
        say(f"note: {line}")


@app.command()
def train(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="plan.json as `edgeft plan` wrote it")],
    out: OutOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps: refuse when the plan cannot run there")] = None,
    rehearsal: Annotated[
        bool, typer.Option(help="first let two layers go the whole way to the bundle: what it cannot be fails now")
    ] = True,
    target: Annotated[
        str | None,
        typer.Option(help="what the rehearsal exports to: a name in export/, or a TOML file; the plan's when absent"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Carry out a plan. A killed run goes on from its last checkpoint when the same command runs again."""
    from edgeft.machines.limits import settle_allocator
    from edgeft.planning.plan import Plan

    made = Plan.read(plan_file)
    settle_allocator(made.training.device)  # before anything imports torch
    with stopping("the last step is kept: run the same command again to go on"), Reporter(stderr) as progress:
        progress.budget_bytes = made.budget_bytes
        result = api.train(
            plan_file, out, device=device, rehearsal=rehearsal, target=target, progress=progress, say=say
        )
    show(as_json, result, result.text())


@app.command()
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
    with Reporter(stderr) as progress:
        made = api.merge(
            trained, out, wise_alpha=wise_alpha, base=base, sweep=api.SweepOptions(**given) if sweep else None,
            progress=progress, say=say, swept=lambda found: _show_sweep(found, plot),
        )  # fmt: skip
    show(as_json, made, made.text())


def _show_sweep(found: Sweep, plot: Path | None) -> None:
    """The table goes to stderr, since stdout is the merge's."""
    from edgeft.reporting.terminal import sweep_text

    if plot is not None:
        from edgeft.reporting.plots import plot_sweep

        plot_sweep(found, plot)
    stderr.print(sweep_text(found))


@app.command()
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
        from edgeft.reporting.plots import plot_survival

        plot_survival(found, plot)
    show(as_json, found, survival_text(found))


@app.command()
def export(
    merged: Annotated[Path, typer.Argument(metavar="MERGED", help="folder that `edgeft merge` wrote")],
    target: Annotated[
        str | None,
        typer.Option(
            help="auto: the smallest that keeps the fine-tune; a name in export/ or a TOML file; all-that-fit: compare "
            "them; the plan's when absent"
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="target device profile the bundle must fit; the plan's when absent")
    ] = None,
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
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build the on-device bundle and prove that it is what was trained (exit 4 when it is not).

    MERGED may be the folder of an encoder (classifier or embedding model), which a portable target takes as it is.
    """
    if not (merged / "merged.json").is_file():
        from edgeft.exporting.encoder import is_encoder

        if is_encoder(merged):
            folder = out or merged.resolve().with_name(f"{merged.resolve().name}-bundle")
            _export_encoder(merged, target or "onnx-portable-fp32", folder, texts, device, as_json)
            return
    _need(merged / "merged.json", "edgeft merge TRAIN")
    if auto_promote:
        raise BadInput("--auto-promote", "is a part of repair now", "leave it out, or name a target with --repair auto")
    if target == ALL_THAT_FIT:
        if repair == "auto" or size_budget is not None or calibration is not None:
            hint = "name one target, or leave --repair, --size-budget and --calibration out"
            raise BadInput(f"--target {ALL_THAT_FIT}", "builds every target as it is", hint)
        device = device or api.planned_job(merged).get("device")
        _export_all(merged, out or merged.parent / "bundles", device, trained, as_json)
        return
    with Reporter(stderr) as progress:
        bundle = api.export(
            merged, out, target=target, device=device, promote=[name for name in (promote or "").split(",") if name],
            repair=repair, size_budget=size_budget, calibration=calibration, train=trained, progress=progress, say=say,
        )  # fmt: skip
    show(as_json, bundle, bundle.text())


def _export_encoder(
    folder: Path, target: str, out: Path, texts: Path | None, device: str | None, as_json: bool
) -> None:
    from edgeft.exporting.encoder import export_encoder, read_texts
    from edgeft.targets.target import load_target

    if texts is None:
        raise BadInput("--texts", "is missing: an encoder is proven on real texts", "--texts FILE, a text on each line")
    current.replaceable(out, "bundle.json")
    made = export_encoder(folder, load_target(target), out, texts=read_texts(texts), device=device)
    proof = made.encoder_proof
    assert proof is not None
    labels = f", labels agree on {proof.label_agreement:.1%}" if proof.label_agreement is not None else ""
    text = f"{made.task} in {out}, {show_bytes(made.size_bytes)}; against PyTorch on {proof.texts} texts: "
    show(as_json, made, f"{text}values differ by at most {proof.max_difference:.2g}{labels}")


@app.command()
def adapters(
    trained: Annotated[list[str], typer.Argument(metavar="NAME=TRAIN...", help="folders that `edgeft train` wrote")],
    target: Annotated[str, typer.Option(help="what to build: a name in export/, or a TOML file")] = "ort-int4",
    device: Annotated[str | None, typer.Option(help="target device profile the bundle must fit")] = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build one bundle of a base model and LoRA adapters that run.py --adapter NAME switches between, each proven."""
    folders: dict[str, Path] = {}
    for text in trained:
        name, equals, place = text.partition("=")
        if not equals or not name or not place or name in folders:
            raise BadInput("adapters", f"cannot use {text!r}", "give each one as NAME=TRAIN, with a name of its own")
        folders[name] = Path(place)
        _need(folders[name] / "train.json", "edgeft train PLAN")
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
    from edgeft.reporting.terminal import adapters_text

    with Reporter(stderr) as progress:
        bundle = run(folders, wanted, folder, device=device, progress=progress)
    show(as_json, bundle, adapters_text(bundle, measurement_of(folder)))


def _export_all(merged: Path, out: Path, device: str | None, trained: Path | None, as_json: bool) -> None:
    from edgeft.exporting.choose_target import COMPARISON, compare_targets
    from edgeft.exporting.export import export as run
    from edgeft.merging.merge import verify_merged
    from edgeft.planning.stage_checks import target_device
    from edgeft.reporting.terminal import comparison_text

    target_device(device)  # what is wrong for every target is said once
    verify_merged(merged, trained)
    current.replaceable(out, COMPARISON)
    with Reporter(stderr) as progress:
        made = compare_targets(
            merged,
            out,
            device=device,
            build=lambda target, folder: run(merged, target, folder, device=device, progress=progress, train=trained),
        )
    show(as_json, made, comparison_text(made))


def _need(path: Path, command: str) -> None:
    if not path.is_file():
        raise BadInput(path, "no such file", f"run {command} first")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context, bundle: Annotated[Path, typer.Argument(help="bundle folder")]) -> None:
    """Run a bundle here, by edgeft's own run.py: edgeft run BUNDLE "prompt" [--system TEXT | --plain | --bench ...].

    The bundle's own copy is a program that came with it and is not started; `edgeft verify` says if it is another.
    """
    raise typer.Exit(_runner().main(["--bundle", str(bundle), *context.args]))


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="bundle folder")],
    public_key: Annotated[Path | None, typer.Option(help="the bundle must be signed by this key (PEM)")] = None,
    no_replay: Annotated[bool, typer.Option("--no-replay", help="hashes and signature only")] = False,
    on: Annotated[
        str | None, typer.Option(help="on the emulated processor of this profile, as raspberrypi5-8gb (make arm64)")
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="--on: rows to answer there and here; the test data of the plan beside it")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="--on: how many of them; 32")] = None,
    timeout: Annotated[float | None, typer.Option(min=1, help="--on: seconds after which to give up; 900")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every hash of a bundle and its signature, and replay its golden vectors (exit 4 when anything differs).

    By edgeft's own run.py. A bundle of another version of edgeft carries another one: that is noted, and no fault.
    With --on the same under emulation of a device's processor, in the runtime's build for it; the result is written
    beside the bundle.
    """
    if on is not None:
        if no_replay:
            raise BadInput("--no-replay", "leaves out what --on is for", "give one of the two")
        _verify_on(bundle, on, public_key, {"data": test, "rows": rows, "timeout": timeout}, as_json)
        return
    if any(value is not None for value in (test, rows, timeout)):
        raise BadInput("--test, --rows, --timeout", "belong to --on", "add --on PROFILE")
    options = [*(["--public-key", str(public_key)] if public_key else []), *(["--no-replay"] if no_replay else [])]
    options += ["--json"] if as_json else []
    raise typer.Exit(_runner().main(["--bundle", str(bundle), "--verify", *options]))


def _verify_on(bundle: Path, on: str, public_key: Path | None, options: dict[str, Any], as_json: bool) -> None:
    from edgeft.exporting.device_check import refuse, verify_on

    runner = _runner()
    try:
        trusted = runner.read_public_key(public_key) if public_key else None
    except runner.RunError as problem:
        say(str(problem))
        raise typer.Exit(problem.exit_code) from None
    given = {name: value for name, value in options.items() if value is not None}
    made = verify_on(bundle, on, **given, trusted=trusted, say=say)
    show(as_json, made, Text(made.text()))
    refuse(made, bundle)


@app.command()
def arm64() -> None:
    """Set up the emulated aarch64 machine that `edgeft verify --on` runs bundles on: QEMU, a small Debian, wheels."""
    from edgeft.exporting.emulation import set_up

    stdout.print(str(set_up(say).folder), soft_wrap=True, markup=False)


@app.command()
def sign(
    bundle: Annotated[Path | None, typer.Argument(help="bundle folder")] = None,
    key: Annotated[Path | None, typer.Option(help="private key that --new-key wrote")] = None,
    new_key: Annotated[
        Path | None, typer.Option(help="make an Ed25519 key pair: the private key's file; the public one gets .pub")
    ] = None,
) -> None:
    """Sign a bundle's manifest, which names every file by its hash (exit 4 when a file is not as exported)."""
    from edgeft.exporting.sign import keygen, public_key_path
    from edgeft.exporting.sign import sign as run

    if new_key is not None:
        public = public_key_path(new_key)
        stdout.print(keygen(new_key))
        say(f"keep {new_key} to yourself; give {public} to those who verify, by another way than the bundle")
    if bundle is None and new_key is None:
        raise BadInput("sign", "no bundle was given", "edgeft sign BUNDLE --key KEY, or --new-key KEY to make one")
    if bundle is None:
        return
    key = key or new_key
    if key is None:
        raise BadInput("--key", "is missing", "name the private key; --new-key KEY makes one")
    stdout.print(run(bundle, key))
    say(f"signed {bundle}; verify with: edgeft verify {bundle} --public-key {key}.pub")


def _runner() -> Any:
    from edgeft.targets.runner import runner_module

    return runner_module()


@app.command()
def report(
    plan_file: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="plan.json, or the build folder that holds it")
    ] = None,
    models: Annotated[Path | None, typer.Option(help="instead of a plan: every model in this folder")] = None,
    machines: Annotated[str, typer.Option("--profiles", help="for --models: all, or names as in t4,l4-24gb")] = "all",
    target: Annotated[str, typer.Option(help="for --models: what is shipped, a name in export/ or a TOML file")] = (
        "ort-int4"
    ),
    settings: Annotated[list[str] | None, typer.Option("--set", help="for --models: pin a setting, key=value")] = None,
    out: Annotated[Path | None, typer.Option(help="HTML page; Markdown and JSON are written beside it")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write one page to decide on hardware with: a plan, the run made from it, or many models on many machines."""
    from edgeft.machines.limits import usable_cores
    from edgeft.reporting.matrix import Matrix, find_models, find_profiles, make_matrix
    from edgeft.reporting.pages import write_report
    from edgeft.reporting.summary import Summary

    made: Summary | Matrix
    if models is not None and plan_file is not None:
        raise BadInput("report", "a plan and --models were given", "give one of them")
    if models is not None:
        found, pinned = find_models(models), [text.partition("=") for text in settings or []]
        parse_settings(settings or [])  # a misspelt key is an error, not a cell
        with Reporter(stderr) as progress:
            made = make_matrix(
                found,
                find_profiles(machines),
                target=target,
                settings={key: value for key, _, value in pinned},
                workers=usable_cores(),
                progress=progress,
            )
        path = out or Path("build") / "report" / "matrix.html"
    else:
        if plan_file is None:
            raise BadInput("report", "no plan given", "name a plan.json, or a folder of models with --models")
        source = plan_file / "plan.json" if plan_file.is_dir() else plan_file
        made = api.summary(source)
        path = out or source.parent / "report.html"
    written = write_report(made, path)
    if as_json:
        sys.stdout.write(made.model_dump_json() + "\n")
    else:
        stdout.print("\n".join(map(str, written)), soft_wrap=True, markup=False)


@app.command()
def data(
    file: Annotated[str, typer.Argument(metavar="FILE", help="jsonl, csv, parquet or a hub dataset id")],
    model: Annotated[str, typer.Option(help="folder of a Hugging Face checkpoint, or a hub id: its tokenizer is used")],
    rows: Annotated[int, typer.Option(min=0, help="rows to show")] = 3,
    max_length: Annotated[int | None, typer.Option(min=8, help="cut samples to so many tokens, as a plan does")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what of a data file trains: the first rows with their trained tokens marked, and what is not used, and why.

    Rows that cannot be used are refused with their lines (exit 1).
    """
    from edgeft.data.dataset import TextTokenizer, data_text, report_data

    folder = Path(model)
    if not folder.is_dir():
        from edgeft.models.headers import local_folder

        folder = local_folder(model)
    found = report_data(file, TextTokenizer(folder), max_length, rows)
    if as_json:
        sys.stdout.write(found.model_dump_json() + "\n")
    else:
        stdout.print(data_text(found), soft_wrap=True, markup=False)


class Shown(enum.StrEnum):
    """What `edgeft show` lists."""

    profiles = "profiles"
    targets = "targets"
    settings = "settings"
    layers = "layers"
    schema = "schema"


@app.command("show")
def show_what(
    what: Annotated[Shown, typer.Argument(help="profiles, targets, settings; layers MODEL; schema plan or report")],
    name: Annotated[str | None, typer.Argument(help="of a model (folder or hub id), or of a document")] = None,
    as_json: JsonOption = False,
) -> None:
    """List what can be named: machines, targets, settings; a model's layers and sizes; a document's JSON Schema."""
    needed = {Shown.layers: "a model", Shown.schema: "a document: plan or report"}
    if (name is None) == (what in needed):
        raise BadInput(f"show {what}", f"needs {needed[what]}" if what in needed else f"takes no name, got {name!r}")
    if what is Shown.profiles:
        _show_profiles(as_json)
    elif what is Shown.targets:
        _show_targets(as_json)
    elif what is Shown.settings:
        _show_settings(as_json)
    elif what is Shown.layers:
        _show_layers(str(name), as_json)
    else:
        from edgeft.reporting.schema import schema_text

        sys.stdout.write(schema_text(str(name)))


def _show_profiles(as_json: bool) -> None:
    from edgeft.machines.profile import list_profiles
    from edgeft.reporting.terminal import profiles_text

    found = list_profiles()
    if as_json:
        sys.stdout.write(json.dumps([profile.model_dump() for profile in found]) + "\n")
    else:
        stdout.print(profiles_text(found))


def _show_targets(as_json: bool) -> None:
    from edgeft.targets.target import list_targets

    found = list_targets()
    if as_json:
        sys.stdout.write(json.dumps([target.model_dump() for target in found]) + "\n")
        return
    for target in found:
        stdout.print(f"{target.name:20} {target.description}", soft_wrap=True)


def _show_layers(model: str, as_json: bool) -> None:
    from edgeft.models.discover import discover
    from edgeft.reporting.terminal import layers_text

    found = discover(model)
    if as_json:
        sys.stdout.write(found.model_dump_json() + "\n")
    else:
        stdout.print(layers_text(found))


def _show_settings(as_json: bool) -> None:
    from edgeft.settings import Job

    if as_json:
        sys.stdout.write(json.dumps(Job.model_json_schema()["properties"]) + "\n")
        return
    for name, field in Job.model_fields.items():
        default = "required" if field.is_required() else "planned" if field.default is None else f"{field.default}"
        stdout.print(f"{name:18} {default:10} {field.description}", soft_wrap=True, markup=False)


# what these were called before 0.2
MOVED = {
    "profiles": "show profiles", "targets": "show targets", "settings": "show settings", "layers": "show layers",
    "schema": "show schema", "keygen": "sign --new-key FILE",
}  # fmt: skip


def main() -> None:
    """The command line: errors as `where: problem` and a hint, without a traceback, and their exit code."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it announces kernels it did not find at import
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        if len(sys.argv) > 1 and sys.argv[1] in MOVED:
            raise BadInput(f"edgeft {sys.argv[1]}", "is another command now", f"edgeft {MOVED[sys.argv[1]]}")
        app()
    except EdgeftError as problem:
        if os.environ.get("EDGEFT_TRACEBACK"):
            raise
        say(f"edgeft: {problem}")
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        say("\nstopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
