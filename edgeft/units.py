"""How are bytes, counts and seconds read from a user and shown to one? GiB is 2^30 bytes everywhere."""

from __future__ import annotations

import re

from edgeft.errors import BadInput

KIB, MIB, GIB = 2**10, 2**20, 2**30
_SUFFIXES = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "k": KIB,
    "m": MIB,
    "g": GIB,
}


def parse_bytes(text: str) -> int:
    """Bytes of `9GiB`, `9g`, `512 MiB`, `9.5GB` (10^9) or a plain number. Raises BadInput."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _SUFFIXES:
        raise BadInput("memory size", f"cannot read {text!r}", "write a number and a unit, as in 9GiB or 512MiB")
    return int(float(match[1]) * _SUFFIXES[match[2].lower()])


def show_bytes(count: float) -> str:
    """`13.5 GiB`, `84.2 MiB`, `310 B`: three significant digits, sign kept."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f} {unit}"
    return f"{count:.0f} B"


def show_count(count: float) -> str:
    """`8.03B`, `135M`, `5.77M`, `812`: three significant digits."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= 0.9995 * size:  # 999,999 reads 1M, not 1e+03k
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def show_seconds(seconds: float) -> str:
    """`1 h 03 min`, `2 min 05 s`, `8.1 s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{seconds:.1f} s"
