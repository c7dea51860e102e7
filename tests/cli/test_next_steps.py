"""What a verb says can be typed next can be typed, from a plan to an answer, and nothing of it is on stdout."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm
from tiny import CONFIGS, ROWS

from edgeft.cli import next_steps
from edgeft.cli.next_steps import example
from edgeft.exporting.bundle import Golden
from edgeft.machines.limits import Gpu
from edgeft.planning.plan import make_plan
from edgeft.settings.job import make_job

SHORT = (
    "--set",
    "epochs=1",
    "--set",
    "batch_size=8",
    "--set",
    "rank=4",
    "--set",
    "eval_rows=4",
    "--set",
    "target=ort-fp32",
)


def said(text: str, what: str) -> str:
    """What follows `what: ` on stderr, up to the end: a prompt may have several lines."""
    [found] = re.findall(rf"^{what}: (.*)", text, re.MULTILINE | re.DOTALL)
    return str(found).rstrip("\n")


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """As a user's shell runs it."""
    done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def quick(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The same without the imports: the words behind those that start this edgeft."""
    words, start = shlex.split(command), shlex.split(next_steps.edgeft())
    assert words[: len(start)] == start
    return warm.edgeft(*words[len(start) :], code=0, cwd=folder)


@pytest.mark.parametrize("typed", [quick, pytest.param(shell, marks=pytest.mark.slow)])
def test_every_command_that_is_said_runs_up_to_an_answer(
    typed: Callable[[str, Path], Any], checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a job"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    where = ("--on", "cpu-8gb", "--data", "my rows.jsonl", "--out", "my plan/plan.json")
    done = warm.edgeft("plan", checkpoint_folder, *where, *SHORT, "--json", code=0, cwd=folder)
    json.loads(done.stdout)
    assert "plan: my plan/plan.json\n" in done.stderr
    for place in ("training: my plan/train", "merged: my plan/merged", "bundle: my plan/bundle ("):
        done = typed(said(done.stderr, "next"), folder)
        assert place in done.stderr
        assert not re.search("^(next|run it|bundle|training|merged): ", done.stdout, re.MULTILINE)
    # three steps of random weights bring nothing, and that is said last
    assert "which learnt nothing: above" in done.stderr and "copy this folder" not in done.stderr
    last = " ".join(done.stdout.split()).partition("WARNING: nothing was learnt")[2]
    assert (
        "--valid FILE" in last
        and "tuner lora (edgeft's own choice: full)" in last
        and last.endswith("(edgeft data shows them)")
    )
    command = said(done.stderr, "run it")
    assert "Package: lib" in command and shell(command, folder).stdout
    bundle = json.loads((folder / "my plan" / "bundle" / "bundle.json").read_text())
    asked = json.loads(shell(f"{command} --json", folder).stdout)["prompt_ids"]
    assert asked in [each["ids"] for each in bundle["golden"]]


def golden(text: str, *, messages: list[dict[str, str]] | None = None, plain: bool = True) -> Golden:
    return Golden(
        messages=messages, text=text, plain=plain, ids=[], greedy_ids=[], top_ids=[], top_logits=[]
    )  # fmt: skip


def test_the_example_is_what_a_user_says() -> None:
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "How are you?"}]
    assert example([golden("a longer text"), golden("a text")]) == "a text"
    assert example([golden("<|im_start|>user", messages=chat, plain=False)]) == "How are you?"
    assert example([golden("<|im_start|>user, 28 November", plain=False)]) == "a prompt"  # a template that dates it
    assert example([golden("--all of it"), golden(" \n"), golden("x" * 301), golden("Hello")]) == "Hello"
    assert example([]) == "a prompt"
    later = [*chat, {"role": "assistant", "content": "Well."}, {"role": "user", "content": "And?"}]
    assert example([golden("", messages=later, plain=False)]) == "How are you?"  # not what follows an answer


def after(plan: object, path: str, capsys: pytest.CaptureFixture[str]) -> str:
    next_steps.after_plan(plan, Path(path))  # type: ignore[arg-type]
    caught = capsys.readouterr()
    assert not caught.out
    return caught.err


def test_a_plan_without_data_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(make_job(model=str(CONFIGS / "gpt2"), profile="cpu-8gb"))
    told = after(plan, "a/plan.json", capsys)
    assert "plan: a/plan.json\n" in told and "plan with --data FILE" in told and "next" not in told


def test_a_plan_for_another_machine_says_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan = make_plan(make_job(model=str(CONFIGS / "gpt2"), profile="t4"))
    plan = plan.model_copy(update={"job": plan.job.model_copy(update={"data": "rows.jsonl"})})
    for gpu, words in ((None, "next, on t4: "), (Gpu("Tesla T4", 1, 1), "next: ")):
        monkeypatch.setattr("edgeft.machines.limits.visible_gpu", lambda gpu=gpu: gpu)
        assert f"{words}{next_steps.edgeft()} train 'a b/plan.json'\n" in after(plan, "a b/plan.json", capsys)
    several = plan.model_copy(update={"training": plan.training.model_copy(update={"processes": 4})})
    assert "next: torchrun --nproc-per-node 4 -m edgeft train 'a b/plan.json'" in after(
        several, "a b/plan.json", capsys
    )


def test_make_and_build_go_on_by_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEFT_NEXT", "0")
    assert after(make_plan(make_job(model=str(CONFIGS / "gpt2"), profile="t4")), "plan.json", capsys) == ""


def test_the_words_that_start_edgeft_are_those_of_this_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own, other = tmp_path / "my env" / "bin", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir(parents=True)
        for name in ("python", "edgeft"):
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(own / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(own))
    assert (next_steps.edgeft(), next_steps.python()) == ("edgeft", "python")
    monkeypatch.setenv("PATH", f"{other}:{own}")  # another environment's come first
    assert [shlex.split(words) for words in (next_steps.edgeft(), next_steps.python())] == [
        ["my env/bin/edgeft"], ["my env/bin/python"],
    ]  # fmt: skip
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "edgeft").symlink_to(own / "edgeft")
    monkeypatch.setenv("PATH", f"{tmp_path / 'links'}:{other}")  # as pipx and a system's package put it
    assert next_steps.edgeft() == "edgeft"
    monkeypatch.setenv("PATH", f"{other}:{own}")
    (own / "edgeft").unlink()
    assert shlex.split(next_steps.edgeft()) == ["my env/bin/python", "-m", "edgeft"]
    monkeypatch.chdir(other)
    assert shlex.split(next_steps.python()) == [str(own / "python")]


def test_a_bundle_of_adapters_is_run_with_one_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    from edgeft.exporting.bundle import Bundle, BundledAdapter

    adapter = BundledAdapter.model_construct(golden=[golden("Hello there")])
    bundle = Bundle.model_construct(
        adapters={"my own": adapter}, golden=[], size_bytes=2**20, provenance={"device": "raspberrypi5-8gb"}
    )
    next_steps.after_export(bundle, Path("b"))
    told = capsys.readouterr().err
    assert "bundle: b (1.00 MiB): copy this folder to raspberrypi5-8gb\n" in told
    assert "b/run.py 'Hello there' --adapter 'my own'" in told
