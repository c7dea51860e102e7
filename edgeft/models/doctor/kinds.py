"""What is this folder, by the names in it alone? Two tables: what somebody may point at, and how weights may lie there.

Nothing is opened here but a folder: a plan asks too, and folders may be huge.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from edgeft.errors import BadInput

DEEP = 3  # folders below the one that was named in which a model is looked for
FOLDERS = 200  # that are looked through for it: somebody may point at all of a disk
MANY = 10_000  # names of one folder that are looked at
INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Form:
    """One way to keep weights in a folder; `reads` names who can read it, "" where nobody here does."""

    name: str
    words: str
    marks: tuple[str, ...]  # any of them says so; a name with a slash lies in a folder below
    reads: str = ""
    unless: tuple[str, ...] = ()  # names that a mark would take and that are none of these weights
    hint: str = ""


@dataclass(frozen=True)
class Kind:
    """What a folder is that is no plain model; `command` is what takes it, {folder} and {base} being filled in."""

    name: str
    words: str
    marks: tuple[str, ...]
    unless: tuple[str, ...] = ()
    beside: tuple[str, ...] = ("*",)  # of which one lies there too
    command: str = ""
    hint: str = ""


SAFE = ("model.safetensors", INDEX, "model-*-of-*.safetensors")
BIN = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
BESIDE = ("adapter_model*", "adapters.safetensors", "changed*.safetensors", "bottlenecks.safetensors",
          "kv_prefix.safetensors", "optimizer*", "consolidated*", "scheduler*", "scaler*", "rng_state*",
          "random_states*", "training_args.bin", "tokenizer*", "*.ot")  # fmt: skip
ORIGINAL = "take the Hugging Face form of the model, or transformers' convert_*_weights_to_hf script of its family"
# in the order in which they are taken where a folder has several
FORMS = (
    Form("safetensors", "safetensors", SAFE, reads="safetensors"),
    Form("pickle", "pickled weights", BIN, reads="pickle"),
    Form("zero", "DeepSpeed ZeRO shards", ("*_optim_states.pt", "*/*_optim_states.pt"), reads="zero"),
    Form("dcp", "torch.distributed.checkpoint shards (FSDP)", ("*.distcp", "*/*.distcp"), reads="dcp"),
    Form("fsdp", "pickled weights of FSDP", ("pytorch_model_fsdp.bin",), reads="pickle"),
    Form("fsdp ranks", "FSDP shards of each rank", ("pytorch_model*_rank*.bin",),
         hint="save it again with FULL_STATE_DICT or SHARDED_STATE_DICT"),
    Form("zero states", "DeepSpeed states without the optimizer's fp32 weights",
         ("*_model_states.pt", "*/*_model_states.pt"), hint="copy the *_optim_states.pt files as well"),
    Form("named safetensors", "safetensors under another name", ("*.safetensors",), reads="safetensors", unless=BESIDE),
    Form("gguf", "a GGUF file", ("*.gguf",), reads="gguf"),
    Form("original", "weights under the names of their first publisher",
         ("consolidated*.pth", "consolidated*.safetensors"), hint=ORIGINAL),
    Form("named pickle", "pickled weights under another name", ("*.bin", "*.pt", "*.pth", "*.ckpt"),
         reads="pickle",
         unless=BESIDE),
    Form("onnx", "an ONNX model", ("*.onnx", "onnx/*.onnx"), hint="give the checkpoint it was exported from"),
    Form("openvino", "an OpenVINO model", ("openvino_*.xml",), hint="give the checkpoint it was exported from"),
    Form("tensorflow", "TensorFlow weights", ("tf_model*.h5", "*.ckpt.index", "model.ckpt*"),
         hint="load it with transformers 4 and from_tf=True, and save it again"),
    Form("flax", "Flax weights", ("flax_model*.msgpack",),
         hint="load it with transformers 4 and from_flax=True, and save it again"),
    Form("nemo", "a NeMo model", ("*.nemo", "model_config.yaml"),
         hint="export it with nemo.collections.llm.export_ckpt"),
    Form("litert", "a LiteRT model", ("*.tflite", "*.litertlm", "*.task"),
         hint="give the checkpoint it was exported from"),
)  # fmt: skip
WEIGHTS = tuple(mark for form in FORMS for mark in form.marks)
FULL = tuple(mark for form in FORMS if form.name in ("safetensors", "pickle", "zero", "dcp") for mark in form.marks)
# first match; a folder of none of them is a model, or nothing that is known
KINDS = (
    Kind("edgeft bundle", "a bundle that edgeft exported", ("bundle.json",),
         hint="give the merged folder it was made from"),
    Kind("edgeft training", "a training result of edgeft", ("train.json",),
         beside=("adapter_config.json", "*.safetensors"), command="edgeft merge {folder}"),
    Kind("adapter", "an adapter", ("adapter_config.json",), unless=FULL, command="edgeft merge {folder} --base {base}"),
    Kind("MLX adapter", "an adapter of MLX", ("adapters.safetensors", "adapters.npz"), unless=("config.json",),
         hint="fuse it there: mlx_lm.fuse --de-quantize"),
    Kind("diffusers", "a diffusers pipeline", ("model_index.json",), hint="edgeft trains language models"),
    Kind("sentence-transformers", "an encoder of sentence-transformers",
         ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
         command="edgeft export {folder} --target onnx-portable-fp32 --texts FILE"),
)  # fmt: skip
MAKERS = (
    ("edgeft merge", ("merged.json",)),
    ("edgeft doctor", ("doctor.json",)),
    ("Trainer", ("trainer_state.json", "training_args.bin")),
    ("DeepSpeed", ("zero_to_fp32.py", "latest")),
    ("save_pretrained", ("config.json",)),
)


@dataclass(frozen=True)
class Listing:
    """The names in a folder and, with a slash, in the folders right below it; links that lead nowhere are `broken`."""

    folder: Path
    names: tuple[str, ...]
    broken: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Listing:
        """Raises BadInput for a folder that cannot be looked into."""
        broken: list[str] = []
        own = sorted(_names(folder, broken))
        below = [f"{name}/{inner}" for name, is_folder in own if is_folder for inner in _below(folder / name)]
        return cls(folder, (*(name + "/" * is_folder for name, is_folder in own), *below), tuple(sorted(broken)))

    def find(self, marks: Iterable[str], unless: Iterable[str] = ()) -> list[str]:
        """The files that one of the marks names."""
        return [
            name
            for name in self.names
            if not name.endswith("/") and _any(name, marks) and not _any(name.rpartition("/")[2], unless)
        ]

    @property
    def files(self) -> list[str]:
        """The names of files in the folder itself."""
        return [name for name in self.names if "/" not in name]


def _names(folder: Path, broken: list[str] | None = None) -> Iterator[tuple[str, bool]]:
    """(name, whether it is a folder) of what is a file or a folder; nothing else is ever opened."""
    try:
        with os.scandir(folder) as entries:
            for entry, _ in zip(entries, range(MANY), strict=False):
                if entry.is_dir() or entry.is_file():
                    yield entry.name, entry.is_dir()
                elif broken is not None and entry.is_symlink():
                    broken.append(entry.name)
    except OSError as problem:
        raise BadInput(folder, f"cannot be looked into: {problem.strerror}", "check its permissions") from None


def _below(folder: Path) -> list[str]:
    try:
        return [name for name, is_folder in sorted(_names(folder)) if not is_folder]
    except BadInput:  # one that may not be looked into is as good as none
        return []


def _any(name: str, marks: Iterable[str]) -> bool:
    """A mark with a star for a folder matches one folder below, never two; one without never matches below."""
    return any(mark.count("/") == name.count("/") and fnmatchcase(name, mark) for mark in marks)


def kind_of(listing: Listing) -> Kind | None:
    """What a folder is that is no plain model; None for a model, and for what is not known."""

    def fits(kind: Kind) -> bool:
        return bool(listing.find(kind.marks) and listing.find(kind.beside)) and not listing.find(kind.unless)

    return next(filter(fits, KINDS), None)


def words_of(kind: Kind, folder: Path) -> str:
    """What a folder is, for an adapter with the base that it names."""
    base = adapter_base(folder) if kind.name == "adapter" else ""
    return f"{kind.words} of {base!r}" if base else kind.words


def adapter_base(folder: Path) -> str:
    """The model that an adapter's folder says it was trained on; empty where it says none."""
    try:
        return str(json.loads((folder / "adapter_config.json").read_bytes()).get("base_model_name_or_path") or "")
    except (OSError, ValueError, AttributeError):
        return ""


