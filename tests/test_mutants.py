"""Does the ladder stop every planted fault, by the rung or check that owns it? `make test-mutants` prints the table.

A check counts once it has caught a fault that was planted. Models are trained, merged and built once; each fault is
planted into a copy of what a stage left, and the very checks of an export run over it.
"""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ROWS

from edgeft.data.dataset import TextTokenizer
from edgeft.documents import sha256_file
from edgeft.errors import BadInput, EdgeftError
from edgeft.exporting.artifact import ArtifactModel, load_shipped
from edgeft.exporting.build import build_bundle, hash_files
from edgeft.exporting.bundle import Bundle
from edgeft.exporting.export import prove_bundle
from edgeft.exporting.golden import golden_inputs, record
from edgeft.exporting.parity import Ladder
from edgeft.exporting.proof_rows import ProofRows
from edgeft.exporting.rehearsal import ROUNDED_ALIKE
from edgeft.merging.merge import find_trained, merge, verify_merged
from edgeft.merging.result import MergedCheckpoint
from edgeft.models.checkpoint import Checkpoint
from edgeft.models.identity import model_inputs, written_files
from edgeft.models.spec import read_model_spec
from edgeft.planning.plan import Plan, make_plan
from edgeft.progress import silent
from edgeft.settings.job import make_job
from edgeft.targets.target import load_target
from edgeft.training.job_data import Data
from edgeft.training.train import train

TUNERS: dict[str, dict[str, Any]] = {
    "lora": {"tuner": "lora", "rank": 4},
    "adalora": {"tuner": "adalora", "rank": 4, "learning_rate": 0.05, "layers": "all"},
    "h-adapter": {"tuner": "h-adapter", "learning_rate": 0.1, "layers": "all"},
    "full": {"tuner": "full", "learning_rate": 3e-3},
    "lisa on nf4": {
        "tuner": "full", "layers": "lisa", "active_layers": 1, "base_precision": "nf4", "learning_rate": 3e-3
    },
}  # fmt: skip
FEW = ("adalora", "h-adapter")  # whose faults are those of what they have and others have not
LAYERS = ("model.layers.0.", "model.layers.1.")


class Fault(NamedTuple):
    """One fault: what it is, in whose work, on the way to which target, what must stop it, how it is planted."""

    name: str
    tuner: str
    target: str
    stopped_by: str
    plant: Callable[[Path], None]


class Lines:
    """Everything that is trained, merged and built, once for all faults; each place is a folder to copy."""

    def __init__(self, folder: Path, checkpoint: Path, tokenizer: Path) -> None:
        self.folder, self.checkpoint, self.tokenizer = folder, checkpoint, tokenizer

    @functools.cache  # noqa: B019 - lives as long as the module
    def base(self, tuner: str) -> Path:
        """The base of a tuner; that of full fine-tuning is stored in bf16, as real ones are."""
        out = self.folder / f"base {tuner}"
        shutil.copytree(self.checkpoint, out)
        if tuner == "full":
            tensors = load_file(out / "model.safetensors")
            save_file(
                {n: t.bfloat16() for n, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"}
            )
            edit_json(out / "config.json", dtype="bfloat16")
        return out

    @functools.cache  # noqa: B019
    def trained(self, tuner: str, epochs: float = 8.0) -> Path:
        """train/ and merged/ of a tuner."""
        place = self.folder / f"{tuner} {epochs:g}"
        place.mkdir()
        data, valid = self.folder / "rows.jsonl", self.folder / "valid.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        valid.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::3]))
        values = {"batch_size": 4, "epochs": epochs, "learning_rate": 1e-2, "eval_rows": 12, **TUNERS[tuner]}
        job = make_job(model=str(self.base(tuner)), data=str(data), valid=str(valid), profile="cpu-8gb", **values)
        make_plan(job).write(place / "plan.json")
        digest = sha256_file(place / "plan.json")
        train(Plan.read(place / "plan.json"), place / "train", plan_sha256=digest, progress=silent)
        merge(place / "train", place / "merged", wise_alpha=1.0, progress=silent)
        return place

    @functools.cache  # noqa: B019
    def built(self, tuner: str, target: str) -> Path:
        """train/, merged/ and bundle/."""
        place = self.folder / f"{tuner} to {target}"
        shutil.copytree(self.trained(tuner), place)
        prompts, chat = golden_inputs(MergedCheckpoint.read(place / "merged" / "merged.json").train.plan.job,
                                      TextTokenizer(place / "merged"))  # fmt: skip
        build_bundle(
            place / "merged", load_target(target), place / "bundle", prompts=prompts, measure=False,
            prompt_format="chat" if chat else "plain",
        )  # fmt: skip
        return place

    @functools.cache  # noqa: B019
    def family(self, name: str, target: str) -> Path:
        """merged/ and bundle/ of a family with what a Llama has not, its random weights large enough to matter."""
        place = self.folder / f"{name} to {target}"
        merged = place / "merged"
        merged.mkdir(parents=True)
        FAMILIES[name](len(TextTokenizer(self.checkpoint).backend.get_vocab())).save_pretrained(merged)
        for path in self.tokenizer.iterdir():
            shutil.copyfile(path, merged / path.name)
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[::3]))
        build_bundle(merged, load_target(target), place / "bundle", prompts=[], measure=False)
        return place


