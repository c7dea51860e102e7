"""Is everything that can be done to a bundle's folder found, and is the culprit named?"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import bundle, reseal, script, seal

from edgeft.machines.runner import runner_module

RUNNER = runner_module()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "my bundle"
    shutil.copytree(bundle("ort-int4"), folder)
    return folder


def found(folder: Path) -> list[str]:
    return list(RUNNER.verify(folder, replay=False))


def test_any_changed_byte_of_any_file_is_found_and_named(copy: Path) -> None:
    chance = random.Random(8)
    names = sorted(path.name for path in copy.iterdir())
    assert "bundle.json" in names and len(names) == 10
    for name in names:
        whole = (copy / name).read_bytes()
        for _ in range(40):
            raw = bytearray(whole)
            raw[chance.randrange(len(raw))] ^= chance.randrange(1, 256)
            (copy / name).write_bytes(raw)
            problems = found(copy)
            assert any(name in line.split(": ")[0] for line in problems), (name, problems)
        (copy / name).write_bytes(whole)
    assert found(copy) == []


def swap(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "t")
    (folder / "genai_config.json").rename(folder / "tokenizer.json")
    (folder / "t").rename(folder / "genai_config.json")


def link_with_the_right_bytes(folder: Path) -> None:
    (folder / "model.onnx.data").rename(folder.parent / "elsewhere")
    (folder / "model.onnx.data").symlink_to("../elsewhere")


def link_inside(folder: Path) -> None:
    (folder / "also run.py").symlink_to("run.py")


def folder_behind_a_link(folder: Path) -> None:
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "numpy.py").write_text("")
    (folder / "numpy").symlink_to(folder.parent / "outside")


def folder_for_a_file(folder: Path) -> None:
    (folder / "run.py").unlink()
    (folder / "run.py").mkdir()


def extra_in_a_folder(folder: Path) -> None:
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "run.cpython-311.pyc").write_bytes(b"x")


def extra_copy(folder: Path) -> None:
    shutil.copyfile(folder / "run.py", folder / "run2.py")


def replaced_by_another_of_the_same_bundle(folder: Path) -> None:
    shutil.copyfile(folder / "model.onnx", folder / "chat_template.jinja")


def manifest_behind_a_link(folder: Path) -> None:
    (folder / "bundle.json").rename(folder.parent / "bundle.json")
    (folder / "bundle.json").symlink_to(folder.parent / "bundle.json")


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (
            swap,
            [
                "genai_config.json: {} bytes, the export wrote {}, it holds what the export wrote as tokenizer.json",
                "tokenizer.json: {} bytes, the export wrote {}, it holds what the export wrote as genai_config.json",
            ],
        ),
        (
            lambda folder: (folder / "model.onnx").rename(folder / "model2.onnx"),
            [
                "model.onnx: missing",
                "model2.onnx: not part of the export, it holds what the export wrote as model.onnx",
            ],
        ),
        (
            link_with_the_right_bytes,
            ["model.onnx.data: a link to ../elsewhere, outside the bundle, the export wrote a file"],
        ),
        (
            lambda folder: (folder / "loop").symlink_to("loop"),
            ["loop: not part of the export (a link to loop)"],
        ),
        (link_inside, ["also run.py: not part of the export (a link to run.py)"]),
        (folder_behind_a_link, ["numpy: not part of the export (a link to {}, outside the bundle)"]),
        (folder_for_a_file, ["run.py: an empty folder, the export wrote a file"]),
        (lambda folder: (folder / "empty").mkdir(), ["empty: not part of the export (an empty folder)"]),
        (extra_in_a_folder, ["__pycache__/run.cpython-311.pyc: not part of the export"]),
        (extra_copy, ["run2.py: not part of the export, it holds what the export wrote as run.py"]),
        (
            replaced_by_another_of_the_same_bundle,
            ["chat_template.jinja: {} bytes, the export wrote {}, it holds what the export wrote as model.onnx"],
        ),
        (lambda folder: os.mkfifo(folder / "pipe"), ["pipe: not part of the export (a device, pipe or socket)"]),
        (manifest_behind_a_link, ["bundle.json: a link to {}, outside the bundle, not a file"]),
        (lambda folder: os.truncate(folder / "run.py", 10), ["run.py: 10 bytes, the export wrote {}"]),
    ],
)
def test_what_was_done_to_the_folder_is_named(copy: Path, change: Callable[[Path], object], lines: list[str]) -> None:
    change(copy)
    problems = found(copy)
    assert len(problems) == len(lines)
    for problem, line in zip(problems, lines, strict=True):
        position = 0
        for part in line.split("{}"):
            assert part in problem[position:], problems
            position = problem.index(part, position) + len(part)
        assert problem.startswith(line.split("{}")[0]) and (problem.endswith(line.split("{}")[-1]))


def test_a_manifest_that_names_files_outside_the_bundle_does_not_reach_them(copy: Path) -> None:
    (copy.parent / "secret").write_text("x", encoding="utf-8")
    reseal(copy, lambda manifest: manifest["files"].update({"../secret": {}}))
    (line,) = found(copy)
    assert line.endswith("bundle.json: '../secret' is a file name that may lead out of the bundle")


@pytest.mark.parametrize("entry", [{"sha256": []}, {"size_bytes": {}}, {"sha256": None, "size_bytes": None}])
def test_a_manifest_of_odd_types_is_a_finding_not_a_crash(copy: Path, entry: dict[str, object]) -> None:
    manifest = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    manifest["files"]["run.py"] |= entry
    (copy / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert [line.split(": ")[0] for line in found(copy)] == ["bundle.json", "run.py"]
    (copy / "bundle.json").write_text("[" * 100_000, encoding="utf-8")
    (line,) = found(copy)
    assert "bundle.json: cannot be read: " in line


HOSTILE: list[Any] = [
    None, True, -1, 10**400, 1e308, float("inf"), "", "../x", "/etc/passwd", "a\\b", "\ud800", "x" * 5000, [], {}, [[]],
    {"file": "../x"}, {"all": None}, {"all": {"file": "/etc/passwd"}}, {"../x": {}}, [None], {"": {}},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON document something stands, as keys from the top."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in inner for place in [(*path, key), *places(each, (*path, key))]]


def test_no_manifest_is_a_crash(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any value in any place, hashes made right again: findings, an answer or one line, and nothing outside is read."""
    whole = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    whole["adapter_inputs"] = {"model.layers.0.mlp.up_proj.lora_A.weight": [64, 0]}
    shapes = {"model.layers.0.mlp.up_proj.lora_A.weight": [64, 4]}
    entry = {"file": "tokenizer.json", "base_sha256": "ab" * 32, "parameters": shapes, "prompt_format": "chat"}
    whole["adapters"] = {"all": entry | {"golden": [], "rank": 4, "train_sha256": "", "system": "Be brief."}}
    whole["environment"], whole["system"] = {"cpu": "x", "features": [], "runtime": "numpy 1"}, "Be brief."
    chance, every = random.Random(9), places(whole)
    wanted = [place for place in every if place[0] not in ("golden", "predicted", "target")]
    for place in [*wanted, *chance.sample(every, 60)]:
        manifest = json.loads(json.dumps(whole))
        inner = manifest
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = chance.choice(HOSTILE)
        seal(copy, manifest)
        assert isinstance(RUNNER.verify(copy, replay=False), list), place
        for arguments in (["x", "--max-tokens", "1"], ["x", "--max-tokens", "1", "--adapter", "all", "--json"]):
            code = RUNNER.main(["--bundle", str(copy), *arguments])
            assert code in (0, 1, 4), (place, inner[place[-1]])
            assert code == 0 or ": " in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize("vectors", [[None], [{}], [{"messages": None, "text": 3, "plain": True}]])
