"""How much faster are later epochs that start above the frozen layers, in how much memory, and is the run the same?

    make bench-prefix               # or: python bench/prefix_cache.py --small, a rehearsal that records nothing

SmolLM2-135M's shape with random weights, four of 30 layers, LoRA and whole layers, rows of the example's data. One run
makes the outputs of the 26 layers below; then runs with and without them take turns, each in a process of its own, all
steps from what is on disk, and one starts from outputs in bf16. Nothing else may run beside it. Runs that have ended
are kept in build/bench-prefix.jsonl (remove it to measure again).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from run import BASE, SECTIONS, Kept, random_135m, random_model, record, train

from edgeft.memory.disk import size_of
from edgeft.planning.plan import Plan

WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {"tuner": "lora", "rank": 16, "base_precision": "fp32"},
    "whole layers": {"tuner": "full", "base_precision": "fp32"},
}
COMMON = {
    "layers": "sparse",
    "active_layers": 4,
    "batch_size": 16,
    "checkpointing": False,
    "eval_rows": 16,
    "epochs": 9,
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "vocab_size": 4096}


def rows_of(folder: Path, rows: int) -> tuple[Path, Path]:
    """The example's first rows, and some to be scored."""
    found = []
    for name, count in (("train", rows), ("valid", 16)):
        found.append(folder / f"{name}.jsonl")
        lines = (SECTIONS / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]
        found[-1].write_text("".join(lines))
    return found[0], found[1]


def one_run(
    folder: Path, model: Path, data: tuple[Path, Path], settings: dict[str, Any], kept: bool | str
) -> dict[str, Any]:
    """What one run took and gave."""
    result = train(folder, {**COMMON, **settings, "prefix_cache": kept}, model=model, data=data[0], valid=data[1],
                   rehearsal=False)  # fmt: skip
    plan = Plan.read(folder / "plan.json")
    phases = {phase.name: phase for phase in plan.phases}
    planned = sum(disk.peak_bytes for disk in plan.stages.disk if disk.stage == "prefix")
    return {
        "seconds_per_step": result["seconds"] / result["steps"], "estimated_seconds_per_step": plan.seconds_per_step,
        "peaks": {name: {"predicted_bytes": phases[name].expected_bytes, "high_bytes": phases[name].high_bytes,
                         "measured_bytes": peak}
                  for name, peak in result["phase_peak_bytes"].items() if name in phases},
        "making_seconds": result["prefix_seconds"], "estimated_making_seconds": plan.prefix_seconds,
        "planned_bytes": planned, "written_bytes": size_of(Path(result["prefix_cache"])) if kept else 0,
        "curve": [loss for _, loss in result["loss_curve"]], "valid": result["valid"]["loss"],
        "base_valid": result["base_valid"]["loss"],
    }  # fmt: skip


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest relative distance of two loss curves."""
    return max(abs(mine / theirs - 1) for mine, theirs in zip(one["curve"], other["curve"], strict=True))


def rounded(half: dict[str, Any], kept: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """What outputs in bf16 change: of the run without any, beside what fp32's order of sums changes."""
    return {
        "curve_apart": apart(half, plain), "valid_apart": abs(half["valid"] / plain["valid"] - 1),
        "fp32_valid_apart": abs(kept["valid"] / plain["valid"] - 1), "written_bytes": half["written_bytes"],
        "disk_error": round(half["planned_bytes"] / half["written_bytes"] - 1, 5),
    }  # fmt: skip


def compared(kept: list[dict[str, Any]], plain: list[dict[str, Any]], made: dict[str, Any]) -> dict[str, Any]:
    """The medians of both, and how far one is from the other."""
    seconds = [statistics.median(run["seconds_per_step"] for run in runs) for runs in (kept, plain)]
    estimates = [runs[0]["estimated_seconds_per_step"] for runs in (kept, plain)]
    peaks = [runs[0]["peaks"]["train"]["measured_bytes"] for runs in (kept, plain)]
    return {
        "times_faster": round(seconds[1] / seconds[0], 3),
        "estimated_times_faster": round(estimates[1] / estimates[0], 3),
        "seconds_per_step": seconds, "estimated_seconds_per_step": estimates,
        "training_peak_share": round(peaks[0] / peaks[1], 4),
        "curve_apart": apart(kept[0], plain[0]),
        "making_seconds": made["making_seconds"], "estimated_making_seconds": made["estimated_making_seconds"],
        "disk_error": round(made["planned_bytes"] / made["written_bytes"] - 1, 5),
        "worst_peak_over_high": round(max(peak["measured_bytes"] / peak["high_bytes"]
                                          for run in (*kept, *plain, made) for peak in run["peaks"].values()), 4),
    }  # fmt: skip


def own_cache(scratch: Path) -> None:
    """A cache folder for the runs alone, with this machine's measured rates."""
    before = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeft"
    own = scratch / "cache" / "edgeft"
    own.mkdir(parents=True)
    for probe in before.glob("probe-*.json"):
        shutil.copyfile(probe, own / probe.name)
    os.environ["XDG_CACHE_HOME"] = str(own.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny model; nothing is recorded")
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        own_cache(scratch)
        model = random_model(scratch / "model", SMALL) if options.small else random_135m(scratch / "model")
        shutil.copyfile(BASE / "chat_template.jinja", model / "chat_template.jinja")
        data = rows_of(scratch, options.rows)
        past = Kept("prefix-small" if options.small else "prefix")
        for way, settings in WAYS.items():
            runs: dict[str, dict[str, Any]] = {}
            turns: list[tuple[str, bool | str]] = [("made", True)]
            turns += [(f"{kept} {n}", kept) for n in range(options.repeats) for kept in (True, False)]
            turns.append(("bf16", "bf16"))
            for name, kept in turns:
                label = f"{way}, {name}"
                if label not in past.rows or options.small or name == "made":
                    steps = {"max_steps": 2 if name == "made" else options.steps}
                    row = one_run(scratch / label, model, data, {**settings, **steps}, kept)
                    past.add({"run": label, **row})
                runs[name] = past.rows[label]
                print(f"{label:22} {runs[name]['seconds_per_step']:.3f} s a step", flush=True)
            both = [[run for name, run in runs.items() if name.startswith(f"{kept} ")] for kept in (True, False)]
            found[way] = {**compared(*both, runs["made"]), "bf16": rounded(runs["bf16"], both[0][0], both[1][0]),
                          "kept": both[0], "plain": both[1], "made": runs["made"]}  # fmt: skip
            shutil.rmtree(scratch / "cache" / "edgeft" / "prefix")
            print(json.dumps({way: {k: v for k, v in found[way].items() if k not in ("kept", "plain", "made")}}))
    if not options.small:
        record("prefix_cache", {"rows": options.rows, "steps": options.steps, "ways": found})


if __name__ == "__main__":
    main()
