"""A number of bytes names a machine: which one, with how much of it to use, and that the rest is assumed is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIGS
from typer.testing import CliRunner

from edgeft.cli import app
from edgeft.errors import BadInput
from edgeft.machines.profile import Profile, list_profiles, load_profile, profile_path
from edgeft.machines.sized import CARD, Sized, machine_name, sized
from edgeft.planning.plan import make_plan, request_digest
from edgeft.settings.job import make_job
from edgeft.units import GIB

MODEL = str(CONFIGS / "gpt2")


@pytest.mark.parametrize(
    ("name", "found"),
    [("8GiB", ("", "8GiB")), ("8 GiB", ("", "8GiB")), ("8g", ("", "8g")), ("9.5GB", ("", "9.5GB")),
     ("512MiB", ("", "512MiB")), ("cpu-8gb:6GiB", ("cpu-8gb", "6GiB")), ("my card.toml:6GiB", ("my card.toml", "6GiB")),
     ("t4", None), ("cpu-8gb", None), ("t4-24gb", None), ("8", None), ("t4:16", None), ("8GiB.toml", None)],
)  # fmt: skip
def test_a_name_with_a_number_is_read(name: str, found: tuple[str, str] | None) -> None:
    assert sized(name) == (Sized(*found) if found else None)


def test_no_shipped_name_is_taken_for_a_number() -> None:
    assert not [profile.name for profile in list_profiles() if sized(profile.name)]


@pytest.mark.parametrize(
    ("size", "card"),
    [("4GiB", "rtx4060-8gb"), ("8GiB", "rtx4060-8gb"), ("11.9GiB", "rtx4060-8gb"), ("12GiB", "rtx3060-12gb"),
     ("16GiB", "rtx3060-12gb"), ("24GiB", "rtx4090-24gb"), ("80GiB", "rtx4090-24gb")],
)  # fmt: skip
def test_a_number_alone_is_a_card_no_faster_than_one_of_that_size(size: str, card: str) -> None:
    profile, base = load_profile(size), load_profile(card)
    assert base.description.startswith(CARD) and profile_path(size).stem == card
    assert profile.matmul_tflops == base.matmul_tflops and profile.compute_capability == base.compute_capability
    assert (profile.name, profile.device, profile.roles) == (size, "cuda", ("train",))


@pytest.mark.parametrize(
    ("name", "size"),
    [("rtx4060-8gb", 8), ("rtx3060-12gb", 12), ("rtx4090-24gb", 24), ("cpu-8gb", 8), ("laptop-16gb", 16),
     ("apple-16gb", 16), ("raspberrypi5-8gb", 8)],
)  # fmt: skip
def test_a_machine_with_the_memory_that_it_is_sold_with_is_itself(name: str, size: int) -> None:
    own = load_profile(name)
    for asked in (f"{name}:{size}GiB", *([f"{size}GiB"] if own.description.startswith(CARD) else [])):
        assert load_profile(asked).budget_bytes == pytest.approx(own.budget_bytes, abs=0.006 * GIB)


@pytest.mark.parametrize("base", ["", "cpu:", "cpu-8gb:", "apple-16gb:", "raspberrypi5-8gb:"])
def test_more_memory_is_a_larger_budget_and_never_all_of_it(base: str) -> None:
    budgets = [load_profile(f"{base}{size}GiB").budget_bytes / GIB for size in (2, 4, 8, 16, 48)]
    assert budgets == sorted(budgets) and len(set(budgets)) == len(budgets)
    assert all(0 < budget < size for budget, size in zip(budgets, (2, 4, 8, 16, 48), strict=True))


def test_the_cpu_that_is_here_can_be_taken_with_another_memory() -> None:
    profile = load_profile("cpu:8GiB")
    assert profile.budget_bytes == load_profile("cpu-8gb").budget_bytes
    assert not profile.detected and profile.description == "this machine's CPU with 8GiB"  # its rates are its own
    assert "this machine's" not in load_profile("cpu-8gb:4GiB").description


@pytest.mark.parametrize("name", ["0.5GiB", "100MiB", "cpu-8gb:0.5GiB", "raspberrypi5-8gb:1GiB", "0GiB"])
def test_a_number_that_leaves_nothing_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="alone keeps") as caught:
        load_profile(name)
    assert caught.value.where == name


def test_a_number_of_a_file_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "my card.toml"
    own.write_text(profile_path("t4").read_text())
    profile = load_profile(f"{own}:32GiB")
    assert (profile.name, profile.matmul_tflops) == ("my card:32GiB", load_profile("t4").matmul_tflops)
    job = make_job(model=MODEL, profile=f"{own}:32GiB")
    before = request_digest(job, Path(MODEL))
    own.write_text(own.read_text().replace("cores = 4", "cores = 2"))
    assert request_digest(job, Path(MODEL)) != before
    with pytest.raises(BadInput, match="no such file"):
        load_profile(f"{tmp_path / 'none.toml'}:32GiB")


def test_what_is_assumed_can_be_set_by_no_file(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('assumed = "much"\n' + profile_path("t4").read_text())
    with pytest.raises(BadInput, match="'assumed' cannot be set"):
        load_profile(str(own))


@pytest.mark.parametrize(
    ("on", "memory", "name"),
    [(None, None, "cpu"), ("t4", None, "t4"), (None, "8GiB", "8GiB"), ("cpu", "8GiB", "cpu:8GiB")],
)
def test_on_and_memory_name_one_machine(on: str | None, memory: str | None, name: str) -> None:
    assert machine_name(on, memory, "cpu") == name


@pytest.mark.parametrize(
    ("on", "memory", "problem"),
    [(None, "many", "cannot read 'many'"), (None, "8", "cannot read '8'"), (None, "cpu:8GiB", "cannot read 'cpu:8GiB'"),
     (None, "-8GiB", "cannot read '-8GiB'"), ("8GiB", "8GiB", "--on 8GiB has a number already")],
)  # fmt: skip
def test_what_names_none_is_refused(on: str | None, memory: str, problem: str) -> None:
    with pytest.raises(BadInput) as caught:
        machine_name(on, memory, "cpu")
    assert (caught.value.where, caught.value.problem) == ("--memory", problem)


def test_a_plan_for_a_number_says_what_it_assumes() -> None:
    plan = make_plan(make_job(model=MODEL, profile="8GiB"))
    [note] = [note for note in plan.notes if note.startswith("assumed")]
    assert "16 GiB of main memory" in note and "6 cores" in note and "rtx4060-8gb" in note and "--on cpu" in note
    assert plan.budget_bytes == load_profile("rtx4060-8gb").budget_bytes
    assert Profile.model_validate_json(plan.profile.model_dump_json()) == plan.profile
    assert not [note for note in make_plan(make_job(model=MODEL, profile="t4")).notes if note.startswith("assumed")]


def test_plans_for_other_numbers_are_other_plans() -> None:
    digests = {
        request_digest(make_job(model=MODEL, profile=name), Path(MODEL)) for name in ("8GiB", "9GiB", "cpu:8GiB")
    }
    assert len(digests) == 3


def planned(*options: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["plan", MODEL, *options, "--out", "-", "--json"])
    assert done.exit_code == 0, done.exception
    return dict(json.loads(done.stdout))


def test_memory_is_an_option_of_plan() -> None:
    assert planned("--memory", "8GiB") == planned("--on", "8GiB")
    assert planned("--memory", "6GiB", "--on", "cpu-8gb")["profile"]["name"] == "cpu-8gb:6GiB"
    device = planned("--memory", "8GiB", "--for", "raspberrypi5-8gb:4GiB")["stages"]
    assert device["target_name"] == "raspberrypi5-8gb:4GiB" and device["target_bytes"] == round((0.975 * 4 - 1) * GIB)


def test_a_matrix_of_numbers(tmp_path: Path) -> None:
    options = ("--on", "4GiB,8GiB", "--for", "raspberrypi5-8gb", "--out", str(tmp_path / "matrix.html"), "--json")
    made = json.loads(CliRunner().invoke(app, ["report", "--models", MODEL, *options]).stdout)
    [row] = made["models"]
    assert [cell["machine"] for cell in row["training"]] == ["4GiB", "8GiB"]
    assert all(cell["grade"] == "full" for cell in row["training"])


def test_a_disk_that_is_too_small_is_noted(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    for gib, noted in (("0.5", True), ("500", False)):
        own.write_text(f"disk_gib = {gib}\n" + profile_path("t4").read_text())
        notes = make_plan(make_job(model=MODEL, profile=str(own))).notes
        assert any(note.endswith("own has 512 MiB of disk") for note in notes) is noted


@pytest.mark.parametrize(("name", "share"), [("android-8gb", 0.5), ("apple-16gb", 5.34 / 16)])
def test_what_is_kept_as_a_share_is_that_share_of_another_memory(name: str, share: float) -> None:
    for size in ("6GiB", "12GiB"):
        other = load_profile(f"{name}:{size}")
        assert other.runtime_memory_gib / other.memory_gib == pytest.approx(share, rel=0.01)
    smaller = load_profile("raspberrypi5-8gb:4GiB")  # a system keeps what it needs
    assert smaller.runtime_memory_gib == load_profile("raspberrypi5-8gb").runtime_memory_gib
