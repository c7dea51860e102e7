"""Do the closed forms of saving, merging, exporting and running agree with what those stages hold?"""

from __future__ import annotations

import io
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import BENCH, CONFIGS, run

from edgeft.documents import sha256_file
from edgeft.errors import BadInput, DoesNotFit
from edgeft.exporting.room import check_room
from edgeft.machines import limits
from edgeft.machines.limits import Limit
from edgeft.machines.profile import load_profile
from edgeft.memory import stages
from edgeft.memory.train_step import Phase
from edgeft.merging.change import Change
from edgeft.merging.merge import merge, peak_above_baseline
from edgeft.models.checkpoint import Checkpoint
from edgeft.planning import stage_checks
from edgeft.planning.expected import likely
from edgeft.planning.plan import Plan, make_plan
from edgeft.progress import silent
from edgeft.reporting.terminal import plan_text
from edgeft.reporting.words import GIVEN_BACK, above_high
from edgeft.settings.job import make_job
from edgeft.targets.target import candidates
from edgeft.units import GIB, MIB

SMALL, LLAMA = str(CONFIGS / "smollm2-135m"), str(CONFIGS / "llama-3.1-8b")


def plan(model: str = SMALL, profile: str = "cpu-16gb", **settings: object) -> Plan:
    return make_plan(make_job(model=model, profile=profile, **settings))


def phase(made: Plan, name: str, where: str = "") -> Phase:
    [found] = [each for each in made.stages.phases if each.name == name and where in ("", each.where)]
    return found


def term(found: Phase, name: str) -> int:
    return sum(each.bytes for each in found.terms if each.name == name)


# What a plan says


def test_every_stage_is_planned_and_its_terms_add_up() -> None:
    names = {
        "cpu-16gb": ["resume", "merge", "export: calibrate", "export: build", "export: prove", "bundle"],
        "t4": [
            "quantise",
            "load",
            "train",
            "resume",
            "merge",
            "export: calibrate",
            "export: build",
            "export: prove",
            "bundle",
        ],
    }
    for profile, model in (("cpu-16gb", SMALL), ("t4", LLAMA)):
        made = plan(model, profile)
        assert [each.name for each in made.stages.phases] == names[profile]
        assert [each.where for each in made.stages.phases[:-1]] == ["host"] * (len(names[profile]) - 1)
        assert made.stages.phases[-1].where == "target"
        assert {each.where for each in made.phases} == {"device"}
        for each in made.stages.phases:
            assert sum(part.bytes for part in each.terms) == each.expected_bytes, each.name
            assert 0 <= each.low_bytes < each.expected_bytes < each.high_bytes, each.name
            assert all(part.bytes > 0 and part.formula for part in each.terms), each.name


def test_a_gpu_hosts_own_memory_is_the_limit_of_its_stages() -> None:
    made = plan(LLAMA, "t4")
    assert made.stages.host_bytes == 16 * GIB  # as profiles/t4.toml says of the usual host
    assert not [note for note in made.notes if "the host has" in note]
    notes = made.stages.model_copy(update={"host_bytes": 12 * GIB}).notes()
    assert [note.split(" may need ")[0] for note in notes] == ["export: prove"]
    assert phase(made, "quantise").high_bytes < 4 * GIB  # the card makes the codes, tensor by tensor
    assert term(phase(made, "quantise"), "one tensor") == 2 * made.spec.vocab_size * made.spec.hidden_size
    for each in made.stages.phases[:-1]:
        assert made.stages.limit_bytes(each) == 16 * GIB


def test_what_a_cpu_makes_nf4_is_read_as_pages_of_a_file() -> None:
    """They do not count against the host's limit: the system takes them back when it needs them."""
    made = plan(str(CONFIGS / "llama-3.2-3b"), "cpu-16gb", base_precision="nf4")
    assert term(phase(made, "quantise"), "weight file") == made.spec.total_parameters * 2


@pytest.mark.parametrize(
    ("name", "here", "expected"),
    [("cpu-8gb", None, 5 * GIB), ("t4", None, 16 * GIB), ("t4", 7 * GIB, 7 * GIB), ("apple-16gb", None, 5 * GIB)],
)
def test_host_memory(name: str, here: int | None, expected: int) -> None:
    assert stage_checks.host_memory(load_profile(name), 5 * GIB, here) == expected


def test_host_memory_that_nobody_knows_gives_no_notes() -> None:
    card = load_profile("t4").model_copy(update={"host_memory_gib": None})
    assert stage_checks.host_memory(card, 5 * GIB, None) is None
    made = plan(LLAMA, "t4").stages.model_copy(update={"host_bytes": None})
    assert made.notes() == []


