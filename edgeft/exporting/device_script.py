"""What does a bundle say on this processor? A program of its own, for an interpreter that has no edgeft.

    python device_script.py REQUEST RESULT    JSON files; REQUEST names run.py, the bundle, and rows of token ids

Each row is answered greedily, or followed along tokens that another processor answered; RESULT has for every token the
one that was chosen, how far the best two lay apart, and the logits of the tokens that the other processor found best.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

BEST = 8  # logits of so many tokens are compared


def load_runner(path: str) -> Any:
    """run.py as a module."""
    spec = importlib.util.spec_from_file_location("bundle_runner", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answered(runner: Any, ids: list[int], most: int) -> list[int]:
    """The greedy answer with the token that ends it, if one does within `most`."""
    tokens = []
    for token in runner.stream(ids, most, eos_ids=()):
        tokens.append(token)
        if token in runner.eos_ids:
            break
    return tokens


def observed(last: Any, asked: list[int] | None) -> dict[str, Any]:
    """One token's choice: which, by what margin, and the logits of the asked tokens (by default the best ones)."""
    best = [int(token) for token in last.argsort()[::-1][:BEST]]
    return {
        "token": int(last.argmax()),
        "margin": float(last[best[0]]) - float(last[best[1]]),
        "asked": asked or best,
        "logits": [float(last[token]) for token in asked or best],
    }


def row(runner: Any, given: dict[str, Any], most: int) -> dict[str, Any]:
    """What is chosen at each token of the answer: its own, or the one that `given` holds as another processor's."""
    tokens = given.get("tokens")
    if tokens is None:
        tokens = answered(runner, given["ids"], most)
    asked = given.get("asked") or [None] * len(tokens)
    steps = [observed(last, one) for last, one in zip(runner.follow(given["ids"], tokens), asked)]  # noqa: B905
    return {"ids": given["ids"], "tokens": tokens, "steps": steps}


def emulator_bytes(proc: Path = Path("/proc/self")) -> int:
    """Resident bytes of an emulator around this program: what the kernel counts and the program does not see.

    QEMU shows a program its own mappings in /proc/self/maps, and lets /proc/self/smaps through. 0 without one.
    """

    def span(text: str) -> tuple[int, int]:
        first, _, last = text.partition("-")
        return int(first, 16), int(last, 16)

    try:
        seen = [span(line.split()[0]) for line in (proc / "maps").read_text().splitlines()]
        lines = [line.split() for line in (proc / "smaps").read_text().splitlines()]
    except OSError:
        return 0
    total, inside = 0, True
    for words in lines:
        if not words[0].endswith(":"):
            start, end = span(words[0])
            inside = any(first < end and start < last for first, last in seen)
        elif words[0] == "Rss:" and not inside:
            total += int(words[1]) * 1024
    return total


def check(request: dict[str, Any]) -> dict[str, Any]:
    """The golden vectors, then the rows if those hold, and what it took."""
    module, bundle, notes = load_runner(request["runner"]), Path(request["bundle"]), list[str]()
    trusted = bytes.fromhex(request["trusted"]) if request["trusted"] else None
    start = time.perf_counter()
    problems = module.verify(bundle, trusted, True, notes)
    verified = time.perf_counter() - start
    rows = []
    if request["rows"] and not problems:
        runner = module.Runner(bundle, trusted=trusted)
        rows = [row(runner, given, request["answer_tokens"]) for given in request["rows"]]
    return {
        "problems": problems, "notes": notes, "rows": rows, "verify_seconds": verified,
        "seconds": time.perf_counter() - start, "peak_memory_bytes": module.peak_memory_bytes(),
        "emulator_bytes": emulator_bytes(),
    }  # fmt: skip


def main() -> None:
    """Read REQUEST, write RESULT."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(check(request)), encoding="utf-8")


if __name__ == "__main__":
    main()