def shape(words: int, **other: Any) -> dict[str, Any]:
    values = {
        "vocab_size": words, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 3, "initializer_range": 0.2,
    }  # fmt: skip
    return values | other


def gemma2(words: int) -> Any:
    """Windows, softcaps of scores and logits, scaled embeddings."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        **shape(
            words, sliding_window=8, query_pre_attn_scalar=32, final_logit_softcapping=5.0, attn_logit_softcapping=1.0
        )
    )
    return Gemma2ForCausalLM(config).eval()


def qwen2(words: int) -> Any:
    """Biases of query, key and value."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**shape(words, tie_word_embeddings=True))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


FAMILIES = {"gemma2": gemma2, "qwen2": qwen2}


# --- what stops a fault


def stopped_by(place: Path, target: str) -> str:
    """The rung or check of an export that stops what lies in `place`, "" if nothing does."""
    try:
        if (place / "train").is_dir():
            prove_line(place, target)
        else:
            prove_family(place, target)
    except EdgeftError as problem:
        return problem.where.replace("parity ladder, rung ", "").replace("'", "")
    return ""


def prove_line(place: Path, target: str) -> None:
    """What `export` checks of a line, but for building its bundle again."""
    folder = place / "merged"
    merged = MergedCheckpoint.read(folder / "merged.json")
    trained = find_trained(folder, merged)
    rows = ProofRows.of(Data.read(merged.train.plan, train=False), merged.train.plan)
    wanted = load_target(target)
    prove_bundle(trained, folder, merged, wanted, rows, ArtifactModel(place / "bundle"), silent)
    prompts, _ = golden_inputs(merged.train.plan.job, TextTokenizer(folder))
    record(load_shipped(place / "bundle"), TextTokenizer(folder), prompts)


def prove_family(place: Path, target: str) -> None:
    """What a rehearsal and an export check of a bundle against its merged model."""
    from edgeft.data.dataset import read_samples

    tokenizer = TextTokenizer(place / "merged")
    rows = read_samples(str(place / "rows.jsonl"), tokenizer, None)
    tied = read_model_spec(str(place / "merged")).tie_word_embeddings
    wanted = load_target(target)
    loose = wanted.parity.model_copy(update={"max_mean_kl_nats": 9.0, "min_top1_agreement": 0.0})
    ladder = Ladder(wanted, tokenizer, silent)
    ladder.climb_artifact(
        place / "merged", place / "bundle", ArtifactModel(place / "bundle"), rows, tied=tied, alike=ROUNDED_ALIKE,
        quality=None if wanted.weight_bits >= 16 else loose.model_copy(update={"max_loss_increase_nats": 9.0}),
    )  # fmt: skip


# --- how faults are planted


def edit_json(path: Path, **values: Any) -> None:
    document = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(document | values))


def tensors_of(place: Path, change: Callable[[dict[str, torch.Tensor]], None], files: str) -> None:
    """Other tensors in files of this pattern, each in the file where it was."""
    owner = {name: file for file in place.glob(files) for name in load_file(file)}
    tensors = {name: tensor for file in set(owner.values()) for name, tensor in load_file(file).items()}
    change(tensors)
    for file in set(owner.values()):
        own = {name: t.contiguous() for name, t in tensors.items() if owner[name] == file}
        save_file(own, file, metadata={"format": "pt"})


