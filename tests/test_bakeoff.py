"""Policies of the bake-off that are no part of an export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BENCH

from edgeft.exporting.compensation import damped, gptq_alone, inverse_factor, least_change, output_error
from edgeft.targets.grid import Grid


@pytest.fixture
def bakeoff(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import bakeoff

    return bakeoff


def test_each_policy_on_the_grid_leaves_less_of_the_outputs_error_than_the_one_before(bakeoff: Any) -> None:
    random = torch.Generator().manual_seed(3)
    mixed = torch.eye(96) + 0.2 * torch.randn(96, 96, generator=random)
    read, weight = (torch.randn(rows, 96, generator=random) for rows in (300, 200))
    read, grid = read @ mixed, Grid(4, 32, False, "rtn")
    gram = damped(read.T @ read)
    factor = inverse_factor(gram)
    nearest = output_error(weight, grid.encode(weight), gram)
    alone, plain, both = (
        output_error(weight, rule(weight, gram, factor, grid), gram)
        for rule in (bakeoff.scales_alone, gptq_alone, least_change)
    )
    assert both.sum() < plain.sum() < alone.sum() < 0.9 * nearest.sum() and (alone <= nearest).all()
    turned = bakeoff.scales_alone(weight, gram.flip(0).flip(1).contiguous(), factor, grid)  # planted: other inputs'
    assert output_error(weight, turned, gram).sum() > 1.02 * alone.sum()


def test_a_policy_whose_package_is_not_installed_is_left_out_by_name(
    bakeoff: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "auto_round", None)
    monkeypatch.setattr(bakeoff, "FOLDER", tmp_path)
    monkeypatch.setattr("run.ROOT", tmp_path)
    monkeypatch.setattr(bakeoff, "inputs", lambda model: (bakeoff.BASE, [], bakeoff.SECTIONS / "test.jsonl"))
    monkeypatch.setattr(bakeoff, "trained", lambda *_: bakeoff.BASE)
    forms = bakeoff.policies
    kept = ("merged, not rounded", "merged, AutoRound")
    monkeypatch.setattr(bakeoff, "policies", lambda *given: {name: forms(*given)[name] for name in kept})
    found = bakeoff.bench("example", 2)
    assert list(found["policies"]) == ["merged, not rounded"]
    assert "example, merged, AutoRound: left out: auto-round: cannot be imported" in capsys.readouterr().err