def test_every_width_is_built_from_a_graph_in_fp32_that_is_written_tensor_by_tensor() -> None:
    four, eight, whole = (plan(target=f"ort-{kind}") for kind in ("int4", "int8", "fp32"))
    build = phase(four, "export: build")
    assert phase(eight, "export: build") == phase(whole, "export: build") == build
    assert term(build, "largest tensor") == 2 * 4 * four.spec.vocab_size * four.spec.hidden_size
    weights = [term(phase(made, "bundle"), "weights") for made in (four, eight, whole)]
    assert weights == sorted(weights) and weights[2] > 4 * four.spec.total_parameters


def test_a_named_device_limits_the_context() -> None:
    made = plan(LLAMA, "t4", device="raspberrypi5-8gb", kv_bits=32)
    pi = load_profile("raspberrypi5-8gb")
    assert (made.stages.target_name, made.stages.target_bytes) == (pi.name, pi.budget_bytes)
    assert made.stages.context_limited_by == "device memory" and made.stages.context_tokens < 4096
    assert phase(made, "bundle").expected_bytes <= pi.budget_bytes
    assert plan(LLAMA, "t4").stages.context_tokens == 4096


def plan_text_of(made: Plan) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(plan_text(made))
    return console.export_text()


def test_a_row_above_its_limit_by_pages_of_files_alone_is_marked_and_explained() -> None:
    """The verdict leaves them out, so that without a word it would contradict its table."""
    made = plan(str(CONFIGS / "llama-3.2-3b"), "rtx4060-8gb")
    above = [
        each for each in made.stages.phases if each.high_bytes > (made.stages.limit_bytes(each) or each.high_bytes)
    ]
    assert above and not made.stages.too_large()
    text = plan_text_of(made)
    rows = [line for line in text.splitlines() if "iB*" in line]
    assert [row.split("host")[0].strip() for row in rows] == [each.name for each in above] and text.count(
        GIVEN_BACK
    ) == 1
    assert GIVEN_BACK not in plan_text_of(plan())


def test_a_device_that_the_bundle_cannot_fit_is_refused_before_training() -> None:
    with pytest.raises(DoesNotFit, match=r"^bundle: needs .* GiB for a context of 128 tokens, the device has 3.65 GiB"):
        plan(LLAMA, "t4", device="android-8gb")
    with pytest.raises(BadInput, match="--for: t4 is a training host, not a target device"):
        plan(device="t4")
    with pytest.raises(BadInput, match="target: unknown target 'ort-int3'"):
        plan(target="ort-int3")


def test_the_report_names_the_deciding_limit_and_keeps_to_100_columns() -> None:
    for made in (plan(), plan(LLAMA, "t4", device="raspberrypi5-8gb", max_memory_bytes=9 * GIB)):
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(plan_text(made))
        text = console.export_text()
        assert all(len(line) <= 100 for line in text.splitlines())
        for each in (*made.phases, *made.stages.phases):
            assert each.name in text
    assert "budget    9.00 GiB: as asked for; without, 14.0 GiB: 14.56 GiB of t4, 0.6 GiB kept for the CUDA" in text
    assert "raspberrypi5-8gb" in text and " GPU " in text and " host " in text
    assert "disk      up to " in text and "(train " in text and "in the cache" in " ".join(text.split())


def test_a_detected_budget_says_which_limit_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_profile("cpu").model_copy(update={
        "memory_gib": 7.85, "cores": 2, "matmul_tflops": {"fp32": 0.1}, "bandwidth_gb_per_second": 9.0,
        "memory_limit": "cgroup limit of 8.00 GiB in /sys/fs/cgroup/job/memory.max",
    })  # fmt: skip
    assert found.budget_reason == (
        "cgroup limit of 8.00 GiB in /sys/fs/cgroup/job/memory.max; 0.25 GiB kept for the system"
    )
    monkeypatch.setattr(stage_checks, "memory_limit", lambda: Limit(2 * GIB, "ulimit -v of 2.00 GiB"))
    [note] = stage_checks.machine_notes(load_profile("cpu-8gb"), 3 * GIB, None)
    assert note.startswith("this machine has 2.00 GiB (ulimit -v of 2.00 GiB), the plan needs 3.00 GiB")
    assert stage_checks.machine_notes(load_profile("cpu-8gb"), 1 * GIB, None) == []
    assert stage_checks.machine_notes(found, 3 * GIB, None) == []  # its budget is that limit already


# Against what the stages do


