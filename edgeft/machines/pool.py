"""How much freed memory does a process keep for the tensors to come, and when does it give it back?"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edgeft.machines.limits import resident_lap
from edgeft.machines.meter import (
    M_MMAP_THRESHOLD,
    M_TRIM_THRESHOLD,
    MAPPED_BYTES,
    control_malloc,
    give_back,
    glibc,
    rss_bytes,
    taken_bytes,
)

NEVER, LARGEST_THRESHOLD = -1, 32 * 2**20
PIECE, WORTH = 2**20, 8 * 2**20
HEAD = 2**30  # behind every layer
NEW = 1.25  # an input so many times as large as any before is a new one
ROOM = 3  # what is free in so many times what a layer takes serves it: not every tensor finds a hole of its size


class Pool:
    """Freed memory that is kept for tensors to come, while the process holds no more than `limit` bytes in all.

    For `meter.control_malloc`'s processes. A page that is mapped anew is cleared by the system: in a training step
    that takes up to a third of the time. glibc looks for a place in its heap before it maps a block, so a heap that is
    grown once by `reserve` bytes, none of them touched, serves every tensor that finds room there. What lies free
    between tensors would grow without a bound: before each part of a layer runs, forward and backward, the process
    looks at what it holds, and where that part would take it above `limit`, the free pages are given back first. Where
    enough is free for it, it may go on up to `most`.

    Where address space is limited the heap grows by `least` bytes instead. Without glibc nothing is kept.
    `meter.control_malloc` ends it.
    """

    def __init__(self, reserve: int, least: int) -> None:
        size = reserve if _may_reserve() else least
        self.reserve = size if size >= PIECE and glibc() is not None else 0
        self.limit = self.most = math.inf
        self.times_given_back = 0
        self._grows: dict[int, tuple[int, int]] = {}  # of a place: its largest input, most bytes taken until the next
        self._last: tuple[int, int, int, bool] | None = None  # place, size of its input, bytes held, whether it is new
        self.worth = max(WORTH, least // 8)  # bytes taken since pages were last given back: fewer would hardly give any
        self._ground = 0  # what the process held then
        self._other = 0  # what the process holds that glibc has not given out
        self.give_back()

    def watch(self, layers: Sequence[torch.nn.Module], body: torch.nn.Module) -> None:
        """Look before each of `layers` and its halves run, where gradients enter or leave them, and at the head."""
        if not self.reserve:
            return
        parts = [
            part for layer in layers for part in (layer, *layer.children()) if part is layer or any(part.children())
        ]
        for number, part in enumerate(parts):
            part.register_forward_pre_hook(functools.partial(self._begins, number), with_kwargs=True)
            part.register_forward_hook(functools.partial(self._ends, len(parts) + number))
        body.register_forward_hook(lambda _, __, out: self.look(HEAD, elements(first_tensor(out))))

    def _begins(self, number: int, _: Any, args: Any, kwargs: Any) -> None:
        hidden = first_tensor((*args, *kwargs.values()))
        self.look(number, elements(hidden))
        self._look_at_gradient(number, hidden)

    def _ends(self, number: int, _: Any, __: Any, out: Any) -> None:
        self._look_at_gradient(number, first_tensor(out))

    def _look_at_gradient(self, number: int, hidden: torch.Tensor | None) -> None:
        if hidden is not None and hidden.requires_grad:
            size = hidden.numel()
            hidden.register_hook(lambda _: self.look(-1 - number, size))  # type: ignore[no-untyped-call]

    def look(self, place: int, size: int) -> None:
        """Give free pages back where what comes after this place would take the process above the limit.

        Places are where a part of a layer begins, 0, 1, ..., where a gradient leaves or enters one, -1, -2, ..., and
        the head; the optimizer's step comes after the last gradient. What comes after a place is the most that was
        seen there, for a somewhat larger input (`size`, in elements) with its square, as attention grows; a new place,
        or a new size of input, starts without free pages.
        """
        if not self.reserve:
            return
        held = rss_bytes()
        if self._last is not None:
            old, elements, before, new = self._last
            largest, most = self._grows.get(old, (0, 0))
            highest = resident_lap() if new else held
            self._grows[old] = max(largest, elements), max(most, highest - before)
        largest, more = self._grows.get(place, (0, 0))
        new = size > NEW * largest
        if size > largest and not new:
            more = int(more * (size / largest) ** 2)
        over = new or held > self.limit or held + more > self.most
        over = over or (held + more > self.limit and self._free(held) < ROOM * more)
        if over and held - self._ground >= self.worth:
            self.give_back()
            held = self._ground
        if new:
            resident_lap()
        self._last = place, size, held, new

    def give_back(self) -> None:
        """Return every free page to the system; the heap keeps its size."""
        if self.reserve:
            glibc().malloc_trim(0)
            self._grow()
            self._ground = rss_bytes()
            self._other = self._ground - taken_bytes()
            self.times_given_back += 1

    def _free(self, held: int) -> int:
        """Resident bytes that lie free in the heap."""
        return held - taken_bytes() - self._other

    def _grow(self) -> None:
        """Make the heap's free end `reserve` bytes long, without touching a page."""
        if not self.reserve:
            return
        library = glibc()
        library.mallopt(M_TRIM_THRESHOLD, NEVER)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        pieces = [library.malloc(PIECE) for _ in range(self.reserve // PIECE)]
        for piece in reversed(pieces):  # the last one first: each joins the free end of the heap
            library.free(piece)
        library.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def first_tensor(values: Any) -> torch.Tensor | None:
    """The first tensor among a layer's inputs, or in what a model gives, however it is wrapped."""
    if isinstance(values, torch.Tensor):
        return values
    every = values.values() if isinstance(values, Mapping) else values if isinstance(values, Sequence) else ()
    return next((value for value in every if isinstance(value, torch.Tensor)), None)


def elements(tensor: torch.Tensor | None) -> int:
    return 1 if tensor is None else tensor.numel()


@contextlib.contextmanager
def pool_ends() -> Iterator[None]:
    """Give back at the end what was kept for the next step, however it came."""
    try:
        yield
    finally:
        control_malloc()
        give_back()


def _may_reserve() -> bool:
    """Whether address space costs nothing: no ulimit on it, and the system does not count what is not touched."""
    with contextlib.suppress(OSError, ValueError):
        if int(Path("/proc/sys/vm/overcommit_memory").read_text()) == 2:
            return False
    import resource

    kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    return all(resource.getrlimit(kind)[0] == resource.RLIM_INFINITY for kind in kinds)
