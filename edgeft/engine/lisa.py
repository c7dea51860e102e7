"""Which units of a model train now, and what happens when others take their turn?

LISA (layerwise importance sampled AdamW, arXiv 2403.17919) for any model and any torch optimizer: of a pool of units
(decoder layers, and the ends that rotate) a few train at a time at full rank. What leaves loses its gradient and its
optimizer state at once, so that memory never climbs with the layers visited.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from edgeft.documents import saving
from edgeft.errors import BadInput, EdgeftError
from edgeft.settings.job import Schedule

Named = list[tuple[str, nn.Parameter]]


def draw(pool: Sequence[str], count: int, schedule: Schedule, weights: Sequence[float], seed: int,
         interval: int) -> tuple[str, ...]:  # fmt: skip
    """The units that train in interval number `interval`, in the pool's order: a pure function of its arguments.

    uniform: independent draws without replacement (the paper's). cycle: a shuffled round in which each unit comes
    exactly once, the last draw of a round being what is left. weighted: without replacement, unit i first with
    probability w_i / sum(w) (exponential keys: Efraimidis and Spirakis, 2006).
    """
    if schedule == "cycle":
        per_round = -(-len(pool) // count)
        order = list(pool)
        random.Random(f"lisa {seed} {interval // per_round}").shuffle(order)
        start = interval % per_round * count
        chosen = set(order[start : start + count])
    else:
        generator = random.Random(f"lisa {seed} {interval}")
        if schedule == "uniform":
            chosen = set(generator.sample(list(pool), count))
        else:
            keys = {unit: generator.expovariate(weight) for unit, weight in zip(pool, weights, strict=True)}
            chosen = set(sorted(pool, key=keys.__getitem__)[:count])
    return tuple(unit for unit in pool if unit in chosen)


class Turns(Protocol):
    """What a unit needs besides `requires_grad` when its turn comes and goes: a dense form, say, of 4-bit weights."""

    def enter(self, unit: str) -> Named: ...

    def leave(self, unit: str) -> Named: ...

    def restore(self, unit: str) -> Named: ...


@dataclass
class Lisa:
    """Lets `count` units of `pool` train at a time, and those of `always` all the time.

    Call `start`, make an optimizer over `parameters()`, then call `begin_step` once for every optimizer step, before
    its first forward pass. An optimizer of several groups has each parameter in the one that `group_of` says. `state`
    "park" keeps the optimizer state of a unit that leaves in `folder` and gives it back when the unit returns; "drop"
    forgets it.
    """

    units: dict[str, Named]
    pool: tuple[str, ...]
    count: int
    interval: int
    schedule: Schedule = "cycle"
    weights: tuple[float, ...] = ()
    always: tuple[str, ...] = ()
    seed: int = 0
    state: str = "drop"
    folder: Path | None = None
    turns: Turns | None = None
    writes: bool = True  # to `folder`: of several processes one does, which all read
    group_of: Callable[[str, nn.Parameter], int] = lambda name, parameter: 0
    active: tuple[str, ...] = ()
    steps: dict[str, int] = field(default_factory=dict)
    optimizer_bytes: list[int] = field(default_factory=list)
    replaced: bool = False  # whether a unit that left did so again: its file was replaced, which a checkpoint may hold

    def __post_init__(self) -> None:
        unknown = [unit for unit in (*self.pool, *self.always) if unit not in self.units]
        if unknown or not 1 <= self.count <= len(self.pool) or self.interval < 1:
            known = f"units {', '.join(unknown)} are not in the model" if unknown else ""
            problem = known or f"{self.count} of {len(self.pool)} units every {self.interval} steps cannot be drawn"
            raise BadInput("lisa", problem, "draw at least one unit and at most the whole pool, every step or more")
        if self.schedule == "weighted" and (len(self.weights) != len(self.pool) or min(self.weights) <= 0):
            raise BadInput("lisa", f"weighted draws need a positive weight for each of {len(self.pool)} units")
        if self.state == "park" and self.folder is None:
            raise BadInput("lisa", "parked optimizer states need a folder")
        for parameters in self.units.values():
            for _, parameter in parameters:
                parameter.requires_grad_(False)
        for unit in self.always:
            self._require(unit)

    def start(self, step: int = 0, state: Mapping[str, Any] | None = None, files: Path | None = None) -> None:
        """Let the units of step `step` train; with a checkpoint's `state` and `files`, go on where it was written.

        A checkpoint is written after step `step - 1`: its units are that step's, and the next `begin_step` switches
        when it is due. Parameters that train now are the caller's to copy in afterwards, optimizer states too.
        Raises EdgeftError when the checkpoint trained other units than this plan would have.
        """
        self.active = self.at(max(0, step - 1))
        if self.folder is not None and self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            if files is not None and files.is_dir():
                for path in files.iterdir():
                    link(path, self.folder / path.name)
        if state is not None:
            if tuple(state["active"]) != self.active or state["seed"] != self.seed:
                hint = "remove the checkpoint folder and start again"
                raise EdgeftError("lisa", f"the checkpoint trained {state['active']}, the plan {self.active}", hint)
            self.steps, self.optimizer_bytes = dict(state["steps"]), list(state["optimizer_bytes"])
            for unit in self.visited():
                if self.turns is not None and unit in self.pool and unit not in self.active:
                    self.units[unit] = self.turns.restore(unit)
        for unit in self.active:
            self._enter(unit)

    def at(self, step: int) -> tuple[str, ...]:
        """The units drawn for an optimizer step (counted from 0)."""
        return draw(self.pool, self.count, self.schedule, self.weights, self.seed, step // self.interval)

    def due(self, step: int) -> bool:
        """Whether `begin_step` of this step will switch."""
        return self.at(step) != self.active

    def parameters(self) -> Named:
        """(name, parameter) of everything that trains now, in a fixed order."""
        return [entry for unit in (*self.always, *self.active) for entry in self.units[unit] if entry[1].requires_grad]

    def begin_step(self, step: int, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the trained units changed for optimizer step `step`. Raises EdgeftError inside an accumulation."""
        wanted = self.at(step)
        changed = wanted != self.active
        if changed:
            if any(p.grad is not None for _, p in self.parameters()):
                raise EdgeftError("lisa", f"layers would switch at step {step} while gradients are accumulating")
            self._switch(wanted, optimizer)
        for unit in (*self.always, *self.active):
            self.steps[unit] = self.steps.get(unit, 0) + 1
        return changed

    def _switch(self, wanted: tuple[str, ...], optimizer: torch.optim.Optimizer) -> None:
        self.optimizer_bytes.append(state_bytes(optimizer))
        for unit in self.active:
            if unit not in wanted:
                self._leave(unit, optimizer)
        entered = [unit for unit in wanted if unit not in self.active]
        for unit in entered:
            self._enter(unit)
        self.active = wanted
        for number, group in enumerate(optimizer.param_groups):
            group["params"] = [p for name, p in self.parameters() if self.group_of(name, p) == number]
        for unit in entered:
            self._unpark(unit, optimizer)

    def _require(self, unit: str) -> None:
        for _, parameter in self.units[unit]:
            parameter.requires_grad_(True)

    def _enter(self, unit: str) -> None:
        if self.turns is not None:
            self.units[unit] = self.turns.enter(unit)
        else:
            self._require(unit)

    def _leave(self, unit: str, optimizer: torch.optim.Optimizer) -> None:
        if self.folder is not None:
            self.replaced |= any((self.folder / f"{unit}{end}").exists() for end in (".safetensors", ".state"))
        states = {name: optimizer.state.pop(p) for name, p in self.units[unit] if p in optimizer.state}
        for _, parameter in self.units[unit]:
            parameter.grad = None
            parameter.requires_grad_(False)
        if self.state == "park" and self.folder is not None and self.writes:
            with saving(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                temporary = self.folder / f".{unit}.state.tmp"
                torch.save(states, temporary)
                temporary.replace(self.folder / f"{unit}.state")
        # the optimizer still lists the parameters that leave: let go of them before the next unit needs their room
        gone = {id(p) for _, p in self.units[unit]}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        del states
        if self.turns is not None:
            self.units[unit] = self.turns.leave(unit)

    def _unpark(self, unit: str, optimizer: torch.optim.Optimizer) -> None:
        path = None if self.folder is None or self.state != "park" else self.folder / f"{unit}.state"
        if path is None or not path.is_file():
            return
        states = torch.load(path, map_location="cpu", weights_only=True)
        # a fused update reads its count of steps on the device, as load_state_dict of torch's optimizers has it
        fused = any(group.get("fused") for group in optimizer.param_groups)
        for name, parameter in self.units[unit]:
            if name in states:
                for key, value in states[name].items():
                    if isinstance(value, torch.Tensor) and (value.ndim or fused):
                        states[name][key] = value.to(parameter.device)
                optimizer.state[parameter] = states[name]

    def visited(self) -> tuple[str, ...]:
        """Units that have trained, the always-on ones first."""
        return tuple(unit for unit in (*self.always, *self.pool) if unit in self.steps)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold besides tensors: counters and the active set, which `load` checks."""
        return {"active": list(self.active), "steps": self.steps, "optimizer_bytes": self.optimizer_bytes,
                "seed": self.seed}  # fmt: skip

    def save_files(self, out: Path) -> None:
        """Link (or copy) what lies in `folder` into a checkpoint; the files are never written twice, only replaced."""
        if self.folder is None or not self.folder.is_dir():
            return
        out.mkdir()
        for path in sorted(self.folder.iterdir()):
            if not path.name.startswith("."):
                link(path, out / path.name)

    def in_memory(self) -> Named:
        """(name, parameter) of all that a checkpoint must hold: what trained, except what `turns` keeps in files."""
        units = (*self.always, *self.active) if self.turns is not None else self.visited()
        return [entry for unit in units for entry in self.units[unit]]


def link(source: Path, target: Path) -> None:
    """The same file under another name: a hard link where the disk has them, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    )
