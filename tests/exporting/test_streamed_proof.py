"""A proof whose models keep their layers in their files gives the rungs of one that holds them whole."""

from __future__ import annotations

import functools
import gc
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bundles import loose
from tiny import EXAMPLE
from transformers import LlamaForCausalLM

from edgeft.data.samples import Sample
from edgeft.errors import EdgeftError
from edgeft.exporting import build, room
from edgeft.exporting import export as export_module
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.export import export
from edgeft.exporting.outputs import observe_model
from edgeft.exporting.room import loader
from edgeft.machines.limits import Limit
from edgeft.machines.meter import LiveBytes
from edgeft.machines.profile import load_profile
from edgeft.memory import proof, stages
from edgeft.memory.train_step import Term, Workload
from edgeft.merging.merge import verify_merged
from edgeft.models import streamed
from edgeft.models.checkpoint import load_plain
from edgeft.models.headers import BLOCK_BYTES
from edgeft.models.spec import read_model_spec
from edgeft.models.streamed import load_streamed
from edgeft.planning.costs import Question
from edgeft.planning.plan import make_plan
from edgeft.progress import silent
from edgeft.settings.job import make_job
from edgeft.targets.grid import Grid
from edgeft.targets.rounding import round_, round_as_target
from edgeft.targets.target import load_target
from edgeft.units import GIB

CONFIGS = EXAMPLE.parent / "configs"


