"""When does a plan keep the outputs of frozen layers, what does it count for them, what does it refuse?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIGS, EXAMPLE

from edgeft.data.dataset import read_samples
from edgeft.data.tokenizer import TextTokenizer
from edgeft.errors import BadInput, DoesNotFit
from edgeft.machines.profile import load_profile
from edgeft.memory import train_step
from edgeft.memory.timing import count
from edgeft.planning.plan import Plan, make_plan
from edgeft.reporting.terminal import _disk
from edgeft.settings.job import make_job
from edgeft.training.job_data import Data
from edgeft.training.prefix import rows_of
from edgeft.units import show_bytes

TOP = {"layers": "sparse", "active_layers": 4}
PHASES = ["load", "prefix", "evaluate", "train"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M's config with the example's tokenizer; no weights."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    shutil.copyfile(CONFIGS / "smollm2-135m" / "config.json", folder / "config.json")
    return folder


@pytest.fixture
def plan(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """A plan of 400 rows of up to 200 words on 135M's shape, three epochs, four layers of 30."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": "a b " * (1 + n % 100), "completion": "libs"}) + "\n" for n in range(400))
    )

    def make(**settings: Any) -> Plan:
        values = {"model": str(model), "data": str(rows), "profile": "cpu-8gb", "epochs": 3.0, "eval_rows": 8, **TOP}
        return make_plan(make_job(**{**values, **settings}))

    return make


def test_it_is_kept_where_epochs_pay_for_it(plan: Callable[..., Plan]) -> None:
    made, without = plan(), plan(prefix_cache=False)
    assert made.training.cached_layers == 26 and without.training.cached_layers == 0
    assert made.training.model_copy(update={"cached_layers": 0, "cached_tokens": 0}) == without.training
    assert made.seconds < 0.7 * without.seconds and made.scoring_seconds < 0.5 * without.scoring_seconds
    assert made.seconds == pytest.approx(made.seconds_per_step * made.training.steps + made.prefix_seconds, rel=0.01)
    assert made.prefix_seconds > 0 == without.prefix_seconds
    [note] = [note for note in made.notes if note.startswith("prefix cache")]
    assert note.startswith("prefix cache: layers 0 to 25 run once for each row (") and "not in each epoch: -" in note
    assert not [note for note in without.notes if "prefix cache" in note]
    [other] = [each for each in made.alternatives if each.setting == "prefix_cache"]
    assert (other.value, other.fits) == ("none", True) and other.more_seconds_per_step > 0 < other.more_bytes
    assert [phase.name for phase in made.phases] == PHASES
    assert [phase.name for phase in without.phases] == ["load", "evaluate", "train"]


def test_one_epoch_gains_nothing_and_the_plan_says_so(plan: Callable[..., Plan]) -> None:
    made = plan(epochs=1.0)
    assert made.training.cached_layers == 0
    [note] = [note for note in made.notes if note.startswith("prefix cache")]
    assert note.startswith("prefix cache: none: with it layers 0 to 25 run once for each row")
    assert note.endswith("time (--set prefix_cache=true)") and ": +" in note
    assert plan(epochs=1.0, prefix_cache=True).training.cached_layers == 26


def test_it_is_kept_where_nothing_else_fits(plan: Callable[..., Plan]) -> None:
    pins = {"tuner": "lora", "rank": 8, "base_precision": "fp32", "micro_batch_size": 16, "epochs": 1.0,
            "checkpointing": False, "malloc": "tight", "loss_chunk_tokens": 64}  # fmt: skip
    kept, plain = (plan(prefix_cache=kept, **pins).peak_bytes for kept in (True, False))
    assert kept < plain
    between = (kept + plain) // 2
    assert plan(max_memory_bytes=between, **pins).training.cached_layers == 26
    with pytest.raises(DoesNotFit, match="nothing fits"):
        plan(max_memory_bytes=between, prefix_cache=False, **pins)


def test_what_lies_below_leaves_the_training_step(plan: Callable[..., Plan]) -> None:
    made, without = plan(), plan(prefix_cache=False)
    spec = made.spec
    weights = [next(t.bytes for t in each.phases[-1].terms if t.name == "weights") for each in (made, without)]
    assert weights[1] - weights[0] == 4 * sum(spec.layer_parameters[:26])  # the head is the embedding
    assert "without layers 0 to 25" in next(t.formula for t in made.phases[-1].terms if t.name == "weights")
    assert made.phases[-1].expected_bytes < without.phases[-1].expected_bytes - weights[1] + weights[0] + 1
    untied = spec.model_copy(update={"tie_word_embeddings": False})
    dropped = [train_step.dropped_bytes(each, made.training) for each in (spec, untied)]
    assert dropped[1] - dropped[0] == 4 * spec.embedding_parameters
    for precision in ("bf16", "nf4"):
        way = made.training.model_copy(update={"base_precision": precision})
        every = way.model_copy(update={"cached_layers": 30})
        rest = train_step.weight_bytes(spec, way) - train_step.dropped_bytes(spec, every)
        outside = spec.embedding_parameters + spec.other_parameters
        assert rest == pytest.approx(outside * (4 if precision == "nf4" else 2), abs=30)


