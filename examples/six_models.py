"""Which of six models can a card of 9 GiB fine-tune, how, and in what time? Only their config.json is needed."""

from pathlib import Path

import edgeft
from edgeft.errors import DoesNotFit

CONFIGS = Path(__file__).resolve().parent / "configs"
NAMES = ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "qwen2.5-3b", "mistral-7b", "llama-3.1-8b")

for name in NAMES:
    try:
        plan = edgeft.plan(model=str(CONFIGS / name), profile="t4", max_memory_bytes=9 * 2**30)
    except DoesNotFit as problem:
        print(f"{name:14} {problem.hint}")
        continue
    way, gib = plan.training, plan.peak_bytes / 2**30
    print(f"{name:14} {way.tuner} on {way.base_precision}, {gib:.2f} GiB, {plan.seconds / 3600:.1f} h")
