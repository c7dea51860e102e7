"""`--on` is the machine that trains, `--for` the device that runs the result, MODEL an argument: in every verb."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny import CONFIGS, EXAMPLE
from typer.testing import CliRunner
from warm import edgeft

from edgeft.cli import ELSEWHERE, app
from edgeft.cli.options import OLD_OPTIONS
from edgeft.cli.screen import part_of_job
from edgeft.errors import BadInput, DoesNotFit
from edgeft.planning.plan import Plan

PI, MODEL = "raspberrypi5-8gb", str(CONFIGS / "gpt2")


def typed(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in arguments])


def options_of(verb: str) -> dict[str, bool]:
    """Every option of a verb, and whether --help shows it."""
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    return {name: not getattr(each, "hidden", False) for each in command.params for name in each.opts}


@pytest.mark.parametrize(
    ("verb", "words"),
    [("plan", {"--on", "--for"}), ("train", {"--on", "--for"}), ("export", {"--for"}), ("adapters", {"--for"}),
     ("verify", {"--for"}), ("report", {"--on", "--for"})],
)  # fmt: skip
def test_the_two_words_are_in_every_verb_that_knows_a_machine(verb: str, words: set[str]) -> None:
    shown = {name for name, visible in options_of(verb).items() if visible}
    assert words <= shown and not shown & {"--device", "--profile", "--profiles"}


def test_no_other_verb_names_a_machine_in_other_words() -> None:
    for verb in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert not options_of(verb).keys() & {"--device", "--profile", "--profiles", "--machine", "--host"}


@pytest.mark.parametrize("verb", OLD_OPTIONS)
def test_an_old_word_stands_for_one_that_is_there(verb: str) -> None:
    known = options_of(verb)
    assert all(f"--{new}" in known and f"--{old}" not in known for old, new in OLD_OPTIONS[verb].items())


@pytest.mark.parametrize(
    "words",
    [("plan", "--profile", "t5"), ("train", "PLAN", "--device", "cuda"), ("export", "FOLDER", "--device", PI),
     ("adapters", "a=b", "--device", PI), ("verify", "BUNDLE", "--on", "t4"), ("report", "PLAN", "--profiles", "t4")],
)  # fmt: skip
def test_every_old_word_is_understood(words: tuple[str, ...], tmp_path: Path) -> None:
    arguments = [str(tmp_path / word) if word.isupper() else word for word in words]
    extra = ["--model", MODEL, "--out", "-"] if words[0] == "plan" else []
    done = typed(*arguments, *extra)
    assert isinstance(done.exception, BadInput) and "No such option" not in done.output
    unknown = typed(*(f"{word}s" if word.startswith("--") else word for word in arguments), *extra)
    assert unknown.exit_code == 2


def test_a_plan_is_the_same_in_the_old_words() -> None:
    now = typed("plan", MODEL, "--on", "t4", "--for", PI, "--out", "-", "--json")
    then = typed("plan", "--model", MODEL, "--profile", "t4", "--set", f"device={PI}", "--out", "-", "--json")
    made = json.loads(now.stdout)
    assert made == json.loads(then.stdout)
    assert (made["job"]["model"], made["job"]["profile"], made["job"]["device"]) == (MODEL, "t4", PI)


def test_a_plan_needs_one_model() -> None:
    none, two = typed("plan"), typed("plan", MODEL, "--model", "another")
    assert none.exit_code == two.exit_code == 2
    assert "MODEL" in none.stderr and "name one" in two.stderr
    assert typed("plan", MODEL, "--model", MODEL, "--on", "t4", "--out", "-").exit_code == 0


def test_a_device_where_a_machine_is_asked_for_leads_to_for() -> None:
    problem = typed("plan", MODEL, "--on", PI, "--out", "-").exception
    assert isinstance(problem, BadInput) and problem.problem == f"{PI} is a target device, not a training host"
    command = re.search(r"edgeft (plan .*)$", problem.hint)
    assert command and typed(*command[1].split(), "--out", "-").exit_code == 0


def test_a_machine_where_a_device_is_asked_for_leads_to_on() -> None:
    problem = typed("plan", MODEL, "--on", "t4", "--for", "t4", "--out", "-").exception
    assert isinstance(problem, BadInput) and problem.where == "--for"
    assert problem.problem == "t4 is a training host, not a target device" and "--on t4" in problem.hint
    other = typed("report", "--models", MODEL, "--for", "t4", "--on", "t4").exception
    assert isinstance(other, BadInput) and str(other).startswith("--for: t4 is a training host")


@pytest.mark.parametrize("word", ["--on", "--device"])
@pytest.mark.parametrize(
    ("wanted", "problem"),
    [("cuda", "cuda is not available here|the plan is for cpu, not cuda"), ("t4", "the plan is for cpu-8gb, not t4"),
     ("t5", "unknown profile 't5'")],
)  # fmt: skip
def test_a_training_on_another_machine_is_refused(
    plan_file: Callable[..., Path], word: str, wanted: str, problem: str
) -> None:
    path = plan_file()
    before = sorted(path.parent.iterdir())
    refused = typed("train", path, word, wanted).exception
    assert isinstance(refused, BadInput) and re.fullmatch(problem, refused.problem)
    assert sorted(path.parent.iterdir()) == before


def test_a_training_for_a_device_that_is_too_small_is_refused(plan_file: Callable[..., Path], tmp_path: Path) -> None:
    small = tmp_path / "small.toml"
    small.write_text(
        'description = "too small"\nroles = ["deploy"]\ndevice = "cpu"\nmemory_gib = 0.02\nruntime_memory_gib = 0.01\n'
        "cores = 1\nbandwidth_gb_per_second = 1\n[matmul_tflops]\nfp32 = 0.01\n"
    )
    path = plan_file()
    refused = typed("train", path, "--for", small).exception
    assert isinstance(refused, DoesNotFit) and refused.where == "bundle"
    assert not (path.parent / "train").exists()


def test_a_matrix_is_of_the_machines_and_devices_that_are_named(tmp_path: Path) -> None:
    def made(*options: str) -> tuple[list[str], list[str]]:
        done = typed("report", "--models", MODEL, "--out", tmp_path / "matrix.html", "--json", *options)
        found = json.loads(done.stdout)
        return [each["name"] for each in found["training_machines"]], [each["name"] for each in found["devices"]]

    assert made("--on", "t4", "--for", PI) == (["t4"], [PI])
    assert made("--on", "t4,cpu-8gb") == made("--profiles", "t4,cpu-8gb") == (["cpu-8gb", "t4"], ["cpu-8gb"])
    assert made("--on", "cpu-8gb", "--for", PI) == (["cpu-8gb"], [PI])
    assert PI in made("--on", "t4", "--for", "all")[1]


def test_the_report_of_a_plan_names_the_devices_that_are_asked_for(
    plan_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = plan_file()
    refused = typed("report", path, "--on", "t4").exception
    assert isinstance(refused, BadInput) and refused.where == "--on"
    done = json.loads(typed("report", path, "--for", PI, "--json").stdout)
    assert [each["machine"] for each in done["devices"]] == [PI] and Plan.read(path).job.device is None


def test_help_has_the_main_line_first() -> None:
    shown = typed("--help").stdout
    panels = ["From a plan to a bundle", "Understand", "Ship"]
    assert [shown.index(name) for name in panels] == sorted(shown.index(name) for name in panels)


@pytest.mark.parametrize("verb", ["plan", "build"])
def test_the_many_options_of_a_verb_are_in_groups(verb: str) -> None:
    shown = typed(verb, "--help").stdout
    for group, words in (("Machine and device", ("--on", "--memory", "--for")), ("Data", ("--data", "--columns"))):
        box = shown[shown.index(f"╭─ {group} ") :].partition("╯")[0]
        assert all(f"│ {word} " in box for word in words), group


@pytest.mark.parametrize(
    ("line", "hint"),
    [(("plan", MODEL, "--lora_rank", "16"), "as a setting: it is rank= here (--set NAME=VALUE)"),
     (("build", MODEL, "--rank", "16"), "it is a setting: --set rank=VALUE"),
     (("plan", MODEL, "--learning-rate", "1e-4"), "it is a setting: --set learning_rate=VALUE"),
     (("export", "merged", "--rank", "16"), "it is a setting: --set rank=VALUE of plan and build"),
     (("train", MODEL, "--data", "rows.jsonl"), "train carries out a plan: edgeft plan MODEL --data FILE makes one, "
      "edgeft build does all of it")],
)  # fmt: skip
def test_a_setting_typed_as_an_option_leads_to_set(line: tuple[str, ...], hint: str) -> None:
    problem = typed(*line).exception
    assert isinstance(problem, BadInput) and problem.where == line[2] and problem.hint == hint


def test_an_option_that_nobody_knows_is_a_usage_error() -> None:
    made = typed("plan", MODEL, "--no-such-thing")
    assert made.exit_code == 2 and not isinstance(made.exception, BadInput)


@pytest.mark.parametrize("verb", ["plan", "build", "train"])
def test_a_yaml_of_another_trainer_leads_to_the_table(verb: str, tmp_path: Path) -> None:
    job = tmp_path / "shop.yaml"
    job.write_text("lora_rank: 16\n")
    problem = typed(verb, job).exception
    assert isinstance(problem, BadInput) and "is YAML" in problem.problem and "docs/other-trainers.md" in problem.hint


@pytest.mark.parametrize(
    ("files", "hint"),
    [(["merged.json"], "edgeft export {} makes its bundle"), (["train.json"], "edgeft merge {}, then edgeft export"),
     (["plan.json"], "edgeft train {}/plan.json")],
)  # fmt: skip
def test_a_folder_that_is_no_bundle_says_how_it_gets_one(files: list[str], hint: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    problem = typed("run", tmp_path, "hello").exception
    assert isinstance(problem, BadInput) and problem.hint.startswith(hint.format(tmp_path))


@pytest.mark.parametrize(("verb", "here"), ELSEWHERE.items())
def test_what_other_tools_call_a_verb_leads_to_ours(verb: str, here: str) -> None:
    """In a process of its own: the command line sets what becomes of signals."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert verb not in verbs and here.split()[1] in verbs
    done = edgeft(verb, "x")
    assert done.returncode == 1 and f"hint: {here}" in done.stderr


