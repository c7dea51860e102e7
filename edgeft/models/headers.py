"""What do a checkpoint's files say they hold, before a tensor is read, and does config.json say the same? (no torch)"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgeft.errors import BadInput
from edgeft.models.config_file import near_model
from edgeft.models.doctor.kinds import INDEX, Listing, forms_of, kind_of, refuse_pointer, see, words_of
from edgeft.models.doctor.names import added, plain_names
from edgeft.models.families import in_conv1d
from edgeft.models.hub import ask

if TYPE_CHECKING:
    from edgeft.models.spec import ModelSpec

# code in a safetensors header: its name in torch, and in config.json
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "U16": "uint16", "U32": "uint32",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOATING = ("F64", "F32", "F16", "BF16")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
# beside a merged folder's weights what none can hold: adapters, keys and values before the text
BESIDE = BOTTLENECKS, KV_PREFIX = "bottlenecks.safetensors", "kv_prefix.safetensors"
# Buffers that models compute for themselves and older versions of transformers stored beside the weights. A mask that
# is called attn.bias has four dimensions, or none; a bias has one.
BUFFER = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|attn(ention)?\.(masked_)?bias)$")
# weights of what else a checkpoint with images or sound has, which its language model does not read
OTHER_TOWER = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|audio_tower|embed_vision|embed_audio)\."
)
PACKED = re.compile(r"(weight|packed|qzeros|blocks)[^.]*$")  # names of weights, and of what quantisers make of them
LAYER = re.compile(r"(?:.*\.)?(?:layers|h|blocks|block)\.(\d+)\.(.+)")
LAYER_NUMBER = re.compile(r"(?<![^.])\d+\.")
SHOWN = 8  # names in a message
BLOCK_BYTES = 8 * 2**20  # of a tensor in fp32 that are worked on at once
AGAIN = "copy or download the whole checkpoint again"
SNAPSHOT = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # what is fetched of a hub model


class Header:
    """The tensors of one safetensors file: name to dtype, shape and place; `start` is where their bytes begin."""

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_pointer(path)
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > os.path.getsize(path):
                    raise ValueError("header is longer than the file")
                header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("its header is no object")
            metadata = header.pop("__metadata__", None)
            if odd := next((name for name, entry in header.items() if not _is_entry(entry)), None):
                raise ValueError(f"its header says of {odd!r:.80} what no tensor has")
        except FileNotFoundError:
            raise BadInput(path.parent, f"{path.name} is missing", AGAIN) from None
        except OSError as problem:
            raise BadInput(path, f"cannot be read: {problem.strerror}", "check its permissions") from None
        except (ValueError, struct.error, RecursionError) as problem:
            raise BadInput(path, f"is not a whole safetensors file: {problem}", "copy or download it again") from None
        told = metadata if isinstance(metadata, dict) else {}
        self.metadata: dict[str, str] = {name: value for name, value in told.items() if isinstance(value, str)}
        self.entries: dict[str, dict[str, Any]] = header
        self.start = 8 + length
        end = self.start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if os.path.getsize(path) != end:
            raise BadInput(path, f"is {os.path.getsize(path)} bytes long, its header says {end}", "copy it again")
        unknown = sorted({entry["dtype"] for entry in header.values()} - set(DTYPES))
        if unknown:
            hint = "load it with transformers and save it in bfloat16"
            raise BadInput(path, f"holds tensors of a type that is not read here: {', '.join(unknown)}", hint)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if end - begin != math.prod(entry["shape"]) * DTYPE_BYTES[entry["dtype"]]:
                wrong = f"{name}: {end - begin} bytes are no {entry['dtype']} tensor of shape {entry['shape']}"
                raise BadInput(path, wrong, "copy or download it again")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name]["shape"])

    def blocks(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor, a few megabytes at a time."""
        begin, end = self.entries[name]["data_offsets"]
        with open(self.path, "rb") as file:
            file.seek(self.start + begin)
            for at in range(begin, end, 2**22):
                yield file.read(min(2**22, end - at))


