"""Does a bundle that is served answer each client as it answers alone, and does no client end it or fill its memory?"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from bundles import ROWS, bundle, ctrl_c_as_usual

from edgeft.machines.runner import runner_module

run = runner_module()
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


class Served:
    """A run.py that listens on a port of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [sys.executable, str(folder / "run.py"), "--serve", "0", "--max-tokens", "6", *arguments]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=ctrl_c_as_usual
        )
        assert self.process.stderr is not None
        self.said = self.process.stderr.readline()
        self.port = int(self.said.split("/v1")[0].rpartition(":")[2])

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        link.request("POST" if raw is not None else "GET", path, raw, headers)
        found = link.getresponse()
        text = found.read().decode()
        link.close()
        return found.status, json.loads(text) if found.headers["Content-Type"] == "application/json" else text


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    found = Served(bundle("ort-int4"), "--chat")
    yield found
    found.process.kill()
    found.process.communicate()


def asked(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "any", "messages": [{"role": "user", "content": text}], **more}


def alone(text: str, *arguments: str, chat: bool = True) -> str:
    """The same by a runner of its own."""
    runner, options = run.Runner(bundle("ort-int4")), run.parse(["--max-tokens", "6", *arguments])
    options.format = "chat" if chat else "plain"
    return str(run.reply(runner, options, run.prompt_ids(runner, options, run.Asked(text)))["text"])


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_an_answer_has_openais_form_and_the_bundles_text(served: Served) -> None:
    assert served.said == f"serving http://127.0.0.1:{served.port}/v1, Ctrl-C ends it\n"
    status, made = served.ask(CHAT, asked(ROWS[0]))
    assert status == 200 and made["object"] == "chat.completion"
    (choice,) = made["choices"]
    assert choice["message"] == {"role": "assistant", "content": alone(ROWS[0])}
    assert made["usage"]["completion_tokens"] == 6 and choice["finish_reason"] == "length"
    assert made["usage"]["total_tokens"] == made["usage"]["prompt_tokens"] + 6
    status, made = served.ask(PLAIN, {"prompt": ROWS[1], "max_tokens": 3})
    assert status == 200 and made["choices"][0]["text"] == alone(ROWS[1], "--max-tokens", "3", chat=False)
    parts = [{"type": "text", "text": ROWS[0][:5]}, {"type": "text", "text": ROWS[0][5:]}]
    made = served.ask(CHAT, {"messages": [{"role": "user", "content": parts}]})[1]
    assert made["choices"][0]["message"]["content"] == alone(ROWS[0])
    drawn = [
        served.ask(CHAT, asked(ROWS[2], temperature=3, seed=seed))[1]["choices"][0]["message"] for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert served.ask("/v1/models")[1]["data"][0]["id"] == bundle("ort-int4").name
    assert served.ask("/health") == (200, {"status": "ok"})


def test_a_streamed_answer_is_the_whole_one_in_pieces(served: Served) -> None:
    status, text = served.ask(CHAT, asked(ROWS[0], stream=True, stream_options={"include_usage": True}))
    found = events(text)
    pieces = [each["choices"][0]["delta"].get("content", "") for each in found if each["choices"]]
    assert status == 200 and "".join(pieces) == alone(ROWS[0]) and len(pieces) > 3
    assert found[-2]["choices"][0]["finish_reason"] == "length" and found[-1]["usage"]["completion_tokens"] == 6
    assert {each["object"] for each in found} == {"chat.completion.chunk"} and len({each["id"] for each in found}) == 1
    text = served.ask(PLAIN, {"prompt": ROWS[0], "stream": True})[1]
    assert "".join(each["choices"][0]["text"] for each in events(text)) == alone(ROWS[0], chat=False)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"garbage", "body: cannot be read: "),
        (b"[" * 100_000, "body: cannot be read: "),
        (b"\xff\xfe", "body: cannot be read: "),
        ([1], "body: is no JSON object"),
        ({}, "messages: is missing"),
        ({"messages": []}, "messages: is no list of messages"),
        ({"messages": [{"content": "x"}]}, "messages: message 1 has no 'role'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages: a content is no text"),
        ({"messages": [{"role": "user"}]}, "messages: a content is no text: None"),
        (asked("x", prompt="y"), "messages: and the other kind are both there"),
        (asked("x", n=2), "n: 2 is not supported"),
        (asked("x", n=True), "n: True is not supported"),
        (asked("x", stop=["a"]), "stop: ['a'] is not supported"),
        (asked("x", shout=True), "shout: True is not supported"),
        (asked("x", temperature="hot"), "temperature: must be a number of at least 0, got 'hot'"),
        (asked("x", temperature=float("nan")), "temperature: must be a number"),
        (asked("x", max_tokens=0), "max_tokens: must be a number of at least 1, got 0"),
        (asked("x", seed=1.5), "seed: must be a number"),
        (asked("word " * 5000), "prompt: "),
        (asked("x", tools="y"), "messages: 'tools' is no list of objects"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_by_name(served: Served, body: Any, problem: str) -> None:
    for streamed in (False, True) if isinstance(body, dict) and body else (False,):
        status, made = served.ask(CHAT, {**body, "stream": True} if streamed else body)
        assert status == 400 and made["error"]["message"].startswith(problem), made
    assert served.ask("/health")[0] == 200


def test_sizes_paths_and_web_pages(served: Served) -> None:
    assert served.ask(CHAT, b" " * (10 * 2**20)) == (413, error("a body may have 1 MiB"))
    assert served.ask("/v1/embeddings", {})[0] == served.ask("/nothing")[0] == 404
    assert served.ask(CHAT, asked("x"), Origin="https://example.org")[0] == 403
    assert served.ask(CHAT, asked("x"), Host="example.org:80")[0] == 403
    for length in ("", "-1", "\u0663", "x"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as link:
            link.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode())
            assert link.recv(2**16).startswith(b"HTTP/1.1 411 ")
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as link:
        link.sendall(b"\x16\x03\x01\x02\x00\r\n\r\n")
        assert b" 400 " in link.recv(2**16)


def error(text: str) -> dict[str, Any]:
    return {"error": {"message": text, "type": "invalid_request_error", "param": None, "code": None}}


def test_four_clients_at_once_get_their_own_answers(served: Served) -> None:
    expected = {row: alone(row) for row in ROWS[:4]}
    assert len(set(expected.values())) > 1

    def client(row: str) -> list[str]:
        return [str(served.ask(CHAT, asked(row))[1]["choices"][0]["message"]["content"]) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(client, ROWS[:4]))
    assert found == [[expected[row]] * 5 for row in ROWS[:4]]


def test_clients_that_hang_up_stop_nobody_and_leave_nothing(served: Served) -> None:
    process = psutil.Process(served.process.pid)

    def leave() -> None:
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as link:
            body = json.dumps(asked(ROWS[0], stream=True, max_tokens=200)).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            link.sendall(head.encode() + body)
            link.recv(64)

    leave()
    served.ask(CHAT, asked(ROWS[0], max_tokens=200))  # a cache as large as any that follows
    before = process.memory_info().rss
    for _ in range(20):
        leave()
    assert served.ask(CHAT, asked(ROWS[0]))[1]["choices"][0]["message"]["content"] == alone(ROWS[0])
    until = time.monotonic() + 30
    while process.num_threads() > 8 and time.monotonic() < until:  # their threads end
        time.sleep(0.1)
    assert process.memory_info().rss < before + 2**23


def test_an_answer_that_nobody_waits_for_ends_at_the_next_token() -> None:
    """Without the mark that the client has gone it would be made to its end."""
    runner, options = run.Runner(bundle("ort-int4")), run.parse(["--chat"])
    counts = []
    for gone in (False, True):
        request = run.Request(True, run.checked(True, asked(ROWS[0], max_tokens=40)))
        if gone:
            request.gone.set()
        run.handled(runner, options, request)
        counts.append(request.parts.qsize())
    assert counts[0] > 10 and counts[1] == 2


def test_more_requests_than_may_wait_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: queue.Queue[Any] = queue.Queue(1)
    server = run.http_server("127.0.0.1", 0, run.http_handler("x", "127.0.0.1", waiting))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with contextlib.closing(http.client.HTTPConnection(*server.server_address, timeout=30)) as first:
        first.request("POST", CHAT, json.dumps(asked("x")))
        until = time.monotonic() + 30
        while not waiting.qsize() and time.monotonic() < until:
            time.sleep(0.01)
        with contextlib.closing(http.client.HTTPConnection(*server.server_address, timeout=30)) as second:
            second.request("POST", CHAT, json.dumps(asked("x")))
            found = second.getresponse()
            assert (found.status, found.headers["Retry-After"]) == (503, "1")
    request = waiting.get()
    assert request.gone.wait(30)  # the first client hung up while it waited
    server.shutdown()
    server.server_close()


def test_ctrl_c_ends_it_and_a_port_in_use_is_said(served: Served) -> None:
    again = [sys.executable, str(bundle("ort-int4") / "run.py"), "--serve", str(served.port)]
    done = subprocess.run(again, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f"--serve 127.0.0.1:{served.port}: cannot listen there: " in done.stderr
    other = Served(bundle("ort-int4"))
    other.process.send_signal(signal.SIGINT)
    assert other.process.communicate(timeout=60) == ("", "") and other.process.returncode == 130


@pytest.mark.parametrize("given", ["port", "70000", "127.0.0.1:", "\u0663"])
def test_a_port_that_is_none_is_a_usage_error(given: str) -> None:
    with pytest.raises(SystemExit) as caught:
        run.parse(["--serve", given])
    assert caught.value.code == 2