def forms_of(listing: Listing) -> list[Form]:
    """How weights lie in a folder, in the order in which they would be taken; none where there are none."""
    found, taken = [], set[str]()
    for form in FORMS:
        names = set(listing.find(form.marks, form.unless))
        if names - taken:
            found.append(form)
        taken |= names
    return found


def made_by(listing: Listing) -> str:
    """Which program wrote a folder, as far as its files say."""
    return next((name for name, marks in MAKERS if listing.find(marks)), "")


def models_below(folder: Path) -> list[Path]:
    """The nearest folders below one that hold a model, checkpoint-1000 after checkpoint-500; of a cache snapshots."""
    found, waiting, left = list[Path](), [(folder, 0)], FOLDERS
    while waiting and left:
        (place, deep), left = waiting.pop(0), left - 1
        for name in _folders(place):
            try:
                inner = Listing.read(place / name)
            except BadInput:
                continue
            if kind_of(inner) or ("config.json" in inner.names and any(form.reads for form in forms_of(inner))):
                found.append(place / name)
            elif deep + 1 < DEEP:
                waiting.append((place / name, deep + 1))
    return sorted(found, key=_numbered)


def _folders(folder: Path) -> list[str]:
    """Folders in one, but for those of tools."""
    try:
        return [
            name for name, is_folder in sorted(_names(folder)) if is_folder and not name.startswith((".git", ".cache"))
        ]
    except BadInput:
        return []


def _numbered(folder: Path) -> tuple[str, int, str]:
    """checkpoint-1000 after checkpoint-500."""
    head, _, number = folder.name.rpartition("-")
    return (str(folder.parent / head), int(number), "") if number.isdigit() else (str(folder.parent), -1, folder.name)


def see(folder: Path | str) -> str:
    """The hint that leads to more about a folder."""
    quoted = f'"{folder}"' if " " in str(folder) else str(folder)
    return f"edgeft doctor {quoted}"


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in place of one that was not fetched."""
    try:
        with open(path, "rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def refuse_pointer(path: Path) -> None:
    """Nothing. Raises BadInput for a pointer of Git LFS."""
    if is_pointer(path):
        hint = f"fetch it: git lfs pull in {path.parent}, or hf download"
        raise BadInput(path, "is a pointer of Git LFS, not the file itself", hint)
