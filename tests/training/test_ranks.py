"""Several processes: they train what one does, go on as one run, end together; what would differ is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from several_processes import EMULATED, KILLED, UNAWARE, free_port, plan_for, start, together, weights
from tiny import FULL, NF4, ROWS, qwen3_folder, run

from edgeft.data.batches import shares
from edgeft.engine.ranks import ALONE
from edgeft.errors import BadInput, WrongStart
from edgeft.machines.launcher import alone, launched, torchrun
from edgeft.planning.plan import Plan
from edgeft.training.result import TrainResult
from edgeft.training.work import work_folder

LISA = {"layers": "lisa", "active_layers": 1, "lisa_interval": 3}
WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": FULL,
    "lisa uniform": {**LISA, "tuner": "full", "lisa_schedule": "uniform", "lisa_state": "park"},
    "lisa weighted": {**LISA, "lisa_schedule": "weighted", "layer_score": "gradient"},
    "sparse": {"layers": "sparse", "active_layers": 2, "tuner": "full", "prefix_cache": True},
    "lisa on nf4": {**LISA, **NF4, "tuner": "full"},
}
STREAMED = {"stream_layers": True, "checkpointing": True, "kept_layers": 0, "malloc": "tight"}
WAYS |= {
    "streamed lora": STREAMED,
    "streamed lisa": {**LISA, **STREAMED, "tuner": "full"},
    "streamed lisa on nf4": {**LISA, **NF4, **STREAMED, "tuner": "full"},
}
SLOW = {"lisa uniform", "sparse", "full", "streamed lora", "streamed lisa"}


@pytest.fixture(scope="module")
def model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, whose turns can come and go."""
    return qwen3_folder(tmp_path_factory.mktemp("qwen3"), tokenizer_folder, 4)


def assert_same_training(some: Path, other: Path) -> None:
    """The same layers drawn, the same losses, and weights within what another order of sums gives.

    That is 1e-6, but for one number in a thousand: Adam divides a gradient next to zero by its own size.
    """
    a, b = (TrainResult.read(folder / "train.json") for folder in (some, other))
    assert [(unit.unit, unit.steps) for unit in a.units] == [(unit.unit, unit.steps) for unit in b.units]
    assert (a.steps, a.trained_tokens) == (b.steps, b.trained_tokens)
    curves = [torch.tensor([loss for _, loss in result.loss_curve]) for result in (a, b)]
    torch.testing.assert_close(*curves, rtol=0, atol=2e-5)
    one, two = weights(some), weights(other)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        apart = (two[name].float() - tensor.float()).abs()
        assert float(apart.max()) < 5e-6 and float((apart > 1e-6).float().mean()) < 1e-3, name


def marked(way: str, count: int) -> Any:
    return pytest.param(way, count, marks=pytest.mark.slow if way in SLOW or count == 4 else (), id=f"{way}, {count}")


@pytest.mark.parametrize(("way", "count"), [marked(way, 2) for way in WAYS] + [marked(way, 4) for way in WAYS])
def test_processes_train_what_one_does(way: str, count: int, model: Path, tmp_path: Path) -> None:
    run(plan_for(tmp_path / "one", model, 1, **WAYS[way]), tmp_path / "one" / "train")
    found = together(count, plan_for(tmp_path / "all", model, count, **WAYS[way]), tmp_path / "all" / "train")
    assert found.plan.training.processes == count == len(found.process_peak_bytes)
    assert not found.deviations and not work_folder(tmp_path / "all" / "train").exists()
    assert_same_training(tmp_path / "one" / "train", tmp_path / "all" / "train")


