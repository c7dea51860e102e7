"""How much of a fine-tune is worth taking? Its share measured along the line from base to fine-tuned, after line.py."""

import sys
from pathlib import Path

import edgeft

HERE = Path(__file__).resolve().parent
OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "build/line")

sweep = edgeft.SweepOptions(select="bounded", general=str(HERE / "debian-descriptions" / "valid.jsonl"))
merged = edgeft.merge(OUT / "train", OUT / "shared", sweep=sweep)
print(merged.sweep)
print(f"taken: {merged.wise_alpha}, in {merged.folder}")
