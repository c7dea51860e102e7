"""A model on the hub while that cannot be reached: one look, no waiting, no word but the error's; the cache serves."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tiny import ROOT

from edgeft.errors import BadInput
from edgeft.models import hub
from edgeft.models.config_file import config_path
from edgeft.models.headers import local_folder


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Connections that were tried: none succeeds, as where no name can be resolved."""
    tried: list[Any] = []

    def fail(place: Any, timeout: float) -> Any:
        tried.append(place)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(hub.socket, "create_connection", fail)
    monkeypatch.setattr(hub, "_looked", {})
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tried


def test_one_look_says_that_the_hub_cannot_be_reached(
    looks: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s for the hub"))
    with caplog.at_level(logging.DEBUG, "huggingface_hub"):
        with pytest.raises(
            BadInput, match="org/never-fetched: no such folder, and the hub cannot be reached\n\nhint: go"
        ):
            config_path("org/never-fetched")
        with pytest.raises(
            BadInput, match="fetched as a hub model: the hub cannot be reached, and it is not whole in the"
        ):
            local_folder("org/never-fetched")
    assert looks == [("hub.example", 443)] and caplog.text == ""


def test_what_was_fetched_before_is_read_from_the_cache(
    looks: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert config_path("org/name") == snapshot / "config.json"


def test_a_proxy_knows_what_lies_behind_it(looks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://127.0.0.1:9"})
    assert hub.reachable() and not looks


def test_an_answering_hub_is_asked(looks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.socket, "create_connection", lambda place, timeout: socket.socket())
    assert hub.ask(lambda *given, **named: (given, named), "org/name", revision="x") == (
        ("org/name",),
        {"revision": "x"},
    )


@pytest.mark.cold
def test_the_command_says_it_in_two_lines() -> None:
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "edgeft", "plan", "--model", "org/never-fetched", "--profile", "t4", "--out", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr == (
        "edgeft: org/never-fetched: no such folder, and the hub cannot be reached\n\n"
        "hint: go online, or give the folder of a model that is on this machine\n"
    )
