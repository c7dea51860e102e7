"""Is every folder that people point a trainer at named for what it is, and is what can be repaired made whole?"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_folders import (
    CASES,
    IN_TEXT,
    TEXT,
    UP,
    configured,
    copied,
    dcp,
    not_finite,
    pickled,
    renamed,
    sharded,
    tensors_of,
    zero,
)
from safetensors.torch import load_file, save_file

from edgeft.api import doctoring
from edgeft.documents import sha256_file
from edgeft.errors import BadInput, DoesNotFit, EdgeftError
from edgeft.models.checkpoint import load_plain
from edgeft.models.doctor import repair as repairs
from edgeft.models.doctor import stores
from edgeft.models.doctor.diagnose import diagnose
from edgeft.models.doctor.findings import Repaired
from edgeft.models.spec import read_model_spec

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_named_and_refused_or_repaired(
    name: str, checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says first, that a plan refuses what training would get wrong, and the repaired model's logits."""
    monkeypatch.chdir(tmp_path)
    case, folder, out = CASES[name], tmp_path / "a folder", tmp_path / "out"
    case.make(checkpoint_folder, folder)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    found = diagnose(folder)
    assert (found.verdict, case.says in found.reason) == (case.verdict, True), found
    if found.verdict != "usable" and not any(word in case.says for word in IN_TEXT):
        with pytest.raises(BadInput) as refused:
            read_model_spec(str(folder))
        assert not case.repair or "edgeft doctor" in str(refused.value) or "is not JSON" in str(refused.value)
    base = str(checkpoint_folder) if case.repair == "base" else None
    if not case.repair:
        if found.verdict == "not usable":
            with pytest.raises(BadInput):
                doctoring.repair(folder, out)
        assert not out.exists()
        return
    if base is not None:
        with pytest.raises(BadInput, match="no base is named"):
            doctoring.repair(folder, out)
    made = doctoring.repair(folder, out, base=base)
    assert diagnose(out).verdict == "usable" and made.exact == case.exact
    assert torch.equal(logits(load_plain(out)), logits(case.reference(checkpoint_folder, folder)))
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before
    assert not list(tmp_path.rglob("was-run"))


def test_there_are_enough_kinds() -> None:
    assert len(CASES) >= 45 and sum(bool(case.repair) for case in CASES.values()) >= 25


