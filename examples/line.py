"""The whole line in Python: a plan, a fine-tune, a merge, a bundle, an answer. python examples/line.py [FOLDER]"""

import sys
from pathlib import Path

import edgeft

HERE = Path(__file__).resolve().parent
OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "build/line")
DATA = HERE / "debian-sections"

plan = edgeft.plan(
    model=str(HERE / "debian-tiny"), data=str(DATA / "train.jsonl"), valid=str(DATA / "valid.jsonl"), profile="cpu",
    max_steps=20, eval_rows=50, out=OUT / "plan.json",
)  # fmt: skip
trained = edgeft.train(plan, say=print)
merged = edgeft.merge(trained)
bundle = edgeft.export(merged, target="ort-int4")
print(bundle)
print(edgeft.run(bundle, "Package: python3-numpy\nSection:", max_tokens=4))
