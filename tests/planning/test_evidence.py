"""What was measured decides between tuners and between layers; what is within noise decides nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import CONFIGS, ROOT

from edgeft.errors import DoesNotFit
from edgeft.models.spec import read_model_spec
from edgeft.planning import evidence as module
from edgeft.planning.candidates import SMALL_MODEL
from edgeft.planning.evidence import UNSHOWN, Evidence, evidence, layers_points, nearest, tuner_points
from edgeft.planning.plan import Plan, make_plan
from edgeft.reporting.explain import explain_text
from edgeft.settings.job import make_job
from edgeft.settings.tuners import TUNERS

EXAMPLE, LLAMA, QWEN = (
    str(ROOT / "examples" / "debian-tiny"),
    str(CONFIGS / "llama-3.1-8b"),
    str(CONFIGS / "qwen2.5-0.5b"),
)
NOISE, ON = (-0.5, 0.5), "a task, m5771520 of 5.77M parameters"
Plant = Callable[..., None]


def comparison(
    way: str, against: str, points: float, reach: float = 1.0, rows: int = 1000, **loss: Any
) -> dict[str, Any]:
    low, high = loss.get("loss", NOISE)
    return {
        "way": way, "against": against, "rows": rows, "seeds": 1,
        "points": {"difference": points, "low": points - reach, "high": points + reach},
        "loss": {"difference": (low + high) / 2, "low": low, "high": high},
    }  # fmt: skip


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """Let the planner go by these comparisons alone, of models of so many parameters."""

    def planted(*comparisons: dict[str, Any], **others: list[dict[str, Any]]) -> None:
        studies = {5_771_520: list(comparisons), **{int(name[1:]): found for name, found in others.items()}}
        made = Evidence.model_validate({"source": "planted", "commit": "0", "studies": [
            {"model": f"m{size}", "parameters": size, "layers": 8, "task": "a task", "rank": 16, "test_rows": 100,
             "shares": {"sparse": 0.25, "lisa": 0.25}, "comparisons": found,
             "scores": [{"way": "lora, all", "rows": 1000, "seeds": 1, "points": 70.0}]}
            for size, found in studies.items()
        ]})  # fmt: skip
        monkeypatch.setattr(module, "evidence", lambda: made)
        nearest.cache_clear()

    yield planted
    nearest.cache_clear()


def plan(model: str = EXAMPLE, profile: str = "cpu-8gb", **settings: object) -> Plan:
    return make_plan(make_job(model=model, profile=profile, max_length=64, **settings), compare_tuners=True)


def text(made: Plan) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(explain_text(made))
    return captured.get()


@pytest.mark.parametrize(
    ("points", "reach", "loss", "lost"),
    [
        (-3.0, 2.9, NOISE, 3.0),
        (-3.0, 3.1, NOISE, 0.0),  # within noise
        (-3.0, 3.1, (0.01, 0.05), 3.0),  # the loss shows it
        (-3.0, 3.1, (-0.05, -0.01), 0.0),  # the loss shows the opposite
        (2.0, 1.9, NOISE, -2.0),  # better
        (2.0, 2.1, (-0.05, -0.01), -2.0),
        (2.0, 2.1, (0.01, 0.05), 0.0),
    ],
)
def test_a_difference_counts_where_it_is_shown(
    plant: Plant, points: float, reach: float, loss: tuple[float, float], lost: float
) -> None:
    plant(comparison("dora, all", "lora, all", points, reach, loss=loss))
    assert tuner_points("dora", 1000, 10**6) == lost


def test_the_nearest_rows_and_the_nearest_model_say_it(plant: Plant) -> None:
    plant(
        comparison("full, all", "lora, all", -1.0, 0.5, rows=100),
        comparison("full, all", "lora, all", -2.0, 0.5, rows=6000),
        m135000000=[comparison("full, all", "lora, all", -4.0, 0.5, rows=300)],
    )
    sizes = {rows: tuner_points("full", rows, 5_771_520) for rows in (1, 300, 700, 800, 10**6)}
    assert sizes == {1: 1.0, 300: 1.0, 700: 1.0, 800: 2.0, 10**6: 2.0}
    assert tuner_points("full", 300, 10**9) == tuner_points("full", 1000, 135 * 10**6) == 4.0
    assert tuner_points("full", 10**6, 10**7) == 2.0
    assert tuner_points("prefix", 300, 10**9) == 0.0 and nearest("prefix, all", "lora, all", 300, 10**9) is None


@pytest.mark.parametrize("points", [-6.0, 0.0, 6.0])
def test_fewer_layers_are_never_cheaper(plant: Plant, points: float) -> None:
    plant(*(comparison(f"lora, {kind}", "lora, all", points) for kind in ("sparse", "lisa")))
    for method, kind in itertools.product(("lora", "dora"), ("sparse", "lisa")):  # DoRA was never measured
        found = [layers_points(method, kind, share / 8, 1000, 10**7) for share in range(1, 9)]
        assert all(fewer > more for fewer, more in itertools.pairwise(found)) and found[-1] == 0
        at_measured = max(0.0, -points) if points else 0.75 * UNSHOWN[kind]  # 2 of 8; noise shows nothing
        assert found[1] == pytest.approx(at_measured, abs=0.02)


def test_fewer_layers_are_never_cheaper_by_what_is_recorded() -> None:
    methods = {each.way.partition(", ")[0] for study in evidence().studies for each in study.comparisons} | {*TUNERS}
    sizes = itertools.product(methods, ("sparse", "lisa"), (100, 1000, 6000, 10**5), (10**6, 10**8, 10**10))
    for method, kind, rows, parameters in sizes:
        found = [layers_points(method, kind, share / 32, rows, parameters) for share in range(1, 33)]
        assert all(fewer > more for fewer, more in itertools.pairwise(found))


def test_every_record_is_of_ways_that_there_are() -> None:
    for study in evidence().studies:
        spec = read_model_spec(EXAMPLE) if study.model == "debian-tiny" else None
        assert spec is None or (spec.total_parameters, spec.num_hidden_layers) == (study.parameters, study.layers)
        for each in study.comparisons:
            for way in (each.way, each.against):
                method, _, layers = way.partition(", ")
                assert method in {*TUNERS, "lora_plus"} and layers in ("all", *study.shares), way
            assert each.points.low <= each.points.difference <= each.points.high


@pytest.mark.parametrize(
    ("points", "tuner", "said"),
    [
        (4.0, "full", f"exact match +4.0 points [+3.0, +5.0] ({ON}, 1,000 rows): the better"),
        (-4.0, "lora", f"exact match -4.0 points [-5.0, -3.0] ({ON}, 1,000 rows): the better"),
        (0.4, None, f"no difference is shown ({ON}, 1,000 rows): the faster"),
    ],
)  # fmt: skip
def test_a_small_model_is_planned_by_it_and_says_so(plant: Plant, points: float, tuner: str | None, said: str) -> None:
    assert read_model_spec(EXAMPLE).total_parameters <= SMALL_MODEL
    plant(comparison("full, all", "lora, all", points))
    made = plan()
    (note,) = [note for note in made.notes if note.startswith("full fine-tuning against LoRA")]
    assert said in note
    if tuner is None:
        other = plan(tuner="lora" if made.training.tuner == "full" else "full")
        assert made.seconds_per_step <= other.seconds_per_step
    else:
        assert made.training.tuner == tuner
    assert not any(note.startswith("full fine-tuning against") for note in plan(tuner="lora").notes)


def test_what_few_layers_lost_decides_what_is_given_up_and_is_cited(plant: Plant) -> None:
    """A budget that takes either 16 bits of the base or some layers: what was measured says which."""

    def pinned(**more: object) -> Plan:
        return plan(LLAMA, "rtx4090-24gb", tuner="lora", optimizer="adamw", micro_batch_size=1, loss_chunk_tokens=64,
                    rank=64, checkpointing=True, kept_layers=0, **more)  # fmt: skip

    plant()
    sizes = [pinned(base_precision="bf16", **layers).peak_bytes
             for layers in ({"layers": "all"}, {"layers": "sparse", "active_layers": 24})]  # fmt: skip

    def tight() -> Plan:
        return pinned(max_memory_bytes=sum(sizes) // 2)

    plant(comparison("lora, sparse", "lora, all", -9.0))
    costly = tight()
    plant(comparison("lora, sparse", "lora, all", -0.3, 0.2))
    cheap = tight()
    assert costly.training.base_precision == "nf4" and costly.training.layers == "all"
    assert cheap.training.base_precision != "nf4" and cheap.training.layers == "sparse"
    (line,) = [line for line in cheap.gave_up if "layers train" in line]
    assert line.endswith("layers train; measured of 2 of 8 layers: exact match -0.3 points [-0.5, -0.1] "
                         f"({ON}, 1,000 rows)")  # fmt: skip


def test_every_other_tuner_is_shown_with_what_was_measured_of_it(plant: Plant) -> None:
    plant(
        comparison("full, all", "lora, all", 0.4),
        comparison("dora, all", "lora, all", -0.7, 0.2),
        comparison("ia3, all", "lora, all", -8.0, 2.0, rows=100),
    )
    made = plan(QWEN, "rtx4090-24gb", tuner="lora", layers="all")
    rows = {row.tuner: row for row in made.tuners}
    assert next(iter(rows)) == "lora" and rows.keys() == TUNERS.keys()
    assert (rows["lora"].more_bytes, rows["lora"].more_seconds_per_step) == (0, 0)
    alone = plan(QWEN, "rtx4090-24gb", tuner="dora", layers="all", **{name: getattr(made.training, name) for name in (
        "rank", "base_precision", "micro_batch_size", "checkpointing", "loss_chunk_tokens", "optimizer")})  # fmt: skip
    assert rows["dora"].high_bytes == alone.peak_bytes == made.peak_bytes + rows["dora"].more_bytes
    assert rows["h-adapter"].refused and not rows["h-adapter"].high_bytes
    assert rows["prefix"].measured is None and not rows["prefix"].folds
    shown = " ".join(text(made).split())
    for said in ("-0.7 [-0.9, -0.5]", "+0.4 [-0.6, +1.4], noise", "-8.0 [-10.0, -6.0]", "70.0%, 1,000 rows is that",
                 f"measured on: {ON}, 100 rows", "this job: 494M parameters, no data"):  # fmt: skip
        assert said in shown, said


def test_a_plan_that_trains_few_layers_compares_tuners_in_few(plant: Plant) -> None:
    plant(
        comparison("full, all", "lora, all", 0.4),
        comparison("lora, sparse", "lora, all", -2.0),
        comparison("dora, sparse", "lora, all", -1.5),
    )
    made = plan(LLAMA, "rtx4090-24gb", tuner="lora", layers="sparse", active_layers=8)
    rows = {row.tuner: row for row in made.tuners}
    assert rows["lora"].measured is not None and rows["lora"].measured.points is not None
    assert rows["dora"].measured is not None and rows["dora"].measured.points is not None
    assert (rows["lora"].measured.points.difference, rows["dora"].measured.points.difference) == (-2.0, -1.5)
    assert rows["prompt"].refused.startswith("layers: sparse says which layers train")


def test_other_tuners_change_no_plan(tmp_path: Path) -> None:
    made = plan(LLAMA, "t4")
    made.write(tmp_path / "plan.json")
    assert made.tuners and Plan.read(tmp_path / "plan.json").tuners == made.tuners
    alone = make_plan(made.job)
    assert not alone.tuners and alone.model_copy(update={"tuners": made.tuners}) == made
    with pytest.raises(DoesNotFit):
        plan(LLAMA, "t4", max_memory_bytes=2**30)
