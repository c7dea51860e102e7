"""Is every setting described, is each wrong one named, and do numbers read and show as people write them?"""

from __future__ import annotations

import math
import re

import pydantic
import pytest
from tiny import ROOT

from edgeft.errors import BadInput, DoesNotFit, EdgeftError, MissingExtra, ParityFailed, did_you_mean
from edgeft.settings.job import Job, Training, make_job, parse_settings
from edgeft.settings.other_names import BY_NAME, ROWS, table
from edgeft.units import GIB, KIB, MIB, parse_bytes, show_bytes, show_count, show_seconds

# settings


@pytest.mark.parametrize("name", Job.model_fields)
def test_every_setting_is_described(name: str) -> None:
    """`edgeft show settings` prints these: a lower-case phrase, no sentence."""
    description = Job.model_fields[name].description
    assert description and len(description) >= 9
    assert not description.endswith(".") and description.strip() == description


def test_only_the_model_is_required() -> None:
    job = make_job(model="m")
    assert [name for name, field in Job.model_fields.items() if field.is_required()] == ["model"]
    assert job.model_dump(exclude_none=True) == {
        "model": "m",
        "profile": "cpu",
        "lora_scale": "rslora",
        "lora_plus": 1.0,
        "init": "random",
        "adapter_at": "both",
        "layer_score": "top",
        "lisa_schedule": "cycle",
        "lisa_state": "drop",
        "batch_size": 16,
        "processes": 1,
        "machines": 1,
        "epochs": 3.0,
        "warmup_fraction": 0.05,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 0,
        "eval_rows": 200,
        "quantize_aware": False,
        "answers": "free",
        "target": "auto",
        "kv_bits": "auto",
    }
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        job.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("text", ["a", "5-3", "1-99999999999", "-1", "", "1,,2"])
def test_layers_that_are_no_list_are_named(text: str) -> None:
    with pytest.raises(BadInput, match="trained_layers: expected numbers of layers, as in 0,5,12-15, got"):
        make_job(model="m", trained_layers=text)


def test_layers_are_read_as_ranges() -> None:
    assert make_job(model="m", trained_layers="3, 0,5-7").trained_layers == (0, 3, 5, 6, 7)