def learnt(change: Callable[[torch.Tensor, str, dict[str, torch.Tensor]], torch.Tensor], layer: str = "layers.") -> Any:
    """Plants a new change W - W0 (an adapter's B) for the tensors of a layer that training left in train/."""

    def plant(place: Path) -> None:
        adapter = (place / "train" / "adapter_model.safetensors").is_file()
        base = None if adapter else Checkpoint(Path(job_of(place)["model"]))

        def each(tensors: dict[str, torch.Tensor]) -> None:
            moves = {
                name: t if base is None else t - base.read(base.name_of(name)).float()
                for name, t in tensors.items()
                if layer in name and (base is not None or ".lora_B." in name)
            }
            for name, move in moves.items():
                made = change(move, name, moves)
                tensors[name] = made if base is None else base.read(base.name_of(name)).float() + made

        tensors_of(place, each, "train/adapter_model.safetensors" if adapter else "train/changed*.safetensors")

    return plant


def triplets_back(files: str) -> Any:
    """Plants a number for the triplets that went of every matrix: as large as the largest that is left."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        numbers = [name for name in tensors if name.endswith("lora_E")]
        assert any((tensors[name] == 0).any() for name in numbers)
        for name in numbers:
            tensors[name] = torch.where(tensors[name] == 0, tensors[name].abs().max(), tensors[name])

    return lambda place: tensors_of(place, change, files)


def no_sum(files: str, ends: str) -> Any:
    """Plants zeros for what is added to what attention gives, of the last layer."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        (name,) = [name for name in tensors if "layers.1." in name and name.endswith(ends)]
        tensors[name] = torch.zeros_like(tensors[name])

    return lambda place: tensors_of(place, change, files)


def other_layer(move: torch.Tensor, name: str, moves: dict[str, torch.Tensor]) -> torch.Tensor:
    other = name.replace("layers.0.", "layers.x.").replace("layers.1.", "layers.0.").replace("layers.x.", "layers.1.")
    return moves[other]


def job_of(place: Path) -> dict[str, Any]:
    return dict(json.loads((place / "train" / "train.json").read_text())["plan"]["job"])


def merged_tensors(change: Callable[[dict[str, torch.Tensor], Checkpoint], None]) -> Any:
    """Plants other tensors into merged/."""

    def plant(place: Path) -> None:
        base = Checkpoint(Path(job_of(place)["model"]))
        tensors_of(place, lambda tensors: change(tensors, base), "merged/model.safetensors")

    return plant


def moved(share: float, layer: str = "layers.0.") -> Any:
    """The change of a layer in merged/ at another share."""

    def change(tensors: dict[str, torch.Tensor], base: Checkpoint) -> None:
        for name, t in tensors.items():
            if layer in name:
                old = base.read(name).float()
                tensors[name] = (old + share * (t.float() - old)).to(t.dtype)

    return merged_tensors(change)


def swapped_layers(tensors: dict[str, torch.Tensor], base: Checkpoint) -> None:
    for name in [name for name in tensors if name.startswith(LAYERS[0])]:
        other = name.replace(*LAYERS)
        one, two = (tensors[n].float() - base.read(n).float() for n in (name, other))
        tensors[name] = (base.read(name).float() + two).to(tensors[name].dtype)
        tensors[other] = (base.read(other).float() + one).to(tensors[other].dtype)


def transposed(tensors: dict[str, torch.Tensor], base: Checkpoint) -> None:
    tensors["model.layers.1.self_attn.q_proj.weight"] = tensors["model.layers.1.self_attn.q_proj.weight"].T


def exchanged(one: str, two: str) -> Any:
    def change(tensors: dict[str, torch.Tensor], base: Checkpoint) -> None:
        tensors[one], tensors[two] = tensors[two].clone(), tensors[one].clone()

    return merged_tensors(change)


def swapped_words(tensors: dict[str, torch.Tensor], base: Checkpoint) -> None:
    table = tensors["model.embed_tokens.weight"]
    table[[300, 301]] = table[[301, 300]]