def _is_entry(entry: Any) -> bool:
    """Whether a header's entry is one of a tensor: a dtype by its code, a shape, and where the bytes are."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    lists = [entry.get(key) for key in ("shape", "data_offsets")]
    if not all(isinstance(each, list) and all(type(n) is int and 0 <= n < 2**63 for n in each) for each in lists):
        return False
    return len(entry["data_offsets"]) == 2 and entry["data_offsets"][0] <= entry["data_offsets"][1]


Kind = TypeVar("Kind", bound=Header)


def lies_beside(folder: Path) -> str | None:
    """The file beside a folder's weights of what none of them can hold, if there is one."""
    return next((name for name in BESIDE if (folder / name).is_file()), None)


def refuse_beside(folder: Path, what: str) -> None:
    """Nothing. Raises BadInput for a folder with adapters beside its weights, which `what` would leave out.

    PEFT's is not even left out: transformers loads it, over the base that it names.
    """
    if (folder / "adapter_config.json").is_file() and has_weights(folder):
        problem = "holds an adapter beside its weights (adapter_config.json), which transformers would load instead"
        raise BadInput(folder, problem, "move one of the two to a folder of its own")
    if (name := lies_beside(folder)) is not None:
        problem = f"holds adapters beside its weights ({name}), which {what} would leave out"
        raise BadInput(folder, problem, "use the base that they were trained on")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder in order. Raises BadInput with what to do when there are none."""
    if (folder / "model.safetensors").is_file():  # before the index, as transformers does
        return [folder / "model.safetensors"]
    index = folder / INDEX
    if index.is_file():
        shards = sorted(set(shard_map(index).values()))
        outside = [name for name in shards if Path(name).name != name]
        if outside:
            raise BadInput(index, "names files outside of its folder: " + ", ".join(outside), AGAIN)
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise BadInput(folder, "shards are missing: " + ", ".join(missing), "copy or download the whole checkpoint")
        return [folder / name for name in shards]
    raise no_weights(folder)


def no_weights(folder: Path) -> BadInput:
    """The error for a folder without safetensors: what it has in their place, and what leads on."""
    listing = Listing.read(folder)
    kind, forms = kind_of(listing), forms_of(listing)
    if kind is not None:
        return BadInput(folder, f"is {words_of(kind, folder)}, not a model", f"{see(folder)} says what can be done")
    if not forms:
        return BadInput(folder, "holds no weights (model.safetensors)", "give a folder written by save_pretrained")
    names = ", ".join(listing.find(forms[0].marks, forms[0].unless)[:2])
    problem = f"holds {forms[0].words} ({names}): only model.safetensors and its shards are read"
    return BadInput(folder, problem, f"{see(folder)} says what can be done")


def shard_map(index: Path) -> dict[str, str]:
    """Which file of a sharded checkpoint has which tensor, as its index says. Raises BadInput."""
    try:
        named = json.loads(index.read_text())["weight_map"]
        return {str(name): str(shard) for name, shard in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise BadInput(index, f"is not a shard index: {problem!r}") from None


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights at all: planning needs none."""
    return any((folder / name).is_file() for name in ("model.safetensors", INDEX))


def refuse_other_weights(folder: Path) -> None:
    """Nothing for a folder without any weights. Raises BadInput for other ones than safetensors.

    They would be found out only when training begins.
    """
    listing = Listing.read(folder)
    if listing.broken:
        raise BadInput(folder, f"{listing.broken[0]} is a link to what is not there", AGAIN)
    if not has_weights(folder) and (forms_of(listing) or kind_of(listing)):
        raise no_weights(folder)


