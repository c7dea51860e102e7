"""The time model: what it counts is what the tape makes, and what changes it changes it in the right direction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tiny import CONFIGS, FULL, HALF, NF4, plan_of

from edgeft.machines.profile import load_profile
from edgeft.memory import dataflow, tape, train_step
from edgeft.memory.operations import Way
from edgeft.memory.timing import MADE, count, seconds_per_step
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.settings.tuners import TUNERS

WORK = train_step.Workload(256, 255)
FORMS = {f"{name}, {init}": form for name, tuner in TUNERS.items() for init, form in tuner.forms.items()}
MADES = MADE | {name: form.joined or form.made for name, form in FORMS.items()}


@pytest.fixture
def llama() -> ModelSpec:
    return read_model_spec(str(CONFIGS / "llama-3.2-1b"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[complex]]:
    """The sizes of all tensors that are made on a tape."""
    sizes: list[complex] = []
    original = tape.Storage.__init__

    def note(self: tape.Storage, on: tape.Tape, size: complex, **said: bool) -> None:
        sizes.append(size)
        original(self, on, size, **said)

    monkeypatch.setattr(tape.Storage, "__init__", note)
    dataflow.layer_bytes.cache_clear()
    yield sizes
    dataflow.layer_bytes.cache_clear()


@pytest.mark.parametrize(("kind", "place", "changes"), [
    ("idle", "idle", {}), ("through", "through", {}), ("lora, random", "trained", {}),
    ("lora, pissa", "trained", {"init": "pissa"}),
    ("dora, random", "trained", {"tuner": "dora"}), ("ia3, random", "trained", {"tuner": "ia3"}),
    ("adalora, random", "trained", {"tuner": "adalora"}),
    ("h-adapter, random", "trained", {"tuner": "h-adapter"}),
    ("adapter, both", "trained", {"tuner": "adapter"}),
    ("adapter, mlp", "trained", {"tuner": "adapter", "adapter_at": "mlp"}),
    ("adapter, parallel", "trained", {"tuner": "adapter", "adapter_at": "parallel"}),
    ("prefix, random", "trained", {"tuner": "prefix"}),
    ("prompt, random", "trained", {"tuner": "prompt"}),
    ("full, random", "trained", FULL),
])  # fmt: skip
def test_a_layer_makes_what_is_counted(
    kind: str, place: Any, changes: dict[str, Any], llama: ModelSpec, made: list[complex]
) -> None:
    training = plan_of(llama, range(16), rank=16, **changes)
    dataflow.layer_bytes(llama, Way.of(llama, training, 64), place, place != "idle", False, False)
    heads = llama.num_attention_heads * llama.head_dim, llama.num_key_value_heads * llama.head_dim
    widths = (llama.hidden_size, llama.intermediate_size, *heads, training.rank)
    counted = 4 * sum(share * width for share, width in zip(MADES[kind], widths, strict=True))
    assert sum(made).real / 2 == pytest.approx(counted, rel=0.01)  # the tape runs twice


def test_operations_are_those_of_the_products(llama: ModelSpec) -> None:
    """6 N T for full fine-tuning (Kaplan et al., 2020), without the embedding's lookup."""
    training = plan_of(llama, range(16), batch_size=4, **FULL)
    multiplied = sum(x.in_features * x.out_features for x in llama.linears) * 16 + 2048 * 128256
    counted = count(llama, training, train_step.Workload(256, 256), 0).operations
    assert counted == pytest.approx(6 * multiplied * 4 * 256)


def test_more_work_takes_longer(llama: ModelSpec) -> None:
    profile = load_profile("t4")

    def seconds(layers: range = range(16), **changes: Any) -> float:
        training = plan_of(llama, layers, **{"batch_size": 8, **HALF, **changes})
        return seconds_per_step(profile, training, WORK, count(llama, training, WORK, training.kept_layers))

    kept, again = seconds(), seconds(checkpointing=True)
    assert kept < seconds(checkpointing=True, kept_layers=8) < again
    assert seconds(range(12, 16)) < kept < seconds(rank=64)
    assert kept < seconds(**{**NF4, "compute_dtype": "bf16"})
    assert seconds(micro_batch_size=8) <= kept
    assert seconds(micro_batch_size=8, **NF4) < seconds(**NF4)
