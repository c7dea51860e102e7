"""Does a model whose layers stay in their files train as one that is in memory, bit for bit, and do pages really go?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from streamed_runs import FORMS, SAMPLES, begin
from tiny import plan_of, save_model, smaps_bytes

from edgeft.engine.loop import Run
from edgeft.engine.streaming import Maps
from edgeft.errors import BadInput
from edgeft.memory.streamed import layer_file_bytes, window_bytes
from edgeft.models.checkpoint import TensorFile, write_tensors
from edgeft.models.spec import ModelSpec
from edgeft.settings.job import Training
from edgeft.units import MIB

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "gemma2": {}, "phi3": {}, "qwen2": {},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}, "bloom": {"n_head": 4},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def gradients(run: Run) -> dict[str, torch.Tensor]:
    run._gradients(SAMPLES)
    found = {name: p.grad.clone() for name, p in run.chosen if p.grad is not None}
    run.optimizer.zero_grad(set_to_none=True)
    return found


def planned(spec: ModelSpec, lowest: int = 0, **changes: Any) -> Training:
    values = {"checkpointing": True, "batch_size": 4, "steps": 3, **changes}
    return plan_of(spec, range(lowest, spec.num_hidden_layers), **values)


def both(folder: Path, training: Training, work: Path) -> tuple[Run, Run]:
    """Three steps of each, whose gradients before and weights after are compared: the resident run, the streamed."""
    runs = [begin(folder, training.model_copy(update={"stream_layers": way}), work / str(way)) for way in (False, True)]
    for step in range(3):
        if step == 2:  # adapters begin where half of their gradients are nothing
            first, second = (gradients(run) for run in runs)
            moved = sum(bool(value.any()) for value in first.values())  # adalora has none where ranks have gone
            assert first.keys() == second.keys() and moved > 0.5 * len(first)
            assert [name for name in first if not torch.equal(first[name], second[name])] == []
        losses = [run.train_step(SAMPLES) for run in runs]
        assert losses[0] == losses[1]
    (names, weights), (_, others) = (zip(*run.chosen, strict=True) for run in runs)
    apart = [name for name, a, b in zip(names, weights, others, strict=True) if not torch.equal(a, b)]
    assert apart == []
    return runs[0], runs[1]


def check(folder: Path, form: str, kind: str, lowest: int) -> None:
    dtype, how = FORMS[form]
    values = {"num_hidden_layers": 4, "dtype": dtype, "tie_word_embeddings": lowest > 0, **FAMILIES[kind]}
    spec = save_model(folder / "model", kind, **values)
    names = tuple(linear.name for linear in spec.linears[1:])  # the first has no adapter: a plain product
    both(folder / "model", planned(spec, lowest, **how, target_modules=names), folder)


@pytest.mark.parametrize(("form", "lowest"), list(zip(FORMS, (0, 2, 2, 0, 2), strict=True)))
def test_three_steps_are_those_of_the_resident_run(form: str, lowest: int, tmp_path: Path) -> None:
    check(tmp_path, form, "llama", lowest)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_what_is_cast_when_it_multiplies_may_be_any_familys(kind: str, tmp_path: Path) -> None:
    check(tmp_path, "fp32 of a bf16 file", kind, 1)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "llama"])
def test_three_steps_of_every_family(kind: str, form: str, tmp_path: Path) -> None:
    for lowest in (0, 2):
        check(tmp_path / str(lowest), form, kind, lowest)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp32", "fp32 of a bf16 file", "nf4"])
def test_layers_larger_than_any_cache(form: str, tmp_path: Path) -> None:
    """176 MiB of a layer in fp32; on a CPU that computes bf16 at full rate, in bf16 too."""
    dtype, how = FORMS[form]
    shape = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8,
             "head_dim": 128, "num_hidden_layers": 3}  # fmt: skip
    spec = save_model(tmp_path / "model", "llama", dtype=dtype, **shape)
    assert 4 * sum(linear.in_features * linear.out_features for linear in spec.linears) > 165 * MIB
    both(tmp_path / "model", planned(spec, 1, **how), tmp_path)


TUNERS: dict[str, dict[str, Any]] = {
    "dora": {"tuner": "dora"}, "pissa": {"init": "pissa"}, "ia3": {"tuner": "ia3"}, "adapter": {"tuner": "adapter"},
    "prefix": {"tuner": "prefix"}, "adalora": {"tuner": "adalora"}, "h-adapter": {"tuner": "h-adapter"},
    "lora in turns": {"layers": "lisa", "active_layers": 2, "lisa_interval": 1, "lisa_schedule": "uniform"},
}  # fmt: skip


@pytest.mark.parametrize("name", TUNERS)
def test_every_tuner_trains_beside_layers_in_their_files(name: str, tmp_path: Path) -> None:
    spec = save_model(tmp_path / "model", "llama", num_hidden_layers=4, dtype="bfloat16")
    both(tmp_path / "model", planned(spec, 1 if name == "prefix" else 0, **TUNERS[name]), tmp_path)


@pytest.mark.parametrize("form", ["fp32", "fp32 of a bf16 file", "nf4"])
def test_sparse_layers_that_train_are_in_memory(form: str, tmp_path: Path) -> None:
    """As dense ones in fp32; the others stay in their files."""
    dtype, how = FORMS[form]
    spec = save_model(tmp_path / "model", "llama", num_hidden_layers=4, dtype=dtype)
    made = planned(spec, 3, tuner="full", layers="sparse", active_layers=1, **how)
    _, streamed = both(tmp_path / "model", made, tmp_path)
    used = [any(span.used for span in spans) for spans in streamed.model.edgeft_window.spans]
    assert used == [True, True, True, False]


def test_a_buffer_that_is_filled_anew_is_seen_in_gradients_alone(tmp_path: Path) -> None:
    """The fault that mapped files rule out, planted: layers share memory that only the way forwards fills."""
    spec = save_model(tmp_path / "model", "llama", num_hidden_layers=4)
    run = begin(tmp_path / "model", planned(spec, stream_layers=True), tmp_path / "work")
    run.train_step(SAMPLES)
    before, loss = gradients(run), run._gradients(SAMPLES)
    run.optimizer.zero_grad(set_to_none=True)
    window = run.model.edgeft_window
    true = [[span.own.data for span in spans] for spans in window.spans]
    shared = [tensor.clone() for tensor in true[0]]
    for spans in window.spans:
        for span, memory in zip(spans, shared, strict=True):
            span.own.data = memory
    last = [-1]

    def enter(number: int) -> None:
        if number == 0 or number > last[0]:
            for memory, tensor in zip(shared, true[number], strict=True):
                memory.copy_(tensor)
        last[0] = number

    window.enter = enter
    after = gradients(run)
    assert run._gradients(SAMPLES) == loss  # healthy
    wrong = [name for name in before if not torch.equal(before[name], after[name])]
    assert wrong and not any(".layers.3." in name for name in wrong) and len(wrong) > len(before) / 2


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="no smaps")
def test_two_layers_are_there_at_a_time(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    spec = save_model(tmp_path / "model", "llama", **shape)
    made = planned(spec, stream_layers=True, max_length=15, micro_batch_size=4)
    run = begin(tmp_path / "model", made, tmp_path / "work")
    file, window = tmp_path / "model" / "model.safetensors", run.model.edgeft_window
    seen, enter = [], window.enter

    def watched(number: int) -> None:
        enter(number)
        window.reading and window.reading.result()
        seen.append(smaps_bytes(file))

    window.enter = watched
    run.train_step(SAMPLES)
    # each layer is entered forwards and on the way back; a row of the embedding takes its page's neighbours
    assert len(seen) == 12 and max(seen) <= window_bytes(spec, made) + 12 * 2**16
    layer = layer_file_bytes(spec, made)
    assert min(seen) > 0.95 * layer and max(seen) > 1.9 * layer and 6 * layer > 0.9 * file.stat().st_size
    window.leave()
    assert smaps_bytes(file) <= 12 * 2**16


def test_layers_that_files_have_otherwise_are_named(tmp_path: Path) -> None:
    spec = save_model(tmp_path / "model", "mixtral", num_local_experts=2)
    with pytest.raises(BadInput, match=r"experts.* not in the files as the model has them, so no layer can stay there"):
        begin(tmp_path / "model", planned(spec, stream_layers=True), tmp_path / "work")


def test_numbers_that_lie_between_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"odd": torch.zeros(3, dtype=torch.uint8), "weight": torch.ones(4)})
    file = TensorFile(path)
    assert torch.equal(Maps().tensor(file, "odd"), torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(BadInput, match="weight: lies at no multiple of 4 bytes"):
        Maps().tensor(file, "weight")


def test_a_weight_that_is_read_past_its_module_is_no_number(tmp_path: Path) -> None:
    spec = save_model(tmp_path / "model", "llama", dtype="bfloat16")
    model = begin(tmp_path / "model", planned(spec, stream_layers=True), tmp_path / "work").model
    some = model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert some.dtype == torch.float32 and some.isnan().all() and model.model.embed_tokens.weight.isnan().all()
