"""The whole line on a tiny model, by the verbs as a user types them, and every message of what can go wrong."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import warm
from tiny import ROOT

SYSTEM = "Answer with one word."


def edgeft(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    return warm.edgeft(*arguments, code=code)


def typed(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As a user starts it: a Python of its own, and so have its children."""
    command = [sys.executable, "-m", "edgeft", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def line(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """build folder of one whole run, chat rows, in a path with a space."""
    folder = tmp_path_factory.mktemp("a build")
    rows = [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"Section of lib{i}?"},
                {"role": "assistant", "content": ("libs", "doc")[i % 2]},
            ]
        }
        for i in range(24)
    ]
    data = folder / "my rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pins = ("epochs=6", "batch_size=4", "rank=8", "learning_rate=5e-3", "eval_rows=8")
    settings = [part for pin in pins for part in ("--set", pin)]
    plan = ("plan", "--model", checkpoint_folder, "--profile", "cpu-8gb", "--data", data, *settings)
    typed(*plan, "--out", folder / "plan.json")
    typed("train", folder / "plan.json")
    typed("merge", folder / "train", "--wise-alpha", 0.9)
    done = typed("export", folder / "merged", "--target", "ort-fp32", "--device", "raspberrypi5-8gb")
    assert "on raspberrypi5-8gb, full context" in done.stdout
    return folder


def test_the_line_ends_with_a_proven_bundle(line: Path) -> None:
    bundle = json.loads((line / "bundle" / "bundle.json").read_text())
    proof = bundle["proof"]
    assert [rung["name"] for rung in proof["rungs"]] == ["trained", "merged", "stored", "artifact"]
    assert all(rung["problems"] == [] for rung in proof["rungs"])
    assert proof["rungs"][3]["mean_kl_nats"] < 1e-6 and proof["rungs"][3]["top1_agreement"] == 1.0
    assert proof["rungs"][0]["loss"] == pytest.approx(proof["rungs"][0]["loss_before"], abs=1e-5)
    assert list(proof["scores"]) == ["base", "fine-tuned", "merged", "ort-fp32"]
    assert proof["scores"]["ort-fp32"]["loss"] == pytest.approx(proof["scores"]["merged"]["loss"], abs=1e-4)
    assert proof["scores"]["fine-tuned"]["loss"] < proof["scores"]["base"]["loss"]
    names = [(pair["before"], pair["after"]) for pair in proof["pairs"]]
    assert names == [("base", "fine-tuned"), ("fine-tuned", "merged"), ("merged", "ort-fp32"), ("base", "ort-fp32")]
    assert proof["gain_nats"] > 0 and proof["pairs"][0]["loss"] is None  # one row held out says nothing of others
    assert bundle["prompt_format"] == "chat"
    here = json.loads((line / "bundle.measured.json").read_text())
    # planned with an array of 64 MiB for each core that --bench reads by; tests run on one thread
    assert 0.7 < here["measured_peak_bytes"] / here["predicted_peak_bytes"] < 1.05


def test_every_stage_names_its_input(line: Path) -> None:
    from edgeft.documents import sha256_file

    stages = [
        line / "plan.json",
        line / "train" / "train.json",
        line / "merged" / "merged.json",
        line / "bundle" / "bundle.json",
    ]
    for before, after in itertools.pairwise(stages):
        assert json.loads(after.read_text())["input_sha256"] == sha256_file(before)


def test_running_twice_does_nothing(line: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in line.rglob("*") if path.is_file()}
    assert "is up to date" in edgeft("train", line / "plan.json").stderr
    assert "is up to date" in edgeft("merge", line / "train", "--wise-alpha", 0.9).stderr
    again = edgeft("export", line / "merged", "--target", "ort-fp32", "--device", "raspberrypi5-8gb")
    assert "is up to date" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in line.rglob("*") if path.is_file()}


