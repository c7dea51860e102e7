"""Is a checkpoint whose files do not hold the model of its config refused by name, by the plan and by every loader?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeft.engine.nf4_base import load_base, quantise, quantised_folder
from edgeft.errors import BadInput
from edgeft.models.checkpoint import Checkpoint, load_plain
from edgeft.models.headers import is_buffer
from edgeft.models.spec import read_model_spec
from edgeft.settings.job import Training

UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


def rewritten(folder: Path, out: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a checkpoint whose tensors went through `change`."""
    shutil.copytree(folder, out)
    changed = change(load_file(folder / "model.safetensors"))
    save_file({n: t.contiguous().clone() for n, t in changed.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def configure(folder: Path, **values: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return folder


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def nf4(folder: Path) -> Any:
    training = Training.model_construct(base_precision="nf4")
    try:
        return load_base(folder, training, torch.device("cpu"), torch.float32)
    finally:
        shutil.rmtree(quantised_folder(folder), ignore_errors=True)


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no head": (without("lm_head.weight"), "lm_head.weight: missing"),
    "no matrix": (without(UP), f"{UP}: missing"),
    "no matrix in any layer": (without(UP, UP.replace("1", "0")), "up_proj.weight: missing"),
    "no norm": (without("model.norm.weight"), ""),
    "no embedding": (without("model.embed_tokens.weight"), "embed_tokens.weight: missing"),
    "a bias": (
        lambda t: {**t, "model.layers.0.mlp.up_proj.bias": torch.ones(128)},
        "layers.0.mlp.up_proj.bias: no weight",
    ),
    "a layer": (lambda t: {**t, UP.replace("1", "2"): t[UP]}, "model.layers.2.mlp.up_proj.weight: "),
    "another shape": (lambda t: {**t, UP: t[UP][:100]}, f"{UP}: (100, 64) in the files, (128, 64)"),
    "transposed": (lambda t: {**t, UP: t[UP].T}, f"{UP}: (64, 128) in the files, (128, 64)"),
    "fewer tokens": (lambda t: {**t, "lm_head.weight": t["lm_head.weight"][:-1]}, "lm_head.weight: (399, 64) in the"),
    "packed": (lambda t: {**t, UP: torch.zeros(4096, 1, dtype=torch.uint8)}, f"{UP}: uint8"),
    "packed in place": (lambda t: {**t, UP: t[UP].to(torch.int8)}, f"{UP}: int8"),
    **{
        prefix: (prefixed(prefix), f"have names that begin with {prefix!r}")
        for prefix in ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "base_model.model.")
    },
}
READERS = {"plan": lambda folder: read_model_spec(str(folder)), "load": load_plain}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_the_model_is_refused_by_name(
    fault: str, reader: str, checkpoint_folder: Path, tmp_path: Path
) -> None:
    change, message = FAULTS[fault]
    folder = rewritten(checkpoint_folder, tmp_path / "model", change)
    with pytest.raises(BadInput) as caught:
        READERS[reader](folder)
    assert message in str(caught.value) and "hint: " in str(caught.value)


@pytest.mark.parametrize("fault", ["no head", "no matrix", "another shape"])
def test_a_base_that_is_not_whole_is_not_quantised(fault: str, checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = rewritten(checkpoint_folder, tmp_path / "model", FAULTS[fault][0])
    with pytest.raises(BadInput, match=r"does not hold the model of its config\.json"):
        quantise(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_that_lost_a_tensor_is_refused(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = quantised_folder(checkpoint_folder)
    quantise(checkpoint_folder, cached)
    load_base(checkpoint_folder, Training.model_construct(base_precision="nf4"), torch.device("cpu"), torch.float32)
    tensors = load_file(cached / "model-00001.safetensors")
    save_file(without(UP)(tensors), cached / "model-00001.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="hint: remove this folder: it is made again from the base"):
        load_base(checkpoint_folder, Training.model_construct(base_precision="nf4"), torch.device("cpu"), torch.float32)


def test_buffers_of_older_versions_are_no_weights(checkpoint_folder: Path, tmp_path: Path) -> None:
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    folder = rewritten(checkpoint_folder, tmp_path / "model", lambda tensors: tensors | extra)
    assert read_model_spec(str(folder)).total_parameters == read_model_spec(str(checkpoint_folder)).total_parameters
    assert set(Checkpoint(folder).owner) == set(load_file(checkpoint_folder / "model.safetensors"))
    assert torch.equal(load_plain(folder).lm_head.weight, load_plain(checkpoint_folder).lm_head.weight)
    assert is_buffer("h.0.attn.bias", (1, 1, 9, 9)) and is_buffer("h.0.attn.masked_bias", ())
    assert not is_buffer("h.0.attn.bias", (9,)) and not is_buffer("h.0.attn.c_attn.bias", (9,))


# config.json and files that disagree


def test_a_tied_config_over_two_tensors_is_refused(checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = configure(rewritten(checkpoint_folder, tmp_path / "model", lambda t: t), tie_word_embeddings=True)
    for reader in READERS.values():
        with pytest.raises(BadInput, match="are tied, the files hold two different tensors"):
            reader(folder)
    same = rewritten(folder, tmp_path / "same", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]})
    assert read_model_spec(str(same)).tie_word_embeddings
    model = load_plain(same)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "stored, told, dtype",
    [
        (torch.bfloat16, "absent", "bfloat16"),
        (torch.float32, "auto", "float32"),
        (torch.float32, "bfloat16", "float32"),
        (torch.float16, "float32", "float16"),
    ],
)
def test_the_stored_dtype_counts(
    stored: torch.dtype, told: str, dtype: str, checkpoint_folder: Path, tmp_path: Path
) -> None:
    folder = rewritten(checkpoint_folder, tmp_path / "model", lambda t: {n: v.to(stored) for n, v in t.items()})
    configure(folder, dtype=told, torch_dtype="absent")
    assert read_model_spec(str(folder)).dtype == dtype
    (folder / "model.safetensors").unlink()  # without weights, what config.json says
    assert read_model_spec(str(folder)).dtype == (told if told not in ("absent", "auto") else "float32")


def test_quantising_does_not_round_to_what_the_config_says(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = configure(rewritten(checkpoint_folder, tmp_path / "model", lambda t: t), dtype="bfloat16")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        logits = [nf4(folder)(input_ids=ids).logits for folder in (told, checkpoint_folder)]
    assert torch.equal(*logits)


# shards


@pytest.fixture
def shards(checkpoint_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    load_plain(checkpoint_folder).save_pretrained(folder, max_shard_size="100KB")
    return folder


def index_of(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"weight_map": change(index["weight_map"])}))


def test_an_index_that_lies_is_refused(shards: Path) -> None:
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    Checkpoint(shards)
    index_of(shards, lambda told: told | {"model.gone.weight": names[0]})
    with pytest.raises(
        BadInput, match=f"names tensors that are not where it says\nmodel.gone.weight: not in {names[0]}"
    ):
        Checkpoint(shards)
    index_of(shards, lambda told: told | {"model.gone.weight": "../other.safetensors"})
    with pytest.raises(BadInput, match=r"names files outside of its folder: \.\./other\.safetensors"):
        Checkpoint(shards)


def test_a_tensor_in_two_shards_is_refused(shards: Path) -> None:
    first, second = sorted(shards.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second, {"format": "pt"})
    with pytest.raises(BadInput, match=f"holds tensors twice\n{name}: in {first.name} and in {second.name}"):
        Checkpoint(shards)


def test_an_empty_shard_is_refused(shards: Path) -> None:
    first = min(shards.glob("*.safetensors"))
    first.write_bytes(b"")
    with pytest.raises(BadInput, match=f"{first.name}: is not a whole safetensors file"):
        Checkpoint(shards)


def test_one_file_beside_shards_is_what_counts_and_must_be_whole(shards: Path, checkpoint_folder: Path) -> None:
    tensors = load_file(checkpoint_folder / "model.safetensors")
    save_file(without(UP)(tensors), shards / "model.safetensors", {"format": "pt"})
    for reader in READERS.values():
        with pytest.raises(BadInput, match=f"{UP}: missing"):
            reader(shards)


def test_a_header_whose_sizes_do_not_fit_is_refused(checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = rewritten(checkpoint_folder, tmp_path / "model", lambda t: t)
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw.replace(b"[128,64]", b"[256,64]", 1))
    with pytest.raises(BadInput, match="32768 bytes are no F32 tensor of shape"):
        Checkpoint(folder)


# names in memory that are no names in the files


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_stacked_experts_are_known_before_training(family: str, tmp_path: Path) -> None:
    import transformers

    from edgeft.machines.profile import load_profile
    from edgeft.memory.train_step import Workload
    from edgeft.planning.candidates import candidates
    from edgeft.planning.job_checks import check_job
    from edgeft.settings.job import Job

    experts = {"num_experts": 4, "moe_intermediate_size": 32} if family == "Qwen3Moe" else {"num_local_experts": 4}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts_per_tok=2, head_dim=8, max_position_embeddings=64, **experts,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    spec = read_model_spec(str(tmp_path))
    assert any(name.endswith("experts.gate_up_proj") for name in spec.stacked)
    with pytest.raises(BadInput, match=r"put together from several tensors .*\n\nhint: use tuner=lora"):
        check_job(Job(model=str(tmp_path), tuner="full"), spec)
    open_job, work = Job(model=str(tmp_path)), Workload(16, 16)
    ways = list(candidates(open_job, load_profile("cpu-8gb"), spec, work, 4, None))
    assert ways and all(way.tuner == "lora" for way in ways)
    assert read_model_spec("examples/configs/llama-3.1-8b").stacked == ()


def test_a_head_that_memory_and_files_name_apart_trains_and_merges(
    tokenizer_folder: Path, tmp_path: Path, write_rows: Any
) -> None:
    """GPT-NeoX's files say embed_out, transformers 5 says lm_head."""
    from tiny import ROWS, run
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from edgeft.merging.merge import merge
    from edgeft.planning.plan import make_plan
    from edgeft.progress import silent
    from edgeft.settings.job import make_job

    config = GPTNeoXConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    base = tmp_path / "base"
    GPTNeoXForCausalLM(config).save_pretrained(base)
    for path in tokenizer_folder.iterdir():
        shutil.copyfile(path, base / path.name)
    data = write_rows("rows.jsonl", ROWS)
    job = make_job(
        model=str(base), profile="cpu-8gb", data=str(data), tuner="full", max_steps=2, eval_rows=4, learning_rate=1e-2
    )
    make_plan(job).write(tmp_path / "plan.json")
    result = run(tmp_path / "plan.json", tmp_path / "train")
    moved = {unit.unit: unit.relative_change for unit in result.units}
    merge(tmp_path / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    before, after = load_plain(base).state_dict(), load_plain(tmp_path / "merged").state_dict()
    assert moved["head"] > 0 and not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert "embed_out.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    changed = load_file(tmp_path / "train" / "changed.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in changed.items())
