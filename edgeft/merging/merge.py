"""What is the model between base and fine-tuned? W0 + a (Wft - W0), tensor by tensor, in the base's own precision.

Wise-FT (arXiv 2109.01903): one code path for every adapter that a weight can hold and for weights that trained. What no
weight can hold lies beside them (`beside`).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeft.documents import sha256_file, staging, versions
from edgeft.errors import BadInput
from edgeft.machines import meter
from edgeft.memory import disk, prompted, stages
from edgeft.merging.ancestors import ancestors_of
from edgeft.merging.beside import check_whole, write_beside
from edgeft.merging.change import Change
from edgeft.merging.peft_folder import read_adapter_config
from edgeft.merging.result import Merged, MergedCheckpoint, MergedForeign, Trained
from edgeft.merging.steps import Rows
from edgeft.models import soft_prompt
from edgeft.models.checkpoint import Checkpoint, copy_side_files, local_folder, write_checkpoint
from edgeft.models.headers import blocks, lies_beside, refuse_beside
from edgeft.models.identity import check_files, check_inputs, model_inputs, weights_sha256, written_files
from edgeft.models.layer_shares import Shares, check_shares, layer_of
from edgeft.models.metrics import Sweep
from edgeft.models.output_biases import give_biases
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.progress import Progress
from edgeft.training.result import TrainResult

# what a fine-tune's own folder says about text and its end, where it has the file, goes before the base's
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
              "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json")  # fmt: skip
TRAIN_AGAIN = "put the files back, or train again on these: run edgeft plan and edgeft train once more"
END_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def blend(stored: torch.Tensor, tuned: Rows, wise_alpha: float) -> tuple[float, float]:
    """Turn `stored` W0 into W0 + a (Wft - W0), in place, by blocks of rows; (sum of squared moves, of squared W0).

    The sum is in fp32 and rounded once to the tensor's dtype. Exactly W0 at 0 and exactly Wft, so rounded, at 1.
    """
    moved = total = 0.0
    for part in blocks(tuple(stored.shape)):
        wanted = tuned(part)
        block = stored[part] if stored.ndim else stored
        before = block.to(wanted.dtype, copy=True)
        block.copy_(wanted if wise_alpha == 1.0 else torch.lerp(before, wanted, wise_alpha))
        total += float(torch.linalg.vector_norm(before)) ** 2
        moved += float(torch.linalg.vector_norm(before.sub_(block))) ** 2
    return moved, total


@dataclass
class Blend:
    """Every tensor of the base as it is between base and fine-tuned, and how far all of them moved together."""

    change: Change
    shares: dict[str, float]  # of the tensors that the fine-tune changed
    untied: bool  # whether a tied head becomes a tensor of its own, since the fine-tune moved it alone
    moved: float = 0.0  # sum of squares
    total: float = 0.0

    @classmethod
    def open(cls, tuned: Path, base: Checkpoint, shares: Shares, *, tied: bool) -> Blend:
        """Of a fine-tune and its base, to which an untied head is added."""
        change = Change(tuned, base, tied=tied)
        untied = change.untied is not None and bool(shares.rest)
        if not shares.nothing:
            change.give_biases()
        if untied:
            add_head(base, str(change.untied), str(change.embedding))
        return cls(change, {n: shares.of(layer_of(n)) for n in change.steps.keys() & base.owner.keys()}, untied)

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self.shares.get(name):
            moved, total = blend(tensor, self.change.open(name, tensor), self.shares[name])
            self.moved, self.total = self.moved + moved, self.total + total
        return tensor

    @property
    def relative_change(self) -> float:
        """The length of all moves against that of the tensors that moved."""
        return (self.moved / self.total) ** 0.5 if self.total else 0.0

    def notes(self, beside: str | None, shares: Shares) -> list[str]:
        """What to say of a merge with a file of adapters beside its weights, and of one that changed nothing."""
        if beside:
            return [f"other tools than edgeft read the base alone here: the adapters are in {beside}"]
        still = not self.moved and not shares.nothing
        return ["nothing was changed: the fine-tune is the base, bit for bit"] if still else []


@dataclass(frozen=True)
class FineTune:
    """What is merged: a folder of `edgeft train` with its result, or anybody's adapter or checkpoint."""

    folder: Path
    model: str  # the base's name
    result: TrainResult | None
    spec: ModelSpec

    @classmethod
    def read(cls, folder: Path, base: str | None) -> FineTune:
        """Raises BadInput where a training result is no longer what it was, nothing names the base, or it has more."""
        ours = (folder / "train.json").is_file() and base is None
        result = TrainResult.read(folder / "train.json") if ours else None
        named = result.plan.job.model if result else base or base_of(folder)
        refuse_beside(local_folder(named), "a merge")
        if result is None:
            return cls(folder, named, None, read_model_spec(str(local_folder(named))))
        check_trained(folder, result)
        return cls(folder, named, result, result.plan.spec)

    @property
    def notes(self) -> list[str]:
        return [] if self.result else foreign_notes(self.folder, self.model)

    def merged(self, facts: dict[str, Any], out: Path, sweep: Sweep | None) -> Merged:
        """What merged.json says: where the training result lies, or what somebody's folder was merged into."""
        if self.result is None:
            return MergedForeign(**facts, base=self.model, tuned=str(self.folder))
        whole = self.folder.resolve()
        place = Trained(relative=os.path.relpath(whole, out.resolve()), absolute=str(whole))
        return MergedCheckpoint(**facts, train=self.result, trained=place, sweep=sweep)


