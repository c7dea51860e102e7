"""What is this folder, and can edgeft train what is in it? Headers are read, weights are not (no torch)."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft.errors import BadInput
from edgeft.models.doctor.exam import Base, Exam, pointer
from edgeft.models.doctor.findings import Diagnosis, Finding, Verdict
from edgeft.models.doctor.kinds import (
    Kind,
    Listing,
    adapter_base,
    forms_of,
    is_pointer,
    kind_of,
    made_by,
    models_below,
    words_of,
)
from edgeft.models.doctor.stores import weights_of
from edgeft.models.doctor.text import Text, look_at_text
from edgeft.models.headers import DTYPES, EMBEDDINGS, LAYER, lies_beside
from edgeft.units import show_bytes

LARGE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth")  # of a run that can go on


class Patient:
    """A folder as it was found: its diagnosis and, where weights can be read, the exam that a repair goes by."""

    def __init__(self, given: Path, base: Base | None = None) -> None:
        self.given, self.base = given, base
        self.listing = _listing(given)
        self.kind = kind_of(self.listing)
        self.forms = forms_of(self.listing)
        self.exam: Exam | None = None
        self.text = Text()
        self.findings: list[Finding] = []
        self.command = ""
        if broken := self.listing.broken:
            problem = f"{broken[0]} is a link to what is not there"
            self.findings.append(Finding(code="link", problem=problem, names=broken, hint="copy or download it again"))
        if self.kind is None and self.forms:
            self._examine()
        else:
            self._no_model()

    def _examine(self) -> None:
        """Of several forms the first that can be used or repaired; else what is wrong with the first."""
        exams = []
        for form in self.forms:
            exams.append(Exam(self.listing, form, self.base).run())
            if not exams[-1].hopeless:
                break
        first, last = exams[0], exams[-1]
        self.exam = first if last.hopeless else last
        if self.exam is not first:
            repair = f"the {last.form.words} beside them are taken"
            self.findings += [each.model_copy(update={"repair": repair, "hint": ""}) for each in first.hopeless]
        self.findings += self.exam.findings
        if self.exam.form.reads != "gguf":
            self.text, found = look_at_text(self.listing, self.rows, self.base.folder if self.base else None)
            self.findings += found
        self.findings += self._beside()

    def _beside(self) -> Iterator[Finding]:
        """What lies beside the weights: adapters, left out or put in unasked; other forms; a run's states."""
        folder = self.listing.folder
        if "adapter_config.json" in self.listing.names:
            hint = "transformers would load it over another base: move one of the two to a folder of its own"
            yield Finding(code="adapter", problem="an adapter lies beside the weights (adapter_config.json)", hint=hint)
        if (name := lies_beside(folder)) is not None:
            problem = f"adapters lie beside the weights ({name}), which training would leave out"
            yield Finding(code="adapter", problem=problem, hint="use the base that they were trained on")
        if large := [name for name in LARGE if name in self.listing.names]:
            size = show_bytes(sum((folder / name).stat().st_size for name in large))
            problem = f"the states of a run lie beside the weights ({', '.join(large)}, {size}): they are not read"
            yield Finding(code="optimizer", level="note", problem=problem)
        taken = self.exam.form if self.exam else None
        if others := [form.words for form in self.forms if form is not taken]:
            yield Finding(code="forms", level="note", problem=f"not read, beside the weights: {', '.join(others)}")

    def _no_model(self) -> None:
        """A folder of another kind, or without any weights that are known."""
        folder = self.listing.folder
        if self.kind is not None:
            self.command = _command(self.kind, folder)
            self.findings.append(
                Finding(code="kind", problem=f"it is {words_of(self.kind, folder)}, no model", hint=self.kind.hint)
            )
        elif not self.listing.names:
            self.findings.append(Finding(code="empty", problem="the folder is empty"))
        elif below := models_below(folder):
            self.command = f"edgeft doctor {shlex.quote(str(below[-1]))}"
            names = tuple(str(path.relative_to(folder)) for path in below)
            self.findings.append(Finding(code="below", problem="the model lies in a folder below", names=names))
        elif "config.json" in self.listing.names:
            problem = "config.json without weights: enough to plan, not to train"
            self.findings.append(Finding(code="weights", problem=problem, hint="copy or download the weights"))
        else:
            names = tuple(self.listing.files[:8])
            self.findings.append(
                Finding(code="unknown", problem="it holds no weights in any form that is known", names=names)
            )

    @property
    def rows(self) -> int:
        """Rows of the embedding; 0 where that is not known."""
        pieces = self.exam.pieces if self.exam else {}
        return next((piece.shape[0] for name, piece in pieces.items()
                     if name.endswith(EMBEDDINGS) and not LAYER.fullmatch(name) and piece.shape), 0)  # fmt: skip

    @property
    def verdict(self) -> Verdict:
        wrong = [each for each in self.findings if each.level == "wrong"]
        if not wrong:
            return "usable"
        return "repairable" if all(each.repair for each in wrong) else "not usable"

    def diagnosis(self) -> Diagnosis:
        """What is found, as a document."""
        verdict, wrong = self.verdict, [each for each in self.findings if each.level == "wrong"]
        exam, named = self.exam, self.base.name if self.base else None
        command = self.command
        if verdict == "repairable":
            base = f" --base {shlex.quote(named or 'MODEL')}" if any(each.from_base for each in wrong) or named else ""
            command = f"edgeft doctor {shlex.quote(str(self.given))}{base} --repair OUT"
        worst = next((each for each in wrong if not each.repair), wrong[0] if wrong else None)
        facts = _facts(exam) if exam is not None else {}
        return Diagnosis(
            folder=str(self.given), kind=self._words(), verdict=verdict,
            reason=worst.problem if worst else "", command=command, findings=tuple(self.findings),
            vocabulary=self.rows, tokens=self.text.tokens, chat_template=self.text.template, end_ids=self.text.end_ids,
            base=named, **facts,
        )  # fmt: skip

    def _words(self) -> str:
        if self.kind is not None:
            return self.kind.words
        maker = made_by(self.listing)
        by = f", by {maker}" if maker else ""
        return f"a model in {self.exam.form.words}{by}" if self.exam else "no model"


