"""Are the states on disk those of their rows, is every other file named, and do weights come back as they were?"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import plan_of, save_model

from edgeft.data.batches import make_batch
from edgeft.data.samples import Sample
from edgeft.engine import prefix_cache
from edgeft.engine.nf4_base import load_base, read_back
from edgeft.engine.prefix_cache import RECORD, STATES, PrefixCache, alone, check, key_of, make, place_of
from edgeft.errors import BadInput, EdgeftError
from edgeft.models.boundary import Boundary, release_pages
from edgeft.models.evaluate import token_losses
from edgeft.models.parts import find_parts
from edgeft.models.spec import read_model_spec

CPU = torch.device("cpu")
LENGTHS = (9, 30, 17, 5, 22, 12, 17)
ROWS = [
    Sample([7 * i % 500 + n for i in range(1, n + 1)], [7 * i % 500 + n for i in range(1, n + 1)], 0) for n in LENGTHS
]


class Kept:
    """A tiny model, cut above its lowest two layers, and the states of ROWS in a folder."""

    def __init__(self, model_folder: Path, folder: Path, **plan: Any) -> None:
        spec = read_model_spec(str(model_folder))
        self.training = plan_of(spec, range(2, 4), layers="sparse", cached_layers=2, **plan)
        self.base = model_folder
        compute = torch.bfloat16 if self.training.compute_dtype == "bf16" else torch.float32
        self.model = load_base(model_folder, self.training, CPU, compute)
        self.parts = find_parts(self.model)
        self.boundary = Boundary(self.parts, 2)
        self.dtype = torch.bfloat16 if self.training.cached_dtype == "bf16" else torch.float32
        self.key = key_of(model_folder, self.training, ROWS, CPU, self.dtype if compute == torch.float32 else compute)
        self.folder = folder
        make(folder, self.key, ROWS, self.states_of, 64, self.dtype, lambda done, total: None)

    def states_of(self, samples: Sequence[Sample]) -> torch.Tensor:
        return self.boundary.reach(make_batch(samples).ids)

    def open(self) -> PrefixCache:
        check(self.folder, self.key, ROWS)
        return PrefixCache(self.folder, ROWS, 64, self.dtype, torch.float32)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, num_hidden_layers=4)
    return folder


@pytest.fixture
def kept(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Kept(model_folder, tmp_path / "kept")


def test_every_row_has_its_own_states(kept: Kept) -> None:
    cache = kept.open()
    for group in ([ROWS[1]], [ROWS[4], ROWS[0], ROWS[3]], ROWS[::-1]):
        found = cache.states(group)
        assert found.shape == (len(group), max(map(len, group)), 64)
        for sample, states in zip(group, found, strict=True):
            alone = kept.states_of([sample])[0]
            assert torch.allclose(states[: len(sample)], alone, rtol=1e-5, atol=1e-6)
            assert not states[len(sample) :].any()
    assert (kept.folder / STATES).stat().st_size == sum(LENGTHS) * 64 * 4


def test_states_in_bf16_are_the_rounded_ones_in_half_the_bytes(kept: Kept, tmp_path: Path) -> None:
    half = Kept(kept.base, tmp_path / "half", cached_dtype="bf16")
    assert place_of(half.key) != place_of(kept.key)
    assert (half.folder / STATES).stat().st_size == sum(LENGTHS) * 64 * 2
    found, whole = half.open().states(ROWS), kept.open().states(ROWS)
    assert found.dtype == torch.float32 and torch.equal(found, whole.bfloat16().float())
    assert not torch.equal(found, whole)


def test_gradients_of_a_step_are_those_of_the_whole_model(kept: Kept) -> None:
    """Up to the order of sums: the states were computed beside other rows. Of the very batch they are equal to the bit
    (tests/models/test_boundary.py)."""
    cache, batch = kept.open(), ROWS[2:6]
    trained = list(kept.parts.layers[2].parameters())

    def gradients(parts: Any) -> torch.Tensor:
        for parameter in kept.model.parameters():
            parameter.requires_grad_(any(parameter is one for one in trained))
            parameter.grad = None
        token_losses(kept.model, parts, batch, CPU, torch.float32, 32).backward()
        return torch.cat([parameter.grad.flatten() for parameter in trained])

    whole = gradients(kept.parts)
    above = gradients(kept.boundary.above(kept.parts, cache.states))
    assert float((above - whole).norm() / whole.norm()) < 1e-5
    swapped = gradients(kept.boundary.above(kept.parts, lambda rows: cache.states(rows)[[1, 0, 2, 3]]))
    assert float((swapped - whole).norm() / whole.norm()) > 0.1


def truncate(kept: Kept) -> None:
    with open(kept.folder / STATES, "r+b") as file:
        file.truncate(1000)


def change_a_byte(kept: Kept) -> None:
    data = bytearray((kept.folder / STATES).read_bytes())
    data[1000] ^= 1
    (kept.folder / STATES).write_bytes(data)


def forget_the_record(kept: Kept) -> None:
    (kept.folder / RECORD).unlink()


def take_the_states_away(kept: Kept) -> None:
    (kept.folder / STATES).unlink()


def name_another(field: str, value: str) -> Any:
    def plant(kept: Kept) -> None:
        record = json.loads((kept.folder / RECORD).read_text())
        record["key"][field] = value
        (kept.folder / RECORD).write_text(json.dumps(record))

    return plant


FAULTS: list[tuple[Any, str]] = [
    (truncate, r"is not whole: states.bin has 1000 bytes, 28672 were written"),
    (take_the_states_away, r"is not whole: states.bin has 0 bytes"),
    (change_a_byte, r"is not as it was written: states.bin was changed afterwards"),
    (forget_the_record, r"prefix.json no such file"),
    (name_another("layers", "1"), r"made from something else\nlayers: 1, not 2"),
    (name_another("base weights", "f" * 64), r"something else\nbase weights: ffffffffffff, not "),
    (name_another("rows", "0" * 64), r"rows: 000000000000, not "),
    (name_another("torch", "1.0"), r"torch: 1.0, not "),
    (name_another("computed in", "bf16"), r"computed in: bf16, not fp32"),
]


@pytest.mark.parametrize(("plant", "said"), FAULTS)
def test_what_is_not_the_file_that_was_asked_for_is_named(plant: Any, said: str, kept: Kept) -> None:
    kept.open()
    plant(kept)
    with pytest.raises(BadInput, match=said) as caught:
        kept.open()
    assert caught.value.hint == prefix_cache.AGAIN and str(kept.folder) in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_named(kept: Kept) -> None:
    cache = kept.open()
    truncate(kept)
    with pytest.raises(BadInput, match="cut short while it was read"):
        cache.states(ROWS)


def test_the_key_has_all_that_the_states_depend_on(kept: Kept, tmp_path: Path) -> None:
    def key(rows: Sequence[Sample] = ROWS, base: Path = kept.base, **changes: Any) -> dict[str, str]:
        return key_of(base, kept.training.model_copy(update=changes), rows, CPU, torch.float32)

    assert key() == kept.key
    other = tmp_path / "other"
    shutil.copytree(kept.base, other)
    save_model(other, num_hidden_layers=4, rms_norm_eps=1e-4)
    longer = [*ROWS[:-1], Sample([*ROWS[-1].ids, 1], [*ROWS[-1].labels, 1], 0)]
    moved = [Sample([*ROWS[0].ids, ROWS[1].ids[0]], [1] * 10, 0), Sample(ROWS[1].ids[1:], [1] * 29, 0), *ROWS[2:]]
    others = [
        key(base=other), key(longer), key(ROWS[::-1]), key(moved), key(cached_layers=1), key(compute_dtype="bf16"),
        key(base_precision="nf4"), key_of(kept.base, kept.training, ROWS, CPU, torch.bfloat16),
    ]  # fmt: skip
    places = {place_of(each) for each in (kept.key, *others)}
    assert len(places) == 9
    same = [key(seed=5), key(rank=8), key(learning_rate=1.0), key(trained_layers=(2,)), key(micro_batch_size=1)]
    assert all(each == kept.key for each in same)


def test_nothing_is_left_of_a_file_that_could_not_be_finished(kept: Kept, tmp_path: Path) -> None:
    def fails(samples: Sequence[Sample]) -> torch.Tensor:
        if len(samples[0]) > 12:
            raise RuntimeError("out of memory")
        return kept.states_of(samples)

    with pytest.raises(RuntimeError):
        make(tmp_path / "half", kept.key, ROWS, fails, 16, torch.float32, lambda done, total: None)
    assert not list(tmp_path.glob("*half*"))


def test_states_that_no_run_has_used_for_two_weeks_make_room_for_new_ones(kept: Kept, tmp_path: Path) -> None:
    used, unused, foreign = (tmp_path / "prefix" / name for name in ("used", "unused", "foreign"))
    for folder in (used, unused):
        shutil.copytree(kept.folder, folder)
        os.utime(folder / RECORD, (0, 0))
    foreign.mkdir()
    check(used, kept.key, ROWS)
    make(tmp_path / "prefix" / "new", kept.key, ROWS, kept.states_of, 16, torch.float32, lambda done, total: None)
    assert sorted(path.name for path in (tmp_path / "prefix").iterdir()) == ["foreign", "new", "used"]


def test_another_run_waits_for_the_states_that_one_makes(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        started.set()
        with alone(tmp_path / "states"):
            order.append("second")

    started = threading.Event()
    other = threading.Thread(target=second)
    with alone(tmp_path / "states"):
        other.start()
        started.wait()
        other.join(0.2)
        order.append("first")
    other.join()
    assert order == ["first", "second"]


def test_a_full_disk_says_so_before_it_is_full(kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefix_cache.os, "posix_fallocate", full)
    with pytest.raises(EdgeftError, match="the disk is full"):
        make(tmp_path / "full", kept.key, ROWS, kept.states_of, 16, torch.float32, lambda done, total: None)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_weights_come_back_as_they_were(
    precision: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compute = "bf16" if precision == "bf16" else "fp32"
    kept = Kept(model_folder, tmp_path / "kept", base_precision=precision, compute_dtype=compute)
    before = {name: p.detach().clone() for name, p in kept.model.named_parameters()}
    states = kept.states_of(ROWS)
    kept.boundary.drop(kept.model, release_pages)
    names = {weight.name for weight in kept.boundary.dropped}
    assert len(names) == 2 * 9 + 1
    read_back(kept.boundary.dropped, kept.base, kept.training, CPU)
    for name, parameter in kept.model.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name]), name
        assert name not in names or not parameter.requires_grad
    assert torch.equal(kept.states_of(ROWS), states)
