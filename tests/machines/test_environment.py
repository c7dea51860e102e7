"""What is recorded beside a number: the machine, its packages, the commit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from tiny import ROOT

from edgeft.machines import environment as own


def test_what_a_result_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = json.loads(json.dumps(own.environment(ROOT)))
    assert {"cpu", "features", "cores", "threads", "system", "versions", "load_average"} <= set(found)
    assert found["threads"] == 3 and found["cpu"]
    assert {"python", "torch", "transformers", "peft", "bitsandbytes"} <= set(found["versions"])


def test_features_are_those_of_the_flags_on_either_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "PROC", tmp_path)
    assert own.cpu_features() == ()
    (tmp_path / "cpuinfo").write_text("model name\t: Some CPU\nflags\t\t: fpu avx2 amx_tile avx512_vnni amx_int8\n")
    assert own.cpu_features() == ("avx2", "avx512_vnni", "amx_tile", "amx_int8")
    assert own.cpu_model() == "Some CPU"
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd asimddp i8mm sve\n")
    assert own.cpu_features() == ("asimd", "asimddp", "i8mm", "sve")


@pytest.mark.parametrize(("asked", "threads"), [("2", 2), ("4,2", 4), ("0", None), ("", None), ("many", None)])
def test_threads_are_what_openmp_would_start(asked: str, threads: int | None) -> None:
    assert own.threads({"OMP_NUM_THREADS": asked}) == (threads or own.usable_cores())


def test_a_changed_checkout_is_dirty_and_no_checkout_has_no_commit(tmp_path: Path) -> None:
    assert own.commit(tmp_path) == {}

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.invalid"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    clean = own.commit(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert own.commit(tmp_path) == {**clean, "dirty": True}
