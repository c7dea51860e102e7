"""How often does a proof read a row? Counted in calls, not in seconds: each form of the model once, none again."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bundles import bundle, checkpoint, loose, reference, some_ids
from transformers import LlamaModel

from edgeft.data.dataset import IGNORED, Sample, TextTokenizer
from edgeft.errors import CacheLost, QualityLost
from edgeft.exporting import drawn_rows, repair
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.bundle import Bundle
from edgeft.exporting.export import export
from edgeft.exporting.form import Form, with_more
from edgeft.exporting.outputs import observe_model
from edgeft.exporting.parity import UNKNOWN, Known, Ladder, drawn_for, exact_match_problem
from edgeft.exporting.repair import Climb, export_smallest
from edgeft.machines.runner import runner_module
from edgeft.merging.merge import verify_merged
from edgeft.models.cache_names import cache_in
from edgeft.progress import silent
from edgeft.reporting.words import attempt_cells
from edgeft.targets.rounding import round_as_target
from edgeft.targets.target import load_target

INT4, INT8 = loose(load_target("ort-int4")), loose(load_target("ort-int8"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Rows that torch models have read whole, and rows whose answers were generated."""
    seen, forward = Counter[str](), LlamaModel.forward

    def counted(self: Any, *arguments: Any, **given: Any) -> Any:
        ids, past = given.get("input_ids"), cache_in(given)
        assert ids is not None
        if past is None:
            seen["whole"] += len(ids)
        elif past.get_seq_length() == 0:
            seen["generated"] += len(ids)
        return forward(self, *arguments, **given)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    return seen


def rows_of(merged: Path) -> int:
    return verify_merged(merged)[0].train.valid.rows


def test_a_named_target_reads_each_row_once_for_each_form(
    merged_folder: Path, tmp_path: Path, read: Counter[str]
) -> None:
    """As trained, merged, with the bundle's weights; the merged one alone decodes, what its pass leaves open."""
    export(merged_folder, INT4, tmp_path / "b", device=None, progress=silent)
    rows = rows_of(merged_folder)
    assert read["whole"] == 3 * rows and read["generated"] <= rows


