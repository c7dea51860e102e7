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
from typing import Any, NamedTuple

import torch

from edgeft.data.dataset import TextTokenizer
from edgeft.errors import BadInput
from edgeft.models.cache_names import cache_of
from edgeft.models.checkpoint import Checkpoint, TensorFile, read_changed
from edgeft.models.families import in_conv1d
from edgeft.models.headers import BOTTLENECKS, EMBEDDINGS, HEADS, KV_PREFIX, blocks
from edgeft.models.kv_prefix import PEFT_NAME
from edgeft.models.layer_shares import Shares, layer_of
from edgeft.models.metrics import Rung
from edgeft.models.output_biases import absent_biases, bias_key
from edgeft.models.parts import find_parts
from edgeft.models.spec import read_model_spec
from edgeft.models.streamed import load_streamed
from edgeft.settings.job import Training
from edgeft.settings.tuners import BETWEEN, ELEMENTS, GAIN, HANGING, LENGTHS, NARROW, SAVED, SHIFT, WIDE, adapter_parts

ADAPTER = "adapter_model.safetensors"
EPSILON = 2.0**-24  # half the distance of neighbouring fp32 values, relative
SHOWN = 4  # wrong tensors that are named
AT_ONCE_BYTES = 2**20  # of a tensor in fp32: what is made of them in fp64 stays in a CPU's cache
BITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8, torch.float64: 53}  # of a value's mantissa
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float64: 0.0}


@dataclass
class Learnt:
    """What training left, by the names of the base's tensors: an adapter's parts, or a whole tensor."""

    files: dict[str, TensorFile] = field(default_factory=dict)
    adapters: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)  # what no weight holds, by the names of the model
    shifted: bool = False  # whether a bias is added to, which the base may not have
    prefix: bool = False  # keys and values before the text, which no weight holds either
    problems: list[str] = field(default_factory=list)


def read_learnt(trained: Path, base: Checkpoint, *, tied: bool) -> Learnt:
    """What training left, and names that the base does not have."""
    found = Learnt()
    kept = read_changed(trained) or TensorFile(trained / ADAPTER)
    found.files = {"kept": kept}

    def place(name: str) -> str | None:
        try:
            return base.name_of(name)
        except BadInput as problem:
            found.problems.append(problem.problem)
            return None

    found.beside = {name.removeprefix(SAVED): name for name in kept.entries if HANGING.fullmatch(name)}
    adapters = adapter_parts(kept.entries)
    for module, keys in adapters.items():
        name = place(f"{module}.weight")
        if GAIN in keys and name is not None:
            found.shifted = True
            found.adapters |= {name: keys, f"{name.removesuffix('weight')}bias": keys}
        elif ELEMENTS in keys:
            found.adapters |= {name: keys} if name is not None else {}
            biased = base.find(f"{module}.bias")
            if biased is not None and kept.shape(keys[ELEMENTS])[0] != 1:  # of outputs
                found.adapters[biased] = keys
        elif missing := {"lora_A", "lora_B"} - keys.keys():
            found.problems.append(f"{module}: {', '.join(sorted(missing))} missing in the adapter")
        elif name is not None:
            found.adapters[name] = keys
    placed = {key for keys in adapters.values() for key in keys.values()}.union(found.beside.values())
    found.prefix = PEFT_NAME in kept.entries
    for key in kept.entries.keys() - placed - {PEFT_NAME}:
        if (name := place(key)) is None:
            continue
        found.whole[name] = key
        if tied and name.endswith((*EMBEDDINGS, *HEADS)):  # one tensor that is stored twice
            twins = [other for other in base.owner if other.endswith((*EMBEDDINGS, *HEADS))]
            found.whole |= dict.fromkeys(twins, key)
    return found


def merged_rung(base_folder: Path, trained: Path, merged_folder: Path, training: Training, shares: Shares) -> Rung:
    """Every tensor of merged/ against what it must be, and all beside the tensors against the base's own."""
    base, merged = Checkpoint(base_folder), Checkpoint(merged_folder)
    config = _config(base_folder)
    learnt = read_learnt(trained, base, tied=bool(config.get("tie_word_embeddings", True)))
    problems = [*learnt.problems]
    added = _given_zeros(base) if learnt.shifted and not shares.nothing else False
    problems += [f"{name}: missing" for name in sorted(base.owner.keys() - merged.owner.keys())]
    problems += [f"{name}: not in the base" for name in sorted(merged.owner.keys() - base.owner.keys())]
    shared = [name for name in base.owner if name in merged.owner]
    for name in shared:
        problem = tensor_problem(name, base, merged, learnt, training, shares.of(layer_of(name)))
        problems += [f"{name}: {problem}"] if problem else []
    problems += beside_problems(learnt, base_folder, merged_folder, shares, training)
    wrong = len(problems)
    problems = problems[:SHOWN] + ([f"and {wrong - SHOWN} more"] if wrong > SHOWN else [])
    problems += side_problems(base_folder, merged_folder, added=added)
    changed = len({*learnt.adapters, *learnt.whole} & set(shared))
    exact = "bit for bit" if not learnt.adapters else "the others bit for bit"
    sums = f"{len(learnt.adapters)} with an adapter to the error of fp32 sums, " if learnt.adapters else ""
    beside = f", {len(learnt.beside)} of adapters beside them" if learnt.beside else ""
    beside = ", keys and values before the text beside them" if learnt.prefix else beside
    return Rung(
        name="merged",
        against="W0 + a (Wft - W0)",
        compared=f"{len(shared)} tensors, {changed} of them changed{beside}",
        tolerance=f"{sums}{exact}; config, tokenizer and template as the base's",
        tensors=len(shared),
        problems=tuple(problems),
    )


