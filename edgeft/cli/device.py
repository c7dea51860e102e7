"""What can be done with a bundle on the command line? Run it, check it, here or emulated, and sign it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from edgeft.cli.screen import JsonOption, part_of_job, say, show, stdout
from edgeft.errors import BadInput

# what people point `run` at: the file that tells it, what it is, what to do
NO_BUNDLES = (
    ("merged.json", "a merged checkpoint", "edgeft export {folder} makes its bundle"),
    ("train.json", "what a training gave", "edgeft merge {folder}, then edgeft export makes its bundle"),
    ("plan.json", "the folder of a job without a bundle", "edgeft train {folder}/plan.json, merge and export make it"),
)


def run(context: typer.Context, bundle: Annotated[Path, typer.Argument(help="bundle folder")]) -> None:
    """Run a bundle here, by edgeft's own run.py: edgeft run BUNDLE "prompt" [--system TEXT | --plain | --bench ...].

    edgeft run BUNDLE --help shows every option, and how this bundle is asked. The bundle's own copy is a program that
    came with it and is not started; `edgeft verify` says if it is another.
    """
    if str(bundle) in ("-h", "--help"):
        print(context.get_help())
        raise typer.Exit
    bundle = part_of_job(bundle, "bundle/bundle.json")
    for name, what, hint in NO_BUNDLES:
        if (bundle / name).is_file():
            raise BadInput(bundle, f"is {what}, no bundle", hint.format(folder=shlex.quote(str(bundle))))
    if not (bundle / "bundle.json").is_file() and not {"-h", "--help"}.intersection(context.args):
        problem = "is no bundle: it has no bundle.json" if bundle.is_dir() else "no such folder"
        raise BadInput(
            bundle, problem, "edgeft export MERGED makes a bundle, edgeft build all that comes before it too"
        )
    raise typer.Exit(_runner().main(["--bundle", str(bundle), *context.args]))


def verify(
    bundle: Annotated[Path, typer.Argument(help="bundle folder")],
    public_key: Annotated[Path | None, typer.Option(help="the bundle must be signed by this key (PEM)")] = None,
    no_replay: Annotated[bool, typer.Option("--no-replay", help="hashes and signature only")] = False,
    device: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="DEVICE",
            help="on this device's processor, emulated: raspberrypi5-8gb (after edgeft arm64)",
        ),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="--for: rows to answer there and here; the test data of the plan beside it")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="--for: how many of them; 32")] = None,
    timeout: Annotated[float | None, typer.Option(min=1, help="--for: seconds after which to give up; 900")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every hash of a bundle and its signature, and replay its golden vectors (exit 4 when anything differs).

    By edgeft's own run.py. A bundle of another version of edgeft carries another one: that is noted, and no fault.
    With --for the same under emulation of a device's processor, in the runtime's build for it; the result is written
    beside the bundle.
    """
    bundle = part_of_job(bundle, "bundle/bundle.json")
    if device is not None:
        if no_replay:
            raise BadInput("--no-replay", "leaves out what --for is there for", "give one of the two")
        _verify_on(bundle, device, public_key, {"data": test, "rows": rows, "timeout": timeout}, as_json)
        return
    if any(value is not None for value in (test, rows, timeout)):
        raise BadInput("--test, --rows, --timeout", "belong to --for", "add --for DEVICE")
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


def arm64() -> None:
    """Set up the emulated aarch64 machine that `edgeft verify --for` runs bundles on: QEMU, a small Debian, wheels."""
    from edgeft.exporting.emulation import set_up

    stdout.print(str(set_up(say).folder), soft_wrap=True, markup=False)


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
    from edgeft.machines.runner import runner_module

    return runner_module()
