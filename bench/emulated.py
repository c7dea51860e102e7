"""Does a bundle answer on a Raspberry Pi 5's processor as it does here, and what does it hold in memory there?

    make bench-emulated

The example as ort-int4; the same with answers held to labels and a KV cache of 8 bits; SmolLM2-135M-Instruct
(bench/smollm2.py) with calibrated codes. Each is exported with its proof and then verified by `edgeft verify --on`
under emulation of a Cortex-A76, in the runtime's own build for aarch64: golden vectors, tokens of test rows that differ
from this machine's and by which margins, peak memory. Kernels with 8-bit activations differ between instruction sets.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import smollm2
from run import BASE, ROOT, SECTIONS, pins, record, verb

from edgeft.errors import EdgeftError

PROFILE = "raspberrypi5-8gb"
FOLDER = ROOT / "build" / "emulated"
TUNED: dict[str, Any] = {"tuner": "lora", "rank": 64, "max_steps": 200, "batch_size": 16, "eval_rows": 200}


class Case(NamedTuple):
    """A bundle and the rows that it answers in both places."""

    model: str
    target: str
    settings: dict[str, Any]
    rows: int
    timeout: int  # seconds, emulated


CASES = {
    "example": Case("example", "ort-int4", TUNED, 64, 900),
    "example, labels, cache of 8 bits": Case(
        "example", "ort-int4", {**TUNED, "answers": "labels", "kv_bits": 8}, 64, 900
    ),
    "smollm2": Case("smollm2", "ort-int4-calibrated", smollm2.SETTINGS, 16, 3600),
}


def inputs(model: str, folder: Path) -> tuple[Path, list[str]]:
    """(base, arguments that name its rows) of one of the two models."""
    if model == "example":
        base, files = BASE, {name: SECTIONS / f"{name}.jsonl" for name in ("train", "valid", "test")}
    else:
        smollm2.FOLDER.mkdir(parents=True, exist_ok=True)
        base = smollm2.base_model(smollm2.FOLDER)
        counts = {**smollm2.ROWS, "test": 200}
        files = {name: smollm2.chats("sections", name, counts[name], folder / f"{name}.jsonl") for name in counts}
    flags = {"train": "--data", "valid": "--valid", "test": "--test"}
    return base, [part for name, flag in flags.items() for part in (flag, str(files[name]))]


def bundle_of(case: Case, folder: Path) -> Path:
    """A case's bundle, trained, merged and proven, as far as it is not done."""
    folder.mkdir(parents=True, exist_ok=True)
    base, files = inputs(case.model, folder)
    plan, out = str(folder / "plan.json"), folder / "bundle"
    settings = pins({**case.settings, "target": case.target, "device": PROFILE})
    verb("plan", "--model", str(base), "--profile", "cpu", *files, *settings, "--out", plan)
    verb("train", plan, "--out", str(folder / "train"))
    verb("merge", str(folder / "train"), "--out", str(folder / "merged"))
    verb("export", str(folder / "merged"), "--out", str(out))
    return out


def bench(name: str, case: Case) -> dict[str, Any]:
    """What `edgeft verify --on` finds of one bundle."""
    folder = FOLDER / name.replace(", ", "-").replace(" ", "-")
    bundle = bundle_of(case, folder)
    print(f"{name}: {case.rows} rows on {PROFILE}, emulated", file=sys.stderr, flush=True)
    found = verb("verify", str(bundle), "--on", PROFILE, "--rows", str(case.rows), "--timeout", str(case.timeout))
    return {"target": case.target, "settings": case.settings, **found}


def main() -> None:
    try:
        verb("arm64", as_json=False)
        found = {name: bench(name, case) for name, case in CASES.items()}
    except EdgeftError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.exit_code)
    record("emulated", {"profile": PROFILE, "bundles": found})


if __name__ == "__main__":
    main()
