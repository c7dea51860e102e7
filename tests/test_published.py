"""The closed form against runs that others have published: an independent reference, see bench/published.py."""

from __future__ import annotations

import importlib
import json
from types import ModuleType

import pytest
from tiny import BENCH

from edgeft.memory import dataflow, train_step
from edgeft.models.spec import read_model_spec

LLAMA = str(BENCH.parent / "examples" / "configs" / "llama-3.1-8b")


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("published")


def test_predictions_agree_with_what_was_published(published: ModuleType) -> None:
    rows = [*published.on_cpu(), *published.simulated()]
    tensors = [row for row in rows if not row["case"].endswith("resident")]
    assert len(tensors) == 44 and max(abs(row["error"]) for row in tensors) < 0.0025
    assert max(abs(row["error"]) for row in rows) < 0.02


def test_the_recorded_rows_are_what_is_predicted_now(published: ModuleType) -> None:
    recorded = json.loads((BENCH / "results" / "published.json").read_text())
    rows = [*published.on_cpu(), *published.simulated(), *published.peft(), *published.litgpt(), *published.torchtune()]
    assert recorded["rows"] == rows and recorded["summary"] == published.summary(rows)


def test_another_trainers_ways_end_with_it(published: ModuleType) -> None:
    spec = read_model_spec(LLAMA)
    training, work = published.train(spec, base_precision="nf4"), train_step.Workload(512, 512)
    own = train_step.step_terms(spec, training, work)
    assert published.predict(spec, training, 512, published.HF)[0] > sum(term.bytes for term in own)
    assert train_step.step_terms(spec, training, work) == own
    assert dataflow.DecoderLayer.__module__ == "edgeft.memory.dataflow"
