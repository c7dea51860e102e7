"""What does a stranger have to know of a model before using it? Its card: base, licence, data, method, scores, proof.

Written in the hub's form (YAML, then Markdown) from what the stages recorded; nothing is said that is not recorded, and
no path of this machine is in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.data.sources import names
from edgeft.documents import saving
from edgeft.exporting.sbom import SPDX, model_licence
from edgeft.merging.result import Merged, MergedCheckpoint, MergedForeign
from edgeft.models.identity import DATA, SHOWN, cached_folder
from edgeft.models.layer_shares import Shares
from edgeft.models.metrics import Metrics, Pair
from edgeft.reporting.markdown import escape
from edgeft.reporting.words import difference_text, method_text, percent
from edgeft.training.result import TrainResult

if TYPE_CHECKING:
    from edgeft.exporting.bundle import Bundle

CARD = "README.md"
SEAL = "<!-- written by edgeft, {} -->"  # the hash of what stands before it: a card that was edited is left as it is


def merged_card(folder: Path, merged: Merged, bundle: Bundle | None = None, base: str | None = None) -> str:
    """The card of a merged checkpoint; with the bundle that was made and proven from it, its scores and its proof.

    `base` is the base's name on the hub, for one that is a folder here.
    """
    result = merged.train if isinstance(merged, MergedCheckpoint) else None
    trained_on = result.plan.job.model if result else merged.base if isinstance(merged, MergedForeign) else ""
    known, base = base is not None or is_hub_id(trained_on), base or trained_on
    licence = model_licence(Path(trained_on)) or model_licence(folder)
    share = "all of the change" if merged.shares == Shares() else f"{merged.wise_alpha:g} of the change"
    if merged.groups:
        share = "a share of the change that differs by layers"
    made = f"{name_of(base)} with {share} that a fine-tune made to it, in {merged.dtype}: a standard checkpoint folder."
    parts = [f"# {escape(name_of(base))}, fine-tuned", made]
    if merged.beside:
        parts.append(
            "Adapters that no weight can hold lie beside the weights: other tools than edgeft read the base alone."
        )
    parts += [*_trained(result), *_scores(result, merged, bundle), *_bundle(bundle), _licence(licence)]
    tags = ["edgeft", *([result.training.tuner] if result else [])]
    return sealed(
        _metadata(base if known else "", licence, result, tags=tags, library="transformers", relation="finetune"),
        parts,
        merged.versions,
    )


def adapter_card(result: TrainResult, base: str) -> str:
    """The card of a PEFT adapter as it was trained, for this base."""
    licence = model_licence(Path(result.plan.job.model))
    made = f"A PEFT adapter for {name_of(base)}."
    parts = [
        f"# An adapter of {escape(name_of(base))}",
        made,
        *_trained(result),
        *_scores(result, None, None),
        _licence(licence),
    ]
    tags = ["edgeft", result.training.tuner]
    return sealed(
        _metadata(base, licence, result, tags=tags, library="peft", relation="adapter"), parts, result.versions
    )


def write_card(folder: Path, text: str) -> bool:
    """Whether the card was written: not over one that a person wrote or changed."""
    path = folder / CARD
    if path.is_file() and not is_sealed(path.read_text(encoding="utf-8", errors="replace")):
        return False
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with saving(path):
            path.write_text(text, encoding="utf-8")
    return True


def sealed(metadata: Mapping[str, Any], parts: Iterable[str], versions: Mapping[str, str]) -> str:
    """A card of these parts, with the hash that tells later whether somebody has changed it."""
    from huggingface_hub import ModelCardData

    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    header = ModelCardData(**metadata).to_yaml()
    text = f"---\n{header.strip()}\n---\n\n" + "\n\n".join([*filter(None, parts), f"Made with {made}."]) + "\n"
    return text + SEAL.format(_digest(text)) + "\n"


def is_sealed(card: str) -> bool:
    """Whether a card is as edgeft wrote it."""
    text, _, seal = card.rstrip("\n").rpartition("\n")
    return seal == SEAL.format(_digest(text + "\n"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def name_of(model: str) -> str:
    """A model as it may be named to others: a hub id, or the name of its folder."""
    folder = Path(model).is_dir() or Path(model).is_absolute() or model.count("/") > 1
    return Path(model).name if folder else model


def is_hub_id(model: str) -> bool:
    """Whether a model was fetched from the hub by this name: everybody can, which is true of no folder here."""
    return bool(model) and not Path(model).is_dir() and cached_folder(model) is not None


def _metadata(
    base: str, licence: str, result: TrainResult | None, *, tags: Sequence[str], library: str, relation: str
) -> dict[str, Any]:
    """The hub's own fields; `base` is empty where nobody else has it, and a licence on no list goes by its name."""
    found: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": list(tags)}
    if base:
        found |= {"base_model": base, "base_model_relation": relation}
    licence = " ".join(licence.split())  # on one line: one of its own could end the header
    if licence.lower().removesuffix(" license") in SPDX:
        found["license"] = licence.lower().removesuffix(" license")
    elif licence:
        found |= {"license": "other", "license_name": licence}
    if result is None:
        return found
    job = result.plan.job
    sources = zip(DATA, (job.data, job.valid, job.test), strict=True)
    fetched = dict.fromkeys(source for role, source in sources if source and role not in result.inputs)  # by no file
    return found | ({"datasets": list(fetched)} if fetched else {})


