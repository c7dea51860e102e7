"""Every combination of how to train: refused by the plan with its reason, or it trains, goes on, merges and scores.

A GPU's plan runs on the CPU in the GPU's dtypes: autocast and scaled fp16 gradients are PyTorch's own there too.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import killed_at

from edgeft.data.dataset import Sample
from edgeft.documents import sha256_file
from edgeft.engine.loop import Run
from edgeft.errors import BadInput
from edgeft.machines.profile import load_profile
from edgeft.memory.train_step import Workload
from edgeft.merging.merge import merge
from edgeft.models.checkpoint import load_plain
from edgeft.models.evaluate import token_losses
from edgeft.models.parts import find_parts
from edgeft.models.spec import read_model_spec
from edgeft.planning.candidates import candidates
from edgeft.planning.job_checks import check_job
from edgeft.planning.plan import Plan, make_plan
from edgeft.settings.job import make_job
from edgeft.settings.tuners import TUNERS
from edgeft.training.train import train

PARTS = 6  # of the sample, each a test
ROWS = [{"prompt": f"lib{i}:", "completion": f" {('libs', 'doc', 'python')[i % 3]}"} for i in range(20)]
ON = {"embedding": "on", "norm": "on", "head": "on"}
ENDS: dict[str, dict[str, str]] = {
    "no ends": {}, "norm": {"norm": "on"}, "ends": ON, "embedding rotates": {"embedding": "rotate"},
    "ends rotate": dict.fromkeys(ON, "rotate"),
}  # fmt: skip
FORMS: dict[str, dict[str, str]] = {
    "usual": {}, "pissa": {"init": "pissa"}, "after the MLP": {"adapter_at": "mlp"},
    "beside the MLP": {"adapter_at": "parallel"},
}  # fmt: skip
AXES: dict[str, tuple[Any, ...]] = {
    "profile": ("cpu-8gb", "rtx4090-24gb", "t4"),
    "tuner": tuple(TUNERS),
    "form": tuple(FORMS),
    "layers": ("all", "sparse", "lisa"),
    "base_precision": (None, "fp32", "bf16", "fp16", "nf4"),
    "ends": tuple(ENDS),
    "lisa_state": ("drop", "park"),
    "checkpointing": (False, True),
}
PRODUCT = [
    dict(zip(AXES, values, strict=True))
    for values in itertools.product(*AXES.values())
    if values[3] == "lisa" or values[6] == "drop"
]


spec_of = functools.cache(lambda model: read_model_spec(str(model)))
profile_of = functools.cache(load_profile)


def settings_of(combination: dict[str, Any]) -> dict[str, Any]:
    settings = {k: v for k, v in combination.items() if v is not None and k not in ("ends", "form")}
    settings |= (
        ENDS[combination["ends"]]
        | FORMS[combination["form"]]
        | ({"rank": 4} if TUNERS[combination["tuner"]].ranked else {})
    )
    if combination["layers"] != "all":
        settings["active_layers"] = 1
    return settings | ({"lisa_interval": 1} if combination["layers"] == "lisa" else {})


def refusal(combination: dict[str, Any], model: Path) -> BadInput | None:
    """Why the planner refuses a combination, None where it does not."""
    spec, profile = spec_of(model), profile_of(combination["profile"])
    try:
        job = make_job(model=str(model), **settings_of(combination))
        check_job(job, spec)
        next(candidates(job, profile, spec, Workload(32, 16), 4))
    except BadInput as problem:
        return problem
    return None


def pairs(combination: dict[str, Any]) -> set[tuple[tuple[str, Any], ...]]:
    return set(itertools.combinations(sorted(combination.items(), key=lambda item: item[0]), 2))


def covering(combinations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few of them in which every two settings that meet in any of them meet."""
    left = set().union(*map(pairs, combinations))
    shuffled, chosen = random.Random(0).sample(combinations, len(combinations)), []
    while left:
        best = max(shuffled, key=lambda one: len(pairs(one) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


@pytest.fixture
def trained_as_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step, whatever trains is fp32 and moves."""
    step = Run.train_step

    def checked(self: Run, samples: list[Sample]) -> float:
        loss = step(self, samples)
        assert self.chosen and {p.dtype for _, p in self.chosen} == {torch.float32}
        return loss

    monkeypatch.setattr(Run, "train_step", checked)


@pytest.fixture
def surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache of quantised bases, and a CPU of fixed rates for what runs in a GPU's place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "product-cache"))
    monkeypatch.setattr("edgeft.training.prepare.detect", lambda profile: load_profile("cpu-8gb"))


def goes_through(combination: dict[str, Any], model: Path, data: Path, out: Path) -> None:
    """Plan, train, stop after two steps, go on, merge, score. Raises where any of it fails."""
    values = {"batch_size": 4, "max_steps": 4, "epochs": 2.0, "eval_rows": 2, "checkpoint_steps": 1, "rank": None}
    job = make_job(model=str(model), data=str(data), **{**values, **settings_of(combination)})
    out.mkdir(parents=True)
    make_plan(job).write(out / "plan.json")

    stop = killed_at(3)

    def run(progress: Any) -> Any:
        plan, digest = Plan.read(out / "plan.json"), sha256_file(out / "plan.json")
        emulate = plan.training.device != "cpu"
        return train(plan, out / "train", plan_sha256=digest, progress=progress, emulate=emulate)

    with pytest.raises(KeyboardInterrupt):
        run(stop)
    result = run(lambda *_: None)
    assert result.resumed_at == (2,) and result.steps == 4
    moved = {unit.unit for unit in result.units if unit.relative_change is None or unit.relative_change > 0}
    assert not result.training.folds or {unit.unit for unit in result.units if unit.steps} == moved
    merged = merge(out / "train", out / "merged", wise_alpha=1.0, progress=lambda *_: None)
    assert merged.changed_tensors > 0 or merged.beside > 0
    score = load_plain(out / "merged")
    with torch.no_grad():
        sample, cpu = Sample(list(range(5, 20)), list(range(5, 20)), 0), torch.device("cpu")
        assert token_losses(score, find_parts(score), [sample], cpu, torch.float32, 16).isfinite()


def run_all(combinations: list[dict[str, Any]], model: Path, data: Path, out: Path) -> Iterator[str]:
    """What fails, one line each: all of a product's faults are worth more than its first."""
    for number, combination in enumerate(combinations):
        try:
            goes_through(combination, model, data, out / str(number))
        except (Exception, pytest.fail.Exception) as problem:
            yield f"{combination}: {type(problem).__name__}: {str(problem)[:200]}"


def test_what_is_refused_is_refused_with_its_reason(checkpoint_folder: Path) -> None:
    """No combination ends in a traceback or in an empty hand; what the field uses most is never refused."""
    refused = [(one, reason) for one in PRODUCT if (reason := refusal(one, checkpoint_folder)) is not None]
    assert 0 < len(refused) < len(PRODUCT)
    for one, reason in refused:
        assert reason.where and reason.problem and reason.hint, one
        usual = one["ends"] == "no ends" and one["base_precision"] in (None, "nf4") and one["layers"] != "all"
        other = not set(FORMS[one["form"]].values()) <= set(TUNERS[one["tuner"]].forms)
        whole = TUNERS[one["tuner"]].embedded  # a soft prompt has no layers to choose from
        assert not usual or not TUNERS[one["tuner"]].adapters or whole or other, one


@pytest.fixture(scope="module")
def sample(checkpoint_folder: Path) -> list[dict[str, Any]]:
    return covering([one for one in PRODUCT if refusal(one, checkpoint_folder) is None])


@pytest.mark.parametrize("part", range(PARTS))
def test_a_covering_sample_of_the_rest_goes_through(
    part: int, sample: list[dict[str, Any]], checkpoint_folder: Path, write_rows: Any, tmp_path: Path,
    surroundings: None, trained_as_fp32: None,
) -> None:  # fmt: skip
    faults = list(run_all(sample[part::PARTS], checkpoint_folder, write_rows("rows.jsonl", ROWS), tmp_path))
    assert len(sample) > 2 * PARTS and not faults, "\n".join(faults)


@pytest.mark.slow
def test_all_of_the_rest_goes_through(
    checkpoint_folder: Path, write_rows: Any, tmp_path: Path, surroundings: None, trained_as_fp32: None
) -> None:
    accepted = [one for one in PRODUCT if refusal(one, checkpoint_folder) is None]
    faults = list(run_all(accepted, checkpoint_folder, write_rows("rows.jsonl", ROWS), tmp_path))
    assert not faults, "\n".join(faults)
