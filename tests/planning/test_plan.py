"""Plans: what is chosen, what is refused and in which words."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import CONFIGS

from edgeft.errors import BadInput, DoesNotFit
from edgeft.machines.profile import list_profiles, load_profile
from edgeft.memory import train_step
from edgeft.models.spec import read_model_spec
from edgeft.planning.alternatives import does_not_fit
from edgeft.planning.candidates import candidates
from edgeft.planning.costs import Question
from edgeft.planning.plan import Plan, make_plan, request_digest
from edgeft.reporting.words import data_text, step_time, verdict
from edgeft.settings.attention import repeats_groups
from edgeft.settings.job import make_job
from edgeft.units import GIB, show_bytes

PINNED = ("tuner", "rank", "base_precision", "micro_batch_size", "loss_chunk_tokens", "optimizer")
LLAMA, QWEN = str(CONFIGS / "llama-3.1-8b"), str(CONFIGS / "qwen2.5-7b")
QWEN_SMALL = str(CONFIGS / "qwen2.5-0.5b")
SMALL = str(CONFIGS / "smollm2-135m")


def plan(model: str = LLAMA, profile: str = "t4", **settings: object) -> Plan:
    return make_plan(make_job(model=model, profile=profile, **settings))


@pytest.mark.parametrize("model", [LLAMA, QWEN])
def test_large_models_fit_a_t4(model: str) -> None:
    made = plan(model)
    assert made.peak_bytes <= made.budget_bytes <= 16 * GIB
    assert (made.training.base_precision, made.training.compute_dtype) == ("nf4", "fp16")
    assert made.training.trained_layers == tuple(range(made.spec.num_hidden_layers))


@pytest.mark.parametrize("model", [LLAMA, QWEN])
def test_nine_gigabytes_fit_and_say_what_was_given_up(model: str) -> None:
    made = plan(model, max_memory_bytes=9 * GIB)
    assert made.peak_bytes <= 9 * GIB
    assert "base weights in nf4 instead of fp16" in made.gave_up
    assert any("checkpointing" in line for line in made.gave_up)


def test_as_few_layers_are_recomputed_as_fit() -> None:
    made = plan(max_memory_bytes=13 * GIB)
    training = made.training
    assert training.checkpointing and 0 < training.kept_layers < made.spec.num_hidden_layers
    pinned = {name: getattr(training, name) for name in PINNED}
    with pytest.raises(DoesNotFit):
        plan(max_memory_bytes=13 * GIB, layers="all", kept_layers=training.kept_layers + 1, **pinned)
    assert (
        plan(max_memory_bytes=13 * GIB, layers="all", kept_layers=training.kept_layers, **pinned).training == training
    )
    assert any(f"in {32 - training.kept_layers} of 32 layers" in line for line in made.gave_up)
    assert plan(max_memory_bytes=13 * GIB, checkpointing=True).training.kept_layers == 0


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"checkpointing": False, "kept_layers": 2}, "none does"), ({"kept_layers": 33}, "more than the model's 32")],
)
def test_layers_that_cannot_keep_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        plan(**settings)


def test_the_frontier_holds_the_chosen_way_and_nothing_that_another_beats() -> None:
    made = plan(max_memory_bytes=9 * GIB)
    mine = [row for row in made.frontier if row.high_bytes == made.peak_bytes]
    assert len(mine) == 1 and mine[0].fits
    others = [row for row in made.frontier if row not in mine]
    costs, sizes = [row.quality_cost for row in others], [row.high_bytes for row in others]
    assert costs == sorted(set(costs)) and sizes == sorted(set(sizes), reverse=True)
    assert all(not row.fits for row in others if row.quality_cost < mine[0].quality_cost)
    assert all(row.fits == (row.high_bytes <= made.budget_bytes) for row in made.frontier)


def test_alternatives_differ_in_one_choice_and_say_what_it_costs() -> None:
    made = plan(max_memory_bytes=9 * GIB)
    by_setting = {a.setting for a in made.alternatives}
    assert {"base_precision", "rank", "layers", "checkpointing", "optimizer", "loss_chunk_tokens"} <= by_setting
    for other in made.alternatives:
        assert other.more_bytes == other.high_bytes - made.peak_bytes
        assert other.fits == (other.high_bytes <= made.budget_bytes)
        better = (other.more_quality_cost, other.more_seconds_per_step) < (0, 0)
        assert not (other.fits and better), f"{other} was the better plan"


@pytest.mark.parametrize("model", ["qwen2.5-1.5b", "llama-3.1-8b"])  # both keep the activations of a few layers
def test_each_change_of_one_choice_is_said_once(model: str) -> None:
    made = plan(model=str(CONFIGS / model))
    assert made.training.kept_layers and len(made.alternatives) > 10
    assert len(made.alternatives) == len({(each.setting, each.value) for each in made.alternatives})


@pytest.mark.parametrize(
    ("model", "target", "why"),
    [
        ("gpt2", None, "onnxruntime-genai's builder does not know GPT2LMHeadModel; --target onnx-portable-int8 may do"),
        ("gemma-3-270m", "ort-int8", "onnxruntime-genai 0.18 cannot build Gemma 3: .*; --target gguf-q4_0 or "),
        ("smollm3-3b", "gguf-q8_0", "the GGUF writer does not know the model type 'smollm3'; --target ort-int4 or "),
        ("gpt2", "onnx-portable-int8", None), ("gemma-3-270m", "gguf-q4_0", None), ("smollm2-135m", None, None),
    ],
)  # fmt: skip
def test_a_bundle_that_cannot_be_built_is_said_with_one_that_can(
    model: str, target: str | None, why: str | None
) -> None:
    made = plan(model=str(CONFIGS / model), **({"target": target} if target else {}))
    said = [note for note in made.notes if "cannot be built" in note]
    assert len(said) == (why is not None) and bool(made.stages.cannot_build) == (why is not None)
    assert verdict(made).startswith("fits, but " + made.stages.target.name) if why else verdict(made) == "fits"
    if why:
        assert re.match(f"{made.stages.target.name} cannot be built: {why}", said[0])


def test_without_data_a_plan_says_what_it_assumes() -> None:
    for settings, length in (({}, "1,024"), ({"max_length": 100}, "100")):
        made = plan(model=str(CONFIGS / "gpt2"), **settings)  # of 1,024 positions
        assert f"no data given: 1,000 rows of {length} tokens, all trained, 3 epochs, are assumed" in made.notes
        assert made.training.max_length == int(length.replace(",", ""))
        assert "for the rows that are assumed" in step_time(made)


def test_settings_of_adapters_are_not_dropped_without_a_word() -> None:
    asked = {"rank": 16, "lora_scale": "plain"}
    with pytest.raises(BadInput, match="full fine-tuning alone, and rank, lora_scale would have no effect") as refused:
        plan(model=SMALL, embedding="on", **asked)
    assert "leave embedding out" in refused.value.hint
    assert plan(model=SMALL, embedding="on").training.tuner == "full"
    named = plan(model=SMALL, tuner="full", base_precision="fp32", **asked)
    assert "rank, lora_scale: of adapters, without effect where all weights train" in named.notes
    assert not [note for note in plan(model=SMALL, **asked).notes if "without effect" in note]


def test_what_is_better_and_fits_but_takes_long_is_not_said_to_need_more() -> None:
    made = plan(model=str(CONFIGS / "mistral-7b"), profile="t4:6GiB")
    (said,) = [note for note in made.notes if "of the budget is used" in note]
    assert "what fits and is better takes" in said and "needs" not in said
    asked = dict(part.split("=") for part in re.findall(r"--set (\S+=\w+)", said))
    slower = plan(model=str(CONFIGS / "mistral-7b"), profile="t4:6GiB", **asked)
    assert slower.seconds_per_step > 2 * made.seconds_per_step and slower.peak_bytes <= slower.budget_bytes


def test_a_bundle_that_may_need_more_than_its_device_is_said() -> None:
    made = plan(profile="rtx4060-8gb", device="raspberrypi5-8gb")
    bundle = made.stages.phases[-1]
    assert bundle.expected_bytes <= made.stages.target_bytes < bundle.high_bytes
    (said,) = [note for note in made.notes if note.startswith("the bundle may need")]
    assert "of raspberrypi5-8gb's 6.80 GiB" in said and said in made.stages.notes()
    here = made.model_copy(update={"stages": made.stages.model_copy(update={"host_bytes": None})})
    tight = f"{show_bytes(bundle.high_bytes)} of raspberrypi5-8gb's 6.80 GiB at most"
    assert verdict(here) == f"fits, tightly on the device: {tight}"
    assert not made.stages.safer and said.endswith("a smaller model is safer")
    qwen = {"model": str(CONFIGS / "qwen2.5-7b"), "profile": "rtx4060-8gb", "device": "raspberrypi5-8gb"}
    option, _, high = plan(**qwen).stages.safer.partition(" takes ")
    held = plan(**qwen, kv_bits=8).stages
    assert option == "--set kv_bits=8" and high == f"{show_bytes(held.phases[-1].high_bytes)} at most"
    assert plan(**qwen).stages.tight_on_device() and not held.tight_on_device()
    assert not [
        n for n in plan(model=QWEN_SMALL, device="raspberrypi5-8gb").notes if n.startswith("the bundle may need")
    ]


def test_few_scored_rows_are_said_before_they_are_scored() -> None:
    rows = str(CONFIGS.parent / "debian-sections" / "valid.jsonl")  # 500 of them
    tiny = {"model": str(CONFIGS.parent / "debian-tiny"), "profile": "cpu-8gb", "data": rows}
    assert any(note.startswith("25 rows held out of the data are scored: ") for note in plan(**tiny).notes)
    assert any(note.startswith("12 rows are there to validate: ") for note in plan(valid=f"{rows}#12", **tiny).notes)
    for enough in ({"valid": rows}, {"test": rows}):
        assert not [note for note in plan(**tiny, **enough).notes if "only large differences" in note]
    few = plan(test=rows, answers="labels", **{**tiny, "data": f"{rows}#300"}).notes
    said = (
        "15 rows held out of the data are scored: too few to calibrate the labels' probabilities; --valid FILE with 20 "
    )
    said += "or more"
    assert said in few and said not in plan(answers="labels", **tiny).notes


def test_rows_that_are_held_out_are_no_rows_that_train() -> None:
    """Half of what is held out says when a run stops, where one may: all of it is told, and what is left trains."""
    rows = str(CONFIGS.parent / "debian-sections" / "train.jsonl")
    tiny = {"model": str(CONFIGS.parent / "debian-tiny"), "profile": "cpu-8gb", "data": f"{rows}#440"}
    made = plan(patience=3, **tiny)
    assert data_text(made).endswith("440 answers; 22 of the rows are held out, 418 train")
    assert made.training.steps == 3 * -(-418 // 16)
    [note] = [note for note in made.notes if "only large differences" in note]
    assert note.startswith("11 rows held out of the data are scored, 11 more say when the run stops: ")
    assert note.endswith("--valid FILE with 100 or more")
    assert "held out" not in data_text(plan(valid=rows, **tiny))


def test_how_many_rows_a_shape_is_planned_for_can_be_said() -> None:
    """Time, steps and the note follow; where there is data it is counted, and nobody says how many rows it has."""
    shape = {"model": str(CONFIGS / "qwen2.5-1.5b"), "profile": "t4"}
    many, few = plan(**shape), plan(rows=440, **shape)
    assert (many.training.steps, few.training.steps) == (189, 3 * -(-440 // 16)) and few.seconds < 0.5 * many.seconds
    assert any(note.startswith("no data given: 440 rows of 2,048 tokens") for note in few.notes)
    rows = str(CONFIGS.parent / "debian-sections" / "valid.jsonl")
    with pytest.raises(BadInput, match="rows: says how many are planned for where no data is given") as caught:
        plan(model=str(CONFIGS.parent / "debian-tiny"), profile="cpu-8gb", data=rows, rows=440)
    assert f"{rows}#440" in caught.value.hint
    with pytest.raises(BadInput, match="no tokenizer") as caught:
        plan(**shape, data=rows)
    assert "--set rows=440" in caught.value.hint


def test_savings_are_what_the_peak_would_be_without_each_choice() -> None:
    made = plan(max_memory_bytes=9 * GIB)
    found = {saving.choice: saving.bytes for saving in made.savings}
    assert found["base weights in nf4"] > 8 * GIB and list(found.values()) == sorted(found.values(), reverse=True)
    assert all(saved > 0 for saved in found.values())


@pytest.mark.slow
def test_a_time_limit_is_kept_or_named() -> None:
    free = plan(profile="cpu-8gb", model=str(CONFIGS / "smollm2-135m"))
    limited = plan(profile="cpu-8gb", model=str(CONFIGS / "smollm2-135m"), max_seconds=0.8 * free.seconds)
    assert limited.seconds <= 0.8 * free.seconds
    with pytest.raises(DoesNotFit, match=r"nothing ends within 5.0 s: the fastest .*\n\nhint: .*--set max_steps=\d+"):
        plan(profile="cpu-8gb", model=str(CONFIGS / "smollm2-135m"), max_seconds=5.0)


def test_what_the_user_sets_is_kept() -> None:
    made = plan(
        rank=8,
        micro_batch_size=2,
        checkpointing=True,
        layers="sparse",
        active_layers=3,
        loss_chunk_tokens=128,
        max_length=512,
    )
    training = made.training
    assert (training.rank, training.micro_batch_size, training.checkpointing) == (8, 2, True)
    assert (training.trained_layers, training.loss_chunk_tokens, training.max_length) == ((29, 30, 31), 128, 512)


@pytest.mark.parametrize("smaller, larger", [(7, 8), (9, 12), (16, 24), (24, 40)])
def test_a_larger_budget_never_gives_a_worse_plan(smaller: int, larger: int) -> None:
    def cost(made: Plan) -> tuple[bool, int, int]:
        training = made.training
        return training.base_precision == "nf4", -len(training.trained_layers), -training.rank

    first = plan(profile="rtx4090-24gb", max_memory_bytes=smaller * GIB)
    second = plan(profile="rtx4090-24gb", max_memory_bytes=larger * GIB)
    assert cost(second) <= cost(first)


def test_nothing_fits_names_the_smallest_and_the_cheapest_change() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan(
            max_memory_bytes=7 * GIB, max_length=8192, stream_layers=False
        )  # beside what loading takes, whatever the length
    assert caught.value.exit_code == 3
    assert "nothing fits 7.00 GiB: the smallest of" in str(caught.value)
    assert "hint: samples of at most" in str(caught.value) and "--set max_length=" in str(caught.value)
    with pytest.raises(
        DoesNotFit, match=r"hint: a budget of [0-9.]+ GiB would do \(now 2.00 GiB\), or a smaller model"
    ):
        plan(max_memory_bytes=2 * GIB, stream_layers=False)


@pytest.mark.parametrize("model, budget", [("gemma-2-9b", 8.4), ("llama-3.1-8b", 6.8)])
@pytest.mark.slow
def test_the_hinted_length_is_the_longest_that_any_candidate_fits_with(model: str, budget: float) -> None:
    """Both are cases where the way that is smallest at full length is not the smallest at the hinted one."""
    job, profile = make_job(model=str(CONFIGS / model), profile="t4"), load_profile("t4")
    spec, work = read_model_spec(job.model), train_step.Workload(8192, 8192)
    question = Question(job, profile, spec, None, work, 0, int(budget * GIB))
    looked_at = list(candidates(job, profile, spec, work, 10))
    hinted = re.search(r"--set max_length=(\d+)", str(does_not_fit(question, looked_at, None)))
    assert hinted is not None

    def fits(length: int) -> bool:
        cut, other = {"max_length": length}, train_step.Workload(length, length)
        sizes = (question.high_bytes(training.model_copy(update=cut), other) for training in looked_at)
        return min(sizes) <= question.budget_bytes

    assert fits(int(hinted[1])) and not fits(int(hinted[1]) + 1)


def test_a_pin_that_does_not_fit_is_named() -> None:
    with pytest.raises(
        DoesNotFit, match="it fits when base_precision is left to the planner: drop --set base_precision=fp16"
    ):
        plan(base_precision="fp16", stream_layers=False)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"base_precision": "bf16"},
            "base_precision: t4 does not compute bf16 at full rate\n\nhint: use one of fp32, fp16, nf4",
        ),
        (
            {"layers": "sparse", "active_layers": 40},
            "active_layers: 40 is more than the model's 32 layers\n\nhint: at most 32",
        ),
        (
            {"max_length": 200_000},
            "max_length: 200000 is more than the model's 131072 positions\n\nhint: at most 131072",
        ),
        (
            {"tuner": "full", "base_precision": "nf4"},
            "base_precision: 4-bit weights cannot be trained themselves\n\nhint: use tuner=lora, layers=lisa or "
            "layers=sparse (those that train are dense then), or base_precision=fp32",
        ),
        (
            {"tuner": "full", "base_precision": "fp16"},
            "base_precision: fp16 weights cannot be trained themselves\n\nhint: use tuner=lora, layers=lisa or "
            "layers=sparse (those that train are dense then), or base_precision=fp32",
        ),
        (
            {"tuner": "full", "layers": "lisa", "optimizer": "paged_adamw8bit"},
            "optimizer: paged_adamw8bit never frees the paged states of layers that leave, and lisa's layers come and "
            "go\n\nhint: use optimizer=adamw8bit or adamw with layers=lisa",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        plan(**settings)
    assert str(caught.value) == message


def test_ends_that_train_beside_a_few_layers_make_a_gpu_compute_in_fp32() -> None:
    for layers in ("sparse", "lisa"):
        job = make_job(model=QWEN_SMALL, profile="t4", tuner="full", layers=layers, norm="on", max_length=64)
        made = make_plan(job).training
        assert (made.base_precision, made.compute_dtype) == ("fp32", "fp32")


def test_lisa_says_where_it_amounts_to_less() -> None:
    def notes(**settings: object) -> str:
        job = make_job(model=QWEN_SMALL, profile="t4", tuner="full", layers="lisa", max_length=64, **settings)
        return "\n".join(make_plan(job).notes)

    assert "lisa never switches: the run has 5 steps, an interval 9" in notes(max_steps=5, lisa_interval=9)
    assert "only one draw is possible, every layer trains all the time" in notes(active_layers=24)
    assert "lisa" not in notes(active_layers=2)


def test_a_model_that_overflows_in_fp16_computes_in_fp32_where_there_is_no_bf16() -> None:
    gemma = str(CONFIGS / "gemma-3-1b")
    assert make_plan(make_job(model=gemma, profile="t4")).training.compute_dtype == "fp32"
    assert make_plan(make_job(model=gemma, profile="l4-24gb")).training.compute_dtype == "bf16"
    pinned = make_plan(make_job(model=gemma, profile="t4", base_precision="fp16", max_length=512))
    assert pinned.training.compute_dtype == "fp16" and any("overflows in fp16" in note for note in pinned.notes)


def test_heads_are_repeated_where_no_kernel_knows_grouped_queries() -> None:
    """One answer for the planner and the trainer: flash attention is bf16's (a profile has that from 8.0 on)."""
    for profile, precision, repeats in (
        ("rtx4090-24gb", "fp32", True), ("rtx4090-24gb", "bf16", False), ("t4", "fp16", True), ("t4", "fp32", True),
        ("cpu-8gb", "fp32", False),
    ):  # fmt: skip
        job = make_job(model=QWEN_SMALL, profile=profile, tuner="lora", base_precision=precision, max_length=256)
        made = make_plan(job)
        assert repeats_groups(made.training, made.spec.head_dim) is repeats, (profile, precision)


