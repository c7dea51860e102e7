"""Is a disk that is too small found before hours are spent, and are the bytes those that stages write?"""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIGS, run

from edgeft.engine import nf4_base
from edgeft.errors import DoesNotFit
from edgeft.memory import disk
from edgeft.memory.disk import Disk, require, shortages, total
from edgeft.memory.train_step import Term
from edgeft.merging.merge import merge
from edgeft.planning.plan import Plan, make_plan
from edgeft.progress import silent
from edgeft.settings.job import make_job
from edgeft.units import GIB, MIB

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the free bytes of every disk."""

    def leave(count: int) -> None:
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, count))

    return leave


def entry(name: str, peak: int, kept: int, where: Any = "out") -> Disk:
    return Disk(
        stage=name, where=where, terms=(Term(name="all", bytes=peak, formula="-"),), peak_bytes=peak, kept_bytes=kept
    )


def test_stages_one_after_the_other() -> None:
    assert total([entry("train", 30, 5), entry("merge", 20, 20), entry("export", 4, 3)]) == 30
    assert total([entry("train", 30, 5), entry("merge", 20, 20), entry("export", 9, 3)]) == 5 + 20 + 9
    assert total([]) == 0


def test_what_is_written_already_does_not_count_twice(tmp_path: Path, free: Any) -> None:
    free(5 * GIB)
    require(entry("train", 5 * GIB, 0), tmp_path)
    require(entry("train", 8 * GIB, 0), tmp_path, there=3 * GIB)
    with pytest.raises(DoesNotFit) as caught:
        require(entry("train", 8 * GIB, 0), tmp_path / "not there" / "yet")
    assert str(caught.value) == (
        f"{tmp_path}/not there/yet: the train stage writes up to 8.00 GiB here (all 8.00 GiB), 5.00 GiB are free\n\n"
        "hint: free 3.00 GiB, or choose another disk with --out (make: out=...)"
    )
    with pytest.raises(DoesNotFit, match=r"hint: free 3.00 GiB, or set XDG_CACHE_HOME to a folder on another disk"):
        require(entry("quantise", 8 * GIB, 0, "cache"), tmp_path)


def test_a_plan_warns_of_each_disk(tmp_path: Path, free: Any) -> None:
    planned = make_plan(make_job(model=str(CONFIGS / "llama-3.1-8b"), profile="t4")).stages.disk
    assert [each.stage for each in planned] == ["quantise", "train", "merge", "export"]
    free(100 * GIB)
    assert shortages(planned, tmp_path, tmp_path / "cache") == []
    free(1 * GIB)
    out, cache = shortages(planned, tmp_path, tmp_path / "cache")
    assert out.endswith(f"GiB of disk in {tmp_path}, 1.00 GiB are free")
    assert cache.endswith(f"GiB of disk in {tmp_path}/cache, 1.00 GiB are free")
    merged = next(each for each in planned if each.stage == "merge")
    assert 8_030_000_000 * 2 < merged.peak_bytes < 8_031_000_000 * 2 + 64 * MIB


def test_every_stage_refuses_before_it_writes(
    plan_file: Any,
    tmp_path: Path,
    free: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from edgeft.exporting.export import export
    from edgeft.targets.target import load_target

    path = plan_file(max_steps=1)
    free(1000)
    with pytest.raises(DoesNotFit, match="the train stage writes up to"):
        run(path, tmp_path / "train")
    assert not list(tmp_path.glob("*train*"))
    monkeypatch.undo()
    run(path, tmp_path / "train")
    free(1000)
    with pytest.raises(DoesNotFit, match="the merge stage writes up to"):
        merge(tmp_path / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    assert not list(tmp_path.glob("*merged*"))
    monkeypatch.undo()
    merge(tmp_path / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    free(1000)
    with pytest.raises(DoesNotFit, match="the export stage writes up to"):
        export(tmp_path / "merged", load_target("ort-int4"), tmp_path / "bundle", device=None, progress=silent)
    assert not list(tmp_path.glob("*bundle*"))


def test_quantising_asks_the_disk_of_the_cache(
    checkpoint_folder: Path, tmp_path: Path, free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    training = make_plan(make_job(model=str(checkpoint_folder), profile="cpu-8gb", base_precision="nf4")).training
    free(1000)
    with pytest.raises(DoesNotFit, match=r"the quantise stage writes up to (?s:.*) or set XDG_CACHE_HOME"):
        nf4_base.load_base(checkpoint_folder, training, torch.device("cpu"), torch.float32)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("settings", [{"tuner": "lora"}, {"tuner": "full"}, {"layers": "lisa", "active_layers": 1}])
def test_training_writes_no_more_than_was_planned(
    settings: dict[str, Any],
    plan_file: Any,
    tmp_path: Path,
) -> None:
    """Two checkpoints at a time at most, each of the planned size, and a result of the planned size."""
    pins = {"rank": 4} if settings.get("tuner") == "lora" else {"rank": None}
    path = plan_file(max_steps=6, checkpoint_steps=1, **pins, **settings)
    made = Plan.read(path)
    planned = disk.train_disk(made.spec, made.training)
    seen: list[int] = []

    def note(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        seen.append(disk.size_of(tmp_path / ".train.work"))

    run(path, tmp_path / "train", progress=note)
    one = disk.checkpoint_bytes(made.spec, made.training)
    assert max(seen) <= 2 * one + 64 * 1024 and max(seen) >= one
    assert planned.peak_bytes >= 2 * one
    result = sum(file.stat().st_size for file in (tmp_path / "train").glob("*.safetensors"))
    assert result == pytest.approx(planned.kept_bytes, rel=0.15)


def test_all_layers_of_8b_in_turn_take_less_than_40_gib() -> None:
    settings = {"model": str(CONFIGS / "llama-3.1-8b"), "profile": "t4", "layers": "lisa", "tuner": "full"}
    made = make_plan(make_job(**settings))
    found = disk.train_disk(made.spec, made.training)
    assert disk.draws(made.training) * made.training.active_layers > 32
    assert found.kept_bytes == 4 * 32 * 218_112_000 < found.peak_bytes < 40 * GIB
    few = make_plan(make_job(**settings, max_steps=20, lisa_interval=5))  # eight layers visited, none twice
    assert disk.train_disk(few.spec, few.training).peak_bytes < 17 * GIB


def test_size_of_a_folder(tmp_path: Path) -> None:
    assert disk.size_of(tmp_path / "absent") == 0
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"12345")
    assert disk.size_of(tmp_path / "a") == 5
    assert disk.free_bytes(tmp_path / "a" / "not" / "there") == pytest.approx(
        shutil.disk_usage(tmp_path).free, rel=0.01
    )


def test_what_is_rounded_is_written_in_fp32_first() -> None:
    from edgeft.models.spec import read_model_spec
    from edgeft.targets.target import load_target

    spec = read_model_spec(str(CONFIGS / "smollm2-135m"))
    graph = 4 * (spec.total_parameters + 8192 * 64)  # and cosines and sines, half the head's width each
    for name in ("ort-int8", "ort-int4", "ort-int4-mixed"):
        made = disk.export_disk(spec, load_target(name))
        assert made.peak_bytes - made.kept_bytes == graph
    whole = disk.export_disk(spec, load_target("ort-fp32"))
    assert whole.peak_bytes == whole.kept_bytes > graph
