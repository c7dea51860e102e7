"""What of a fine-tune lies beside a merge's weights? Adapters that no weight can hold, each at its layer's share.

An adapter's output times a share is exactly the output of one whose last matrix is. One that adds nothing is left out:
at a share of 0 the merge is the base itself.
"""

from __future__ import annotations

from pathlib import Path

import torch

from edgeft.merging.peft_folder import AdapterFile
from edgeft.models.bottleneck import places
from edgeft.models.checkpoint import Checkpoint, write_tensors
from edgeft.models.headers import BOTTLENECKS
from edgeft.models.layer_shares import Shares, layer_of
from edgeft.settings.tuners import AFTER, NARROW, SAVED, WIDE


def beside_problems(kept: AdapterFile, base: Checkpoint) -> list[str]:
    """What of a saved adapter does not fit its base, or is no bottleneck: a line each."""
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


def write_beside(kept: AdapterFile | None, out: Path, shares: Shares) -> int:
    """How many adapters lie beside the weights of the merge in `out`, after writing their file."""
    tensors: dict[str, torch.Tensor] = {}
    if kept is None:
        return 0
    for (module, where), parts in places(name.removeprefix(SAVED) for name in kept.entries).items():
        down, up = (kept.read(SAVED + parts[part]).float() for part in (NARROW, WIDE))
        up = up * shares.of(layer_of(module + "."))
        if up.any():
            tensors |= {f"{module}.{where}.{NARROW}": down, f"{module}.{where}.{WIDE}": up}
    if tensors:
        write_tensors(out / BOTTLENECKS, tensors)
    return len(tensors) // 2