def merge(
    trained: Path, out: Path, *, wise_alpha: float | Shares, progress: Progress, base: str | None = None,
    input_sha256: str = "", sweep: Sweep | None = None,
) -> Merged:  # fmt: skip
    """Write the merged checkpoint, a standard folder, to `out`.

    `trained` is what `edgeft train` wrote, or with `base` any PEFT adapter or fine-tuned checkpoint of that model.
    `wise_alpha` is one share for all tensors, or one for each group of layers.
    Raises BadInput for an alpha outside 0 to 1 and for a change that does not fit the base or no weight can hold,
    DoesNotFit when this machine's memory or the disk has no room.
    """
    shares = wise_alpha if isinstance(wise_alpha, Shares) else Shares(rest=wise_alpha)
    started = time.monotonic()
    meter.control_malloc()
    tuned = FineTune.read(trained, base)
    folder, spec = local_folder(tuned.model), tuned.spec
    source = Checkpoint(folder)
    check_shares(shares, spec.num_hidden_layers)
    disk.require(disk.merge_disk(spec, sum(file.path.stat().st_size for file in source.files)), out)
    meter.reset_peak(torch.device("cpu"))
    changed = Blend.open(trained, source, shares, tied=spec.tie_word_embeddings)
    check_whole(changed.change.kind, shares)
    predicted = expected_peak(source, changed.change, spec, shares)
    stages.check_host("merge", predicted)
    with staging(out) as temporary:
        copy_side_files(folder, temporary)
        notes = tuned.notes + bring_text_files(trained, temporary)
        if changed.untied:
            untie_config(temporary)
        if changed.change.added and not shares.nothing:
            give_biases(temporary, spec)
        for _, done, count in write_checkpoint(source, temporary, changed):
            progress("merge", done, count, {"bytes_now": meter.rss_bytes()})
        ancestors, told = ancestors_of(folder)
        beside = write_beside(changed.change.beside, changed.change.kind, spec, folder, temporary, shares)
        notes += told + changed.notes(lies_beside(temporary), shares)
        facts = {
            "input_sha256": input_sha256 or (sha256_file(trained / "train.json") if tuned.result else ""),
            "versions": versions(),
            "wise_alpha": shares.rest,
            "groups": shares.groups,
            "kind": changed.change.kind,
            "dtype": spec.dtype,
            "changed_tensors": len(changed.shares),
            "tensors": len(source.owner),
            "beside": beside,
            "untied_head": changed.untied,
            "relative_change": changed.relative_change,
            "predicted_peak_bytes": predicted,
            "measured_peak_bytes": meter.peak_rss_bytes(),
            "seconds": round(time.monotonic() - started, 2),
            "inputs": model_inputs(folder, weights=True),
            "files": written_files(temporary, "merged.json"),
            "ancestors": ancestors,
            "notes": tuple(notes),
        }
        merged = tuned.merged(facts, out, sweep)
        merged.write(temporary / "merged.json")
    return merged


def check_trained(trained: Path, result: TrainResult) -> None:
    """Raise BadInput where a training result, or the base it began with, is no longer what it was."""
    check_files(result.files, trained, f"edgeft train PLAN --out {trained}")
    check_inputs(result.inputs, result.plan.job, f"{trained}", TRAIN_AGAIN, data=False)