# Faults, each a few lines that a process runs before it trains
WRITES_LATE = """
import time
from edgeft.engine.fp32_layers import DenseTurns
write, stay = DenseTurns._write_pages, DenseTurns._stay
def late(self, *a):
    time.sleep(0.3 * self.writes)
    write(self, *a)
DenseTurns._write_pages = late
"""
WAITS_FOR_NONE = """
def hasty(self, *a):
    self.wait = lambda: None
    stay(self, *a)
DenseTurns._stay = hasty
"""
OWN_TOKENS = """
gradients = loop.Run._gradients
def own(self, samples):
    every = sum(s.trained_tokens for s in samples) / self.ranks.size
    mine, losses = sum(s.trained_tokens for s in self.ranks.share(samples)), loop.token_losses
    loop.token_losses = lambda *a: losses(*a) * (every / mine)
    try:
        return gradients(self, samples)
    finally:
        loop.token_losses = losses
loop.Run._gradients = own
"""
KEEPS_ITS_OWN = """
add = ranks.Ranks.add_gradients
def alone(self, parameters, *numbers):
    kept = [p.grad.clone() for p in parameters]
    sums = add(self, parameters, *numbers)
    for p, own in zip(parameters, kept):
        p.grad = own
    return sums
ranks.Ranks.add_gradients = alone
"""
OVERFLOWS_ONCE = """
add, calls = ranks.Ranks.add_gradients, []
def high(self, parameters, *numbers):
    if not calls:
        parameters[0].grad.fill_(float("inf"))
    calls.append(1)
    return add(self, parameters, *numbers)
ranks.Ranks.add_gradients = high
"""
STOPPED = KILLED.replace("SIGKILL", "SIGTERM")


STOPS: dict[str, Any] = {
    "max_steps": 12, "epochs": 3.0, "patience": 2, "valid_steps": 2, "eval_rows": 6, "checkpoint_steps": 3,
}  # fmt: skip
FOUND_BEST_AT_SIX = """
from edgeft.training.stopping import Stopping
Stopping._measured = lambda self, run, progress: 1.0 + abs(run.step - 6)
"""


def test_processes_are_validated_as_one_is_and_end_together(model: Path, tmp_path: Path) -> None:
    """Killed on the way, they go on; what the first one finds ends them all, whatever the others would have found."""
    valid = tmp_path / "valid.jsonl"
    valid.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::3]))
    settings = STOPS | {"valid": str(valid)}
    run(plan_for(tmp_path / "one", model, 1, **settings), tmp_path / "one" / "train")
    path, out = plan_for(tmp_path / "all", model, 2, **settings), tmp_path / "all" / "train"
    assert any(done.returncode for done in start(2, path, out, {1: KILLED.format(at=4)}))
    found, alone = together(2, path, out), TrainResult.read(tmp_path / "one" / "train" / "train.json")
    assert found.resumed_at and not found.deviations and not work_folder(out).exists()
    assert (found.best_step, found.steps, len(found.validations)) == (alone.best_step, alone.steps, 6)
    both = [torch.tensor([loss for _, loss in result.validations]) for result in (found, alone)]
    torch.testing.assert_close(*both, rtol=0, atol=2e-5)
    shutil.rmtree(out)
    told = together(2, path, out, {0: FOUND_BEST_AT_SIX})  # the other one hears it
    assert (told.best_step, told.steps, told.deviations) == (6, 10, ())


@pytest.mark.parametrize("way", ["streamed lora", "streamed lisa on nf4"])
def test_processes_that_read_the_same_files_are_those_that_hold_them(way: str, model: Path, tmp_path: Path) -> None:
    """Bit for bit, also where the first one is slow to write what a layer is read from after its turn."""
    settings = WAYS[way] | {"max_steps": 6, "lisa_interval": 1 if "lisa" in way else None}
    resident = plan_for(tmp_path / "resident", model, 2, **settings | {"stream_layers": False})
    streamed = plan_for(tmp_path / "streamed", model, 2, **settings)
    assert Plan.read(streamed).training.stream_layers and not Plan.read(resident).training.stream_layers
    one, other = (path.parent / "train" for path in (resident, streamed))
    first, second = together(2, resident, one), together(2, streamed, other, {0: WRITES_LATE})
    assert first.loss_curve == second.loss_curve and not second.deviations
    assert weights(one).keys() == weights(other).keys()
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())
    if "lisa" in way:  # a fault, planted: the other reads what is not written yet
        done = start(
            2, streamed, tmp_path / "hasty", {0: WRITES_LATE + WAITS_FOR_NONE, 1: WRITES_LATE + WAITS_FOR_NONE}
        )
        assert done[1].returncode == 1 and ".pages" in done[1].stderr


