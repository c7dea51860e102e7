"""Does a model of SmolLM2-135M's shape go through the whole line, and what does each stage take?

    make bench-large

Random weights in fp32 (30 layers, hidden 576, vocabulary 49,152, tied): the numbers are seconds and bytes, not quality.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path

from run import BASE, ROOT, SECTIONS, record, verb
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    stages: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = AutoConfig.from_pretrained(ROOT / "examples" / "configs" / "smollm2-135m")
        config.eos_token_id = config.bos_token_id = 0
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(BASE / name, folder / "model" / name)
        for name, count in (("train", 64), ("valid", 16)):
            lines = (SECTIONS / f"{name}.jsonl").read_text().splitlines(keepends=True)
            (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
        build = folder / "build"
        files = ["--data", str(folder / "train.jsonl"), "--valid", str(folder / "valid.jsonl")]
        pins = ["--set", "max_steps=3", "--set", "batch_size=4", "--set", "eval_rows=8"]
        for name, arguments in (
            ("plan", ["plan", "--model", str(folder / "model"), *files, *pins, "--out", str(build / "plan.json")]),
            ("train", ["train", str(build / "plan.json")]),
            ("merge", ["merge", str(build / "train")]),
            ("export", ["export", str(build / "merged")]),
        ):
            started = time.monotonic()
            verb(*arguments)
            stages[name] = round(time.monotonic() - started, 1)
            print(f"{name:8} {stages[name]:6.1f} s", flush=True)
        started = time.monotonic()
        verb("verify", str(build / "bundle"), as_json=False)
        stages["verify"] = round(time.monotonic() - started, 1)
        train = json.loads((build / "train" / "train.json").read_text())
        merged = json.loads((build / "merged" / "merged.json").read_text())
        bundle = json.loads((build / "bundle" / "bundle.json").read_text())
        here = json.loads((build / "bundle.measured.json").read_text())
    predicted = max(phase["expected_bytes"] for phase in train["plan"]["phases"])
    result = {
        "seconds": stages, "total_seconds": round(sum(stages.values()), 1),
        "training": {"predicted_bytes": predicted, "measured_bytes": train["measured_peak_bytes"],
                     "phases": train["phase_peak_bytes"]},
        "merge": {"predicted_bytes": merged["predicted_peak_bytes"], "measured_bytes": merged["measured_peak_bytes"]},
        "bundle_bytes": bundle["size_bytes"], "bundle": here["measured"],
    }  # fmt: skip
    print(json.dumps(result))
    record("large", result)


if __name__ == "__main__":
    main()