def test_recorded_predictions_hold() -> None:
    """bench/stages.py measured them: merge and export of several models, three targets each."""
    rows = json.loads((BENCH / "results" / "stages.json").read_text())["rows"]
    assert {row["stage"] for row in rows} == {"merge", "export ort-int4", "export ort-int8", "export ort-fp32"}
    assert len({row["model"] for row in rows}) >= 2
    for row in rows:
        assert abs(row["predicted_bytes"] / row["measured_bytes"] - 1) <= 0.10, row
        assert row["measured_bytes"] <= row["high_bytes"], row


def test_stages_of_3b_held_to_8_gib_keep_to_their_plan() -> None:
    """bench/large_stages.py measured them, in a group of processes that the system gives no more."""
    found = json.loads((BENCH / "results" / "large_stages.json").read_text())
    assert found["limit_bytes"] == 8 * GIB
    assert {(row["target"], row["stage"]) for row in found["rows"]} >= {
        ("", "merge"), ("ort-int4", "export: build"), ("ort-int4", "export: prove"),
    }  # fmt: skip
    for row in found["rows"]:
        assert abs(row["predicted_bytes"] / row["measured_bytes"] - 1) <= 0.03, row
        assert row["measured_bytes"] <= min(row["high_bytes"], 8 * GIB), row


def test_a_streamed_proof_keeps_tables_of_the_rows_that_there_are() -> None:
    from edgeft.exporting.room import question_of
    from edgeft.memory import proof

    def tables(**settings: object) -> int:
        made = plan(LLAMA, "t4", max_length=64, **settings)
        question = question_of(made)
        assert proof.streams(question, made.training, 8 * GIB)
        return proof._tables(question, made.training, 3).bytes

    row = 3 * 4 * 128_256 * 64  # three tables; every token counts as trained
    assert tables(eval_rows=2) == 2 * row
    assert tables(eval_rows=400) == row // 64 * (stages.LOGIT_BYTES // 4 // 128_256)


@pytest.mark.parametrize("settings", [{"tuner": "lora"}, {"tuner": "lora", "rank": 24}, {"tuner": "full"}])
def test_a_merge_needs_what_was_planned(
    settings: dict[str, Any],
    plan_file: Any,
    checkpoint_folder: Path,
    tmp_path: Path,
) -> None:
    path = plan_file(max_steps=1, **settings)
    run(path, tmp_path / "train")
    source = Checkpoint(checkpoint_folder)
    needs = peak_above_baseline(source, Change(tmp_path / "train", source, tied=False))
    planned = phase(Plan.read(path), "merge")
    assert planned.expected_bytes - term(planned, "process") == needs


