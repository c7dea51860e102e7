"""Training: what is planned runs, a killed run ends where an uninterrupted one does, bad runs stop with a hint."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import asked_to_stop_at, give_unpacked_weights, run

from edgeft.engine.loop import learning_rate
from edgeft.errors import BadInput, DoesNotFit, EdgeftError
from edgeft.machines import processes
from edgeft.machines.limits import Limit
from edgeft.models.checkpoint import load_plain
from edgeft.models.evaluate import evaluate
from edgeft.models.parts import find_parts
from edgeft.planning.plan import Plan
from edgeft.training.step_log import STEPS, read_steps
from edgeft.training.work import work_folder


@pytest.mark.parametrize(
    "settings",
    [{}, {"tuner": "full"}, {"layers": "sparse", "active_layers": 1}, {"checkpointing": True, "micro_batch_size": 2}],
)
def test_training_lowers_the_loss_and_changes_only_what_was_planned(
    settings: dict[str, Any], plan_file: Any, checkpoint_folder: Path, tmp_path: Path
) -> None:
    result = run(plan_file(epochs=4.0, learning_rate=5e-3, **settings), tmp_path / "train")
    assert result.valid.loss < 0.95 * result.base_valid.loss
    assert result.steps == result.plan.training.steps == len(result.loss_curve)
    kept = {"prefix"} if result.plan.training.cached_layers else set()
    assert set(result.phase_peak_bytes) == {"load", "evaluate", "train", "save"} | kept
    assert result.measured_peak_bytes == max(result.phase_peak_bytes.values()) > 0
    if settings.get("tuner") == "full":
        names = set(load_file(tmp_path / "train" / "changed.safetensors"))
        assert names == {name for name, _ in load_plain(checkpoint_folder).named_parameters()}
    else:
        names = set(load_file(tmp_path / "train" / "adapter_model.safetensors"))
        layers = {int(name.split(".layers.")[1].split(".")[0]) for name in names}
        assert layers == set(result.plan.training.trained_layers)


def test_micro_batches_and_checkpointing_change_no_result(plan_file: Any, tmp_path: Path) -> None:
    curves = []
    ways = ({}, {"micro_batch_size": 1}, {"checkpointing": True, "loss_chunk_tokens": 16}, {"kept_layers": 1})
    for i, settings in enumerate(ways):
        result = run(plan_file(max_steps=5, **settings), tmp_path / str(i))
        curves.append(torch.tensor([loss for _, loss in result.loss_curve]))
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], rtol=1e-4, atol=1e-5)


def test_how_freed_memory_is_kept_changes_no_bit(plan_file: Any, tmp_path: Path) -> None:
    results = {}
    for malloc in ("fast", "tight"):
        out = tmp_path / malloc
        result = run(plan_file(malloc=malloc), out)
        results[malloc] = (out / "adapter_model.safetensors").read_bytes(), result.loss_curve, result.valid
        assert result.plan.training.malloc == malloc
        assert any(term.name == "pool" for phase in result.plan.phases for term in phase.terms) == (malloc == "fast")
    assert results["fast"] == results["tight"]


def test_only_layers_below_the_kept_ones_run_again(plan_file: Any, checkpoint_folder: Path) -> None:
    from edgeft.engine.loop import recompute_layers
    from edgeft.models.parts import find_parts

    model = load_plain(checkpoint_folder)
    parts = find_parts(model)
    runs = [0] * len(parts.layers)
    for index, layer in enumerate(parts.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    recompute_layers(parts, kept=1)
    parts.body(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).last_hidden_state.sum().backward()
    assert runs == [2] * (len(runs) - 1) + [1]


def test_adapter_loads_in_plain_peft(plan_file: Any, checkpoint_folder: Path, tmp_path: Path) -> None:
    """Any tool of the ecosystem can pick the adapter up: PEFT's model gives the loss edgeft wrote down."""
    from peft import PeftModel

    from edgeft.training.job_data import Data

    path = plan_file(epochs=3.0, learning_rate=5e-3)
    result = run(path, tmp_path / "train")
    model = PeftModel.from_pretrained(load_plain(checkpoint_folder), str(tmp_path / "train"))
    data = Data.read(Plan.read(path))
    base = model.get_base_model()
    scores = evaluate(base, find_parts(base), data.valid[:4], data.tokenizer, device=torch.device("cpu"))
    assert scores.loss == pytest.approx(result.valid.loss, rel=1e-5)