def verify_merged(merged_folder: Path, told: Path | None = None) -> tuple[MergedCheckpoint, Path]:
    """(what merged.json says, the folder that was merged) once both, and the base, are what they were.

    The trained folder lies where merged.json says, beside the merged one, or where the user has `told`. Raises BadInput
    naming what has changed since.
    """
    merged = MergedCheckpoint.read(merged_folder / "merged.json")
    trained = find_trained(merged_folder, merged, told)
    check_files(merged.files, merged_folder, f"edgeft merge {trained} --out {merged_folder}")
    check_trained(trained, merged.train)
    return merged, trained


def find_trained(merged_folder: Path, merged: MergedCheckpoint, told: Path | None = None) -> Path:
    """The training result that a merge was made from. Raises BadInput when it is gone or another one."""
    named = [
        (merged_folder / merged.trained.relative).resolve(),
        Path(merged.trained.absolute),
        merged_folder.parent / "train",
    ]
    places = [told] if told else named
    for folder in places:
        if (folder / "train.json").is_file() and sha256_file(folder / "train.json") == merged.input_sha256:
            return folder
    hint = "say where it lies with --train FOLDER, or run edgeft merge again"
    raise BadInput(places[0], "does not hold the training result this merge was made from", hint)


def bring_text_files(tuned: Path, out: Path) -> list[str]:
    """Let a fine-tune's own tokenizer, template and end tokens take the place of the base's in `out`; what differed."""
    found = [name for name in TEXT_FILES if (tuned / name).is_file()]
    other = [name for name in found if not _same(tuned / name, out / name)]
    for name in found:
        shutil.copyfile(tuned / name, out / name)
    if "chat_template" in _object(tuned / "tokenizer_config.json") and "chat_template.jinja" not in found:
        (out / "chat_template.jinja").unlink(missing_ok=True)  # the base's: it would be read first
    told = {key: value for key, value in _object(tuned / "config.json").items() if key in END_TOKENS}
    config = _object(out / "config.json")
    if any(config.get(key) != value for key, value in told.items()):
        (out / "config.json").write_text(json.dumps(config | told, indent=2) + "\n")
        other.append("config.json's " + ", ".join(told))
    return [f"from the fine-tune's own folder, other than the base's: {', '.join(other)}"] if other else []


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def foreign_notes(tuned: Path, model: str) -> list[str]:
    """What to say of an adapter that names another base than the one it is merged into."""
    named = str(_object(tuned / "adapter_config.json").get("base_model_name_or_path") or "")
    if not named or named == model or "--".join(("models", *named.split("/"))) in Path(model).resolve().parts:
        return []
    if Path(named).is_dir() and weights_sha256(Path(named)) == weights_sha256(local_folder(model)):
        return []
    return [f"the adapter names another base: {named}; it was merged into {model}"]


def base_of(tuned: Path) -> str:
    """The base model that an adapter folder names. Raises BadInput when it names none."""
    if not (tuned / "adapter_config.json").is_file():
        hint = "run edgeft train PLAN first, or name the base: edgeft merge FOLDER --base MODEL"
        raise BadInput(tuned / "train.json", "no such file", hint)
    named = read_adapter_config(tuned).get("base_model_name_or_path")
    if not named:
        raise BadInput(tuned, "names no base model", "give it: edgeft merge FOLDER --base MODEL")
    return str(named)


def expected_peak(source: Checkpoint, change: Change, spec: ModelSpec, shares: Shares) -> int:
    """Resident bytes of this process at its highest."""
    above = peak_above_baseline(source, change)
    if change.kind == soft_prompt.PEFT_KIND and not shares.nothing:  # the base reads it
        meter.import_all()
        above = max(above, prompted.reading_bytes(spec))
    return meter.rss_bytes() + above


def peak_above_baseline(source: Checkpoint, change: Change) -> int:
    """Bytes of the tensor that needs most."""
    return max(
        stages.merge_bytes(
            torch.Size(source.shape(name)).numel(),
            source.itemsize(name),
            changed=name in change,
            factor_bytes=change.factor_bytes.get(name, 0),
        )
        for name in source.owner
    )


def add_head(source: Checkpoint, head: str, embedding: str) -> None:
    """Give a tied checkpoint a head of its own, which so far reads the embedding's bytes."""
    if head in source:
        return
    file = source.owner[embedding]
    file.entries[head] = dict(file.entries[embedding])
    source.owner[head] = file


def untie_config(folder: Path) -> None:
    """Say in config.json that head and embedding are two tensors."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2) + "\n")
