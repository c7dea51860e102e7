"""Is a base that was read a tensor at a time the one that transformers loads, and is it in memory once?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import plan_of, save_model

from edgeft.engine import nf4_base
from edgeft.engine.nf4_base import compute_in, load_quantised, quantise
from edgeft.engine.tensor_by_tensor import load_packed, read_as
from edgeft.machines import processes
from edgeft.memory.phases import phases
from edgeft.memory.train_step import Workload
from edgeft.models.checkpoint import Checkpoint, load_whole
from edgeft.units import MIB

CPU = torch.device("cpu")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "gemma2": {}, "gemma3_text": {"sliding_window": 4}, "phi3": {}, "granite": {}, "qwen2": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, "gpt_neox": {"max_position_embeddings": 64},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}, "bloom": {"n_head": 4},
}  # fmt: skip


def tensors(model: Any) -> dict[str, torch.Tensor]:
    found = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, parameter in list(found.items()):
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("kind", "tied", "compute"),
    [(kind, tied, torch.float32) for kind in FAMILIES for tied in (False, True)]
    + [(kind, True, torch.bfloat16) for kind in FAMILIES],
)
def test_every_tensor_is_what_transformers_loads(kind: str, tied: bool, compute: torch.dtype, tmp_path: Path) -> None:
    save_model(tmp_path / "model", kind, **{**FAMILIES[kind], "tie_word_embeddings": tied})
    quantise(tmp_path / "model", tmp_path / "nf4")
    whole = load_whole(tmp_path / "nf4", dtype=compute, device_map={"": CPU})
    compute_in(whole, compute)
    ours = load_packed(tmp_path / "nf4", compute, CPU)
    found, expected = tensors(ours), tensors(whole)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {name: value.dtype for name, value in found.items()} == {n: v.dtype for n, v in expected.items()}
    multiplied = [{name: (module.compute_dtype, module.weight.quant_state.dtype, module.training)
                   for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
                  for model in (ours, whole)]  # fmt: skip
    assert multiplied[0] == multiplied[1] and set(multiplied[0].values()) == {(compute, compute, True)}
    assert ours.is_loaded_in_4bit and ours.is_quantized and not ours.config.use_cache
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_what_is_put_together_from_its_files_is_loaded_by_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", "mixtral", num_local_experts=2)
    quantise(tmp_path / "model", tmp_path / "nf4")
    assert load_packed(tmp_path / "nf4", torch.float32, CPU) is None
    used = []
    monkeypatch.setattr(nf4_base, "load_whole", lambda *a, **k: used.append(load_whole(*a, **k)) or used[-1])
    assert load_quantised(tmp_path / "nf4", torch.float32, CPU) is used[0]


def test_a_cast_is_made_a_block_of_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "llama", dtype="bfloat16")
    files = Checkpoint(tmp_path)
    name = "model.embed_tokens.weight"
    whole, read, sizes = files.read(name), files.read, []
    monkeypatch.setattr("edgeft.models.headers.BLOCK_BYTES", 4 * 64 * 100)

    def seen(name: str, rows: slice = slice(None)) -> torch.Tensor:
        sizes.append(len(found := read(name, rows)))
        return found

    monkeypatch.setattr(files, "read", seen)
    found = read_as(files, name, torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, whole.float()) and sizes == [100] * 5 + [12]
    assert read_as(files, name, torch.bfloat16).data_ptr() != whole.data_ptr() and sizes[-1] == 512


def test_loading_holds_the_weights_alone(tmp_path: Path) -> None:
    """In a process of its own: a map of the file beside the weights, or a second copy of a table, would be seen."""
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 16_000, "num_attention_heads": 8,
             "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 3}  # fmt: skip
    spec = save_model(tmp_path / "model", "llama", dtype="bfloat16", **shape)
    quantise(tmp_path / "model", tmp_path / "nf4")
    code = """if True:
        import json, sys
        from pathlib import Path
        import torch
        from edgeft.engine.nf4_base import compute_in, load_quantised
        from edgeft.machines import meter
        from edgeft.models.checkpoint import load_whole
        meter.import_all()
        meter.control_malloc()
        cpu = torch.device("cpu")
        tiny, folder = map(Path, sys.argv[1:])
        load_quantised(tiny, torch.float32, cpu)  # so that all that is imported, is
        def mapped(folder, dtype, device):
            compute_in(load_whole(folder, dtype=dtype, device_map={"": device}), dtype)
        found = []
        for load in (load_quantised, mapped):
            meter.give_back()
            meter.reset_peak(cpu)
            before = meter.bytes_now(cpu)
            model = load(folder, torch.float32, cpu)
            found += [before, meter.peak_bytes(cpu)]
            del model
        print(json.dumps(found))
    """
    save_model(tmp_path / "tiny")
    quantise(tmp_path / "tiny", tmp_path / "first")
    done = processes.run(code, tmp_path / "first", tmp_path / "nf4")
    before, peak, mapped_before, mapped_peak = json.loads(done.stdout.splitlines()[-1])
    planned = phases(spec, plan_of(spec, range(3), base_precision="nf4"), Workload(48, 48), baseline_bytes=before)[0]
    weights = next(term.bytes for term in planned.terms if term.name == "weights")
    assert [term.name for term in planned.terms] == ["process", "weights"] and weights > 140 * MIB
    assert abs(peak - before - weights) < 0.03 * weights < 0.3 * weights < mapped_peak - mapped_before - weights