def local_folder(model: str) -> Path:
    """The folder of a model: itself, or the hub's snapshot when online. Raises BadInput."""
    if Path(model).is_dir():
        return Path(model)
    if Path(model).is_absolute() or model.count("/") > 1 or model.startswith("."):
        hint = near_model(model) or "give a folder with config.json, or a hub id such as org/name"
        raise BadInput(model, "no such model folder", hint)
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(ask(snapshot_download, model, allow_patterns=SNAPSHOT))
    except Exception as problem:  # huggingface_hub raises many kinds: offline, gated, unknown
        if isinstance(problem, errors.LocalEntryNotFoundError):
            problem = ConnectionError("the hub cannot be reached, and it is not whole in the cache")
        hint = "check the name and the network, or download it once and give the folder"
        raise BadInput(model, f"is no folder and could not be fetched as a hub model: {problem}", hint) from None


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a stored tensor is one that a model makes for itself, and no weight."""
    return bool(BUFFER.search(name)) and (len(shape) != 1 or not name.endswith("bias"))


def check_files(folder: Path, headers: Sequence[Header]) -> None:
    """Raise BadInput, by name, for files that no model can be read from.

    A tensor in two files, or not where the index says; names that a wrapper has put something before; packed bytes.
    """
    files = {name: [h.path.name for h in headers if name in h.entries] for h in headers for name in h.entries}
    problems = [f"{name}: in {' and in '.join(places)}" for name, places in files.items() if len(places) > 1]
    if problems:
        hint = f"remove the files that are not of this checkpoint; {see(folder)} says whether it can be repaired"
        raise refused(folder, "holds tensors twice", problems, hint)
    index = folder / INDEX
    if index.is_file() and [header.path.name for header in headers] != ["model.safetensors"]:
        told = shard_map(index)
        problems = [f"{name}: not in {shard}" for name, shard in told.items() if files.get(name, [""])[0] != shard]
        if problems:
            hint = f"{AGAIN}; {see(folder)} says whether it can be repaired"
            raise refused(index, "names tensors that are not where it says", problems, hint)
    plain = plain_names(files)
    if prefixes := Counter(added(name, own) for name, own in plain.items() if name != own):
        [(prefix, _)] = prefixes.most_common(1)
        hint = f"{see(folder)} --repair OUT writes them without {prefix!r}"
        how = "begin with" if any(name.startswith(prefix) for name in plain) else "hold"
        problem = f"{prefixes.total()} of {len(files)} tensors have names that {how} {prefix!r}"
        raise BadInput(folder, f"{problem}: what wrapped the model was saved too", hint)
    packed = [
        f"{name}: {DTYPES[header.entries[name]['dtype']]}"
        for header in headers for name in header.entries
        if header.entries[name]["dtype"] not in FLOATING and PACKED.search(name)
    ]  # fmt: skip
    if packed:
        hint = f"give the checkpoint it was quantised from; {see(folder)} says whether it can be unpacked"
        raise refused(folder, "holds packed bytes, not weights", packed, hint)


def read_headers(folder: Path, kind: Callable[[Path], Kind]) -> list[Kind]:
    """The headers of a checkpoint's files, checked as `check_files` does; buffers are left out."""
    headers = [kind(path) for path in weight_files(folder)]
    check_files(folder, headers)
    for header in headers:
        header.entries = {n: e for n, e in header.entries.items() if not is_buffer(n, tuple(e["shape"]))}
    return headers


