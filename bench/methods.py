"""What does each way of training reach on the example task, at equal steps, and what does it cost?

    make bench-methods

Full fine-tuning and LoRA at their planned learning rates: exact match on the 1,000 test rows, peak memory, seconds.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from run import SECTIONS, record, train

METHODS: dict[str, dict[str, Any]] = {
    "full fine-tuning": {"tuner": "full"},
    "LoRA rank 64": {"tuner": "lora"},
}


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, settings) in enumerate(METHODS.items()):
            result = train(Path(scratch) / str(number), settings, test=SECTIONS / "test.jsonl")
            row = {
                "method": name, "settings": settings, "steps": result["steps"],
                "learning_rate": result["plan"]["training"]["learning_rate"],
                "trained_parameters": result["trained_parameters"], "test": result["test"],
                "measured_peak_bytes": result["measured_peak_bytes"], "seconds": result["seconds"],
            }  # fmt: skip
            rows.append(row)
            test, peak = result["test"], result["measured_peak_bytes"] / 2**20
            print(f"{name:32} exact match {100 * test['exact_match']:.1f}%  loss {test['loss']:.4f}", end="  ")
            print(f"peak {peak:.0f} MiB  {result['seconds']:.0f} s", flush=True)
    first = rows[0]["seconds"]
    record("methods", {"rows": [{**row, "time_against_first": round(row["seconds"] / first, 3)} for row in rows]})
    print(json.dumps({row["method"]: row["test"]["exact_match"] for row in rows}))


if __name__ == "__main__":
    main()