@pytest.mark.parametrize(
    ("line", "near"),
    [(("plan", "examples/configs/qwen2.5-1.5", "--on", "t4", "--out", "-"), "examples/configs/qwen2.5-1.5b"),
     (("plan", "examples/configs/llama3-8b", "--on", "t4", "--out", "-"), "examples/configs/llama-3.1-8b"),
     (("report", "--models", "qwen2.5-1.5b", "--on", "t4"), "examples/configs/qwen2.5-1.5b"),
     (("report", "--models", "examples/configs/gpt2,examples/configs/phi4", "--on", "t4"), "examples/configs/phi-4")],
)  # fmt: skip
def test_a_model_that_is_not_there_leads_to_the_nearest(
    line: tuple[str, ...], near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent.parent)
    problem = typed(*line).exception
    assert isinstance(problem, BadInput) and "no such folder" in problem.problem
    assert f"did you mean {near}?" in problem.hint


def test_a_hub_model_that_cannot_be_asked_for_leads_to_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeft.models.hub.reachable", lambda: False)
    problem = typed("plan", "Nobody/Qwen2.5-1.5B-Instruct", "--on", "t4", "--out", "-").exception
    assert isinstance(problem, BadInput) and "configs/qwen2.5-1.5b" in problem.hint and "to plan with" in problem.hint


