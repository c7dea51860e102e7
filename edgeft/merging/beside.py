"""What of a fine-tune lies beside a merge's weights? Adapters that no weight can hold, each at its layer's share.

An adapter's output times a share is exactly the output of one whose last matrix is. One that adds nothing is left out:
at a share of 0 the merge is the base itself. Keys and values before the text have no share: they are there or not.
"""

from __future__ import annotations

from pathlib import Path

import torch

from edgeft.errors import BadInput
from edgeft.merging.peft_folder import AdapterFile
from edgeft.models import soft_prompt
from edgeft.models.bottleneck import places
from edgeft.models.checkpoint import Checkpoint, write_tensors
from edgeft.models.headers import BOTTLENECKS, KV_PREFIX
from edgeft.models.kv_prefix import PEFT_KIND, PEFT_NAME, kept
from edgeft.models.layer_shares import Shares, layer_of
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.settings.tuners import AFTER, NARROW, SAVED, WIDE


def beside_problems(kept: AdapterFile, base: Checkpoint, kind: str) -> list[str]:
    """What of a saved adapter does not fit its base, or is nothing that lies beside one: a line each."""
    if PEFT_NAME in kept.entries:
        return _prefix_problems(kept, read_model_spec(str(base.folder)), kind)
    try:
        found = places(name.removeprefix(SAVED) for name in kept.entries)
    except ValueError as problem:
        return [f"{problem}: no part of a bottleneck"]
    problems = []
    for (module, where), parts in found.items():
        if missing := sorted({NARROW, WIDE} - parts.keys()):
            problems.append(f"{module}.{where}: {', '.join(missing)} missing")
            continue
        down, up = (kept.shape(SAVED + parts[part]) for part in (NARROW, WIDE))
        own, inside = base.find(f"{module}.weight"), f"{module.partition('.')[2]}."
        if down != up[::-1]:
            problems.append(f"{module}.{where}: {down} and {up} are no bottleneck")
        elif (own is None and where == AFTER) or not any(inside in name for name in base.owner):
            problems.append(f"{module}: not in the base")
        elif own is not None and up[0] not in base.shape(own):
            problems.append(f"{module}: {up[0]} outputs in the fine-tune, {base.shape(own)} in the base")
    return problems


def _prefix_problems(saved: AdapterFile, spec: ModelSpec, kind: str) -> list[str]:
    if kind == soft_prompt.PEFT_KIND:
        found, width = saved.shape(PEFT_NAME), spec.hidden_size
        fits = len(found) == 2 and found[1] == width
        return [] if fits else [f"{PEFT_NAME}: {found} in the fine-tune, the base's embeddings have {width} numbers"]
    found, width = saved.shape(PEFT_NAME), 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim
    if len(found) == 2 and found[1] == width:
        return []
    return [f"{PEFT_NAME}: {found} in the fine-tune, the base's layers have keys and values of {width} numbers"]


def check_whole(kind: str, shares: Shares) -> None:
    """Raise BadInput for a share of what is there or is not, as a prefix is: it is at 1, and at 0 the base is."""
    if kind in (PEFT_KIND, soft_prompt.PEFT_KIND) and not shares.nothing and shares != Shares():
        problem = f"a share of {shares}, but keys and values before the text are there or not: none lie between"
        raise BadInput("--wise-alpha", problem, "use 1, or 0 for the base itself")


def write_beside(
    saved: AdapterFile | None, kind: str, spec: ModelSpec, base: Path, out: Path, shares: Shares
) -> int:  # fmt: skip
    """How many adapters lie beside the weights of the merge in `out`, after writing their file.

    A soft prompt lies there as what the layers of `base` make of it.
    """
    tensors: dict[str, torch.Tensor] = {}
    if saved is None:
        return 0
    if PEFT_NAME in saved.entries:
        if shares.nothing:
            return 0
        embeds = kind == soft_prompt.PEFT_KIND
        pairs = soft_prompt.pairs_of(saved.read(PEFT_NAME), base, spec, embeds=embeds)
        write_tensors(out / KV_PREFIX, kept(pairs))
        return len(pairs)
    for (module, where), parts in places(name.removeprefix(SAVED) for name in saved.entries).items():
        down, up = (saved.read(SAVED + parts[part]).float() for part in (NARROW, WIDE))
        up = up * shares.of(layer_of(module + "."))
        if up.any():
            tensors |= {f"{module}.{where}.{NARROW}": down, f"{module}.{where}.{WIDE}": up}
    if tensors:
        write_tensors(out / BOTTLENECKS, tensors)
    return len(tensors) // 2
