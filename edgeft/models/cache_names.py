"""What do transformers' versions call the keys and values that a model is given and gives back?

`past_key_values` until 5.23, `cache` since 5.24, which takes the old name for a while, with a warning, and in places.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

NAMES = ("cache", "past_key_values")  # the new one first


def cache_argument(module: Any) -> str:
    """The name by which a model's or a layer's forward takes them."""
    taken = inspect.signature(module.forward).parameters
    return next((name for name in NAMES if name in taken), NAMES[-1])


def cache_in(named: Mapping[str, Any]) -> Any:
    """Those among the arguments of a call; None where there are none."""
    return next((named[name] for name in NAMES if named.get(name) is not None), None)


def cache_of(made: Any) -> Any:
    """Those that a forward gave back."""
    return made.cache if hasattr(made, NAMES[0]) else made.past_key_values
