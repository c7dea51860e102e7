"""The table of docs/methods.md: every way to train, which layers and which base, carried out or refused.

What trains runs two real steps; the second holds what the simulated step says, to the byte. What is refused says why.
`make methods-table` lets these tests write both tables.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ROOT, save_model, second_step_peak

from edgeft.data.dataset import Sample
from edgeft.engine.loop import Run, make_run
from edgeft.engine.nf4_base import load_base
from edgeft.errors import BadInput
from edgeft.machines.profile import load_profile
from edgeft.memory.train_step import Workload
from edgeft.models.checkpoint import DTYPES
from edgeft.models.parts import find_parts
from edgeft.models.spec import ModelSpec
from edgeft.planning.candidates import candidates
from edgeft.planning.job_checks import check_job
from edgeft.settings.job import Training, make_job
from edgeft.settings.tuners import TUNERS
from edgeft.simulation.simulate import simulate

CPU, WORK = torch.device("cpu"), Workload(48, 47)
BASES = {"fp32": "cpu-8gb", "bf16": "rtx4090-24gb", "fp16": "t4", "nf4": "cpu-8gb"}  # each on a machine that has it
LAYERS: dict[str, dict[str, Any]] = {
    "all": {}, "sparse": {"active_layers": 1}, "lisa": {"active_layers": 1, "lisa_interval": 1},
}  # fmt: skip
USUAL = ("random", "both")
PAGE, HEADING = ROOT / "docs" / "methods.md", "## Which go together"
WAYS = {
    f"tuner={name}" + ("" if form in USUAL else f" {tuner.chosen_by}={form}"): {"tuner": name, tuner.chosen_by: form}
    for name, tuner in TUNERS.items()
    for form in tuner.forms
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return save_model(tmp_path_factory.mktemp("llama"))


def planned(spec: ModelSpec, way: dict[str, Any], layers: str, base: str) -> Training | str:
    """The first candidate of a combination, for the CPU; or why it is refused."""
    job = make_job(model=spec.model, layers=layers, base_precision=base, profile=BASES[base], batch_size=4,
                   micro_batch_size=2, checkpointing=False, loss_chunk_tokens=32,
                   **LAYERS[layers], **way, **({"rank": 4} if TUNERS[way["tuner"]].ranked else {}))  # fmt: skip
    try:
        check_job(job, spec)
        found = next(candidates(job, load_profile(job.profile), spec, WORK, 4))
    except BadInput as problem:
        assert problem.hint
        return f"`{problem.where}`: {problem.problem}"
    return found.model_copy(update={"device": "cpu", "optimizer": "adamw"})


def as_it_ran(training: Training, run: Run) -> Training:
    """The plan with the layers that trained last: LISA's, while the adapters of the others rested."""
    if run.lisa is None or training.layers != "lisa":
        return training
    active = tuple(sorted(int(unit.removeprefix("layer ")) for unit in run.lisa.active))
    rest = tuple(layer for layer in training.trained_layers if layer not in active) if training.adapts else ()
    return training.model_copy(update={"layers": "sparse", "trained_layers": active, "resting_layers": rest})


def trains(spec: ModelSpec, training: Training, work: Path) -> bool:
    """Whether two steps run, and the second holds what is simulated of the layers that train in it."""
    compute = DTYPES[training.compute_dtype]
    model = load_base(Path(spec.model), training, CPU, compute).requires_grad_(False)
    work.mkdir()
    run = make_run(training, CPU, compute, model, find_parts(model), Path(spec.model), work)
    ids = list(range(5, 53))
    peak = second_step_peak(run, [Sample(ids, ids, 1)] * training.batch_size)
    peak += 8 if run.scaler.is_enabled() else 0  # the scale and a count, there before the step that is watched
    if training.densely and training.layers == "lisa":  # the step that is watched makes other layers dense, too
        return run.step == 2
    return peak == simulate(spec, as_it_ran(training, run), WORK).live_peak_bytes


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (way != "tuner=adapter adapter_at=mlp")) for way in WAYS]
)
def test_the_table_says_what_trains(
    way: str, llama: ModelSpec, tmp_path: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "methods-cache"))
    cells, refused = [], dict[str, dict[str, list[str]]]()
    for base in BASES:
        made = {layers: planned(llama, WAYS[way], layers, base) for layers in LAYERS}
        cells.append(", ".join(each for each in made if not isinstance(made[each], str)) or "none")
        for layers, training in made.items():
            if isinstance(training, str):
                refused.setdefault(training, {}).setdefault(layers, []).append(base)
            else:
                assert trains(llama, training, tmp_path / f"{base} {layers}"), (base, layers)
    wanted = [f"| `{way}` | {' | '.join(cells)} |"]
    for why, where in refused.items():
        places = "; ".join(f"{layers} on {', '.join(bases)}" for layers, bases in where.items())
        wanted.append(f"| `{way}` | {places} | {why} |")
    if os.environ.get("EDGEFT_WRITE_TABLES"):
        write_rows(way, wanted)
    page = PAGE.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]
    assert [line for line in page.splitlines() if line.startswith(f"| `{way}` |")] == wanted


def write_rows(way: str, rows: list[str]) -> None:
    """Put a way's rows into the page's two tables, in the order of WAYS."""
    before, heading, rest = PAGE.read_text(encoding="utf-8").partition(HEADING)
    section, mark, after = rest.partition("\n## ")
    lines = [line for line in section.splitlines() if not line.startswith(f"| `{way}` |")]
    heads = [n for n, line in enumerate(lines) if line.startswith("|---")]
    order = list(WAYS)

    def place(row: str) -> int:
        match = re.match(r"\| `(.+?)` \|", row)
        return order.index(match[1]) if match and match[1] in order else -1

    for head, own in (
        (heads[1], rows[1:]),
        (heads[0], rows[:1]),
    ):  # the lower table first: lines above stay where they are
        at = head + 1
        while at < len(lines) and lines[at].startswith("|") and place(lines[at]) < order.index(way):
            at += 1
        lines[at:at] = own
    PAGE.write_text(before + heading + "\n".join(lines) + "\n" + mark + after, encoding="utf-8")


def test_every_way_has_its_row() -> None:
    """In the order of the tuners, so that a new one is not forgotten."""
    page = PAGE.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]
    first = [line for line in page.splitlines() if line.startswith("| `tuner=") and line.count(" | ") == len(BASES)]
    assert [re.match(r"\| `(.+?)` \|", line)[1] for line in first] == list(WAYS)  # type: ignore[index]