def test_a_stage_that_this_machine_cannot_hold_is_refused(
    plan_file: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from edgeft.exporting.export import export
    from edgeft.targets.target import load_target

    run(plan_file(max_steps=1), tmp_path / "train")
    merge(tmp_path / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemAvailable: 65536 kB\n")
    (proc / "self" / "status").write_text("RssAnon: 1024 kB\n")
    monkeypatch.setattr(limits, "PROC", proc)
    monkeypatch.setattr(limits, "CGROUP", tmp_path / "no cgroup")
    wanted = (
        r"needs .* MiB, this process can have 65.0 MiB \(what is available now \(MemAvailable\)\)\n\nhint: copy the"
    )
    with pytest.raises(DoesNotFit, match="^merge: " + wanted):
        merge(tmp_path / "train", tmp_path / "again", wise_alpha=1.0, progress=silent)
    with pytest.raises(DoesNotFit, match="^export: build: " + wanted):
        export(tmp_path / "merged", load_target("ort-int4"), tmp_path / "bundle", device=None, progress=silent)
    assert not (tmp_path / "again").exists() and not (tmp_path / "bundle").exists()


def test_an_export_takes_target_and_device_from_the_plan(
    plan_file: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from typer.testing import CliRunner

    from edgeft.cli import app
    from edgeft.exporting import repair as module

    run(plan_file(max_steps=1, target="ort-int8", device="laptop-16gb"), tmp_path / "train")
    merge(tmp_path / "train", tmp_path / "merged", wise_alpha=1.0, progress=silent)
    asked: list[tuple[str, str | None]] = []

    def stand_in(merged: Path, target: Any, out: Path, *, device: str | None, **_: Any) -> None:
        asked.append((target.name, device))
        raise BadInput("test", "asked enough")

    monkeypatch.setattr(module, "export_named", stand_in)
    CliRunner().invoke(app, ["export", str(tmp_path / "merged")])
    CliRunner().invoke(app, ["export", str(tmp_path / "merged"), "--target", "ort-fp32"])
    assert asked == [("ort-int8", "laptop-16gb"), ("ort-fp32", "laptop-16gb")]
    assert sha256_file(tmp_path / "merged" / "merged.json")


def test_resuming_reads_the_optimizers_states_whole_and_parameters_one_at_a_time(
    plan_file: Any,
    tmp_path: Path,
) -> None:
    """The files that a run leaves are as large as the terms of its plan and disk say."""
    path = plan_file(max_steps=4, checkpoint_steps=2, tuner="full")
    written: list[tuple[int, int]] = []

    def note(stage: str, done: int, total: int, numbers: dict[str, float]) -> None:
        for folder in tmp_path.glob(".train.work/step-*"):
            sizes = ((folder / name).stat().st_size for name in ("state.pt", "parameters.safetensors"))
            written.append((next(sizes), next(sizes)))

    run(path, tmp_path / "train", progress=note)
    made = Plan.read(path)
    resume, (states, parameters) = phase(made, "resume"), max(written)
    assert 0 <= states - term(resume, "optimizer states") <= 128 * 1024
    assert parameters == pytest.approx(4 * made.spec.total_parameters, rel=0.05)
    largest = max(tensor.nbytes for tensor in load_file(tmp_path / "train" / "changed.safetensors").values())
    assert term(resume, "one tensor") == largest
    assert resume.expected_bytes < sum(term.bytes for term in next(p for p in made.phases if p.name == "train").terms)


def test_a_cast_of_the_base_counts_on_a_gpus_host() -> None:
    made = plan(SMALL, "t4", base_precision="fp16")
    found = phase(made, "load")
    assert term(found, "weights") == made.spec.total_parameters * 2  # bf16 on disk, fp16 in memory
    assert term(found, "weight file") == made.spec.total_parameters * 2
    assert torch.bfloat16.itemsize == 2 and made.spec.dtype == "bfloat16"
    assert found.high_bytes - found.expected_bytes > 16 * MIB


def test_paged_states_are_the_hosts() -> None:
    made = plan(LLAMA, "t4", optimizer="paged_adamw8bit", rank=8)
    paged = term(phase(made, "train", "host"), "paged states")
    parameters = 32 * 8 * sum(part.in_features + part.out_features for part in made.spec.linears)
    assert paged == int(parameters * 2 * (1 + 4 / 256))
    assert term(phase(plan(LLAMA, "t4", optimizer="adamw8bit"), "train", "host"), "paged states") == 0


def test_an_8b_model_in_4_bits_has_room_on_machines_of_16_gib() -> None:
    """Read a tensor at a time, no page of its file is there beside it: laptops plan it, and every stage of the line."""
    for profile, target in product(("laptop-16gb", "t4"), ("ort-int4", "ort-int8")):
        made = plan(str(CONFIGS / "llama-3.1-8b"), profile, target=target, stream_layers=False)
        assert made.training.base_precision == "nf4" and made.peak_bytes <= made.budget_bytes
        small = (profile, target) != ("laptop-16gb", "ort-int8")  # of that one the bundle alone takes more
        assert made.stages.too_large().keys() == (set() if small else {"export: prove"})
        host = [*made.phases, *made.stages.phases] if profile == "laptop-16gb" else made.stages.phases
        assert all(each.high_bytes - stages.file_bytes(each) <= 15 * GIB for each in host if each.where != "target")
        assert {part.name for part in made.phases[0].terms}.isdisjoint({"weight file", "cast"})


@pytest.mark.parametrize("target", ["auto", "ort-int8"])
def test_what_an_export_is_given_is_what_its_plan_says(target: str, tmp_path: Path) -> None:
    """One that chooses its target has computed before the builder starts, and waits beside it with what it holds."""
    made = plan(target=target)
    planned = [each.expected_bytes for each in made.stages.phases if each.name.startswith("export")]
    given = [check_room(made, each, tmp_path, computed=target == "auto") for each in likely(tuple(candidates(target)))]
    assert max(given) == max(planned)
    build, named = phase(made, "export: build"), phase(plan(target="ort-int4"), "export: build")
    assert (term(build, "process") > term(named, "process")) == (target == "auto")


def test_a_stage_that_took_more_than_its_high_estimate_is_told() -> None:
    made = plan()
    most = max(each.high_bytes for each in made.stages.phases if each.name.startswith("export"))
    assert above_high(made, "export", most) == above_high(made, "export", None) == []
    [line] = above_high(made, "export", most + 2**20)
    assert "export took" in line and "at most" in line
    assert above_high(made, "export", most + 2**20, most + 2**21) == []  # another target than was planned for
    assert above_high(made, "merge", phase(made, "merge").high_bytes + 1)
