"""Layers in turn at full rank beside layers in their files: the resident run, bit for bit, also after many turns."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streamed_runs import FORMS, SAMPLES, begin
from tiny import plan_of, save_model, smaps_bytes

from edgeft.data.samples import Sample
from edgeft.engine import streaming
from edgeft.engine.adapted_linear import dense_weight
from edgeft.engine.fp32_layers import DenseTurns
from edgeft.engine.loop import Run, start_states
from edgeft.machines import meter
from edgeft.memory import disk, train_step
from edgeft.memory.streamed import layer_file_bytes, window_bytes
from edgeft.models.parts import is_linear
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import Training
from edgeft.simulation.fake import quantisation_states
from edgeft.simulation.simulate import simulate

STEPS = 10  # of four layers that take a turn a step: the third round begins
ENDS = {"embedding": "rotate", "norm": "on", "head": "rotate"}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # form, family, plan
    **{form: (form, "llama", {}) for form in FORMS},
    "two at a time, uniform, parked": ("fp32 of a bf16 file", "llama",
                                       {"active_layers": 2, "lisa_schedule": "uniform", "lisa_state": "park"}),
    "bf16, uniform, parked": ("bf16", "llama", {"lisa_schedule": "uniform", "lisa_state": "park"}),
    "nf4, two at a time, parked": ("nf4", "qwen2", {"active_layers": 2, "lisa_state": "park"}),
    "ends": ("fp32", "llama", ENDS),
    "nf4, ends": ("nf4", "llama", {**ENDS, "lisa_schedule": "uniform"}),
    "gpt2": ("fp32 of a bf16 file", "gpt2", {}),
    "gpt2 on nf4": ("nf4", "gpt2", {}),
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def model_of(folder: Path, form: str, kind: str = "llama", **changes: Any) -> ModelSpec:
    shape = GPT2 if kind == "gpt2" else {"num_hidden_layers": 4, "tie_word_embeddings": False}
    return save_model(folder, kind, dtype=FORMS[form][0], **{**shape, **changes})


def planned(spec: ModelSpec, form: str, **changes: Any) -> Training:
    values = {
        "tuner": "full", "layers": "lisa", "active_layers": 1, "lisa_interval": 1, "checkpointing": True,
        "batch_size": 4, "steps": STEPS, "stream_layers": True, **FORMS[form][1], **changes,
    }  # fmt: skip
    return plan_of(spec, range(spec.num_hidden_layers), **values)


def matrices(run: Run) -> dict[str, torch.Tensor]:
    """Every layer's matrices as they multiply now."""
    return {
        name: dense_weight(module, run.compute).detach()
        for name, module in run.parts.layers.named_modules() if is_linear(module)
    }  # fmt: skip


def apart(runs: tuple[Run, Run]) -> list[str]:
    """Names of what trains now, or multiplies, that is not the same in both runs."""
    (one, other), names = ({name: p for name, p in run.chosen} for run in runs), []
    assert one.keys() == other.keys()
    names += [name for name in one if not torch.equal(one[name], other[name])]
    first, second = map(matrices, runs)
    return names + [name for name in first if not torch.equal(first[name], second[name])]


def both(folder: Path, training: Training) -> tuple[Run, Run]:
    """The resident run and the streamed one, step by step the same: losses, gradients by what they change, weights."""
    ways = (training.model_copy(update={"stream_layers": way}) for way in (False, True))
    one, other = (begin(folder / "model", way, folder / f"work {way.stream_layers}") for way in ways)
    for _ in range(training.steps):
        assert one.train_step(SAMPLES) == other.train_step(SAMPLES)
        assert apart((one, other)) == []
    assert one.lisa is not None and other.lisa is not None and one.lisa.steps == other.lisa.steps
    return one, other