@pytest.fixture(scope="module")
def one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process trains: LoRA of all layers."""
    folder = tmp_path_factory.mktemp("one")
    run(plan_for(folder, model, 1), folder / "train")
    return folder / "train"


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes train of it."""
    folder = tmp_path_factory.mktemp("two")
    together(2, plan_for(folder, model, 2), folder / "train")
    return folder / "train"


@pytest.mark.parametrize("way", ["divides by its own tokens", "keeps its own gradients"])
def test_a_process_that_does_not_add_up_is_caught(way: str, one: Path, two: Path, tmp_path: Path) -> None:
    assert_same_training(one, two)
    path = Path(shutil.copy(two.parent / "plan.json", tmp_path))
    fault = OWN_TOKENS if way.startswith("divides") else KEEPS_ITS_OWN
    together(2, path, tmp_path / "train", dict.fromkeys((0, 1), UNAWARE + fault))
    with pytest.raises(AssertionError):
        assert_same_training(one, tmp_path / "train")


def test_processes_whose_weights_part_end_after_the_first_step(two: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(two.parent / "plan.json", tmp_path))
    first, second = start(2, path, tmp_path / "train", {1: KEEPS_ITS_OWN})
    assert first.returncode == second.returncode == 1
    assert "process 1 has other weights than process 0" in first.stderr + second.stderr
    assert not (tmp_path / "train").exists()


def test_weights_that_part_later_are_recorded(two: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(two.parent / "plan.json", tmp_path))
    found = together(2, path, tmp_path / "train", {0: UNAWARE, 1: UNAWARE + KEEPS_ITS_OWN})
    (deviation,) = found.deviations
    assert (deviation.what, deviation.done) == (
        "trained weights",
        "process 1 has others than process 0, whose are kept",
    )


@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_process_ends_the_others_and_the_same_command_goes_on(rank: int, two: Path, tmp_path: Path) -> None:
    path, out = Path(shutil.copy(two.parent / "plan.json", tmp_path)), tmp_path / "train"
    done = start(2, path, out, {rank: KILLED.format(at=9)})
    assert done[rank].returncode == -signal.SIGKILL
    other = done[1 - rank]
    assert other.returncode == 1
    if rank == 1:
        assert "train: another of 2 processes ended" in other.stderr
        assert "hint: run the same command again: it goes on from the last checkpoint" in other.stderr
    else:
        assert "train:" not in other.stderr, "the first one speaks for all"
    assert not out.exists()
    kept = max(folder.name for folder in work_folder(out).glob("step-*"))
    assert kept == ("step-00000009" if rank else "step-00000007"), "what is left is kept by the first process"
    found = together(2, path, out)
    assert found.resumed_at == (int(kept[-8:]),)
    assert (out / "adapter_model.safetensors").read_bytes() == (two / "adapter_model.safetensors").read_bytes()
    assert found.loss_curve == TrainResult.read(two / "train.json").loss_curve


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lisa uniform", "lisa on nf4", "streamed lisa on nf4"])
def test_layers_in_turn_go_on_bit_for_bit(way: str, model: Path, tmp_path: Path) -> None:
    path = plan_for(tmp_path, model, 2, **WAYS[way])
    whole, out = together(2, path, tmp_path / "whole"), tmp_path / "train"
    start(2, path, out, {1: KILLED.format(at=17)})
    assert together(2, path, out).resumed_at
    assert weights(out).keys() == weights(tmp_path / "whole").keys()
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(tmp_path / "whole").items())
    assert TrainResult.read(out / "train.json").loss_curve == whole.loss_curve


def test_one_process_that_is_asked_to_stop_stops_all_after_the_same_step(two: Path, tmp_path: Path) -> None:
    path, out = Path(shutil.copy(two.parent / "plan.json", tmp_path)), tmp_path / "train"
    assert all(done.returncode for done in start(2, path, out, {1: STOPPED.format(at=4)}))
    (kept,) = work_folder(out).glob("step-*")
    assert json.loads((kept / "counters.json").read_text())["step"] in (5, 6)


