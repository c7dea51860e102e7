"""Does a folder hold the model that its config describes, in a form that trains; what would put it right? (no torch)

Each step looks at what the steps before would have made of the folder: names without wrappers, weights unpacked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeft.errors import BadInput
from edgeft.models.doctor.findings import Finding
from edgeft.models.doctor.kinds import Form, Listing, is_pointer
from edgeft.models.doctor.names import added, plain_names
from edgeft.models.doctor.quantised import WORDS, Piece, cannot_unpack, plan_pieces, settings_of
from edgeft.models.doctor.stores import OPEN, SafeStore, Store, empty_tensors, small_json, weights_of
from edgeft.models.families import COMPOSITE, FAMILIES, in_conv1d
from edgeft.models.headers import (
    AGAIN,
    EMBEDDINGS,
    FLOATING,
    HEADS,
    LAYER,
    PACKED,
    Header,
    check_tied,
    shape_problems,
)
from edgeft.models.spec import ModelSpec, spec_of

UNMERGED = re.compile(r"\.(base_layer|original_module|modules_to_save|lora_[AB]|lora_embedding_[AB])\.")
MERGE = "for weights of a part of the model: edgeft merge {} --base MODEL"


class Base:
    """The model that a folder was made from, for what the folder lacks."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    def has(self, *names: str) -> list[str]:
        return [name for name in names if (self.folder / name).is_file()]


