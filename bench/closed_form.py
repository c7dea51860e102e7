"""How far is the closed form of a step's memory from the simulated one? Random plans, seeds fixed.

    make bench-closed-form          # or: python bench/closed_form.py 40

Seventeen shapes of thirteen families, 6M to 8B parameters; precision, tuner, rank, layers that train, ends,
recomputation, batch, length and loss chunks at random. The simulation is the project's own training step and equals a
real one to the byte (tests/simulation/test_simulate.py).
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

from run import ROOT, record

from edgeft.memory import train_step
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.settings.job import Training
from edgeft.simulation.simulate import simulate

CONFIGS = ROOT / "examples" / "configs"
SHAPES = [ROOT / "examples" / "debian-tiny", *(CONFIGS / name for name in (
    "smollm2-135m", "qwen3-0.6b", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "granite-3.0-2b", "mistral-7b",
    "llama-3.1-8b", "smollm3-3b", "gemma-2b", "gemma-2-2b", "gemma-3-1b", "phi-3-mini", "gpt2", "opt-125m",
    "pythia-160m"))]  # fmt: skip
PLANS = 340


def random_plan(spec: ModelSpec, draw: random.Random) -> tuple[Training, train_step.Workload]:
    """A plan that the planner could make for some machine, and its largest batch."""
    device, layers = draw.choice(["cpu", "cuda"]), spec.num_hidden_layers
    way = draw.choice(["lora", "lora", "lora", "full", "sparse"])
    base = draw.choice(["fp32", "bf16"] if way == "full" else ["fp32", "bf16", "nf4", "nf4"])
    compute = ("fp32" if device == "cpu" else draw.choice(["bf16", "fp16"])) if base == "nf4" else base
    top = layers if way == "full" or draw.random() < 0.5 else draw.randint(1, layers)
    trained = tuple(range(layers - top, layers))
    ends = dict.fromkeys(("embedding", "norm", "head"), "on" if way == "full" else "off")
    if way == "sparse":
        trained = tuple(sorted(draw.sample(range(layers), draw.randint(1, min(4, layers)))))
        if base == "fp32":
            ends = {end: draw.choice(["on", "off", "off"]) for end in ends}
    micro = draw.choice([1, 1, 2, 4, 8])
    longest = min(draw.choice([32, 64, 128, 300, 512, 1024, 2048]), spec.max_position_embeddings or 2048)
    trained_tokens = longest - 1 if draw.random() < 0.5 else draw.randint(1, longest - 1)
    lora = way == "lora"
    training = Training(
        device=device, tuner="lora" if lora else "full", base_precision=base, compute_dtype=compute,
        rank=draw.choice([4, 8, 16, 64]) if lora else 0, lora_alpha=16.0 if lora else 0.0,
        target_modules=tuple(linear.name for linear in spec.linears) if lora else (),
        layers="sparse" if way == "sparse" else "all", trained_layers=trained, **ends,
        micro_batch_size=micro, batch_size=micro * draw.choice([1, 1, 4]), max_length=longest,
        max_trained=trained_tokens, checkpointing=draw.random() < 0.5, kept_layers=draw.choice([0, 0, 1, layers // 2]),
        loss_chunk_tokens=draw.choice([64, 256, 1024]),
        optimizer=draw.choice(["adamw", "adamw8bit", "paged_adamw8bit"]) if device == "cuda" else "adamw",
        learning_rate=1e-3, steps=4, warmup_steps=1, weight_decay=0.0, max_grad_norm=1.0, seed=0, checkpoint_steps=None,
        eval_rows=1,
    )  # fmt: skip
    return training, train_step.Workload(longest, trained_tokens)


def compare(number: int) -> dict[str, Any]:
    """One plan, by both engines."""
    draw = random.Random(f"closed form {number}")
    spec = read_model_spec(str(SHAPES[number % len(SHAPES)]))
    training, work = random_plan(spec, draw)
    terms = train_step.step_terms(spec, training, work)
    closed, found = sum(term.bytes for term in terms), simulate(spec, training, work)
    chosen = ("device", "tuner", "base_precision", "compute_dtype", "rank", "micro_batch_size", "batch_size",
              "checkpointing", "kept_layers", "loss_chunk_tokens")  # fmt: skip
    plan = {name: getattr(training, name) for name in chosen} | {
        "targets": len(training.target_modules), "layers": len(training.trained_layers), "longest": work.longest,
        "longest_trained": work.longest_trained,
    }  # fmt: skip
    height = next((term.name for term in terms if term.name.startswith("height")), "")
    return {
        "shape": SHAPES[number % len(SHAPES)].name, "plan": plan, "closed_bytes": closed,
        "simulated_bytes": found.live_peak_bytes, "error": round(closed / found.live_peak_bytes - 1, 5),
        "closed_moment": height.removeprefix("height: "), "simulated_moment": f"{found.phase} {found.moment}",
    }  # fmt: skip


def main() -> None:
    rows = []
    for number in range(int(sys.argv[1]) if len(sys.argv) > 1 else PLANS):
        rows.append(compare(number))
        print(f"{number:4} {100 * rows[-1]['error']:+6.2f}%", end="\r", file=sys.stderr, flush=True)
    errors = sorted(abs(row["error"]) for row in rows)
    summary = {
        "plans": len(rows), "mean_absolute_error": round(sum(errors) / len(errors), 5), "worst": errors[-1],
        "p90": errors[len(errors) * 9 // 10], "most_under": min(row["error"] for row in rows),
    }  # fmt: skip
    worst = sorted(rows, key=lambda row: -abs(row["error"]))[:10]
    for row in worst:
        print(f"{100 * row['error']:+6.2f}%  {row['shape']:15} closed: {row['closed_moment']:15} "
              f"simulated: {row['simulated_moment']:30} {row['plan']}")  # fmt: skip
    print(json.dumps(summary))
    record("closed_form", {"summary": summary, "worst": worst})


if __name__ == "__main__":
    main()
