"""Is every tensor of a merged checkpoint what it must be: round(W0 + a (Wft - W0)), or its base's own bytes?

Worked out here from the base, what training left and the plan, by none of the merge's own code. Weights that trained
whole are compared bit for bit. An adapter's product is a sum over its rank, whose last bits depend on the order of
summation: there each stored value must be the nearest one to the exact sum (in fp64), or as near as the rounding errors
of fp32 sums allow, and no nearer value is passed over for anything larger.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgeft.data.dataset import TextTokenizer
from edgeft.engine.tuners import CHANGED
from edgeft.errors import BadInput
from edgeft.models.checkpoint import Checkpoint, TensorFile
from edgeft.models.headers import EMBEDDINGS, HEADS, blocks
from edgeft.models.layer_shares import Shares, layer_of
from edgeft.models.metrics import Rung
from edgeft.settings import Training
from edgeft.tuners import UP, module_of, other_factor

ADAPTER = "adapter_model.safetensors"
EPSILON = 2.0**-24  # half the distance of neighbouring fp32 values, relative
SHOWN = 4  # wrong tensors that are named
BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8, torch.float64: 53}  # of a value's mantissa
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float64: 0.0}


@dataclass
class Learnt:
    """What training left, by the names of the base's tensors: an adapter's module, or a whole tensor."""

    files: dict[str, TensorFile] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_learnt(trained: Path, base: Checkpoint, *, tied: bool) -> Learnt:
    """What training left, and names that the base does not have."""
    found = Learnt()
    kept = TensorFile(trained / (CHANGED if (trained / CHANGED).is_file() else ADAPTER))
    found.files = {"kept": kept}
    for key in kept.entries:
        if UP in key:
            continue
        module = module_of(key)
        adapter = module is not None
        try:
            name = base.name_of(f"{module}.weight" if adapter else key)
        except BadInput as problem:
            found.problems.append(problem.problem)
            continue
        (found.adapters if adapter else found.whole)[name] = key
        if tied and not adapter and name.endswith((*EMBEDDINGS, *HEADS)):  # one tensor that is stored twice
            twins = [other for other in base.owner if other.endswith((*EMBEDDINGS, *HEADS))]
            found.whole |= dict.fromkeys(twins, key)
    return found


def merged_rung(base_folder: Path, trained: Path, merged_folder: Path, training: Training, shares: Shares) -> Rung:
    """Every tensor of merged/ against what it must be, and all beside the tensors against the base's own."""
    base, merged = Checkpoint(base_folder), Checkpoint(merged_folder)
    config = _config(base_folder)
    learnt = read_learnt(trained, base, tied=bool(config.get("tie_word_embeddings", True)))
    problems = [*learnt.problems]
    problems += [f"{name}: missing" for name in sorted(base.owner.keys() - merged.owner.keys())]
    problems += [f"{name}: not in the base" for name in sorted(merged.owner.keys() - base.owner.keys())]
    shared = [name for name in base.owner if name in merged.owner]
    for name in shared:
        problem = tensor_problem(name, base, merged, learnt, training, shares.of(layer_of(name)))
        problems += [f"{name}: {problem}"] if problem else []
    wrong = len(problems)
    problems = problems[:SHOWN] + ([f"and {wrong - SHOWN} more"] if wrong > SHOWN else [])
    problems += side_problems(base_folder, merged_folder)
    changed = len({*learnt.adapters, *learnt.whole} & set(shared))
    exact = "bit for bit" if not learnt.adapters else "the others bit for bit"
    sums = f"{len(learnt.adapters)} with an adapter to the error of fp32 sums, " if learnt.adapters else ""
    return Rung(
        name="merged",
        against="W0 + a (Wft - W0)",
        compared=f"{len(shared)} tensors, {changed} of them changed",
        tolerance=f"{sums}{exact}; config, tokenizer and template as the base's",
        tensors=len(shared),
        problems=tuple(problems),
    )


