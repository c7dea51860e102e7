"""How far are the predicted peaks of merging and exporting from the measured ones?

    make bench-stages

The example's model and others of other shape, dtype and vocabulary, with random weights, through plan, two steps of
training, merge and export. Predicted is a stage's expected bytes in plan.json, measured its own highest resident bytes:
of the export the waiting process and the builder's together, or the parity ladder's, whichever is more.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from run import BASE, CONFIGS, ROOT, SECTIONS, record, verb, with_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

MODELS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "example": ("", {}, torch.float32),
    "smollm2-135m": ("smollm2-135m", {}, torch.float32),
    "smollm2-135m, bf16": ("smollm2-135m", {}, torch.bfloat16),
    "qwen2.5-0.5b of 6 layers, 20,000 words": (
        "qwen2.5-0.5b", {"num_hidden_layers": 6, "vocab_size": 20_000}, torch.float32
    ),
    "llama-3.1-8b of 4 layers, a quarter as wide": (
        "llama-3.1-8b",
        {"num_hidden_layers": 4, "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 3584,
         "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096},
        torch.bfloat16,
    ),
}  # fmt: skip
TARGETS = ("ort-int4", "ort-int8", "ort-fp32")


def random_model(folder: Path, name: str, changes: dict[str, Any], dtype: torch.dtype) -> Path:
    """A model of a known config's shape with random weights and a tokenizer; the example itself for ""."""
    if not name:
        return BASE
    config = AutoConfig.from_pretrained(CONFIGS / name)
    for key, value in changes.items():
        setattr(config, key, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    config.eos_token_id = config.bos_token_id = 0
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return with_tokenizer(folder, config.vocab_size)


def row(model: str, stage: str, phases: list[dict[str, Any]], measured: int) -> dict[str, Any]:
    """Predicted against measured: of several phases of a stage the highest counts."""
    highest = max(phases, key=lambda phase: phase["expected_bytes"])
    predicted, high = highest["expected_bytes"], max(phase["high_bytes"] for phase in phases)
    error = predicted / measured - 1
    print(f"{model:45} {stage:18} predicted {predicted / 2**20:7.1f}  high {high / 2**20:7.1f}  "
          f"measured {measured / 2**20:7.1f} MiB  {100 * error:+.1f}%", flush=True)  # fmt: skip
    return {"model": model, "stage": stage, "predicted_bytes": predicted, "high_bytes": high,
            "measured_bytes": measured, "error": round(error, 4)}  # fmt: skip


def measure(scratch: Path, title: str) -> list[dict[str, Any]]:
    """The rows of one model: its merge, and its export to every shipped target."""
    name, changes, dtype = MODELS[title]
    model = random_model(scratch / "model", name, changes, dtype)
    for file, count in (("train", 64), ("valid", 16)):
        lines = (SECTIONS / f"{file}.jsonl").read_text().splitlines(keepends=True)
        (scratch / f"{file}.jsonl").write_text("".join(lines[:count]))
    files = ["--data", str(scratch / "train.jsonl"), "--valid", str(scratch / "valid.jsonl")]
    pins = ["--set", "max_steps=2", "--set", "batch_size=4", "--set", "eval_rows=8"]
    build = scratch / "build"
    plan = ("plan", "--model", str(model), *files, *pins)
    verb(*plan, "--out", str(build / "plan.json"))
    verb("train", str(build / "plan.json"))
    verb("merge", str(build / "train"))
    merged = json.loads((build / "merged" / "merged.json").read_text())
    phases = merged["train"]["plan"]["stages"]["phases"]
    rows = [row(title, "merge", [each for each in phases if each["name"] == "merge"], merged["measured_peak_bytes"])]
    for target in TARGETS:
        phases = verb(*plan, "--set", f"target={target}", "--out", "-")["stages"]["phases"]
        # random weights: parity of their near ties is not what is measured here
        loose = build / f"{target}.toml"
        loose.write_text(loosened((ROOT / "export" / f"{target}.toml").read_text()))
        verb("export", str(build / "merged"), "--target", str(loose))
        exported = json.loads((build / "bundle.measured.json").read_text())
        mine = [each for each in phases if each["name"].startswith("export")]
        rows.append(row(title, f"export {target}", mine, exported["measured_peak_bytes"]))
        shutil.rmtree(build / "bundle")
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far planned bytes of all rows are off; printed as well."""
    errors = [each["error"] for each in rows]
    found = {
        "mean_absolute_error": round(sum(map(abs, errors)) / len(errors), 4), "largest_error": max(errors, key=abs),
        "high_below_measured": sum(each["high_bytes"] < each["measured_bytes"] for each in rows),
    }  # fmt: skip
    print(json.dumps(found))
    return found


def loosened(toml: str) -> str:
    """A target's TOML whose parity tolerances let everything pass."""
    limits = {"min_top1_agreement": 0.0, "max_mean_kl_nats": 1e9, "max_gain_lost": 1e9, "max_loss_increase_nats": 1e9}
    return toml.partition("[parity]")[0] + "[parity]\n" + "".join(f"{k} = {v}\n" for k, v in limits.items()) + (
        "max_exact_match_drop_points = 100\n"
    )  # fmt: skip


def main() -> None:
    """All models, or those named: each is recorded when it ends, beside what is recorded of the others."""
    path = ROOT / "bench" / "results" / "stages.json"
    for title in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            new = measure(Path(scratch), title)
        old = json.loads(path.read_text())["rows"] if path.is_file() else []
        found = {name: [each for each in old if each["model"] == name] for name in MODELS} | {title: new}
        rows = [each for name in MODELS for each in found[name]]
        record("stages", {"summary": summary(rows), "rows": rows})


if __name__ == "__main__":
    main()
