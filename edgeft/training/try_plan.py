"""Does a plan hold on this machine? Its own training steps, with random weights, measured."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from edgeft.data.dataset import IGNORED, Sample
from edgeft.documents import sha256_file, versions
from edgeft.engine.loop import make_run
from edgeft.errors import BadInput, DoesNotFit, EdgeftError
from edgeft.machines import meter, processes
from edgeft.models.boundary import Boundary, release_pages
from edgeft.models.checkpoint import local_folder
from edgeft.models.evaluate import autocast
from edgeft.models.parts import Parts
from edgeft.planning.plan import Plan
from edgeft.settings.job import Training
from edgeft.training.out_of_memory import capped, explained
from edgeft.training.prepare import choose_device, hold_to, make_pool, prepare, tf32
from edgeft.training.promise import check_budget
from edgeft.training.result import Trial
from edgeft.units import show_bytes

STEPS = 3  # the first has no optimizer states yet, the second is the highest, the third is timed


def trial(plan: Plan, plan_sha256: str = "") -> Trial:
    """Run `STEPS` optimizer steps of the plan on its device, each on samples as long as the longest.

    The model has the plan's shape and random weights, read from disk and quantised as a real one. Raises BadInput when
    the planned device is not here, DoesNotFit when memory or disk are too small.
    """
    meter.import_all()
    meter.control_malloc()
    device, compute, deviations = choose_device(plan, None)
    if deviations:
        problem = f"needs {plan.training.device}, which is not here"
        raise BadInput("--verify", problem, "plan with the profile of this machine, or leave --verify out")
    if plan.training.shard_base:
        hint = "leave --verify out, or measure with --set shard_base=false"
        raise BadInput("--verify", f"a base in {plan.training.processes} parts needs as many processes", hint)
    check_budget(plan, device)
    with (
        explained(plan, device, ["train"]), capped(plan.budget_bytes, device), tf32(plan.training, device),
        tempfile.TemporaryDirectory() as scratch,
    ):  # fmt: skip
        folder = Path(scratch) / "model"
        need = 2 * 4 * plan.spec.total_parameters
        if shutil.disk_usage(scratch).free < need:
            raise DoesNotFit("--verify", f"random weights need {show_bytes(need)} of disk in {scratch}", "set TMPDIR")
        random_checkpoint(local_folder(plan.job.model), folder)
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")  # these quantised weights are of no use later
        model, parts = prepare(plan, device, compute, folder)
        if plan.training.cached_layers:
            parts = start_anywhere(plan.training, model, parts, device, compute)
            meter.give_back()
        run = make_run(plan.training, device, compute, model, parts, folder, Path(scratch))
        sample = filled_sample(plan)
        pool = make_pool(plan, parts)
        hold_to(pool, plan, "train")
        meter.reset_peak(device)
        for _ in range(STEPS):
            started = time.monotonic()
            run.train_step([sample] * plan.training.share)
        seconds = time.monotonic() - started
        measured = meter.peak_bytes(device)
    phase = next(phase for phase in plan.phases if phase.name == "train")
    data = sum(term.bytes for term in phase.terms if term.name == "data")
    predicted = phase.expected_bytes - data
    return Trial(
        input_sha256=plan_sha256, versions=versions(), device=str(device), predicted_bytes=predicted,
        high_bytes=phase.high_bytes, measured_bytes=measured, error=round(predicted / measured - 1, 5),
        estimated_seconds_per_step=plan.seconds_per_step, measured_seconds_per_step=round(seconds, 4),
    )  # fmt: skip


def start_anywhere(training: Training, model: Any, parts: Parts, device: torch.device, compute: torch.dtype) -> Parts:
    """A model without its lowest layers, whose outputs are zeros for any sample."""
    boundary = Boundary(parts, training.cached_layers)
    with autocast(device, compute):
        one = boundary.reach(torch.zeros(1, 1, dtype=torch.int64, device=device))
    boundary.drop(model, release_pages)
    return boundary.above(parts, lambda samples: one.new_zeros(len(samples), max(map(len, samples)), one.shape[-1]))


def filled_sample(plan: Plan) -> Sample:
    """A sample as long as the plan's longest, with as many trained tokens as the one that has most."""
    longest = plan.training.max_length
    trained = min(longest, plan.lengths.longest_trained if plan.lengths else longest)
    labels = [IGNORED] * (longest - trained) + [1] * trained
    return Sample([1] * longest, labels, max(0, longest - trained))


def random_checkpoint(source: Path, out: Path, device: str = "cpu") -> None:
    """A checkpoint of `source`'s shape and dtype with random weights, drawn on `device`.

    Another process makes it, as that leaves heap behind.
    """
    code = (
        "import sys, torch; from transformers import AutoConfig, AutoModelForCausalLM as A;"
        "c = AutoConfig.from_pretrained(sys.argv[1]); c.use_cache = False;"
        "d = c.dtype or torch.float32; torch.set_default_device(sys.argv[3]);"
        "A.from_config(c, dtype=d if isinstance(d, torch.dtype) else getattr(torch, d)).save_pretrained(sys.argv[2])"
    )
    done = processes.run(code, source, out, device)
    if done.returncode:
        reason = processes.reason(done.returncode, done.stderr)
        raise BadInput(source, f"no model with random weights can be made of it: {reason}")


def main() -> None:
    """`python -m edgeft.training.try_plan plan.json out.json`: a process of its own, as training is."""
    plan, out = map(Path, sys.argv[1:])
    try:
        trial(Plan.read(plan), sha256_file(plan)).write(out)
    except EdgeftError as problem:
        print(f"edgeft: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)


if __name__ == "__main__":
    main()