KILLED = """if True:
    import os, signal, sys
    from pathlib import Path
    from edgeft.documents import sha256_file
    from edgeft.planning.plan import Plan
    from edgeft.training.train import train
    def kill(stage, done, total, numbers):
        if stage == "train" and done == 5:
            os.kill(os.getpid(), signal.SIGKILL)
    path, out = map(Path, sys.argv[1:])
    train(Plan.read(path), out, plan_sha256=sha256_file(path), progress=kill)
"""


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_killed_run_ends_bit_for_bit_like_an_uninterrupted_one(tuner: str, plan_file: Any, tmp_path: Path) -> None:
    path = plan_file(epochs=3.0, checkpoint_steps=3, tuner=tuner)
    whole = run(path, tmp_path / "whole")
    out = tmp_path / "killed run"  # a path with a space
    killed = processes.run(KILLED, path, out)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists(), "a killed run must not look finished"
    resumed = run(path, out)
    assert resumed.resumed_at == (3,) and resumed.steps == whole.steps > 5
    name = "adapter_model.safetensors" if tuner == "lora" else "changed.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert resumed.loss_curve == whole.loss_curve
    assert [each.step for each in read_steps(out / STEPS)] == list(range(1, whole.steps + 1))
    assert resumed.base_valid == whole.base_valid and resumed.valid == whole.valid
    assert not work_folder(out).exists()


