"""Is an artifact whole or not there at all, and does a broken one say all that is wrong with it?"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pydantic
import pytest

from edgeft import documents
from edgeft.documents import (
    Artifact,
    Strict,
    invalid,
    saving,
    sha256_file,
    sha256_json,
    shipped_folder,
    staging,
    versions,
)
from edgeft.errors import BadInput, EdgeftError


class Inner(Strict):
    rank: int = 8
    learning_rate: float = 1e-3


class Stage(Artifact):
    steps: int
    device: Literal["cpu", "cuda"] = "cpu"
    inner: Inner = Inner()
    places: tuple[int, ...] = ()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# documents


def test_a_document_comes_back_as_it_was_written(tmp_path: Path) -> None:
    made = Stage(steps=3, inner=Inner(rank=4), places=(1, 2), input_sha256="abc", versions={"python": "3"})
    made.write(tmp_path / "stage.json")
    assert Stage.read(tmp_path / "stage.json") == made
    assert names(tmp_path) == ["stage.json"]
    text = (tmp_path / "stage.json").read_text(encoding="utf-8")
    assert text.endswith("}\n") and json.loads(text)["inner"] == {"rank": 4, "learning_rate": 1e-3}
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        made.steps = 4  # type: ignore[misc]


def test_a_reader_sees_the_old_document_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment of the rename the old one is whole, and the new one is already whole beside it."""
    path = tmp_path / "stage.json"
    Stage(steps=1).write(path)
    seen = []
    replace = Path.replace

    def watch(self: Path, target: Path) -> Path:
        seen.append((Stage.read(target).steps, Stage.read(self).steps, self.parent))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    Stage(steps=2).write(path)
    assert seen == [(1, 2, tmp_path)]
    assert Stage.read(path).steps == 2 and names(tmp_path) == ["stage.json"]