def beside_problems(learnt: Learnt, base: Path, merged: Path, shares: Shares, training: Training) -> list[str]:
    """What lies beside a merge's weights otherwise than what trained, its last matrix times its share."""
    if learnt.prefix:
        saved = learnt.files["kept"].read(PEFT_NAME)
        made = made_of(base, saved) if training.embeds and not shares.nothing else saved
        return prefix_problems(made, merged, shares)
    path, kept = merged / BOTTLENECKS, learnt.files["kept"]
    held = TensorFile(path) if path.is_file() else None
    problems = [f"{name}: beside the weights, and not trained" for name in (held.entries if held else {})
                if name not in learnt.beside]  # fmt: skip
    for name, key in learnt.beside.items():
        share = shares.of(layer_of(name))
        exact = kept.read(key).double() * (share if name.endswith(WIDE) else 1.0)
        if held is None or name not in held.entries:
            adds = kept.read(key.replace(NARROW, WIDE)).any()
            problems += [f"{name}: missing beside the weights"] if share and adds else []
            continue
        stored = held.read(name).double()
        if stored.shape != exact.shape or not bool(((stored - exact).abs() <= 2 * EPSILON * exact.abs()).all()):
            problems.append(f"{name}: beside the weights with other values than were trained, times {share:g}")
    return problems


@torch.no_grad()
def made_of(base: Path, prompt: torch.Tensor) -> torch.Tensor:
    """What transformers' own cache has of a base's keys and values after a soft prompt, as PEFT keeps a prefix."""
    body = find_parts(load_streamed(base)).body
    layers = cache_of(body(inputs_embeds=prompt[None].float(), use_cache=True)).layers
    return torch.cat([each[0].transpose(0, 1).flatten(1) for layer in layers for each in (layer.keys, layer.values)], 1)


def prefix_problems(saved: torch.Tensor, merged: Path, shares: Shares) -> list[str]:
    """What a merge has before the text otherwise than what trained, number by number; at a share of 0 nothing.

    PEFT's row of a token has, layer by layer, the keys of all heads and then their values.
    """
    path = merged / KV_PREFIX
    held = TensorFile(path) if path.is_file() else None
    if held is None:
        return [] if shares.nothing else [f"{KV_PREFIX}: missing beside the weights"]
    if shares.nothing:
        return [f"{KV_PREFIX}: beside the weights, at a share of 0"]
    problems, column = [], 0
    for name in sorted(held.entries, key=lambda name: (layer_of(name) or 0, name)):  # key before value
        stored = held.read(name)[0]
        for head in stored:
            wanted = saved[:, column : column + head.shape[-1]].float()
            column += head.shape[-1]
            if head.shape != wanted.shape or not torch.equal(_bits(head), _bits(wanted)):
                problems.append(f"{name}: beside the weights with other values than were trained")
                break
    left = column != saved.shape[1] and not problems
    return problems + ([f"{KV_PREFIX}: {column} of {saved.shape[1]} numbers of a token"] if left else [])


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
    factors: Factors | Scales | None = None
    if name in learnt.adapters and share:
        read = _scales if {ELEMENTS, GAIN} & learnt.adapters[name].keys() else _factors
        factors = read(name, base, kept, learnt.adapters[name], training)
    for part in blocks(base.shape(name), AT_ONCE_BYTES):
        stored, old = merged.read(name, part), base.read(name, part)
        if factors is not None:
            yield stored, *_with_adapter(old, factors.of(part), share)
        elif name in learnt.whole and share:
            new = kept.read(learnt.whole[name], part)
            wide = old.to(torch.float64 if old.dtype == torch.float64 else torch.float32)
            yield stored, (new if share == 1.0 else torch.lerp(wide, new.to(wide.dtype), share)).to(old.dtype), None
        else:
            yield stored, old, None


