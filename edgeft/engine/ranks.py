"""What do the processes of one training tell one another: gradients added up, decisions shared, files waited for?

torch.distributed carries it: gloo between CPUs, NCCL between GPUs, a store for what has no haste. For a process that is
alone (`ALONE`) nothing here does anything. DDP builds its reducer from what requires gradients when it wraps a model,
and layers in turn change that: here one flat buffer holds the gradients of what trains now.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn

from edgeft.data.batches import shares
from edgeft.data.samples import Sample
from edgeft.errors import EdgeftError

# A process may wait in a step for the first one to write a checkpoint, however slow its disk is.
STEP_SECONDS = 3600.0
LOOKING_SECONDS = 0.05  # between two looks at the store, for what may take hours: scores, quantising
PARTING_SECONDS = 60.0  # that the first process stays for the others to hear that all is done
REASON_SECONDS = 3.0  # in which one that ended tells why, if it can
FAILED = "failed"
Json = TypeVar("Json")


class Ended(EdgeftError):
    """Another process of this run ended, so this one cannot go on."""


@dataclass(eq=False)
class Ranks:
    """This process among those of its run: `rank` of `size`, `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Any = field(default=None, repr=False)
    asked: int = 0  # how often the processes have met in the store

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def share(self, samples: Sequence[Sample]) -> list[Sample]:
        """What this process computes of one step's samples."""
        return shares(samples, self.size)[self.rank]

    def add_gradients(self, parameters: Sequence[nn.Parameter], *numbers: float) -> list[float]:
        """Make every gradient the sum of all processes' own, and give the sums of some numbers beside them.

        One buffer goes round, in fp32. Each gradient is let go of once it is in there, and is a part of it afterwards;
        one that no process has stays none.
        """
        if self.alone:
            return list(numbers)
        sizes = [parameter.numel() for parameter in parameters]
        flat = torch.empty(sum(sizes) + len(sizes) + len(numbers), device=parameters[0].device)
        *parts, counts, beside = torch.split(flat, [*sizes, len(sizes), len(numbers)])
        counts.copy_(torch.tensor([float(parameter.grad is not None) for parameter in parameters]))
        beside.copy_(torch.tensor(numbers))
        for parameter, part in zip(parameters, parts, strict=True):
            part.zero_() if parameter.grad is None else part.copy_(parameter.grad.reshape(-1))
            parameter.grad = None
        self._all_reduce(flat)
        for parameter, part, count in zip(parameters, parts, counts.tolist(), strict=True):
            parameter.grad = part.view_as(parameter) if count else None
        sums: list[float] = beside.tolist()
        return sums

    def _all_reduce(self, values: torch.Tensor) -> None:
        from torch import distributed

        with self._others():
            distributed.all_reduce(values)

    def gather(self, part: torch.Tensor, whole: torch.Tensor) -> Callable[[], None]:
        """Begin to put the parts of all processes together in `whole`; calling what is given back waits for them.

        Between CPUs each sends its part into its place: gloo's own gathering would make a second whole.
        """
        from torch import distributed

        with self._others():
            if part.device.type != "cpu":
                works: list[Any] = [distributed.all_gather_into_tensor(whole, part, async_op=True)]
            else:
                places = whole.view(self.size, -1)
                places[self.rank].copy_(part)
                works = [distributed.broadcast(place, rank, async_op=True) for rank, place in enumerate(places)]

        def wait() -> None:
            with self._others():
                for work in works:
                    work.wait()

        return wait

    def say(self, number: int) -> None:
        """Tell the others, of the first process, a number at once: by the network, not the store."""
        self._broadcast(torch.tensor([number]))

    def heard(self) -> int:
        """The next number that the first process says."""
        return int(self._broadcast(torch.tensor([0])))

    def _broadcast(self, number: torch.Tensor) -> torch.Tensor:
        from torch import distributed

        with self._others():
            distributed.broadcast(number, 0)
        return number

    def told(self, make: Callable[[], Json]) -> Json:
        """What the first process makes, a value of JSON, given to all: the others wait, however long it takes."""
        if self.alone:
            return make()
        name = self._next("told")
        if self.first:
            value = make()
            self._set(name, value)
            return value
        found: Json = self._get(name)
        return found

    def wait(self) -> None:
        """Go on once the first process has come here."""
        self.told(lambda: None)

    def part(self) -> None:
        """Wait for the first process for the last time: it goes, and the store with it, once the others know."""
        if self.alone:
            return
        self.wait()
        name = self._next("parted")
        with self._others():
            if not self.first:
                self.store.add(name, 1)
                return
            until = time.monotonic() + PARTING_SECONDS
            while self.store.add(name, 0) < self.size - 1 and time.monotonic() < until:
                time.sleep(LOOKING_SECONDS)

    def gathered(self, value: Json) -> list[Json]:
        """The values of JSON of all processes, in order."""
        if self.alone:
            return [value]
        name = self._next("gathered")
        self._set(f"{name}/{self.rank}", value)
        return [self._get(f"{name}/{rank}") for rank in range(self.size)]

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process runs what is inside, then one of each other machine, then all others.

        What it keeps on disk is there for those that come later, whether or not machines share a disk.
        """
        if self.alone:
            yield
            return
        name, stage = self._next("turn"), 0 if self.first else 1 if self.local_rank == 0 else 2
        machines = self.size // self.local_size
        for before, count in ((0, 1), (1, machines - 1))[:stage]:
            self._until(lambda before=before, count=count: self.store.add(f"{name}/{before}", 0) >= count)  # type: ignore[misc]
        yield
        self.store.add(f"{name}/{stage}", 1)

    def _next(self, kind: str) -> str:
        self.asked += 1
        return f"{kind}/{self.asked}"

    def _set(self, name: str, value: object) -> None:
        with self._others():
            self.store.set(name, json.dumps(value))

    def _get(self, name: str) -> Any:
        self._until(lambda: self.store.check([name]))
        with self._others():
            return json.loads(self.store.get(name))

    def _until(self, there: Callable[[], bool]) -> None:
        """Look again and again, so that signals are heard. Raises Ended where a process has ended."""
        while True:
            with self._others():
                if there():
                    return
                failed = self.store.check([FAILED])
            if failed:
                raise self._ended("")
            time.sleep(LOOKING_SECONDS)

    @contextlib.contextmanager
    def _others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as problem:  # of torch.distributed: one of them, or who held the store, is gone
            raise self._ended(str(problem).strip().splitlines()[0]) from None

    def _ended(self, how: str) -> Ended:
        hint = "run the same command again: it goes on from the last checkpoint"
        if reason := self._reason():
            problem = Ended("train", f"process {reason['rank']} ended: {reason['problem']}", hint)
            problem.exit_code = reason["exit_code"]
            return problem
        return Ended("train", f"another of {self.size} processes ended" + (f" ({how})" if how else ""), hint)

    def _reason(self) -> dict[str, Any] | None:
        """What the one that ended has told, if it could."""
        until = time.monotonic() + REASON_SECONDS
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < until:
                if self.store.check([FAILED]):
                    found: dict[str, Any] = json.loads(self.store.get(FAILED))
                    return found
                time.sleep(LOOKING_SECONDS)
        return None

    def tell_end(self, problem: BaseException) -> bool:
        """Let the others know why this process ends; False where another one did so before."""
        words = problem.problem if isinstance(problem, EdgeftError) else f"{type(problem).__name__}: {problem}"
        reason = {"rank": self.rank, "problem": words, "exit_code": getattr(problem, "exit_code", 1)}
        try:
            told = self.store.compare_set(FAILED, "", json.dumps(reason))
        except RuntimeError:
            return True
        return bool(json.loads(told)["rank"] == self.rank)


ALONE = Ranks()


@contextlib.contextmanager
def joined(rank: int, size: int, local_rank: int, local_size: int, cuda: bool) -> Iterator[Ranks]:
    """This process together with the others of its run; an error tells them why it ends."""
    from torch import distributed as found

    distributed: Any = found  # its stubs leave the stores out
    patience = timedelta(seconds=STEP_SECONDS)
    store, _, _ = next(distributed.rendezvous("env://", rank, size, timeout=patience))
    ranks = Ranks(rank, size, local_rank, local_size, distributed.PrefixStore("edgeft", store))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    distributed.init_process_group(
        backend, store=distributed.PrefixStore("torch", store), rank=rank, world_size=size, timeout=patience
    )
    try:
        yield ranks
    except Ended as problem:
        problem.told = not ranks.first
        raise
    except EdgeftError as problem:
        problem.told = not ranks.tell_end(problem)
        raise
    except Exception as problem:
        ranks.tell_end(problem)
        raise
    finally:
        distributed.destroy_process_group()
