"""What only a CUDA device shows: scaled gradients, 8-bit and paged states, 4-bit kernels, attention, copies, caps."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EXAMPLE, give_unpacked_weights
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgeft.data.dataset import Sample
from edgeft.documents import sha256_file
from edgeft.engine import copies, streaming
from edgeft.engine.copies import Copies, Stream
from edgeft.engine.loop import Run, make_run
from edgeft.engine.nf4_base import load_base
from edgeft.engine.trainable import apply_tuner
from edgeft.errors import DoesNotFit, EdgeftError
from edgeft.memory.streamed import ALIGNED, layer_file_bytes
from edgeft.merging.merge import merge
from edgeft.models.checkpoint import DTYPES, load_plain
from edgeft.models.evaluate import token_losses
from edgeft.models.parts import find_parts
from edgeft.planning.plan import MEMORY_ALONE, Plan, make_plan
from edgeft.progress import silent
from edgeft.settings.job import Training, make_job
from edgeft.training.out_of_memory import capped
from edgeft.training.result import TrainResult
from edgeft.training.step_down import step_down
from edgeft.training.train import prepare, tf32, train
from edgeft.training.work import work_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
ROWS = [
    {"prompt": f"Package: lib{i}\nSection:", "completion": f" {('libs', 'doc', 'python')[i % 3]}"} for i in range(36)
]
LISA = {"tuner": "full", "layers": "lisa", "active_layers": 1, "lisa_interval": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers with grouped queries, matrices large enough for paged states, the example's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(EXAMPLE / name, out / name)
    return out


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own for quantised bases, and nothing left on the card by the test before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def planned(folder: Path, tmp_path: Path) -> Any:
    """Writes the plan of a job on ROWS and gives its path."""

    def write(rows: list[dict[str, str]] = ROWS, **settings: Any) -> Path:
        data, path = tmp_path / "rows.jsonl", tmp_path / "plan.json"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "model": str(folder), "data": str(data), "profile": "rtx4090-24gb", "batch_size": 4, "max_steps": 8,
            "epochs": 3.0, "eval_rows": 4, "learning_rate": 1e-3, **settings,
        }  # fmt: skip
        make_plan(make_job(**values)).write(path)
        return path

    return write


def run(path: Path, out: Path, progress: Any = silent) -> TrainResult:
    return train(Plan.read(path), out, plan_sha256=sha256_file(path), progress=progress)


def started(plan: Plan, work: Path) -> Run:
    compute = DTYPES[plan.training.compute_dtype]
    base = Path(plan.job.model)
    model, parts = prepare(plan, CUDA, compute, base)
    work.mkdir(exist_ok=True)
    return make_run(plan.training, CUDA, compute, model, parts, base, work)


def samples(seed: int, count: int = 4, length: int = 48) -> list[Sample]:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, 4000, (length,), generator=draw).tolist() for _ in range(count)]
    return [Sample(ids, ids, 1) for ids in rows]


def test_fp16_overflow_is_skipped_counted_and_recovered_from(planned: Any, tmp_path: Path) -> None:
    plan = Plan.read(planned(profile="t4", tuner="lora", rank=8, base_precision="fp16", layers="all"))
    made = started(plan, tmp_path / "work")
    first = made.scaler.get_scale()

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        return gradient if made.scaler.get_scale() <= first / 8 else torch.full_like(gradient, float("inf"))

    made.chosen[0][1].register_hook(overflow)
    losses = [made.train_step(samples(step)) for step in range(4)]
    assert made.skipped_steps == 3 and made.step == 4 and made.micro_batches >= 4
    assert made.scaler.get_scale() <= first / 8 and all(loss > 0 for loss in losses)
    assert all(float(p.detach().abs().sum()) > 0 for name, p in made.chosen if "lora_B" in name)


def test_fp16_that_never_recovers_is_an_error(planned: Any, tmp_path: Path) -> None:
    plan = Plan.read(planned(profile="t4", tuner="lora", rank=8, base_precision="fp16", layers="all"))
    made = started(plan, tmp_path / "work")
    made.chosen[0][1].register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    with pytest.raises(EdgeftError, match="gradients are not finite at step 1 of 8, 20 times in a row"):
        made.train_step(samples(0))
    assert (made.step, made.tokens) == (0, 0)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged_adamw8bit"])
def test_optimizers_train_and_go_on_as_they_were(optimizer: str, planned: Any, tmp_path: Path) -> None:
    plan = Plan.read(planned(tuner="full", layers="all", optimizer=optimizer, micro_batch_size=4))
    made, work = started(plan, tmp_path / "work"), tmp_path / "work"
    before = [made.train_step(samples(0)) for _ in range(4)]
    assert before[-1] < before[0]
    made.save(work, {})
    after = [made.train_step(samples(0)) for _ in range(3)]
    again = started(plan, work)
    assert again.step == 4
    assert [again.train_step(samples(0)) for _ in range(3)] == pytest.approx(after, rel=1e-4)
    states = [value for state in again.optimizer.state.values() for value in state.values()]
    paged = [value for value in states if getattr(value, "is_paged", False)]
    assert bool(paged) == (optimizer == "paged_adamw8bit")
    large = [s["state1"] for p, s in again.optimizer.state.items() if "state1" in s and p.numel() >= 100_000]
    assert not paged or all(getattr(value, "is_paged", False) for value in large)


@pytest.mark.parametrize("compute, rtol", [("fp32", 1e-3), ("bf16", 5e-2)])
def test_nf4_gradients_are_those_of_the_dequantised_weights(
    compute: str, rtol: float, folder: Path, planned: Any
) -> None:
    training: Training = Plan.read(planned(tuner="lora", rank=8, base_precision="nf4", layers="all")).training
    training = training.model_copy(update={"compute_dtype": compute})
    dtype = DTYPES[compute]
    quantised, dense = load_base(folder, training, CUDA, dtype), load_plain(folder).to(CUDA)
    give_unpacked_weights(quantised, dense)
    gradients = []
    for model in (quantised, dense):
        parts = find_parts(model)
        chosen = apply_tuner(model, parts, training)
        with torch.no_grad():
            for i, (_, parameter) in enumerate(chosen):
                values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) / 50
                parameter.copy_(values)
        for _, parameter in chosen:
            parameter.data = parameter.data.to(CUDA)
        token_losses(model, parts, samples(0, 1), CUDA, dtype, 16).backward()
        gradients.append({name: p.grad for name, p in chosen})
    for name, gradient in gradients[1].items():
        found = gradients[0][name]
        assert gradient is not None and found is not None
        assert float(torch.dist(found.float(), gradient) / gradient.norm()) < rtol, name


@pytest.mark.parametrize(
    "settings",
    [
        {"tuner": "full", "layers": "all"},
        {"tuner": "lora", "rank": 8, "base_precision": "bf16", "layers": "all"},
        {"tuner": "lora", "rank": 8, "base_precision": "fp16", "layers": "all", "profile": "t4"},
        {"tuner": "lora", "rank": 8, "base_precision": "nf4", "layers": "all"},
    ],
)
def test_no_plan_attends_with_the_math_kernel(settings: dict[str, Any], planned: Any, tmp_path: Path) -> None:
    """Its scores of S x S are in no plan: with only the two kernels that make none, every step runs."""
    made = started(Plan.read(planned(**settings)), tmp_path / "work")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        made.train_step(samples(0))


def test_grouped_queries_in_fp32_have_no_other_kernel(folder: Path) -> None:
    """The fault that repeating heads avoids is still there in PyTorch: without it nothing but the math kernel does."""
    model = load_plain(folder).to(CUDA)
    ids = torch.arange(5, 40, device=CUDA)[None]
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]), pytest.raises(RuntimeError):
        model(input_ids=ids)


@pytest.mark.parametrize(
    "settings",
    [
        LISA,
        {**LISA, "lisa_state": "park"},
        {**LISA, "lisa_state": "park", "optimizer": "adamw8bit"},
        {**LISA, "base_precision": "fp32", "embedding": "rotate", "norm": "on"},
        {**LISA, "base_precision": "nf4", "lisa_state": "park", "active_layers": 2},
        {**LISA, "base_precision": "bf16"},
    ],
)
def test_layers_in_turn_stopped_and_gone_on_with(settings: dict[str, Any], planned: Any, tmp_path: Path) -> None:
    path = planned(**settings, max_steps=12)
    whole = run(path, tmp_path / "whole")
    assert whole.valid.loss < whole.base_valid.loss

    def interrupt(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        if stage == "train" and done == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "stopped", interrupt)
    resumed = run(path, tmp_path / "stopped")
    assert resumed.resumed_at and resumed.phase_peak_bytes["resume"] > 0
    assert [loss for _, loss in resumed.loss_curve] == pytest.approx([loss for _, loss in whole.loss_curve], rel=5e-3)
    assert resumed.units and {u.unit for u in resumed.units if u.steps} == {u.unit for u in whole.units if u.steps}
    made = merge(tmp_path / "stopped", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    assert made.changed_tensors > 0


class SlowCopies(Stream):
    """What computes is long there when a layer comes: who does not wait for it reads what is no matrix yet."""

    def send(self, into: torch.Tensor, piece: torch.Tensor) -> None:
        with torch.cuda.stream(self.stream):
            into.fill_(255)
            torch.cuda._sleep(2_000_000)
        super().send(into, piece)


class SlowComputing(Stream):
    """What was given to compute still runs when its layer is left and the next but one comes."""

    def wait(self, mark: torch.cuda.Event, memory: torch.Tensor) -> None:
        torch.cuda._sleep(20_000_000)
        super().wait(mark, memory)


class NoWait(SlowCopies):
    """A fault, planted: what computes does not wait."""

    def wait(self, mark: torch.cuda.Event, memory: torch.Tensor) -> None:
        memory.record_stream(torch.cuda.current_stream(CUDA))


class NoBuffer(SlowCopies):
    """A fault, planted: a pinned buffer is filled again while it is copied out of."""

    def finish(self, mark: torch.cuda.Event | None) -> None:
        pass


STREAMED: dict[str, dict[str, Any]] = {
    "bf16": {"base_precision": "bf16"}, "fp16": {"base_precision": "fp16", "profile": "t4"},
    "nf4": {"base_precision": "nf4"}, "nf4 in turns": {**LISA, "base_precision": "nf4", "lisa_interval": 1},
}  # fmt: skip


def trained(path: Path, work: Path, streamed: bool) -> tuple[dict[str, torch.Tensor], list[float], Run]:
    """Three steps of a plan, resident or streamed: gradients and weights after them, every loss."""
    plan = Plan.read(path)
    way = {"stream_layers": streamed, "checkpointing": True, "kept_layers": 0, "micro_batch_size": 2}
    made = started(plan.model_copy(update={"training": plan.training.model_copy(update=way)}), work)
    with sdpa_kernel([SDPBackend.MATH]):  # the others add gradients up in any order
        losses = [made.train_step(samples(step)) for step in range(3)]
        made._gradients(samples(4))
    found = {f"gradient of {name}": p.grad for name, p in made.chosen if p.grad is not None}
    return found | {name: p.detach().clone() for name, p in made.chosen}, losses, made


@pytest.mark.parametrize("kind", [Stream, SlowCopies, SlowComputing])
@pytest.mark.parametrize("way", STREAMED)
def test_layers_in_files_train_as_those_on_the_card(
    way: str, kind: type[Stream], planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "PIECE_BYTES", 2**18)  # a matrix in several pieces
    monkeypatch.setattr(streaming, "way_of", lambda device: Copies(device, kind(device)))
    settings = {"tuner": "lora", "rank": 8, "layers": "all"} if "turns" not in way else {}
    path = planned(**settings | STREAMED[way], max_steps=4)
    resident, losses, _ = trained(path, tmp_path / "resident", False)
    again, _, _ = trained(path, tmp_path / "again", False)
    streamed, others, made = trained(path, tmp_path / "streamed", True)
    assert made.model.edgeft_window.way.there and losses[0] == others[0] and streamed.keys() == resident.keys()
    for name, value in resident.items():
        noise = float(torch.dist(value, again[name]))  # nothing, where a kernel does not add up in any order
        assert float(torch.dist(value, streamed[name])) <= 2 * noise, name


@pytest.mark.parametrize("fault", [NoWait, NoBuffer])
def test_copies_that_nobody_waits_for_are_seen(
    fault: type[Stream], planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "PIECE_BYTES", 2**18)
    monkeypatch.setattr(streaming, "way_of", lambda device: Copies(device, fault(device)))
    path = planned(tuner="lora", rank=8, layers="all", base_precision="bf16", max_steps=4)
    _, losses, _ = trained(path, tmp_path / "resident", False)
    try:
        _, others, _ = trained(path, tmp_path / "streamed", True)
    except EdgeftError:  # no number came of it
        return
    assert losses[0] != others[0]


def test_two_layers_in_files_are_on_the_card_at_a_time(planned: Any, tmp_path: Path) -> None:
    path = planned(tuner="lora", rank=8, layers="all", base_precision="bf16", stream_layers=True)
    made = started(Plan.read(path), tmp_path / "work")
    window, seen = made.model.edgeft_window, set[int]()
    read = window.way.read

    def watched(number: int, spans: Any, before: Any) -> None:
        read(number, spans, before)
        seen.add(sum(found.memory.nbytes for found in window.way.there.values()))

    window.way.read = watched
    made.train_step(samples(0))
    layer = layer_file_bytes(Plan.read(path).spec, Plan.read(path).training)
    assert max(seen) <= 2 * layer + 2 * 7 * ALIGNED and max(seen) > 1.9 * layer
    before = torch.cuda.memory_allocated()
    window.leave()
    assert torch.cuda.memory_allocated() <= before - layer


def test_adapters_train_on_the_card_and_the_record_says_so(planned: Any, tmp_path: Path) -> None:
    result = run(planned(tuner="lora", rank=8, epochs=4.0, max_steps=30, layers="all"), tmp_path / "train")
    assert result.valid.loss < 0.95 * result.base_valid.loss and not result.skipped_steps
    assert result.plan.training.compute_dtype == "bf16"
    assert [d.what for d in result.deviations if d.what != "peak memory"] == []
    assert result.measured_peak_bytes > 0


def test_the_process_is_held_to_the_budget() -> None:
    more = 64 * 2**20  # beside what the libraries keep of the tests before
    with capped(torch.cuda.memory_reserved() + more, CUDA):
        torch.empty(more // 4, dtype=torch.uint8, device=CUDA)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(4 * more, dtype=torch.uint8, device=CUDA)
    torch.empty(4 * more, dtype=torch.uint8, device=CUDA)


def test_running_out_of_memory_is_exit_3_with_the_next_smaller_way(planned: Any, tmp_path: Path) -> None:
    path = planned(tuner="full", layers="all")
    small = Plan.read(path).model_copy(update={"budget_bytes": 96 * 2**20})
    with pytest.raises(DoesNotFit, match="train: memory ran out in phase") as caught:
        train(small, tmp_path / "train", plan_sha256=sha256_file(path), progress=silent)
    text = str(caught.value)
    assert caught.value.exit_code == 3 and "the budget is 96.0 MiB" in text and "other processes and CUDA" in text
    assert "edgeft plan --model" in text
    torch.empty(256 * 2**20, dtype=torch.uint8, device=CUDA)  # the cap is gone


def test_a_run_that_ran_out_goes_on_in_a_smaller_way(planned: Any, tmp_path: Path) -> None:
    rows = [{"text": " ".join(f"lib{i * n}" for n in range(90))} for i in range(40)]
    how = {"tuner": "lora", "rank": 8, "layers": "all", "base_precision": "bf16", "batch_size": 16, "max_length": 200,
           "micro_batch_size": 16, "checkpointing": False, "loss_chunk_tokens": 1024, "max_steps": 6}  # fmt: skip
    path, out = planned(rows, **how), tmp_path / "train"
    whole = run(path, tmp_path / "whole")

    def fill(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        if stage == "train" and done == 3:  # something else takes what the rest of the run needs
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**20) / total)

    with pytest.raises(DoesNotFit, match="the same command with --smaller goes on from the last step"):
        run(path, out, fill)
    plan, digest = Plan.read(path), sha256_file(path)
    assert step_down(work_folder(out), plan, digest).peak_bytes < plan.peak_bytes
    result = run(path, out)
    assert result.resumed_at == (3,) and {d.what for d in result.deviations} <= {*MEMORY_ALONE, "peak memory"}
    assert [loss for _, loss in result.loss_curve] == pytest.approx([loss for _, loss in whole.loss_curve], rel=2e-2)
    assert result.predicted_peak_bytes < whole.predicted_peak_bytes  # what is measured holds the whole run's cache, too


def test_fp32_products_run_on_tensor_cores(planned: Any) -> None:
    training = Plan.read(planned(tuner="full", layers="all")).training
    before = torch.get_float32_matmul_precision()
    with tf32(training, CUDA):
        wanted = "high" if torch.cuda.get_device_capability() >= (8, 0) else before
        assert torch.get_float32_matmul_precision() == wanted
    assert torch.get_float32_matmul_precision() == before


def test_this_machines_profile_is_of_its_gpu(tmp_path: Path) -> None:
    from edgeft.machines.here import write_here
    from edgeft.machines.profile import load_profile

    profile = load_profile(str(write_here(tmp_path / "here.toml")))
    assert profile.device == "cuda" and profile.compute_capability == float(
        "{}.{}".format(*torch.cuda.get_device_capability())
    )
    assert 0 < profile.budget_bytes < torch.cuda.get_device_properties(0).total_memory
    assert profile.matmul_tflops["fp16"] > profile.matmul_tflops["fp32"] > 0
    assert make_plan(make_job(model=str(EXAMPLE), profile=str(tmp_path / "here.toml"))).training.device == "cuda"