def tensor_problem(
    name: str, base: Checkpoint, merged: Checkpoint, learnt: Learnt, training: Training, share: float
) -> str:
    """What is wrong with one merged tensor, or nothing."""
    if merged.shape(name) != base.shape(name):
        return f"shape {merged.shape(name)}, the base has {base.shape(name)}"
    entries = [checkpoint.owner[name].entries[name]["dtype"] for checkpoint in (merged, base)]
    if entries[0] != entries[1]:
        return f"stored in {entries[0]}, the base in {entries[1]}"
    wrong, worst = 0, 0.0
    for stored, expected, slack in expected_blocks(name, base, merged, learnt, training, share):
        if slack is None:
            wrong += int((_bits(stored) != _bits(expected)).sum())
            continue
        error = (stored.double() - expected).abs_()
        beyond = error / slack
        wrong += int((~(beyond <= 1.0)).sum())  # NaN is wrong too
        worst = max(worst, float(beyond.max()))
    if not wrong:
        return ""
    of = torch.Size(base.shape(name)).numel()
    return f"{wrong} of {of} values are others" + (f", up to {worst:.3g} times what rounding allows" if worst else "")


def expected_blocks(
    name: str, base: Checkpoint, merged: Checkpoint, learnt: Learnt, training: Training, share: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """(stored, expected, how far it may be; None: not at all) of a tensor, some rows at a time."""
    kept = learnt.files["kept"]
    factors = None
    if name in learnt.adapters and share:
        key = learnt.adapters[name]
        right = kept.read(key).double()
        left = kept.read(other_factor(key)).double()
        shape = base.shape(name)
        if (left.shape[0], right.shape[1]) != shape:  # GPT-2's Conv1D holds a matrix as in x out
            left, right = right.T, left.T
        if (left.shape[0], right.shape[1]) != shape:
            left, right = left[:0], right  # no product: every value below is a problem
        factors = left, right
    for part in blocks(base.shape(name)):
        stored, old = merged.read(name, part), base.read(name, part)
        if factors is not None:
            yield stored, *_with_adapter(old, *(factors[0][part], factors[1]), training.lora_scale, share)
        elif name in learnt.whole and share:
            new = kept.read(learnt.whole[name], part)
            wide = old.to(torch.float64 if old.dtype == torch.float64 else torch.float32)
            yield stored, (new if share == 1.0 else torch.lerp(wide, new.to(wide.dtype), share)).to(old.dtype), None
        else:
            yield stored, old, None


def _with_adapter(
    old: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(exact sum in fp64, how far the nearest stored value of an fp32 sum may be from it), elementwise.

    Half a unit in the last place of what stores it, and the rounding of a dot product over the rank, its scaling and
    two sums: (rank + 4) half units of fp32 of the sum of absolute terms.
    """
    before = old.double()
    change = scale * (left @ right) if len(left) == len(before) else torch.full_like(before, float("nan"))
    exact = before + share * change
    terms = before.abs() + abs(scale) * (left.abs() @ right.abs() if len(left) == len(before) else before.abs())
    sums = EPSILON * (right.shape[0] + 4) * terms
    bits = BITS[old.dtype]
    unit = torch.exp2(torch.floor(torch.log2((exact.abs() + sums).clamp(min=1e-300))) - bits)
    return exact, (unit + sums).clamp(min=SMALLEST[old.dtype])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The very bits of values: 0.0 and -0.0 are two, NaN equals itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def side_problems(base: Path, merged: Path) -> list[str]:
    """What a merged folder says of the model and its text otherwise than the base does."""
    problems = []
    ours, theirs = _config(merged), _config(base)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            problems.append(f"config.json: {key} is {ours.get(key)!r}, the base's {theirs.get(key)!r}")
    made, given = (TextTokenizer(folder) for folder in (merged, base))
    if made.backend.to_str() != given.backend.to_str():
        problems.append("tokenizer.json: another tokenizer than the base's")
    if made.template_text != given.template_text:
        problems.append("chat template: another one than the base's")
    for what in ("prefix_ids", "eos_ids", "eos_id"):
        one, other = getattr(made, what), getattr(given, what)
        problems += [f"{what}: {one}, the base's {other}"] if one != other else []
    return problems


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
