"""The command line: what was called otherwise before says its new name, and listings are lists."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from edgeft.cli import MOVED, app
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


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(["layers"], "needs a model"), (["schema"], "needs a document"), (["profiles", "t4"], "takes no name, got 't4'")],
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
