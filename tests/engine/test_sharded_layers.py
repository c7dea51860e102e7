"""A layer in parts: what each process holds between two passes, and what autograd finds on its way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from streamed_runs import CPU, FORMS, SAMPLES
from tiny import plan_of, save_model

from edgeft.engine.loop import Run, make_run
from edgeft.engine.nf4_base import load_base
from edgeft.engine.ranks import Ranks
from edgeft.engine.sharded import CutLayer, Shards, shards_of
from edgeft.errors import BadInput
from edgeft.memory.sharded import gathered_bytes, part_bytes, topmost_bytes, uncut
from edgeft.memory.train_step import Workload, step_terms, weight_bytes
from edgeft.models.checkpoint import DTYPES
from edgeft.models.parts import find_parts
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import Training
from edgeft.settings.tuners import is_adapter
from edgeft.simulation.fake import quantisation_states
from edgeft.simulation.simulate import simulate


class One(Ranks):
    """The second of two processes. What would be gathered is what was cut."""

    def gather(self, part: torch.Tensor, whole: torch.Tensor) -> Any:
        return lambda: whole.copy_(KEPT[part.data_ptr()])

    def add_gradients(self, parameters: Any, *numbers: float) -> list[float]:
        return list(numbers)


KEPT: dict[int, torch.Tensor] = {}


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a run of the second of two processes, or of one that has all, before its first step."""
    KEPT.clear()
    empty = CutLayer._empty

    def kept(self: CutLayer) -> None:
        KEPT.setdefault(self.part.data_ptr(), self.whole.clone())
        empty(self)

    monkeypatch.setattr(CutLayer, "_empty", kept)

    def make(folder: Path, training: Training, work: Path) -> Run:
        ranks, compute = One(1, 2), DTYPES[training.compute_dtype]
        model = load_base(folder, training, CPU, compute, ranks=ranks).requires_grad_(False)
        work.mkdir()
        return make_run(training, CPU, compute, model, find_parts(model), folder, work, ranks)

    return make


def planned(spec: ModelSpec, form: str, **changes: Any) -> Training:
    layers, changes = range(spec.num_hidden_layers), {"micro_batch_size": 1, "batch_size": 4} | changes
    return plan_of(spec, layers, **FORMS[form][1], processes=2, shard_base=True, **changes)


def held(shards: Shards) -> int:
    """Bytes of layers that are in memory: parts, and what is gathered."""
    return sum(cut.part.nbytes + cut.whole.untyped_storage().nbytes() for cut in shards.cut)


WAYS = [{"checkpointing": True}, {"checkpointing": True, "kept_layers": 2}, {"checkpointing": False}]


@pytest.mark.parametrize("way", WAYS, ids=["recomputed", "some", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_a_process_with_all_and_two_layers_are_there(
    form: str, way: dict[str, Any], begin: Any, tmp_path: Path
) -> None:
    dtype = getattr(torch, FORMS[form][0])
    spec = save_model(tmp_path / "model", num_hidden_layers=5, dtype=dtype)
    training = planned(spec, form, **way)
    parts, plain = (begin(tmp_path / "model", each, tmp_path / str(each.shard_base)) for each in
                    (training, training.model_copy(update={"shard_base": False})))  # fmt: skip
    shards = parts.model.edgeft_shards
    assert shards_of(plain.model) is None
    own = sum(part_bytes(spec, training, size) for size in spec.layer_parameters)
    assert held(shards) == pytest.approx(own, rel=0.03), "each weight begins at a multiple of 64 bytes"
    assert all(tensor.isnan().all() for layer in shards.layers for name, tensor in layer.named_parameters()
               if "norm" in name)  # fmt: skip
    highest, enter, own = [0], shards.enter, held(shards)

    def entered(number: int) -> None:
        loss = number == 4 and shards.at == 3  # comes next
        enter(number)
        highest[0] = max(highest[0], held(shards))
        assert not loss or held(shards) - own == shards.cut[4].bytes

    shards.enter = entered
    for _ in range(3):
        losses = [run.train_step(SAMPLES) for run in (parts, plain)]
        assert losses[0] == losses[1] and torch.isfinite(torch.tensor(losses)).all()
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(parts.chosen, plain.chosen, strict=True))
    assert topmost_bytes(spec, training) == pytest.approx(shards.cut[4].bytes, rel=0.03)
    assert highest[0] - own == 2 * shards.cut[0].bytes == pytest.approx(gathered_bytes(spec, training), rel=0.03)


def test_a_plan_counts_what_a_process_holds(begin: Any, tmp_path: Path) -> None:
    spec = save_model(tmp_path / "model", num_hidden_layers=3, hidden_size=256, intermediate_size=512, head_dim=64)
    for form in ("fp32", "bf16", "nf4"):
        training = planned(spec, form)
        model = begin(tmp_path / "model", training, tmp_path / form).model
        inside = {id(weight) for cut in model.edgeft_shards.cut for weight in cut.weights}
        outside = sum(p.nbytes for n, p in model.named_parameters() if id(p) not in inside and not is_adapter(n))
        states = sum(tensor.nbytes for tensor in quantisation_states(model))
        assert outside + states + held(model.edgeft_shards) == pytest.approx(weight_bytes(spec, training), rel=0.01)


def test_layers_that_are_not_in_the_files_as_the_model_has_them_are_refused(begin: Any, tmp_path: Path) -> None:
    spec = save_model(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "up_proj" not in name}, path)
    problem = r"layers\.0\.mlp\.up_proj\.weight, .*1\.mlp\.up_proj\.weight: not in the files .* no layer can be cut"
    with pytest.raises(BadInput, match=problem):
        begin(tmp_path / "model", planned(spec, "fp32"), tmp_path / "work")


@pytest.mark.parametrize("form", ["fp32", "bf16", "nf4"])
def test_closed_form_is_the_simulated_step_beside_what_is_cut(form: str, tmp_path: Path) -> None:
    """As near as that of a process with all of it, of a step whose highest moment is a layer's in both."""
    spec, work, over = save_model(tmp_path / "model", num_hidden_layers=4, vocab_size=32), Workload(48, 47), list[int]()
    cut = planned(spec, form, checkpointing=True)
    for training in (uncut(cut), cut):
        own = sum(part_bytes(spec, training, size) for size in spec.layer_parameters) if training.shard_base else 0
        terms = [term.bytes for term in step_terms(spec, training, work) if term.name != "gathered layers"]
        over.append(sum(terms) - own - simulate(spec, training, work).live_peak_bytes)
        assert abs(over[-1]) < 0.01 * sum(terms)
    assert over[0] == over[1]
