"""How much of a fine-tune is taken from which layers: one coefficient for all, or one for each group? (no torch)"""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgeft.documents import Strict
from edgeft.errors import BadInput

HINT = "give a number from 0 to 1, or groups of layers as in 0-3=0.5,4-7=1,rest=1"
REST = "rest"


class Group(Strict):
    """Layers `first` to `last`, both included, and the share of their change that is taken."""

    first: int
    last: int
    wise_alpha: float


class Shares(Strict):
    """Wise-FT's coefficient of every tensor: that of its layer's group, or `rest` (other layers, embedding, head)."""

    rest: float = 1.0
    groups: tuple[Group, ...] = ()

    def of(self, layer: int | None) -> float:
        """The share for a tensor of this layer; None: of what is outside of the layers."""
        found = [group.wise_alpha for group in self.groups if layer is not None and group.first <= layer <= group.last]
        return found[0] if found else self.rest

    @property
    def nothing(self) -> bool:
        """Whether the result is the base."""
        return not self.rest and not any(group.wise_alpha for group in self.groups)

    def __str__(self) -> str:
        """As `parse_shares` reads it."""
        if not self.groups:
            return f"{self.rest:g}"
        parts = [f"{group.first}-{group.last}={group.wise_alpha:g}" for group in self.groups]
        return ",".join([*parts, f"{REST}={self.rest:g}"])


def parse_shares(text: str) -> Shares:
    """`0.6`, or `0-3=0.5,4-7=1,rest=1`; what no group names is taken whole unless `rest` says otherwise.

    Raises BadInput for what cannot be read, shares outside 0 to 1, a layer in two groups.
    """
    if "=" not in text:
        return Shares(rest=_share(text))
    rest, groups = 1.0, list[Group]()
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        ends = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", name)
        if not equals or (not ends and name != REST):
            raise BadInput("--wise-alpha", f"cannot read {part!r}", HINT)
        if not ends:
            rest = _share(value)
            continue
        group = Group(first=int(ends[1]), last=int(ends[2] or ends[1]), wise_alpha=_share(value))
        if group.last < group.first or any(g.first <= group.last and group.first <= g.last for g in groups):
            raise BadInput("--wise-alpha", f"{name}: no range, or layers that another group has too", HINT)
        groups.append(group)
    return Shares(rest=rest, groups=tuple(sorted(groups, key=lambda group: group.first)))


def check_shares(shares: Shares, layers: int) -> None:
    """Raise BadInput for a share outside 0 to 1, or a group beyond the model's layers."""
    for value in (shares.rest, *(group.wise_alpha for group in shares.groups)):
        if not 0.0 <= value <= 1.0:
            raise BadInput("--wise-alpha", f"must be from 0 (base) to 1 (fine-tuned), got {value}")
    beyond = [group.last for group in shares.groups if group.last >= layers]
    if beyond:
        raise BadInput("--wise-alpha", f"there is no layer {max(beyond)}", f"the model's are 0 to {layers - 1}")


def equal_groups(layers: int, count: int, wise_alphas: Sequence[float], rest: float) -> Shares:
    """`count` groups of neighbouring layers, as equal as can be, with their shares from the lowest up."""
    ends = [round(layers * i / count) for i in range(count + 1)]
    groups = [Group(first=ends[i], last=ends[i + 1] - 1, wise_alpha=share) for i, share in enumerate(wise_alphas)]
    return Shares(rest=rest, groups=tuple(groups))


def layer_of(name: str) -> int | None:
    """The decoder layer of a tensor: the first number in its name; None outside of the layers."""
    found = re.search(r"\.(\d+)\.", "." + name)
    return int(found[1]) if found else None


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise BadInput("--wise-alpha", f"cannot read {text!r}", HINT) from None
    if not 0.0 <= value <= 1.0:
        raise BadInput("--wise-alpha", f"must be from 0 (base) to 1 (fine-tuned), got {text}")
    return value
