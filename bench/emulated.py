"""Does a bundle answer on a Raspberry Pi 5's processor as it does here, and what does it hold in memory there?

    make bench-emulated [only=example,smollm2] [merged=FOLDER]

The example as ort-int4; the same with answers held to labels and a KV cache of 8 bits; SmolLM2-135M-Instruct
(bench/smollm2.py) with calibrated codes. Each is exported with its proof and then verified by `edgeft verify --for`
under emulation of a Cortex-A76, in the runtime's own build for aarch64: golden vectors, tokens of test rows that differ
from this machine's and by which margins, peak memory. Kernels with 8-bit activations differ between instruction sets.
Nothing of it depends on what else runs, and no seconds are recorded: those of an emulation say nothing of a device.

What is done is kept in build/emulated: a bundle that was verified is not verified again. With `only` the others stay as
they are recorded. SmolLM2 is trained as
`make bench-bakeoff model=smollm2` trains its plain run, or taken from `merged`, where such a run left it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import bakeoff
import smollm2
from run import AT_START, BASE, ROOT, SECTIONS, pins, record, verb

from edgeft.documents import sha256_file
from edgeft.errors import EdgeftError

PROFILE = "raspberrypi5-8gb"
FOLDER = ROOT / "build" / "emulated"
EXAMPLE: dict[str, Any] = {"tuner": "lora", "rank": 64, "max_steps": 200, "batch_size": 16, "eval_rows": 200}
NOT_RECORDED = ("seconds_here", "seconds_emulated", "environment")


class Case(NamedTuple):
    """A bundle and the rows that it answers in both places."""

    model: str
    target: str
    settings: dict[str, Any]
    rows: int
    timeout: int  # seconds, emulated


CASES = {
    "example": Case("example", "ort-int4", EXAMPLE, 64, 1800),
    "example, labels, cache of 8 bits": Case(
        "example", "ort-int4", {**EXAMPLE, "answers": "labels", "kv_bits": 8}, 64, 1800
    ),
    "smollm2": Case("smollm2", "ort-int4-calibrated", smollm2.SETTINGS, 16, 3600),
}
SHORT = {"example": "example", "labels": "example, labels, cache of 8 bits", "smollm2": "smollm2"}


def example(case: Case, folder: Path) -> tuple[Path, Path]:
    """(merged model, test rows) of the example, as far as it is not done."""
    plan, test = str(folder / "plan.json"), SECTIONS / "test.jsonl"
    files = ["--data", str(SECTIONS / "train.jsonl"), "--valid", str(SECTIONS / "valid.jsonl"), "--test", str(test)]
    settings = pins({**case.settings, "target": case.target, "device": PROFILE})
    verb("plan", "--model", str(BASE), "--profile", "cpu", *files, *settings, "--out", plan)
    verb("train", plan, "--out", str(folder / "train"), "--no-rehearsal")
    verb("merge", str(folder / "train"), "--out", str(folder / "merged"))
    return folder / "merged", test


def smollm(folder: Path, given: Path | None) -> tuple[Path, Path]:
    """(merged model, test rows) of SmolLM2. Raises BadInput for a merge that is not of this bench's settings."""
    test = smollm2.chats("sections", "test", 10_000, folder / "test.jsonl")
    if given is None:
        (bakeoff.FOLDER / "smollm2").mkdir(parents=True, exist_ok=True)
        base, files, _ = bakeoff.inputs("smollm2")
        return bakeoff.trained("smollm2", "plain", base, files), test
    return smollm2.trained_alike(given), test


def current(result: Path, bundle: Path, case: Case) -> bool:
    """Whether a verification is that of this bundle, these rows and a machine like this one."""
    if not result.is_file():
        return False
    held = json.loads(result.read_text())
    same = held["input_sha256"] == sha256_file(bundle / "bundle.json")
    here = held["environment"]["features"] == list(AT_START["features"])
    return same and here and (held["rows"] or {}).get("rows") == case.rows


def verified(bundle: Path, test: Path, case: Case) -> dict[str, Any]:
    """What `edgeft verify --for` finds of a bundle, faults included, but for its seconds."""
    result = bundle.with_name(f"{bundle.name}.on-{PROFILE}.json")
    if not current(result, bundle, case):
        result.unlink(missing_ok=True)
        options = ["--test", str(test), "--rows", str(case.rows), "--timeout", str(case.timeout)]
        try:
            verb("verify", str(bundle), "--for", PROFILE, *options)
        except subprocess.CalledProcessError:
            if not result.is_file():  # with one, a fault was found, and is what is recorded
                raise
    found = json.loads(result.read_text())
    return {name: value for name, value in found.items() if name not in NOT_RECORDED}


def bench(name: str, case: Case, given: Path | None) -> dict[str, Any]:
    """One bundle, as far as it is not done: what it is and what was found of it."""
    folder = FOLDER / name.replace(", ", "-").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    merged, test = smollm(folder, given) if case.model == "smollm2" else example(case, folder)
    bundle = folder / "bundle"
    verb("export", str(merged), "--target", case.target, "--for", PROFILE, "--out", str(bundle))
    print(f"{name}: {case.rows} rows on {PROFILE}, emulated", file=sys.stderr, flush=True)
    made = json.loads((bundle / "bundle.json").read_text())
    weighs = {key: made[key] for key in ("size_bytes", "context_tokens", "golden_logit_tolerance", "provenance")}
    return {"target": case.target, "settings": case.settings, **weighs, **verified(bundle, test, case)}


def recorded() -> dict[str, Any]:
    """The bundles of the record that is there."""
    path = ROOT / "bench" / "results" / "emulated.json"
    return dict(json.loads(path.read_text())["bundles"]) if path.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SHORT), help="some of these, separated by commas")
    parser.add_argument("--merged", type=Path, help="SmolLM2, trained and merged by another bench")
    given = parser.parse_args()
    try:
        names = [SHORT[each] for each in given.only.split(",")]
        verb("arm64", as_json=False)
        found = {name: bench(name, CASES[name], given.merged) for name in names}
    except KeyError as problem:
        parser.error(f"--only: there is no {problem}, only {', '.join(SHORT)}")
    except EdgeftError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.exit_code)
    found = recorded() | found
    record("emulated", {"profile": PROFILE, "bundles": {name: found[name] for name in CASES if name in found}})


if __name__ == "__main__":
    main()
