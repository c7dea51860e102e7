"""What does each way of training reach on the example task, at equal steps, and what does it cost?

    make bench-methods

Full fine-tuning and LoRA at their planned learning rates, side by side with one thread each: exact match on
the 1,000 test rows, peak memory, seconds.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from run import SECTIONS, record, train  # after the line above: torch reads it at import

METHODS: dict[str, dict[str, Any]] = {
    "full fine-tuning": {"tuner": "full"},
    "LoRA rank 64": {"tuner": "lora", "rank": 64},
}


def measure(name: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One row: what a method reached, and what it took."""
    result = train(folder, settings, test=SECTIONS / "test.jsonl")
    test, peak = result["test"], result["measured_peak_bytes"]
    print(f"{name:20} exact match {100 * test['exact_match']:.1f}%  loss {test['loss']:.4f}", end="  ")
    print(f"peak {peak / 2**20:.0f} MiB  {result['seconds']:.0f} s", flush=True)
    rate = result["plan"]["training"]["learning_rate"]
    return {"method": name, "settings": settings, "steps": result["steps"], "learning_rate": rate, "test": test,
            "trained_parameters": result["trained_parameters"], "measured_peak_bytes": peak,
            "seconds": result["seconds"]}  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(len(METHODS)) as pool:
        rows = list(pool.map(lambda name: measure(name, METHODS[name], Path(scratch) / name), METHODS))
    first = rows[0]["seconds"]
    record("methods", {"rows": [{**row, "time_against_first": round(row["seconds"] / first, 3)} for row in rows]})


if __name__ == "__main__":
    main()