def head_is_embedding(tensors: dict[str, torch.Tensor], base: Checkpoint) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def rounded_through(dtype: torch.dtype) -> Any:
    def change(tensors: dict[str, torch.Tensor], base: Checkpoint) -> None:
        for name, t in tensors.items():
            if name.startswith(LAYERS[0]):
                tensors[name] = t.to(dtype).to(t.dtype)

    return merged_tensors(change)


def doubly_rounded(place: Path) -> None:
    """Weights that trained, to fp16 before bf16: the last bit of a few is another."""
    kept = [load_file(file) for file in (place / "train").glob("changed*.safetensors")]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, t in itertools.chain.from_iterable(some.items() for some in kept):
            tensors[name] = t.half().bfloat16()

    tensors_of(place, change, "merged/model.safetensors")


def last_bit(tensors: dict[str, torch.Tensor], base: Checkpoint) -> None:
    """One value of one tensor, by one unit in the last place."""
    values = tensors["model.layers.1.mlp.up_proj.weight"].view(-1)
    values[7] = torch.nextafter(values[7].float(), torch.tensor(9.0)).to(values.dtype)
    if values.dtype == torch.bfloat16:
        bits = values.view(torch.int16)
        bits[7] ^= 1


def one_value_beyond(tensors: dict[str, torch.Tensor], base: Checkpoint) -> None:
    """One value of one adapted fp32 matrix, by a millionth of its largest."""
    matrix = tensors["model.layers.1.mlp.up_proj.weight"]
    matrix[3, 5] += 1e-5 * matrix.abs().max()


def truncated(place: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(LAYERS[1])]:
            del tensors[name]

    tensors_of(place, change, "merged/model.safetensors")
    edit_json(place / "merged" / "config.json", num_hidden_layers=1)


def merged_config(**values: Any) -> Any:
    return lambda place: edit_json(place / "merged" / "config.json", **values)


def other_rotary(place: Path) -> None:
    path = place / "merged" / "config.json"
    rope = json.loads(path.read_text())["rope_parameters"]
    edit_json(path, rope_parameters=rope | {"rope_theta": 5e5})


def begin_token(place: Path) -> None:
    """A tokenizer that puts another number of begin tokens in front of a text than the base's."""
    path = place / "merged" / "tokenizer.json"
    document = json.loads(path.read_text())
    token = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    document["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": token,
    }  # fmt: skip
    path.write_text(json.dumps(document))


def template(folder: str) -> Any:
    def plant(place: Path) -> None:
        path = place / folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|im_end|>", "<|im_end|> "))

    return plant


def rewritten(place: Path, **job: Any) -> None:
    """train.json and merged.json that say of another job and other files, hashes right."""
    document = json.loads((place / "train" / "train.json").read_text())
    document["plan"]["job"] |= job
    document["files"] = written_files(place / "train", "train.json")
    document["inputs"] |= model_inputs(Path(document["plan"]["job"]["model"]), weights=True)
    (place / "train" / "train.json").write_text(json.dumps(document))
    edit_json(place / "merged" / "merged.json", train=document, input_sha256=sha256_file(place / "train/train.json"))


def merged_again(place: Path, share: float = 1.0) -> None:
    rewritten(place)
    shutil.rmtree(place / "merged")
    merge(place / "train", place / "merged", wise_alpha=share, progress=silent)


def base_moved(place: Path) -> Path:
    """A copy of a line's base, its weights 2% larger."""
    base = place / "base"
    shutil.copytree(job_of(place)["model"], base)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] *= 1.02

    tensors_of(place, change, "base/model.safetensors")
    return base


def another_base(place: Path) -> None:
    """The base's weights changed after training, and the merge made into them."""
    rewritten(place, model=str(base_moved(place)))
    merged_again(place)


def wrong_scale(place: Path) -> None:
    """adapter_config.json with twice the alpha, and a merge that believes it."""
    path = place / "train" / "adapter_config.json"
    edit_json(path, lora_alpha=2 * json.loads(path.read_text())["lora_alpha"])
    merged_again(place)


