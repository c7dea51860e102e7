"""How far is a training process's predicted peak memory from its measured one? Six jobs on this CPU.

    make bench-memory

The default job and five of other shape, length, batch, layers and precision; weights are random where the shape is not
the example's. Predicted is the highest phase's expected bytes in plan.json, measured the process's highest RSS.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from run import BASE, ROOT, SECTIONS, record, train
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, dict[str, int | bool]] = {
    "wide": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 4096},
    "deep": {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 16, "vocab_size": 8192},
    "vocabulary": {
        "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
JOBS: list[tuple[str, str, dict[str, Any]]] = [
    ("default", "", {"max_steps": 12}),
    (
        "wide, 512 tokens, checkpointing",
        "wide",
        {"max_steps": 3, "max_length": 512, "batch_size": 4, "checkpointing": True},
    ),
    (
        "deep, 256 tokens, top 4 layers",
        "deep",
        {"max_steps": 3, "max_length": 256, "batch_size": 8, "layers": "sparse", "active_layers": 4},
    ),
    ("vocabulary 49152, batch 2", "vocabulary", {"max_steps": 3, "max_length": 384, "batch_size": 2}),
    ("wide, full fine-tuning", "wide", {"max_steps": 3, "max_length": 128, "batch_size": 8, "tuner": "full"}),
    ("wide, NF4 base", "wide", {"max_steps": 3, "max_length": 256, "batch_size": 4, "base_precision": "nf4"}),
]


def random_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A Llama of that shape with random weights and the example's tokenizer."""
    heads = shape["hidden_size"] // 64
    config = LlamaConfig(
        **shape, num_attention_heads=heads, num_key_value_heads=heads, head_dim=64, max_position_embeddings=1024,
        eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(BASE / name, folder / name)
    return folder


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.jsonl"
        with gzip.open(ROOT / "examples" / "debian-descriptions" / "train.jsonl.gz", "rt") as lines:
            long = [line for line in (next(lines) for _ in range(4000)) if len(line) > 1500]
        text.write_text("".join(long[:300]))
        models = {name: random_model(Path(scratch) / name, shape) for name, shape in SHAPES.items()}
        for number, (name, shape, settings) in enumerate(JOBS):
            folder = Path(scratch) / str(number)
            files = (
                {"data": SECTIONS / "train.jsonl"}
                if not shape
                else {"data": text, "valid": text, "model": models[shape]}
            )
            result = train(folder, {**settings, "eval_rows": 20}, **files)
            predicted = max(phase["expected_bytes"] for phase in result["plan"]["phases"])
            high, measured = result["plan"]["peak_bytes"], result["measured_peak_bytes"]
            error = predicted / measured - 1
            rows.append({
                "job": name, "settings": settings, "predicted_bytes": predicted, "high_bytes": high,
                "measured_bytes": measured, "error": round(error, 5), "phase_peak_bytes": result["phase_peak_bytes"],
                "phases": {p["name"]: p["expected_bytes"] for p in result["plan"]["phases"]},
            })  # fmt: skip
            mib = 2**20
            print(f"{name:36} predicted {predicted / mib:7.1f}  high {high / mib:7.1f}  "
                  f"measured {measured / mib:7.1f} MiB  {100 * error:+.2f}%", flush=True)  # fmt: skip
    errors = [row["error"] for row in rows]
    summary = {
        "mean_absolute_error": round(sum(map(abs, errors)) / len(errors), 5), "most_under": min(errors),
        "high_below_measured": sum(row["high_bytes"] < row["measured_bytes"] for row in rows),
    }  # fmt: skip
    print(json.dumps(summary))
    record("memory", {"summary": summary, "jobs": rows})


if __name__ == "__main__":
    main()
