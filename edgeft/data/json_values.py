"""What is a JSON text's value, and what is wrong with one that is none? (no torch)"""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """A JSON value, or the ValueError that says what is wrong with the text: a key given twice is."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
        return value

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as problem:
        return ValueError(f"not JSON: {problem}")
    except ValueError as problem:
        return problem
    except RecursionError:
        return ValueError("not JSON that can be read: it is nested too deeply")