def all_at(share: float) -> Any:
    """A merge at another share than merged.json says."""

    def plant(place: Path) -> None:
        said = (place / "merged" / "merged.json").read_bytes()
        shutil.rmtree(place / "merged")
        merge(place / "train", place / "merged", wise_alpha=share, progress=silent)
        (place / "merged" / "merged.json").write_bytes(said)

    return plant


class Graph:
    """model.onnx of a bundle and its initializers, to be changed in place."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "bundle"
        self.model = onnx.load(str(self.folder / "model.onnx"))
        self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def change(self, name: str, change: Callable[[Any], None]) -> None:
        tensor = self.tensors[name]
        values = numpy.frombuffer(tensor.raw_data, dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).copy()
        change(values.reshape(tuple(tensor.dims)))
        tensor.raw_data = values.tobytes()

    def named(self, *parts: str) -> str:
        return next(name for name in self.tensors if all(part in name for part in parts))

    def scale_constant(self, name: str, factor: float) -> None:
        """A constant node's value, times a factor."""
        made = next(n for n in self.model.graph.node if n.op_type == "Constant" and name in n.output)
        tensor = made.attribute[0].t
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * numpy.float32(factor)))

    def save(self) -> None:
        for path in self.folder.glob("model.onnx*"):
            path.unlink()
        onnx.save(self.model, str(self.folder / "model.onnx"), save_as_external_data=True, location="model.onnx.data",
                  size_threshold=1024)  # fmt: skip


def initializer(*parts: str, change: Callable[[Any], None]) -> Any:
    def plant(place: Path) -> None:
        graph = Graph(place)
        graph.change(graph.named(*parts), change)
        graph.save()

    return plant


def node(kind: str, attribute: str, value: float) -> Any:
    """Another value of an attribute in all nodes of a kind."""

    def plant(place: Path) -> None:
        graph = Graph(place)
        found = [a for n in graph.model.graph.node if n.op_type == kind for a in n.attribute if a.name == attribute]
        assert found, {n.op_type for n in graph.model.graph.node}
        for entry in found:
            if entry.type == onnx.AttributeProto.INT:
                entry.i = int(value)
            else:
                entry.f = value
        graph.save()

    return plant


def embedding_scale(place: Path) -> None:
    graph = Graph(place)
    after = next(n for n in graph.model.graph.node if n.op_type == "Mul" and "embed" in n.name)
    graph.scale_constant(after.input[1], 0.5)
    graph.save()


def final_softcap(place: Path) -> None:
    graph = Graph(place)
    after = next(n for n in graph.model.graph.node if n.op_type == "Div" and "softcap" in n.name)
    graph.scale_constant(after.input[1], 2.0)
    graph.save()


def other_activation(place: Path) -> None:
    """x tanh(x) where the model has x sigmoid(x)."""
    graph = Graph(place)
    found = [n for n in graph.model.graph.node if n.op_type == "Sigmoid"]
    assert found
    for each in found:
        each.op_type = "Tanh"
    graph.save()


def other_shape(place: Path) -> None:
    path = place / "bundle" / "genai_config.json"
    document = json.loads(path.read_text())
    document["model"]["vocab_size"] += 1
    path.write_text(json.dumps(document))


def off_by_one(values: Any) -> None:
    flat = values.reshape(-1)
    flat[5] = int(flat[5]) + (1 if flat[5] < 15 else -1)


def scaled(factor: float) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        values.reshape(-1)[11] *= factor

    return change


def times(factor: float) -> Callable[[Any], None]:
    return lambda values: numpy.multiply(values, factor, out=values)


def other_stop(place: Path) -> None:
    path = place / "bundle" / "genai_config.json"
    document = json.loads(path.read_text())
    document["model"]["eos_token_id"] = [3]
    path.write_text(json.dumps(document))


def other_words(place: Path) -> None:
    """The bundle's tokenizer with two words of its prompts exchanged."""
    tokenizer = TextTokenizer(place / "merged")
    one, two = (tokenizer.backend.id_to_token(token) for token in tokenizer.encode([ROWS[0]["prompt"]])[0][:2])
    path = place / "bundle" / "tokenizer.json"
    document = json.loads(path.read_text())
    words = document["model"]["vocab"]
    words[one], words[two] = words[two], words[one]
    path.write_text(json.dumps(document))


