"""What holds for every plan: more memory is never worse, nothing better was passed over, the budget is used."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from typing import Any

import pytest
from tiny import CONFIGS

from edgeft.data.dataset import Lengths
from edgeft.machines.limits import PROC
from edgeft.machines.profile import Profile, list_profiles
from edgeft.memory.timing import count, mean_work, seconds_per_step
from edgeft.memory.train_step import Workload
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.planning.candidates import candidates
from edgeft.planning.choice import best_that_fits
from edgeft.planning.costs import Question
from edgeft.planning.plan import make_plan
from edgeft.settings.job import Training, make_job
from edgeft.units import GIB, MIB

SPECS = [read_model_spec(str(folder.parent)) for folder in sorted(CONFIGS.glob("*/config.json"))]
HOSTS = [profile for profile in list_profiles() if "train" in profile.roles and profile.detected]
NEVER = (float("inf"), float("inf"))


def random_question(draw: random.Random, spec: ModelSpec, **settings: Any) -> Question:
    """A job on a random machine with data of random lengths."""
    fours = settings.get("base_precision") == "nf4"  # Apple GPUs have no kernels for them
    profile: Profile = draw.choice([host for host in HOSTS if not fours or host.device != "mps"])
    longest = min(draw.choice([40, 300, 1024, 3000]), spec.max_position_embeddings or 3000)
    trained = draw.randint(1, longest)
    lengths = None
    if draw.random() < 0.6:
        mean = draw.uniform(0.2, 1.0) * longest
        lengths = Lengths(
            path="rows.jsonl", sha256="0" * 64, rows=1000, longest=longest, median=round(mean), mean=mean,
            tokens=round(1000 * mean), longest_trained=trained,
        )  # fmt: skip
    job = make_job(model=spec.model, profile=profile.name, batch_size=draw.choice([1, 4, 16]), **settings)
    work = Workload(longest, trained if lengths else longest)
    return Question(job, profile, spec, lengths, work, draw.choice([0, 50 * MIB]), profile.budget_bytes)


def ways(question: Question) -> list[Training]:
    """The candidates of a question, best first, as the planner has them."""
    found = candidates(question.job, question.profile, question.spec, question.work, 100)
    return sorted(found, key=question.key)


def with_budget(question: Question, budget: int) -> Question:
    return dataclasses.replace(question, budget_bytes=budget)


PINS: list[dict[str, Any]] = [
    {"rank": 16, "layers": "all"}, {"tuner": "full", "layers": "lisa"}, {"layers": "sparse"}, {"base_precision": "nf4"},
    {"loss_chunk_tokens": 64, "tuner": "lora"}, {"checkpointing": True, "rank": 8}, {"micro_batch_size": 1},
]  # fmt: skip


@pytest.mark.parametrize("pins", PINS)
def test_what_is_counted_once_is_what_each_way_counts(pins: dict[str, Any]) -> None:
    question = random_question(random.Random(f"counts {pins}"), SPECS[0], **pins)
    work = mean_work(question.work, question.lengths)
    for training in ways(question):
        for kept in (None, training.kept_layers, question.most_kept(training)):
            counted = count(question.spec, training, work, training.kept_layers if kept is None else kept)
            assert question.seconds(training, kept) == seconds_per_step(question.profile, training, work, counted)


@pytest.mark.parametrize("seed", range(14))
def test_a_bigger_budget_never_gives_a_worse_plan(seed: int) -> None:
    """Over random models, machines, lengths and pins: (quality, time) never rises with the budget."""
    draw = random.Random(f"budgets {seed}")
    question = random_question(draw, draw.choice(SPECS), **PINS[seed % len(PINS)])
    looked_at = ways(question)
    sizes = [question.high_bytes(training) for training in draw.sample(looked_at, min(40, len(looked_at)))]
    last = NEVER  # budgets about where candidates begin to fit: the rest is above or below all of them
    for budget in sorted(round(draw.choice(sizes) * draw.uniform(0.9, 1.3)) for _ in range(8)):
        chosen = best_that_fits(with_budget(question, budget), looked_at)
        if chosen is not None:
            assert question.high_bytes(chosen) <= budget
        key = question.key(chosen) if chosen else NEVER
        assert key <= last, (question.spec.model, question.profile.name, budget, chosen)
        last = key
    assert last < NEVER


@pytest.mark.parametrize("seed", range(6))
def test_no_way_that_fits_is_better_than_the_chosen_one(seed: int) -> None:
    """The search over how many layers keep their activations finds what trying every number finds."""
    draw = random.Random(f"every way {seed}")
    spec = draw.choice([spec for spec in SPECS if spec.num_hidden_layers <= 36])
    question = random_question(draw, spec, rank=16, loss_chunk_tokens=256, optimizer="adamw", layers="all")
    looked_at = ways(question)
    every = [
        way.model_copy(update={"kept_layers": kept})
        for way in looked_at
        for kept in range(way.kept_layers, question.most_kept(way) + 1)
    ]
    sizes = [question.high_bytes(way) for way in every]
    for budget in (*draw.sample(sizes, 5), min(sizes) - 1):
        chosen = best_that_fits(with_budget(question, budget), looked_at)
        fitting = [question.key(way) for way, size in zip(every, sizes, strict=True) if size <= budget]
        assert (question.key(chosen) if chosen else NEVER) == min(fitting, default=NEVER)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen2.5-7b"])
@pytest.mark.parametrize("budget", [7, 8, 9, 12, 16, 24])
def test_the_budget_is_used_or_a_note_says_why_not(model: str, budget: int) -> None:
    length = 300 if budget == 7 else None
    job = make_job(model=str(CONFIGS / model), profile="rtx4090-24gb", max_memory_bytes=budget * GIB, max_length=length)
    made = make_plan(job)
    assert made.peak_bytes <= made.budget_bytes
    share = made.peak_bytes / made.budget_bytes
    assert share >= 0.85 or any(f"{100 * share:.0f}% of the budget is used" in note for note in made.notes)


def test_a_budget_that_no_way_can_fill_is_said_to_be_unused() -> None:
    made = make_plan(make_job(model=str(CONFIGS / "smollm2-135m"), profile="rtx4090-24gb", max_length=64))
    assert made.peak_bytes < 0.5 * made.budget_bytes
    assert any("of the budget is used: the best way that is known needs no more" in note for note in made.notes)


@pytest.mark.skipif(not (PROC / "self/status").is_file(), reason="resident bytes are read from Linux's /proc")
def test_planning_in_a_fresh_process_is_small() -> None:
    """Highest resident bytes below 150 MB, as no torch is imported; the interpreter itself takes about 10."""
    code = (
        "import sys; from edgeft.machines.limits import resident_bytes; from edgeft.planning.plan import make_plan; "
        "from edgeft.settings.job import make_job; "
        f"make_plan(make_job(model={str(CONFIGS / 'llama-3.1-8b')!r}, profile='t4', rank=16)); "
        "print(resident_bytes(highest=True), *sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    resident, *imported = done.stdout.split()
    assert not imported
    assert 10_000_000 < int(resident) < 150_000_000