def test_another_number_of_processes_is_refused(two: Path, one: Path, tmp_path: Path) -> None:
    path, out = Path(shutil.copy(two.parent / "plan.json", tmp_path)), tmp_path / "train"
    start(2, path, out, {1: KILLED.format(at=9)})
    with pytest.raises(WrongStart, match="the plan is for 2 processes, one was started") as wrong:
        run(path, out)
    assert wrong.value.exit_code == 2 and wrong.value.hint.endswith(f"-m edgeft train {path}")
    with pytest.raises(BadInput, match="2 processes made the checkpoint there, this plan is for 1") as refused:
        run(one.parent / "plan.json", out)
    assert "plan with --processes 2 to go on" in refused.value.hint
    assert any(work_folder(out).glob("step-*")), "it is kept"


def test_started_as_others_than_planned(one: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    problem = (
        r"train: 4 processes were started \(WORLD_SIZE\), the plan is for 2\n\nhint: .*torchrun --nproc-per-node 2"
    )
    with pytest.raises(WrongStart, match=problem):
        run(two.parent / "plan.json", tmp_path / "train")
    with pytest.raises(WrongStart, match=r"the plan is for 1\n\nhint: start it without torchrun"):
        run(one.parent / "plan.json", tmp_path / "train")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(WrongStart) as wrong:
        run(two.parent / "plan.json", tmp_path / "train")
    assert wrong.value.told, "the first one has said it"


def test_a_process_with_other_files_is_named(two: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(two.parent / "plan.json", tmp_path))
    other = "from edgeft.training import join\njoin.versions = lambda: {'torch': '1.0', 'edgeft': '0'}"
    done = start(2, path, tmp_path / "train", {1: other})
    said = done[0].stderr + done[1].stderr
    assert {one.returncode for one in done} == {1}
    assert "processes have other things than process 0" in said and "torch 1.0, process 0 has " in said


def test_a_folder_that_is_not_shared_is_named(two: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(two.parent / "plan.json", tmp_path))
    done = start(2, path, tmp_path / "train", {1: "out = out.parent / 'elsewhere' / 'train'"})
    assert {one.returncode for one in done} == {1}
    assert "process 1 does not see the folder that process 0 writes to" in done[0].stderr + done[1].stderr


def test_of_fp16_gradients_that_overflow_every_process_knows(model: Path, tmp_path: Path) -> None:
    """Emulated on a CPU: where one process's gradients overflow, both take the step again."""
    path = plan_for(tmp_path, model, 2, profile="t4", base_precision="fp16", max_steps=3, batch_size=4)
    found = together(2, path, tmp_path / "train", {0: EMULATED, 1: EMULATED + OVERFLOWS_ONCE})
    assert (found.skipped_steps, found.steps) == (1, 3)
    assert not [deviation for deviation in found.deviations if deviation.what == "trained weights"]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "train").values())


def test_shares_are_even_and_lose_nothing() -> None:
    from edgeft.data.samples import Sample

    samples = [Sample([1] * length, [1] * length, 0) for length in (3, 9, 5, 7, 2)]
    assert shares(samples, 1) == [samples]
    assert [[len(sample) for sample in share] for share in shares(samples, 2)] == [[9, 5, 2], [7, 3]]
    assert [len(share) for share in shares(samples[:1], 3)] == [1, 0, 0]


def test_who_a_process_is_by_its_variables() -> None:
    assert launched({}) == launched({"RANK": "3", "WORLD_SIZE": "1"}) == (0, 1, 0, 1)
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "HOME": "/"}
    assert launched(variables) == (5, 8, 1, 4) and not launched(variables).first
    assert alone(variables) == {"HOME": "/"}
    assert torchrun(2, 1, Path("a plan.json")) == "torchrun --nproc-per-node 2 -m edgeft train 'a plan.json'"
    assert torchrun(8, 2, Path("p"), 3).startswith("OMP_NUM_THREADS=3 torchrun --nnodes 2 --nproc-per-node 4 --rdzv")


