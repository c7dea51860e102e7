"""Which pages of a mapped file are this process's memory now? It tells the system what it needs next and what no more.

Advice changes no byte: pages that were given back are read from the file again when somebody looks at them. Where the
system takes none (Windows), they stay until it needs their room.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from typing import Any

DONTNEED, WILLNEED = 4, 3
POPULATE_READ = 22  # Linux 5.14 and later: returns when all of it is there


@functools.cache
def _madvise() -> Any:
    """madvise(2), None where there is none."""
    if os.name != "posix":
        return None
    found = ctypes.CDLL(None, use_errno=True).madvise  # lets other threads run meanwhile
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found


def read(address: int, size: int) -> None:
    """Make all pages of a range resident, or ask for them where the system cannot be waited for."""
    if (advise := _madvise()) is not None and size > 0:
        first, length = _outward(address, size)
        if advise(first, length, POPULATE_READ):
            advise(first, length, WILLNEED)


def release(address: int, size: int) -> None:
    """Give back every page that a range of a mapped file touches: what lies beside it there is read again if needed."""
    if (advise := _madvise()) is not None and size > 0:
        advise(*_outward(address, size), DONTNEED)


def release_within(address: int, size: int) -> None:
    """Give back the pages that lie wholly in a range, whose memory nobody reads again."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if (advise := _madvise()) is not None and length > 0:
        advise(first, length, DONTNEED)


def _outward(address: int, size: int) -> tuple[int, int]:
    first = address // mmap.PAGESIZE * mmap.PAGESIZE
    return first, -(-(address + size - first) // mmap.PAGESIZE) * mmap.PAGESIZE
