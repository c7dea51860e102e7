"""Which machine does a number stand for: `8GiB`, a graphics card of 8 GiB; `cpu-8gb:6GiB`, that machine with 6 GiB?"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from edgeft.errors import BadInput
from edgeft.units import GIB, parse_bytes

if TYPE_CHECKING:
    from edgeft.machines.profile import Profile

FORM = re.compile(r"(?:(?P<base>.+):)?(?P<size>[0-9]+(?:\.[0-9]+)?\s*[kmg]i?b?)", re.IGNORECASE)
NAMED = re.compile(r"(?P<kind>.+)-(?P<gib>[0-9]+)gb")
CARD = "NVIDIA GeForce"  # how the description of a card begins that people have at home
SEEN, SYSTEM_GIB = 0.95, 0.6  # of a CPU's memory as it is sold, and what a system keeps of that: profiles/cpu-8gb.toml


class Sized(NamedTuple):
    """A machine's name apart from its memory; without a name a card's."""

    base: str
    size: str


def sized(name: str) -> Sized | None:
    """The two parts of a name that ends in a number of bytes, None of any other."""
    match = FORM.fullmatch(name.strip())
    return Sized(match["base"] or "", "".join(match["size"].split())) if match else None


def with_other_memory(name: str, known: Sequence[str]) -> str:
    """`raspberrypi5-8gb:4GiB` for `raspberrypi5-4gb`: a machine that is known with another memory; else nothing."""
    match = NAMED.fullmatch(name)
    if match is None or match["kind"] in known:
        return ""
    same = sorted(each for each in known if each.startswith(f"{match['kind']}-") and NAMED.fullmatch(each))
    return f"{same[0]}:{match['gib']}GiB" if same else ""


def machine_name(base: str | None, memory: str | None, default: str) -> str:
    """What `--on` and `--memory` name together. Raises BadInput for what is no number of bytes."""
    if memory is None:
        return base or default
    if sized(memory) is None or ":" in memory:
        raise BadInput("--memory", f"cannot read {memory!r}", "write a number and a unit, as in 8GiB")
    if base is not None and sized(base) is not None:
        raise BadInput("--memory", f"--on {base} has a number already", "give one of the two")
    return f"{base}:{memory}" if base else memory


def nearest_card(profiles: Sequence[Profile], size: str) -> Profile:
    """Of the cards that people have at home the largest with no more memory; the smallest where all have more."""
    cards = sorted((each for each in profiles if each.description.startswith(CARD)), key=lambda each: each.memory_gib)
    return [cards[0], *(each for each in cards if sold_gib(each) * GIB <= parse_bytes(size))][-1]


def sold_gib(profile: Profile) -> int:
    """Of the memory that a profile's device shows, the round number that it is sold with."""
    return math.ceil(profile.memory_gib)


def resized(profile: Profile, asked: Sized) -> Profile:
    """The machine with another memory: as much of it shows and as much is kept of it as of its own.

    Raises BadInput where nothing would be left.
    """
    gib = parse_bytes(asked.size) / GIB
    shown = profile.memory_gib / sold_gib(profile) if profile.memory_gib else SEEN
    kept = profile.runtime_memory_gib if profile.memory_gib else max(SYSTEM_GIB, profile.runtime_memory_gib)
    memory = round(shown * gib, 2)
    if profile.keeps_a_share:
        kept = round(kept * memory / profile.memory_gib, 2)
    if memory <= kept:
        whose = "CUDA context" if profile.device == "cuda" else "system"
        raise BadInput(f"{asked.base}:{asked.size}".lstrip(":"), f"the {whose} alone keeps {kept:g} GiB", "name more")
    name = f"{profile.name}:{asked.size}" if asked.base else asked.size
    base = f"{profile.name} ({profile.description})" if profile.detected else "this machine's CPU"
    what = f"{base} with {asked.size}" if asked.base else f"a graphics card of {asked.size}, else as {base}"
    return profile.model_copy(update={
        "name": name, "description": what, "memory_gib": memory, "runtime_memory_gib": kept,
        "assumed": _assumed(profile, asked, memory, kept),
    })  # fmt: skip


def _assumed(profile: Profile, asked: Sized, memory: float, kept: float) -> str:
    """What a number of bytes does not say and a plan needs, in one line."""
    if profile.device == "cuda":
        parts = [f"the driver and a CUDA context keep {parse_bytes(asked.size) / GIB - memory + kept:.2g} GiB of it"]
        parts += [f"{profile.host_memory_gib:g} GiB of main memory"] if profile.host_memory_gib else []
        parts += [f"compute capability {profile.compute_capability:g}"]
    else:
        parts = [f"the system keeps {parse_bytes(asked.size) / GIB - memory + kept:.2g} GiB of it"]
    cores = f"{profile.cores} cores" if profile.cores else "the cores that are here"
    line = ", ".join([*parts, f"{cores} and the rates of {profile.name}"])
    other = "" if asked.base else f"; for a CPU: --on cpu-8gb:{asked.size}"
    return f"assumed of a machine of {asked.size}: {line}{other}"