class Factors(NamedTuple):
    """s L R, to be added to some rows of a stored matrix, in fp64; and what its rows or columns are scaled by then."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    lengths: torch.Tensor | None = None  # that rows are scaled to
    gains: torch.Tensor | None = None  # of columns, and how far each may be off, relative
    slack: torch.Tensor | None = None

    def of(self, rows: slice) -> Factors:
        """Those of some rows."""
        lengths = None if self.lengths is None else self.lengths[rows]
        return self._replace(left=self.left[rows], lengths=lengths)

    def added(self, old: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(exact sum, how far an fp32 one may be from it): the rounding of a dot product over the rank, and 4 more.

        (rank + 4) half units of fp32 of the sum of absolute terms.
        """
        before, fits = old.double(), len(self.left) == len(old)
        change = self.scale * (self.left @ self.right) if fits else torch.full_like(before, float("nan"))
        terms = before.abs() + abs(self.scale) * (self.left.abs() @ self.right.abs() if fits else before.abs())
        return before + change, EPSILON * (self.right.shape[0] + 4) * terms

    def changed(self, old: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with rows or columns scaled to their lengths, and what the sums' rounding does to those."""
        tuned, sums = self.added(old)
        gains, slack = self.gains, self.slack
        if self.lengths is not None:
            norms = torch.linalg.vector_norm(tuned, dim=1, keepdim=True)
            gains, slack = self.lengths[:, None] / norms, torch.linalg.vector_norm(sums, dim=1, keepdim=True) / norms
        if gains is None or slack is None:
            return tuned, sums
        tuned = tuned * gains
        return tuned, sums * gains.abs() + tuned.abs() * (slack + 4 * EPSILON)


class Scales(NamedTuple):
    """What each element of some rows is multiplied by, or each column where it is one row, and what is added; fp64."""

    factors: torch.Tensor
    sums: torch.Tensor | None = None

    def of(self, rows: slice) -> Scales:
        """Those of some rows."""
        if self.factors.ndim == 2 and self.factors.shape[0] == 1:
            return self
        return Scales(self.factors[rows], None if self.sums is None else self.sums[rows])

    def changed(self, old: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(exact product, how far an fp32 one may be from it)."""
        product = old.double() * self.factors
        exact = product if self.sums is None else product + self.sums
        return exact, EPSILON * 4 * (exact.abs() + product.abs() + old.double().abs())


def _scales(name: str, base: Checkpoint, kept: TensorFile, keys: dict[str, str], training: Training) -> Scales:
    """What IA3 or w * h + b does to a stored bias or matrix, inputs x outputs as GPT-2's Conv1D holds it, too."""
    if GAIN in keys:
        factors = kept.read(keys[GAIN]).double()
        if len(base.shape(name)) == 1:
            return Scales(factors, kept.read(keys[SHIFT]).double())
        return Scales(factors[None] if in_conv1d(str(_config(base.folder).get("model_type"))) else factors[:, None])
    factors = kept.read(keys[ELEMENTS]).double()
    if len(base.shape(name)) == 1:
        return Scales(factors.flatten())
    return Scales(factors.T if in_conv1d(str(_config(base.folder).get("model_type"))) else factors)


def _factors(name: str, base: Checkpoint, kept: TensorFile, keys: dict[str, str], training: Training) -> Factors:
    """What an adapter adds to a stored matrix, inputs x outputs as GPT-2's Conv1D holds it, too."""
    left, right = (kept.read(keys[part]).double() for part in ("lora_B", "lora_A"))
    right = right * kept.read(keys[BETWEEN]).double() if BETWEEN in keys else right
    wanted = kept.read(keys[LENGTHS]).double() if LENGTHS in keys else None
    transposed = in_conv1d(str(_config(base.folder).get("model_type")))
    if transposed:
        left, right = right.T, left.T
    if (left.shape[0], right.shape[1]) != base.shape(name):
        left = left[:0]  # no product: every value is a problem
    found = Factors(left, right, training.adapter_scale)
    if wanted is None or not transposed:
        return found._replace(lengths=wanted)
    squares, errors = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for part in blocks(base.shape(name)):
        exact, error = found.of(part).added(base.read(name, part))
        squares, errors = squares + exact.square().sum(0), errors + error.square().sum(0)
    return found._replace(gains=wanted / squares.sqrt(), slack=(errors / squares).sqrt())


def _with_adapter(old: torch.Tensor, factors: Factors | Scales, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(exact value in fp64, how far the nearest stored value of fp32 sums may be from it), elementwise.

    Half a unit in the last place of what stores it, and what rounding the sums may do.
    """
    tuned, sums = factors.changed(old)
    before = old.double()
    exact = before + share * (tuned - before)
    unit = torch.exp2(torch.floor(torch.log2((exact.abs() + sums).clamp(min=1e-300))) - BITS[old.dtype])
    return exact, (unit + sums).clamp(min=SMALLEST[old.dtype])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The very bits of values: 0.0 and -0.0 are two, NaN equals itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def _given_zeros(base: Checkpoint) -> bool:
    """Whether a base had to be given biases that its config can have: what a merge adds to is zeros there."""
    spec = read_model_spec(str(base.folder))
    outputs = {linear.name: linear.out_features for linear in spec.linears}
    absent = absent_biases(spec, base.owner)
    for name, weight in absent.items():
        own = next(each for each in outputs if weight.endswith(f".{each}.weight"))
        base.give_zeros(name, weight, outputs[own])
    return bool(absent)


def side_problems(base: Path, merged: Path, *, added: bool = False) -> list[str]:
    """What a merged folder says of the model and its text otherwise than the base does, but for biases it was given."""
    problems = []
    ours, theirs = _config(merged), _config(base)
    if added:
        place = theirs.get("text_config") or theirs
        place[str(bias_key(read_model_spec(str(base))))] = True
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
