"""Does it pay to take another share of the fine-tune from each half of the layers? On the example, by test rows.

python bench/groups.py build/cpu/train [rows [rules]]: one share for all, then one for each of two groups, chosen on
validation rows by `edgeft.merging.sweep` under both rules; what was chosen is scored on test rows and on other general
text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from run import record

from edgeft.merging import sweep as sweeps
from edgeft.merging.sweep import Line, choose_point, general_samples, sweep
from edgeft.models.checkpoint import local_folder
from edgeft.models.evaluate import evaluate
from edgeft.models.layer_shares import Shares
from edgeft.models.parts import find_parts
from edgeft.targets.target import load_target
from edgeft.training.job_data import Data
from edgeft.training.result import TrainResult

GENERAL = "examples/debian-descriptions/valid.jsonl"


def main() -> None:
    trained, rows = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else sweeps.ROWS
    sweeps.ROWS = rows
    result = TrainResult.read(trained / "train.json")
    data = Data.read(result.plan)
    line = Line(trained, local_folder(result.plan.job.model), tied=result.plan.spec.tie_word_embeddings)
    texts = general_samples(GENERAL, data.tokenizer, 2 * rows)[rows:]  # others than those that chose
    scored: dict[str, dict[str, float | None]] = {}

    def score(shares: Shares) -> dict[str, float | None]:
        if str(shares) not in scored:
            line.move_to(shares)
            parts, cpu = find_parts(line.model), next(line.model.parameters()).device
            task, general = (
                evaluate(line.model, parts, samples, data.tokenizer, device=cpu) for samples in (data.test, texts)
            )
            scored[str(shares)] = {"exact_match": task.exact_match, "loss": task.loss, "general_loss": general.loss}
        return scored[str(shares)]

    found = []
    for select in sys.argv[3:] or ("best", "bounded"):
        made = sweep(
            trained, load_target("ort-fp32"), select=select, general=GENERAL, groups=2,
            progress=lambda name, done, total, _: print(name, done, total, file=sys.stderr),
        )  # fmt: skip
        bound = made.max_general_increase_nats
        uniform = choose_point([point for point in made.points if not point.groups], select, bound)[0].shares
        chosen = Shares(rest=made.wise_alpha, groups=made.groups)
        for name, shares in (("one share", uniform), ("two groups", chosen)):
            found.append({"select": select, "name": name, "shares": str(shares), "bound": bound, **score(shares)})
            print(json.dumps(found[-1]), flush=True)
    ends = [{"name": name, **score(Shares(rest=share))} for name, share in (("base", 0.0), ("fine-tuned", 1.0))]
    record("groups", {"tuner": result.plan.training.tuner, "steps": result.steps, "rows": rows,
                      "test_rows": len(data.test), "ends": ends, "found": found})  # fmt: skip


if __name__ == "__main__":
    main()
