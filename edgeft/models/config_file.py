"""Where does a model's config.json lie, and is it that of a model that edgeft trains?"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

from edgeft.documents import shipped_folder
from edgeft.errors import BadInput
from edgeft.models.doctor.kinds import Listing, adapter_base, forms_of, kind_of, models_below, refuse_pointer, see
from edgeft.models.families import COMPOSITE, COPY_AGAIN, ENCODERS
from edgeft.models.hub import ask

UNREACHABLE = "the hub cannot be reached"


def config_path(model: str) -> Path:
    """Where the config.json of a checkpoint folder or a hub id lies. Raises BadInput."""
    folder, hint = Path(model).expanduser(), "give the folder of a Hugging Face checkpoint (with config.json)"
    if folder.is_file():
        raise BadInput(model, "is a file, not a folder", f"give the folder that holds it: {folder.parent}")
    if not folder.is_dir():
        # A hub id is `name` or `owner/name`; `owner` being a folder here means that a path was meant.
        is_path = folder.parent.name and folder.parent.is_dir()
        if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model) and not is_path:
            return _download(model)
        raise BadInput(model, "no such folder", near_model(model) or hint)
    if (folder / "config.json").is_file():
        return folder / "config.json"
    raise _no_config(model, folder, hint)


def _no_config(model: str, folder: Path, hint: str) -> BadInput:
    """The error for a folder without config.json: what it is instead, or where a model lies below it."""
    if (folder / "adapter_config.json").is_file():
        base = adapter_base(folder) or "an unnamed base"
        hint = "give the base as the model, or merge the adapter into it first: edgeft merge FOLDER --base BASE"
        return BadInput(model, f"is an adapter of {base}, not a model", hint)
    listing = Listing.read(folder)
    kind, forms, below = kind_of(listing), forms_of(listing), models_below(folder)
    if kind is not None or forms:
        what = kind.words if kind is not None else f"{forms[0].words} without config.json"
        return BadInput(model, f"is no model to train: {what}", f"{see(folder)} says what can be done")
    if below:
        return BadInput(model, "has no config.json, models lie below it", f"give one of them, such as {below[-1]}")
    return BadInput(model, "has no config.json", hint)


def _download(model: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    problem, hint = (
        UNREACHABLE,
        "go online, or give the folder of a model that is on this machine",
    )
    try:
        return Path(ask(hf_hub_download, model, "config.json"))
    except errors.GatedRepoError:
        problem, hint = "the hub model is gated", "accept its licence there and log in (hf auth login)"
    except errors.RepositoryNotFoundError:
        problem, hint = (
            "no such model on the hub",
            "check the spelling, or log in if it is private (hf auth login)",
        )
    except errors.EntryNotFoundError as missing:
        if not isinstance(missing, errors.LocalEntryNotFoundError):  # that one: offline, and not in the cache
            problem, hint = (
                "the hub model has no config.json",
                "for an adapter or a GGUF file, give its base model",
            )
    except (OSError, ValueError):
        pass
    if problem == UNREACHABLE and (near := near_model(model)):
        hint += f"; {near}"
    raise BadInput(model, f"no such folder, and {problem}", hint)


def near_model(model: str) -> str:
    """`did you mean PATH?`, of the models beside a folder that is not there, else of the shapes that come along."""
    folder, shapes = Path(model).expanduser(), shipped_folder("examples") / "configs"
    for place in (folder.parent, shapes):
        if not place.is_dir():
            continue
        known = {each.name.lower(): each for each in place.iterdir() if (each / "config.json").is_file()}
        for name in difflib.get_close_matches(folder.name.lower(), known, n=1, cutoff=0.7):
            found = known[name]
            shown = found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found
            return f"did you mean {shown}?" + (" (a shape to plan with, without weights)" if place == shapes else "")
    return ""


def read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as problem:
        raise BadInput(path, f"cannot be read: {problem.strerror}") from None
    except ValueError as problem:
        refuse_pointer(path)
        raise BadInput(path, f"is not JSON: {problem}", COPY_AGAIN) from None
    if not isinstance(value, dict):
        raise BadInput(path, f"expected a JSON object, got {type(value).__name__}", COPY_AGAIN)
    return value


def check_kind(path: Path, config: dict[str, Any]) -> None:
    """Raise BadInput for what is no causal language model in its original precision."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        hint = f'add the family, as in "model_type": "llama"; {see(path.parent)} may know it'
        raise BadInput(path, "missing model_type", hint)
    named = config.get("architectures") or [""]
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise BadInput(path, f"architectures: expected a list of names, got {named!r:.80}", COPY_AGAIN)
    architecture, reason = named[0], ""
    if config.get("is_encoder_decoder"):
        reason = f"{kind} is an encoder-decoder"
    elif kind in ENCODERS:
        reason = f"{kind} is an encoder"
    elif kind not in COMPOSITE and not re.search(r"(ForCausalLM|LMHeadModel|^)$", architecture):
        reason = f"{architecture} is not a ...ForCausalLM"
    if reason:
        hint = "edgeft trains decoder-only models that predict the next token; give one of those"
        raise BadInput(path, f"{reason}, so not a causal language model", hint)
    if config.get("quantization_config"):
        told = config["quantization_config"]
        method = told.get("quant_method", "method not named") if isinstance(told, dict) else "method not named"
        hint = f"give the checkpoint it was quantised from; {see(path.parent)} says whether it can be unpacked"
        raise BadInput(path, f"is quantised ({method}); a merge needs the original-precision weights", hint)


def text_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The language model's own part of a config, where it holds others too. Raises BadInput for one of another form."""
    if config["model_type"] not in COMPOSITE:
        return config
    text = config.get("text_config") or {}
    if not isinstance(text, dict):
        raise BadInput(path, f"text_config: expected a JSON object, got {type(text).__name__}", COPY_AGAIN)
    return COMPOSITE[config["model_type"]] | text