def _facts(exam: Exam) -> dict[str, Any]:
    """The numbers of a diagnosis, of the weights as a repair would write them."""
    store, pieces = exam.store, exam.pieces
    sizes: dict[str, int] = {}
    for piece in pieces.values():
        sizes[piece.dtype] = sizes.get(piece.dtype, 0) + math.prod(piece.shape)
    files = store.files if store is not None else [exam.folder / n for n in exam.listing.find(exam.form.marks)]
    return {
        "weights": exam.form.words, "files": len(files), "size_bytes": sum(path.stat().st_size for path in files),
        "tensors": len(weights_of(store.entries)) if store is not None else 0,
        "dtype": DTYPES[max(sizes, key=lambda code: sizes[code])] if sizes else "",
        "parameters": sum(sizes.values()), "model_type": str(exam.config.get("model_type") or ""), "tied": exam.tied,
    }  # fmt: skip


def _listing(given: Path) -> Listing:
    """Of a folder, or of one GGUF file. Raises BadInput for a file of another kind, and for what is not there."""
    if given.is_dir():
        return Listing.read(given)
    if not given.exists():
        raise BadInput(given, "no such folder", "give the folder of a checkpoint, or a GGUF file")
    if is_pointer(given):
        found = pointer(given)
        raise BadInput(given, "is a pointer of Git LFS, not the file itself", found.hint)
    with open(given, "rb") as file:
        if file.read(4) == b"GGUF":
            return Listing(given.parent, (given.name,))
    raise BadInput(given, "is a file of another kind, not a folder", f"give the folder that holds it: {given.parent}")


def _command(kind: Kind, folder: Path) -> str:
    base = adapter_base(folder)
    return kind.command.format(folder=shlex.quote(str(folder)), base=shlex.quote(base) if base else "BASE")


def diagnose(folder: Path, base: Base | None = None) -> Diagnosis:
    """What a folder is, what is wrong with it, what would put it right. Raises BadInput for what cannot be opened."""
    return Patient(folder, base).diagnosis()
