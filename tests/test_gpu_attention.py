"""Which attention kernel runs on a CUDA device, and in which bytes, by head size, groups, windows, caps and dtype?"""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EXAMPLE
from torch.utils._python_dispatch import TorchDispatchMode

from edgeft.data.dataset import Sample
from edgeft.engine.loop import Run, make_run
from edgeft.memory import phases
from edgeft.memory.train_step import Workload
from edgeft.models.checkpoint import DTYPES
from edgeft.planning.plan import Plan, make_plan
from edgeft.settings.job import make_job
from edgeft.training.prepare import prepare, tf32

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
LENGTH = 256
LORA = {"tuner": "lora", "rank": 8, "layers": "all", "checkpointing": False}
BF16, FP16 = {**LORA, "base_precision": "bf16"}, {**LORA, "base_precision": "fp16", "profile": "t4"}
FP32 = {"tuner": "full", "layers": "all", "checkpointing": False}
# cuDNN's kernel, which PyTorch prefers on capability 9.0 in half precision, also under a mask, makes and keeps what the
# others do
FLASH, EFFICIENT, MASKED, NONE = {"flash", "cudnn"}, {"efficient"}, {"efficient", "cudnn"}, set[str]()
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[set[str]]]] = {
    "grouped queries, bf16": ("llama", {}, BF16, [FLASH]),
    "grouped queries, fp16 as a T4 has it": ("llama", {}, FP16, [FLASH | EFFICIENT]),
    "grouped queries, fp32": ("llama", {}, FP32, [EFFICIENT]),
    "as many keys as queries, bf16": ("llama", {"num_key_value_heads": 8}, BF16, [FLASH]),
    "heads of 256, bf16": ("llama", {"head_dim": 256, "num_attention_heads": 4}, BF16, [FLASH]),
    "heads of 256, fp32": ("llama", {"head_dim": 256, "num_attention_heads": 4}, FP32, [EFFICIENT]),
    "heads of 80, bf16": ("llama", {"head_dim": 80}, BF16, [FLASH]),
    "a window, bf16": ("mistral", {"sliding_window": 64}, BF16, [MASKED]),
    "a window, fp32": ("mistral", {"sliding_window": 64}, FP32, [EFFICIENT]),
    "a window in every other layer, bf16": (
        "gemma3_text", {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}, BF16,
        [FLASH, MASKED],
    ),
    "soft caps, bf16": ("gemma2", {}, BF16, []),
}  # fmt: skip


class Kernels(TorchDispatchMode):
    """Counts the fused attention kernels that are called; the math one shows as none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._opname
        if name.startswith("_scaled_dot_product_") and not name.endswith("_backward"):
            self.seen[name.removeprefix("_scaled_dot_product_").removesuffix("_attention")] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def run_of(tmp_path: Path) -> Any:
    """A run of a four-layer model of a family, on the card."""

    def make(kind: str, changes: dict[str, Any], settings: dict[str, Any]) -> tuple[Run, Plan]:
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = tmp_path / "model"
        values = {
            "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
            "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
            "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        }  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**values, **changes})).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(EXAMPLE / name, folder / name)
        plain = {
            "profile": "rtx4090-24gb",
            "micro_batch_size": 2,
            "batch_size": 4,
            "max_length": LENGTH,
            "max_steps": 4,
        }
        plan = make_plan(make_job(model=str(folder), **{**plain, **settings}))
        compute = DTYPES[plan.training.compute_dtype]
        gc.collect()
        torch.cuda.empty_cache()
        model, parts = prepare(plan, CUDA, compute, folder)
        return make_run(plan.training, CUDA, compute, model, parts, folder, tmp_path), plan

    return make


def samples(count: int = 4) -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 4000, (LENGTH,), generator=draw).tolist() for _ in range(count)]
    return [Sample(ids, ids, 0) for ids in rows]


@pytest.mark.parametrize("name", CASES)
def test_each_layer_attends_with_the_planned_kernel_in_the_planned_bytes(name: str, run_of: Any) -> None:
    kind, changes, settings, allowed = CASES[name]
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    before = torch.cuda.memory_allocated()
    run, plan = run_of(kind, changes, settings)
    with tf32(plan.training, CUDA):
        with Kernels() as kernels:
            run.train_step(samples())
        found = set(kernels.seen)
        torch.cuda.reset_peak_memory_stats()  # where a mode looks on, autograd adds gradients into tensors of their own
        run.train_step(samples())
        run.train_step(samples())
    print(f"{name}: {dict(kernels.seen)}, allocated {torch.cuda.max_memory_allocated() - before}")
    assert all(found & each for each in allowed) and found <= set().union(*allowed, NONE), kernels.seen
    assert sum(kernels.seen.values()) == (2 * 4 if allowed else 0)  # layers of two micro-batches
    capability = float(".".join(map(str, torch.cuda.get_device_capability())))
    training = plan.training
    planned = phases.phases(
        plan.spec, training, Workload(training.max_length, training.max_trained), baseline_bytes=0,
        capability=capability,
    )  # fmt: skip
    step = next(phase for phase in planned if phase.name == "train")
    alive = sum(term.bytes for term in step.terms if term.name != "reserved")
    measured = torch.cuda.max_memory_allocated() - before
    assert measured == pytest.approx(alive, rel=0.02, abs=8 * 2**20)