def faults_of_training(tuner: str) -> list[Fault]:
    first = "layers.0."
    return [
        Fault("a layer's change dropped", tuner, "ort-int4", "trained against train.json",
              learnt(lambda move, name, moves: 0 * move, first)),
        Fault("a layer's change halved", tuner, "ort-int4", "trained against train.json",
              learnt(lambda move, name, moves: 0.5 * move, first)),
        Fault("a layer's change negated", tuner, "ort-int4", "trained against train.json",
              learnt(lambda move, name, moves: -move, first)),
        Fault("a layer's change given to another", tuner, "ort-int4", "trained against train.json",
              learnt(other_layer)),
        Fault("all changes at 0.9", tuner, "ort-int4", "trained against train.json",
              learnt(lambda move, name, moves: 0.9 * move)),
    ]  # fmt: skip


def faults_of_merging(tuner: str) -> list[Fault]:
    owner = "merged against W0 + a (Wft - W0)"
    plants = {
        "merged: a layer's change dropped": moved(0.0),
        "merged: a layer's change halved": moved(0.5),
        "merged: a layer's change negated": moved(-1.0),
        "merged: a layer's change given to another": merged_tensors(swapped_layers),
        "merged: all changes at 0.9": all_at(0.9),
        "merged: a square matrix transposed": merged_tensors(transposed),
        "merged: gate and up exchanged": exchanged(*(f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up"))),
        "merged: key and value exchanged": exchanged(*(f"model.layers.1.self_attn.{n}_proj.weight" for n in "kv")),
        "merged: two rows of the vocabulary exchanged": merged_tensors(swapped_words),
        "merged: the head is the embedding": merged_tensors(head_is_embedding),
        "merged: a layer cut off": truncated,
        "merged: another rotary base": other_rotary,
        "merged: another norm epsilon": merged_config(rms_norm_eps=1e-5 + 1e-6),
        "merged: tied in its config": merged_config(tie_word_embeddings=True),
        "merged: begin token in the tokenizer": begin_token,
        "merged: another chat template": template("merged"),
        "merged: another stop id": lambda place: edit_json(place / "merged/generation_config.json", eos_token_id=3),
    }
    return [Fault(name, tuner, "ort-int4", owner, plant) for name, plant in plants.items()]


def faults() -> list[Fault]:
    made = [fault for tuner in TUNERS if tuner not in FEW for fault in faults_of_training(tuner)]
    made += [fault for tuner in ("lora", "full") for fault in faults_of_merging(tuner)]
    merged, stored = "merged against W0 + a (Wft - W0)", "stored against merged"
    run = {"ort-fp32": "artifact against merged", "ort-int4": "artifact against rounded",
           "ort-int8": "artifact against rounded"}  # fmt: skip
    made += [
        Fault("merged: rounded to bf16 on the way", "lora", "ort-int4", merged, rounded_through(torch.bfloat16)),
        Fault("merged: one value moved a little", "lora", "ort-int4", merged, merged_tensors(one_value_beyond)),
        Fault("merged: rounded twice", "full", "ort-int4", merged, doubly_rounded),
        Fault("merged: one last bit", "full", "ort-int4", merged, merged_tensors(last_bit)),
        Fault("merged: a layer's change dropped", "lisa on nf4", "ort-int4", merged, moved(0.0)),
        Fault("merged: all changes at 0.9", "lisa on nf4", "ort-int4", merged, all_at(0.9)),
        Fault("merged: one last bit", "lisa on nf4", "ort-int4", merged, merged_tensors(last_bit)),
        Fault("lora_alpha doubled before the merge", "lora", "ort-int4", merged, wrong_scale),
        Fault("the base changed after training", "lora", "ort-int4", "trained against train.json", another_base),
        Fault("the base changed after training", "lisa on nf4", "ort-int4", "trained against train.json", another_base),
        Fault("triplets that went are back", "adalora", "ort-fp32", "trained against train.json",
              triplets_back("train/adapter_model.safetensors")),
        Fault("merged: all changes at 0.9", "adalora", "ort-fp32", merged, all_at(0.9)),
        Fault("attention's sum dropped", "h-adapter", "ort-fp32", "trained against train.json",
              no_sum("train/adapter_model.safetensors", "hadamard.bias")),
        Fault("merged: attention's sum dropped", "h-adapter", "ort-fp32", merged,
              no_sum("merged/model.safetensors", "o_proj.bias")),
        Fault("bundle: attention's sum dropped", "h-adapter", "ort-fp32", stored,
              initializer("layers.1.", "o_proj.Add.bias", change=times(0.0))),
        Fault("bundle: another stop id", "lora", "ort-int4", "stop ids", other_stop),
        Fault("bundle: another tokenizer", "lora", "ort-int4", "tokenizer", other_words),
    ]  # fmt: skip
    for target in ("ort-int4", "ort-int8"):
        made += [
            Fault("bundle: a zero point off by one", "lora", target, stored,
                  initializer("layers.1.", "down_proj", "z", change=off_by_one)),
            Fault("bundle: a scale off by 1%", "lora", target, stored,
                  initializer("layers.0.", "up_proj", "scale", change=scaled(1.01))),
            Fault("bundle: one code off", "lora", target, stored,
                  initializer("layers.0.", "o_proj", "weight_Q", change=off_by_one)),
        ]  # fmt: skip
    made += [
        Fault("bundle: one weight off", "lora", "ort-fp32", stored,
              initializer("layers.0.", "o_proj", "weight", change=scaled(1.0001))),
        Fault("bundle: one row of the vocabulary off", "lora", "ort-fp32", stored,
              initializer("embed_tokens", change=scaled(1.01))),
    ]  # fmt: skip
    for target, owner in run.items():
        made += [
            Fault("runtime: positions turned the wrong way", "lora", target, stored,
                  initializer("sin_cache", change=times(-1.0))),
            Fault("runtime: another rotary base", "lora", target, stored, initializer("cos_cache", change=times(0.9))),
            Fault("runtime: positions left out", "lora", target, stored, node("GroupQueryAttention", "do_rotary", 0)),
            Fault("runtime: another norm epsilon", "lora", target, stored,
                  node("SkipSimplifiedLayerNormalization", "epsilon", 2e-6)),
            Fault("runtime: a norm left out", "lora", target, stored,
                  initializer("layers.1.", "post_attention_layernorm", change=times(0.8))),
            Fault("runtime: another scale of attention scores", "lora", target, stored,
                  node("GroupQueryAttention", "scale", 0.17)),
            Fault("runtime: another activation", "lora", target, owner, other_activation),
            Fault("bundle: another vocabulary in its config", "lora", target, stored, other_shape),
        ]  # fmt: skip
    for target in ("ort-fp32", "ort-int4"):
        made += [
            Fault("runtime: biases dropped", "qwen2", target, stored,
                  initializer("layers.0.", "bias", change=times(0.0))),
            Fault("runtime: another window", "gemma2", target, stored,
                  node("GroupQueryAttention", "local_window_size", 64)),
            Fault("runtime: no cap on attention scores", "gemma2", target, stored,
                  node("GroupQueryAttention", "softcap", 0.0)),
            Fault("runtime: another cap on logits", "gemma2", target, run[target], final_softcap),
            Fault("runtime: another scale of embeddings", "gemma2", target, run[target], embedding_scale),
        ]  # fmt: skip
    return made


FAULTS = faults()
# What is missed, by name: a fault that is caught from now on, or one that slips through, fails the test.
MISSED: dict[tuple[str, str, str], str] = {}
SAMPLED = (
    "a layer's change dropped", "all changes at 0.9", "merged: a layer's change halved",
    "merged: a square matrix transposed", "merged: another norm epsilon", "merged: begin token in the tokenizer",
    "merged: another stop id", "merged: one value moved a little", "lora_alpha doubled before the merge",
    "bundle: another stop id", "bundle: another tokenizer", "bundle: a zero point off by one",
    "bundle: a scale off by 1%", "runtime: another rotary base", "runtime: a norm left out",
)  # fmt: skip
SAMPLE = [fault for fault in FAULTS if (fault.tuner, fault.target) == ("lora", "ort-int4") and fault.name in SAMPLED]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: Path, tokenizer_folder: Path) -> Lines:
    return Lines(tmp_path_factory.mktemp("mutants"), checkpoint_folder, tokenizer_folder)


def place_of(lines: Lines, tuner: str, target: str) -> Path:
    return lines.family(tuner, target) if tuner in FAMILIES else lines.built(tuner, target)


def tried(lines: Lines, wanted: list[Fault], scratch: Path) -> list[tuple[Fault, str]]:
    """What stopped each fault; every line without one must pass."""
    for tuner, target in sorted({(fault.tuner, fault.target) for fault in wanted}):
        assert stopped_by(place_of(lines, tuner, target), target) == "", (
            f"{tuner} to {target} is right, and was stopped"
        )
    found = []
    for number, fault in enumerate(wanted):
        place = scratch / str(number)
        shutil.copytree(place_of(lines, fault.tuner, fault.target), place)
        fault.plant(place)
        sealed(place / "bundle")
        found.append((fault, stopped_by(place, fault.target)))
        show(*found[-1])
        shutil.rmtree(place)
    return found


def sealed(folder: Path) -> None:
    """Hashes as an export writes them: the fault was there before it."""
    manifest = Bundle.read(folder / "bundle.json")
    manifest.model_copy(update={"files": hash_files(folder)}).write(folder / "bundle.json")


def show(fault: Fault, by: str) -> None:
    """A line of the table."""
    right = "" if by == fault.stopped_by else f"  (expected: {fault.stopped_by})"
    print(f"\n{fault.name:46} {fault.tuner:12} {fault.target:9} {by or 'MISSED'}{right}", end="", flush=True)


def judge(found: list[tuple[Fault, str]]) -> None:
    """Nothing slips through but what is listed, and each fault is stopped by its owner."""
    print(f"\n{sum(bool(by) for _, by in found)} of {len(found)} planted faults are stopped")
    missed = {(fault.name, fault.tuner, fault.target) for fault, by in found if not by}
    asked = {(fault.name, fault.tuner, fault.target) for fault, _ in found}
    assert missed == MISSED.keys() & asked
    strays = [(fault.name, fault.tuner, fault.target, by) for fault, by in found if by and by != fault.stopped_by]
    assert strays == []


def test_a_sample_of_faults_is_stopped_by_the_rungs_that_own_them(lines: Lines, tmp_path: Path) -> None:
    judge(tried(lines, SAMPLE, tmp_path))


@pytest.mark.slow
def test_every_fault_is_stopped_by_the_rung_that_owns_it(lines: Lines, tmp_path: Path) -> None:
    assert len(FAULTS) >= 30
    judge(tried(lines, FAULTS, tmp_path))


@pytest.mark.parametrize("tuner", FEW)
def test_what_one_tuner_alone_has_is_missed_on_every_way(tuner: str, lines: Lines, tmp_path: Path) -> None:
    judge(tried(lines, [fault for fault in FAULTS if fault.tuner == tuner], tmp_path))


def test_an_adapter_of_another_run_is_stopped(lines: Lines, tmp_path: Path) -> None:
    """Stale files: an adapter, and a merged folder, of a shorter run under the later one's records."""
    for name, owner in (("train/adapter_model.safetensors", "trained against train.json"),
                        ("merged/model.safetensors", "merged against W0 + a (Wft - W0)")):  # fmt: skip
        place = tmp_path / Path(name).parent.name
        shutil.copytree(lines.built("lora", "ort-int4"), place)
        shutil.copyfile(lines.trained("lora", 6.0) / name, place / name)
        assert stopped_by(place, "ort-int4") == owner


def test_a_changed_base_is_stopped_by_its_hash(lines: Lines, tmp_path: Path) -> None:
    """Where every tensor trained, nothing of another base is left in the result: no score can tell, only its hash."""
    place = tmp_path / "full"
    shutil.copytree(lines.trained("full"), place)
    assert load_file(place / "train/changed.safetensors").keys() == Checkpoint(lines.base("full")).owner.keys()
    document = json.loads((place / "train/train.json").read_text())
    document["plan"]["job"]["model"] = str(base_moved(place))
    (place / "train/train.json").write_text(json.dumps(document))
    edit_json(place / "merged/merged.json", train=document, input_sha256=sha256_file(place / "train/train.json"))
    with pytest.raises(BadInput, match="base weights"):
        verify_merged(place / "merged")
