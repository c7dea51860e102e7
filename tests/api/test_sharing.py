"""Uploads, against a hub that runs here: what arrives is what was proven, with a card, and no path of this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

import edgeft
from edgeft.api.sharing import pack
from edgeft.errors import BadInput, EdgeftError, ParityFailed
from edgeft.exporting.bundle import Bundle
from edgeft.models import hub


@dataclass
class Hub:
    """As much of the hub as an upload talks to. Small files go within the commit, `large` ones by Git LFS before it."""

    address: str = ""
    tokens: set[str] = field(default_factory=lambda: {"hf_right"})
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    large: tuple[str, ...] = ()
    stored: dict[str, bytes] = field(default_factory=dict)  # by sha256
    full: bool = False


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token not in made.tokens:
                return self.answer(401, {"error": "Invalid credentials"})
            if self.path.endswith(".git/info/lfs/objects/batch"):
                found = [{**each, "actions": {"upload": {"href": f"{made.address}/store/{each['oid']}"}}}
                         for each in json.loads(raw)["objects"]]  # fmt: skip
                return self.answer(200, {"transfer": "basic", "objects": found})
            if self.path == "/api/repos/create":
                asked = json.loads(raw)
                name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                made.repositories.setdefault(name, {})
                made.private |= {name} if asked.get("private") or asked.get("visibility") == "private" else set()
                return self.answer(200, {"url": f"{made.address}/{name}"})
            if self.path == "/api/validate-yaml":  # of a README.md, before it is uploaded
                text = json.loads(raw)["content"]
                header = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
                wrong = [] if isinstance(header, dict) else [{"message": "no mapping"}]
                return self.answer(200, {"errors": wrong, "warnings": []})
            _, _, _, owner, name, what, *_ = self.path.partition("?")[0].split("/")
            if what == "preupload":
                files = [{"path": each["path"], "uploadMode": "lfs" if each["path"] in made.large else "regular",
                          "shouldIgnore": False} for each in json.loads(raw)["files"]]  # fmt: skip
                return self.answer(200, {"files": files})
            for line in filter(None, raw.split(b"\n")):
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    made.repositories[f"{owner}/{name}"][entry["value"]["path"]] = content
                if entry["key"] == "lfsFile":
                    content = made.stored[entry["value"]["oid"]]
                    made.repositories[f"{owner}/{name}"][entry["value"]["path"]] = content
            self.answer(200, {"commitUrl": f"{made.address}/{owner}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40})

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if made.full:
                return self.answer(403, {"error": "no room"})
            made.stored[self.path.rpartition("/")[2]] = content
            self.answer(200, {})

        def do_GET(self) -> None:
            self.answer(404, {"error": "not here"})

        def answer(self, code: int, document: dict[str, Any]) -> None:
            body = json.dumps(document).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", made.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_looked", {})
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield made
    server.shutdown()


@pytest.fixture(scope="module")
def job(merged_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder up to its bundle."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    shutil.copytree(merged_folder.parent, folder)
    shutil.rmtree(folder / "merged")
    edgeft.export(edgeft.merge(folder / "train"), target="ort-int4")
    return folder


def holds_no_path(files: dict[str, bytes], folder: Path) -> bool:
    places = [str(folder).encode(), str(Path.home()).encode() + b"/", b"/tmp/"]
    return not any(place in content for content in files.values() for place in places)


def test_a_bundle_arrives_whole_and_runs(here: Hub, job: Path, tmp_path: Path) -> None:
    address = edgeft.push(job / "bundle", "me/model", token="hf_right", private=True)
    assert address.endswith("/commit/" + "a" * 40) and here.private == {"me/model"}
    arrived = here.repositories["me/model"]
    for name, content in arrived.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    edgeft.verify(tmp_path)  # every hash, and the golden vectors
    assert holds_no_path(arrived, job)


LARGE = ("model.onnx.data", "tokenizer.json")


def test_large_files_go_by_git_lfs(here: Hub, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    here.large = LARGE
    edgeft.push(job / "bundle", "me/model", token="hf_right")
    assert {hashlib.sha256(content).hexdigest() for content in here.stored.values()} == set(here.stored)
    assert len(here.stored) == len(LARGE)
    for name, content in here.repositories["me/model"].items():
        (tmp_path / name).write_bytes(content)
    edgeft.verify(tmp_path, replay=False)
    here.full = True
    with pytest.raises(BadInput, match=r"me/other: was not uploaded: .*(no room|403)"):
        edgeft.push(job / "bundle", "me/other", token="hf_right")
    assert here.repositories["me/other"] == {}  # no commit names what never arrived


def test_a_store_that_cannot_be_reached_commits_nothing(here: Hub, job: Path) -> None:
    here.large = LARGE  # and this hub gives no token for Xet, which the client takes where it is installed
    with pytest.raises(BadInput, match="me/model: was not uploaded: "):
        edgeft.push(job / "bundle", "me/model", token="hf_right")
    assert here.repositories["me/model"] == {} and here.stored == {}


def test_a_merged_checkpoint_goes_with_its_card_and_without_its_record(here: Hub, job: Path) -> None:
    edgeft.push(job / "merged", "me/merged", token="hf_right", base="org/base")
    arrived = here.repositories["me/merged"]
    assert "merged.json" not in arrived and {"model.safetensors", "config.json", "tokenizer.json"} <= set(arrived)
    card = arrived["README.md"].decode()
    assert "base_model: org/base" in card and "## On a device" in card and holds_no_path(arrived, job)
    (job / "merged" / "README.md").write_text("# Mine\n")
    edgeft.push(job / "merged", "me/merged", token="hf_right")
    assert here.repositories["me/merged"]["README.md"] == b"# Mine\n"
    (job / "merged" / "README.md").unlink()


def test_an_adapter_names_a_base_that_others_have(here: Hub, job: Path) -> None:
    with pytest.raises(
        BadInput, match=r"its base is a folder of this machine, .*: nobody else has it\n\nhint: name it"
    ):
        edgeft.push(job / "train", "me/adapter", token="hf_right")
    edgeft.push(job / "train", "me/adapter", token="hf_right", base="org/base")
    arrived = here.repositories["me/adapter"]
    assert json.loads(arrived["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert arrived["adapter_model.safetensors"] == (job / "train" / "adapter_model.safetensors").read_bytes()
    assert "train.json" not in arrived and holds_no_path(arrived, job)


def test_what_failed_its_proof_or_has_none_stays_here(here: Hub, job: Path, tmp_path: Path) -> None:
    shutil.copytree(job, tmp_path / "run")
    manifest = tmp_path / "run" / "bundle" / "bundle.json"
    whole = Bundle.read(manifest)
    for change, said in (
        ({"failed": "rung 'merged'"}, "failed its proof: rung 'merged'"),
        ({"proof": None}, "never proven"),
    ):
        whole.model_copy(update=change).write(manifest)
        with pytest.raises(ParityFailed, match=said):
            edgeft.push(manifest.parent, "me/bad", token="hf_right")
    failed = tmp_path / "run" / "bundle.failed"
    failed.mkdir()
    for rung, refused in (("merged", True), ("artifact", False)):
        whole.model_copy(update={"failed": f"parity ladder, rung {rung!r} against 'x': y"}).write(
            failed / "bundle.json"
        )
        if refused:
            with pytest.raises(ParityFailed, match="failed the proof of its export"):
                pack(tmp_path / "run" / "merged")
        else:  # rounding was to blame: the merge is what was trained
            assert pack(tmp_path / "run" / "merged").kind == "merged checkpoint"
    assert here.repositories == {}


def test_what_was_changed_afterwards_stays_here(job: Path, tmp_path: Path) -> None:
    shutil.copytree(job, tmp_path / "run")
    for name, kind in (("bundle/genai_config.json", ParityFailed), ("merged/config.json", BadInput)):
        path = tmp_path / "run" / name
        path.write_text(path.read_text() + " ")
        with pytest.raises(kind, match=path.name):
            pack(path.parent)
    with pytest.raises(BadInput, match=r"holds no train\.json, merged\.json or bundle\.json"):
        pack(tmp_path)


def test_without_a_token_or_a_hub_it_says_so(here: Hub, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(BadInput, match=r"there is no token for the hub\n\nhint: hf auth login"):
        edgeft.push(job / "bundle", "me/model")
    with pytest.raises(BadInput, match=r"me/model: was not uploaded: .*(Invalid credentials|401)"):
        edgeft.push(job / "bundle", "me/model", token="hf_wrong")
    with pytest.raises(BadInput, match=r"a//b: was not uploaded"):
        edgeft.push(job / "bundle", "a//b", token="hf_right")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EdgeftError, match="the hub cannot be reached"):
        edgeft.push(job / "bundle", "me/model", token="hf_right")
    assert here.repositories == {}


def test_the_command_lists_and_uploads(here: Hub, job: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": here.address, "HF_TOKEN": "hf_right", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "edgeft", "push", str(job / "bundle"), "me/model"]
    listed = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, env=environment)
    assert listed.returncode == 0 and "bundle.json" in listed.stdout and not here.repositories, listed.stderr
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.strip() == f"{here.address}/me/model/commit/{'a' * 40}", done.stderr
    assert set(here.repositories["me/model"]) == {line.split()[0] for line in listed.stdout.splitlines()}