def test_bundle_runs_and_verifies_by_its_own_file(line: Path, tmp_path: Path) -> None:
    moved = tmp_path / "on the device"
    shutil.copytree(line / "bundle", moved)
    done = subprocess.run([sys.executable, moved / "run.py", "--verify"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert edgeft("verify", line / "bundle").returncode == 0
    answer = edgeft("run", line / "bundle", "Section of lib3?", "--max-tokens", "4").stdout
    direct = subprocess.run(
        [sys.executable, moved / "run.py", "Section of lib3?", "--max-tokens", "4"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer == direct.stdout and answer.strip()
    data = bytearray((moved / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (moved / "model.onnx.data").write_bytes(data)
    broken = subprocess.run([sys.executable, moved / "run.py", "--verify"], capture_output=True, text=True)
    assert broken.returncode == 4 and "model.onnx.data" in broken.stdout + broken.stderr


def test_the_device_gives_the_system_message_that_was_trained(line: Path) -> None:
    """What run.py encodes for a bare question is what the golden vector of that very row was recorded from."""
    bundle = json.loads((line / "bundle" / "bundle.json").read_text())
    assert bundle["system"] == SYSTEM and SYSTEM in (line / "bundle" / "README.md").read_text()
    golden = bundle["golden"][0]
    system, user = golden["messages"]
    assert system == {"role": "system", "content": SYSTEM}
    asked = ("run", line / "bundle", user["content"], "--max-tokens", 1, "--json")
    assert json.loads(edgeft(*asked).stdout)["prompt_ids"] == golden["ids"]
    assert json.loads(edgeft(*asked, "--system", "").stdout)["prompt_ids"] != golden["ids"]


def test_only_a_system_message_that_every_row_has_is_the_bundles(checkpoint_folder: Path, tmp_path: Path) -> None:
    from edgeft.data.dataset import TextTokenizer
    from edgeft.exporting.bundle import GoldenInput
    from edgeft.exporting.golden import shared_system
    from edgeft.settings.job import make_job

    tokenizer, path = TextTokenizer(checkpoint_folder), tmp_path / "rows.jsonl"

    def found(*systems: str | None, seen: str | None = "A") -> str | None:
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        rows = [[*([{"role": "system", "content": text}] if text else []), *turns] for text in systems]
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        first = [{"role": "system", "content": seen}] if seen else []
        prompts = [GoldenInput(messages=[*first, turns[0]])]
        job = make_job(model=str(checkpoint_folder), profile="cpu-8gb", data=str(path))
        return shared_system(job, prompts, tokenizer)

    assert found("A", "A") == "A"
    assert found("A", "B") is None
    assert found("A", None) is None
    assert found("B", "B") is None  # the validation rows have another
    assert found("A", "A", seen=None) is None


def test_an_adapter_of_another_tool_is_merged_but_has_nothing_to_prove_with(
    line: Path, checkpoint_folder: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "adapter"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(line / "train" / name, foreign / name)
    merge = ("merge", foreign, "--base", checkpoint_folder, "--wise-alpha", 0.9, "--out", tmp_path / "merged")
    made = json.loads(edgeft(*merge, "--json").stdout)
    assert made["kind"] == "LORA" and made["base"] == str(checkpoint_folder)
    merged = [folder / "model.safetensors" for folder in (line / "merged", tmp_path / "merged")]
    assert merged[0].read_bytes() == merged[1].read_bytes()
    assert "is up to date" in edgeft(*merge).stderr
    done = edgeft("export", tmp_path / "merged", "--target", "ort-fp32", code=1)
    assert "was merged from what edgeft did not train: it has no data to prove with" in done.stderr


def test_exporting_twice_gives_the_same_bytes(line: Path, tmp_path: Path) -> None:
    """Proof, golden vectors and bill of materials included: only what a clock said is beside the folder."""
    again = tmp_path / "another name"
    edgeft("export", line / "merged", "--target", "ort-fp32", "--device", "raspberrypi5-8gb", "--out", again)
    first = {path.name: path.read_bytes() for path in (line / "bundle").iterdir()}
    assert {path.name: path.read_bytes() for path in again.iterdir()} == first
    assert json.loads((line / "bundle.measured.json").read_text())["measured"]["peak_memory_bytes"] > 0
    text = b"".join(first[name] for name in first if name != "model.onnx.data")
    assert str(line.parent).encode() not in text  # no path of this machine
    bill = {entry["bom-ref"]: entry for entry in json.loads(first["sbom.cdx.json"])["components"]}
    assert bill["training data/my rows.jsonl"]["hashes"][0]["content"]


def test_parity_failure_names_the_rung_and_what_would_pass(line: Path, tmp_path: Path) -> None:
    strict = tmp_path / "strict.toml"
    text = (ROOT / "export" / "ort-int4.toml").read_text()
    strict.write_text(re.sub(r"max_mean_kl_nats = [0-9.e-]+", "max_mean_kl_nats = 1e-9", text))
    done = edgeft("export", line / "merged", "--target", strict, "--out", tmp_path / "bundle", code=4)
    assert "edgeft: parity ladder, rung 'artifact' against 'merged': " in done.stderr
    assert re.search(r"hint: edgeft export .*merged.* --target ort-int8  # \d+ KiB, predicted", done.stderr)
    assert not (tmp_path / "bundle").exists() and (tmp_path / "bundle.failed" / "bundle.json").is_file()


def test_a_gguf_target_climbs_the_same_ladder(line: Path, tmp_path: Path) -> None:
    export = ("export", line / "merged", "--target", "gguf-q8_0", "--out", tmp_path / "bundle")
    if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None:
        done = edgeft(*export, code=5)
        assert (
            "hint: pip install" in done.stderr and "[gguf,llama]" in done.stderr and not (tmp_path / "bundle").exists()
        )
        return
    edgeft(*export)
    proof = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["proof"]
    assert [rung["name"] for rung in proof["rungs"]] == ["trained", "merged", "artifact"]
    assert all(rung["problems"] == [] for rung in proof["rungs"])
    assert proof["scores"]["gguf-q8_0"]["loss"] == pytest.approx(proof["scores"]["merged"]["loss"], abs=0.01)
    edgeft("verify", tmp_path / "bundle")
    answer = edgeft("run", tmp_path / "bundle", "Section of lib3?", "--max-tokens", "4").stdout
    assert answer == edgeft("run", line / "bundle", "Section of lib3?", "--max-tokens", "4").stdout


def test_layers_can_be_promoted_by_name(line: Path, tmp_path: Path) -> None:
    export = ("export", line / "merged", "--target", "ort-int4", "--out", tmp_path / "bundle", "--promote")
    done = edgeft(*export, "layers.9", code=1)
    assert "edgeft: eight_bit: no such module: layers.9" in done.stderr and not (tmp_path / "bundle").exists()


def bad(tmp_path: Path, model: Path, case: str) -> tuple[list[object], int, str]:
    """(arguments of `edgeft plan`, exit code, message) of each case."""
    rows = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "a", "completion": " b"}) + "\n"
    plan: list[object] = ["plan", "--profile", "cpu-8gb", "--out", "-", "--model"]
    if case == "missing data":
        return [*plan, model, "--data", rows], 1, f"edgeft: {rows}: no such data file"
    if case == "empty data":
        rows.write_text("")
        return [*plan, model, "--data", rows], 1, f"edgeft: {rows}: there are no rows in it"
    if case == "wrong columns":
        rows.write_text('{"body": "a", "answer": "b"}\n')
        return [*plan, model, "--data", rows], 1, "line 1: has none of the known columns, got ['answer', 'body']"
    if case == "one broken line":
        rows.write_text(good * 3210 + '{"prompt": "a", "compl\n' + good * 2789)
        return [*plan, model, "--data", rows], 1, "1 of 6000 rows cannot be used\nline 3211: not JSON: "
    if case == "no such model":
        return [*plan, tmp_path / "nowhere"], 1, f"edgeft: {tmp_path / 'nowhere'}: "
    if case == "no config":
        (tmp_path / "empty").mkdir()
        return [*plan, tmp_path / "empty"], 1, "config.json"
    if case == "no tokenizer":
        (tmp_path / "bare").mkdir()
        shutil.copyfile(model / "config.json", tmp_path / "bare" / "config.json")
        rows.write_text(good)
        return [*plan, tmp_path / "bare", "--data", rows], 1, "is the shape of a model: it has no tokenizer"
    if case == "adapter":
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
        return [*plan, tmp_path / "adapter"], 1, "org/base"
    if case == "impossible budget":
        return [*plan, model, "--max-memory", "10MiB"], 3, "edgeft: plan: nothing fits 10.0 MiB"
    if case == "unreadable budget":
        return [*plan, model, "--max-memory", "many"], 1, "edgeft: memory size: cannot read 'many'"
    if case == "unknown profile":
        return (
            ["plan", "--model", model, "--profile", "t4-24bg"],
            1,
            "edgeft: profile: unknown profile 't4-24bg'\n\nhint: did you mean",
        )
    if case == "unknown setting":
        return (
            [*plan, model, "--set", "rnak=8"],
            1,
            "edgeft: --set: unknown setting 'rnak'\n\nhint: did you mean 'rank'?",
        )
    assert case == "wrong setting"
    return [*plan, model, "--set", "rank=many"], 1, "edgeft: job: rank: "


CASES = (
    "missing data", "empty data", "wrong columns", "one broken line", "no such model", "no config", "no tokenizer",
    "adapter", "impossible budget", "unreadable budget", "unknown profile", "unknown setting", "wrong setting",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named_with_its_exit_code(case: str, checkpoint_folder: Path, tmp_path: Path) -> None:
    arguments, code, message = bad(tmp_path, checkpoint_folder, case)
    done = edgeft(*arguments, code=code)
    assert message in done.stderr
    assert done.stdout == ""


def test_a_folder_that_no_stage_wrote_is_not_replaced(line: Path, tmp_path: Path) -> None:
    mine = tmp_path / "my model"
    mine.mkdir()
    (mine / "model.safetensors").write_text("precious")
    for verb, source, document in (("merge", "train", "merged.json"), ("export", "merged", "bundle.json")):
        done = edgeft(verb, line / source, "--out", mine, code=1)
        assert f"edgeft: {mine}: exists and holds no {document}: it will not be replaced" in done.stderr
    assert (mine / "model.safetensors").read_text() == "precious"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("train", "nowhere/plan.json"),
            "edgeft: nowhere/plan.json: no such file\n\nhint: run the stage that writes it first",
        ),
        (("merge", "nowhere"), "edgeft: nowhere/train.json: no such file\n\nhint: run edgeft train PLAN first"),
        (("export", "nowhere"), "edgeft: nowhere/merged.json: no such file\n\nhint: run edgeft merge TRAIN first"),
    ],
)
def test_stages_out_of_order(arguments: tuple[str, ...], message: str) -> None:
    assert message in edgeft(*arguments, code=1).stderr


def test_json_is_one_object_on_stdout(checkpoint_folder: Path) -> None:
    done = edgeft("plan", "--model", checkpoint_folder, "--profile", "cpu-8gb", "--out", "-", "--json")
    assert json.loads(done.stdout)["profile"]["name"] == "cpu-8gb"


@pytest.mark.parametrize("verb", ["plan", "train", "merge", "survival", "export", "run", "verify", "sign", "show"])
def test_every_verb_explains_itself(verb: str) -> None:
    assert verb in edgeft("--help").stdout
    assert "Usage" in edgeft(verb, "--help").stdout


def test_lists(tmp_path: Path) -> None:
    names = {entry["name"] for entry in json.loads(edgeft("show", "profiles", "--json").stdout)}
    assert {"cpu", "t4", "raspberrypi5-8gb"} <= names
    assert {entry["name"] for entry in json.loads(edgeft("show", "targets", "--json").stdout)} >= {
        "ort-int4",
        "ort-int8",
        "ort-fp32",
    }
    shown: Any = edgeft("show", "settings").stdout
    assert "learning_rate" in shown and "peak learning rate" in shown
