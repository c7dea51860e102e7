"""When does a row's search among labels know enough for all that is asked of it: the answer, and what it is worth?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgeft.data.labels import NO_LABEL

UNKNOWN = 1e-3  # share of the labels' probability that may be left unknown of a row


def known_enough(right: int) -> Callable[[Any], bool]:
    """What ends a search: the right label is found, and all that is unknown is next to nothing."""

    def enough(search: Any) -> bool:
        waits = right != NO_LABEL and all(number != right for _, number in search.found)
        if waits or not search.decided():
            return False
        least, most = search.probability(0)
        return bool(most - least <= UNKNOWN * most)

    return enough