class Exam:
    """One form of a folder's weights, looked at from end to end; what is found, and the model that a repair writes."""

    def __init__(self, listing: Listing, form: Form, base: Base | None) -> None:
        self.listing, self.form, self.base = listing, form, base
        self.folder = listing.folder
        self.findings: list[Finding] = []
        self.store: Store | None = None
        self.config: dict[str, Any] = {}
        self.config_from_base = False
        self.pieces: dict[str, Piece] = {}
        self.from_base: list[str] = []  # names of tensors that the base gives
        self.spec: ModelSpec | None = None
        self.tied: bool | None = None

    def run(self) -> Exam:
        steps: tuple[Callable[[], Iterator[Finding]], ...] = (
            self._settings, self._files, self._names, self._packed, self._shapes, self._tied,
        )  # fmt: skip
        for step in steps:
            try:
                self.findings += step()
            except BadInput as problem:
                self.findings.append(told(step.__name__[1:], problem))
                if step.__name__ == "_files":
                    break
        return self

    @property
    def hopeless(self) -> list[Finding]:
        """What is wrong and no repair, nor a base, would change."""
        return [each for each in self.findings if each.level == "wrong" and not each.repair]

    def _settings(self) -> Iterator[Finding]:
        """config.json: there, readable, of a model that edgeft trains."""
        path = self.folder / "config.json"
        if is_pointer(path):
            yield pointer(path)
            return
        try:
            self.config = json.loads(path.read_bytes())
            problem = "" if isinstance(self.config, dict) else "config.json holds no object"
        except FileNotFoundError:
            problem = "there is no config.json"
        except OSError as error:
            raise BadInput(path, f"cannot be read: {error.strerror}", "check its permissions") from None
        except ValueError:
            problem = "config.json is not JSON"
        if self.form.reads == "gguf" and problem:
            return
        if problem:
            yield self._take_config(problem)
        elif not isinstance(self.config.get("model_type"), str):
            yield self._name_type()
        if "auto_map" in self.config and self.config.get("model_type") not in FAMILIES:
            hint = "edgeft runs no code of a checkpoint"
            yield Finding(code="code", level="note", problem="config.json names code of its own (auto_map)", hint=hint)

    def _take_config(self, problem: str) -> Finding:
        self.config = {}
        if self.base is not None:
            self.config, self.config_from_base = dict(self.base.config), True
        return Finding(code="config", problem=problem, repair="the base's config.json", from_base=True)

    def _name_type(self) -> Finding:
        """A config without model_type: the class it names may tell."""
        names = self.config.get("architectures")
        named = names[0] if isinstance(names, list) and names else ""
        kind = next((kind for kind, family in FAMILIES.items() if family.architecture == named), None)
        problem = "config.json has no model_type"
        if kind is None:
            return self._take_config(problem)
        self.config["model_type"] = kind
        return Finding(code="model_type", problem=problem, repair=f"model_type: {kind}, as {named} says")

    def _files(self) -> Iterator[Finding]:
        """The files of the weights: all there, whole, and saying the same of themselves as their index."""
        names = self.listing.find(self.form.marks, self.form.unless)
        if pointers := [name for name in names if is_pointer(self.folder / name)]:
            yield pointer(self.folder / pointers[0], len(pointers))
            raise BadInput(self.folder, "its weights were not fetched", "git lfs pull, or hf download")
        if self.form.reads == "gguf":
            yield from self._gguf(names)
            return
        if self.form.reads not in OPEN:
            raise BadInput(self.folder, f"holds {self.form.words}, which edgeft does not read", self.form.hint)
        try:
            self.store = OPEN[self.form.reads](self.listing, self.form)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as damage:
            raise BadInput(self.folder, f"holds {self.form.words} that are not whole: {damage!r:.120}", AGAIN) from None
        if self.form.name != "safetensors":
            problem = f"the weights are {self.form.words}"
            yield Finding(code="form", problem=problem, repair="written as safetensors", names=tuple(names[:8]))
        for code, lines in self.store.faults:
            yield _of_files(code, lines)
        if empty := list(empty_tensors(weights_of(self.store.entries))):
            hint = "ZeRO's stage 3 saved them before they were gathered: give the folder that has its shards too"
            yield Finding(code="empty", problem=f"{len(empty)} tensors are empty", names=tuple(empty), hint=hint)

    def _gguf(self, names: list[str]) -> Iterator[Finding]:
        from edgeft.models.doctor.gguf_source import check_gguf

        check_gguf(self.folder, names)
        repair = "its numbers, unpacked, as safetensors, with its tokenizer and template"
        yield Finding(code="form", problem="the weights are a GGUF file", repair=repair, names=tuple(names))

    def _names(self) -> Iterator[Finding]:
        """Names without what wrapped the model."""
        if self.store is None:
            return
        self.plain = plain_names(weights_of(self.store.entries))
        wrapped = {name: own for name, own in self.plain.items() if name != own}
        if wrapped:
            first = next(iter(wrapped))
            prefix = added(first, wrapped[first])
            problem = f"{len(wrapped)} of {len(self.plain)} tensors have {prefix!r} in their names: "
            yield Finding(code="names", problem=problem + "what wrapped the model was saved too", names=tuple(wrapped),
                          repair=f"written without {prefix!r}")  # fmt: skip
        if inside := [name for name in self.plain if UNMERGED.search(name)]:
            hint = "merge it where it was trained: model.merge_and_unload().save_pretrained(...)"
            problem = f"{len(inside)} tensors are of an adapter that was saved inside the model"
            yield Finding(code="unmerged", problem=problem, names=tuple(inside), hint=hint)
        if len(set(self.plain.values())) < len(self.plain):
            raise BadInput(self.folder, "several tensors have one name without their wrappers", "save the model inside")

    def _packed(self) -> Iterator[Finding]:
        """Weights that a quantiser packed, as they would be unpacked."""
        if self.store is None:
            return
        entries = {self.plain[name]: entry for name, entry in weights_of(self.store.entries).items()}
        own = {plain: name for name, plain in self.plain.items()}
        planned = plan_pieces(entries, self.config, lambda name: small_json(self._raw(own[name])))
        self.pieces = {name: replace(piece, parts={role: own[each] for role, each in piece.parts.items()})
                       for name, piece in planned.items()}  # fmt: skip
        packed = {name: piece for name, piece in self.pieces.items() if piece.how != "copy"}
        left = [f"{name}: {piece.dtype}" for name, piece in self.pieces.items()
                if piece.how == "copy" and piece.dtype not in FLOATING and PACKED.search(name)]  # fmt: skip
        settings = settings_of(self.config)
        self.config = {k: v for k, v in self.config.items() if k not in ("quantization_config", "quantization")}
        if not (packed or left or settings):
            return
        method = next((WORDS[piece.how] for piece in packed.values()), settings.get("quant_method", "a quantiser"))
        why = next(filter(None, map(cannot_unpack, packed.values())), "")
        if in_conv1d(str(self.config.get("model_type"))) and packed:
            why = "weights that are stored in x out"
        if left or why:
            problem = f"the weights are packed ({method}{f', {why}' if why else ''}), and that is not read here"
            hint = "give the checkpoint it was quantised from; edgeft quantises in memory, and again on export"
            yield Finding(code="quantised", problem=problem, names=tuple(left or packed), hint=hint)
        elif packed:
            repair = f"unpacked to {next(iter(packed.values())).dtype}; what was rounded stays rounded"
            problem = f"{len(packed)} weights are packed by {method}"
            yield Finding(code="quantised", problem=problem, names=tuple(packed), repair=repair)
        else:
            problem = "config.json says that the weights are quantised, and none of them is"
            yield Finding(code="not quantised", problem=problem, repair="config.json without that")

    def _raw(self, name: str) -> bytes:
        return self.store.raw(name) if isinstance(self.store, SafeStore) else b""

    def _spec(self, config: dict[str, Any]) -> ModelSpec:
        """The shape by a config; of a family that transformers alone knows, of the config that lies on a disk."""
        place = self.base.folder if self.config_from_base and self.base else self.folder
        return spec_of(place / "config.json", config, str(self.folder))

    def _shapes(self) -> Iterator[Finding]:
        """The tensors of config.json's model, all of them and in their shapes; and what else would make them fit."""
        if not self.config:
            return
        self.spec = self._spec(self.config)
        self.tied = self.spec.tie_word_embeddings
        shapes = {name: piece.shape for name, piece in self.pieces.items()}
        problems = shape_problems(shapes, self.spec) if shapes else []
        if not problems:
            return
        fixes = (fix(shapes, problems) for fix in (self._rows, self._head, self._other_config))
        problem = f"{len(problems)} tensors are not those of config.json"
        other = Finding(code="tensors", problem=problem, names=tuple(problems), hint=MERGE.format(self.folder))
        yield next(filter(None, fixes), other)

    def _fits(self, shapes: dict[str, tuple[int, ...]], **changes: Any) -> bool:
        config = {**self.config, **changes}
        if self.config.get("model_type") in COMPOSITE:
            config = self.config | {"text_config": {**(self.config.get("text_config") or {}), **changes}}
        try:
            spec = self._spec(config)
        except BadInput:
            return False
        if shape_problems(shapes, spec):
            return False
        self.config, self.spec, self.tied = config, spec, spec.tie_word_embeddings
        return True

    def _rows(self, shapes: dict[str, tuple[int, ...]], problems: list[str]) -> Finding | None:
        """Embedding and head with other rows than vocab_size says."""
        found = {shape[0] for name, shape in shapes.items() if name.endswith((*EMBEDDINGS, *HEADS)) and shape
                 and not LAYER.fullmatch(name)}  # fmt: skip
        told = self.config.get("vocab_size")
        if len(found) != 1 or not self._fits(shapes, vocab_size=(rows := found.pop())):
            return None
        problem = f"config.json says vocab_size {told}, the embedding has {rows} rows"
        return Finding(code="vocab_size", problem=problem, names=tuple(problems), repair=f"vocab_size: {rows}")

    def _head(self, shapes: dict[str, tuple[int, ...]], problems: list[str]) -> Finding | None:
        """A head that is missing though config.json does not tie it."""
        if any(name.endswith(HEADS) and not LAYER.fullmatch(name) for name in shapes) or self.tied:
            return None
        config, base = self.config, self.base
        problem = "the head (lm_head.weight) is missing, and config.json does not tie it to the embedding"
        if not self._fits(shapes, tie_word_embeddings=True):
            return None
        repair = "the base's head"
        if base is not None and base.config.get("tie_word_embeddings", False):
            repair = "tie_word_embeddings: true, as in the base"
        elif base is not None:
            embedding = next(shape for name, shape in shapes.items() if name.endswith(EMBEDDINGS))
            self.config, self.spec, self.tied = config, self._spec(config), False
            found = head_of(base)
            if found is None or found[1].shape(found[0]) != embedding:
                return Finding(code="head", problem=problem, hint=f"{base.name} has no head of {embedding}")
            self.from_base = [found[0]]
            entry = found[1].entries[found[0]]
            self.pieces[found[0]] = Piece(embedding, entry["dtype"], "base", {"": found[0]})
        return Finding(code="head", problem=problem, repair=repair, from_base=True)

    def _other_config(self, shapes: dict[str, tuple[int, ...]], problems: list[str]) -> Finding | None:
        """A config of another model, where the base's own fits."""
        if self.base is None or self.config_from_base:
            return None
        own, self.config, self.config_from_base = self.config, dict(self.base.config), True
        if not self._fits(shapes):
            self.config, self.config_from_base = own, False
            return None
        problem = f"config.json is not that of these tensors: {problems[0]}"
        return Finding(code="tensors", problem=problem, names=tuple(problems), repair="the base's config.json",
                       from_base=True)  # fmt: skip

    def _tied(self) -> Iterator[Finding]:
        """Head and embedding that config.json ties, and the files hold as two different tensors."""
        outside = [name for name in self.pieces if not LAYER.fullmatch(name)]
        embedding = next((name for name in outside if name.endswith(EMBEDDINGS)), None)
        head = next((name for name in outside if name.endswith(HEADS)), None)
        if not self.tied or embedding is None or head is None:
            return
        if self._equal(embedding, head):
            del self.pieces[head]  # written once
            return
        self.config["tie_word_embeddings"], self.tied = False, False
        problem = f"config.json ties {head} to {embedding}, the files hold two different tensors"
        yield Finding(code="tied", problem=problem, names=(embedding, head),
                      repair="both are kept, tie_word_embeddings: false")  # fmt: skip

    def _equal(self, embedding: str, head: str) -> bool:
        """Whether two tensors are the same, without loading them where the files can be compared."""
        if isinstance(self.store, SafeStore) and self.pieces[embedding].how == self.pieces[head].how == "copy":
            try:
                check_tied(self.folder, _headers(self.store))
            except BadInput:
                return False
            return True
        import torch

        from edgeft.models.doctor.unpack import make

        assert self.store is not None
        one, other = (make(self.store, self.pieces[name]) for name in (embedding, head))
        return one.shape == other.shape and torch.equal(one, other)