def test_strict_refuses_what_fits_in_part_alone(tmp_path: Path) -> None:
    whole = ("plan", CONFIGS / "gpt2", "--on", "t4", "--target", "onnx-portable-int8", "--out", tmp_path / "a.json")
    assert typed(*whole, "--strict").exit_code == 0
    for options, said in (
        (("--on", "laptop-16gb"), "export: "),  # too little main memory
        (("--on", "rtx4090-24gb", "--for", PI), "the bundle may need 6.93 GiB"),
    ):
        line = ("plan", CONFIGS / "llama-3.1-8b", *options, "--out", tmp_path / "b.json")
        assert typed(*line).exit_code == 0
        refused = typed(*line, "--strict").exception
        assert isinstance(refused, DoesNotFit) and refused.exit_code == 3 and said in refused.problem
        assert Plan.read(tmp_path / "b.json").stages.notes()  # for the report


def test_a_config_option_leads_to_the_job_file() -> None:
    problem = typed("build", "--config", "shop.yaml").exception
    assert isinstance(problem, BadInput) and problem.hint.startswith("--job FILE")
    other = typed("plan", MODEL, "--do_train", "true").exception
    assert isinstance(other, BadInput) and other.hint.startswith("not needed here") and "--set" not in other.hint


def test_what_init_was_given_need_not_be_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "fill in data; then" in typed("init", MODEL).stderr
    assert "fill in model and data; then" in typed("init", "--file", "b.toml").stderr


