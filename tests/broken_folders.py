"""Folders that people point a trainer at, made by the writers that make them; what the doctor has to say of each."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234567\n"
# reasons that are about text, which a plan without data does not read; and what is enough to plan
IN_TEXT = ("tokenizer", "config.json without weights", "an adapter lies beside")
TEXT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Case:
    """`make(base, out)` writes a folder from a whole checkpoint; `repair`: "" none, "self", or "base" with --base.

    `reference(base, folder)` is the model that the repaired one must equal.
    """

    make: Callable[[Path, Path], Any]
    verdict: str
    says: str
    repair: str = ""
    reference: Callable[[Path, Path], Any] = lambda base, folder: model_of(base)
    exact: bool = True


def copied(base: Path, out: Path, *without: str) -> Path:
    shutil.copytree(base, out, ignore=shutil.ignore_patterns(*without))
    return out


def text_of(base: Path, out: Path) -> None:
    """config.json, tokenizer and template."""
    out.mkdir(exist_ok=True)
    for name in ("config.json", "generation_config.json", *TEXT):
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)


def tensors_of(base: Path) -> Tensors:
    return load_file(base / "model.safetensors")


def model_of(base: Path) -> Any:
    from edgeft.models.checkpoint import load_plain

    return load_plain(base)


def rewritten(change: Callable[[Tensors], Tensors], written_as: str = "pt") -> Callable[[Path, Path], None]:
    def make(base: Path, out: Path) -> None:
        copied(base, out, "model.safetensors")
        changed = {name: tensor.contiguous().clone() for name, tensor in change(tensors_of(base)).items()}
        save_file(changed, out / "model.safetensors", {"format": written_as})

    return make


def renamed(change: Callable[[str], str]) -> Callable[[Path, Path], None]:
    return rewritten(lambda tensors: {change(name): tensor for name, tensor in tensors.items()})


def configured(**values: Any) -> Callable[[Path, Path], None]:
    def make(base: Path, out: Path) -> None:
        copied(base, out)
        config = json.loads((out / "config.json").read_text()) | values
        (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))

    return make


def sharded(base: Path, out: Path) -> None:
    model_of(base).save_pretrained(out, max_shard_size="100KB")
    text_of(base, out)


def without_files(*names: str) -> Callable[[Path, Path], None]:
    return lambda base, out: copied(base, out, *names) and None


def files(**content: str | bytes) -> Callable[[Path, Path], None]:
    def make(base: Path, out: Path) -> None:
        out.mkdir()
        for name, text in content.items():
            path = out / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return make


# Trainer


def trainer(base: Path, out: Path, tokenizer: Any = None) -> Path:
    """What Trainer leaves in checkpoint-2: its optimizer beside the weights, and a tokenizer where it was given one."""
    from transformers import Trainer, TrainingArguments

    ids = [{"input_ids": [3, 1, 4, 1], "labels": [3, 1, 4, 1]}] * 4
    arguments = TrainingArguments(
        output_dir=str(out.parent / "run"), max_steps=2, save_steps=2, per_device_train_batch_size=1, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model=model_of(base), args=arguments, train_dataset=ids, processing_class=tokenizer).train()
    (out.parent / "run" / "checkpoint-2").rename(out)
    return out


# pickles


def pickled(wrap: Callable[[Tensors], Any] = lambda tensors: tensors, name: str = "pytorch_model.bin") -> Any:
    def make(base: Path, out: Path) -> None:
        text_of(base, out)
        torch.save(wrap(dict(model_of(base).state_dict())), out / name)

    return make


def pickled_shards(base: Path, out: Path) -> None:
    text_of(base, out)
    names = list(tensors := tensors_of(base))
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    for at, part in enumerate(parts, 1):
        torch.save({name: tensors[name] for name in part}, out / f"pytorch_model-0000{at}-of-00002.bin")
    told = {name: f"pytorch_model-0000{at}-of-00002.bin" for at, part in enumerate(parts, 1) for name in part}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": told}))


class Evil:
    """What would run when it is loaded by plain pickle."""

    def __reduce__(self) -> Any:
        return Path.write_text, (Path("was-run"), "yes")


# DeepSpeed: layouts as its engine writes them and its zero_to_fp32.py reads them


class ZeroStage(Enum):
    TWO = 2
    THREE = 3


def zero(stage: int, ranks: int = 2, groups: int = 2, frozen: tuple[str, ...] = (), lost: int = 0) -> Any:
    """A ZeRO checkpoint of a Trainer folder, in `ranks` parts and parameter groups."""

    def make(base: Path, out: Path) -> None:
        text_of(base, out)
        step = out / "global_step2"
        step.mkdir()
        (out / "latest").write_text("global_step2")
        (out / "zero_to_fp32.py").write_text("raise SystemExit('not to be run')\n")
        tensors = tensors_of(base)
        trained = {name: tensor for name, tensor in tensors.items() if name not in frozen}
        shapes: list[OrderedDict[str, torch.Size]] = [OrderedDict() for _ in range(groups)]
        for at, (name, tensor) in enumerate(trained.items()):
            shapes[at % groups][name] = tensor.shape
        flat = _parts(tensors, shapes, ranks, stage)
        common = {"buffer_names": [], "param_shapes": shapes, "ds_version": "0.17", "shared_params": {},
                  "frozen_param_shapes": OrderedDict((n, tensors[n].shape) for n in frozen) or None}  # fmt: skip
        for rank in range(ranks if stage == 3 else 1):
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
            kept = {n: _cut(tensors[n].flatten(), ranks)[rank] if stage == 3 else tensors[n] for n in frozen} or None
            module = {} if stage == 3 else {n: t.to(torch.bfloat16) for n, t in tensors.items()}
            torch.save(common | {"module": module, "frozen_param_fragments": kept}, step / name)
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        for rank in range(ranks - lost):
            state = {"zero_stage": ZeroStage(3 if stage == 3 else 2), "partition_count": ranks, key: flat[rank],
                     "loss_scaler": Evil()}  # fmt: skip
            torch.save({"optimizer_state_dict": state}, step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")

    return make


def _cut(vector: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """In equal parts, the last one padded."""
    each = math.ceil(vector.numel() / ranks)
    whole = torch.cat([vector, torch.zeros(each * ranks - vector.numel())])
    return [part.clone() for part in whole.split(each)]


def _parts(tensors: Tensors, shapes: Any, ranks: int, stage: int) -> list[list[torch.Tensor]]:
    """Of every rank its flat groups."""
    found: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    for group in shapes:
        if stage == 3:
            cut = [_cut(tensors[name].flatten(), ranks) for name in group]
            parts = [torch.cat([each[rank] for each in cut]) for rank in range(ranks)]
        else:
            flat = torch.cat([tensors[name].flatten() for name in group])
            padded = torch.cat([flat, torch.zeros(-flat.numel() % (2 * ranks))])
            parts = [part.clone() for part in padded.chunk(ranks)]
        for rank in range(ranks):
            found[rank].append(parts[rank])
    return found


def zero3_not_gathered(base: Path, out: Path) -> None:
    """Stage 3 without gathering: safetensors of empty tensors, the shards beside them."""
    zero(3)(base, out)
    save_file({name: torch.empty(0) for name in tensors_of(base)}, out / "model.safetensors", {"format": "pt"})


# torch.distributed.checkpoint


def dcp(inside: str, wrap: Callable[[Tensors], Any]) -> Callable[[Path, Path], None]:
    def make(base: Path, out: Path) -> None:
        import torch.distributed.checkpoint as dist

        text_of(base, out)
        writer = dist.FileSystemWriter(out / inside)
        dist.save(wrap(dict(model_of(base).state_dict())), storage_writer=writer, no_dist=True)

    return make


# quantised


def bitsandbytes(bits: int) -> Callable[[Path, Path], None]:
    def make(base: Path, out: Path) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        how: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        config = BitsAndBytesConfig(**(how if bits == 4 else {"load_in_8bit": True}))
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
        model.save_pretrained(out)
        for name in TEXT:
            if (base / name).is_file():
                shutil.copyfile(base / name, out / name)

    return make


def as_transformers_unpacks(base: Path, folder: Path) -> Any:
    """The model that a quantised folder is, by transformers' own dequantisation."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dequantize().float().eval()