def head_of(base: Base) -> tuple[str, Header] | None:
    """A base's head and the file that has it."""
    from edgeft.models.headers import weight_files

    headers = [Header(path) for path in weight_files(base.folder)]
    return next(((name, header) for header in headers for name in header.entries
                 if name.endswith(HEADS) and not LAYER.fullmatch(name)), None)  # fmt: skip


def _headers(store: SafeStore) -> list[Header]:
    return list({header.path: header for header in store.owner.values()}.values())


def told(code: str, problem: BadInput) -> Finding:
    """An error as a finding that nothing repairs."""
    return Finding(code=code, problem=f"{problem.where}: {problem.problem}", hint=problem.hint)


def pointer(path: Path, count: int = 1) -> Finding:
    more = f", and {count - 1} more are" if count > 1 else ""
    return Finding(code="pointer", problem=f"{path.name} is a pointer of Git LFS, not the file itself{more}",
                   hint=f"fetch it: git lfs pull in {path.parent}, or hf download")  # fmt: skip


def _of_files(code: str, lines: list[str]) -> Finding:
    problem, repair = {
        "twice": ("tensors are in two files, with different values", ""),
        "copies": ("tensors are in two files, with the same values", "each is written once"),
        "index": ("the index does not say where tensors lie", "the index is written again"),
        "no index": ("shards without an index", "the index is written again"),
    }[code]
    return Finding(code="twice" if code == "twice" else "index", problem=problem, names=tuple(lines), repair=repair,
                   hint="" if repair else "remove the files that are not of this checkpoint")  # fmt: skip