def test_ctrl_c_keeps_the_last_step(plan_file: Any, tmp_path: Path) -> None:
    path = plan_file(epochs=3.0)
    out = tmp_path / "train"

    def interrupt(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        if stage == "train" and done == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(path, out, progress=interrupt)
    assert not out.exists()
    assert json.loads(next(work_folder(out).glob("step-*/counters.json")).read_text())["step"] in (4, 5)
    assert run(path, out).resumed_at in ((4,), (5,))


def test_checkpoints_of_another_plan_are_not_used(plan_file: Any, tmp_path: Path) -> None:
    out = tmp_path / "train"

    stop = asked_to_stop_at(2)

    with pytest.raises(KeyboardInterrupt):
        run(plan_file(), out, progress=stop)
    assert run(plan_file(seed=1), out).resumed_at == ()


def test_a_damaged_checkpoint_is_passed_over(plan_file: Any, tmp_path: Path) -> None:
    out = tmp_path / "train"

    stop = asked_to_stop_at(5)

    path = plan_file(checkpoint_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run(path, out, progress=stop)
    newest = max(work_folder(out).glob("step-*"))
    (newest / "state.pt").write_bytes(b"lost")
    resumed = run(path, out)
    assert 0 < resumed.resumed_at[-1] < int(newest.name.split("-")[1])


def test_loss_that_is_not_finite_stops_with_what_to_do(plan_file: Any, tmp_path: Path) -> None:
    with pytest.raises(EdgeftError, match=r"training: the loss became (nan|inf) at step \d+ of \d+") as caught:
        run(plan_file(learning_rate=1e30, epochs=3.0), tmp_path / "train")
    assert "hint: plan again with a lower learning rate: --set learning_rate=2.5e+29" in str(caught.value)
    assert not (tmp_path / "train").exists()


def test_a_full_disk_loses_nothing(plan_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    path, out = plan_file(checkpoint_steps=2), tmp_path / "train"
    real = torch.save

    def full(state: Any, target: Path) -> None:
        if "step-00000004" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, target)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        EdgeftError, match=r"the disk is full \(.* left\)\n\nhint: free some space or choose another place"
    ):
        run(path, out)
    monkeypatch.undo()
    assert run(path, out).resumed_at == (2,)


def test_a_device_that_is_absent_is_refused_or_recorded(plan_file: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    path = plan_file(profile="t4")
    with pytest.raises(BadInput, match="--on: cuda is not available here\n\nhint: leave --on out to train on the CPU"):
        run(path, tmp_path / "train", wanted_device="cuda")
    result = run(path, tmp_path / "train")
    assert [(d.what, d.planned, d.done) for d in result.deviations if d.what != "peak memory"] == [
        ("device", "cuda", "cpu"),
        ("compute_dtype", "fp16", "fp32"),
        ("base_precision", "fp16", "fp32"),
    ]


def test_a_plan_larger_than_the_machine_is_refused(
    plan_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeft.machines.limits.memory_limit", lambda: Limit(64 * 2**20, "ulimit -v of 64.0 MiB"))
    with pytest.raises(
        DoesNotFit,
        match=r"needs .* MiB, this process can have 64.0 MiB \(ulimit -v of 64.0 MiB\)\n\nhint: .*-memory 64MiB",
    ):
        run(plan_file(), tmp_path / "train")


def test_scores_that_are_not_finite_are_never_a_result(
    plan_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeft.models.metrics import Metrics

    path, out = plan_file(checkpoint_steps=2), tmp_path / "train"
    whole = run(path, tmp_path / "whole")
    nan = Metrics(rows=4, loss=float("nan"), perplexity=1.0, exact_match=None)
    scored: list[Metrics] = [whole.base_valid]
    monkeypatch.setattr("edgeft.training.scoring.evaluate", lambda *_, **__: scored.pop() if scored else nan)
    with pytest.raises(
        EdgeftError, match="training: the loss of valid is nan: nothing is written as a result\n\nhint:"
    ):
        run(path, out)
    assert not out.exists() and any(work_folder(out).glob("step-*")), "the last good checkpoint stays"
    monkeypatch.undo()
    assert run(path, out).valid == whole.valid


def test_training_in_a_thread_needs_no_signals(plan_file: Any, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, plan_file(max_steps=2), tmp_path / "train").result().steps == 2


def test_no_library_speaks_of_missing_kernels(checkpoint_folder: Path) -> None:
    """Wherever a record of that kind comes from, nothing that would show it lets it through; others pass."""
    import logging

    load_plain(checkpoint_folder)
    advice = "`f` is falling back to its reference PyTorch implementation because `causal-conv1d` is not installed."
    own = logging.getLogger("transformers.integrations.hub_kernels")
    handlers = logging.getLogger("transformers").handlers
    assert handlers
    for text, passes in ((advice, False), ("the tokenizer has changed", True)):
        record = logging.LogRecord("transformers.models.mamba", logging.WARNING, "", 0, text, (), None)
        assert [bool(place.filter(record)) for place in (own, *handlers)] == [passes] * (1 + len(handlers))


def test_learning_rate_warms_up_and_ends_at_zero(plan_file: Any) -> None:
    training = Plan.read(plan_file(epochs=3.0, warmup_fraction=0.2, learning_rate=1.0)).training
    rates = [learning_rate(training, step) for step in range(training.steps + 1)]
    assert rates[training.warmup_steps - 1] == 1.0 == max(rates)
    assert (
        rates[-1] == 0.0
        and rates[0] < 1.0
        and rates[training.warmup_steps :] == sorted(rates[training.warmup_steps :])[::-1]
    )


def test_frozen_layers_run_without_autograd(plan_file: Any, checkpoint_folder: Path) -> None:
    """Nothing below the lowest trained layer wants a gradient, with and without checkpointing."""
    from edgeft.engine.loop import Run
    from edgeft.engine.trainable import apply_tuner
    from edgeft.models.parts import find_parts

    for checkpointing in (False, True):
        training = Plan.read(plan_file(layers="sparse", active_layers=1, checkpointing=checkpointing)).training
        model = load_plain(checkpoint_folder)
        parts = find_parts(model)
        Run(training, torch.device("cpu"), torch.float32, model, parts, apply_tuner(model, parts, training))
        wanted: list[bool] = []

        def note(module: Any, args: Any, output: torch.Tensor, wanted: list[bool] = wanted) -> None:
            wanted.append(output.requires_grad)

        for layer in parts.layers:
            layer.register_forward_hook(note)
        parts.body(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
        assert wanted == [False, True]


def test_nf4_base_trains_on_a_cpu_and_is_quantised_once(
    plan_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = plan_file(base_precision="nf4", epochs=3.0, learning_rate=5e-3)
    first = run(path, tmp_path / "first")
    assert first.valid.loss < first.base_valid.loss
    kept = list((tmp_path / "cache" / "edgeft" / "nf4").glob("*/model.safetensors.index.json"))
    assert len(kept) == 1
    monkeypatch.setattr("edgeft.machines.processes.run", lambda *_, **__: pytest.fail("quantised twice"))
    assert run(path, tmp_path / "second").loss_curve == first.loss_curve


def test_nf4_gradients_are_those_of_the_dequantised_weights(
    plan_file: Any, checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after scoring: bitsandbytes swaps in a CPU kernel without a backward pass when a layer is in eval mode."""
    from edgeft.data.dataset import Sample
    from edgeft.engine.nf4_base import load_base
    from edgeft.engine.trainable import apply_tuner
    from edgeft.models.evaluate import greedy, token_losses
    from edgeft.models.parts import find_parts

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    training = Plan.read(plan_file(base_precision="nf4")).training
    cpu, ids = torch.device("cpu"), list(range(5, 25))
    quantised, dense = load_base(checkpoint_folder, training, cpu, torch.float32), load_plain(checkpoint_folder)
    greedy(quantised, [ids], [0], 3, cpu)
    give_unpacked_weights(quantised, dense)
    gradients = []
    for model in (quantised, dense):
        parts = find_parts(model)
        chosen = apply_tuner(model, parts, training)
        with torch.no_grad():
            for i, (_, parameter) in enumerate(chosen):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) / 10)
        token_losses(model, parts, [Sample(ids, ids, 0)], cpu, torch.float32, 16).backward()
        gradients.append({name: p.grad for name, p in chosen})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert gradient is not None and gradients[0][name] is not None
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-5)
