"""A job file says what a command line says, explains itself, and nothing in it is passed over in silence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIGS, ROWS
from typer.testing import CliRunner

from edgeft.api.job_file import KEYS, PINNED, JobFile, job_values, key_of, over, read_job_file, write_job_file
from edgeft.cli import app
from edgeft.documents import sha256_file
from edgeft.errors import BadInput
from edgeft.settings.job import Job, make_job

MODEL = str(CONFIGS / "gpt2")
WHOLE = """
model = "a model"
data = ["a.jsonl", "b c.jsonl#500"]
valid = "valid.jsonl"
test = ["test.jsonl"]
columns = { prompt = "question", completion = "answer" }
on = "cpu-8gb"
memory = "6GiB"
for = "raspberrypi5-8gb"
target = "ort-int4"
max_memory = "5GiB"
max_seconds = 3600
wise_alpha = 0.5
track = ["trackio", "tensorboard"]
out = "build/own"

[settings]
rank = 8
checkpointing = true
learning_rate = 2e-4
trained_layers = [0, 2]
answers = "labels"
"""


def typed(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in arguments])


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_says_what_a_command_line_says(tmp_path: Path) -> None:
    file = read_job_file(written(tmp_path / "job.toml", WHOLE))
    job = make_job(**job_values(file))
    columns = "[prompt=question,completion=answer]"
    assert (job.model, job.profile, job.device, job.target) == (
        "a model",
        "cpu-8gb:6GiB",
        "raspberrypi5-8gb",
        "ort-int4",
    )
    assert (job.data, job.valid) == (f"a.jsonl{columns} + b c.jsonl{columns}#500", f"valid.jsonl{columns}")
    assert (job.max_memory_bytes, job.max_seconds, job.rank, job.checkpointing) == (5 * 2**30, 3600, 8, True)
    assert (job.learning_rate, job.trained_layers, job.answers) == (2e-4, (0, 2), "labels")
    assert (file.wise_alpha, file.track, file.out) == ("0.5", ("trackio", "tensorboard"), "build/own")


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert read_job_file(written(tmp_path / "job.toml", "")) == JobFile()


# What init writes


def uncommented(text: str) -> str:
    """Every key of a new file in force."""
    return re.sub(r"^# (\w+ = .*)$", r"\1", text, flags=re.MULTILINE)


def test_a_new_file_explains_every_key(tmp_path: Path) -> None:
    path = tmp_path / "a folder" / "edgeft.toml"
    write_job_file(path, JobFile())
    text = path.read_text(encoding="utf-8")
    assert read_job_file(path) == JobFile()
    keys = {key_of(name) for name in JobFile.model_fields} - {"settings"}
    lines = text.splitlines()
    for key in keys:
        [place] = [number for number, line in enumerate(lines) if line.startswith(f"# {key} = ")]
        assert lines[place - 1].startswith("# ") and len(lines[place - 1]) > 20, key
    every = read_job_file(written(tmp_path / "every.toml", uncommented(text)))
    assert {key_of(name) for name in JobFile.model_fields if getattr(every, name)} == keys | {"settings"}
    make_job(**job_values(every))
    assert all(len(line) <= 160 for line in lines)


HOSTILE = 'a "quoted" \\ back\tµ\U0001f600 # no comment ]'


def test_what_is_given_is_filled_in(tmp_path: Path) -> None:
    pins = {"rank": "8", "learning_rate": "2e-4", "checkpointing": "true", "answers": "regex:0[0-9]", "seed": "007"}
    asked = JobFile(model=HOSTILE, data=("a.jsonl", HOSTILE), on="t4", device="raspberrypi5-8gb", settings=pins)
    write_job_file(tmp_path / "edgeft.toml", asked)
    values = pins | {"rank": 8, "learning_rate": 2e-4, "checkpointing": True}
    assert read_job_file(tmp_path / "edgeft.toml") == asked.model_copy(update={"settings": values})


def test_a_file_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    path = written(tmp_path / "edgeft.toml", "mine")
    with pytest.raises(BadInput, match="exists: it will not be replaced"):
        write_job_file(path, JobFile())
    assert path.read_text() == "mine"
    with pytest.raises(BadInput, match="cannot write"):
        write_job_file(path / "edgeft.toml", JobFile())


def test_the_command_writes_one_that_build_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = typed("init", MODEL, "--data", "my rows.jsonl", "--on", "cpu-8gb", "--set", "epochs=1")
    assert done.exit_code == 0 and done.stdout == "edgeft.toml\n" and re.search(r"^next: .* build$", done.stderr, re.M)
    file = read_job_file(Path("edgeft.toml"))
    assert (file.model, file.data, file.on, file.settings) == (MODEL, ("my rows.jsonl",), "cpu-8gb", {"epochs": 1})
    assert isinstance(typed("init").exception, BadInput)
    other = typed("init", "--file", "other job.toml")
    assert "fill in model and data" in other.stderr and "build --job 'other job.toml'" in other.stderr


# What a user can get wrong


@pytest.mark.parametrize(
    ("text", "problem", "hint"),
    [
        ('modle = "x"', "unknown key 'modle'", "did you mean 'model'?"),
        ('form = "x"', "unknown key 'form'", "did you mean 'for'?"),
        ("rank = 8", "unknown key 'rank'", "it is a setting: rank = ... below [settings]"),
        ('profile = "t4"', "unknown key 'profile'", "it is called on here"),
        ('device = "t4"', "unknown key 'device'", "it is called for here"),
        ("max_memory_bytes = 8", "unknown key 'max_memory_bytes'", "it is called max_memory here"),
        ("[setings]\nrank = 8", "unknown key 'setings'", "did you mean 'settings'?"),
        ("lora_rank = 8", "unknown key 'lora_rank'", "it is rank= here"),
        ("[settings]\nrnak = 8", "settings: unknown setting 'rnak'", "did you mean 'rank'?"),
        ('[settings]\nprofile = "t4"', "settings: 'profile' is a key of its own", "on = ... above [settings]"),
        ('report_to = "wandb"', "unknown key 'report_to'", "it is an option of train and build: --track tensorboard, "
         "wandb, trackio ..."),
        ('[settings]\ntrack = "wandb"', "settings: unknown setting 'track'", "it is an option of train and build: "
         "--track tensorboard, wandb, trackio ..."),
        ("[settings]\nrnak = 8\nsede = 1", "settings: unknown settings 'rnak', 'sede'",
         "one by one\n  rnak: did you mean 'rank'?\n  sede: did you mean 'seed'?"),
        ('model = "x', "not valid TOML: ", "text needs quotes, tables come last"),
        ("model = x", "not valid TOML: ", "text needs quotes, tables come last"),
        ("on = 3", "on: input should be a valid string, got 3", ""),
        ("for = 3", "for: input should be a valid string, got 3", ""),
        ('model = ""', "model: string should have at least 1 character, got ''", ""),
        ("data = [1]", "data.0: input should be a valid string, got 1", ""),
        ("max_seconds = -1", "max_seconds: input should be greater than 0, got -1", ""),
        ("settings = 8", "settings: input should be a valid dictionary, got 8", ""),
        ("wise_alpha = true", "wise_alpha: input should be a valid string, got True", ""),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, problem: str, hint: str) -> None:
    path = written(tmp_path / "my job.toml", text)
    with pytest.raises(BadInput) as refused:
        read_job_file(path)
    assert refused.value.where == str(path) and refused.value.hint == hint
    assert refused.value.problem.startswith(problem)


def test_another_trainers_file_is_told_from_a_slip(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not valid TOML") as refused:
        read_job_file(written(tmp_path / "lora_sft.yaml", "lora_rank: 16"))
    assert refused.value.hint.startswith("write TOML (edgeft init begins it); docs/other-trainers.md has")


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "none.toml", "no such file"), (tmp_path, "cannot be read")):
        with pytest.raises(BadInput, match=problem):
            read_job_file(path)
    (tmp_path / "bytes.toml").write_bytes(b'model = "\xff"')
    with pytest.raises(BadInput, match="not valid TOML"):
        read_job_file(tmp_path / "bytes.toml")


def test_a_value_that_no_job_takes_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "job.toml", f'model = "{MODEL}"\non = "t4"\n[settings]\nrank = "many"')
    refused = typed("plan", "--job", path, "--out", "-").exception
    assert isinstance(refused, BadInput) and refused.problem.startswith("rank: ")


def test_keys_are_settings_or_stand_for_one() -> None:
    assert KEYS.keys() | {"settings"} <= Job.model_fields.keys() | {"settings"}
    keys = {key_of(name) for name in JobFile.model_fields}
    assert (
        set(KEYS.values()) <= keys
        and PINNED.keys() <= KEYS.keys()
        and set(PINNED.values()) <= JobFile.model_fields.keys()
    )


# What the command line says goes first, and that is said


@pytest.mark.parametrize(
    ("file", "line", "left", "lines"),
    [
        ({"on": "t4"}, {}, {"on": "t4"}, []),
        ({"on": "t4"}, {"on": "t4"}, {"on": "t4"}, []),
        ({"on": "t4"}, {"on": "cpu"}, {"on": "cpu"}, ['on = "t4" is not read: the command line says "cpu"']),
        ({"on": "t4"}, {"memory": "8GiB"}, {"memory": "8GiB"}, ['on = "t4" is not read: the command line says memory']),
        ({"memory": "8GiB"}, {"on": "t4"}, {"on": "t4"}, ['memory = "8GiB" is not read: the command line says on']),
        ({"on": "t4", "memory": "8GiB"}, {"device": "pi"}, {"on": "t4", "memory": "8GiB", "device": "pi"}, []),
        (
            {"data": "a", "valid": "b", "test": "c", "columns": "prompt=q"}, {"data": "d", "test": "e"},
            {"data": ("d",), "test": ("e",)},
            ['valid = "b" is not read: the command line says data',
             'columns = "prompt=q" is not read: the command line says data',
             'data = "a" is not read: the command line says "d"', 'test = "c" is not read: the command line says "e"'],
        ),
        (
            {"settings": {"rank": 8, "seed": 1}}, {"settings": {"rank": "16"}}, {"settings": {"rank": "16", "seed": 1}},
            ['rank = 8 is not read: the command line says "16"'],
        ),
        ({"settings": {"rank": 8}}, {"settings": {"rank": "8"}}, {"settings": {"rank": "8"}}, []),
        (
            {"target": "auto", "for": "pi"}, {"settings": {"target": "ort-int4", "device": "phone"}},
            {"settings": {"target": "ort-int4", "device": "phone"}},
            ['target = "auto" is not read: the command line says "ort-int4"',
             'for = "pi" is not read: the command line says "phone"'],
        ),
    ],
)  # fmt: skip
def test_the_command_line_goes_first(
    file: dict[str, Any], line: dict[str, Any], left: dict[str, Any], lines: list[str]
) -> None:
    asked, said = over(JobFile.model_validate(file), JobFile.model_validate(line))
    assert asked == JobFile.model_validate(left) and said == lines


def test_the_file_of_the_current_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "edgeft.toml", f'model = "{MODEL}"\non = "t4"\nout = "a b"\n[settings]\nrank = 8\n')
    done = typed("plan", "--json")
    made = json.loads(done.stdout)
    assert (made["job"]["model"], made["job"]["profile"], made["training"]["rank"]) == (MODEL, "t4", 8)
    assert "job: edgeft.toml\n" in done.stderr and "plan: a b/plan.json\n" in done.stderr
    done = typed("plan", "--on", "rtx4060-8gb", "--json", "--out", "-")
    assert json.loads(done.stdout)["profile"]["name"] == "rtx4060-8gb"
    assert 'edgeft.toml: on = "t4" is not read: the command line says "rtx4060-8gb"\n' in done.stderr
    alone = typed("plan", MODEL, "--on", "t4", "--job", "-", "--json", "--out", "-")
    assert json.loads(alone.stdout)["job"]["rank"] is None and "job:" not in alone.stderr
    assert typed("plan", "--job", "-").exit_code == 2


def test_a_plan_names_the_file_that_it_was_made_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = written(tmp_path / "my job.toml", f'model = "{MODEL}"\non = "t4"\n')
    plan = tmp_path / "plan.json"

    def hash_of(*options: object) -> str:
        typed("plan", *options, "--out", plan)
        return str(json.loads(plan.read_text())["job_file_sha256"])

    first = sha256_file(path)
    assert hash_of("--job", path) == first
    before = plan.read_bytes()
    written(path, path.read_text() + "# a remark\n")  # what was trained by this plan stays current
    assert hash_of("--job", path) == first and plan.read_bytes() == before
    written(path, path.read_text() + "[settings]\nrank = 4\n")
    assert hash_of("--job", path) == sha256_file(path) != first
    assert hash_of(MODEL, "--on", "rtx4060-8gb") == ""
