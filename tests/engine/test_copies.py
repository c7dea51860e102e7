"""Does a model train bit for bit as one that is in memory whose layers come to a device as copies? By a CPU, late ones.

The CPU stands for the device. Its copies are made when somebody waits for them and no sooner, into memory that is full
of what is no number: who forgets to wait, or fills a buffer again too early, is seen.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streamed_runs import CPU, FORMS, SAMPLES, begin
from tiny import plan_of, save_model

from edgeft.engine import copies, streaming
from edgeft.engine.adapted_linear import STORED, dense_weight
from edgeft.engine.copies import Copies, InPlace
from edgeft.engine.loop import Run
from edgeft.errors import EdgeftError
from edgeft.memory.streamed import ALIGNED, layer_file_bytes
from edgeft.models.parts import is_linear
from edgeft.models.spec import read_model_spec
from edgeft.settings.job import Training

HALF = {
    "fp16": ("float16", {"base_precision": "fp16", "compute_dtype": "fp16"}),
    "fp16 of a bf16 file": ("bfloat16", {"base_precision": "fp16", "compute_dtype": "fp16"}),
    "nf4 in bf16": ("bfloat16", {"base_precision": "nf4", "compute_dtype": "bf16"}),
}
GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {**FORMS, **HALF}


class Late(InPlace):
    """Sends what it was given only once it is waited for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.count = self.done = 0
        self.memories: list[weakref.ref[torch.UntypedStorage]] = []
        self.most = 0

    def memory(self, size: int) -> torch.Tensor:
        found = torch.full((size,), 255, dtype=torch.uint8)
        self.memories.append(weakref.ref(found.untyped_storage()))
        self.most = max(self.most, sum(each() is not None for each in self.memories))
        return found

    def send(self, into: torch.Tensor, piece: torch.Tensor) -> None:
        self.waiting.append((into, piece))
        self.count += 1

    def sent(self) -> int:
        return self.count

    def finish(self, mark: int | None) -> None:
        while mark is not None and self.done < mark:
            into, piece = self.waiting.pop(0)
            into.copy_(piece)
            self.done += 1

    def wait(self, mark: int, memory: torch.Tensor) -> None:
        self.finish(mark)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model that streams does so as on a device, a matrix in several pieces."""
    monkeypatch.setattr(copies, "PIECE_BYTES", 1024)
    monkeypatch.setattr(streaming, "way_of", lambda device: Copies(CPU, Late(CPU)))


def planned(folder: Path, way: str, kind: str = "llama", **changes: Any) -> Training:
    dtype, how = WAYS[way]
    shape = {"num_hidden_layers": 4, "tie_word_embeddings": False, **(GPT2 if kind == "gpt2" else {})}
    spec, lowest = save_model(folder / "model", kind, dtype=dtype, **shape), changes.pop("lowest", 0)
    values = {"checkpointing": True, "batch_size": 4, "steps": 3, **how, **changes}
    return plan_of(spec, range(lowest, 4), **values)


def gradients(run: Run) -> dict[str, torch.Tensor]:
    run._gradients(SAMPLES)
    found = {name: p.grad.clone() for name, p in run.chosen if p.grad is not None}
    run.optimizer.zero_grad(set_to_none=True)
    return found


def matrices(run: Run) -> dict[str, torch.Tensor]:
    """Every layer's matrices as they multiply when their turn is there."""
    found, window = {}, getattr(run.model, "edgeft_window", None)
    for number, layer in enumerate(run.parts.layers):
        if window is not None:
            window.enter(number)
        found |= {f"{number}.{name}": dense_weight(module, run.compute).detach().clone()
                  for name, module in layer.named_modules() if is_linear(module)}  # fmt: skip
    return found


def both(folder: Path, training: Training) -> tuple[Run, Run]:
    """The resident run, and that of copies: losses, gradients, what trains, what multiplies, step by step."""
    ways = (training.model_copy(update={"stream_layers": way}) for way in (False, True))
    one, other = (begin(folder / "model", way, folder / f"work {way.stream_layers}") for way in ways)
    for step in range(training.steps):
        if step == 2:
            first, second = gradients(one), gradients(other)
            assert first.keys() == second.keys() and any(bool(value.any()) for value in first.values())
            assert [name for name in first if not torch.equal(first[name], second[name])] == []
        assert one.train_step(SAMPLES) == other.train_step(SAMPLES)
    for first, second in ((dict(one.chosen), dict(other.chosen)), (matrices(one), matrices(other))):
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
    return one, other


@pytest.mark.parametrize("way", WAYS)
def test_three_steps_are_those_of_the_resident_run(way: str, tmp_path: Path) -> None:
    _, other = both(tmp_path, planned(tmp_path, way, lowest=1 if "of a" in way else 0))
    assert other.model.edgeft_window.way.stream.count > 100


@pytest.mark.parametrize("way", ["fp32 of a bf16 file", "bf16", "nf4 in bf16"])
@pytest.mark.parametrize("kind", [pytest.param("gpt2", marks=pytest.mark.slow), "gemma2"])
def test_three_steps_of_other_families(kind: str, way: str, tmp_path: Path) -> None:
    both(tmp_path, planned(tmp_path, way, kind))


