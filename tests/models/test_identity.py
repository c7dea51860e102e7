"""Does every stage see that a file which it reads is no longer the one that was recorded, and only then?"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import asked_to_stop_at

import edgeft.models.identity
from edgeft.api import current
from edgeft.documents import cache_folder, sha256_file
from edgeft.errors import BadInput
from edgeft.exporting.export import export, export_adapters, made_from
from edgeft.exporting.repair import export_smallest
from edgeft.merging.merge import merge, verify_merged
from edgeft.merging.result import MergedCheckpoint
from edgeft.merging.survival import survival
from edgeft.merging.sweep import sweep
from edgeft.models.identity import DATA, SMALL_FILES, WEIGHTS, cached_folder, sha256_of, weights_sha256
from edgeft.planning.layer_scores import _digest
from edgeft.planning.plan import Plan, make_plan, request_digest
from edgeft.progress import silent
from edgeft.settings.job import Job, make_job
from edgeft.targets.target import load_target
from edgeft.training.result import TrainResult
from edgeft.training.train import train
from edgeft.training.work import work_folder

TARGET = load_target("ort-int4")
ROWS = [
    {"prompt": f"Package: lib{i}\nSection:", "completion": f" {('libs', 'doc', 'python')[i % 3]}"} for i in range(24)
]


def carry_out(folder: Path, out: Path, progress: Any = silent) -> TrainResult:
    plan = folder / "plan.json"
    return train(Plan.read(plan), out, plan_sha256=sha256_file(plan), progress=progress)


@pytest.fixture(scope="module")
def line(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a base, data, and what became of them up to the merge; beside it a run that was stopped."""
    folder = tmp_path_factory.mktemp("identity")
    shutil.copytree(checkpoint_folder, folder / "base")
    for name, rows in (("train", ROWS), ("valid", ROWS[:4]), ("test", ROWS[4:8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_plan(job_of(folder)).write(folder / "plan.json")
    carry_out(folder, folder / "train")
    merge(folder / "train", folder / "merged", wise_alpha=1.0, progress=silent)

    stop = asked_to_stop_at(1)

    with pytest.raises(KeyboardInterrupt):
        carry_out(folder, folder / "stopped", stop)
    return folder


def job_of(folder: Path, **settings: Any) -> Job:
    values = {"profile": "cpu-8gb", "batch_size": 4, "max_steps": 2, "rank": 4, "eval_rows": 4, "tuner": "lora"}
    data = {
        key: str(folder / f"{name}.jsonl") for key, name in (("data", "train"), ("valid", "valid"), ("test", "test"))
    }
    return make_job(model=str(folder / "base"), **data, **values, **settings)


@pytest.fixture
def plant(line: Path) -> Iterator[Callable[[str], Path]]:
    """Changes the file of a role by one byte, and puts all files back at the end."""
    held: dict[Path, bytes | None] = {}

    def change(role: str) -> Path:
        path = file_of(line, role)
        held[path] = path.read_bytes() if path.is_file() else None
        content = bytearray(held[path] or b"{}")
        if path.suffix == ".safetensors":
            content[-1] ^= 1
        else:
            content += b"\n" if path.suffix != ".jsonl" else json.dumps(ROWS[0]).encode() + b"\n"
        path.write_bytes(content)
        return path

    yield change
    for path, content in held.items():
        path.unlink() if content is None else path.write_bytes(content)


def file_of(folder: Path, role: str) -> Path:
    places = dict(zip(DATA, ("train.jsonl", "valid.jsonl", "test.jsonl"), strict=True))
    places |= {
        WEIGHTS: "base/model.safetensors",
        "adapter": "train/adapter_model.safetensors",
        "adapter's scale": "train/adapter_config.json",
        "merged weights": "merged/model.safetensors",
        "merged tokenizer": "merged/tokenizer.json",
    }
    return folder / places.get(role, f"base/{role}")


STAGES: dict[str, Callable[[Path, Path], Any]] = {
    "train": lambda line, out: carry_out(line, out),
    "resume": lambda line, out: carry_out(line, line / "stopped"),
    "merge": lambda line, out: merge(line / "train", out, wise_alpha=1.0, progress=silent),
    "sweep": lambda line, out: sweep(line / "train", TARGET, select="best"),
    "survival": lambda line, out: survival(line / "merged", TARGET),
    "export": lambda line, out: export(line / "merged", TARGET, out, device=None, progress=silent),
    "repair": lambda line, out: export_smallest(
        line / "merged", [TARGET], out, asked="auto", device=None, progress=silent
    ),
    "adapters": lambda line, out: export_adapters({"a": line / "train"}, TARGET, out, device=None, progress=silent),
}
MERGED = ("merged weights", "merged tokenizer")
ADAPTER = ("adapter", "adapter's scale")
READS: dict[str, tuple[str, ...]] = {
    "train": (*SMALL_FILES, *DATA),
    "resume": (WEIGHTS, *SMALL_FILES, *DATA),
    "merge": (WEIGHTS, *SMALL_FILES, *ADAPTER),
    "sweep": (WEIGHTS, *SMALL_FILES, *ADAPTER, *DATA),
    "survival": (WEIGHTS, *SMALL_FILES, *MERGED),
    "export": (WEIGHTS, *SMALL_FILES, *ADAPTER, *MERGED, *DATA),
    "repair": (WEIGHTS, *SMALL_FILES, *ADAPTER, *MERGED, *DATA),
    "adapters": (WEIGHTS, *SMALL_FILES, *ADAPTER, *DATA),
}


@pytest.mark.parametrize("stage, role", [(stage, role) for stage, roles in READS.items() for role in roles])
def test_a_changed_input_is_refused_by_name(stage: str, role: str, line: Path, plant: Any, tmp_path: Path) -> None:
    changed = plant(role)
    with pytest.raises(BadInput) as caught:
        STAGES[stage](line, tmp_path / "out")
    text = str(caught.value)
    assert (role if role in DATA or role == WEIGHTS else changed.name) in text.partition("\n\nhint: ")[0]
    assert any(word in text for word in ("put the file", "make it again")), text
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", [WEIGHTS, *SMALL_FILES, "training data", "validation data"])
def test_scores_of_layers_follow_every_input(role: str, line: Path, plant: Any) -> None:
    job = job_of(line, layers="sparse", layer_score="hidden")
    before = _digest(make_plan(job_of(line)), job)
    plant(role)
    assert _digest(make_plan(job_of(line)), job) != before


@pytest.mark.parametrize("role", [*SMALL_FILES, *DATA])
def test_a_plan_is_made_anew_when_what_it_reads_has_changed(role: str, line: Path, plant: Any) -> None:
    before = make_plan(job_of(line))
    plant(role)
    after = make_plan(job_of(line))
    assert before.request_sha256 != after.request_sha256
    assert {key for key in {**before.inputs, **after.inputs} if before.inputs.get(key) != after.inputs.get(key)} == {
        role
    }


def test_weights_are_not_hashed_by_a_plan(line: Path, plant: Any) -> None:
    before = make_plan(job_of(line))
    plant(WEIGHTS)
    assert make_plan(job_of(line)) == before and WEIGHTS not in before.inputs


def test_what_was_read_is_recorded(line: Path) -> None:
    result = TrainResult.read(line / "train" / "train.json")
    assert set(result.inputs) == {WEIGHTS, *DATA} | {name for name in SMALL_FILES if (line / "base" / name).is_file()}
    assert result.inputs["training data"] == sha256_file(line / "train.jsonl")
    assert result.inputs[WEIGHTS] == result.base_sha256 == weights_sha256(line / "base")
    bill = {component.role: component.sha256 for component in made_from(result, line / "base")}
    assert {role: bill[role] for role in DATA} == {role: result.inputs[role] for role in DATA}
    merged = MergedCheckpoint.read(line / "merged" / "merged.json")
    assert merged.inputs == {role: digest for role, digest in result.inputs.items() if role not in DATA}
    assert merged.files["model.safetensors"] == sha256_file(line / "merged" / "model.safetensors")


def test_the_same_content_elsewhere_or_later_is_accepted(line: Path, tmp_path: Path) -> None:
    base = line / "base"
    for path in (*base.iterdir(), *line.glob("*.jsonl")):
        os.utime(path)
    verify_merged(line / "merged")
    base.rename(tmp_path / "moved")
    base.symlink_to(tmp_path / "moved")
    verify_merged(line / "merged")
    base.unlink()
    shutil.copytree(tmp_path / "moved", base)  # other inodes
    verify_merged(line / "merged")
    merge(line / "train", tmp_path / "again", wise_alpha=0.5, progress=silent)


def test_a_stray_file_that_would_be_read_is_named(line: Path) -> None:
    stray = line / "merged" / "model.safetensors.index.json"
    stray.write_text("{}")
    try:
        with pytest.raises(BadInput, match=r"model\.safetensors\.index\.json: was not there, now is"):
            verify_merged(line / "merged")
    finally:
        stray.unlink()


# where the trained folder lies


def test_a_merge_elsewhere_finds_what_was_merged(line: Path, tmp_path: Path) -> None:
    merge(line / "train", tmp_path / "far" / "away", wise_alpha=1.0, progress=silent)
    assert verify_merged(tmp_path / "far" / "away")[1].samefile(line / "train")
    shutil.copytree(line / "train", tmp_path / "copy" / "train")
    shutil.copytree(tmp_path / "far" / "away", tmp_path / "copy" / "out")
    document = tmp_path / "copy" / "out" / "merged.json"
    merged = MergedCheckpoint.read(document)
    nowhere = merged.trained.model_copy(update={"absolute": "/nowhere", "relative": "../nowhere"})
    merged.model_copy(update={"trained": nowhere}).write(document)
    assert verify_merged(document.parent)[1] == tmp_path / "copy" / "train"  # beside it
    (tmp_path / "copy" / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match=r"does not hold the training result .*\n\nhint: say where it lies with --train"):
        verify_merged(document.parent)
    assert verify_merged(document.parent, tmp_path / "elsewhere")[1] == tmp_path / "elsewhere"
    (tmp_path / "elsewhere" / "train.json").write_text("{}")
    with pytest.raises(BadInput, match=r"elsewhere: does not hold the training result"):
        verify_merged(document.parent, tmp_path / "elsewhere")


def test_checkpoints_of_a_run_on_other_weights_can_be_left_behind(line: Path, plant: Any, tmp_path: Path) -> None:
    shutil.copytree(work_folder(line / "stopped"), work_folder(tmp_path / "train"))
    plant(WEIGHTS)
    with pytest.raises(BadInput, match=r"hint: put the files back to go on, or start over: remove .*\.train\.work"):
        carry_out(line, tmp_path / "train")
    shutil.rmtree(work_folder(tmp_path / "train"))
    assert carry_out(line, tmp_path / "train").inputs[WEIGHTS] == weights_sha256(line / "base")


# hashing


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is large enough to be looked up, and not changed for a minute; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(edgeft.models.identity, "CACHED_BYTES", 10)
    monkeypatch.setattr(edgeft.models.identity, "SETTLED_SECONDS", -1.0)
    path = tmp_path / "weights"
    path.write_bytes(b"0123456789abcdef")
    return path


def test_a_large_file_is_hashed_once(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = sha256_of(large)
    assert digest == sha256_file(large)
    monkeypatch.setattr(edgeft.models.identity, "sha256_file", lambda path: pytest.fail("hashed again"))
    assert sha256_of(large) == digest


def test_a_change_is_seen_although_size_and_time_are_the_same(large: Path) -> None:
    before, known = sha256_of(large), large.stat()
    large.write_bytes(b"0123456789abcdeX")
    os.utime(large, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert sha256_of(large) == sha256_file(large) != before


def test_a_file_that_may_still_change_is_not_kept(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgeft.models.identity, "SETTLED_SECONDS", 2.0)
    sha256_of(large)
    assert not (cache_folder() / "sha256").exists()
    os.utime(large, (1, 1))  # its other time, that of its inode, is now
    sha256_of(large)
    assert not (cache_folder() / "sha256").exists()


@pytest.mark.parametrize("broken", [b"", b"{", b"[1]", b'{"key": 1}', b"\xff\xfe", b'{"key": [], "sha256": 3}'])
def test_a_broken_cache_is_made_again(broken: bytes, large: Path) -> None:
    sha256_of(large)
    kept = next((cache_folder() / "sha256").iterdir())
    whole = kept.read_bytes()
    kept.write_bytes(broken)
    assert sha256_of(large) == sha256_file(large)
    assert kept.read_bytes() == whole


def test_no_cache_is_needed(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert sha256_of(large) == sha256_file(large)


# what is up to date


def held(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("role", [WEIGHTS, "tokenizer.json", "training data", "adapter"])
def test_a_training_on_changed_files_is_not_up_to_date(role: str, line: Path, plant: Any) -> None:
    said: list[str] = []
    assert current.same_training(line / "train", held(line / "train" / "train.json"), said.append) and not said
    name = plant(role).name
    assert not current.same_training(line / "train", held(line / "train" / "train.json"), said.append)
    assert said[0].startswith("not up to date: ") and any(role in line or name in line for line in said)


@pytest.mark.parametrize("role", [WEIGHTS, "chat_template.jinja", *MERGED])
@pytest.mark.parametrize("kind", ["own", "foreign"])
def test_a_merge_of_changed_files_is_not_up_to_date(
    kind: str, role: str, line: Path, plant: Any, tmp_path: Path
) -> None:
    folder = line / "merged"
    if kind == "foreign":
        folder = tmp_path / "merged"
        merge(line / "train", folder, wise_alpha=1.0, progress=silent, base=str(line / "base"))
    document = held(folder / "merged.json")
    assert current.same_merge(folder, document, print)
    if kind == "foreign" and role in MERGED:
        with open(folder / file_of(line, role).name, "ab") as file:
            file.write(b"\n")
    else:
        plant(role)
    assert not current.same_merge(folder, document, print)


@pytest.mark.parametrize("role", [WEIGHTS, "training data", *MERGED, "its own"])
def test_a_bundle_of_changed_files_is_not_up_to_date(role: str, line: Path, plant: Any, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("graph")
    bundle = {"files": {"model.onnx": {"sha256": sha256_file(tmp_path / "model.onnx")}}}
    assert current.same_bundle(tmp_path, bundle, line / "merged", print)
    if role == "its own":
        (tmp_path / "model.onnx").write_text("other")
    else:
        plant(role)
    assert not current.same_bundle(tmp_path, bundle, line / "merged", print)


def test_a_hub_model_is_known_by_its_snapshot(line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    snapshot = tmp_path / "snapshots" / "abc"
    shutil.copytree(line / "base", snapshot)
    found = {"config.json": str(snapshot / "config.json")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda model, name: found.get(name))
    job = job_of(line).model_copy(update={"model": "org/tiny"})
    assert cached_folder("org/tiny") == snapshot
    before = request_digest(job, cached_folder("org/tiny"))
    (snapshot / "tokenizer.json").write_text("{}")  # another revision was fetched
    assert request_digest(job, cached_folder("org/tiny")) != before
    found.clear()
    assert cached_folder("org/tiny") is None and cached_folder("no such: model") is None


def test_a_token_that_the_embedding_has_no_row_for_is_refused_by_the_plan(line: Path, tmp_path: Path) -> None:
    shutil.copytree(line / "base", tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    tokenizer = held(path)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": 4500, "content": "<extra>", "special": True, **flags})
    path.write_text(json.dumps(tokenizer))
    job = job_of(line).model_copy(update={"model": str(tmp_path / "base")})
    make_plan(job)  # no row has it
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"prompt": "a <extra>", "completion": " b"}]))
    with pytest.raises(BadInput, match=r"rows\.jsonl: token \d+ is in it, the model's embedding has 400 rows"):
        make_plan(job.model_copy(update={"data": str(rows)}))