def stored_dtype(headers: Sequence[Header]) -> str | None:
    """The floating dtype that most bytes are stored in, by its name in config.json."""
    counts: Counter[str] = Counter()
    for header in headers:
        for entry in header.entries.values():
            if entry["dtype"] in FLOATING:
                counts[DTYPES[entry["dtype"]]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return counts.most_common(1)[0][0] if counts else None


def check_tied(folder: Path, headers: Sequence[Header]) -> None:
    """Raise BadInput where config.json says that head and embedding are one tensor and the files hold two."""
    outside = {n: h for h in headers for n in h.entries if not LAYER.fullmatch(n)}
    embedding = next((name for name in outside if name.endswith(EMBEDDINGS)), None)
    head = next((name for name in outside if name.endswith(HEADS)), None)
    if embedding is None or head is None:
        return
    one, other = (outside[name].entries[name] for name in (embedding, head))
    same = one["shape"] == other["shape"] and one["dtype"] == other["dtype"]
    if same and all(a == b for a, b in zip(*(outside[n].blocks(n) for n in (embedding, head)), strict=True)):
        return
    hint = "say which is right: set tie_word_embeddings to false, or remove the head from the files"
    hint += f"; {see(folder)} --repair OUT keeps both"
    problem = f"config.json says that {head} and {embedding} are tied, the files hold two different tensors"
    raise BadInput(folder, problem, hint)


def check_weights(folder: Path, spec: ModelSpec) -> str | None:
    """The dtype that a folder's weights are stored in, after comparing every tensor's name and shape with the spec.

    Raises BadInput naming tensors that are missing, too many or of another shape, as far as `shape_problems` can tell.
    """
    headers = read_headers(folder, Header)
    shapes = {name: header.shape(name) for header in headers for name in header.entries}
    if spec.tie_word_embeddings:
        check_tied(folder, headers)
    if problems := shape_problems(shapes, spec):
        raise refused(
            folder, "does not hold the model of its config.json", problems, f"{AGAIN}; {see(folder)} says more"
        )
    return stored_dtype(headers)


def shape_problems(shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec) -> list[str]:
    """What is missing, too many or of another shape among a model's tensors.

    Of families that are not known only how many numbers there have to be, of models with other towers nothing.
    """
    if any(OTHER_TOWER.search(name) for name in shapes):
        return []
    if spec.counted_from != "config":
        less = spec.total_parameters - _count(shapes, spec)
        return [f"{less:,} of the model's {spec.total_parameters:,} parameters are missing"] if less > 0 else []
    problems = [*_layers(shapes, spec), *_around(shapes, spec)]
    if not problems and (other := _count(shapes, spec)) != spec.total_parameters:
        problems = [f"{other:,} parameters are stored, a model of this config has {spec.total_parameters:,}"]
    return problems


def refused(where: object, what: str, problems: list[str], hint: str) -> BadInput:
    more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return BadInput(where, f"{what}\n" + "\n".join(problems[:SHOWN]) + more, hint)


def _layers(shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec) -> Iterator[str]:
    """What is wrong with the tensors of the layers: all layers of a known family have the same ones."""
    parts: dict[str, dict[int, str]] = {}
    for name in shapes:
        if match := LAYER.fullmatch(name):
            parts.setdefault(match[2], {})[int(match[1])] = name
    known = tuple(f".{linear.name}.weight" for linear in spec.linears)
    for part, names in parts.items():
        usual = f".{part}".endswith(known) or 2 * len(names) >= spec.num_hidden_layers + part.endswith(".bias")
        for layer, name in names.items():
            if layer >= spec.num_hidden_layers:
                yield f"{name}: the config has {spec.num_hidden_layers} layers"
            elif not usual:
                yield f"{name}: no weight of this model"
        if usual:
            example = next(iter(names.values()))
            for layer in sorted(set(range(spec.num_hidden_layers)) - names.keys()):
                yield LAYER_NUMBER.sub(f"{layer}.", example, count=1) + ": missing"
    for linear in spec.linears:
        wanted = (linear.out_features, linear.in_features)
        if in_conv1d(spec.model_type):
            wanted = wanted[::-1]
        found = [part for part in parts if f".{part}".endswith(f".{linear.name}.weight")]
        if not found:
            yield f"layers.*.{linear.name}.weight: missing"
        for name in (parts[part][layer] for part in found for layer in parts[part]):
            if shapes[name] != wanted:
                yield f"{name}: {shapes[name]} in the files, {wanted} by config.json"


def _around(shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec) -> Iterator[str]:
    """What is wrong with embedding and head."""
    wanted = (spec.vocab_size, spec.embedding_parameters // spec.vocab_size)
    for role, ends, needed in (("embedding", EMBEDDINGS, True), ("head", HEADS, not spec.tie_word_embeddings)):
        names = [name for name in shapes if name.endswith(ends) and not LAYER.fullmatch(name)]
        if not names and needed:
            tied = ", and config.json does not tie it to the embedding" if role == "head" else ""
            yield f"{ends[0]}: missing{tied}"
        for name in names:
            if shapes[name] != wanted:
                yield f"{name}: {shapes[name]} in the files, {wanted} by config.json"


def _count(shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec) -> int:
    """Parameters stored, a tied head's copy left out."""
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if not (spec.tie_word_embeddings and name.endswith(HEADS) and not LAYER.fullmatch(name))
    )


def blocks(shape: tuple[int, ...], most_bytes: int | None = None) -> Iterator[slice]:
    """The rows of a tensor in slices of at most so many bytes in fp32 (BLOCK_BYTES), but of one row at least."""
    rows = shape[0] if shape else 1
    each = max(1, (most_bytes or BLOCK_BYTES) // max(1, 4 * math.prod(shape[1:])))
    for first in range(0, rows, each):
        yield slice(first, min(rows, first + each))