def _trained(result: TrainResult | None) -> list[str]:
    if result is None:
        return ["How it was trained is not recorded: edgeft merged what others had trained."]
    job, rows = result.plan.job, []
    for role, source in zip(DATA, (job.data, job.valid, job.test), strict=True):
        if source is not None:
            digest = result.inputs.get(role, "")
            rows.append((role, names(source) if digest else source, digest[:SHOWN] if digest else "not recorded"))
    facts = [
        ("method", method_text(result.plan)),
        ("steps", f"{result.steps:,}, of {result.trained_tokens:,} trained tokens in all"),
        ("learning rate", f"{result.training.learning_rate:g}"),
        ("trained numbers", f"{result.trained_parameters:,}"),
        ("base weights", f"sha256 {result.base_sha256[:SHOWN]}"),
    ]
    return ["## Training", _table(("", ""), facts), _table(("data", "file", "sha256"), rows)]


def _scores(result: TrainResult | None, merged: Merged | None, bundle: Bundle | None) -> list[str]:
    proof = bundle.proof if bundle else None
    if proof is not None:
        return ["## Scores", _scored(proof.scores, proof.scored_on), *_pairs(proof.pairs)]
    if result is None:
        return []
    base, tuned, rows = result.base_valid, result.valid, "validation"
    if result.base_test is not None and result.test is not None:
        base, tuned, rows = result.base_test, result.test, "test"
    parts = ["## Scores", _scored({"base": base, "fine-tuned": tuned}, rows)]
    if merged is not None and (merged.wise_alpha != 1.0 or merged.groups):
        parts.append("These are of the whole change; this checkpoint takes a share of it and was not scored by itself.")
    return parts


def _scored(scores: Mapping[str, Metrics], source: str) -> str:
    count = next(iter(scores.values())).rows
    rows = [(each.named(name), f"{each.loss:.4f}", percent(each.exact_match)) for name, each in scores.items()]
    return _table((f"model, {count} {source} rows", "loss, nats a token", "exact match"), rows)


def _pairs(pairs: Sequence[Pair]) -> list[str]:
    rows = [(p.before, p.after, difference_text(p.loss), difference_text(p.exact_match, 100, 1)) for p in pairs]
    return [_table(("from", "to", "loss, 95% interval", "exact match, points, 95% interval"), rows)] if rows else []


def _bundle(bundle: Bundle | None) -> list[str]:
    if bundle is None or bundle.proof is None:
        return []
    rungs = ", ".join(rung.name for rung in bundle.proof.rungs)
    size = f"{bundle.target.name}, {bundle.size_bytes:,} bytes"
    text = f"A bundle for small devices ({size}) was made of this checkpoint. Its proof passed: {rungs}."
    return ["## On a device", text]


def _licence(licence: str) -> str:
    stated = (
        f"The base is under {escape(licence)}." if licence else "The base states no licence: ask those who made it."
    )
    return f"## Licence\n\n{stated} What the fine-tune adds is for those to license who trained it."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [[escape(cell) for cell in head], ["---"] * len(head), *([escape(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
