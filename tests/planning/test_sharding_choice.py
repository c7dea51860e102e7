"""When has each process a part of the base, what does a plan count for it, what does it refuse?"""

from __future__ import annotations

from typing import Any

import pytest
from tiny import CONFIGS, plan_of

from edgeft.errors import BadInput, DoesNotFit
from edgeft.memory import disk, several, sharded, train_step
from edgeft.memory.timing import count
from edgeft.models.spec import read_model_spec
from edgeft.planning.plan import Plan, make_plan, smaller_plan
from edgeft.reporting.matrix import method
from edgeft.settings.job import make_job
from edgeft.units import GIB

LLAMA, SMALL = (str(CONFIGS / name) for name in ("llama-3.1-8b", "tinyllama-1.1b"))
HALF = {"base_precision": "bf16", "max_memory_bytes": 12 * GIB}  # of which the weights alone take 15


def plan(model: str = LLAMA, **settings: Any) -> Plan:
    values = {"model": model, "profile": "l4-24gb", "max_length": 512, "processes": 4, "target": "ort-int4", **settings}
    return make_plan(make_job(**values))


def terms(made: Plan, phase: str) -> dict[str, int]:
    return {term.name: term.bytes for each in made.phases if each.name == phase for term in each.terms}


def test_a_base_that_fits_no_gpu_is_cut_by_itself() -> None:
    with pytest.raises(DoesNotFit, match=r"it fits when (shard_base|stream_layers) is left to the planner"):
        plan(shard_base=False, stream_layers=False, max_memory_bytes=5 * GIB)  # less than its 4-bit form takes
    for settings in ({"shard_base": False}, {"processes": 1}):
        with pytest.raises(DoesNotFit):
            plan(**HALF | settings, stream_layers=False)
        assert plan(**HALF | settings).training.stream_layers, "what processes do not have together comes from files"
    made = plan(**HALF)
    training, spec = made.training, made.spec
    assert training.shard_base and training.base_precision == "bf16" and made.peak_bytes <= made.budget_bytes
    [note] = [note for note in made.notes if "of every layer of the base" in note]
    assert note.startswith("each process holds 1/4 of every layer of the base (nothing fits with all of it in each")
    assert "two of 32 layers whole at a time, 416 MiB each: 8.94 GiB less memory" in note
    assert method(made).endswith(" layers, in 4 parts")
    assert [row for row in made.frontier if row.shard_base and row.fits]
    [whole] = [each for each in made.alternatives if each.setting == "shard_base"]
    assert (whole.value, whole.fits) == ("False", False) and whole.more_bytes > 8 * GIB
    saved = {saving.choice: saving.bytes for saving in made.savings}
    assert saved["a part of each layer in a process"] == pytest.approx(whole.more_bytes, rel=0.1)
    layer = spec.layer_parameters[0] * 2
    outside = 2 * spec.total_parameters - 32 * layer
    for phase in ("load", "evaluate", "train"):
        assert terms(made, phase)["weights"] == outside + 8 * layer
        loss = any(name.endswith(", loss") for name in terms(made, phase))  # is the highest moment of a step
        assert terms(made, phase)["gathered layers"] == (1 if loss else 2) * layer
    assert loss, "of a large vocabulary"


def test_nothing_is_cut_where_something_fits() -> None:
    made = plan(processes=2)
    assert not made.training.shard_base and not any(row.shard_base for row in made.frontier)
    asked = plan(processes=2, shard_base=True)
    assert asked.training.shard_base and "(as set)" in " ".join(asked.notes)
    assert asked.training.micro_batch_size > made.training.micro_batch_size, "each gathers all layers twice"