def test_a_process_that_is_alone_does_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = kept = torch.ones(2)
    assert ALONE.add_gradients([weight], 2.5) == [2.5] and weight.grad is kept
    assert ALONE.told(lambda: 3) == 3 and ALONE.gathered("x") == ["x"]
    with ALONE.in_turn():
        ALONE.wait()


def agent(path: Path, *options: object, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A real torchrun that carries a plan out."""
    command = [*before, sys.executable, "-m", "torch.distributed.run", *map(str, options), "-m", "edgeft", "train"]
    environment = alone() | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [*command, str(path), "--no-rehearsal"], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def end_of(started: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and all that was said."""
    out, err = started.communicate(timeout=300)
    return started.returncode, out + err


def children_of(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(word) for word in text.split()]


@pytest.mark.slow
@pytest.mark.cold
def test_torchrun_ends_when_a_process_is_killed_and_goes_on_when_it_runs_again(two: Path, tmp_path: Path) -> None:
    path, out = Path(shutil.copy(two.parent / "plan.json", tmp_path)), tmp_path / "train"
    started = agent(path, "--nproc-per-node", 2)
    until = time.monotonic() + 200
    while not any(work_folder(out).glob("step-*")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(children_of(started.pid)[1], signal.SIGKILL)
    code, said = end_of(started)
    assert code == 1, said
    assert "edgeft, process 0 of 2: train: another of 2 processes ended" in said, said
    assert "hint: run the same command again: it goes on from the last checkpoint" in said
    code, said = end_of(agent(path, "--nproc-per-node", 2))
    assert code == 0, said
    assert said.count("peak memory: predicted") == 1, "one of the processes speaks"
    found = TrainResult.read(out / "train.json")
    assert found.resumed_at and found.loss_curve == TrainResult.read(two / "train.json").loss_curve
    assert (out / "adapter_model.safetensors").read_bytes() == (two / "adapter_model.safetensors").read_bytes()


def two_agents(path: Path, endpoint: str, own: list[tuple[str, ...]], before: list[tuple[str, ...]]) -> None:
    """Two torchruns, which find each other at an address, carry a plan of two machines out."""
    how = ("--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", 7, "--rdzv-endpoint", endpoint)
    started = [agent(path, *how, *options, before=each) for options, each in zip(own, before, strict=True)]
    for code, said in map(end_of, started):
        assert code == 0, said


@pytest.mark.slow
@pytest.mark.cold
def test_two_agents_train_what_one_process_does(one: Path, model: Path, tmp_path: Path) -> None:
    path = plan_for(tmp_path, model, 2, machines=2)
    assert "--nnodes 2 --nproc-per-node 1" in " ".join(Plan.read(path).notes)
    two_agents(path, f"127.0.0.1:{free_port()}", [(), ()], [(), ()])
    assert_same_training(one, tmp_path / "train")


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces that see each other and nothing else, as two machines on a wire."""
    names = [f"edgeft{os.getpid()}{end}" for end in "ab"]
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add eth-a netns {names[0]} type veth peer name eth-b netns {names[1]}",
        *(f"ip netns exec {name} ip address add 10.99.0.{n}/24 dev eth-{end}"
          for n, name, end in zip((1, 2), names, "ab", strict=True)),
        *(f"ip netns exec {name} ip link set {link} up" for name, end in zip(names, "ab", strict=True)
          for link in ("lo", f"eth-{end}")),
    ]  # fmt: skip
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {command}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.cold
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs ip (iproute2)")
def test_two_machines_find_each_other_over_a_network(
    namespaces: list[str], one: Path, model: Path, tmp_path: Path
) -> None:
    path = plan_for(tmp_path, model, 2, machines=2)
    before = [
        ("ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME=eth-{end}", "NO_COLOR=1")
        for name, end in zip(namespaces, "ab", strict=True)
    ]
    # by its name a namespace would not know that the address is its own
    own = [("--local-addr", f"10.99.0.{n}", "--rdzv-conf", f"is_host={n == 1}") for n in (1, 2)]
    two_agents(path, "10.99.0.1:29400", own, before)
    assert_same_training(one, tmp_path / "train")
