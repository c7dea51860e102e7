"""Where the repository's folders are, and the tiny rows, models, plans and runs that tests of many packages share."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeft.models.spec import ModelSpec
    from edgeft.settings.job import Training
    from edgeft.training.job_data import Data
    from edgeft.training.result import TrainResult

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
EXAMPLES = ROOT / "examples"
CONFIGS = EXAMPLES / "configs"
EXAMPLE = EXAMPLES / "debian-tiny"
SECTIONS = EXAMPLES / "debian-sections"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"prompt": f"Package: lib{i}\nSection:", "completion": f" {('libs', 'doc', 'python')[i % 3]}"} for i in range(36)
]
HALF = {"base_precision": "bf16", "compute_dtype": "bf16"}
FULL = {"tuner": "full", "embedding": "on", "norm": "on", "head": "on"}
NF4 = {"base_precision": "nf4"}

WriteRows = Callable[[str, Iterable[Any]], Path]


def write_plan(folder: Path, model: Path, **settings: Any) -> Path:
    """The plan, in `folder`, of a job on ROWS."""
    from edgeft.planning.plan import make_plan
    from edgeft.settings.job import make_job

    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {"profile": "cpu-8gb", "batch_size": 4, "epochs": 1.0, "rank": 4, "eval_rows": 4, **settings}
    make_plan(make_job(**{"model": str(model), "data": str(data), **values})).write(folder / "plan.json")
    return folder / "plan.json"


def run(path: Path, out: Path, **options: Any) -> TrainResult:
    """Carry the plan in `path` out, in this process."""
    from edgeft.documents import sha256_file
    from edgeft.planning.plan import Plan
    from edgeft.progress import silent
    from edgeft.training.train import train

    return train(
        Plan.read(path), out, plan_sha256=sha256_file(path), progress=options.pop("progress", silent), **options
    )


def killed_at(step: int) -> Callable[..., None]:
    """Progress that ends a run behind a step with nothing saved since its last checkpoint, as a kill does."""

    def stop(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        if stage == "train" and done == step:
            raise KeyboardInterrupt

    return stop


def asked_to_stop_at(step: int) -> Callable[..., None]:
    """Progress that asks a run to stop behind a step, as Ctrl-C does."""

    def stop(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        if stage == "train" and done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return stop


def job_data(merged: Path) -> Data:
    """The samples of the run that the merge beside it was made from."""
    from edgeft.training.job_data import Data
    from edgeft.training.result import TrainResult

    return Data.read(TrainResult.read(merged.parent / "train" / "train.json").plan)


def plan_of(spec: ModelSpec, trained: range, **changes: Any) -> Training:
    """How a run trains, without a planner: LoRA in fp32 of the layers `trained`, and what is changed of that."""
    from edgeft.planning.projections import target_modules
    from edgeft.settings.job import Training
    from edgeft.settings.tuners import TUNERS

    values: dict[str, Any] = {
        "device": "cpu", "tuner": "lora", "base_precision": "fp32", "compute_dtype": "fp32", "rank": 4,
        "lora_alpha": 16.0, "target_modules": tuple(linear.name for linear in spec.linears),
        "trained_layers": tuple(trained), "micro_batch_size": 2, "batch_size": 2,
        "max_length": 48, "max_trained": 48, "checkpointing": False, "loss_chunk_tokens": 32, "optimizer": "adamw",
        "learning_rate": 1e-3, "steps": 4, "warmup_steps": 1, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 0,
        "checkpoint_steps": None, "eval_rows": 1,
    }  # fmt: skip
    values |= changes
    if values["tuner"] == "full":
        values |= {"rank": 0, "target_modules": ()}
    if values["tuner"] == "ia3":
        values |= {"rank": 0, "target_modules": target_modules(spec, "ia3")}
    if values["tuner"] == "adalora":
        values |= {"target_rank": 2}
    if values["tuner"] == "h-adapter":
        values |= {"rank": 0, "target_modules": target_modules(spec, "h-adapter")}
    if values["tuner"] == "adapter":
        form = TUNERS["adapter"].forms[values.get("adapter_at", "both")]
        values |= {"target_modules": target_modules(spec, "adapter", form)}
    if values["tuner"] == "prefix":
        rest = tuple(n for n in range(spec.num_hidden_layers) if n not in trained)
        values |= {"rank": 0, "target_modules": (), "prefix_tokens": 3, "resting_layers": rest}
    if values["tuner"] == "prompt":
        values |= {"rank": 0, "target_modules": (), "prefix_tokens": 3}
    return Training(**values)


def save_model(folder: Path, kind: str = "llama", **changes: Any) -> ModelSpec:
    """A tiny random checkpoint of a family, as save_pretrained writes it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgeft.models.spec import read_model_spec

    values = {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 256,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **{**values, **changes})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return read_model_spec(str(folder))


def smaps_bytes(under: Path) -> int:
    """Bytes of mapped files at or below a path that are this process's memory now, those that have no name left too."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split(" ", 1)[0].count("-") == 1:
            here = str(under) in line
        elif here and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def qwen3_folder(folder: Path, tokenizer_folder: Path, layers: int) -> Path:
    """A small Qwen3 with a tied head, stored in bf16 as most are shipped."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(1)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def give_unpacked_weights(quantised: Any, dense: Any) -> None:
    """A dense model the very weights that a 4-bit one computes with."""
    import bitsandbytes.functional as bnb

    for name, module in quantised.named_modules():
        if type(module).__name__ == "Linear4bit":
            exact = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.get_submodule(name).weight.data = exact.float()


def second_step_peak(run: Any, samples: list[Any]) -> int:
    """Peak live bytes of a run's second optimizer step, weights and optimizer states included."""
    import gc

    from edgeft.machines.meter import LiveBytes
    from edgeft.simulation.fake import quantisation_states

    run.train_step(samples)
    gc.collect()
    live = LiveBytes()
    live.count([list(run.model.parameters()), list(run.model.buffers()), list(run.optimizer.state.values())])
    live.count(quantisation_states(run.model))
    with live:
        run.train_step(samples)
    return live.peak_bytes