def in_half(base: Path, folder: Path) -> Any:
    model = model_of(base)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model


def as_it_was_trained(base: Path, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


# other formats


def gguf(base: Path, out: Path) -> None:
    """A GGUF file of the model alone, by gguf's own writer."""
    from edgeft.models.spec import read_model_spec
    from edgeft.targets import gguf_file
    from edgeft.targets.target import load_target

    out.mkdir()
    gguf_file.build_model(base, load_target("gguf-f16"), read_model_spec(str(base)), out)


def gguf_cut(base: Path, out: Path) -> None:
    gguf(base, out)
    whole = (out / "model.gguf").read_bytes()
    (out / "model.gguf").write_bytes(whole[: len(whole) - 5000])


def lora(base: Path, out: Path) -> None:
    import peft

    peft.get_peft_model(model_of(base), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(out))


def lora_inside(base: Path, out: Path) -> None:
    """The state_dict of a model that PEFT has wrapped, adapter and all."""
    import peft

    text_of(base, out)
    wrapped = peft.get_peft_model(model_of(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    save_file({n: t.clone() for n, t in wrapped.state_dict().items()}, out / "model.safetensors", {"format": "pt"})


def encoder(base: Path, out: Path) -> None:
    from transformers import BertConfig, BertModel

    small = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    BertModel(small).save_pretrained(out)
    for name in TEXT:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)


def truncated(base: Path, out: Path) -> None:
    copied(base, out)
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def shard_lost(base: Path, out: Path) -> None:
    sharded(base, out)
    max(out.glob("model-*.safetensors")).unlink()


def index_lost(base: Path, out: Path) -> None:
    sharded(base, out)
    (out / "model.safetensors.index.json").unlink()


def index_forgets(base: Path, out: Path) -> None:
    """An index that names all shards but one."""
    sharded(base, out)
    path, last = out / "model.safetensors.index.json", max(out.glob("model-*.safetensors")).name
    told = json.loads(path.read_text())
    told["weight_map"] = {name: shard for name, shard in told["weight_map"].items() if shard != last}
    path.write_text(json.dumps(told))


def pointers(*names: str) -> Callable[[Path, Path], None]:
    def make(base: Path, out: Path) -> None:
        copied(base, out)
        for name in names:
            (out / name).write_text(LFS)

    return make


def link_lost(base: Path, out: Path) -> None:
    """A folder of the hub's cache whose blob was removed."""
    copied(base, out, "model.safetensors")
    (out / "model.safetensors").symlink_to(out.parent / "blobs" / "0000")


def below(base: Path, out: Path) -> None:
    for step in (500, 1000):
        copied(base, out / f"checkpoint-{step}")


def adapter_beside(base: Path, out: Path) -> None:
    copied(base, out)
    lora(base, out / "adapter")
    for path in (out / "adapter").glob("adapter*"):
        shutil.copyfile(path, out / path.name)
    shutil.rmtree(out / "adapter")


def not_finite(base: Path, out: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        tensors[UP][3, 4] = math.nan
        return tensors

    rewritten(change)(base, out)


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


CASES: dict[str, Case] = {
    "whole": Case(copied, "usable", ""),
    "shards": Case(sharded, "usable", ""),
    "Trainer's checkpoint": Case(trainer, "repairable", "there is no tokenizer", "base",
                                 as_it_was_trained),
    "no tokenizer": Case(without_files(*TEXT), "repairable", "there is no tokenizer", "base"),
    "no config": Case(without_files("config.json"), "repairable", "there is no config.json", "base"),
    "a broken config": Case(lambda b, o: copied(b, o).joinpath("config.json").write_text("{"), "repairable",
                            "config.json is not JSON", "base"),
    "no model_type": Case(configured(model_type="absent"), "repairable", "config.json has no model_type", "self"),
    "a config of other shapes": Case(configured(intermediate_size=96), "not usable", "are not those of config.json"),
    "other rows than vocab_size": Case(configured(vocab_size=390), "repairable",
                                       "vocab_size 390, the embedding has 400", "self"),
    "pickled": Case(pickled(), "repairable", "the weights are pickled weights", "self"),
    "pickled with other things": Case(pickled(lambda t: {"state_dict": t, "epoch": 3, "callback": Evil()}, "last.pt"),
                                      "repairable", "pickled weights under another name", "self"),
    "Lightning's": Case(
        pickled(lambda t: {"state_dict": {"model." + n: v for n, v in t.items()}, "loops": Evil()}, "last.ckpt"),
        "repairable", "pickled weights under another name", "self"),
    "a name of its own": Case(lambda b, o: copied(b, o).joinpath("model.safetensors").rename(o / "weights.safetensors"),
                              "repairable", "safetensors under another name", "self"),
    "MLX, unpacked": Case(rewritten(lambda tensors: tensors, "mlx"), "usable", ""),
    "a classifier": Case(configured(architectures=["LlamaForSequenceClassification"]), "not usable",
                         "is not a ...ForCausalLM"),
    "a link that leads nowhere": Case(link_lost, "not usable", "model.safetensors is a link to what is not there"),
    "pickled shards": Case(pickled_shards, "repairable", "the weights are pickled weights", "self"),
    "FSDP, whole": Case(pickled(name="pytorch_model_fsdp.bin"), "repairable", "pickled weights of FSDP", "self"),
    "FSDP, shards": Case(dcp("pytorch_model_fsdp_0", lambda t: {"model": t}), "repairable",
                         "torch.distributed.checkpoint shards", "self"),
    "DCP": Case(dcp("", lambda t: t), "repairable", "torch.distributed.checkpoint shards", "self"),
    "DCP with an optimizer": Case(
        dcp("model", lambda t: {"app": {"model": t, "optimizer": {"state": {"a": torch.ones(2)}}}}), "repairable",
        "torch.distributed.checkpoint shards", "self"),
    "ZeRO stage 2": Case(zero(2), "repairable", "DeepSpeed ZeRO shards", "self"),
    "ZeRO stage 2, frozen": Case(zero(2, 3, 1, frozen=(UP,)), "repairable", "DeepSpeed ZeRO shards", "self"),
    "ZeRO stage 3": Case(zero(3, ranks=3), "repairable", "DeepSpeed ZeRO shards", "self"),
    "ZeRO stage 3, frozen": Case(zero(3, 2, 1, frozen=(UP,)), "repairable", "DeepSpeed ZeRO shards", "self"),
    "ZeRO, a rank lost": Case(zero(2, lost=1), "not usable", "2 ranks wrote it, the optimizer files of 1 are here"),
    "ZeRO stage 3, not gathered": Case(zero3_not_gathered, "repairable", "tensors are empty", "self"),
    **{f"names with {prefix}": Case(renamed(lambda name, p=prefix: p + name), "repairable",
                                    f"tensors have {prefix!r} in their names", "self")
       for prefix in ("module.", "_orig_mod.", "model.", "base_model.model.", "module._orig_mod.")},
    "names with a wrapper inside": Case(
        renamed(lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module.")), "repairable",
        "tensors have '_checkpoint_wrapped_module.' in their names", "self"),
    "no head": Case(rewritten(lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"}), "repairable",
                    "the head (lm_head.weight) is missing", "base"),
    "a tensor lost": Case(rewritten(lambda t: {n: v for n, v in t.items() if n != UP}), "not usable",
                          "1 tensors are not those of config.json"),
    "tied and stored twice": Case(configured(tie_word_embeddings=True), "repairable",
                                  "ties lm_head.weight to model.embed_tokens.weight", "self"),
    "a shard lost": Case(shard_lost, "not usable", "shards are missing: model-"),
    "no index": Case(index_lost, "repairable", "shards without an index", "self"),
    "an index that forgets a shard": Case(index_forgets, "repairable", "the index does not say where", "self"),
    "truncated": Case(truncated, "not usable", "bytes long, its header says"),
    "pointers of Git LFS": Case(pointers("model.safetensors", "tokenizer.json"), "not usable",
                                "model.safetensors is a pointer of Git LFS"),
    "a tokenizer that is a pointer": Case(pointers("tokenizer.json"), "not usable", "tokenizer.json is a pointer"),
    "bitsandbytes, 4 bits": Case(bitsandbytes(4), "repairable", "packed by bitsandbytes, 4 bits", "self",
                                 as_transformers_unpacks, exact=False),
    "bitsandbytes, 8 bits": Case(bitsandbytes(8), "repairable", "packed by bitsandbytes, 8 bits", "self",
                                 as_transformers_unpacks, exact=False),
    "GGUF": Case(gguf, "repairable", "the weights are a GGUF file", "self", in_half),
    "a truncated GGUF": Case(gguf_cut, "not usable", "model.gguf: is no whole GGUF file"),
    "an adapter": Case(lora, "not usable", "it is an adapter of "),
    "an adapter beside the weights": Case(adapter_beside, "not usable", "an adapter lies beside the weights"),
    "an adapter inside the weights": Case(lora_inside, "not usable",
                                          "6 tensors are of an adapter that was saved inside"),
    "an encoder": Case(encoder, "not usable", "is an encoder, so not a causal language model"),
    "sentence-transformers": Case(lambda b, o: (encoder(b, o), (o / "modules.json").write_text("[]")), "not usable",
                                  "it is an encoder of sentence-transformers"),
    "ONNX": Case(files(**{"model.onnx": b"", "config.json": "{}"}), "not usable", "which edgeft does not read"),
    "a bundle": Case(files(**{"bundle.json": "{}", "model.onnx": b""}), "not usable",
                     "it is a bundle that edgeft exported"),
    "a training result": Case(files(**{"train.json": "{}", "adapter_config.json": "{}"}), "not usable",
                              "it is a training result of edgeft"),
    "empty": Case(files(), "not usable", "the folder is empty"),
    "rows of training data": Case(files(**{"train.json": "[]"}), "not usable", "it holds no weights in any form"),
    "other files": Case(files(**{"notes.txt": "hello"}), "not usable", "it holds no weights in any form that is known"),
    "a config alone": Case(without_files("model.safetensors"), "not usable", "config.json without weights"),
    "models below": Case(below, "not usable", "the model lies in a folder below"),
    "TensorFlow": Case(files(**{"tf_model.h5": b"", "config.json": "{}"}), "not usable", "TensorFlow weights"),
    "the first publisher's names": Case(files(**{"consolidated.00.pth": b"", "params.json": "{}"}), "not usable",
                                        "weights under the names of their first publisher"),
}  # fmt: skip
