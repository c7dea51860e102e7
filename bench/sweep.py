"""Which share of the fine-tune does the sweep take on the example, and does its int4 bundle keep what the merge can do?

    make bench-sweep

`edgeft merge --sweep` under the default bound on the general loss, then the export of what was chosen for ort-int4, and
what of the change its rounding leaves. The plots lie beside the JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from run import ROOT, record, verb

GENERAL = "examples/debian-descriptions/valid.jsonl"  # verbs run in the repository
SURVIVED = ("target", "projection", "cosine", "tensors", "layers", "promote")
RESULTS = ROOT / "bench" / "results"


def main() -> None:
    folder = Path(sys.argv[1])
    merged, bundle = folder / "sweep-merged", folder / "sweep-bundle"
    verb("merge", str(folder / "train"), "--sweep", "--select", "bounded", "--general", GENERAL,
         "--plot", str(RESULTS / "sweep.svg"), "--out", str(merged))  # fmt: skip
    verb("export", str(merged), "--target", "ort-int4", "--out", str(bundle))
    left = verb("survival", str(merged), "--plot", str(RESULTS / "survival.svg"))
    found = json.loads((merged / "merged.json").read_text())["sweep"]
    proof = json.loads((bundle / "bundle.json").read_text())["proof"]
    kept = (
        "wise_alpha",
        "groups",
        "select",
        "target",
        "task_rows",
        "seconds",
        "why",
        "max_general_increase_nats",
        "general_rows",
        "points",
        "pareto",
    )
    record("sweep", {
        "sweep": {name: found[name] for name in kept},
        "scores": proof["scores"],
        "survival": {name: left[name] for name in SURVIVED},
    })  # fmt: skip


if __name__ == "__main__":
    main()
