"""Which colour and which mark stand for what, in every picture of a report and of a benchmark?

The colours are those of Okabe and Ito, which people with any colour vision tell apart. None is the only sign of
anything: segments carry their names, ways of fitting a mark, what is held for a moment a hatch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from edgeft.reporting.matrix import Grade

BLACK, ORANGE, SKY, GREEN = "#000000", "#e69f00", "#56b4e9", "#009e73"
YELLOW, BLUE, VERMILLION, PURPLE = "#f0e442", "#0072b2", "#d55e00", "#cc79a7"
GREY, SLATE, INK = "#8a94a0", "#4d5663", "#1c2430"

Family = Literal["weights", "trained", "optimizer", "activations", "temporary", "files", "other"]


class Look(NamedTuple):
    """How a family of terms is drawn: its colour, what is written on it, and what a legend calls it."""

    colour: str
    text: str
    title: str


FAMILIES: dict[Family, Look] = {
    "weights": Look(BLUE, "#ffffff", "weights that stay as they are"),
    "trained": Look(ORANGE, BLACK, "what trains, and its gradients"),
    "optimizer": Look(VERMILLION, BLACK, "optimizer"),
    "activations": Look(GREEN, BLACK, "activations and kept outputs"),
    "temporary": Look(PURPLE, BLACK, "held for a moment (hatched)"),
    "files": Look(SKY, BLACK, "pages of files, which the system takes back (outlined)"),
    "other": Look(SLATE, "#ffffff", "process, libraries, data"),
}

# A term belongs to one family in every phase and figure; one that is not here is drawn as "other".
TERMS: dict[Family, tuple[str, ...]] = {
    "weights": ("weights", "model", "one layer", "streamed layers", "gathered layers", "head copies", "NF4 codes",
                "quantised", "bundle", "embedding", "simulated"),
    "trained": ("adapters", "dense layers", "gradients", "learnt tensor"),
    "optimizer": ("optimizer", "optimizer states", "paged states"),
    "activations": ("activations", "forward", "layer outputs", "fused QKV", "key-value cache", "both caches", "rows",
                    "inputs", "rotary tables", "masks", "prompts"),
    "temporary": ("height", "quantiser", "head", "logits", "probabilities", "rounding", "cast", "pool", "one tensor",
                  "largest tensor", "blocks"),
    "files": ("weight file", "state file"),
    "other": ("process", "runtime", "cuBLAS workspace", "CUDA", "builder", "buffers", "waiting", "data", "reserved",
              "gloo", "other processes"),
}  # fmt: skip
FAMILY_OF: dict[str, Family] = {term: family for family, terms in TERMS.items() for term in terms}

# What a plan keeps of the best there is, and a device of a context: colour, matplotlib's marker.
GRADES: dict[Grade, tuple[str, str]] = {
    "full": (GREEN, "o"), "4-bit": (BLUE, "D"), "reduced": (ORANGE, "v"), "none": (GREY, "x"),
}  # fmt: skip

# Series of a plot in this order: no two of them have colour, marker or line in common until the list is used up.
SERIES = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (6, 2, 1, 2)))


def family(term: str) -> Family:
    """The family of a term; `height: backward` is one of the heights."""
    return FAMILY_OF.get(term.partition(": ")[0], "other")


def families(terms: Iterable[str]) -> list[Family]:
    """The families of these terms, each once, in the order of a legend."""
    found = {family(term) for term in terms}
    return [name for name in FAMILIES if name in found]


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast of two colours by WCAG: 1 where they are the same, 21 of black on white."""
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)
