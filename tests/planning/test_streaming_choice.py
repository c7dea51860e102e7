"""When do layers stay in their files, what does a plan count for it, what does it refuse?"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from tiny import CONFIGS, plan_of

from edgeft.errors import BadInput, DoesNotFit
from edgeft.machines.profile import load_profile
from edgeft.memory import streamed, train_step
from edgeft.memory.several import PCIE_RATE
from edgeft.memory.timing import READ_BYTES_PER_SECOND, count
from edgeft.models.spec import read_model_spec
from edgeft.planning.plan import Plan, make_plan, smaller_plan
from edgeft.reporting.matrix import method
from edgeft.settings.job import make_job
from edgeft.units import GIB, show_bytes

LLAMA = str(CONFIGS / "llama-3.1-8b")
SMALL = str(CONFIGS / "tinyllama-1.1b")
LAPTOP = load_profile("laptop-16gb").model_copy(update={"name": "laptop-8gb", "memory_gib": 7.7})


def plan(model: str = LLAMA, **settings: Any) -> Plan:
    values = {"model": model, "profile": "laptop-16gb", "max_length": 512, "target": "ort-int4", **settings}
    return make_plan(make_job(**values), profile=LAPTOP)


def terms(made: Plan, phase: str) -> dict[str, int]:
    return {term.name: term.bytes for each in made.phases if each.name == phase for term in each.terms}


def test_an_8b_model_trains_on_a_laptop_of_8_gib() -> None:
    """Of 7.7 GiB the desktop keeps 4: its weights in 4 bits alone are twice what is left."""
    with pytest.raises(DoesNotFit, match="it fits when stream_layers is left to the planner"):
        plan(stream_layers=False)
    made = plan()
    training, spec = made.training, made.spec
    assert training.stream_layers and training.base_precision == "nf4" and training.tuner == "lora"
    assert training.checkpointing and not training.kept_layers and training.malloc == "tight"
    assert (
        made.peak_bytes
        <= made.budget_bytes
        < 4 * GIB
        < 0.6 * train_step.weight_bytes(spec, training.model_copy(update={"stream_layers": False}))
    )
    [note] = [note for note in made.notes if note.startswith("layers stay in their files")]
    assert (
        "(nothing fits with all weights in memory): two of 32 are there at a time, 104 MiB each, 4.97 GiB less" in note
    )
    assert method(made).endswith("layers, from their files")
    assert [row for row in made.frontier if row.stream_layers and row.fits]
    [resident] = [each for each in made.alternatives if each.setting == "stream_layers"]
    assert (resident.value, resident.fits) == ("False", False) and resident.more_bytes > 4 * GIB


def test_nothing_streams_where_something_fits() -> None:
    made = make_plan(make_job(model=SMALL, profile="laptop-16gb", max_length=512))
    assert not made.training.stream_layers and not any(row.stream_layers for row in made.frontier)
    assert not [note for note in made.notes if "stay in their files" in note]
    asked = make_plan(make_job(model=SMALL, profile="laptop-16gb", max_length=512, stream_layers=True))
    assert asked.training.stream_layers and asked.training.base_precision == "fp32"
    [note] = [note for note in asked.notes if note.startswith("layers stay in their files")]
    assert "(as set): two of 22" in note
    assert terms(asked, "load")["weights"] < 0.1 * terms(made, "load")["weights"]
    # the head is checked on 64 tokens: of matrices that are stored in bf16, the largest is cast
    assert terms(asked, "load")["forward"] == 4 * (2048 * 5632 + 2 * 64 * 32_000)


@pytest.mark.parametrize(("precision", "itemsize", "file_itemsize"), [("fp32", 4, 2), ("nf4", 0.5, 0.5)])
def test_two_layers_and_what_is_outside_of_them_are_counted(
    precision: str, itemsize: float, file_itemsize: float
) -> None:
    spec = read_model_spec(SMALL)
    training = plan_of(
        spec, range(22), base_precision=precision, checkpointing=True, max_length=512, stream_layers=True
    )
    resident = training.model_copy(update={"stream_layers": False})
    layer = sum(linear.in_features * linear.out_features for linear in spec.linears)
    away = train_step.weight_bytes(spec, resident) - train_step.weight_bytes(spec, training)
    assert away == pytest.approx(22 * itemsize * layer + 4 * spec.vocab_size * spec.hidden_size, rel=1e-6)
    rows = min(2 * spec.vocab_size * spec.hidden_size, 2 * 512 * 2**16)
    assert streamed.window_bytes(spec, training) == 2 * int(file_itemsize * layer) + rows
    assert streamed.window_bytes(spec, resident) == streamed.away_bytes(spec, resident) == 0
    assert streamed.casts(spec, training) == (precision == "fp32") and not streamed.casts(spec, resident)
    work = train_step.Workload(512, 512)
    held = {term.name: term.bytes for term in train_step.step_terms(spec, training, work)}
    assert held["streamed layers"] == streamed.window_bytes(spec, training)
    # forwards and recomputed; the batch in one piece
    read = count(spec, training, work, 0).read
    assert read == pytest.approx(44 * file_itemsize * layer) and count(spec, resident, work, 0).read == 0
    upper = training.model_copy(update={"trained_layers": tuple(range(18, 22)), "layers": "sparse"})
    assert count(spec, upper, work, 0).read == pytest.approx(26 * file_itemsize * layer)


def test_reading_binds_where_little_is_computed() -> None:
    made = plan(SMALL, stream_layers=True, max_length=8, batch_size=1)
    read = count(made.spec, made.training, made.work, 0).read
    assert made.seconds_per_step == pytest.approx(read / READ_BYTES_PER_SECOND, rel=1e-3)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tuner": "full", "layers": "all", "base_precision": "fp32"}, "all weights train, none is only read"),
    ({"tuner": "full", "layers": "lisa", "patience": 2}, "layers that train in turn at full rank lie in files"),
    ({"tuner": "full", "layers": "lisa", "quantize_aware": True}, "rounded weights are copies in memory"),
    ({"checkpointing": False}, "each is read once more when it is recomputed"),
    ({"kept_layers": 2}, "each is read once more when it is recomputed"),
    ({"malloc": "fast"}, "malloc=fast counts what is resident"),
    ({"prefix_cache": True, "layers": "sparse", "active_layers": 2}, "the outputs of the lower ones are to be kept"),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED)
def test_what_cannot_stream_is_refused_with_its_reason(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadInput, match=f"stream_layers: no layers can stay in their files: {reason}"):
        plan(SMALL, stream_layers=True, **settings)


LISA: dict[str, Any] = {"tuner": "full", "layers": "lisa", "active_layers": 2, "lisa_interval": 5, "max_steps": 100}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_layers_in_turn_are_counted_where_they_lie(precision: str) -> None:
    """Those that train in memory in fp32, the others in files of the base or, after a turn, of their own."""
    profile = LAPTOP.model_copy(update={"memory_gib": 15.6, "matmul_tflops": {"fp32": 0.5, "bf16": 0.5}})
    how = {"model": SMALL, "profile": "laptop-16gb", "max_length": 512, "base_precision": precision, **LISA}
    made = make_plan(make_job(**how, stream_layers=True), profile=profile)
    training, spec = made.training, made.spec
    matrices = sum(linear.in_features * linear.out_features for linear in spec.linears)
    page = {"fp32": 4, "bf16": 2, "nf4": 0.5}[precision]  # what was learnt in fp32 lies there in 4 bytes, not in 2
    scales = 0.0  # of 4 bits they stay in memory, but for a layer that is dense
    if precision == "nf4":
        scales = (train_step.NF4_BYTES - 0.5) * matrices + train_step.NF4_PER_LINEAR * len(spec.linears)
    assert terms(made, "train")["dense layers"] == int(2 * (4 * matrices - scales))
    assert streamed.layer_file_bytes(spec, training) == int(page * matrices)
    rows = min(2 * spec.embedding_parameters, 2**16 * training.micro_batch_size * 512)
    assert (
        terms(made, "train")["streamed layers"]
        == terms(made, "evaluate")["streamed layers"]
        == (2 * int(page * matrices) + rows)
    )
    [note] = [note for note in made.notes if note.startswith("layers stay in their files")]
    each = show_bytes(int(page * matrices))
    assert f"two of 22 are there at a time, {each} each" in note
    # layers that train are read at their turn alone: of 22 forwards and, from the lowest that trains on, again
    read = count(spec, training, made.work, 0).read
    crossed = 22 - 20 / 3
    splits = read / (page * matrices) / (22 + crossed - 4)
    assert splits == pytest.approx(round(splits)) and splits >= 1
    [train] = [each for each in made.stages.disk if each.stage == "train"]
    files = {term.name: term.bytes for term in train.terms}
    assert files["result"] == 4 * 22 * (matrices + (2 * spec.hidden_size))
    assert files.get("pages", 0) == (0 if precision == "fp32" else 22 * int(page * matrices))
    [export] = [each for each in made.stages.disk if each.stage == "export"]
    again = {term.name: term.bytes for term in export.terms}
    assert again.get("pages", 0) == files.get("pages", 0)
    assert sum(term.bytes for term in export.terms) == export.peak_bytes
    resident = make_plan(make_job(**how, stream_layers=False, checkpointing=True), profile=profile)
    assert made.peak_bytes < 0.8 * resident.peak_bytes
    assert {"pages"}.isdisjoint(term.name for each in resident.stages.disk for term in each.terms)


def test_a_step_down_never_goes_on_from_checkpoints_of_another_kind() -> None:
    """Layers that wait for their turn are in them, or in files beside: of an fp32 base by whether layers stream."""
    settings = {"model": SMALL, "profile": "laptop-16gb", "max_length": 512, **LISA}
    made = make_plan(make_job(**settings, base_precision="fp32", stream_layers=False))
    with pytest.raises(DoesNotFit, match="no way of training the same needs at most"):
        smaller_plan(made, 3 * GIB)
    both = make_plan(make_job(**settings, base_precision="nf4", stream_layers=False))
    least = make_plan(make_job(**settings, base_precision="nf4", stream_layers=True, micro_batch_size=1)).peak_bytes
    assert smaller_plan(both, least + 2**20).training.stream_layers


def test_other_devices_and_experts_are_refused() -> None:
    with pytest.raises(BadInput, match="they come to CPUs and CUDA devices, and this is a mps profile"):
        make_plan(make_job(model=SMALL, profile="apple-16gb", stream_layers=True))
    with pytest.raises(BadInput, match="a GPU would hold every layer that read a soft prompt"):
        make_plan(make_job(model=SMALL, profile="t4", stream_layers=True, tuner="prompt"))
    plan(SMALL, stream_layers=True, tuner="prompt", target="onnx-portable-int8")  # a CPU reads its pages again
    with pytest.raises(BadInput, match="put together from several tensors of the files"):
        plan(str(CONFIGS / "mixtral-8x7b"), stream_layers=True)


def test_a_step_down_goes_to_streaming_where_nothing_smaller_is_left() -> None:
    made = make_plan(make_job(model=SMALL, profile="laptop-16gb", max_length=512, rank=16, base_precision="fp32"))
    less = smaller_plan(made, 3 * GIB)
    assert less.training.stream_layers and less.peak_bytes <= 3 * GIB
    same = dict.fromkeys(("micro_batch_size", "checkpointing", "kept_layers", "loss_chunk_tokens", "malloc"))
    same["stream_layers"] = None
    assert less.training.model_dump(exclude=set(same)) == made.training.model_dump(exclude=set(same))


GPU = load_profile("4GiB")


def on_gpu(model: str = LLAMA, **settings: Any) -> Plan:
    return make_plan(make_job(**{"model": model, "profile": "4GiB", "max_length": 512, **settings}), profile=GPU)


def test_an_8b_model_trains_on_a_card_of_4_gib() -> None:
    """Published: 2.40 GB for 8B on NF4, one row of 512 tokens (Soup, a laptop's GPU of 4 GB); rank not told."""
    with pytest.raises(DoesNotFit, match="it fits when stream_layers is left to the planner"):
        on_gpu(stream_layers=False, batch_size=1)
    made = on_gpu(batch_size=1, rank=16, optimizer="adamw", base_precision="nf4")
    training, spec = made.training, made.spec
    assert training.stream_layers and training.device == "cuda" and not training.kept_layers
    assert 0.85 * 2.4e9 < made.peak_bytes < 1.15 * 2.4e9 < made.budget_bytes
    matrices = sum(linear.in_features * linear.out_features for linear in spec.linears)
    assert terms(made, "train")["streamed layers"] == 2 * matrices // 2 == streamed.window_bytes(spec, training)
    resident = training.model_copy(update={"stream_layers": False})
    away = train_step.weight_bytes(spec, resident) - train_step.weight_bytes(spec, training)
    assert away == 32 * matrices // 2 + 2 * spec.vocab_size * spec.hidden_size  # scales and the head stay
    hosts = {phase.name: {term.name: term.bytes for term in phase.terms} for phase in made.stages.phases}
    rows = min(2 * spec.embedding_parameters, 2**16 * 512)
    assert hosts["train"]["streamed layers"] == hosts["load"]["streamed layers"] == 3 * streamed.PIECE_BYTES + rows
    [note] = [note for note in made.notes if note.startswith("layers stay in their files")]
    assert "two of 32 are on the GPU at a time, 104 MiB each" in note and "at 4 GB/s if the host keeps them" in note
    assert method(made).endswith("layers, from their files")


def test_what_a_gpu_reads_comes_over_its_bus_or_from_a_disk() -> None:
    """By what its host keeps in memory; where nothing else is asked for in the precision that it keeps."""
    made = on_gpu(batch_size=1)
    assert made.training.base_precision == "nf4"
    [note] = [note for note in made.notes if note.startswith("in 4 bits: in bf16 13.0 GiB of layers would come")]
    assert note.endswith("(--set base_precision=bf16)")
    asked = on_gpu(batch_size=1, base_precision="bf16", optimizer="adamw", rank=8)
    read = count(asked.spec, asked.training, asked.work, 0).read
    assert asked.seconds_per_step == pytest.approx(read / READ_BYTES_PER_SECOND, rel=1e-3)
    wide = GPU.model_copy(update={"host_memory_gib": 64.0})
    kept = make_plan(make_job(**asked.job.model_dump()), profile=wide)
    assert kept.training == asked.training and kept.seconds_per_step == pytest.approx(read / PCIE_RATE, rel=1e-3)
    free = make_plan(make_job(**asked.job.model_dump() | {"base_precision": None}), profile=wide)
    assert free.training.base_precision == "bf16"  # that costs half a point less, and no more than 4 bits would
    assert not [note for note in free.notes if note.startswith("in 4 bits")]


def test_processes_of_a_machine_share_its_disk() -> None:
    """Each has its own window in its part of the memory, and reads everything once for itself, as far as is known."""
    profile = LAPTOP.model_copy(update={"memory_gib": 20.0})
    how = {"model": SMALL, "profile": "laptop-16gb", "max_length": 16, "batch_size": 4, "base_precision": "fp32"}
    one, two = (make_plan(make_job(**how, stream_layers=True, processes=count), profile=profile) for count in (1, 2))
    reads = [count(made.spec, made.training, made.work, 0).read for made in (one, two)]
    assert two.seconds_per_step == pytest.approx(2 * reads[1] / READ_BYTES_PER_SECOND, rel=0.2)
    assert terms(one, "train")["streamed layers"] >= terms(two, "train")["streamed layers"] > 0
    assert "gloo" in terms(two, "train") and two.budget_bytes == one.budget_bytes // 2


def points(made: Plan) -> float:
    return next(row.quality_cost for row in made.frontier if row.high_bytes == made.peak_bytes)


def test_more_memory_never_gives_a_much_worse_plan() -> None:
    """What fits whole may give up more than what stays in files, which a smaller machine takes: that is taken then."""
    made = {
        gib: make_plan(make_job(model=str(CONFIGS / "qwen2.5-7b"), profile="t4", max_memory_bytes=gib * GIB))
        for gib in (4, 5, 6, 7, 9, 12)
    }
    lost = [points(each) for each in made.values()]
    assert all(more < less + 1.0 for less, more in itertools.pairwise(lost)), lost
    assert made[7].training.stream_layers and made[12].training.stream_layers is False
    [note] = [note for note in made[7].notes if note.startswith("layers stay in their files")]
    assert "(better than what fits with all weights in memory)" in note
    whole = make_plan(
        make_job(model=str(CONFIGS / "qwen2.5-7b"), profile="t4", max_memory_bytes=7 * GIB, stream_layers=False)
    )
    assert points(whole) >= points(made[7]) + 1 and 2 * whole.seconds_per_step >= made[7].seconds_per_step


def test_what_is_better_from_files_and_slower_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"model": str(CONFIGS / "qwen2.5-7b"), "profile": "t4", "max_memory_bytes": 7 * GIB}
    monkeypatch.setattr("edgeft.memory.timing.READ_BYTES_PER_SECOND", 1e7)
    monkeypatch.setattr("edgeft.memory.timing.read_rate", lambda *_: 1e7)
    made = make_plan(make_job(**how))
    assert not made.training.stream_layers
    [note] = [note for note in made.notes if "--set stream_layers=true" in note]
    assert note.startswith("with layers in their files") and "points are given up instead of" in note


def test_what_would_do_counts_layers_in_files_too() -> None:
    """A refusal names the least memory that any way needs, and that much does."""
    job: dict[str, Any] = {"model": str(CONFIGS / "qwen2.5-14b"), "profile": "cpu-8gb"}
    with pytest.raises(DoesNotFit, match="layers in their files") as refused:
        make_plan(make_job(**job, max_memory_bytes=5 * GIB))
    assert refused.value.need_bytes is not None
    assert make_plan(make_job(**job, max_memory_bytes=refused.value.need_bytes)).training.stream_layers