def test_rungs_scores_and_bytes_are_those_of_whole_models(
    merged_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, used = loose(load_target("ort-int4")), list[str]()
    alter = streamed._Stream._enter

    def seen(self: Any, weights: Any) -> None:
        used.append("layer")
        alter(self, weights)

    monkeypatch.setattr(streamed._Stream, "_enter", seen)
    whole = export(merged_folder, target, tmp_path / "whole", device=None, progress=silent)
    assert not used
    monkeypatch.setattr(export_module, "loader", lambda plan: load_streamed)
    by_layer = export(merged_folder, target, tmp_path / "streamed", device=None, progress=silent)
    assert used and by_layer.proof == whole.proof and by_layer.files == whole.files


def test_layers_stay_in_their_files_where_whole_models_have_no_room(
    merged_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = verify_merged(merged_folder)[0].train.plan
    assert loader(plan) is load_plain
    question = room.question_of(plan)
    whole = [proof._phase(question, terms) for terms in proof._models(question, plan.training, streamed=False)]
    need = max(moment.high_bytes - stages.file_bytes(moment) for moment in whole)
    for here, planned, expected in (
        (need, need, load_plain),
        (need - 1, need, load_streamed),  # less here than the plan counts on
        (need, need - 1, load_streamed),  # what was planned, where there is more
        (need, None, load_plain),
        (need - 1, None, load_streamed),
    ):
        monkeypatch.setattr(room, "memory_limit", lambda here=here: Limit(here, "a test"))
        stages_ = plan.stages.model_copy(update={"host_bytes": planned})
        changed = plan.model_copy(update={"stages": stages_})
        assert loader(changed) is expected, (here, planned)
        said = room.less_room(changed)
        assert bool(said) == (here < need)  # otherwise it is what the plan says, or the usual way
        assert ("the plan counts on" in said) == (here < need and planned is not None)


@pytest.mark.parametrize("target", ["ort-int4", "ort-int8", "gguf-q4_0"])
@pytest.mark.parametrize(
    ("model", "profile", "memory"),
    [
        ("llama-3.1-8b", "t4", None),
        ("llama-3.1-8b", "laptop-16gb", None),
        ("llama-3.2-3b", "cpu-16gb", 8 * GIB),
        ("smollm2-135m", "cpu-16gb", GIB),
        ("smollm2-135m", "cpu-16gb", None),
    ],
)
def test_an_export_proves_as_its_plan_says_where_this_machine_has_more(
    monkeypatch: pytest.MonkeyPatch, model: str, profile: str, memory: int | None, target: str
) -> None:
    """Whole or a layer at a time is decided once: the phase that an export checks is its plan's, to the byte."""
    made = make_plan(make_job(
        model=str(CONFIGS / model), profile=profile, max_memory_bytes=memory, target=target, max_length=128
    ))  # fmt: skip
    [planned] = [phase for phase in made.stages.phases if phase.name == "export: prove"]
    monkeypatch.setattr(room, "memory_limit", lambda: Limit(256 * GIB, "a test"))
    assert room.proof_phase(made, made.stages.target) == planned
    said = any(note.startswith("export: prove reads the model a layer at a time") for note in made.notes)
    assert (loader(made) is load_streamed) == said


def test_an_8b_model_is_proven_in_16_gib() -> None:
    spec, job = read_model_spec(str(CONFIGS / "llama-3.1-8b")), make_job(model=str(CONFIGS / "llama-3.1-8b"))
    question = Question(job, load_profile("t4"), spec, None, Workload(512, 512), 8 * 2**20, 14 * GIB)
    training = make_plan(make_job(model=job.model, profile="t4", max_length=512)).training
    assert proof.streams(question, training, 16 * GIB) and not proof.streams(question, training, None)
    for name in ("ort-int4", "ort-int4-calibrated", "ort-int8"):
        whole = proof.prove(question, training, load_target(name), None)
        fits = proof.prove(question, training, load_target(name), 16 * GIB)
        assert fits.high_bytes - stages.file_bytes(fits) <= 15 * GIB
        assert whole.high_bytes - stages.file_bytes(whole) > 16 * GIB


def test_a_proof_is_planned_by_the_side_that_holds_more_and_names_the_others_pages() -> None:
    spec, job = read_model_spec(str(CONFIGS / "llama-3.1-8b")), make_job(model=str(CONFIGS / "llama-3.1-8b"))
    question = Question(job, load_profile("t4"), spec, None, Workload(512, 512), 8 * 2**20, 14 * GIB)
    training = make_plan(make_job(model=job.model, profile="t4", max_length=512)).training
    names = {name: {term.name for term in proof.prove(question, training, load_target(name), 16 * GIB).terms}
             for name in ("ort-int4", "ort-int8")}  # fmt: skip
    assert {"model", "one matrix", "adapters"} <= names["ort-int4"] and "bundle" not in names["ort-int4"]
    assert {"bundle", "logits"} <= names["ort-int8"] and "model" not in names["ort-int8"]
    sides = [proof._phase(question, terms) for terms in proof._models(question, training, streamed=True)]
    most = max(side.expected_bytes for side in sides)  # with pages of the file, which the bundle's side has none of
    assert proof.prove(question, training, load_target("ort-int8"), 16 * GIB).expected_bytes == most


def test_the_bundle_is_measured_when_the_proofs_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, beside what the export still holds: the plan counts both."""
    events = list[str]()

    def started(*arguments: Any, **options: Any) -> Any:
        events.append("bench")
        return SimpleNamespace(returncode=1, stderr="enough", stdout="")

    monkeypatch.setattr(build.meter, "give_back", lambda: events.append("back"))
    monkeypatch.setattr(build, "subprocess", SimpleNamespace(run=started))
    with pytest.raises(EdgeftError, match="enough"):
        build._measure(Path("bundle"), 0)
    assert events == ["back", "bench"]


def test_a_bundle_that_is_measured_beside_a_small_model_decides() -> None:
    made = make_plan(make_job(model=str(CONFIGS / "smollm2-135m"), profile="cpu-16gb", max_length=64, eval_rows=1))
    question, target = room.question_of(made), load_target("ort-fp32")
    sides = {
        name: proof._phase(question, terms).expected_bytes
        for name, terms in (
            ("bundle", proof._bundle(question, made.training, target)),
            ("measured", proof._measuring(question, made.training, target)),
        )
    }
    assert sides["measured"] > sides["bundle"]  # its own process, and arrays that measure the memory
    assert proof.prove(question, made.training, target, None).expected_bytes >= sides["measured"]


def models_alive() -> set[int]:
    gc.collect()
    return {id(each) for each in gc.get_objects() if isinstance(each, LlamaForCausalLM)}


@pytest.mark.parametrize("kept", [False, True])
def test_the_bundle_is_loaded_when_every_model_in_torch_is_gone(
    merged_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """Which is what the plan counts on: its higher side, not both. `kept`: a model that somebody holds is seen."""
    before, beside, held = models_alive(), list[int](), list[Any]()
    load = ArtifactModel.__dict__["_runner"].func

    def seen(self: Any) -> Any:
        beside.append(len(models_alive() - before))
        return load(self)

    lazy = functools.cached_property(seen)
    lazy.__set_name__(ArtifactModel, "_runner")
    monkeypatch.setattr(ArtifactModel, "_runner", lazy)

    def keeping(folder: Path) -> Any:
        held.append(load_plain(folder))
        return held[-1]

    if kept:
        monkeypatch.setattr(export_module, "loader", lambda plan: keeping)
    export(merged_folder, loose(load_target("ort-int4")), tmp_path / "bundle", device=None, progress=silent)
    assert beside == [len(held)] and bool(held) == kept


@pytest.mark.parametrize(
    ("streamed", "longest", "count"),
    [(True, 256, 8), (True, 16, 2), (True, 64, 1), (False, 256, 8), (False, 16, 2)],
)
def test_a_pass_holds_what_the_plan_counts(streamed: bool, longest: int, count: int) -> None:
    """By the bytes of tensors that are alive: none is counted twice, none forgotten. Pages of the file aside."""
    job = make_job(
        model=str(EXAMPLE), profile="cpu-16gb", max_length=longest, eval_rows=count, target="ort-int4",
        base_precision="fp32",
    )  # fmt: skip
    made, random, target = make_plan(job), Random(0), load_target("ort-int4")
    every = [[random.randrange(5, made.spec.vocab_size) for _ in range(longest)] for _ in range(count)]
    rows = [Sample(ids, ids, prompt_tokens=0) for ids in every]
    moments = proof._models(room.question_of(made), made.training, streamed=streamed)
    *passing, rounding = moments[4:]  # those of a base that trained as it is come first
    with LiveBytes() as live:
        model = load_streamed(EXAMPLE) if streamed else load_plain(EXAMPLE)
        pages = sum(each.nbytes for each in model.parameters() if each.dtype != torch.float32)
        first = observe_model("merged", model, rows)
        live.peak_bytes = live.live_bytes
        round_as_target(model, target)
        altered, live.peak_bytes = live.peak_bytes, live.live_bytes
        observe_model("rounded", model, rows)
        passed = live.peak_bytes
    assert len(first.losses) == count
    assert altered - pages == pytest.approx(total(rounding), rel=0.04)
    assert passed - pages == pytest.approx(max(map(total, passing)), rel=0.02)


def total(terms: list[Term]) -> int:
    """Bytes of a moment that are no pages of files."""
    return sum(term.bytes for term in terms if term.name not in ("weight file", "learnt tensor"))


def test_a_block_takes_as_many_forms_as_planned_while_it_is_rounded() -> None:
    weight, most = torch.randn(3 * BLOCK_BYTES // 4 // 512, 512), 0
    grids = [Grid(*kind) for kind in ((4, 32, False, "mlas"), (8, 32, False, "rtn"), (4, 32, False, "gather"))]
    for grid in (*grids, Grid(8, 32, True, "q8_0")):
        with LiveBytes() as live:
            live.count(weight)
            round_(weight, grid)
        most = max(most, live.peak_bytes - weight.nbytes)
    assert most == pytest.approx(stages.ROUNDING_BLOCKS * BLOCK_BYTES, rel=0.02)