def test_a_step_computes_nothing_of_what_is_kept(plan: Callable[..., Plan]) -> None:
    made = plan()
    ways = [made.training.model_copy(update={"cached_layers": cut}) for cut in (26, 0)]
    kept, all_of_it = (count(made.spec, way, train_step.Workload(100, 10), 0).operations for way in ways)
    matrices = sum(linear.in_features * linear.out_features for linear in made.spec.linears)
    assert all_of_it - kept == pytest.approx(2 * 26 * matrices * made.training.batch_size * 100)


def test_bytes_on_disk_are_those_of_the_very_rows(plan: Callable[..., Plan]) -> None:
    """Rows without a trained token do not train, held-out ones are scored as far as eval_rows says."""
    made = plan(max_length=60)
    data = Data.read(made)
    rows = rows_of(data, made.training)
    assert len(rows) < 400 - 8 and len(data.valid) > 8
    assert made.training.cached_tokens == sum(map(len, rows))
    [disk] = [disk for disk in made.stages.disk if disk.stage == "prefix"]
    assert disk.peak_bytes == disk.kept_bytes == sum(map(len, rows)) * 576 * 4 and disk.where == "cache"
    assert _disk(made.stages).endswith(f", and {show_bytes(disk.peak_bytes)} in the cache")
    [half] = [disk for disk in plan(max_length=60, prefix_cache="bf16").stages.disk if disk.stage == "prefix"]
    assert 2 * half.peak_bytes == disk.peak_bytes and half.terms[0].formula.endswith("in bf16")
    named = plan(valid=made.job.data, test=made.job.data)
    tokens = [len(row) for row in read_samples(str(made.job.data), TextTokenizer(Path(made.job.model)), None)]
    assert named.training.cached_tokens == 2 * sum(tokens) + sum(tokens[:8])


def test_what_nobody_asked_for_does_not_fill_the_disk(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeft.planning.prefix_cache.free_bytes", lambda folder: 1_000_000)
    made = plan()
    assert made.training.cached_layers == 0
    [note] = [note for note in made.notes if note.startswith("prefix cache: none")]
    assert "977 KiB are free in" in note
    assert plan(prefix_cache=True).training.cached_layers == 26  # the run itself refuses, before it begins


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"layers": "all", "active_layers": None}, "all layers train, the lowest too"),
    ({"active_layers": None, "trained_layers": "0,29"}, "layer 0 trains: nothing lies below"),
    ({"layers": "lisa"}, "layer 0 trains: nothing lies below"),
    ({"tuner": "full", "embedding": "on"}, r"the embedding \(the head is tied to it\) trains"),
    ({"tuner": "full", "head": "on"}, r"the embedding \(the head is tied to it\) trains"),
    ({"tuner": "full", "layers": "lisa", "trained_layers": "20-29", "active_layers": 2, "embedding": "rotate"},
     r"the embedding \(the head is tied to it\) rotates"),
    ({"quantize_aware": True, "target": "ort-int4"}, "the base is scored unrounded"),
    ({"data": None}, "the rows are not known"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "why"), REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(settings: dict[str, Any], why: str, plan: Callable[..., Plan]) -> None:
    with pytest.raises(BadInput, match=f"prefix_cache: no outputs of lower layers can be kept: {why}") as caught:
        plan(prefix_cache=True, **settings)
    assert caught.value.hint
    assert plan(**settings).training.cached_layers == 0


def test_lisa_in_a_suffix_keeps_what_lies_below_its_pool(plan: Callable[..., Plan]) -> None:
    made = plan(tuner="full", layers="lisa", trained_layers="24-29", active_layers=2, norm="rotate")
    assert made.training.cached_layers == 24 and made.training.layers == "lisa"


def test_where_the_planner_may_choose_the_layers_it_may_keep_what_lies_below_them(plan: Callable[..., Plan]) -> None:
    pins = {"layers": None, "active_layers": None, "tuner": "lora", "rank": 8}
    whole = plan(**pins)
    assert whole.training.layers == "all" and whole.training.cached_layers == 0
    some = plan(**pins, prefix_cache=True)
    assert some.training.layers == "sparse" and some.training.cached_layers == min(some.training.trained_layers) == 8


def test_a_gpus_states_are_half_as_large(plan: Callable[..., Plan]) -> None:
    made = plan(profile="t4")
    assert load_profile("t4").device == made.training.device == "cuda" and made.training.cached_layers == 26
    [disk] = [disk for disk in made.stages.disk if disk.stage == "prefix"]
    assert disk.peak_bytes == made.training.cached_tokens * 576 * 2
