"""How do the shards of DeepSpeed's ZeRO become tensors again? (arXiv 1910.02054; layouts of its zero_to_fp32.py)

Every rank keeps a part of the fp32 weights in its optimizer's file. Stages 1 and 2 cut a group's weights, laid end to
end, into one piece a rank; stage 3 cuts each weight by itself, padded to a multiple of the ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import BadInput
from edgeft.models.doctor.kinds import Form, Listing
from edgeft.models.doctor.pickles import Reader, Stored, Stub
from edgeft.models.headers import AGAIN

if TYPE_CHECKING:
    import torch

RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
ALIGNED = 2  # stages 1 and 2 pad a group to a multiple of so many elements a rank


class Pieces:
    """Flat tensors laid end to end, read by elements."""

    def __init__(self, parts: list[Stored]) -> None:
        self.parts = parts
        self.elements = sum(part.elements for part in parts)

    def read(self, first: int, count: int) -> list[torch.Tensor]:
        found, begin = [], 0
        for part in self.parts:
            low, high = max(first, begin), min(first + count, begin + part.elements)
            if low < high:
                found.append(part.read(low - begin, high - low))
            begin += part.elements
        return found


class ZeroStore:
    """A `global_step...` folder: the fp32 weights of all ranks put together, buffers and frozen weights beside them."""

    def __init__(self, folder: Path, optimizers: list[Path], models: list[Path]) -> None:
        self.folder, self.faults = folder, list[tuple[str, list[str]]]()
        self.files = [*models, *optimizers]
        self.models = [_tree(path) for path in models]
        states = [_tree(path).get("optimizer_state_dict") or {} for path in optimizers]
        self.stage = _number(states[0].get("zero_stage"))
        self.ranks = _ranks(states[0].get("partition_count"), len(states))
        if len(states) != self.ranks:
            problem = f"{self.ranks} ranks wrote it, the optimizer files of {len(states)} are here"
            raise BadInput(folder, problem, AGAIN)
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        self.groups = [[part for part in state.get(key) or () if isinstance(part, Stored)] for state in states]
        if self.stage not in (1, 2, 3) or not all(self.groups):
            raise BadInput(folder, "holds no fp32 weights of ZeRO's stage 1, 2 or 3", "use its own zero_to_fp32.py")
        shapes = self.models[0].get("param_shapes") or []
        self.shapes: list[dict[str, tuple[int, ...]]] = [dict(group) for group in shapes]
        self.entries: dict[str, dict[str, Any]] = {}
        self.places: dict[str, tuple[int, int]] = {}  # of a name: its group, and where it begins there
        (self._lay_whole if self.stage == 3 else self._lay_groups)()
        self.others = dict(self._others())
        self.entries |= {name: parts[0].entry | {"shape": list(shape)} for name, (parts, shape) in self.others.items()}
        self.aliases = dict(self._aliases())
        self.entries |= {name: self.entries[other] for name, other in self.aliases.items()}

    @classmethod
    def open(cls, listing: Listing, form: Form) -> ZeroStore:
        """Of several steps the one that `latest` names, or the last. Raises BadInput."""
        found = listing.find(form.marks)
        places = {name.rpartition("/")[0] for name in found}
        latest = listing.folder / "latest"
        told = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
        place = told if told in places else max(places, key=lambda name: int("0" + re.sub(r"\D", "", name)))
        folder = listing.folder / place
        names = [name.rpartition("/")[2] for name in found if name.rpartition("/")[0] == place]
        ranks = {match.groups(): name for name in names if (match := RANK.search(name))}
        if not ranks or {model for _, model in ranks} != {"00"}:
            raise BadInput(folder, "is cut across tensor-parallel ranks", "put it together with DeepSpeed's own tools")
        optimizers = [folder / ranks[key] for key in sorted(ranks, key=lambda key: int(key[0]))]
        models = sorted(folder.glob("*model_states.pt"), key=lambda path: _digits(path.name))
        if not models:
            raise BadInput(folder, "*_model_states.pt is missing: nothing else has the names", AGAIN)
        return cls(folder, optimizers, models)

    def _add(self, name: str, shape: tuple[int, ...], group: int, first: int) -> None:
        count = math.prod(shape)
        self.places[name] = (group, first)
        self.entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * count]}

    def _lay_groups(self) -> None:
        self.vectors = [Pieces([rank[at] for rank in self.groups]) for at in range(len(self.groups[0]))]
        align = ALIGNED * self.ranks
        for at, (shapes, vector) in enumerate(zip(self.shapes, self.vectors, strict=False)):
            first = 0
            for name, shape in shapes.items():
                self._add(name, tuple(shape), at, first)
                first += math.prod(shape)
            if math.ceil(first / align) != math.ceil(vector.elements / align):
                raise BadInput(self.folder, f"{first} weights by name, {vector.elements} in the ranks' files", AGAIN)

    def _lay_whole(self) -> None:
        self.vectors = [Pieces(rank) for rank in self.groups]
        first = 0
        for name, shape in ((name, shape) for group in self.shapes for name, shape in group.items()):
            self._add(name, tuple(shape), 0, first)
            first += math.ceil(math.prod(shape) / self.ranks)
        if short := [vector.elements for vector in self.vectors if vector.elements != first]:
            raise BadInput(self.folder, f"{first} weights a rank by name, {short[0]} in a rank's file", AGAIN)

    def _others(self) -> Iterator[tuple[str, tuple[list[Stored], tuple[int, ...]]]]:
        """Buffers, and weights that did not train: whole, or under stage 3 in a piece a rank."""
        first = self.models[0]
        module = first.get("module") or {}
        for name in first.get("buffer_names") or ():
            if isinstance(module.get(name), Stored):
                yield name, ([module[name]], module[name].shape)
        for name, shape in (first.get("frozen_param_shapes") or {}).items():
            parts = [(model.get("frozen_param_fragments") or {}).get(name) for model in self.models]
            whole = [part for part in parts if isinstance(part, Stored)]
            if sum(part.elements for part in whole) < math.prod(shape):
                raise BadInput(self.folder, f"{name} did not train and is not whole in the files", AGAIN)
            yield name, (whole if self.stage == 3 else whole[:1], tuple(shape))

    def _aliases(self) -> Iterator[tuple[str, str]]:
        """Names of a tensor that has two, such as a tied head's."""
        told = self.models[0].get("shared_params") or {}
        for name, other in told.items() if isinstance(told, dict) else told:
            if other in self.entries:
                yield name, other

    def read(self, name: str) -> torch.Tensor:
        import torch

        name = self.aliases.get(name, name)
        shape = tuple(self.entries[name]["shape"])
        if name in self.others:
            parts = [part.read().flatten() for part in self.others[name][0]]
            return torch.cat(parts)[: math.prod(shape)].view(shape)
        group, first = self.places[name]
        count = math.prod(shape)
        if self.stage == 3:
            each = math.ceil(count / self.ranks)
            parts = [part for vector in self.vectors for part in vector.read(first, each)]
        else:
            parts = self.vectors[group].read(first, count)
        return torch.cat(parts)[:count].view(shape) if parts else torch.empty(shape)


def _tree(path: Path) -> dict[str, Any]:
    tree = Reader(path).tree
    if not isinstance(tree, dict):
        raise BadInput(path, "is no state of DeepSpeed", AGAIN)
    return tree


def _number(told: Any) -> int:
    """A number, or the value of an enumeration that DeepSpeed pickles."""
    value = told.arguments[0] if isinstance(told, Stub) and told.arguments else told
    return value if isinstance(value, int) else 0


def _ranks(told: Any, files: int) -> int:
    counts = [count for count in (told if isinstance(told, list) else [told]) if isinstance(count, int)]
    return max(counts, default=files)


def _digits(name: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", name)))
