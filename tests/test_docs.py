"""README's commands exist and run; verbs, targets and files it names are there; numbers it shows are recorded ones."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
from tiny import BENCH, ROOT

from edgeft.machines.profile import list_profiles
from edgeft.settings.job import Job
from edgeft.targets.target import list_targets

FIRST = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("*.md"))
README = "\n".join([FIRST, *(page.read_text(encoding="utf-8") for page in PAGES)])
MAKEFILE = (ROOT / "Makefile").read_text()
COMMANDS = [line.strip().split("  #")[0] for line in README.splitlines() if line.startswith("    ")]
MAKE = [c for c in (part.strip() for line in COMMANDS for part in line.split("&&")) if c.startswith("make ")]


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_of_the_readme_are_known_to_make(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in shlex.split(command)[1:]:
        name, equals, _ = word.partition("=")
        assert re.search(rf"^{name} [?:]?=|^{name}:|\b{name}=", MAKEFILE, re.M) if not equals else name in MAKEFILE


def test_the_plan_of_the_readme_runs() -> None:
    command = next(c for c in COMMANDS if c.startswith("edgeft plan"))
    arguments = [*shlex.split(command)[1:], "--out", "-"]
    done = subprocess.run([sys.executable, "-m", "edgeft", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "given up to fit the budget:" in done.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("edgeft plan") and "..." not in c])
def test_what_a_page_plans_fits(command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "edgeft", *shlex.split(command)[1:], "--out", "-"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_verbs_of_the_readme_are_the_verbs_there_are() -> None:
    from edgeft.cli import app

    verbs = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert set(re.findall(r"`edgeft (\w+)", README)) == verbs


def test_the_first_page_shows_what_the_command_prints() -> None:
    """After a change to a plan or its words: make first-page, and look at it."""
    page = subprocess.run(
        [sys.executable, "-c", "import first_page; print(first_page.output())"], cwd=BENCH,
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert page.stdout.strip() in FIRST and len(FIRST.splitlines()) < 160


@pytest.mark.slow  # 32 plans
def test_the_table_of_machines_is_what_is_planned() -> None:
    table = subprocess.run(
        [sys.executable, "-c", "import first_page\nif __name__ == '__main__': print(first_page.machines())"], cwd=BENCH,
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert table.stdout.strip() in FIRST


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_every_page_begins_with_an_example_and_the_first_page_leads_to_it(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    first = text.split("\n\n")[1]
    assert first.startswith(("    ", "```python")) and f"(docs/{page})" in FIRST


def test_commands_of_the_pages_are_understood() -> None:
    for command in COMMANDS:
        words = shlex.split(command) if command.startswith("edgeft ") else []
        flags = {word for word in words if word.startswith("--")}
        if words and flags:
            shown = subprocess.run([sys.executable, "-m", "edgeft", words[1], "--help"], capture_output=True, text=True,
                                   env=os.environ | {"COLUMNS": "200"})  # fmt: skip
            assert all(flag in shown.stdout for flag in flags), command


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"`((?:bench|edgeft|examples|tests|export|profiles)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_every_setting_profile_and_target_is_described() -> None:
    assert all(field.description for field in Job.model_fields.values())
    assert all(profile.description for profile in list_profiles())
    assert all(target.description for target in list_targets())


def test_no_path_of_a_machine_in_any_tracked_file() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(^|[\s\"'(=])/(home|root|Users|work|tmp)/\w")
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if (
            path.suffix in (".py", ".toml", ".md", ".json", ".txt", "")
            and path.is_file()
            and "examples" not in path.parts
        ):
            assert not pattern.search(path.read_text(errors="ignore")), f"{name} holds a path of some machine"