def test_a_repair_says_what_it_read_and_did(checkpoint_folder: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    pickled()(checkpoint_folder, folder)
    made = doctoring.repair(folder, out)
    assert Repaired.read(out / "doctor.json") == made
    assert made.sources["pytorch_model.bin"] == sha256_file(folder / "pytorch_model.bin")
    assert made.files["model.safetensors"] == sha256_file(out / "model.safetensors")
    assert made.done[0] == "the weights are pickled weights: written as safetensors" and len(made.done) == 2
    assert made.before.verdict == "repairable" and made.exact
    with pytest.raises(BadInput, match="is usable as it is: there is nothing to repair"):
        doctoring.repair(out, tmp_path / "again")


def test_whole_files_are_copied_byte_for_byte(checkpoint_folder: Path, tmp_path: Path) -> None:
    """Where nothing is wrong with the weights they are not written anew."""
    sharded(checkpoint_folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    doctoring.repair(tmp_path / "model", tmp_path / "out", base=str(checkpoint_folder))
    for path in (tmp_path / "model").glob("model*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_head_is_taken_from_the_base_or_tied_as_there(
    checkpoint_folder: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    CASES["no head"].make(checkpoint_folder, folder)
    doctoring.repair(folder, tmp_path / "own", base=str(checkpoint_folder))
    head = load_file(tmp_path / "own" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, tensors_of(checkpoint_folder)["lm_head.weight"])
    tied = copied(folder, tmp_path / "tied base")
    configured(tie_word_embeddings=True)(tied, tmp_path / "base")
    doctoring.repair(folder, tmp_path / "tied", base=str(tmp_path / "base"))
    model = load_plain(tmp_path / "tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_several_faults_are_repaired_at_once(checkpoint_folder: Path, tmp_path: Path) -> None:
    """What Trainer leaves of a compiled model under FSDP: shards alone, no config, no tokenizer."""
    folder, base = tmp_path / "checkpoint-2", str(checkpoint_folder)
    dcp("pytorch_model_fsdp_0", lambda t: {"model": {f"_orig_mod.{n}": v for n, v in t.items()}})(
        checkpoint_folder, folder)  # fmt: skip
    for name in ("config.json", "generation_config.json", *TEXT):
        (folder / name).unlink(missing_ok=True)
    (folder / "trainer_state.json").write_text("{}")
    found = diagnose(folder)
    assert [each.code for each in found.wrong] == ["config", "form", "names", "tokenizer"]
    assert found.command.endswith("checkpoint-2 --base MODEL --repair OUT") and found.kind.endswith("by Trainer")
    made = doctoring.repair(folder, tmp_path / "out", base=base)
    assert torch.equal(logits(load_plain(tmp_path / "out")), logits(load_plain(checkpoint_folder)))
    assert {"config.json", "tokenizer.json"} <= made.base_sources.keys() and made.exact


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_in_another_order_are_another_model(stage: int, checkpoint_folder: Path, tmp_path: Path) -> None:
    """The comparison of logits sees what no header tells: two ranks' files exchanged."""
    zero(stage)(checkpoint_folder, tmp_path / "model")
    first, second = sorted((tmp_path / "model" / "global_step2").glob("*_optim_states.pt"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    doctoring.repair(tmp_path / "model", tmp_path / "out")
    assert not torch.equal(logits(load_plain(tmp_path / "out")), logits(load_plain(checkpoint_folder)))


def test_a_base_of_other_shapes_repairs_nothing(
    checkpoint_folder: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    CASES["no config"].make(checkpoint_folder, tmp_path / "model")
    other = copied(bases["gpt2"], tmp_path / "gpt2")
    shutil.copyfile(checkpoint_folder / "tokenizer.json", other / "tokenizer.json")
    with pytest.raises(BadInput, match=r"cannot be repaired: \d+ tensors are not those of config\.json"):
        doctoring.repair(tmp_path / "model", tmp_path / "out", base=str(other))
    assert not (tmp_path / "out").exists()


# text


def test_tokens_without_a_row(checkpoint_folder: Path, tmp_path: Path) -> None:
    """Ids that text cannot do without are wrong; others, which some models ship, are a note."""
    from tokenizers import AddedToken, Tokenizer

    for place, token, template in (("spare", "<spare>", False), ("used", "<turn>", True)):
        folder = copied(checkpoint_folder, tmp_path / place)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(token, special=True)])
        tokenizer.save(str(folder / "tokenizer.json"))
        if template:
            text = (folder / "chat_template.jinja").read_text()
            (folder / "chat_template.jinja").write_text(token + text)
    spare, used = diagnose(tmp_path / "spare"), diagnose(tmp_path / "used")
    assert spare.verdict == "usable" and "rows" in [each.code for each in spare.findings]
    assert used.verdict == "not usable" and used.reason == "the tokenizer has ids up to 400, the embedding has 400 rows"
    made = doctoring.repair(tmp_path / "used", tmp_path / "out", base=str(checkpoint_folder))
    assert made.files["tokenizer.json"] == sha256_file(checkpoint_folder / "tokenizer.json")


def test_templates_and_end_tokens(checkpoint_folder: Path, tmp_path: Path) -> None:
    bare = copied(checkpoint_folder, tmp_path / "bare", "chat_template.jinja")
    found = diagnose(bare)
    assert found.verdict == "usable" and not found.chat_template and found.end_ids == (0,)
    doctoring.repair(bare, tmp_path / "out", base=str(checkpoint_folder))
    assert (tmp_path / "out" / "chat_template.jinja").read_text().startswith("{% for message")
    [note] = [each for each in diagnose(checkpoint_folder).findings if each.code == "end tokens"]
    assert "the template ends an answer with '<|im_end|>' (2), the end tokens are 0" in note.problem
    doctoring.repair(checkpoint_folder, tmp_path / "ends")
    assert json.loads((tmp_path / "ends" / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert not diagnose(tmp_path / "ends").findings
    configured(eos_token_id=4000)(checkpoint_folder, tmp_path / "strange")
    (tmp_path / "strange" / "generation_config.json").unlink(missing_ok=True)
    assert diagnose(tmp_path / "strange").reason == "the end token 4000 is no id of the tokenizer"


def test_older_tokenizer_files_become_the_one_that_is_read(tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer

    folder = tmp_path / "model"
    from tiny import save_model

    save_model(folder, "gpt2")
    vocab = {character: at for at, character in enumerate(["<|endoftext|>", *map(chr, range(33, 127)), "\u0120"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert diagnose(folder).reason == "there is no tokenizer.json, only vocab.json and merges.txt"
    doctoring.repair(folder, tmp_path / "out")
    assert GPT2Tokenizer.from_pretrained(tmp_path / "out")("a b")["input_ids"] == [
        vocab["a"],
        vocab["\u0120"],
        vocab["b"],
    ]


# values


def test_numbers_that_are_not_finite_are_named_when_asked(checkpoint_folder: Path, tmp_path: Path) -> None:
    not_finite(checkpoint_folder, tmp_path / "model")
    assert doctoring.doctor(tmp_path / "model").verdict == "usable"
    found = doctoring.doctor(tmp_path / "model", values=True)
    assert found.verdict == "not usable" and found.wrong[0].names == (f"{UP}: 1 of 8192",)


# what else may be the matter with a disk


def test_a_huge_folder_is_looked_at_by_its_headers(checkpoint_folder: Path, tmp_path: Path) -> None:
    """A file of 100 GB, most of it a hole: nothing of it is read."""
    from edgeft.models.headers import Header

    configured(vocab_size=400_000_000)(checkpoint_folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    header, at = dict(Header(path).entries), 0
    for name, entry in header.items():
        shape = [400_000_000, 64] if entry["shape"][0] == 400 else entry["shape"]
        size = 4 * torch.Size(shape).numel()
        header[name], at = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}, at + size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    found = diagnose(tmp_path / "model")
    assert found.verdict == "usable" and found.size_bytes > 200e9
    shutil.copyfile(tmp_path / "model" / "config.json", tmp_path / "config.json")
    renamed(lambda name: "module." + name)(checkpoint_folder, tmp_path / "small")


def test_no_room_is_said_before_anything_is_written(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled()(checkpoint_folder, tmp_path / "model")
    monkeypatch.setattr(repairs.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(DoesNotFit, match=r"the repaired folder takes .* 1000 B are free here"):
        doctoring.repair(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_input_is_never_written_to(checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    pickled()(checkpoint_folder, folder)
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert diagnose(tmp_path / "link").verdict == "repairable"
    for out in (folder, folder / "inside", tmp_path, tmp_path / "link"):
        with pytest.raises(BadInput, match=r"is not apart from what is read|it will not be replaced"):
            doctoring.repair(folder, out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("kept")
    with pytest.raises(BadInput, match=r"holds no doctor\.json: it will not be replaced"):
        doctoring.repair(folder, tmp_path / "other")
    doctoring.repair(tmp_path / "link", tmp_path / "out")
    doctoring.repair(folder, tmp_path / "out")  # its own work it does replace


def test_a_repair_that_is_stopped_leaves_nothing(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled()(checkpoint_folder, tmp_path / "model")

    def stop(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        doctoring.repair(tmp_path / "model", tmp_path / "out", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_folder_that_changes_meanwhile_is_not_repaired(checkpoint_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model" / "pytorch_model.bin"
    pickled()(checkpoint_folder, tmp_path / "model")

    def touch(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        os.utime(path, ns=(1, 1))

    with pytest.raises(BadInput, match=r"changed while it was read: pytorch_model\.bin"):
        doctoring.repair(tmp_path / "model", tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_may_not_be_read(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BadInput, match="cannot be looked into: Permission denied"):
        diagnose(checkpoint_folder)


def test_what_a_repair_would_get_wrong_is_not_kept(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is looked at as anybody's folder is, before it gets its name."""
    zero(2)(checkpoint_folder, tmp_path / "model")
    stops = repairs.Source.make
    monkeypatch.setattr(repairs.Source, "make", lambda self, name: stops(self, name).T.contiguous())
    with pytest.raises(BadInput, match=r"changed its shape|did not make a model"):
        doctoring.repair(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["shards", "pickled", "FSDP, shards", "ZeRO stage 2", "bitsandbytes, 4 bits"])
def test_whatever_is_damaged_is_an_answer_or_an_error(kind: str, checkpoint_folder: Path, tmp_path: Path) -> None:
    """Bytes changed, cut and doubled, values of JSON exchanged: no traceback, and nothing of it runs."""
    CASES[kind].make(checkpoint_folder, tmp_path / "model")
    files = sorted(path for path in (tmp_path / "model").rglob("*") if path.is_file())
    for seed in range(60):
        chance = random.Random(seed)
        path = chance.choice(files)
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, path.suffix, chance))
        with contextlib.suppress(EdgeftError):
            diagnose(tmp_path / "model")
        path.write_bytes(whole)
    assert diagnose(tmp_path / "model").verdict == CASES[kind].verdict and not list(tmp_path.rglob("was-run"))


def damaged(whole: bytes, suffix: str, chance: random.Random) -> bytes:
    if suffix == ".json":
        document = json.loads(whole)
        name = chance.choice(list(document) or [""])
        document[name] = chance.choice([None, [], {}, "x", -1, 10**30, [1, None], {"a": 1}, True])
        return json.dumps(document).encode()
    if suffix == ".safetensors":
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        entry = header[chance.choice(list(header))]
        entry[chance.choice(list(entry))] = chance.choice([None, [], {}, "x", -1, 10**30, [1, None], [3, 1]])
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]
    at, content = chance.randrange(min(len(whole), 9000) or 1), bytearray(whole)
    content[at : at + chance.randrange(9)] = bytes(chance.randrange(256) for _ in range(chance.randrange(9)))
    return bytes(content)


def test_a_disk_full_of_folders_is_not_searched_through(checkpoint_folder: Path, tmp_path: Path) -> None:
    for name in range(30):
        for inner in range(30):
            (tmp_path / f"a{name}" / f"b{inner}").mkdir(parents=True)
    copied(checkpoint_folder, tmp_path / "z" / "model")
    looked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        scan = os.scandir
        patch.setattr(os, "scandir", lambda path: (looked.append(path), scan(path))[1])
        assert diagnose(tmp_path).verdict == "not usable"
    assert 100 < len(looked) < 2500
    assert diagnose(tmp_path / "z").findings[0].names == ("model",)


def test_what_is_no_file_is_never_opened(checkpoint_folder: Path, tmp_path: Path) -> None:
    """A named pipe would wait for ever."""
    folder = copied(checkpoint_folder, tmp_path / "model", "model.safetensors")
    os.mkfifo(folder / "model.safetensors")
    assert diagnose(folder).reason == "config.json without weights: enough to plan, not to train"


@pytest.mark.parametrize("family", ["olmo", "starcoder2"])
def test_a_family_that_only_transformers_knows_is_counted(family: str, tmp_path: Path) -> None:
    from tiny import save_model

    whole = save_model(tmp_path / "model", family)
    assert whole.counted_from == "meta model"
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    lost = tensors.pop("model.layers.1.self_attn.o_proj.weight")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        BadInput, match=f"{lost.numel():,} of the model's {whole.total_parameters:,} parameters are missing"
    ):
        read_model_spec(str(tmp_path / "model"))
    assert "1 tensors are not those of config.json" in [each.problem for each in diagnose(tmp_path / "model").findings]


def test_two_shards_with_one_tensor(checkpoint_folder: Path, tmp_path: Path) -> None:
    """The same bytes twice are one tensor; other values are not to be chosen between."""
    for place, change in (("same", 0.0), ("other", 1.0)):
        sharded(checkpoint_folder, tmp_path / place)
        first, second = sorted((tmp_path / place).glob("model-*.safetensors"))[:2]
        name, tensor = next(iter(load_file(first).items()))
        save_file(load_file(second) | {name: tensor + change}, second, {"format": "pt"})
    assert diagnose(tmp_path / "other").reason == "tensors are in two files, with different values"
    assert diagnose(tmp_path / "same").reason == "tensors are in two files, with the same values"
    doctoring.repair(tmp_path / "same", tmp_path / "out")
    assert torch.equal(logits(load_plain(tmp_path / "out")), logits(load_plain(checkpoint_folder)))


def test_a_file_instead_of_a_folder(checkpoint_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is a file of another kind, not a folder"):
        diagnose(checkpoint_folder / "config.json")
    with pytest.raises(BadInput, match="no such folder"):
        diagnose(tmp_path / "absent")


def test_pieces_of_a_pickle_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    from edgeft.models.doctor.pickles import Reader, state_dict

    whole = torch.arange(120.0).reshape(10, 12)
    saved = {
        "whole": whole, "rows": whole[2:5], "block": whole[1:7, 3:5], "transposed": whole.T, "empty": torch.empty(0, 3),
        "half": whole.half(), "bf16": whole.bfloat16(), "whole numbers": torch.arange(5), "bits": whole > 50,
        "one": torch.tensor(3.5), "parameter": torch.nn.Parameter(whole[0]),
    }  # fmt: skip
    torch.save(saved, tmp_path / "file.bin")
    found = state_dict(Reader(tmp_path / "file.bin").tree)
    for name, tensor in torch.load(tmp_path / "file.bin", weights_only=True).items():
        assert torch.equal(found[name].read(), tensor) and found[name].read().dtype == tensor.dtype, name
    assert torch.equal(found["whole"].read(13, 20), whole.flatten()[13:33])
    content = (tmp_path / "file.bin").read_bytes()
    (tmp_path / "half.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match=r"is no whole file of torch\.save"):
        Reader(tmp_path / "half.bin")
    torch.save(saved, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(BadInput, match=r"was written by torch before 1\.6"):
        Reader(tmp_path / "old.bin")


def test_dcp_pieces_of_several_ranks_are_put_together(tmp_path: Path) -> None:
    """A tensor in four pieces, as two dimensions of sharding leave it, by the metadata's own types."""
    import pickle

    from torch.distributed.checkpoint import metadata as meta
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    whole, kept, chunks = torch.arange(24.0).reshape(4, 6), {}, []
    for at, (row, column) in enumerate(((0, 0), (0, 3), (2, 0), (2, 3))):
        path = tmp_path / f"__{at}_0.distcp"
        torch.save(whole[row : row + 2, column : column + 3].clone(), path)
        offset = torch.Size((row, column))
        chunks.append(meta.ChunkStorageMetadata(offset, torch.Size((2, 3))))
        kept[meta.MetadataIndex("w", offset, at)] = _StorageInfo(path.name, 0, path.stat().st_size)
    told = meta.TensorStorageMetadata(meta.TensorProperties(torch.float32), torch.Size((4, 6)), chunks)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(meta.Metadata({"w": told}, storage_data=kept)))
    assert torch.equal(stores.DcpStore(tmp_path).read("w"), whole)
    (tmp_path / "__3_0.distcp").unlink()
    with pytest.raises(BadInput, match=r"shards are missing: __3_0\.distcp"):
        stores.DcpStore(tmp_path)