def test_a_target_device_is_no_training_host() -> None:
    with pytest.raises(BadInput, match="profile: raspberrypi5-8gb is a target device, not a training host"):
        plan(profile="raspberrypi5-8gb")


@pytest.mark.parametrize("profile", [p.name for p in list_profiles() if "train" in p.roles and p.detected])
def test_every_training_profile_plans_a_small_model(profile: str) -> None:
    made = plan(str(CONFIGS / "smollm2-135m"), profile)
    assert made.peak_bytes <= made.budget_bytes and made.profile.name == profile
    assert made.training.compute_dtype in made.profile.dtypes


def test_the_longest_sample_is_planned_for(checkpoint_folder: Path, write_rows) -> None:  # type: ignore[no-untyped-def]
    rows = [{"prompt": "a" * 10, "completion": " b"}] * 20 + [{"prompt": "word " * 40, "completion": " b"}]
    data = str(write_rows("rows.jsonl", rows))
    made = plan(str(checkpoint_folder), "cpu-8gb", data=data)
    assert made.lengths is not None and made.lengths.rows == 21
    assert made.training.max_length == made.lengths.longest > 40
    cut = plan(str(checkpoint_folder), "cpu-8gb", data=data, max_length=16)
    assert cut.training.max_length == 16 and cut.lengths is not None and cut.lengths.cut_rows == 1
    assert any("1 of 21 rows are cut to 16 tokens" in note for note in cut.notes)
    assert made.lengths.quantiles["0.95"] < made.lengths.longest == cut.lengths.longest + made.lengths.longest - 16


