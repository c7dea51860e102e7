"""Simulated steps against real ones: the same live tensor bytes, to the byte, and the same from shallow models."""

from __future__ import annotations

import gc
import itertools
import tempfile
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIGS, FULL, HALF, NF4, plan_of, save_model
from transformers import AutoModelForCausalLM

from edgeft.data.batches import make_batch
from edgeft.data.dataset import IGNORED, Sample
from edgeft.engine import nf4_base
from edgeft.engine.loop import Run, make_run
from edgeft.engine.nf4_base import load_base
from edgeft.errors import BadInput
from edgeft.machines import meter
from edgeft.memory import train_step
from edgeft.memory.simulated import Simulation
from edgeft.memory.train_step import Workload
from edgeft.models.checkpoint import DTYPES
from edgeft.models.parts import find_parts, repeat_groups
from edgeft.models.spec import ModelSpec, read_model_spec
from edgeft.settings.job import Training
from edgeft.simulation.fake import quantisation_states
from edgeft.simulation.simulate import simulate
from edgeft.targets.target import load_target

CPU = torch.device("cpu")


def prepared(spec: ModelSpec, training: Training, work: Workload) -> tuple[Run, list[Sample]]:
    """A real model whose first optimizer step is done, and the samples of the next, each as long as `work` allows."""
    compute = DTYPES[training.compute_dtype]
    model = load_base(Path(spec.model), training, CPU, compute)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parts = find_parts(model)
    with tempfile.TemporaryDirectory() as work_folder:
        run = make_run(training, CPU, compute, model, parts, Path(spec.model), Path(work_folder))
    labels = [IGNORED] * (work.longest - work.longest_trained) + [5] * work.longest_trained
    ids = torch.randint(0, spec.vocab_size, (work.longest,), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [Sample(ids, labels, 1)] * training.batch_size
    run.train_step(samples)
    gc.collect()
    return run, samples


def real_step(spec: ModelSpec, training: Training, work: Workload) -> tuple[int, int]:
    """(live bytes before, peak) of the second optimizer step of a real model."""
    run, samples = prepared(spec, training, work)
    live = meter.LiveBytes()
    live.count([list(run.model.parameters()), list(run.model.buffers()), quantisation_states(run.model)])
    live.count(list(run.optimizer.state.values()))
    before = live.live_bytes
    with live:
        run.train_step(samples)
    return before, live.peak_bytes


def allocated(spec: ModelSpec, training: Training, work: Workload) -> int:
    """What PyTorch's allocator gave out at most beyond what was there before, in the same step, unwatched."""
    run, samples = prepared(spec, training, work)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.train_step(samples)
    events = list(profiler.profiler.kineto_results.experimental_event_tree())
    for event in events:
        events += event.children
    changes = [event for event in events if event.tag == torch._C._profiler._EventType.Allocation]
    changes.sort(key=lambda event: event.start_time_ns)
    return max(itertools.accumulate(event.extra_fields.alloc_size for event in changes))


def batch_bytes(spec: ModelSpec, training: Training, work: Workload) -> int:
    """Bytes of a micro-batch's tensors, whose memory is numpy's: the allocator's events know nothing of them."""
    batch = make_batch(prepared(spec, training, work)[1][: training.micro_batch_size])
    return sum(tensor.nbytes for tensor in (batch.ids, batch.positions, batch.targets))


def check(spec: ModelSpec, training: Training, work: Workload) -> None:
    found = simulate(spec, training, work)
    before, peak = real_step(spec, training, work)
    assert found.weights_bytes + found.adapter_bytes + found.optimizer_bytes == before
    assert found.live_peak_bytes == peak
    if training.tuner == "lora":
        assert found.adapter_bytes == 4 * train_step.trained_parameters(spec, training)


ALL, TOP = range(2), range(1, 2)
ROUNDED = {"quantize_aware": load_target("ort-int4").rounding, "stored_dtype": "float32"}
WAYS: dict[str, tuple[range, int, dict[str, Any]]] = {
    # what trains, trained tokens of 48, the rest of the plan
    "LoRA": (ALL, 47, {}),
    "LoRA, few trained tokens": (ALL, 5, {}),
    "LoRA, top layer": (TOP, 47, {}),
    "LoRA, two micro-batches": (ALL, 47, {"batch_size": 4}),
    "LoRA, five micro-batches, the last smaller": (ALL, 47, {"batch_size": 9}),
    "LoRA, recomputed": (ALL, 47, {"checkpointing": True}),
    "LoRA, recomputed but for the top layer": (ALL, 47, {"checkpointing": True, "kept_layers": 1, "batch_size": 4}),
    "LoRA, top layer, recomputed": (TOP, 47, {"checkpointing": True}),
    "LoRA, attention only": (ALL, 47, {"target_modules": ("q_proj", "v_proj")}),
    "LoRA, bf16": (ALL, 47, HALF),
    "LoRA, bf16, recomputed": (ALL, 47, {**HALF, "checkpointing": True, "batch_size": 4}),
    "DoRA, two micro-batches": (ALL, 47, {"tuner": "dora", "batch_size": 4}),
    "DoRA, recomputed": (ALL, 47, {"tuner": "dora", "checkpointing": True}),
    "DoRA, bf16": (ALL, 47, {"tuner": "dora", **HALF}),
    "DoRA, NF4": (TOP, 47, {"tuner": "dora", **NF4}),
    "PiSSA, two micro-batches": (ALL, 47, {"init": "pissa", "batch_size": 4}),
    "PiSSA, NF4, bf16": (TOP, 47, {"init": "pissa", **NF4, "compute_dtype": "bf16"}),
    "IA3, two micro-batches": (ALL, 47, {"tuner": "ia3", "batch_size": 4}),
    "IA3, NF4, bf16, recomputed": (TOP, 47, {"tuner": "ia3", **NF4, "compute_dtype": "bf16", "checkpointing": True}),
    "AdaLoRA, two micro-batches": (ALL, 47, {"tuner": "adalora", "batch_size": 4}),
    "AdaLoRA, NF4, bf16, recomputed": (
        TOP,
        47,
        {"tuner": "adalora", **NF4, "compute_dtype": "bf16", "checkpointing": True},
    ),
    "Hadamard, two micro-batches": (ALL, 47, {"tuner": "h-adapter", "batch_size": 4}),
    "Hadamard, NF4, bf16, recomputed": (
        TOP,
        47,
        {"tuner": "h-adapter", **NF4, "compute_dtype": "bf16", "checkpointing": True},
    ),
    "adapters, two micro-batches": (ALL, 47, {"tuner": "adapter", "batch_size": 4}),
    "adapters beside the MLP, NF4, bf16, recomputed": (
        TOP,
        47,
        {
            "tuner": "adapter",
            "adapter_at": "parallel",
            **NF4,
            "compute_dtype": "bf16",
            "checkpointing": True,
        },
    ),
    "prefix, two micro-batches": (ALL, 47, {"tuner": "prefix", "batch_size": 4}),
    "prefix, NF4, bf16, recomputed": (
        TOP,
        47,
        {"tuner": "prefix", **NF4, "compute_dtype": "bf16", "checkpointing": True},
    ),
    "prompt": (ALL, 47, {"tuner": "prompt"}),
    "prompt, two micro-batches": (ALL, 47, {"tuner": "prompt", "batch_size": 4}),
    "prompt, recomputed": (ALL, 47, {"tuner": "prompt", "checkpointing": True, "batch_size": 4}),
    "prompt, bf16": (ALL, 47, {"tuner": "prompt", **HALF}),
    "prompt, NF4, bf16, recomputed": (
        ALL,
        47,
        {"tuner": "prompt", **NF4, "compute_dtype": "bf16", "checkpointing": True},
    ),
    "full": (ALL, 47, FULL),
    "full, two micro-batches": (ALL, 47, {**FULL, "batch_size": 4}),
    "full, recomputed": (ALL, 5, {**FULL, "checkpointing": True}),
    "full, top layer": (TOP, 47, {"tuner": "full"}),
    "full, bf16": (ALL, 47, {**FULL, **HALF}),
    "NF4": (ALL, 47, NF4),
    "NF4, recomputed": (ALL, 47, {**NF4, "checkpointing": True, "batch_size": 4}),
    "NF4, top layer": (TOP, 5, NF4),
    "sparse, embedding on": (TOP, 47, {"tuner": "full", "layers": "sparse", "embedding": "on"}),
    "sparse, head and norm on": (TOP, 47, {"tuner": "full", "layers": "sparse", "head": "on", "norm": "on"}),
    "sparse on NF4": (TOP, 47, {"tuner": "full", "layers": "sparse", **NF4}),
    "sparse on NF4, the lower layer, recomputed": (
        range(1),
        47,
        {"tuner": "full", "layers": "sparse", **NF4, "checkpointing": True, "batch_size": 4},
    ),
    "sparse on bf16": (TOP, 47, {"tuner": "full", "layers": "sparse", **HALF}),
    "NF4, bf16": (ALL, 47, {**NF4, "compute_dtype": "bf16"}),
    "LoRA, rounded": (ALL, 47, {**ROUNDED, "batch_size": 4}),
    "LoRA, rounded, recomputed": (ALL, 47, {**ROUNDED, "checkpointing": True, "batch_size": 4}),
    "LoRA, rounded, bf16": (ALL, 47, {**ROUNDED, **HALF}),
    "full, rounded": (ALL, 47, {**FULL, **ROUNDED, "batch_size": 4}),
    "sparse, rounded": (TOP, 47, {"tuner": "full", "layers": "sparse", **ROUNDED}),
}
# Each of these differs in one thing from a way of the others, which shows it too.
LONG = {
    "LoRA, top layer", "LoRA, two micro-batches", "LoRA, recomputed", "LoRA, bf16", "full", "full, top layer", "NF4",
    "sparse on NF4",
}  # fmt: skip


def some_slow(names: Iterable[Any], slow: Container[Any]) -> list[Any]:
    """The cases of a test, those in `slow` run by make test-slow alone."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else [], id=str(name)) for name in names]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("way", some_slow(WAYS, LONG))
def test_simulated_equals_real(way: str, llama: ModelSpec, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, trained, changes = WAYS[way]
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    training = plan_of(llama, layers, **changes)
    quantised = nf4_base.quantised_folder(Path(llama.model))
    if training.base_precision == "nf4" and not quantised.exists():
        quantised.parent.mkdir(parents=True)
        nf4_base.quantise(Path(llama.model), quantised)
    check(llama, training, Workload(48, trained))


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_lisa_is_never_above_its_worst_set(
    precision: str, llama: ModelSpec, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every set of layers, in the real step: the simulated peak is the highest of them, to the byte."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    way = {"tuner": "full", "active_layers": 1, "lisa_interval": 2, "base_precision": precision}
    work = Workload(48, 47)
    found = simulate(llama, plan_of(llama, ALL, layers="lisa", **way), work)
    real = [real_step(llama, plan_of(llama, range(i, i + 1), layers="sparse", **way), work)[1] for i in ALL]
    assert found.live_peak_bytes == max(real) > min(real)


FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {}, "qwen2": {}, "qwen3": {}, "granite": {}, "smollm3": {"no_rope_layer_interval": 2}, "gemma": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {}, "gpt2": {"n_inner": 192}, "gpt_neox": {}, "opt": {"ffn_dim": 192, "word_embed_proj_dim": 64},
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_equal_real(kind: str, tmp_path: Path) -> None:
    spec = save_model(tmp_path, kind, **FAMILIES[kind])
    check(spec, plan_of(spec, ALL), Workload(48, 47))
    if kind not in ("mistral", "qwen2", "qwen3", "granite", "gemma"):  # these are a Llama to the bytes
        check(spec, plan_of(spec, TOP, tuner="full", checkpointing=True, **HALF), Workload(48, 47))


def test_tied_head_equals_real(tmp_path: Path) -> None:
    spec = save_model(tmp_path, tie_word_embeddings=True, vocab_size=8192)
    check(spec, plan_of(spec, ALL), Workload(48, 47))
    check(spec, plan_of(spec, ALL, **FULL), Workload(48, 47))
    check(spec, plan_of(spec, ALL, **FULL, batch_size=4), Workload(48, 47))


COUNTED = ("LoRA", "LoRA, recomputed", "full, two micro-batches", "sparse, embedding on", "NF4")
UNTIED = [(way, False) for way in COUNTED[1:]]


@pytest.mark.parametrize("case", some_slow([*((way, True) for way in COUNTED), ("LoRA", False), *UNTIED], UNTIED))
def test_counting_changes_nothing(case: tuple[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd adds two gradients otherwise while a mode looks on: a tied table of this size would be there again."""
    way, tied = case
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = save_model(tmp_path / "model", tie_word_embeddings=tied, vocab_size=8192)
    layers, trained, changes = WAYS[way]
    training, work = plan_of(spec, layers, **changes), Workload(48, trained)
    before, peak = real_step(spec, training, work)
    found = allocated(spec, training, work) - (peak - before)
    assert -batch_bytes(spec, training, work) <= found <= 512  # numbers that operations make for themselves


STACKS: dict[str, tuple[str, int, int, dict[str, Any], int]] = {
    # family, layers, layers that train, plan, layers run
    "LoRA, recomputed, two micro-batches": ("llama", 8, 8, {"checkpointing": True, "batch_size": 4}, 7),
    "LoRA, recomputed in the lower half": ("llama", 21, 21, {"checkpointing": True, "kept_layers": 7}, 20),
    "LoRA, bf16": ("llama", 8, 8, HALF, 7),
    "LoRA, top layers of NF4": ("llama", 21, 6, NF4, 20),
    "LoRA, two top layers": ("llama", 14, 2, {}, 11),
    "full, short samples": ("llama", 12, 12, {**FULL, "micro_batch_size": 1, "loss_chunk_tokens": 16}, 7),
    "layers in pairs": ("smollm3", 16, 16, {"target_modules": ("q_proj",)}, 14),
    "too few pairs": ("smollm3", 6, 6, {"target_modules": ("q_proj",)}, 6),
}


@pytest.mark.parametrize(
    "name", some_slow(STACKS, ("LoRA, recomputed in the lower half", "LoRA, bf16", "LoRA, top layers of NF4"))
)
def test_shallow_models_tell_the_deep_one(name: str, tmp_path: Path) -> None:
    kind, layers, top, changes, run = STACKS[name]
    more = {"no_rope_layer_interval": 2} if kind == "smollm3" else {}
    spec = save_model(tmp_path, kind, num_hidden_layers=layers, **more)
    training = plan_of(spec, range(layers - top, layers), **changes)
    deep, shallow = (simulate(spec, training, Workload(48, 20), full_depth=full) for full in (True, False))
    assert (deep.extrapolated, deep.layers_simulated) == (False, layers)
    assert (shallow.extrapolated, shallow.layers_simulated) == (run < layers, run)
    same = {"seconds": 0.0, "extrapolated": True, "layers_simulated": 0}
    assert shallow.model_copy(update=same) == deep.model_copy(update=same)


def test_an_8b_model_needs_no_memory_and_few_layers() -> None:
    spec = read_model_spec(str(CONFIGS / "llama-3.1-8b"))
    training = plan_of(spec, range(32), rank=16, micro_batch_size=1, loss_chunk_tokens=256, **NF4)
    before = meter.rss_bytes()
    found = simulate(spec, training, Workload(2048, 2047))
    assert meter.rss_bytes() - before < 2**28
    assert found.extrapolated and found.layers_simulated == 7
    assert found.weights_bytes == pytest.approx(train_step.weight_bytes(spec, training), rel=1e-6)
    assert found.optimizer_bytes - 4 * 32 * 7 * 2 == 2 * found.adapter_bytes  # and a step count for each tensor
    assert found.live_peak_bytes == max(moment.live_bytes for moment in found.timeline)
    assert [moment.phase for moment in found.phase_peaks] == ["forward", "backward", "optimizer"]
    assert len(found.timeline) <= 200 and len(found.largest) == 10
    assert sum(group.bytes * group.count for group in found.largest) > 0.8 * found.live_peak_bytes
    assert Simulation.model_validate_json(found.model_dump_json()) == found


def test_cuda_counts_in_blocks_and_takes_its_own_kernels(llama: ModelSpec) -> None:
    work = Workload(64, 63)
    for compute in ("bf16", "fp16"):
        way = {"base_precision": compute, "compute_dtype": compute}
        cpu, cuda = (simulate(llama, plan_of(llama, ALL, device=device, **way), work) for device in ("cpu", "cuda"))
        assert cuda.live_peak_bytes % 512 == 0 and cuda.weights_bytes >= cpu.weights_bytes
        names = {group.operation for group in cuda.largest}
        assert any("efficient" in name for name in names) == (compute == "fp16")


def test_a_layer_norm_in_fp32_does_not_make_the_head_fp32(tmp_path: Path) -> None:
    """CUDA's autocast leaves the final LayerNorm's result in fp32; the loss must not copy the whole head for it."""
    spec = save_model(tmp_path, "gpt2", vocab_size=4096, n_inner=192)
    found = simulate(spec, plan_of(spec, ALL, device="cuda", loss_chunk_tokens=16, **HALF), Workload(48, 47))
    assert not [group for group in found.largest if 4096 in group.shape and 64 in group.shape and group.bytes > 2**19]
    assert found.live_peak_bytes < 2 * found.weights_bytes + 2**20


def test_capped_scores_stay_capped_where_groups_are_repeated(tmp_path: Path) -> None:
    """Gemma-2 computes its scores itself; torch's own attention knows no cap."""
    spec = save_model(tmp_path / "gemma2", "gemma2", sliding_window=16, query_pre_attn_scalar=16)
    model = AutoModelForCausalLM.from_pretrained(spec.model)
    repeat_groups(model)
    assert model.config._attn_implementation == "eager"
    other = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "llama").model)
    repeat_groups(other)
    assert other.config._attn_implementation == "edgeft_repeat"


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit"])
def test_eight_bit_states_are_counted_where_they_live(optimizer: str, tmp_path: Path) -> None:
    spec = save_model(tmp_path, vocab_size=2048)
    training = plan_of(spec, ALL, **FULL, device="cuda", optimizer=optimizer)
    found = simulate(spec, training, Workload(48, 47))
    # two vocabularies of 131,072 elements are paged, everything else is not; two code books are shared
    expected = 2 * 1024
    for _, parameter in AutoModelForCausalLM.from_pretrained(spec.model).named_parameters():
        size, blocks = parameter.numel(), -(-parameter.numel() // 256)
        state = size if size >= 4096 else 4 * size
        state = 0 if size == 131_072 and optimizer.startswith("paged") else -(-state // 512) * 512
        expected += 2 * (state + (-(-4 * blocks // 512) * 512 if size >= 4096 else 0))
    assert found.optimizer_bytes == expected


def test_hidden_bytes_are_those_of_the_operation_itself() -> None:
    """The kernel of gemm_4bit, called as the Python function it is, shows what it holds beside its result."""
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl
    from bitsandbytes.functional import quantize_4bit

    matrix, inputs = torch.randn(192, 64), torch.randn(5, 64)
    packed, state = quantize_4bit(matrix, quant_type="nf4", compress_statistics=True)
    arguments = (inputs, packed, state.shape, state.state2.absmax, 64, "nf4", None, state.absmax, state.state2.code,
                 state.offset)  # fmt: skip
    inside, outside = meter.LiveBytes(), meter.LiveBytes()
    with inside:
        _gemm_4bit_default_impl(*arguments)
    with outside:
        torch.ops.bitsandbytes.gemm_4bit.default(*arguments)
    assert outside.peak_bytes == inside.peak_bytes > 192 * 64 * 4


EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 128},
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4},  # stacked in its files too
}


EXPERT_WAYS: dict[str, dict[str, Any]] = {
    "fp32": {}, "recomputed": {"checkpointing": True, "batch_size": 4}, "nf4": NF4, "bf16": HALF,
}  # fmt: skip
EVERY = [(kind, way) for kind in EXPERTS for way in EXPERT_WAYS]


@pytest.mark.parametrize("case", some_slow(EVERY, [(k, w) for k, w in EVERY if k != "mixtral" and w != "fp32"]))
def test_experts_take_what_a_real_step_does(case: tuple[str, str], tmp_path: Path) -> None:
    """Every kind in fp32 and one kind in every way; the rest of the product by make test-slow."""
    kind, way = case
    spec = save_model(tmp_path, kind, num_experts_per_tok=2, **EXPERTS[kind])
    modules = tuple(linear.name for linear in spec.linears if linear.role != "other")
    check(spec, plan_of(spec, ALL, target_modules=modules, **EXPERT_WAYS[way]), Workload(48, 47))


def test_experts_on_a_gpu_without_grouped_products_keep_more(tmp_path: Path) -> None:
    spec = save_model(tmp_path, "mixtral", num_experts_per_tok=2, **EXPERTS["mixtral"])
    attention = {"target_modules": ("q_proj", "v_proj"), "device": "cuda"}
    half = plan_of(spec, ALL, base_precision="fp16", compute_dtype="fp16", **attention)
    peaks = [
        simulate(spec, one, Workload(48, 47)).live_peak_bytes for one in (half, plan_of(spec, ALL, **attention, **HALF))
    ]
    assert peaks[0] > peaks[1]


def test_what_chooses_experts_carries_no_adapter(tmp_path: Path) -> None:
    spec = save_model(tmp_path, "qwen2_moe", num_experts_per_tok=2, **EXPERTS["qwen2_moe"])
    assert [linear.name for linear in spec.linears if linear.role == "other"] == ["shared_expert_gate"]


def test_a_model_that_branches_on_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    monkeypatch.setattr(MixtralExperts, "forward", lambda self, hidden, *rest: hidden + hidden[hidden > 0].sum())
    spec = save_model(tmp_path, "mixtral", num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(BadInput, match="cannot be simulated"):
        simulate(spec, plan_of(spec, ALL), Workload(48, 47))
