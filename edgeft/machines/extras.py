"""Which packages may be missing, of which part of edgeft is each, and which line installs that part as edgeft was?"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from edgeft.errors import MissingExtra

# Each extra of pyproject.toml that verbs ask for, by the modules that it brings, the first of which stands for it;
# `export` brings what `train` does too.
PARTS = {
    "train": ("torch", "numpy", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors"),
    "export": ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"),
    "report": ("matplotlib",),
    "data": ("datasets", "pyarrow"),
    "sign": ("cryptography",),
    "grammars": ("llguidance",),
    "gguf": ("gguf",),
    "llama": ("llama_cpp",),
    "lm-eval": ("lm_eval",),
}
WITHIN = {"export": ("train",)}


def install_line(part: str) -> str:
    """The command that adds a part of edgeft, from where it was installed: an index, a folder, a wheel, git."""
    try:
        told = importlib.metadata.distribution("edgeft").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        told = None
    origin: dict[str, Any] = json.loads(told) if told else {}
    url = str(origin.get("url", ""))
    if "vcs_info" in origin:
        at = origin["vcs_info"].get("requested_revision")
        wanted = f"edgeft[{part}] @ {origin['vcs_info']['vcs']}+{url}" + (f"@{at}" if at else "")
    elif url.startswith("file:"):
        wanted = f"{unquote(urlsplit(url).path)}[{part}]"
    else:
        wanted = f"edgeft[{part}] @ {url}" if url else f"edgeft[{part}]"
    editable = "--editable " if (origin.get("dir_info") or {}).get("editable") else ""
    return f"pip install {editable}{shlex.quote(wanted)}"


def missing(where: object, what: str, part: str, instead: str = "") -> MissingExtra:
    """The error (exit 5) for a package of a part that is not there; `instead` is what to do without it."""
    return MissingExtra(where, what, install_line(part) + (f", or {instead}" if instead else ""))


def need(part: str, where: str = "", instead: str = "") -> None:
    """Nothing. Raises MissingExtra, before any work begins, where a part of edgeft is not installed."""
    for each in (*WITHIN.get(part, ()), part):
        if importlib.util.find_spec(PARTS[each][0]) is None:
            name = PARTS[each][0]
            raise missing(where or name, f"{name} is not installed" if where else "is not installed", part, instead)


@contextmanager
def installed(verb_part: str = "") -> Iterator[None]:
    """Raise MissingExtra, with the line that installs it, where a package of some part is missing inside.

    `verb_part` is what the verb needs as a whole: its line is given rather than that of a part within it.
    """
    try:
        yield
    except ModuleNotFoundError as problem:
        module = (problem.name or "").partition(".")[0]
        part = next((part for part, modules in PARTS.items() if module in modules), None)
        if part is None:
            raise
        if part in WITHIN.get(verb_part, ()):
            part = verb_part
        raise missing(module.replace("_", "-"), "is not installed", part) from problem