def test_golden_vectors_of_odd_types_are_a_finding(copy: Path, vectors: Any) -> None:
    reseal(copy, lambda manifest: manifest.update(golden=vectors))
    (line,) = RUNNER.verify(copy)
    assert line.startswith("bundle.json: the golden vectors cannot be read: ")


def test_golden_tokens_beyond_the_vocabulary_are_a_finding(copy: Path) -> None:
    for ids in ([10**6], [-1], [0] * 600, []):
        reseal(copy, lambda manifest, ids=ids: manifest["golden"][0].update(ids=ids))  # type: ignore[misc]
        assert any("golden vector 1" in line for line in RUNNER.verify(copy))


def test_a_disk_that_fails_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(RUNNER, "sha256_of", broken)
    assert found(copy)[0] == "README.md: cannot be read: Input/output error"


def test_files_beside_the_runner_are_not_imported_by_it(copy: Path) -> None:
    modules = ("hashlib", "json", "base64", "numpy", "onnxruntime_genai")
    for name in modules:
        (copy / f"{name}.py").write_text("raise SystemExit('imported a stranger')", encoding="utf-8")
    done = script(copy, "--verify")
    assert done.returncode == 4
    named = [line.split(": ")[0] for line in done.stderr.splitlines()[1:]]
    assert sorted(named) == sorted(f"{name}.py" for name in modules)
    for name in modules:
        (copy / f"{name}.py").unlink()
    (copy / "numpy.py").write_text("raise SystemExit('imported a stranger')", encoding="utf-8")
    assert json.loads(script(copy, "hello", "--max-tokens", "1", "--json").stdout)["prompt_ids"]


def test_hashes_alone_do_not_stop_one_who_makes_them_right_again(copy: Path) -> None:
    """What an unsigned bundle cannot show: see test_sign for what then does."""
    path = copy / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8") + "{# changed #}", encoding="utf-8")
    assert found(copy) != []
    reseal(copy, lambda manifest: None)
    assert found(copy) == []
