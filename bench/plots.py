"""The plots of recorded results, drawn again from their JSON: python bench/plots.py, nothing is measured."""

from __future__ import annotations

import json
from typing import Any

import planner
import sparse
from run import ROOT

from edgeft.merging.survival import Survival
from edgeft.models.metrics import Sweep
from edgeft.reporting.sweep_charts import plot_survival, plot_sweep

RESULTS = ROOT / "bench" / "results"
# what an older record of a sweep leaves out, and its plot does not read
UNSAID = {"request_sha256": "", "task_rows": "", "seconds": 0.0, "groups": ()}
UNRECORDED = {"input_sha256": "", "versions": {}, "base": "", "unchanged_tensors": 0, "seconds": 0.0}


def recorded(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    runs = recorded("planner")["runs"]
    planner.plot([row for part in runs.values() for row in part if "error" in row], RESULTS / "planner.svg")
    sparse.plot(recorded("sparse")["runs"], RESULTS / "sparse.svg")
    found = recorded("sweep")
    target = list(found["scores"])[-1]
    plot_sweep(Sweep.model_validate(UNSAID | {"target": target} | found["sweep"]), RESULTS / "sweep.svg")
    if "tensors" in found["survival"]:
        plot_survival(Survival.model_validate(UNRECORDED | found["survival"]), RESULTS / "survival.svg")
    else:
        print("survival.svg is left as it is: its record has no tensors, make bench-sweep writes them")


if __name__ == "__main__":
    main()