TUNERS: dict[str, dict[str, Any]] = {
    "dora": {"tuner": "dora"}, "pissa": {"init": "pissa"}, "ia3": {"tuner": "ia3"}, "adapter": {"tuner": "adapter"},
    "prefix": {"tuner": "prefix", "lowest": 1},
    "adalora": {"tuner": "adalora"}, "h-adapter": {"tuner": "h-adapter"}, "prefix on nf4": {"tuner": "prefix"},
    "lora in turns": {"layers": "lisa", "active_layers": 2, "lisa_interval": 1, "lisa_schedule": "uniform"},
    "sparse": {"tuner": "full", "layers": "sparse", "active_layers": 1, "lowest": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", TUNERS)
def test_every_tuner_trains_beside_copies(name: str, tmp_path: Path) -> None:
    way = "nf4 in bf16" if name in ("ia3", "prefix on nf4") else "fp32 of a bf16 file"
    both(tmp_path, planned(tmp_path, way, **TUNERS[name]))


LISA = {"tuner": "full", "layers": "lisa", "active_layers": 1, "lisa_interval": 1, "steps": 9}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "fp16 of a bf16 file"])
def test_layers_in_turn_at_full_rank(way: str, tmp_path: Path) -> None:
    """Each comes from the base's files, then from its own; the third round begins."""
    both(tmp_path, planned(tmp_path, way, **LISA))


@pytest.mark.parametrize("way", ["fp32", "fp32 of a bf16 file", "bf16", "nf4", "nf4 in bf16"])
@pytest.mark.parametrize("tuner", ["lora", "adapter"])  # whose layers end in a plain product
def test_two_layers_are_on_the_device_at_a_time(way: str, tuner: str, tmp_path: Path) -> None:
    """While they are recomputed too: what autograd held of the one above is gone when the next is asked for."""
    training = planned(tmp_path, way, stream_layers=True, tuner=tuner)
    run = begin(tmp_path / "model", training, tmp_path / "work")
    stream = run.model.edgeft_window.way.stream
    for _ in range(3):
        run.train_step(SAMPLES)
    assert stream.most == 2 and len(stream.memories) == 4 + 3 + 2 * (2 + 3)  # two are there when a step begins
    sizes = {each().nbytes() for each in stream.memories if each() is not None}
    expected = layer_file_bytes(read_model_spec(str(tmp_path / "model")), training)
    assert sizes and all(expected <= size < expected + 7 * ALIGNED for size in sizes)
    run.model.edgeft_window.leave()
    gc.collect()
    assert not any(each() is not None for each in stream.memories)


def test_what_is_not_there_is_no_number(tmp_path: Path) -> None:
    for way in ("bf16", "fp32 of a bf16 file", "nf4"):
        run = begin((folder := tmp_path / way) / "model", planned(folder, way, stream_layers=True), folder / "work")
        linear = run.parts.layers[2].self_attn.q_proj.base_layer
        if way == "nf4":
            assert linear.quant_state is linear.weight.quant_state is None
            with pytest.raises(ValueError, match="quant_state"):
                linear(torch.ones(1, linear.in_features))
        else:
            assert getattr(linear, STORED, linear.weight).isnan().all() and linear.weight.isnan().all()


class NoWait(Late):
    """A fault, planted: what computes does not wait for the layer."""

    def wait(self, mark: int, memory: torch.Tensor) -> None:
        pass


class EagerBuffers(Late):
    """A fault, planted: a pinned buffer is filled again before its copy has ended."""

    def finish(self, mark: int | None) -> None:
        pass

    def wait(self, mark: int, memory: torch.Tensor) -> None:
        super().finish(mark)


class OneMemory(Late):
    """A fault, planted: every layer comes into the memory of the one before."""

    memories_of: dict[int, torch.Tensor]

    def memory(self, size: int) -> torch.Tensor:
        self.memories_of = getattr(self, "memories_of", {})
        return self.memories_of.setdefault(size, torch.full((size,), 255, dtype=torch.uint8))


@pytest.mark.parametrize("fault", [NoWait, EagerBuffers, OneMemory])
@pytest.mark.parametrize("way", ["bf16", "nf4"])
def test_faults_are_seen(way: str, fault: type[Late], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "way_of", lambda device: Copies(CPU, fault(CPU)))
    training = planned(tmp_path, way)
    with pytest.raises((AssertionError, EdgeftError)):  # other numbers, or none
        both(tmp_path, training)


def as_it_is(linear: Any, forward: Any, x: torch.Tensor) -> torch.Tensor:
    return forward(x)  # type: ignore[no-any-return]


def test_bitsandbytes_own_context_would_hold_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault, planted: 4-bit modules multiply as they come; gradients are right, and all layers stay."""
    monkeypatch.setattr(copies, "_multiply", as_it_is)
    _, other = both(tmp_path, planned(tmp_path, "nf4 in bf16"))
    assert other.model.edgeft_window.way.stream.most >= 4


def test_a_product_at_a_layers_end_whose_layer_is_not_there_yet_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault, planted: nothing that is saved asks for the layer before its last product's gradient is made."""
    monkeypatch.setattr(copies, "_recall", as_it_is)
    with pytest.raises(EdgeftError, match="the gradients are not finite"):
        both(tmp_path, planned(tmp_path, "fp32 of a bf16 file", tuner="prefix", lowest=1))