def test_an_interrupted_write_leaves_the_old_document_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stage.json"
    Stage(steps=1).write(path)

    def interrupt(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Stage(steps=2).write(path)
    assert Stage.read(path).steps == 1 and names(tmp_path) == ["stage.json"]


def test_a_missing_document_says_what_to_run(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    with pytest.raises(BadInput) as caught:
        Stage.read(path)
    assert str(caught.value) == f"{path}: no such file\n\nhint: run the stage that writes it first"
    with pytest.raises(BadInput) as caught:
        Stage.read(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read: Is a directory"


@pytest.mark.parametrize(
    ("document", "problem", "hint"),
    [
        (
            '{"step": 3}',
            "steps: field required\nunknown key 'step'",
            "did you mean 'steps'?",
        ),
        (
            '{"steps": "many", "device": "tpu", "places": [1, "x"]}',
            "steps: input should be a valid integer, unable to parse string as an integer, got 'many'\n"
            "device: input should be 'cpu' or 'cuda', got 'tpu'\n"
            "places.1: input should be a valid integer, unable to parse string as an integer, got 'x'",
            "",
        ),
        (
            '{"steps": 1, "inner": {"rnk": 2, "learning_rat": 1}}',
            "unknown key 'inner.rnk'\nunknown key 'inner.learning_rat'",
            "did you mean 'rank'?",
        ),
        (
            '{"steps": 1, "zzz": 2}',
            "unknown key 'zzz'",
            "one of device, inner, input_sha256, places, steps, versions",
        ),
        ("[1]", "input should be an object, got [1]", ""),
    ],
)
def test_all_that_is_wrong_with_a_document_is_said_at_once(
    document: str, problem: str, hint: str, tmp_path: Path
) -> None:
    path = tmp_path / "stage.json"
    path.write_text(document)
    with pytest.raises(BadInput) as caught:
        Stage.read(path)
    expected = f"{path}: {problem}" + (f"\n\nhint: {hint}" if hint else "")
    assert str(caught.value) == expected


@pytest.mark.parametrize("content", [b"", b'{"steps": 1', b"\xff\xfe\x00"])
def test_half_a_document(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        Stage.read(path)
    assert str(caught.value).startswith(f"{path}: invalid json: ")


def test_a_long_wrong_value_is_shortened() -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Stage.model_validate({"steps": "x" * 500})
    problem = invalid("here", caught.value, Stage).problem
    assert problem.endswith("got '" + "x" * 119) and problem.startswith("steps: ")


# folders


def test_a_folder_is_replaced_as_a_whole_and_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "train"
    with staging(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists() and folder.parent == tmp_path
    assert names(out) == ["a"]
    with staging(out) as folder:
        assert names(folder) == []
        (folder / "b").write_text("2")
        assert names(out) == ["a"]
    assert names(out) == ["b"] and names(tmp_path) == ["train"]


def test_parents_are_made(tmp_path: Path) -> None:
    with staging(tmp_path / "build" / "cpu" / "train") as folder:
        (folder / "a").touch()
    assert names(tmp_path / "build" / "cpu" / "train") == ["a"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_folder_and_nothing_else(error: type[BaseException], tmp_path: Path) -> None:
    out = tmp_path / "train"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(error), staging(out) as folder:
        (folder / "new").write_text("new")
        raise error("stopped")
    assert names(tmp_path) == ["train"] and (out / "old").read_text() == "old"


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "train"
    out.mkdir()
    (out / "old").write_text("old")
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"), staging(out) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["train"] and names(out) == ["old"]


def test_what_a_killed_run_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    """Killed without a chance to tidy up, as by the system when memory runs out."""
    out = tmp_path / "train"
    code = (
        "import os, signal, sys; from pathlib import Path; from edgeft.documents import staging\n"
        "with staging(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True)
    assert done.returncode == -9
    left = names(tmp_path)
    assert len(left) == 1 and left != ["train"] and names(tmp_path / left[0]) == ["half"]
    with staging(out) as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["train"] and names(out) == []


def test_through_a_link_the_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk" / "train").mkdir(parents=True)
    (tmp_path / "disk" / "train" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "train")
    for name in ("a", "b"):
        with staging(tmp_path / "link") as folder:
            (folder / name).touch()
        assert names(tmp_path / "disk" / "train") == [name]
    assert names(tmp_path) == ["disk", "link"] and names(tmp_path / "disk") == ["train"]
    assert (tmp_path / "link").is_symlink()


def test_a_file_in_the_place_of_the_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("notes")
    with pytest.raises(BadInput) as caught, staging(tmp_path / "train"):
        pass
    hint = "choose another place with --out"
    assert str(caught.value) == f"{tmp_path / 'train'}: is a file, a folder is written here\n\nhint: {hint}"
    assert (tmp_path / "train").read_text() == "notes" and names(tmp_path) == ["train"]


@pytest.mark.parametrize("out", [".", "..", "{tmp}/work", "{tmp}/home", "{tmp}", "/"])
def test_the_current_folder_and_the_users_own_are_never_replaced(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("work", "home"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    place = Path(out.format(tmp=tmp_path))
    with pytest.raises(BadInput) as caught, staging(place):
        pass
    hint = "choose a folder for this alone with --out"
    assert str(caught.value) == f"{place}: would be replaced as a whole\n\nhint: {hint}"
    assert names(tmp_path) == ["home", "work"] and names(tmp_path / "work") == ["precious"]
    with staging(Path("inside")) as folder:  # below it is where everything goes
        (folder / "a").touch()
    assert names(tmp_path / "work" / "inside") == ["a"]


# failed writes


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR])
def test_a_place_that_cannot_be_written(code: int, tmp_path: Path) -> None:
    with pytest.raises(EdgeftError) as caught, saving(tmp_path / "x"):
        raise OSError(code, os.strerror(code))
    problem = f"cannot write: {os.strerror(code)}"
    assert str(caught.value) == f"{tmp_path / 'x'}: {problem}\n\nhint: choose another place with --out"
    assert (caught.value.exit_code, caught.value.__suppress_context__) == (1, True)


def test_a_full_disk_says_how_much_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def disk_usage(path: Path) -> tuple[int, int, int]:
        asked.append(path)
        return type("Usage", (), {"free": 3 * 2**20})()

    monkeypatch.setattr("edgeft.documents.shutil.disk_usage", disk_usage)
    path = tmp_path / "not" / "yet" / "there"
    with pytest.raises(EdgeftError) as caught, saving(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    hint = "free some space or choose another place with --out (make: out=...), then run the same command again"
    assert str(caught.value) == f"{path}: the disk is full (3.00 MiB left)\n\nhint: {hint}"
    assert asked == [tmp_path]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ValueError("other"), BadInput("a", "b")])
def test_other_errors_pass_unchanged(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, saving(tmp_path):
        raise error
    assert caught.value is error


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EdgeftError, match="cannot write: ") as caught, staging(tmp_path / "file" / "train"):
        pass
    assert caught.value.where == str(tmp_path / "file" / "train")


# hashes and versions


@pytest.mark.parametrize("size", [0, 1, 3 * 2**20 + 7])
def test_the_hash_of_a_file(size: int, tmp_path: Path) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "x").write_bytes(data[:size])
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data[:size]).hexdigest()


def test_the_hash_of_a_value_does_not_see_the_order_of_keys() -> None:
    assert sha256_json({"a": [1, 2], "b": None}) == sha256_json({"b": None, "a": [1, 2]})
    assert sha256_json([]) == hashlib.sha256(b"[]").hexdigest()
    different = [{"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": [1]}, {"b": 1}, [1, 2], [2, 1]]
    assert len({sha256_json(value) for value in different}) == len(different)


def test_versions_are_those_installed_and_nothing_is_imported_for_them() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == importlib.metadata.version("torch")
    code = "import sys; from edgeft.documents import versions; versions(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_absent_packages_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    documents._version.cache_clear()
    assert "peft" not in versions() and "torch" in versions()
    documents._version.cache_clear()  # nobody else is to be told so


@pytest.mark.parametrize(("name", "suffix"), [("profiles", "*.toml"), ("export", "*.toml")])
def test_shipped_folders_are_found(name: str, suffix: str) -> None:
    assert list(shipped_folder(name).glob(suffix))
