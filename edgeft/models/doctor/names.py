"""What are the names of a model's tensors, without what frameworks put into them when they save it? (no torch)"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

# what frameworks put into a model's own names, before them or before those of a part
WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
OUTER = ("module.", "base_model.model.", "model.")  # the last only where every name has it, and goes on as a whole one
WHOLE = ("model.", "lm_head.")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Every name, and the same without what frameworks wrap a model in."""
    plain = {name: WRAPPER.sub("", name) for name in names}
    while prefix := next((outer for outer in OUTER if _is_outer(outer, plain.values())), None):
        plain = {name: own.removeprefix(prefix) for name, own in plain.items()}
    return plain


def _is_outer(prefix: str, names: Collection[str]) -> bool:
    if prefix != "model.":
        return any(name.startswith(prefix) for name in names)
    insides = [name.removeprefix(prefix) for name in names]
    return all(name.startswith(prefix) for name in names) and any(name.startswith(WHOLE) for name in insides)


def added(name: str, own: str) -> str:
    """What was put into a plain name, where it began with that, else the first piece of it."""
    if name.endswith(own):
        return name.removesuffix(own)
    found = WRAPPER.search(name)
    return found[0] if found else name
