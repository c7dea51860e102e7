"""Answer prompts of a file of ids as a device does, in a process that has nothing else: bench/answers.py asks for it.

python bench/answer_rows.py BUNDLE ROWS.json 0|1     guesses off or on; prints what it took as JSON
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

RUNNER = Path(__file__).resolve().parents[1] / "export" / "run.py"


def runner_module() -> Any:
    """The runner of every bundle; bench/run.py has its name too."""
    found = importlib.util.spec_from_file_location("device_runner", RUNNER)
    assert found is not None and found.loader is not None
    module = sys.modules["device_runner"] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def main() -> None:
    bundle, rows, guess = sys.argv[1:]
    device = runner_module()
    runner = device.Runner(Path(bundle))
    runner.guess = guess == "1"
    tokens, started, number = 0, 0.0, 0
    for number, (ids, most) in enumerate(json.loads(Path(rows).read_text())):
        if number == 1:  # the first one warms up
            tokens, started = 0, time.perf_counter()
        if runner.labels is not None:
            made = runner.labels.paths[runner.choose(ids).found[0][1]]
        elif runner.grammar is not None:
            made = runner.write(ids, most)
        else:
            made = list(runner.stream(ids, most))
        tokens += len(ids) + len(made)
    print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens, "rows": number,
                      "peak_bytes": device.peak_memory_bytes()}))  # fmt: skip


if __name__ == "__main__":
    main()
