"""How does a folder that cannot be trained become one that can: whole or not at all, never over what was given?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgeft.documents import nearest_folder, staging, versions
from edgeft.errors import BadInput, DoesNotFit
from edgeft.models.checkpoint import Checkpoint, TensorFile, copy_side_files, write_checkpoint
from edgeft.models.doctor import gguf_source
from edgeft.models.doctor.diagnose import Patient, diagnose
from edgeft.models.doctor.exam import Base, Exam
from edgeft.models.doctor.findings import Finding, Repaired
from edgeft.models.doctor.kinds import see
from edgeft.models.doctor.quantised import Piece
from edgeft.models.doctor.stores import SafeStore, Store
from edgeft.models.doctor.text import TEXT_FILES, write_ends
from edgeft.models.doctor.unpack import make
from edgeft.models.headers import DTYPE_BYTES, DTYPES, Header
from edgeft.models.identity import sha256_of, written_files
from edgeft.progress import Progress
from edgeft.units import show_bytes

RECORD = "doctor.json"
SHARD_BYTES = 5_000_000_000
SIDE_BYTES = 40_000_000  # tokenizer and configs, at most
# what a repaired folder has no use for: records of other programs and of its former form
LEFT = (RECORD, "merged.json", "quantize_config.json", "quant_config.json", "latest", "training_args.json")
REMADE = ("form", "names", "quantised", "index", "head", "empty")  # findings for which weights are written anew
Mark = tuple[int, int, int]


class Shard(TensorFile):
    """One file that is to be written: its tensors are made when they are read."""

    def __init__(self, name: str, pieces: dict[str, Piece], source: Source) -> None:
        self.path, self.metadata, self.start, self.source = Path(name), {"format": "pt"}, 0, source
        self.entries, end = {}, 0
        for tensor, piece in pieces.items():
            begin, end = end, end + size_of(piece)
            self.entries[tensor] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [begin, end]}

    def read(self, name: str, rows: slice = slice(None)) -> Any:
        return self.source.make(name)[rows]


class Source(Checkpoint):
    """The repaired model as a checkpoint to be read: every tensor made from its pieces, files of a sensible size."""

    def __init__(self, exam: Exam, store: Store, base: Base | None) -> None:
        self.pieces, self.store, self.base, self.folder = exam.pieces, store, base, exam.folder
        parts = _parts(self.pieces)
        count = len(parts)
        names = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
        )
        self.files = [Shard(name, part, self) for name, part in zip(names, parts, strict=True)]
        self.owner = {name: file for file in self.files for name in file.entries}

    def make(self, name: str) -> Any:
        piece = self.pieces[name]
        if piece.how == "base":
            assert self.base is not None
            return Checkpoint(self.base.folder).read(piece.parts[""])
        made = make(self.store, piece)
        if tuple(made.shape) != piece.shape:
            raise BadInput(self.folder, f"{name}: {tuple(made.shape)} in the files, {piece.shape} was told")
        return made


def size_of(piece: Piece) -> int:
    count = 1
    for each in piece.shape:
        count *= each
    return count * DTYPE_BYTES[piece.dtype]


def _parts(pieces: dict[str, Piece]) -> list[dict[str, Piece]]:
    """The tensors of each file, in the order in which they were found."""
    parts, filled = [dict[str, Piece]()], 0
    for name, piece in pieces.items():
        if parts[-1] and filled + size_of(piece) > SHARD_BYTES:
            parts.append({})
            filled = 0
        parts[-1][name] = piece
        filled += size_of(piece)
    return parts


def repair(given: Path, out: Path, base: Base | None, progress: Progress) -> Repaired:
    """Write the repaired folder to `out`, with `doctor.json`: what was read, with hashes, and what was done.

    Raises BadInput for what cannot be repaired, for a place that is or holds what is read, and for files that change
    meanwhile; DoesNotFit where the disk has no room.
    """
    patient = Patient(given, base)
    exam = _repairable(patient)
    _apart(out, patient.listing.folder, base)
    before, files = patient.diagnosis(), _files(patient)
    marks = {path: _mark(path) for path in files}
    _require(
        out, sum(map(size_of, exam.pieces.values())) or gguf_source.BYTES * sum(mark[0] for mark in marks.values())
    )
    with staging(out) as temporary:
        side = _write_side(patient, exam, temporary)
        _write_weights(patient, exam, temporary, progress)
        _write_config(patient, exam, temporary)
        taken = _write_text(patient, temporary)
        if any(each.code == "end tokens" and each.repair for each in patient.findings):
            write_ends(temporary)
        _prove(temporary)
        changed = [path.name for path in files if not path.is_file() or _mark(path) != marks[path]]
        if changed:
            raise BadInput(
                given, f"changed while it was read: {', '.join(changed)}", "run it again when nothing writes there"
            )
        made = Repaired(
            versions=versions(), source=str(given), base=base.name if base else None, before=before,
            done=tuple(f"{each.problem}: {each.repair}" for each in patient.findings if _applies(each, base)),
            sources=_hashes(patient.listing.folder, [*files, *side]),
            base_sources=_hashes(base.folder, taken) if base else {},
            files=written_files(temporary, RECORD), dtype=_stored(temporary),
            exact=not any(each.code == "quantised" for each in patient.findings),
        )  # fmt: skip
        made.write(temporary / RECORD)
    return made


def _applies(finding: Finding, base: Base | None) -> bool:
    return bool(finding.repair) and (base is not None or not finding.from_base)


def _repairable(patient: Patient) -> Exam:
    """What a repair goes by. Raises BadInput where there is none, or nothing to do."""
    told, where = patient.diagnosis(), patient.given
    wrong = [each for each in patient.findings if each.level == "wrong"]
    if told.verdict == "not usable" or patient.exam is None:
        lines = [each.problem for each in wrong if not each.repair]
        raise BadInput(
            where,
            "cannot be repaired: " + "\n".join(lines),
            told.command or next((f.hint for f in wrong if f.hint), ""),
        )
    if patient.base is None and (needs := [each for each in wrong if each.from_base]):
        problem = f"{needs[0].problem}: {needs[0].repair} would put it right, and no base is named"
        raise BadInput(where, problem, f"{see(where)} --base MODEL --repair OUT")
    if not any(_applies(each, patient.base) for each in patient.findings):
        raise BadInput(where, "is usable as it is: there is nothing to repair", "leave --repair out")
    return patient.exam


def _apart(out: Path, folder: Path, base: Base | None) -> None:
    for read in (folder, *([base.folder] if base else [])):
        one, other = out.resolve(), read.resolve()
        if one == other or one in other.parents or (other in one.parents and read == folder):
            raise BadInput(out, f"is not apart from what is read: {read}", "choose another place with --repair")


def _require(out: Path, weights_bytes: int) -> None:
    need, free = weights_bytes + SIDE_BYTES, shutil.disk_usage(nearest_folder(out)).free
    if need > free:
        problem = f"the repaired folder takes {show_bytes(need)}, {show_bytes(free)} are free here"
        raise DoesNotFit(out, problem, f"free {show_bytes(need - free)}, or choose another disk with --repair")


def _files(patient: Patient) -> list[Path]:
    """The files that hold the weights."""
    exam, folder = patient.exam, patient.listing.folder
    assert exam is not None
    if exam.store is not None:
        return list(exam.store.files)
    return [folder / name for name in patient.listing.find(exam.form.marks, exam.form.unless)]


def _mark(path: Path) -> Mark:
    told = path.stat()
    return told.st_size, told.st_mtime_ns, told.st_ino


def _hashes(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in paths if path.is_file()}


def _write_side(patient: Patient, exam: Exam, temporary: Path) -> list[Path]:
    """Copy what is no weight; the files that were."""
    folder = patient.listing.folder
    if patient.given.is_file():  # of one GGUF file alone
        return []
    copy_side_files(folder, temporary)
    for name in LEFT:
        (temporary / name).unlink(missing_ok=True)
    return [folder / path.name for path in temporary.iterdir()]


def _write_weights(patient: Patient, exam: Exam, temporary: Path, progress: Progress) -> None:
    if exam.form.reads == "gguf":
        gguf_source.write(exam.folder, exam.listing.find(exam.form.marks)[0], temporary)
        return
    store = exam.store
    assert store is not None
    if isinstance(store, SafeStore) and not any(each.code in REMADE for each in patient.findings):
        for path in store.files:
            shutil.copyfile(path, temporary / path.name)
        for index in exam.folder.glob("model.safetensors.index.json") if len(store.files) > 1 else ():
            shutil.copyfile(index, temporary / index.name)
        return
    source = Source(exam, store, patient.base)
    for _, done, count in write_checkpoint(source, temporary, lambda _, tensor: tensor):
        progress("repair", done, count, {})


def _write_config(patient: Patient, exam: Exam, temporary: Path) -> None:
    """config.json as the exam would have it, its dtype that of the files; the very bytes where nothing is to change."""
    if exam.form.reads == "gguf":
        return
    path, config = temporary / "config.json", dict(exam.config)
    stored = _stored(temporary)
    for key in ("dtype", "torch_dtype"):
        if isinstance(config.get(key), str) and config[key] != stored and stored:
            config[key] = stored
    try:
        same = json.loads(path.read_bytes()) == config
    except (OSError, ValueError):
        same = False
    if not same:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _stored(folder: Path) -> str:
    """The dtype that most numbers of a folder are stored in."""
    sizes: dict[str, int] = {}
    for path in folder.glob("model*.safetensors"):
        for entry in Header(path).entries.values():
            begin, end = entry["data_offsets"]
            sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - begin
    return DTYPES[max(sizes, key=lambda code: sizes[code])] if sizes else ""


def _write_text(patient: Patient, temporary: Path) -> list[Path]:
    """Tokenizer and template of the base where the folder has none; the base's files that were taken."""
    wanted = [each for each in patient.findings if each.code in ("tokenizer", "rows", "template") and each.repair]
    base = patient.base
    if patient.text.source == "slow":
        gguf_source.write_fast_tokenizer(patient.listing.folder, temporary)
    if base is None:
        return []
    taken = base.has("config.json") if patient.exam and patient.exam.config_from_base else []
    if any(each.code in ("tokenizer", "rows") and each.from_base for each in wanted):
        for name in TEXT_FILES[:-1]:
            (temporary / name).unlink(missing_ok=True)
        text = base.has(*TEXT_FILES[:-1], *(() if (temporary / TEXT_FILES[-1]).is_file() else TEXT_FILES[-1:]))
        for name in text:
            shutil.copyfile(base.folder / name, temporary / name)
        taken += text
    elif any(each.code == "template" for each in wanted):
        from edgeft.data.tokenizer import find_template, write_template

        write_template(find_template(base.folder), temporary)
        taken += base.has("chat_template.jinja", "tokenizer_config.json")[:1]
    return [base.folder / name for name in dict.fromkeys(taken)]


def _prove(temporary: Path) -> None:
    """Nothing. Raises BadInput where what was written is still not usable: then it is not kept."""
    left = diagnose(temporary)
    if left.verdict != "usable":
        lines = "\n".join(each.problem for each in left.wrong)
        raise BadInput(
            "repair", f"did not make a model that can be trained: {lines}", "report it with what doctor says of it"
        )
