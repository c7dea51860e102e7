"""Are a base's scores taken from an earlier run where nothing that they depend on has changed, and only there?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import qwen3_folder, run, write_plan

from edgeft.documents import cache_folder
from edgeft.training import base_scores
from edgeft.training.base_scores import begins_as
from edgeft.training.result import TrainResult
from edgeft.training.scoring import Scorer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return qwen3_folder(tmp_path_factory.mktemp("model"), tokenizer_folder, 2)


@pytest.fixture
def train(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[TrainResult, int]]:
    """(a run's result, how often the base was scored as a whole); what takes no time is kept too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(base_scores, "LEAST_SECONDS", 0.0)
    asked, scores = list[str](), Scorer.scores
    monkeypatch.setattr(Scorer, "scores", lambda self, whose="": asked.append(whose) or scores(self, whose))

    def train(name: str, **settings: Any) -> tuple[TrainResult, int]:
        asked.clear()
        (tmp_path / name).mkdir()
        # rows held out of the training data would be others with another seed
        values = {"epochs": 1.0, "valid": str(tmp_path / name / "rows.jsonl"), **settings}
        path = write_plan(tmp_path / name, values.pop("model", model), **values)
        return run(path, tmp_path / name / "train"), asked.count("base on ")

    return train


def test_other_ranks_rates_and_seeds_take_the_scores_of_the_first_run(train: Callable[..., Any]) -> None:
    first, scored = train("first")
    assert (first.base_kept, scored) == ("", 1)
    second, scored = train("second", rank=2, learning_rate=1e-4, seed=3)
    assert scored == 0 and Path(second.base_kept).is_file()
    assert second.base_valid == first.base_valid and second.base_test == first.base_test
    assert [each.base for each in second.samples] == [each.base for each in first.samples]
    assert second.valid != first.valid


CHANGES: list[dict[str, Any]] = [
    {"base_precision": "nf4"}, {"eval_rows": 2}, {"sample_answers": 1}, {"answers": "labels"}, {"max_length": 8},
    {"tuner": "prompt", "rank": None}, {"init": "pissa"},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_scores_is_scored_anew(change: dict[str, Any], train: Callable[..., Any]) -> None:
    train("first")
    other, scored = train("other", **change)
    assert (other.base_kept, scored) == ("", 1)


def test_another_base_is_scored_anew(train: Callable[..., Any], tmp_path: Path, tokenizer_folder: Path) -> None:
    train("first")
    (tmp_path / "deeper").mkdir()
    other, scored = train("other", model=qwen3_folder(tmp_path / "deeper", tokenizer_folder, 3))
    assert (other.base_kept, scored) == ("", 1)


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


PLANTED: dict[str, Callable[[Path], object]] = {
    "one row's loss": lambda path: changed(path, lambda found: found["valid"].update(
        row_losses=[each + 0.5 for each in found["valid"]["row_losses"]])),
    "a row less": lambda path: changed(path, lambda found: found["valid"].update(
        row_losses=found["valid"]["row_losses"][1:])),
    "another key": lambda path: changed(path, lambda found: found["key"].update(valid="0")),
    "half a file": lambda path: path.write_text(path.read_text()[:200]),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_scores_that_are_not_the_bases_are_not_believed(planted: str, train: Callable[..., Any]) -> None:
    first, _ = train("first")
    [path] = cache_folder().glob("base-scores/*.json")
    PLANTED[planted](path)
    second, scored = train("second", seed=3)  # of four rows all are scored again
    assert (second.base_kept, scored) == ("", 1) and second.base_valid == first.base_valid
    third, scored = train("third", seed=4)  # what was found is kept in its place
    assert scored == 0 and third.base_valid == first.base_valid


def test_scores_of_a_moment_are_not_kept(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(base_scores, "LEAST_SECONDS", 5.0)
    train("first")
    assert not list(cache_folder().glob("base-scores/*"))


def test_a_tuner_that_does_not_begin_as_the_base_says_how_it_begins(model: Path) -> None:
    from tiny import plan_of

    from edgeft.models.spec import read_model_spec

    spec = read_model_spec(str(model))
    assert begins_as(plan_of(spec, range(2))) == begins_as(plan_of(spec, range(2), rank=2, seed=1)) == "the base"
    prefixes = [begins_as(plan_of(spec, range(2), prefix_tokens=4, seed=seed)) for seed in (0, 1)]
    assert len({"the base", *prefixes}) == 3