@pytest.mark.parametrize(("precision", "each"), [("fp32", 4), ("bf16", 2), ("nf4", 0.5)])
def test_parts_and_two_layers_are_counted(precision: str, each: float) -> None:
    spec = read_model_spec(SMALL)
    how = {"base_precision": precision, "processes": 4, "batch_size": 4, "checkpointing": True, "max_length": 512}
    training = plan_of(spec, range(22), **how, shard_base=True, compute_dtype="bf16" if precision == "bf16" else "fp32")
    whole = sharded.uncut(training)
    layer = sum(linear.in_features * linear.out_features for linear in spec.linears)
    elsewhere = train_step.weight_bytes(spec, whole) - train_step.weight_bytes(spec, training)
    assert elsewhere == pytest.approx(0.75 * 22 * each * layer, rel=1e-3)
    assert sharded.gathered_bytes(spec, training) == pytest.approx(2 * each * layer, rel=1e-3)
    assert sharded.gathered_bytes(spec, whole) == sharded.elsewhere_bytes(spec, whole) == 0
    work = train_step.Workload(512, 512)
    found = count(spec, training, work, 0).gathered
    assert found == pytest.approx(44 * each * layer, rel=1e-3), "forth and back, in one micro-batch"
    assert count(spec, whole, work, 0).gathered == 0
    upper = training.model_copy(update={"trained_layers": tuple(range(18, 22)), "layers": "sparse"})
    assert count(spec, upper, work, 0).gathered == pytest.approx(26 * each * layer, rel=1e-3)
    assert several.gathering_seconds(training, found) == pytest.approx(0.75 * found / several.GLOO_RATE)
    assert disk.nf4_disk(spec, training) == disk.nf4_disk(spec, whole), "on disk it is whole"


def test_gathering_binds_where_little_is_computed() -> None:
    made = plan(SMALL, shard_base=True, max_length=8, batch_size=4)
    gathered = count(made.spec, made.training, made.work, 0).gathered
    seconds = several.gathering_seconds(made.training, gathered)
    added = several.adding_seconds(made.training, several.added_up(made.spec, made.training))
    assert made.seconds_per_step == pytest.approx(seconds + added, rel=1e-3)
    network = made.training.model_copy(update={"machines": 2})
    assert several.gathering_seconds(network, gathered) > 10 * seconds


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"processes": 1}, "one process has all of it"),
    ({"tuner": "full", "layers": "all", "base_precision": "fp32"}, "its own weights train"),
    ({"tuner": "full", "layers": "lisa"}, "its own weights train"),
    ({"tuner": "full", "layers": "sparse", "base_precision": "nf4"}, "its own weights train"),
    ({"tuner": "prompt"}, "a soft prompt runs through all layers once more"),
    ({"quantize_aware": True}, "weights are rounded for the target"),
    ({"stream_layers": True, "profile": "laptop-16gb"}, "its layers are to stay in their files"),
    (
        {"prefix_cache": True, "layers": "sparse", "active_layers": 2},
        "the lower layers' outputs are to be kept on disk",
    ),
    ({"malloc": "fast", "profile": "laptop-16gb"}, "malloc=fast counts what is resident"),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED)
def test_what_cannot_be_cut_is_refused_with_its_reason(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadInput, match=f"shard_base: the base cannot be cut into parts: {reason}") as refused:
        plan(SMALL, shard_base=True, **settings)
    assert refused.value.hint


def test_experts_cannot_be_cut() -> None:
    with pytest.raises(BadInput, match="are put together from several tensors of the files"):
        plan(str(CONFIGS / "mixtral-8x7b"), shard_base=True)


def test_a_step_down_goes_to_parts_where_nothing_smaller_is_left() -> None:
    """The very same training: of a run that goes on, adapters are in its checkpoints and no part of the base is."""
    how = {"base_precision": "bf16", "rank": 8, "layers": "all", "micro_batch_size": 1}
    before = plan(shard_base=False, **how)
    less = smaller_plan(before, 12 * GIB)
    assert less.training.shard_base and less.peak_bytes <= 12 * GIB
    same = {"shard_base": False, **{name: getattr(before.training, name) for name in ("checkpointing", "kept_layers",
            "loss_chunk_tokens", "micro_batch_size", "malloc")}}  # fmt: skip
    assert less.training.model_copy(update=same) == before.training