def test_digest_follows_settings_and_data(checkpoint_folder: Path, write_rows) -> None:  # type: ignore[no-untyped-def]
    data = write_rows("rows.jsonl", [{"text": "a"}])
    job = make_job(model=str(checkpoint_folder), data=str(data), profile="cpu-8gb")
    first = request_digest(job, checkpoint_folder)
    assert first == request_digest(job, checkpoint_folder)
    assert first != request_digest(job.model_copy(update={"rank": 8}), checkpoint_folder)
    data.write_text('{"text": "b"}\n')
    assert first != request_digest(job, checkpoint_folder)


def test_planning_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from edgeft.planning.plan import make_plan; from edgeft.settings.job import make_job; "
        f"make_plan(make_job(model={LLAMA!r}, profile='t4')); "
        "assert not {'torch', 'transformers', 'peft', 'onnxruntime'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plan_survives_its_file(tmp_path: Path) -> None:
    made = plan(max_memory_bytes=9 * GIB)
    made.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == made


def test_more_samples_at_a_time_than_a_step_has_are_refused() -> None:
    with pytest.raises(BadInput, match="micro_batch_size: 16 samples at a time are more than the 8 of a step"):
        plan(QWEN_SMALL, micro_batch_size=16, batch_size=8)
    assert plan(QWEN_SMALL, micro_batch_size=8, batch_size=8).training.micro_batch_size == 8
