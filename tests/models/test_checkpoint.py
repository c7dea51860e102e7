"""Does a checkpoint come out as it went in, tensor by tensor, and is every damaged folder named?"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgeft.documents import Artifact, cache_folder, staging
from edgeft.engine.nf4_base import compute_in, load_base, quantised_folder
from edgeft.errors import BadInput, EdgeftError
from edgeft.machines.meter import LiveBytes
from edgeft.models.checkpoint import (
    SAFETENSORS_DTYPES,
    Checkpoint,
    TensorFile,
    copy_side_files,
    load_plain,
    quiet_transformers,
    write_checkpoint,
)
from edgeft.models.headers import local_folder, weight_files
from edgeft.models.identity import weights_sha256
from edgeft.settings.job import Training

SHARDED_INDEX = "model.safetensors.index.json"


def same(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@pytest.fixture(scope="module")
def forms(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tiny Llama as one file, in shards, in bfloat16, and in bfloat16 shards."""
    made = {"one file": checkpoint_folder}
    for name, dtype, shard in [
        ("shards", torch.float32, "100KB"),
        ("bf16", torch.bfloat16, "1GB"),
        ("bf16 shards", torch.bfloat16, "50KB"),
    ]:
        made[name] = tmp_path_factory.mktemp("form")
        load_plain(checkpoint_folder, dtype).save_pretrained(made[name], max_shard_size=shard)
    return made