def test_the_disk_here_is_no_matter_of_a_plan_for_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("edgeft.memory.disk.free_bytes", lambda _: 1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hi ->", "completion": " Hello."}\n' * 40)
    place = ("--on", "cpu-16gb", "--out", "-")
    assert "are free" not in typed("plan", MODEL, *place).stderr
    assert "are free" in typed("plan", EXAMPLE, *place, "--data", rows).stderr
    assert "are free" not in typed("plan", EXAMPLE, "--on", "t4", "--out", "-", "--data", rows).stderr


def test_nothing_had_to_be_made_fit_where_there_is_room(tmp_path: Path) -> None:
    shown = typed("plan", MODEL, "--on", "rtx4090-24gb", "--set", "micro_batch_size=1", "--out", "-").stdout
    assert "what makes it smaller, each by itself" in shown and "what makes it fit" not in shown
    assert "what makes it fit" in typed("plan", CONFIGS / "llama-3.1-8b", "--on", "t4", "--out", "-").stdout


def test_a_jobs_folder_stands_for_its_parts(tmp_path: Path, plan_file: Callable[..., Path]) -> None:
    for file in ("train/train.json", "merged/merged.json", "bundle/bundle.json"):
        assert part_of_job(tmp_path, file) == tmp_path
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("{}")
        assert part_of_job(tmp_path, file) == (tmp_path / file).parent == part_of_job((tmp_path / file).parent, file)
    for verb in ("run", "verify"):  # an empty manifest is what they find, not a missing one
        shown = typed(verb, tmp_path)
        assert shown.exit_code in (1, 4) and "no such file" not in f"{shown.stderr}{shown.exception}"
    assert "no such file" not in str(typed("merge", tmp_path).exception)
    assert "no such file" not in str(typed("export", tmp_path).exception)
    refused = typed("train", plan_file().parent, "--on", "t4").exception
    assert isinstance(refused, BadInput) and refused.problem == "the plan is for cpu-8gb, not t4"


def test_data_cannot_be_counted_by_a_shape(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    problem = typed("data", rows, "--model", CONFIGS / "qwen2.5-7b").exception
    assert isinstance(problem, BadInput) and "is the shape of a model" in problem.problem and "itself" in problem.hint


def test_what_is_no_bundle_at_all_says_how_one_is_made(tmp_path: Path) -> None:
    for folder, problem in ((tmp_path, "is no bundle"), (tmp_path / "none", "no such folder")):
        refused = typed("run", folder, "hello").exception
        assert isinstance(refused, BadInput) and refused.problem.startswith(problem) and "edgeft export" in refused.hint