def test_a_climb_reads_no_row_again(
    merged_folder: Path, tmp_path: Path, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it found of the merged model and of the rounded one is what the proof compares."""
    common: dict[str, Any] = {"asked": "own", "device": None, "progress": silent}
    made = export_smallest(merged_folder, [INT4], tmp_path / "b", **common)
    assert read["whole"] == 3 * rows_of(merged_folder)
    monkeypatch.setattr(Climb, "known", lambda self, target: None)  # the planted fault: all of it is found again
    read.clear()
    again = export_smallest(merged_folder, [INT4], tmp_path / "c", **common)
    assert read["whole"] == 5 * rows_of(merged_folder)
    assert again.proof == made.proof and again.files == made.files


def sample(ids: list[int], answer: int) -> Sample:
    return Sample(ids, [IGNORED] * (len(ids) - answer) + ids[len(ids) - answer :], len(ids) - answer)


def test_known_forms_are_taken_where_their_tables_are_of_the_same_rows(read: Counter[str]) -> None:
    ids, tokenizer = some_ids(1500), TextTokenizer(checkpoint())
    rows = [sample(ids[20 * i : 20 * i + 14], 3) for i in range(70)]
    artifact, target = ArtifactModel(bundle("ort-int4")), loose(load_target("ort-int4"))

    def climb(known: Known | None, gate: int) -> Any:
        ladder = Ladder(target, tokenizer, silent)
        made = ladder.climb_artifact(
            checkpoint(), artifact.folder, artifact, rows, tied=True, answers=slice(gate, None), gate=gate, known=known,
            alike=target.parity,
        )  # fmt: skip
        return *made, ladder.rungs

    def known(gate: int) -> Known:
        model = type(reference()).from_pretrained(checkpoint()).eval()
        exact = observe_model("merged", model, rows[:gate], tokenizer, answers=slice(None))
        assert round_as_target(model, target)
        return Known(exact, observe_model("rounded", model, rows[:gate], tokenizer))

    for gate, expected in ((66, 4), (60, 134)):  # of 60 rows the tables are not those of the first 64
        whole, given = climb(None, gate), known(gate)
        read.clear()
        found = climb(given, gate)
        assert read["whole"] == expected
        assert found[0].losses == pytest.approx(whole[0].losses, abs=1e-4)
        assert found[0].exact[gate:] == whole[0].exact[gate:] and found[0].tokens == whole[0].tokens
        assert found[0].log_probabilities.shape == whole[0].log_probabilities.shape
        assert [rung.name for rung in found[2]] == [rung.name for rung in whole[2]]
        for mine, theirs in zip(found[2], whole[2], strict=True):
            assert mine.loss == pytest.approx(theirs.loss, abs=1e-4) and mine.problems == theirs.problems == ()


@pytest.mark.parametrize("ahead", [1.5, 0.1])
def test_the_merged_model_reads_no_more_rows_than_decide(
    ahead: float, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the rows that it has read are not enough both read more, and say of them what they say of all."""
    ids, tokenizer = some_ids(2400), TextTokenizer(checkpoint())
    rows = [sample(ids[4 * i : 4 * i + 8], 3) for i in range(560)]
    artifact, target = ArtifactModel(bundle("ort-fp32")), load_target("ort-fp32")
    closed = list[int]()
    monkeypatch.setattr(drawn_rows, "AHEAD", ahead)
    monkeypatch.setattr(ArtifactModel, "close", lambda self, close=ArtifactModel.close: closed.append(close(self)))

    def climb(every: bool) -> Any:
        ladder = Ladder(target, tokenizer, silent, every_row=every)
        return ladder.climb_artifact(
            checkpoint(), artifact.folder, artifact, rows, tied=True, answers=slice(200, None), gate=200,
            alike=target.parity, quality=load_target("ort-int4").parity,
        )  # fmt: skip

    merged, made = climb(every=False)
    once, rounds = read["whole"], len(closed)
    assert once == len(merged.read()) < len(rows) and set(made.read()) <= set(merged.read())
    assert rounds == 0 if ahead > 1 else rounds > 0
    assert len(made.read(slice(200))) >= 64 and len(made.read(slice(200, None))) > 90
    whole, all_made = climb(every=True)
    assert not whole.drawn and not all_made.drawn
    for part, full in ((merged, whole), (made, all_made)):
        for number in part.read():
            assert part.losses[number] == pytest.approx(full.losses[number], abs=1e-4)
            assert part.exact[number] == full.exact[number] and part.tokens[number] == full.tokens[number]


def test_a_fault_in_rows_that_were_not_read_first_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth row has lost its answer, none of those that the merged model read before the bundle was asked."""
    monkeypatch.setattr(drawn_rows, "AHEAD", 0.2)
    tokens, tolerance = [1] * 1000, load_target("ort-int4").parity
    drawing = drawn_for(tokens, tolerance, UNKNOWN, gate=200, scored=slice(200, None))
    first = drawing.ahead()
    assert 64 < len(first) < 200
    lost = set(random.Random(1).sample(sorted({*range(200, 1000)} - {*first}), 160))
    before = form_of(first)
    made = Form("artifact", before.log_probabilities, (0.0,) * 1000, (0,) * 1000, (False,) * 1000, drawn=())
    read = list[int]()
    while True:
        for number in drawing.follows(before).each():
            assert before.tokens[number]
            drawing.see(number, 1.0, number not in lost)
            read.append(number)
        if not (drawing.open and (more := drawing.more())):
            break
        before = with_more(before, form_of(more))
    kept = set(read)
    made = Form(
        "artifact", before.log_probabilities, tuple(float(i in kept) for i in range(1000)),
        tuple(int(i in kept) for i in range(1000)), tuple(i in kept and i not in lost for i in range(1000)),
        drawn=tuple(sorted(kept)),
    )  # fmt: skip
    assert len(read) == len(kept) > len(first) // 2
    assert "exact match falls" in exact_match_problem(before, made, tolerance, slice(200, None))


def form_of(numbers: list[int]) -> Form:
    """A form of 1,000 rows that has read some, all answered."""
    read, table = set(numbers), torch.log_softmax(torch.zeros(3, 4), -1)
    return Form(
        "merged", table, tuple(float(i in read) for i in range(1000)), tuple(int(i in read) for i in range(1000)),
        tuple(i in read for i in range(1000)), drawn=tuple(sorted(read)),
    )  # fmt: skip


def test_a_bundle_reads_every_row_where_that_was_planned_to_be_short() -> None:
    ids, tokenizer = some_ids(1200), TextTokenizer(checkpoint())
    rows = [sample(ids[4 * i : 4 * i + 8], 3) for i in range(280)]
    artifact, target = ArtifactModel(bundle("ort-int4")), loose(load_target("ort-int4"))

    def drawn(every: bool) -> tuple[int, ...]:
        ladder = Ladder(target, tokenizer, silent, every_row=every)
        given: dict[str, Any] = {"tied": True, "answers": slice(0, None), "gate": len(rows), "alike": target.parity}
        made: Form = ladder.climb_artifact(checkpoint(), artifact.folder, artifact, rows, **given)[1]
        return made.drawn

    assert not drawn(every=True) and 64 <= len(drawn(every=False)) < len(rows)


def test_a_search_among_labels_that_went_far_enough_is_not_made_again() -> None:
    run = runner_module()
    labels, asked = run.Labels(["a", "b", "c"], [[1, 0], [2, 0], [3, 0]]), list[str]()

    def choose(ids: list[int], enough: Any) -> Any:
        asked.append("search")
        search = run.LabelSearch(labels)
        while search.open and not enough(search):
            score, prefix = -search.open[0][0], search.next()
            search.expand(prefix, score, [-0.1] if prefix else [-1.0, -2.0, -3.0])
        return search

    artifact = ArtifactModel(bundle("ort-fp32"))
    artifact.__dict__["_runner"] = SimpleNamespace(choose=choose, use=lambda adapter: None)
    deep = artifact.choose([4, 5], lambda search: search.decided(2))
    assert artifact.choose([4, 5]) is deep and len(asked) == 1  # decided for one place is less
    assert artifact.choose([4, 5], lambda search: False) is not deep and len(asked) == 2
    assert len(artifact.choose([4, 5], lambda search: False).found) == 3 and len(asked) == 2  # nothing is open
    artifact.choose([4, 6])
    artifact.use("another")  # whose answers are others
    artifact.choose([4, 6])
    assert len(asked) == 4


# The cache of 8 bits in a climb


def refusing(built: list[Any]) -> Any:
    """An export that finds 8 bits of a KV cache too few."""

    def made(folder: Path, target: Any, out: Path, *, chosen: Any, **options: Any) -> Any:
        built.append((target, chosen))
        if target.kv_bits == 8:
            raise CacheLost("parity ladder, rung 'cache' against 'full cache'", "mean KL 2.00e+00 nats", "a hint")
        return target

    return made


def test_a_cache_that_loses_too_much_gives_way_to_the_runtimes_own(
    merged_folder: Path, tmp_path: Path, read: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = list[Any]()
    monkeypatch.setattr(repair, "export", refusing(built))
    targets = [each.model_copy(update={"kv_bits": 8}) for each in (INT4, INT8)]
    made = export_smallest(merged_folder, targets, tmp_path / "b", asked="auto", device=None, progress=silent)
    assert made == INT4 and [target.kv_bits for target, _ in built] == [8, None]
    first, second = built[-1][1].repair.attempts
    assert [(each.kv_bits, each.decision, each.built) for each in (first, second)] == [
        (8, "fails", True), (None, "passes", True),
    ]  # fmt: skip
    assert first.reason == "the bundle's cache: mean KL 2.00e+00 nats" and first.loss == second.loss
    assert [attempt_cells(each)[0] for each in (first, second)] == ["ort-int4, KV cache of 8 bits", "ort-int4"]
    assert read["whole"] == 2 * rows_of(merged_folder)  # the same weights are simulated once


def test_after_it_no_larger_target_tries_that_cache(
    merged_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with repair.climbing(merged_folder, tmp_path / "b", None, None, None, None, silent) as found:
        steps = found.steps([each.model_copy(update={"kv_bits": 8}) for each in (INT8, load_target("ort-fp32"))])
        assert next(steps).target.kv_bits == 8
        found.cache_lost = True
        assert [(each.name, each.target.kv_bits) for each in steps] == [("ort-int8", None), ("ort-fp32", None)]


def test_a_cache_that_was_asked_for_is_not_exchanged(
    merged_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = list[Any]()
    monkeypatch.setattr(repair, "export", refusing(built))
    monkeypatch.setattr(repair, "AUTO", "not what this job says")
    with pytest.raises(CacheLost, match="mean KL"):
        export_smallest(
            merged_folder, [INT4.model_copy(update={"kv_bits": 8})], tmp_path / "b", asked="auto", device=None,
            progress=silent,
        )  # fmt: skip
    assert len(built) == 1


def test_a_bundle_keeps_what_was_tried(merged_folder: Path, tmp_path: Path) -> None:
    target = INT4.model_copy(update={"kv_bits": 8})
    export_smallest(merged_folder, [target], tmp_path / "b", asked="own", device=None, progress=silent)
    repaired = Bundle.read(tmp_path / "b" / "bundle.json").repair
    assert repaired is not None and [each.kv_bits for each in repaired.attempts] == [8]


@pytest.mark.parametrize("forgotten", [False, True])
def test_what_lies_below_every_bundle_is_climbed_once(
    merged_folder: Path, tmp_path: Path, read: Counter[str], monkeypatch: pytest.MonkeyPatch, forgotten: bool
) -> None:
    """The first bundle loses too much: the next one's proof goes on above the rungs that are the same."""
    made = list[Bundle]()

    def first_fails(folder: Path, target: Any, out: Path, **options: Any) -> Bundle:
        if forgotten:  # the planted fault
            options["chosen"].climbed.clear()
        made.append(export(folder, target, out, **options))
        if len(made) == 1:
            raise QualityLost("parity ladder", "exact match falls by 50 points", "a hint")
        return made[-1]

    monkeypatch.setattr(repair, "export", first_fails)
    targets = [INT8, loose(load_target("ort-fp32"))]  # between which nothing is promoted
    export_smallest(merged_folder, targets, tmp_path / "b", asked="own", device=None, progress=silent)
    assert read["whole"] == (5 if forgotten else 4) * rows_of(merged_folder)
    below = [[rung.name for rung in each.proof.rungs[:2]] for each in made if each.proof is not None]
    assert below == [["trained", "merged"]] * 2 and made[0].proof is not None and made[1].proof is not None
    assert made[0].proof.gain_nats == made[1].proof.gain_nats