FORMS = ["one file", "shards", "bf16", "bf16 shards"]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors by safetensors' own reader."""
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def identical(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


# reading


def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        code: torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
        if dtype == torch.bool
        else (torch.randn(3, 5, generator=generator) * 20).to(dtype)
        for code, dtype in SAFETENSORS_DTYPES.items()
    }
    tensors |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "cube": torch.arange(24.0).view(2, 3, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "note": "é"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert identical({name: file.read(name) for name in file.entries}, tensors)
    assert file.metadata == {"format": "pt", "note": "é"}
    file.read("F32").zero_()  # memory of its own: neither the file nor a second reader changes
    assert torch.equal(file.read("F32"), tensors["F32"])


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_by_tensor_name(form: str, forms: dict[str, Path]) -> None:
    checkpoint, expected = Checkpoint(forms[form]), tensors_of(forms[form])
    assert (len(checkpoint.files) > 1) == ("shards" in form)
    assert identical({name: checkpoint.read(name) for name in checkpoint.owner}, expected)
    assert {name: checkpoint.shape(name) for name in expected} == {n: tuple(t.shape) for n, t in expected.items()}
    assert "lm_head.weight" in checkpoint and "lm_head.bias" not in checkpoint


# writing


@pytest.mark.parametrize("form", FORMS)
def test_writing_without_a_change_is_the_identity(form: str, forms: dict[str, Path], tmp_path: Path) -> None:
    source = Checkpoint(forms[form])
    steps = list(write_checkpoint(source, tmp_path, same))
    assert identical(tensors_of(tmp_path), tensors_of(forms[form]))
    assert sorted(name for name, _, _ in steps) == sorted(source.owner)
    assert [(done, total) for _, done, total in steps] == [(i + 1, len(source.owner)) for i in range(len(source.owner))]
    names = sorted(path.name for path in forms[form].glob("model*.safetensors*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for file in source.files:
        copy = tmp_path / file.path.name
        assert copy.stat().st_size == file.path.stat().st_size
        with safe_open(copy, "pt") as copied, safe_open(file.path, "pt") as original:
            assert copied.metadata() == original.metadata() == {"format": "pt"}
        assert (8 + struct.unpack("<Q", copy.read_bytes()[:8])[0]) % 8 == 0
    if "shards" in form:
        indices = [json.loads((folder / SHARDED_INDEX).read_text()) for folder in (tmp_path, forms[form])]
        assert indices[0]["weight_map"] == indices[1]["weight_map"]
        assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_loads_in_transformers_with_the_same_logits(
    form: str, forms: dict[str, Path], tmp_path: Path
) -> None:
    list(write_checkpoint(Checkpoint(forms[form]), tmp_path, same))
    copy_side_files(forms[form], tmp_path)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        logits = [load_plain(folder)(input_ids=ids).logits for folder in (forms[form], tmp_path)]
    assert torch.equal(*logits)


def test_each_tensor_goes_through_the_change(forms: dict[str, Path], tmp_path: Path) -> None:
    def double_norms(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() * 2 if "norm" in name else tensor  # comes back in its own dtype

    list(write_checkpoint(Checkpoint(forms["bf16 shards"]), tmp_path, double_norms))
    expected = {n: t * 2 if "norm" in n else t for n, t in tensors_of(forms["bf16 shards"]).items()}
    assert identical(tensors_of(tmp_path), expected)
    assert any("norm" in name for name in expected)


def test_a_trained_parameter_may_be_the_change(forms: dict[str, Path], tmp_path: Path) -> None:
    list(
        write_checkpoint(
            Checkpoint(forms["one file"]),
            tmp_path,
            lambda _, t: torch.nn.Parameter(t.mT.clone().mT if t.ndim > 1 else t),
        )
    )
    assert identical(tensors_of(tmp_path), tensors_of(forms["one file"]))


def test_another_dtype_is_for_floating_tensors_only(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(4, 3), "steps": torch.arange(7), "mask": torch.tensor([True, False, True])}
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    list(write_checkpoint(Checkpoint(tmp_path / "in"), tmp_path / "out", same, dtype=torch.bfloat16))
    assert identical(tensors_of(tmp_path / "out"), tensors | {"w": tensors["w"].bfloat16()})


def test_a_changed_shape_is_refused(forms: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        list(write_checkpoint(Checkpoint(forms["one file"]), tmp_path, lambda _, tensor: tensor[:1]))
    name = caught.value.where
    shape = list(tensors_of(forms["one file"])[name].shape)
    assert str(caught.value) == f"{name}: changed its shape from {shape} to {[1, *shape[1:]]}"


def test_a_single_shard_keeps_its_name_and_gets_its_index(forms: dict[str, Path], tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    name = "model-00001-of-00001.safetensors"
    shutil.copyfile(forms["one file"] / "model.safetensors", source / name)
    weight_map = dict.fromkeys(tensors_of(source), name)
    (source / SHARDED_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    list(write_checkpoint(Checkpoint(source), out, same))
    assert [path.name for path in weight_files(out)] == [name]
    assert identical(tensors_of(out), tensors_of(source))


def test_one_tensor_at_a_time_is_in_memory(forms: dict[str, Path], tmp_path: Path) -> None:
    source = Checkpoint(forms["one file"])
    sizes = [tensor.nbytes for tensor in tensors_of(forms["one file"]).values()]
    with LiveBytes() as live:
        list(write_checkpoint(source, tmp_path, lambda _, tensor: tensor + 0))
    assert max(sizes) <= live.peak_bytes <= 3 * max(sizes) < sum(sizes)


def test_config_tokenizer_and_template_are_copied_and_no_weights(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "folder.json").mkdir(parents=True)
    out.mkdir()
    kept = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt"]
    kept += ["chat_template.jinja", "tokenizer.model", "vocab.json"]
    left = ["model.safetensors", SHARDED_INDEX, "pytorch_model.bin", "trainer_state.json", "pretraining.json"]
    for name in kept + left:
        (source / name).write_text(name)
    copy_side_files(source, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(kept)
    assert all((out / name).read_text() == name for name in kept)


# damaged and strange folders


@pytest.mark.parametrize("lost", [1, 1000])
def test_a_truncated_file_says_how_long_it_should_be(lost: int, checkpoint_folder: Path, tmp_path: Path) -> None:
    data = (checkpoint_folder / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(data[:-lost])
    with pytest.raises(BadInput) as caught:
        Checkpoint(tmp_path)
    problem = f"is {len(data) - lost} bytes long, its header says {len(data)}"
    assert str(caught.value) == f"{path}: {problem}\n\nhint: copy it again"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "unpack requires a buffer of 8 bytes"),
        (b"abc", "unpack requires a buffer of 8 bytes"),
        (struct.pack("<Q", 10**12) + b"{}", "header is longer than the file"),
        (struct.pack("<Q", 4) + b"{no}", "Expecting property name"),
        (struct.pack("<Q", 2) + b"[]", "its header is no object"),
        (struct.pack("<Q", 2) + b"\xff\xff", "'utf-8' codec can't decode"),
    ],
)
def test_what_is_no_safetensors_file(data: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=rf"is not a whole safetensors file: ({problem})") as caught:
        TensorFile(path)
    assert (caught.value.where, caught.value.hint) == (str(path), "copy or download it again")


def test_a_missing_file_and_a_type_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(BadInput) as caught:
        TensorFile(path)
    hint = "copy or download the whole checkpoint again"
    assert str(caught.value) == f"{tmp_path}: model.safetensors is missing\n\nhint: {hint}"
    save_file({"w": torch.zeros(4, dtype=torch.complex64), "b": torch.zeros(4)}, path)
    with pytest.raises(BadInput) as caught:
        TensorFile(path)
    problem = "holds tensors of a type that is not read here: C64"
    hint = "load it with transformers and save it in bfloat16"
    assert str(caught.value) == f"{path}: {problem}\n\nhint: {hint}"


@pytest.mark.parametrize(
    ("files", "problem", "hint"),
    [
        ({}, "holds no weights (model.safetensors)", "give a folder written by save_pretrained"),
        (
            {"pytorch_model-00001-of-00002.bin": b"PK"},
            "holds pickled weights (pytorch_model-00001-of-00002.bin): only model.safetensors and its shards are read",
            "edgeft doctor FOLDER says what can be done",
        ),
        (
            {
                "adapter_config.json": b'{"base_model_name_or_path": "org/base"}',
                "adapter_model.safetensors": b"",
            },
            "is an adapter of 'org/base', not a model",
            "edgeft doctor FOLDER says what can be done",
        ),
        (
            {SHARDED_INDEX: b'{"weight_map": {"a": "x", "b": "here", "c": "y", "d": "x"}}', "here": b""},
            "shards are missing: x, y",
            "copy or download the whole checkpoint",
        ),
    ],
)
def test_folders_without_usable_weights(files: dict[str, bytes], problem: str, hint: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as caught:
        weight_files(tmp_path)
    assert str(caught.value) == f"{tmp_path}: {problem}\n\nhint: {hint.replace('FOLDER', str(tmp_path))}"


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": []}'])
def test_a_broken_shard_index(content: str, tmp_path: Path) -> None:
    (tmp_path / SHARDED_INDEX).write_text(content)
    with pytest.raises(BadInput, match=r"model\.safetensors\.index\.json: is not a shard index: "):
        weight_files(tmp_path)


def test_a_single_file_goes_before_an_index_as_in_transformers(forms: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(forms["shards"], tmp_path, dirs_exist_ok=True)
    tensors = {name: tensor * 0 + 1 for name, tensor in tensors_of(tmp_path).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert (load_plain(tmp_path).lm_head.weight == 1).all()


@pytest.mark.parametrize("name", ["{tmp}/missing", "./missing", "../missing", "a/b/c"])
def test_a_model_folder_that_is_not_there(name: str, tmp_path: Path) -> None:
    name = name.format(tmp=tmp_path)
    with pytest.raises(BadInput) as caught:
        local_folder(name)
    hint = "give a folder with config.json, or a hub id such as org/name"
    assert str(caught.value) == f"{name}: no such model folder\n\nhint: {hint}"


def test_a_hub_id_is_fetched_and_a_failure_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(model: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if model != "org/name" or "*.safetensors" not in allow_patterns or "*.bin" in allow_patterns:
            raise ConnectionError("offline")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert local_folder(str(tmp_path)) == local_folder("org/name") == tmp_path
    with pytest.raises(BadInput) as caught:
        local_folder("org/other")
    problem = "is no folder and could not be fetched as a hub model: offline"
    hint = "check the name and the network, or download it once and give the folder"
    assert str(caught.value) == f"org/other: {problem}\n\nhint: {hint}"


# loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_plain(dtype: torch.dtype, forms: dict[str, Path]) -> None:
    model = load_plain(forms["bf16"], dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training and model.config.use_cache is False
    assert identical(
        {name: parameter.detach() for name, parameter in model.named_parameters()},
        {name: tensor.to(dtype) for name, tensor in tensors_of(forms["bf16"]).items()},
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text('{"model_type": "nothing"}'),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100),
    ],
    ids=["no config", "unknown type", "broken config", "no weights", "broken weights"],
)
def test_what_transformers_cannot_load_is_a_bad_input(
    damage: Callable[[Path], Any], checkpoint_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_folder, folder)
    damage(folder)
    with pytest.raises(BadInput) as caught:
        load_plain(folder)
    assert str(caught.value).startswith(str(folder))


def test_quiet_transformers_leaves_the_logger_as_it_was() -> None:
    logger = logging.getLogger("transformers")
    before = logger.level
    with pytest.raises(RuntimeError, match="inside"), quiet_transformers():
        assert logger.level == logging.ERROR
        raise RuntimeError("inside")
    assert logger.level == before


def training(base_precision: str, compute_dtype: str = "fp32") -> Training:
    return Training.model_validate(
        {
            "device": "cpu", "tuner": "lora", "base_precision": base_precision,
            "compute_dtype": compute_dtype, "trained_layers": (0, 1),
            "micro_batch_size": 1, "batch_size": 1,
            "max_length": 8, "max_trained": 8, "checkpointing": False, "loss_chunk_tokens": 16,
            "optimizer": "adamw",
            "learning_rate": 1e-3, "steps": 1, "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
            "seed": 0, "checkpoint_steps": None, "eval_rows": 1,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kept", "compute", "expected"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("bf16", torch.float32, torch.float32),  # a device that cannot compute in bf16
        ("fp32", torch.bfloat16, torch.float32),
    ],
)
def test_a_dense_base_is_kept_as_planned(
    kept: str, compute: torch.dtype, expected: torch.dtype, checkpoint_folder: Path
) -> None:
    model = load_base(checkpoint_folder, training(kept), torch.device("cpu"), compute)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_the_nf4_base_is_quantised_once_and_kept(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "edgeft"
    cached = quantised_folder(checkpoint_folder)
    assert cached.parent == tmp_path / "edgeft" / "nf4" and not cached.exists()
    cpu, ids = torch.device("cpu"), torch.arange(5, 25)[None]
    first = load_base(checkpoint_folder, training("nf4"), cpu, torch.float32)
    written = (cached / "model-00001.safetensors").stat().st_mtime_ns
    again = load_base(checkpoint_folder, training("nf4"), cpu, torch.float32)
    assert (cached / "model-00001.safetensors").stat().st_mtime_ns == written
    maps = Path("/proc/self/maps")
    assert not maps.is_file() or str(cached) not in maps.read_text()  # or its touched pages would count as memory
    linears = [module for module in again.modules() if type(module).__name__ == "Linear4bit"]
    assert len(linears) == 2 * 7 and {module.compute_dtype for module in linears} == {torch.float32}
    with torch.no_grad():
        dense = load_plain(checkpoint_folder)(input_ids=ids).logits
        kept, fresh = again(input_ids=ids).logits, first(input_ids=ids).logits
    assert torch.equal(kept, fresh)
    error = float((kept - dense).norm() / dense.norm())
    assert 1e-4 < error < 0.25  # four bits: not the same, not far
    compute_in(again, torch.bfloat16)  # what is not quantised must follow, and what is unpacked
    assert {p.dtype for p in again.parameters()} == {torch.uint8, torch.bfloat16}
    assert {module.weight.quant_state.dtype for module in linears} == {torch.bfloat16}


def test_the_hash_of_the_weights_changes_with_any_byte(
    checkpoint_folder: Path, forms: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint_folder, copy)
    assert weights_sha256(copy) == weights_sha256(checkpoint_folder)
    assert quantised_folder(copy) == quantised_folder(checkpoint_folder)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    digests = {weights_sha256(folder) for folder in (copy, *forms.values())}
    assert len(digests) == 5
    shutil.copyfile(checkpoint_folder / "model.safetensors", copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert weights_sha256(copy) == weights_sha256(checkpoint_folder)
    assert quantised_folder(copy) != quantised_folder(checkpoint_folder)


# a full disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_while_the_weights_are_written(
    code: int, forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third tensor does not fit any more: what was there before stays, nothing half-written does."""
    out = tmp_path / "merged"
    out.mkdir()
    (out / "merged.json").write_text("old")
    real, calls = open, []

    class Full:
        def __init__(self, path: Path, mode: str) -> None:
            self.file = real(path, mode)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            calls.append(len(data))
            if len(calls) > 4:  # length and header come first
                raise OSError(code, "no space left")
            return self.file.write(data)

    def fake_open(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        return Full(path, mode) if mode == "wb" else real(path, mode, *args, **options)

    monkeypatch.setattr("edgeft.models.checkpoint.open", fake_open, raising=False)
    with pytest.raises(EdgeftError) as caught, staging(out) as folder:
        list(write_checkpoint(Checkpoint(forms["one file"]), folder, same))
    assert len(calls) == 5
    assert str(caught.value).startswith(f"{out}: the disk is full (") and caught.value.exit_code == 1
    assert caught.value.hint.startswith("free some space or choose another place with --out")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert [path.name for path in out.iterdir()] == ["merged.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_really_full_disk(forms: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EdgeftError, match="out: the disk is full"), staging(tmp_path / "out") as folder:
        (folder / "model.safetensors").symlink_to("/dev/full")
        list(write_checkpoint(Checkpoint(forms["one file"]), folder, same))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_a_document_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    Artifact(input_sha256="old").write(path)

    def full(self: Path, text: str, **_: Any) -> int:
        self.write_bytes(text.encode()[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(EdgeftError, match=r"plan\.json: the disk is full \(.* left\)"):
        Artifact(input_sha256="new").write(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
    assert Artifact.read(path).input_sha256 == "old"
