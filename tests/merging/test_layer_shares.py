"""Groups of layers with shares of their own: read as written, merged tensor by tensor, proven, searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgeft.errors import BadInput
from edgeft.exporting.outputs import load_tuned, observe_model
from edgeft.exporting.parity import SAME, compare
from edgeft.merging.merge import merge
from edgeft.merging.merged_tensors import merged_rung
from edgeft.merging.result import MergedCheckpoint
from edgeft.merging.sweep import Line, group_moves, sweep
from edgeft.models.checkpoint import Checkpoint, load_plain
from edgeft.models.layer_shares import Group, Shares, equal_groups, layer_of, parse_shares
from edgeft.progress import silent
from edgeft.reporting.sweep_charts import plot_sweep
from edgeft.targets.target import load_target
from edgeft.training.job_data import Data


def test_shares_are_read_as_they_are_written() -> None:
    shares = parse_shares("0-3=0.5, 4=1,rest=0.25")
    groups = (Group(first=0, last=3, wise_alpha=0.5), Group(first=4, last=4, wise_alpha=1.0))
    assert shares == Shares(rest=0.25, groups=groups) == parse_shares(str(shares))
    assert [shares.of(layer) for layer in (0, 3, 4, 5, None)] == [0.5, 0.5, 1.0, 0.25, 0.25]
    assert parse_shares("0.6") == Shares(rest=0.6) and str(Shares(rest=0.6)) == "0.6"
    assert parse_shares("0-1=0,rest=0").nothing and not parse_shares("0-1=0").nothing
    assert (layer_of("model.layers.12.mlp.experts.3.weight"), layer_of("lm_head.weight")) == (12, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("much", "cannot read 'much'\n\nhint: give a number from 0 to 1, or groups"),
        ("0-3=0.5,much", "cannot read 'much'"),
        ("first=1", "cannot read 'first=1'"),
        ("0=many", "cannot read 'many'"),
        ("0=1.5", r"must be from 0 \(base\) to 1 \(fine-tuned\), got 1.5"),
        ("nan", r"must be from 0 \(base\) to 1"),
        ("3-1=1", "3-1: no range, or layers that another group has too"),
        ("0-3=1,2=0", "2: no range, or layers that another group has too"),
    ],
)
def test_shares_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=f"^--wise-alpha: {message}"):
        parse_shares(text)


def test_moves_of_groups_are_single_steps_and_exchanges() -> None:
    moves = group_moves([0.5, 0.9, 0.0], range(2))
    assert sorted(moves) == [
        [0.3, 0.9, 0.0],
        [0.3, 1.0, 0.0],
        [0.5, 0.7, 0.0],
        [0.5, 1.0, 0.0],
        [0.7, 0.7, 0.0],
        [0.7, 0.9, 0.0],
    ]
    assert group_moves([1.0, 0.0], range(1)) == [[0.8, 0.0]]


def test_equal_groups_hold_every_layer_once() -> None:
    for layers, count in ((8, 2), (7, 3), (30, 4), (5, 5)):
        shares = equal_groups(layers, count, [i / count for i in range(count)], 0.1)
        held = [layer for group in shares.groups for layer in range(group.first, group.last + 1)]
        assert held == list(range(layers))
        sizes = [group.last - group.first + 1 for group in shares.groups]
        assert max(sizes) - min(sizes) <= 1


def test_each_tensor_gets_its_groups_share_and_the_ladder_holds(
    merged_folder: Path,
    tmp_path: Path,
) -> None:
    train = merged_folder.parent / "train"
    made = merge(train, tmp_path / "groups", wise_alpha=parse_shares("0=0,1=0.5"), progress=silent)
    assert isinstance(made, MergedCheckpoint) and made.shares == parse_shares("0=0,1=0.5")
    assert MergedCheckpoint.read(tmp_path / "groups" / "merged.json") == made
    merge(train, tmp_path / "half", wise_alpha=0.5, progress=silent)
    base = Checkpoint(Path(made.train.plan.job.model))
    groups, half = Checkpoint(tmp_path / "groups"), Checkpoint(tmp_path / "half")
    changed = 0
    for name in groups.owner:
        like = base if layer_of(name) == 0 else half
        assert torch.equal(groups.read(name), like.read(name)), name
        changed += not torch.equal(groups.read(name), base.read(name))
    assert changed == 7  # the projections of layer 1
    data = Data.read(made.train.plan)
    live = observe_model("tuned", load_tuned(train, made.train, made.shares), data.valid)
    stored = observe_model("merged", load_plain(tmp_path / "groups"), data.valid)
    assert not compare(live, stored, SAME).problems
    whole = observe_model("whole", load_tuned(train, made.train), data.valid)
    assert compare(live, whole, SAME).problems  # the shares did something
    training = made.train.plan.training
    assert not merged_rung(base.folder, train, tmp_path / "groups", training, made.shares).problems
    assert merged_rung(base.folder, train, tmp_path / "groups", training, parse_shares("0.5")).problems
    with pytest.raises(BadInput, match="there is no layer 2\n\nhint: the model's are 0 to 1"):
        merge(train, tmp_path / "none", wise_alpha=parse_shares("1-2=0.5"), progress=silent)


def test_a_search_over_groups_keeps_what_its_rule_likes_best(
    merged_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = merged_folder.parent / "train"
    moved: list[str] = []
    move = Line.move_to
    monkeypatch.setattr(Line, "move_to", lambda line, shares: (moved.append(str(shares)), move(line, shares))[1])
    options: dict[str, Any] = {"select": "best", "groups": 2}
    found = sweep(train, load_target("ort-fp32"), **options)
    assert len(moved) == len(set(moved)) == len(found.points)
    assert {len(point.groups) for point in found.points} == {0, 2}
    # without prompts that a model of this size answers rightly, the rule is the lowest loss of all that was measured
    best = max(point.task.exact_match or 0.0 for point in found.points)
    equal = [point for point in found.points if (point.task.exact_match or 0.0) >= best - 0.5]
    taken = next(p for p in found.points if (p.wise_alpha, p.groups) == (found.wise_alpha, found.groups))
    assert taken.task.loss <= min(point.task.loss for point in equal if not point.groups)
    plot_sweep(found, tmp_path / "sweep.svg")
    one = sweep(train, load_target("ort-fp32"), select="best")
    assert [point for point in found.points if not point.groups] == list(one.points)
    for groups, message in ((3, "must be from 1 to the model's 2 layers, got 3"), (0, "must be from 1")):
        with pytest.raises(BadInput, match=f"^--groups: {message}"):
            sweep(train, load_target("ort-fp32"), select="best", groups=groups)
    with pytest.raises(BadInput, match="--groups: is a search"):
        sweep(train, load_target("ort-fp32"), select="fixed", groups=2)


def test_a_bound_that_nobody_names_is_half_of_what_the_whole_change_costs(
    merged_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a library of the sea"}\n')
    monkeypatch.setattr("edgeft.merging.sweep.general_increase", lambda point, base: 3.0 * point.wise_alpha)
    options: dict[str, Any] = {"select": "bounded", "general": str(texts)}
    found = sweep(merged_folder.parent / "train", load_target("ort-fp32"), **options)
    assert found.max_general_increase_nats == 1.5 and found.wise_alpha <= 0.5 and "(6 of 11 shares)" in found.why
    named = sweep(merged_folder.parent / "train", load_target("ort-fp32"), max_general_increase_nats=0.9, **options)
    assert named.max_general_increase_nats == 0.9 and "(4 of 11 shares)" in named.why
