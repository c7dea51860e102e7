"""Which artifact will `auto` end in? By the size of the models on which roundings were measured; a table, no theory.

The climb of repair.py decides by the user's own rows. This is what a plan can say before there are any weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edgeft.models.spec import ModelSpec
from edgeft.targets.target import Target
from edgeft.units import show_count

FAR = 4.0  # a model so many times larger or smaller than every one that was measured is another case


class Measured(NamedTuple):
    """A fine-tuned model whose artifacts were scored beside the merged model, on the same rows."""

    model: str
    parameters: int
    points: dict[str, float]  # of exact match, by target: the artifact's less the merged model's
    kept: str  # the first target in the order of `auto` that keeps the fine-tune
    source: str

    def apart(self, parameters: int) -> float:
        """How many times larger or smaller a model of so many parameters is."""
        return max(self.parameters / parameters, parameters / self.parameters)

    @property
    def line(self) -> str:
        """What was measured."""
        points = ", ".join(f"{name} {value:+.1f}" for name, value in self.points.items())
        return f"{self.model}, {show_count(self.parameters)}: {points} points of exact match ({self.source})"


MEASURED = (
    Measured("debian-tiny", 5_771_520, {"ort-int4": -0.1}, "ort-int4", "1,000 rows, make bench-example"),
    Measured(
        "SmolLM2-135M-Instruct", 134_515_008, {"ort-int4": -9.3, "ort-int4-calibrated": -0.4}, "ort-int4-calibrated",
        "1,000 rows, make bench-smollm2",
    ),
)  # fmt: skip


def likely(targets: Sequence[Target]) -> list[Target]:
    """Of an export's candidates those that are planned for.

    16 and 32 bits are for the rare case that 8 lose too much: the export looks for their room when it comes to that.
    """
    return [each for each in targets if each.weight_bits <= max(8, targets[0].weight_bits)]


def expected(spec: ModelSpec, targets: Sequence[Target]) -> tuple[Target, str]:
    """(which of an export's candidates is expected, why); of one alone nothing is said."""
    if len(targets) == 1:
        return targets[0], ""
    nearest = min(MEASURED, key=lambda each: each.apart(spec.total_parameters))
    found = next((target for target in targets if target.name == nearest.kept), targets[0])
    far = "" if nearest.apart(spec.total_parameters) <= FAR else ", none near this size was measured"
    return found, f"auto: {found.name} is expected, by {nearest.line}{far}; the export decides by your rows"
