"""The command line: what was called otherwise before says its new name, and listings are lists."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT
from typer.testing import CliRunner

from edgeft.cli import MOVED, app
from edgeft.machines.profile import load_profile
from edgeft.reporting.listings import GROUPS, values_of
from edgeft.settings.job import Job


def edgeft(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgeft", *arguments], capture_output=True, text=True)


def test_a_command_of_before_names_the_one_of_now() -> None:
    done = edgeft("keygen", "--out", "k")
    assert done.returncode == 1 and "hint: edgeft sign --new-key FILE" in done.stderr and not done.stdout


@pytest.mark.parametrize("old", MOVED)
def test_the_command_of_now_is_there(old: str) -> None:
    words = [word for word in MOVED[old].split() if word.islower() and not word.startswith("-")]
    shown = CliRunner().invoke(app, [words[0], "--help"])
    assert shown.exit_code == 0 and all(word in shown.output for word in words[1:])


def test_settings_are_those_of_a_job() -> None:
    shown = CliRunner().invoke(app, ["show", "settings", "--json"])
    assert set(json.loads(shown.output)) == set(Job.model_fields)


def test_a_profile_is_shown_as_the_file_to_copy(tmp_path: Path) -> None:
    shown = edgeft("show", "profiles", "rtx4060-8gb")
    assert shown.stdout == (ROOT / "profiles" / "rtx4060-8gb.toml").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(shown.stdout.replace("memory_gib = 7.6", "memory_gib = 11.6"))
    assert load_profile(str(tmp_path / "mine.toml")).memory_gib == 11.6
    unknown = edgeft("show", "profiles", "rtx4600")
    assert unknown.returncode == 1 and "rtx4060-8gb" in unknown.stderr


def test_settings_are_listed_by_what_they_are_about_with_what_they_may_be() -> None:
    shown = edgeft("show", "settings").stdout
    assert [name for name in Job.model_fields if name in GROUPS] == list(GROUPS)
    places = [shown.index(f"\n {name} ") for name in Job.model_fields]  # each once, in the model's order
    assert places == sorted(places) and all(title in shown for title in GROUPS.values())
    words = " ".join(shown.split())
    assert "[fp32 | bf16 | fp16 | nf4]" in words and "[true | false]" in words and "[auto | 8 | 16 | 32]" in words
    assert values_of({"type": "integer"}) == []


def test_help_behind_a_bundle_is_that_of_its_runner(tmp_path: Path) -> None:
    for words in (["--help"], ["-h"]):
        assert "Run a bundle here" in CliRunner().invoke(app, ["run", *words]).output
    shown = edgeft("run", str(tmp_path), "--help")
    assert shown.returncode == 0 and "--min-probability" in shown.stdout and "This bundle" not in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["layers"], "needs a model"),
        (["schema"], "needs a document"),
        (["targets", "ort-int4"], "takes no name, got 'ort-int4'"),
    ],
)
def test_show_says_what_it_needs(arguments: list[str], problem: str) -> None:
    done = edgeft("show", *arguments)
    assert done.returncode == 1 and problem in done.stderr


def test_signing_needs_a_bundle_or_makes_a_key() -> None:
    assert "no bundle was given" in edgeft("sign").stderr
    assert "--key: is missing" in edgeft("sign", "somewhere").stderr


def test_the_version_is_the_packages() -> None:
    import edgeft

    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"{edgeft.__version__}\n")
    assert CliRunner().invoke(app, ["--help"]).output.count("proven equal") == 1
