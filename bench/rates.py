"""Which learning rate should a plan take by itself? Full fine-tuning and LoRA on the example, by validation rows.

    make bench-rates

Multiples of one rate for each tuner, several seeds each, all epochs of the default job. `default_learning_rate` of
edgeft/candidates.py follows what has the lowest mean validation loss; test rows are not read. `--profile NAME` runs it
on another machine.
"""

from __future__ import annotations

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from run import Kept, record, train  # after the line above: torch reads it at import

from edgeft.settings.job import Tuner

FACTORS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
START: dict[Tuner, float] = {"full": 5.9e-4, "lora": 9.8e-4}  # factor 1
TUNERS: dict[Tuner, dict[str, Any]] = {"full": {"tuner": "full"}, "lora": {"tuner": "lora", "rank": 64}}


def measure(tuner: Tuner, factor: float, seed: int, profile: str, epochs: int, folder: Path) -> dict[str, Any]:
    """One run and its score on the validation rows."""
    rate = float(f"{factor * START[tuner]:.3g}")
    settings = {**TUNERS[tuner], "learning_rate": rate, "seed": seed, "epochs": epochs, "eval_rows": 500}
    result = train(folder, settings, profile=profile, rehearsal=False)
    valid = result["valid"]
    print(f"{tuner:5} {factor:5} x = {rate:.2e}, seed {seed}: valid loss {valid['loss']:.4f}, exact match "
          f"{100 * valid['exact_match']:.1f}%", flush=True)  # fmt: skip
    return {"run": f"{tuner} {factor} {seed}", "tuner": tuner, "factor": factor, "learning_rate": rate, "seed": seed,
            "valid": valid, "seconds": result["seconds"]}  # fmt: skip


def summary(rows: list[dict[str, Any]], tuner: Tuner) -> dict[str, Any]:
    """Mean validation loss and exact match of each rate of a tuner, and the rate that is best by the loss."""
    table = []
    for factor in sorted({row["factor"] for row in rows if row["tuner"] == tuner}):
        of = [row for row in rows if (row["tuner"], row["factor"]) == (tuner, factor)]
        table.append({
            "factor": factor, "learning_rate": of[0]["learning_rate"], "seeds": len(of),
            "loss": round(statistics.fmean(row["valid"]["loss"] for row in of), 4),
            "exact_match": round(statistics.fmean(row["valid"]["exact_match"] for row in of), 4),
        })  # fmt: skip
    return {"rates": table, "best": min(table, key=lambda row: row["loss"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    asked = parser.parse_args()
    kept = Kept("rates")
    wanted = list(product(TUNERS, FACTORS, range(asked.seeds)))
    left = [each for each in wanted if f"{each[0]} {each[1]} {each[2]}" not in kept.rows]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(asked.jobs) as pool:

        def run(each: tuple[Tuner, float, int]) -> None:
            kept.add(measure(*each, asked.profile, asked.epochs, Path(scratch) / "-".join(map(str, each))))

        list(pool.map(run, left))
    rows = [kept.rows[f"{tuner} {factor} {seed}"] for tuner, factor, seed in wanted]
    found = {tuner: summary(rows, tuner) for tuner in TUNERS}
    record("rates", {"profile": asked.profile, "epochs": asked.epochs, **found, "runs": rows})
    kept.path.unlink()


if __name__ == "__main__":
    main()
