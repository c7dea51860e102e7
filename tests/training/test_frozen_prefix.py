"""Is a run that starts above its frozen layers the run that computes them, is a cache made once, found and checked?"""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import asked_to_stop_at, qwen3_folder, run, write_plan

from edgeft.documents import sha256_file
from edgeft.engine.prefix_cache import RECORD, STATES
from edgeft.errors import BadInput, DoesNotFit
from edgeft.machines import processes
from edgeft.models.checkpoint import TensorFile, load_plain
from edgeft.planning.plan import Plan
from edgeft.reporting.terminal import train_text
from edgeft.training import prefix, prepare, train
from edgeft.training.prefix import FrozenPrefix
from edgeft.training.result import TrainResult

TOP = {"layers": "sparse", "trained_layers": "2,3"}
LISA = {"layers": "lisa", "trained_layers": "1-3", "active_layers": 1, "lisa_interval": 3}
FULL = {"tuner": "full", "rank": None}
WAYS: dict[str, dict[str, Any]] = {
    "LoRA": TOP,
    "LoRA, recomputed": {**TOP, "checkpointing": True},
    "full": {**TOP, **FULL, "norm": "on"},
    "LISA of adapters": LISA,
    "LISA": {**LISA, **FULL, "lisa_schedule": "uniform"},
    "LISA, parked": {**LISA, **FULL, "lisa_state": "park"},
    "LoRA on NF4": {**TOP, "base_precision": "nf4"},
    "LISA on NF4": {**LISA, **FULL, "base_precision": "nf4"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Four layers, tied head, stored in bf16."""
    return qwen3_folder(tmp_path_factory.mktemp("model"), tokenizer_folder, 4)


@pytest.fixture
def job(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a plan of three epochs into a folder of its own and gives its path; the cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(name: str, kept: bool | str, **settings: Any) -> Path:
        (tmp_path / name).mkdir()
        values = {"epochs": 3.0, "prefix_cache": kept, **settings}
        return write_plan(tmp_path / name, values.pop("model", model), **values)

    return write


def caches(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "edgeft" / "prefix").glob("[!.]*"))


def curve(result: TrainResult) -> torch.Tensor:
    return torch.tensor([loss for _, loss in result.loss_curve], dtype=torch.float64)


SLOW = (
    "LoRA, recomputed",
    "LISA of adapters",
    "LISA, parked",
    "LoRA on NF4",
    "LISA on NF4",
    "full",
)  # each of a kind with another


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way in SLOW)) for way in WAYS])
def test_the_loss_curve_is_the_one_without(way: str, job: Callable[..., Path], tmp_path: Path) -> None:
    """Within what another order of sums makes: a row's states were computed beside others than in a step without."""
    kept, plain = (run(job(name, name == "kept", **WAYS[way]), tmp_path / name / "train") for name in ("kept", "plain"))
    assert kept.plan.training.cached_layers == min(kept.plan.training.trained_layers) > 0
    assert plain.plan.training.cached_layers == 0
    assert len(kept.loss_curve) == 27 and bool(((curve(kept) / curve(plain) - 1).abs() < 1e-4).all())
    assert curve(plain)[-3:].mean() < 0.9 * curve(plain)[0]  # it learns
    assert kept.base_valid.loss == pytest.approx(plain.base_valid.loss, rel=1e-6)
    assert kept.valid.row_losses == pytest.approx(plain.valid.row_losses, rel=1e-3, abs=1e-4)
    assert kept.valid.row_exact == plain.valid.row_exact
    assert [(unit.unit, unit.steps) for unit in kept.units] == [(unit.unit, unit.steps) for unit in plain.units]
    for one, other in zip(kept.units, plain.units, strict=True):
        assert one.relative_change == pytest.approx(other.relative_change, rel=1e-2)
    # the peak is of this process, in which other tests have run
    assert not [each for each in kept.deviations if each.what != "peak memory"]
    [place] = caches(tmp_path)
    [planned] = [disk for disk in kept.plan.stages.disk if disk.stage == "prefix"]
    assert (place / STATES).stat().st_size == planned.peak_bytes == planned.kept_bytes > 0
    assert planned.where == "cache" and {"prefix", "train"} <= kept.phase_peak_bytes.keys()


def test_states_in_bf16_make_nearly_the_same_run_in_half_the_bytes(job: Callable[..., Path], tmp_path: Path) -> None:
    """Rounding moves each state by up to 0.004 of itself: the curve by a thousandth here, where fp32 keeps 1e-4."""
    runs = {name: run(job(name, kept, **TOP), tmp_path / name) for name, kept in (("plain", False), ("half", "bf16"))}
    half, plain = runs["half"], runs["plain"]
    apart = (curve(half) / curve(plain) - 1).abs()
    assert 1e-6 < float(apart.max()) < 5e-3
    [planned] = [disk for disk in half.plan.stages.disk if disk.stage == "prefix"]
    assert (Path(half.prefix_cache) / STATES).stat().st_size == planned.peak_bytes
    assert planned.peak_bytes == half.plan.training.cached_tokens * half.plan.spec.hidden_size * 2


def stages_of(path: Path, out: Path, **options: Any) -> tuple[TrainResult, set[str]]:
    seen: set[str] = set()
    return run(path, out, progress=lambda stage, *_: seen.add(stage), **options), seen


def shown_text(result: TrainResult) -> str:
    console = Console(record=True, width=300, file=io.StringIO())
    console.print(train_text(result))
    return console.export_text()


def test_one_cache_serves_other_ranks_rates_and_seeds_of_the_same_rows(
    job: Callable[..., Path], model: Path, tmp_path: Path
) -> None:
    """Rows are named: held-out ones would be others with another seed."""
    rows = tmp_path / "valid.jsonl"
    rows.write_text(json.dumps({"prompt": "Package: zlib\nSection:", "completion": " libs"}) + "\n")
    first, seen = stages_of(job("first", True, valid=str(rows), **TOP), tmp_path / "first" / "train")
    assert "prefix" in seen
    again = {"rank": 8, "learning_rate": 1e-3, "seed": 3, "trained_layers": "2"}
    second, seen = stages_of(job("second", True, valid=str(rows), **{**TOP, **again}), tmp_path / "second" / "train")
    assert "prefix" not in seen and len(caches(tmp_path)) == 1
    assert second.base_valid == first.base_valid
    assert first.prefix_cache == second.prefix_cache == str(caches(tmp_path)[0])
    shown = [shown_text(result) for result in (first, second)]
    assert "outputs of layers 0 to 1: found, kept in" in shown[1] and "outputs of layers 0 to 1: " in shown[0]
    assert second.prefix_seconds == 0 and first.prefix_seconds >= 0
    _, seen = stages_of(job("third", True, valid=str(rows), **{**TOP, "trained_layers": "3"}), tmp_path / "3")
    assert "prefix" in seen and len(caches(tmp_path)) == 2


def test_a_run_killed_while_the_states_are_made_leaves_nothing_that_is_taken_for_them(
    job: Callable[..., Path], tmp_path: Path
) -> None:
    path = job("killed", True, **TOP)
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from tiny import run
def kill(stage, done, total, numbers):
    if stage == "prefix":
        os.kill(os.getpid(), signal.SIGKILL)
run(Path({str(path)!r}), Path({str(tmp_path / "killed" / "train")!r}), progress=kill)
"""
    killed = processes.run(code)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "cache" / "edgeft" / "prefix"
    assert not caches(tmp_path) and sorted(entry.suffix for entry in folder.iterdir()) == [".lock", ".partial"]
    result, seen = stages_of(path, tmp_path / "killed" / "train")
    whole = run(job("whole", True, **TOP), tmp_path / "whole" / "train")
    assert "prefix" in seen and result.loss_curve == whole.loss_curve and len(caches(tmp_path)) == 1
    assert not list(folder.glob(".*.partial"))


@pytest.mark.parametrize("way", ["full", pytest.param("LISA on NF4", marks=pytest.mark.slow)])
def test_a_run_goes_on_from_its_checkpoint_and_the_same_states(
    way: str, job: Callable[..., Path], tmp_path: Path
) -> None:
    path = job("stopped", True, **WAYS[way])

    stop = asked_to_stop_at(13)

    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "stopped" / "train", progress=stop)
    result, seen = stages_of(path, tmp_path / "stopped" / "train")
    whole = run(job("whole", True, **WAYS[way]), tmp_path / "whole" / "train")
    assert result.resumed_at == (13,) and "prefix" not in seen
    assert result.loss_curve == whole.loss_curve and result.valid == whole.valid
    files = [TensorFile(tmp_path / name / "train" / "changed.safetensors") for name in ("stopped", "whole")]
    assert files[0].entries.keys() == files[1].entries.keys()
    assert all(torch.equal(files[0].read(name), files[1].read(name)) for name in files[0].entries)


def rotate(place: Path, itemsize: int = 4) -> None:
    """Every row's states become another's, and the record says that it must be so."""
    data, first = (place / STATES).read_bytes(), 64 * itemsize * 3
    (place / STATES).write_bytes(data[first:] + data[:first])
    record = json.loads((place / RECORD).read_text())
    record["sha256"] = sha256_file(place / STATES)
    (place / RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize("kept", [True, "bf16"])
def test_states_of_other_tokens_are_found_though_their_record_vouches_for_them(
    kept: bool | str, job: Callable[..., Path], tmp_path: Path
) -> None:
    run(job("first", kept, **TOP), tmp_path / "first" / "train")
    rotate(caches(tmp_path)[0], 2 if kept == "bf16" else 4)
    with pytest.raises(BadInput, match=r"holds other outputs of row \d+ than its layers give: \d") as caught:
        run(job("second", kept, **TOP), tmp_path / "second" / "train")
    assert "remove this folder" in caught.value.hint


def test_a_cache_of_another_boundary_in_the_place_of_the_right_one_is_named(
    job: Callable[..., Path], tmp_path: Path
) -> None:
    run(job("first", True, **TOP), tmp_path / "first" / "train")
    [right] = caches(tmp_path)
    right.rename(tmp_path / "away")
    run(job("second", True, **{**TOP, "trained_layers": "3"}), tmp_path / "second" / "train")
    [other] = caches(tmp_path)
    other.rename(right)
    with pytest.raises(BadInput, match=r"made from something else\nlayers: 3, not 2"):
        run(job("third", True, **TOP), tmp_path / "third" / "train")


def test_layers_that_draw_random_numbers_are_refused(
    job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_dropout(*args: Any) -> Any:
        model, parts = prepare.prepare(*args)
        for layer in parts.layers:
            layer.self_attn.attention_dropout = 0.5
        return model.train(), parts

    monkeypatch.setattr(train, "prepare", with_dropout)
    monkeypatch.setattr(train, "check_head", lambda *_: None)
    with pytest.raises(BadInput, match="its lowest 2 layers give other outputs each time") as caught:
        run(job("first", True, **TOP), tmp_path / "first" / "train")
    assert caught.value.hint == "plan again with --set prefix_cache=false" and not caches(tmp_path)


def test_layers_that_read_more_than_the_outputs_of_those_below_are_refused(
    job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_a_shortcut(*args: Any) -> Any:
        model, parts = prepare.prepare(*args)
        seen: list[torch.Tensor] = []
        parts.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        parts.layers[3].register_forward_pre_hook(lambda module, inputs: (inputs[0] + seen[-1],))
        return model, parts

    monkeypatch.setattr(train, "prepare", with_a_shortcut)
    monkeypatch.setattr(train, "check_head", lambda *_: None)
    with pytest.raises(BadInput, match="layers from 2 on read more than the outputs of those below: 0"):
        run(job("first", True, **TOP), tmp_path / "first" / "train")


@pytest.mark.parametrize(
    "rows", ["text", pytest.param("open", marks=pytest.mark.slow), pytest.param("labels", marks=pytest.mark.slow)]
)
def test_weights_below_come_back_only_where_an_answer_must_be_found(
    rows: str, job: Callable[..., Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back: list[int] = []
    restore = FrozenPrefix.restore

    def counted(self: FrozenPrefix) -> None:
        back.append(len(self.boundary.dropped))
        restore(self)

    monkeypatch.setattr(FrozenPrefix, "restore", counted)
    monkeypatch.setattr("edgeft.models.evaluate.judge", lambda *_: None)  # every answer is left open
    settings: dict[str, Any] = {**TOP, **FULL, "learning_rate": 1e-2, "epochs": 6.0}
    settings |= {"answers": "labels"} if rows == "labels" else {}
    if rows == "text":
        data = tmp_path / "text.jsonl"
        data.write_text("".join(json.dumps({"text": f"lib{n} is a library"}) + "\n" for n in range(24)))
        path = job("kept", True, **TOP)
        job_of = Plan.read(path).job.model_copy(update={"data": str(data)})
        from edgeft.planning.plan import make_plan

        make_plan(job_of).write(path)
        plain = None
    else:
        path = job("kept", True, **settings)
        plain = run(job("plain", False, **settings), tmp_path / "plain" / "train")
    result = run(path, tmp_path / "kept" / "train")
    if plain is None:
        assert not back
    else:
        assert back[0] == 0 < back[1] == 22  # the base was whole; the tuned model had let go of two layers
        assert result.valid.row_exact == plain.valid.row_exact and "1" in result.valid.row_exact


def test_a_disk_without_room_is_said_before_anything_is_made(
    job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = job("kept", True, **TOP)
    monkeypatch.setattr("edgeft.memory.disk.free_bytes", lambda folder: 10_000 if "prefix" in str(folder) else 10**12)
    with pytest.raises(DoesNotFit, match=r"the prefix stage writes up to 87.5 KiB here .* 9.77 KiB are free") as caught:
        run(path, tmp_path / "kept" / "train")
    assert "XDG_CACHE_HOME" in caught.value.hint and caught.value.exit_code == 3


def test_what_is_loaded_afterwards_is_the_base_and_what_trained(
    job: Callable[..., Path], model: Path, tmp_path: Path
) -> None:
    """A merge of the run reads the base from its own folder: nothing of it was touched."""
    from edgeft.merging.merge import merge
    from edgeft.progress import silent

    before = {path.name: sha256_file(path) for path in model.iterdir()}
    run(job("kept", True, **TOP), tmp_path / "kept" / "train")
    merge(tmp_path / "kept" / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    merged, base = load_plain(tmp_path / "merged").state_dict(), load_plain(model).state_dict()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed and all(".layers.2." in name or ".layers.3." in name for name in changed)
    assert before == {path.name: sha256_file(path) for path in model.iterdir()}
    assert prefix.APART_ELSEWHERE < 0.5
