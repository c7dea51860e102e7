"""What does the example reach from base to bundle, and at what cost? Records the result of `make profile=cpu export`.

make bench-example
"""

from __future__ import annotations

import json

from run import ROOT, record


def main() -> None:
    folder = ROOT / "build" / "cpu"
    bundle = json.loads((folder / "bundle" / "bundle.json").read_text())
    here = json.loads((folder / "bundle.measured.json").read_text())
    merged = json.loads((folder / "merged" / "merged.json").read_text())
    train = merged["train"]
    record("example", {
        "scores": bundle["proof"]["scores"],
        "rungs": bundle["proof"]["rungs"],
        "bundle_bytes": bundle["size_bytes"],
        "training": {
            "predicted_bytes": max(phase["expected_bytes"] for phase in train["plan"]["phases"]),
            "measured_bytes": train["measured_peak_bytes"], "seconds": train["seconds"], "steps": train["steps"],
        },
        "merge": {"predicted_bytes": merged["predicted_peak_bytes"], "measured_bytes": merged["measured_peak_bytes"]},
        "bundle": {"predicted_bytes": here["predicted_here_bytes"], **here["measured"]},
    })  # fmt: skip


if __name__ == "__main__":
    main()
