"""How does a GGUF file become a checkpoint folder again? transformers unpacks it, whole, in fp32."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from edgeft.errors import BadInput, DoesNotFit
from edgeft.machines.extras import missing
from edgeft.machines.limits import usable_memory
from edgeft.units import show_bytes

BYTES = 8  # that a byte of a GGUF file becomes at most: 4 bits to 32


def check_gguf(folder: Path, names: list[str]) -> None:
    """Nothing. Raises BadInput for several files, a part of one, and what is none."""
    if len(names) > 1:
        hint = f"name one: edgeft doctor {folder / names[0]}"
        if any("-of-" in name for name in names):
            hint = "put its parts together: llama-gguf-split --merge"
        raise BadInput(folder, f"holds {len(names)} GGUF files: {', '.join(names[:4])}", hint)
    path = folder / names[0]
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF" or not _is_whole(path):
        raise BadInput(path, "is no whole GGUF file", "copy or download it again")


def _is_whole(path: Path) -> bool:
    """Whether every tensor of a file lies in it; without the package gguf nobody can tell."""
    try:
        import gguf
    except ImportError:
        return True
    try:
        return bool(gguf.GGUFReader(str(path)).tensors)
    except Exception:  # of a file that is cut or changed the reader raises whatever comes first
        return False


def write(folder: Path, name: str, out: Path) -> None:
    """The model, tokenizer and template of a GGUF file as a standard folder. Raises BadInput, MissingExtra.

    In fp32, which every packed number fits; in 16 bits where the file has no others.
    """
    try:
        import gguf
    except ImportError:
        raise missing(name, "a GGUF file needs the package gguf", "gguf") from None
    from edgeft.models.checkpoint import quiet_transformers

    try:
        reader = gguf.GGUFReader(str(folder / name))
        _require_memory(folder / name, sum(int(tensor.n_elements) for tensor in reader.tensors))
        matrices = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # it draws a bar of its own
            _convert(folder, name, out, matrices)
    except BadInput:
        raise
    except Exception as problem:  # of a damaged file, a family that transformers cannot read, a tokenizer
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise BadInput(
            folder / name, f"cannot be read by transformers: {reason:.200}", "give the checkpoint itself"
        ) from None


def _require_memory(path: Path, elements: int) -> None:
    have = usable_memory()
    if have is not None and elements * 4 > have:
        problem = f"unpacking takes {show_bytes(elements * 4)} of memory, {show_bytes(have)} are there"
        raise DoesNotFit(path, problem, "run it on a machine with more")


def _convert(folder: Path, name: str, out: Path, matrices: set[str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    dtype = next(
        (dtype for kind, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)) if matrices == {kind}), None
    )
    if dtype is not None and all(torch.equal(p, p.to(dtype).float()) for p in model.parameters()):
        model = model.to(dtype)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)


def write_fast_tokenizer(folder: Path, out: Path) -> None:
    """tokenizer.json made from a folder's older files by transformers. Raises BadInput."""
    from transformers import AutoTokenizer

    from edgeft.models.checkpoint import quiet_transformers

    try:
        with quiet_transformers():
            AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(out)
    except Exception as problem:  # each tokenizer raises kinds of its own, and a missing package is one
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise BadInput(
            folder, f"transformers cannot make tokenizer.json: {reason:.200}", "name a --base that has one"
        ) from None
    if not (out / "tokenizer.json").is_file():
        raise BadInput(folder, "transformers made no tokenizer.json of it", "name a --base that has one")