def test_assignments_become_values_that_a_job_reads() -> None:
    values = parse_settings(
        ["rank=8", "checkpointing=true", "learning_rate=2e-4", "max_steps=none", "valid=", "data=a=b.jsonl"]
    )
    assert values == {
        "rank": "8", "checkpointing": "true", "learning_rate": "2e-4", "max_steps": None, "valid": None,
        "data": "a=b.jsonl",
    }  # fmt: skip
    job = make_job(model="m", **values)
    assert (job.rank, job.checkpointing, job.learning_rate, job.max_steps) == (8, True, 2e-4, None)
    assert (job.valid, job.data) == (None, "a=b.jsonl")
    assert parse_settings([]) == {}
    assert parse_settings(["rank=8", "rank=16"]) == {"rank": "16"}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("rank", "--set: expected key=value, got 'rank'"),
        ("", "--set: expected key=value, got ''"),
        ("rnk=8", "--set: unknown setting 'rnk'\n\nhint: did you mean 'rank'?"),
        ("learning-rate=1", "--set: unknown setting 'learning-rate'\n\nhint: did you mean 'learning_rate'?"),
        ("=1", f"--set: unknown setting ''\n\nhint: edgeft show settings lists all {len(Job.model_fields)}"),
    ],
)
def test_an_assignment_that_cannot_be_read(assignment: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_settings(["seed=1", assignment])
    assert str(caught.value) == message


def test_unknown_settings_are_named_all_at_once() -> None:
    with pytest.raises(BadInput) as caught:
        parse_settings(["rnk=8", "seed=1", "use_dora=true"])
    assert str(caught.value) == (
        "--set: unknown settings 'rnk', 'use_dora'\n\nhint: one by one\n"
        "  rnk: did you mean 'rank'?\n  use_dora: it is tuner=dora here"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": "0"}, "rank: input should be greater than or equal to 1, got '0'"),
        (
            {"rank": "8.5"},
            "rank: input should be a valid integer, unable to parse string as an integer, got '8.5'",
        ),
        (
            {"tuner": "qlora"},
            "tuner: input should be 'lora', 'dora', 'adalora', 'ia3', 'h-adapter', 'adapter', 'prefix', 'prompt' "
            "or 'full', got 'qlora'",
        ),
        (
            {"base_precision": "int8"},
            "base_precision: input should be 'fp32', 'bf16', 'fp16' or 'nf4', got 'int8'",
        ),
        ({"warmup_fraction": 1.5}, "warmup_fraction: input should be less than or equal to 1, got 1.5"),
        ({"max_length": 7}, "max_length: input should be greater than or equal to 8, got 7"),
        ({"learning_rate": "0"}, "learning_rate: input should be greater than 0, got '0'"),
        ({"learning_rate": "inf"}, "learning_rate: input should be a finite number, got 'inf'"),
        ({"epochs": "nan"}, "epochs: input should be a finite number, got 'nan'"),
        ({"batch_size": None}, "batch_size: input should be a valid integer, got None"),
        (
            {"seed": "x", "eval_rows": 0},
            "seed: input should be a valid integer, unable to parse string as an integer, got 'x'\n"
            "eval_rows: input should be greater than or equal to 1, got 0",
        ),
        ({"lr": 1.0}, f"unknown key 'lr'\n\nhint: {len(Job.model_fields)} are known: active_layers to weight_decay"),
        ({"optimiser": "adamw"}, "unknown key 'optimiser'\n\nhint: did you mean 'optimizer'?"),
    ],
)
def test_a_value_that_does_not_fit(values: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        make_job(model="m", **values)
    assert str(caught.value) == f"job: {message}"


def test_a_job_needs_a_model() -> None:
    with pytest.raises(BadInput) as caught:
        make_job()
    assert str(caught.value) == "job: model: field required"


def test_a_job_survives_json() -> None:
    job = make_job(model="m", rank=4, learning_rate=1e-4, max_memory_bytes=GIB)
    assert Job.model_validate_json(job.model_dump_json()) == job


@pytest.mark.parametrize(
    ("rank", "alpha", "scale"), [(4, 16.0, 8.0), (16, 16.0, 4.0), (8, 8.0, math.sqrt(8)), (0, 0.0, 0.0)]
)
def test_the_lora_scale_is_rank_stabilised(rank: int, alpha: float, scale: float) -> None:
    training = Training.model_construct(tuner="lora", rank=rank, lora_alpha=alpha)
    assert training.adapter_scale == pytest.approx(scale)
    plain = Training.model_construct(tuner="lora", rank=rank, lora_alpha=alpha, lora_scale="plain")
    assert plain.adapter_scale == pytest.approx(scale / math.sqrt(rank) if rank else 0.0)


# errors


@pytest.mark.parametrize(
    ("kind", "code"), [(EdgeftError, 1), (BadInput, 1), (DoesNotFit, 3), (ParityFailed, 4), (MissingExtra, 5)]
)
def test_an_error_says_where_what_and_what_next(kind: type[EdgeftError], code: int) -> None:
    error = kind("file.json", "is empty", "write it")
    assert (str(error), error.exit_code) == ("file.json: is empty\n\nhint: write it", code)
    assert (error.where, error.problem, error.hint) == ("file.json", "is empty", "write it")
    assert str(kind("file.json", "is empty")) == "file.json: is empty"
    assert isinstance(error, EdgeftError)


@pytest.mark.parametrize(
    ("word", "expected"),
    [("rnk", "did you mean 'rank'?"), ("sede", "did you mean 'seed'?"), ("xyz", "one of epochs, rank, seed")],
)
def test_the_nearest_name(word: str, expected: str) -> None:
    assert did_you_mean(word, ["seed", "rank", "epochs"]) == expected


# units


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9GiB", 9 * GIB), ("9g", 9 * GIB), ("512 MiB", 512 * MIB), ("1.5 gib", 3 * GIB // 2),
        ("9.5GB", 9_500_000_000), ("100kb", 100_000), ("100K", 100 * KIB),
        (" 7 ", 7), ("12b", 12), ("2MB", 2_000_000), ("0", 0),
    ],
)  # fmt: skip
def test_a_memory_size_is_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "9 GiBs", "9,5GB", "1e9", "9G iB", "nan", "9 9", ".5g"])
def test_a_memory_size_that_cannot_be_read(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_bytes(text)
    hint = "write a number and a unit, as in 9GiB or 512MiB"
    assert str(caught.value) == f"memory size: cannot read {text!r}\n\nhint: {hint}"


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"), (310, "310 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (84.2 * MIB, "84.2 MiB"),
        (150 * MIB, "150 MiB"), (13.5 * GIB, "13.5 GiB"), (1.234 * GIB, "1.23 GiB"),
        (-2 * GIB, "-2.00 GiB"), (2000 * GIB, "2000 GiB"),
    ],
)  # fmt: skip
def test_bytes_are_shown(count: float, expected: str) -> None:
    assert show_bytes(count) == expected