@pytest.mark.parametrize("case", CASES)
def test_turns_are_those_of_the_resident_run(case: str, tmp_path: Path) -> None:
    form, kind, changes = CASES[case]
    spec = model_of(tmp_path / "model", form, kind)
    one, other = both(tmp_path, planned(spec, form, **changes))
    assert other.lisa is not None and isinstance(other.lisa.turns, DenseTurns)
    window, active = other.model.edgeft_window, other.lisa.active
    used = [any(span.used for span in spans) for spans in window.spans]
    assert used == [f"layer {n}" not in active for n in range(spec.num_hidden_layers)]
    for unit in other.lisa.visited():
        if unit in active or unit in other.lisa.always or not unit.startswith("layer"):
            continue
        entries = [name for name, _ in other.lisa.units[unit]]
        kept = streaming.TensorFile(other.lisa.turns.file(unit))
        assert set(kept.entries) <= set(entries) and kept.entries
        learnt = not FORMS[form][1]  # of an fp32 base the resident run's weights are what the files hold
        for name, parameter in one.lisa.units[unit] if learnt and one.lisa is not None else ():
            assert torch.equal(kept.read(name), parameter), name


@pytest.mark.parametrize("form", ["fp32", "bf16", "nf4"])
def test_a_stale_map_is_seen(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault, planted: the file of a layer that leaves again is looked for among those that are mapped already."""
    maps = streaming.Maps()
    monkeypatch.setattr(streaming, "Maps", lambda: maps)
    spec = model_of(tmp_path / "model", form)
    with pytest.raises(AssertionError):
        both(tmp_path, planned(spec, form))


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_that_reads_the_base_again_is_seen(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault, planted: what left has its pages of the base's files once more."""
    kept: dict[int, list[torch.Tensor]] = {}
    first = streaming.Window.let_go

    def let_go(self: streaming.Window, number: int) -> None:
        spans = self.spans[number]
        kept.setdefault(number, [getattr(span.module, streaming.STORED, span.own.data) for span in spans])
        first(self, number)

    def give(self: streaming.Window, number: int, file: Any, linears: Any) -> None:
        for pages, linear in zip(kept[number], linears.values(), strict=True):
            own = linear._parameters["weight"]
            own.data = pages.to(own.dtype).view(own.shape)

    monkeypatch.setattr(streaming.Window, "let_go", let_go)
    monkeypatch.setattr(streaming.Window, "give", give)
    spec = model_of(tmp_path / "model", form)
    with pytest.raises(AssertionError):
        both(tmp_path, planned(spec, form))


@pytest.mark.parametrize("form", ["fp32", "bf16"])
def test_a_file_that_is_replaced_changes_nothing_that_is_mapped(form: str, tmp_path: Path) -> None:
    """Whoever still holds a matrix of the turn before reads on what it was; so does a checkpoint's link."""
    spec = model_of(tmp_path / "model", form)
    run = begin(tmp_path / "model", planned(spec, form), tmp_path / "work")
    assert run.lisa is not None and isinstance(run.lisa.turns, DenseTurns)
    while len(run.lisa.steps) < 4 or run.lisa.active == ("layer 0",) or run.step < 5:
        run.train_step(SAMPLES)
    linear = run.parts.layers[0].mlp.up_proj
    held, path = linear.weight.data, run.lisa.turns.file("layer 0")
    before, learnt = held.clone(), path.read_bytes()
    run.lisa.save_files(tmp_path / "checkpoint")
    turns = run.lisa.steps["layer 0"]
    while run.lisa.steps["layer 0"] == turns or run.lisa.active == ("layer 0",):
        run.train_step(SAMPLES)
    after = run.parts.layers[0].mlp.up_proj.weight.data
    assert torch.equal(held, before) and not torch.equal(after, before)
    assert (tmp_path / "checkpoint" / path.name).read_bytes() == learnt != path.read_bytes()
    assert not list((tmp_path / "checkpoint").glob("*.pages"))


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="no smaps")
@pytest.mark.parametrize("form", ["fp32 of a bf16 file", "bf16"])
def test_two_layers_are_there_at_a_time_and_none_of_those_that_turned_dense(form: str, tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    spec = model_of(tmp_path / "model", form, **wide)
    made = planned(spec, form, max_length=15, micro_batch_size=4, steps=14)
    run = begin(tmp_path / "model", made, tmp_path / "work")
    window, seen = run.model.edgeft_window, []
    enter = window.enter

    def watched(number: int) -> None:
        enter(number)
        window.reading and window.reading.result()
        seen.append(smaps_bytes(tmp_path))

    window.enter = watched
    for _ in range(made.steps):
        run.train_step(SAMPLES)
    layer = layer_file_bytes(spec, made)
    assert layer == (4 if form != "bf16" else 2) * sum(x.in_features * x.out_features for x in spec.linears)
    rows = 12 * 2**16
    assert 1.9 * layer < max(seen) <= window_bytes(spec, made) + rows
    window.leave()
    gc.collect()
    assert smaps_bytes(tmp_path) <= rows


def counted_step(run: Run) -> int:
    """Highest live tensor bytes of the next step, once the units that it trains have had their turn begun."""
    assert run.lisa is not None
    if run.lisa.begin_step(run.step, run.optimizer):
        run.chosen = run.lisa.parameters()
    start_states(run.optimizer)
    gc.collect()
    live, window = meter.LiveBytes(), getattr(run.model, "edgeft_window", None)
    if window is not None:
        live.overlook([span.own for spans in window.spans for span in spans])
        live.overlook([run.parts.embedding.weight])
    live.count([list(run.model.parameters()), list(run.model.buffers()), quantisation_states(run.model)])
    live.count(list(run.optimizer.state.values()))
    with live:
        run.train_step(SAMPLES_ALIKE)
    return live.peak_bytes


SAMPLES_ALIKE = [Sample([7 * n % 500 + 1 for n in range(48)], [7 * n % 500 + 1 for n in range(48)], 1)] * 4


@pytest.mark.parametrize("form", ["fp32 of a bf16 file", "bf16", "nf4"])
def test_closed_form_is_the_simulated_step_and_that_is_the_real_one(form: str, tmp_path: Path) -> None:
    """To the byte beside the resident run's, whose own form is a hundredth or less above its step; pages aside.

    The real step is the highest of several rounds: layers in files of the base and of their own.
    """
    spec, work = model_of(tmp_path / "model", form), train_step.Workload(48, 47)
    streamed = planned(spec, form, steps=7)
    resident = streamed.model_copy(update={"stream_layers": False})
    over = []
    for training in (resident, streamed):
        run = begin(tmp_path / "model", training, tmp_path / f"work {training.stream_layers}")
        found = simulate(spec, training, work)
        real = [counted_step(run) for _ in range(training.steps)]
        assert found.live_peak_bytes == max(real)
        terms = [train_step.step_terms(spec, one, work) for one in train_step.worst_sets(spec, training)]
        sums = [sum(term.bytes for term in each if term.name != "streamed layers") for each in terms]
        over.append(max(sums) - found.live_peak_bytes)
        assert 0 <= over[-1] < 0.01 * found.live_peak_bytes
    assert over[0] == over[1]


@pytest.mark.parametrize("form", ["fp32", "bf16", "nf4"])
def test_what_is_written_between_turns_is_what_was_planned(form: str, tmp_path: Path) -> None:
    spec = model_of(tmp_path / "model", form)
    made = planned(spec, form)
    run = begin(tmp_path / "model", made, tmp_path / "work")
    most = 0
    for _ in range(made.steps):
        run.train_step(SAMPLES)
        most = max(most, disk.size_of(tmp_path / "work"))
    terms = {term.name: term.bytes for term in disk.train_disk(spec, made).terms}
    weights = 4 * sum(x.in_features * x.out_features for x in spec.linears)
    assert terms.get("pages", 0) == int({"fp32": 0, "bf16": 2, "nf4": 0.5}[form] * weights)
    assert most == pytest.approx(terms["result"] + terms.get("pages", 0), rel=0.05)
