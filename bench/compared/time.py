"""How long is a step of each way of training? All of them in turn, a few rounds, on a machine that does nothing else.

Each sample is a process of its own, forked with everything imported: the plan's own run on the example's first rows,
the same for every way. Its first step has no optimizer states yet and is not timed.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decode import MOST_BY_OTHERS, busy_ticks, median_and_range, work_of_others

from compared.ways import CHOSEN_AT, EXAMPLE, REFERENCE, Case, split, ways
from edgeft.data.dataset import read_samples
from edgeft.data.samples import Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.engine.loop import make_run
from edgeft.machines import meter
from edgeft.planning.plan import Plan, make_plan
from edgeft.settings.job import Training, make_job
from edgeft.training.prepare import choose_device, hold_to, make_pool, prepare

ROUNDS, STEPS = 3, 3


@dataclasses.dataclass(frozen=True)
class Timed:
    """One sample: seconds of each timed step, and how many cores others had meanwhile."""

    seconds: tuple[float, ...]
    cores_others: float


def plan_of(case: Case, layers: Sequence[int]) -> Plan:
    """A way's plan; `layers`: those that its own run chose by its data."""
    settings = dict(case.settings)
    if settings.pop("layer_score", None) is not None:
        settings["trained_layers"] = ",".join(map(str, layers))
        settings.pop("active_layers")
    data = {"data": str(case.of.data(case.rows, 0)), "valid": str(case.of.valid)}
    return make_plan(make_job(model=str(case.of.base), profile="cpu", **data, **settings))


def batches(training: Training, rows: Sequence[Sample]) -> list[Sequence[Sample]]:
    """The samples of the first steps, as the rows lie in their file: the same for every way."""
    size = training.batch_size
    return [rows[step * size : (step + 1) * size] for step in range(1 + STEPS)]


def timed(plan: Plan, rows: Sequence[Sample]) -> Timed:
    """One sample of a plan's steps, in a process that has imported all and done nothing yet."""
    meter.control_malloc()
    device, compute, _ = choose_device(plan, None)
    base = Path(plan.job.model)
    with tempfile.TemporaryDirectory() as work:
        model, parts = prepare(plan, device, compute, base)
        pool = make_pool(plan, parts)
        run = make_run(plan.training, device, compute, model, parts, base, Path(work))
        hold_to(pool, plan, "train")
        first, *others = batches(plan.training, rows)
        run.train_step(list(first))
        seconds, began = [], (time.monotonic(), time.process_time(), busy_ticks())
        for samples in others:
            started = time.monotonic()
            run.train_step(list(samples))
            seconds.append(time.monotonic() - started)
        wall, own, machine = (now - then for now, then in zip(
            (time.monotonic(), time.process_time(), busy_ticks()), began, strict=True))  # fmt: skip
    return Timed(tuple(seconds), max(0.0, machine - own) / wall)


def time_ways(layers: Mapping[str, Sequence[int]], only: Sequence[str] = ()) -> dict[str, Any]:
    """Seconds of a step of each way and their ratio to LoRA's in all layers; `layers`: what the sparse ways chose.

    Ends the program where other work runs beside it.
    """
    if (others := work_of_others()) > MOST_BY_OTHERS:
        raise SystemExit(f"other work takes {others:.2f} of a core: wait until it takes less than {MOST_BY_OTHERS}")
    meter.import_all()
    named = [way for way in ways() if not only or way in only or way == REFERENCE]
    rows = read_samples(str(EXAMPLE.data(CHOSEN_AT, 0)), TextTokenizer(EXAMPLE.base), None)
    samples: dict[str, list[Timed]] = {way: [] for way in named}
    context = multiprocessing.get_context("fork")
    for number in range(ROUNDS):
        for way in named[number:] + named[:number]:
            plan = plan_of(Case(way, CHOSEN_AT, seed=number), layers.get(way, ()))
            with context.Pool(1) as pool:
                samples[way].append(pool.apply(timed, (plan, rows)))
        print(f"round {number + 1} of {ROUNDS}", flush=True)
    if (others := statistics.median(each.cores_others for own in samples.values() for each in own)) > MOST_BY_OTHERS:
        raise SystemExit(f"not recorded: other work took {others:.2f} of a core meanwhile")
    return {"rounds": ROUNDS, "steps": STEPS, "rows": [row_of(way, own, samples[REFERENCE])
                                                       for way, own in samples.items()]}  # fmt: skip


def row_of(way: str, own: Sequence[Timed], reference: Sequence[Timed]) -> dict[str, Any]:
    """A way's seconds a step, a median a round, and their ratio to the reference's within each round."""
    seconds = [statistics.median(each.seconds) for each in own]
    ratios = [mine / statistics.median(other.seconds) for mine, other in zip(seconds, reference, strict=True)]
    return {
        "way": way, "layers": split(way)[1], "seconds_per_step": median_and_range(seconds),
        "of_lora_in_all_layers": median_and_range(ratios),
        "cores_others": round(statistics.median(each.cores_others for each in own), 3),
    }  # fmt: skip