@pytest.mark.parametrize("count", [1, 999, 1024, 5 * MIB, 12345678, 9 * GIB, 77.7 * GIB])
def test_shown_bytes_read_back_to_three_digits(count: float) -> None:
    assert parse_bytes(show_bytes(count)) == pytest.approx(count, rel=5e-3)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0"), (812, "812"), (999, "999"), (1000, "1k"), (5_770_000, "5.77M"), (134_515_008, "135M"),
        (8_030_261_248, "8.03B"), (999_400, "999k"), (999_999, "1M"), (999_999_999, "1B"),
    ],
)  # fmt: skip
def test_counts_are_shown(count: float, expected: str) -> None:
    assert show_count(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0.0 s"), (8.14, "8.1 s"), (60, "1 min 00 s"), (125.9, "2 min 05 s"), (3599.9, "59 min 59 s"),
        (3600, "1 h 00 min"), (3780, "1 h 03 min"), (100_000, "27 h 46 min"),
    ],
)  # fmt: skip
def test_seconds_are_shown(seconds: float, expected: str) -> None:
    assert show_seconds(seconds) == expected


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("rnak", "did you mean 'rank'?"), ("learning_rates", "did you mean 'learning_rate'?"),
        ("lora_alhpa", "did you mean 'lora_alpha'?"), ("warmup_fractoin", "did you mean 'warmup_fraction'?"),
        ("lora_rank", "it is rank= here"), ("max_seq_length", "it is max_length= here"),
        ("lora-target", "it is target_modules= here: all, attention, mlp, names"),
        ("num_train_epochs", "it is epochs= here"), ("use_dora", "it is tuner=dora here"),
        ("per_device_train_batch_size",
         "it is micro_batch_size= here: the plan chooses it; batch_size is what a step takes in all"),
        ("lora_dropout",
         "adapters train without dropout: what a step computes is planned and repeated bit for bit"),
        ("report_to", "it is an option of train and build: --track tensorboard, wandb, trackio ..."),
    ],
)  # fmt: skip
def test_a_setting_by_a_slip_or_by_another_trainers_name_leads_to_ours(asked: str, hint: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_settings([f"{asked}=1"])
    assert refused.value.hint == hint


def test_what_other_trainers_names_lead_to_is_there() -> None:
    """Every setting that a row names, with the value that it gives, is one that a plan takes; no name stands twice."""
    names = [name for row in ROWS for name in row.names]
    assert len(names) == len(set(names)) == len(BY_NAME)
    for row in ROWS:
        assert row.here or row.said, row.names
        setting, _, value = row.here.partition("=")
        if row.here:
            assert setting in Job.model_fields, row.names
        if value:
            assert getattr(make_job(model="m", **parse_settings([row.here])), setting) in (value, (value,)), row.names
        for word in re.findall(r"\b([a-z_]+)(?==)|--([a-z]+)", row.said):
            assert word[0] in Job.model_fields or word[1] in {"valid", "data", "out", "track"}, (row.names, word)
        assert not (row.here and set(row.names) & set(Job.model_fields) - {setting}), row.names


def test_the_page_for_who_comes_from_another_trainer_is_that_table() -> None:
    """`make first-page` writes it."""
    assert table() in (ROOT / "docs" / "other-trainers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("asked", "meant"), [("t4-24bg", "t4-24gb"), ("rtx4090", "rtx4090-24gb"), ("raspberrypi5", "raspberrypi5-8gb")]
)
def test_a_machine_by_a_slip_leads_to_the_nearest(asked: str, meant: str) -> None:
    from edgeft.machines.profile import load_profile

    with pytest.raises(BadInput) as refused:
        load_profile(asked)
    assert refused.value.hint == f"did you mean {meant!r}?"


@pytest.mark.parametrize(
    "name",
    ["do_train", "stage", "overwrite_output_dir", "bf16", "fp16", "plot_loss", "preprocessing_num_workers",
     "save_total_limit", "trust_remote_code", "overwrite-cache"],
)  # fmt: skip
def test_what_others_set_and_nobody_needs_here_says_so(name: str) -> None:
    with pytest.raises(BadInput, match="not needed here: ") as problem:
        parse_settings([f"{name}=true"])
    assert "one of" not in problem.value.hint and len(problem.value.hint) < 160


def test_no_hint_is_a_wall_of_names() -> None:
    with pytest.raises(BadInput) as problem:
        parse_settings(["xyzzy=1"])
    assert problem.value.hint == f"edgeft show settings lists all {len(Job.model_fields)}"
    assert did_you_mean("xyzzy", map(str, range(99))) == "99 are known: 0 to 98"
    assert did_you_mean("xyzzy", ["b", "a"]) == "one of a, b"
