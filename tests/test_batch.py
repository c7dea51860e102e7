"""Does a batch give each row the answer that it gets alone, however its cache is shared and its run is ended?"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundles import ROWS, bundle, ctrl_c_as_usual, script

from edgeft.machines.runner import runner_module

run = runner_module()
SYSTEM = "Name the section of the package. Answer with its name alone, as in these: " + ROWS[0]


def rows(count: int) -> list[dict[str, Any]]:
    """Conversations of two systems in turn, some with an earlier answer in common, two alike, one of plain length."""
    made: list[dict[str, Any]] = []
    for number in range(count):
        messages = [{"role": "system", "content": SYSTEM[number % 2 :]}]
        if number % 3 == 0:
            messages += [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
        made.append({"id": f"r{number}", "messages": [*messages, {"role": "user", "content": ROWS[number // 2]}]})
    return [*made, {"prompt": "x"}, {"prompt": "x"}]


def write(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in entries), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def alone(folder: Path, entries: list[dict[str, Any]], *arguments: str) -> list[dict[str, Any]]:
    """Each row by a runner that keeps nothing."""
    runner, options = run.Runner(folder), run.parse([*arguments])
    made = []
    for number, entry in enumerate(entries):
        asked = run.batch_row("row", number, json.dumps(entry).encode()).asked
        made.append(run.reply(runner, options, run.prompt_ids(runner, options, asked)))
    return [
        {**({"id": entry["id"]} if "id" in entry else {}), **each} for entry, each in zip(entries, made, strict=True)
    ]


def batch(folder: Path, file: Path, out: Path, *arguments: str) -> int:
    return int(run.main(["--bundle", str(folder), "--batch", str(file), "--out", str(out), *arguments]))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens each pass of the bundle's session read."""
    sizes, append = list[int](), run.OnnxSession.append

    def counted(session: Any, ids: list[int], every: bool = False) -> Any:
        sizes.append(len(ids))
        return append(session, ids, every)

    monkeypatch.setattr(run.OnnxSession, "append", counted)
    yield sizes


@pytest.mark.parametrize("sampling", [(), ("--temperature", "2", "--seed", "3")])
def test_a_batch_answers_token_for_token_as_its_rows_alone(tmp_path: Path, read: list[int], sampling: Any) -> None:
    entries, arguments = rows(16), ["--chat", "--max-tokens", "6", *sampling]
    expected = alone(bundle("ort-int4"), entries, *arguments)
    each, read[:] = sum(read), []
    assert batch(bundle("ort-int4"), write(tmp_path / "in.jsonl", entries), tmp_path / "out.jsonl", *arguments) == 0
    assert lines(tmp_path / "out.jsonl") == expected
    assert sum(read) < 0.7 * each
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


FAULTS: dict[str, Callable[[Any], None]] = {
    "nothing is forgotten": lambda patch: patch.setattr(run.OnnxSession, "rewind", lambda self, tokens: None),
    "a token too many is kept": lambda patch: patch.setattr(
        run.OnnxSession, "rewind", lambda self, tokens: self.generator.rewind_to(tokens + 1)
    ),
    "the whole common beginning of another row": lambda patch: patch.setattr(
        run, "common_length", lambda first, second: min(len(first), len(second))
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_cache_that_was_not_rewound_shows(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries, arguments = rows(6), ["--chat", "--max-tokens", "6"]
    expected = alone(bundle("ort-int4"), entries, *arguments)
    FAULTS[fault](monkeypatch)
    with contextlib.suppress(RuntimeError):  # the runtime's own: the cache is full
        batch(bundle("ort-int4"), write(tmp_path / "in.jsonl", entries), tmp_path / "out.jsonl", *arguments)
    assert not (tmp_path / "out.jsonl").exists() or lines(tmp_path / "out.jsonl") != expected


@pytest.mark.parametrize("name", ["ort-int4", "ort-int8", "ort-fp32"])
def test_what_the_cache_held_changes_no_bit(name: str) -> None:
    """Wherever the common beginning ends, with more room than one prompt needs, in prompts of one to three passes."""
    engine = run.Runner(bundle(name)).engine
    text = [token for row in ROWS[:20] for token in engine.encode(row)]
    other = text[::-1]
    for length in (1, 2, 3, 60, 65, 129, 200, 255, 256, 257, 258, 300):
        ids = text[:length]
        fresh = run.Cache(engine, length + 1)
        after = [np.array(fresh.read(ids)), np.array(fresh.append([7]))]
        shared = run.Cache(engine, 512)
        for common in sorted(
            {0, 1, 7, 43, 64, 107, 256, 257, length - 65, length - 2, length} & set(range(length + 1))
        ):
            shared.read([*ids[:common], *other[: 3 + common % 5]])
            found = [np.array(shared.read(ids)), np.array(shared.append([7]))]
            assert all((a == b).all() for a, b in zip(after, found, strict=True)), (length, common)
            assert shared.ids == [*ids, 7]
        longer = [*ids, 7, 8, 9, 10]
        assert (np.array(run.Cache(engine, 512).read(longer)) == np.array(shared.read(longer))).all()


def test_passes_leave_no_token_alone_but_an_only_one() -> None:
    for length in range(1, 1100):
        parts = list(run.passes(list(range(length))))
        assert [token for part in parts for token in part] == list(range(length))
        assert all(len(part) <= run.PREFILL_TOKENS and len(part) % 16 != 1 for part in parts) or length == 1


def test_answers_that_are_made_at_the_same_time_have_a_cache_each() -> None:
    runner = run.Runner(bundle("ort-int4"))
    prompts = [runner.encode(row, plain=True) for row in ROWS[:3]]
    expected = [runner.greedy(ids, 8, ()) for ids in prompts]
    runner.keep_tokens = 100
    streams = [runner.stream(ids, 8, ()) for ids in prompts]
    assert [list(tokens) for tokens in zip(*zip(*streams, strict=True), strict=True)] == expected
    left = runner.stream(prompts[0], 8, ())
    next(left)
    left.close()
    assert [runner.greedy(ids, 8, ()) for ids in prompts] == expected


def test_a_model_that_cannot_forget_reads_each_prompt_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = rows(6)
    expected = alone(bundle("ort-int4"), entries, "--chat", "--max-tokens", "4")

    def refuse(session: Any, tokens: int) -> None:
        raise RuntimeError("RewindTo is currently not supported for this model")

    monkeypatch.setattr(run.OnnxSession, "rewind", refuse)
    write(tmp_path / "in.jsonl", entries)
    assert batch(bundle("ort-int4"), tmp_path / "in.jsonl", tmp_path / "out", "--chat", "--max-tokens", "4") == 0
    assert lines(tmp_path / "out") == expected


class Stateful:
    """An engine whose numbers depend on what a pass holds, as 8-bit activations that share one scale do."""

    shares = False

    def start(self, room: int, grammar: object = None) -> Any:
        return SimpleNamespace(append=lambda ids: np.eye(8)[sum(ids) % 8], rewind=lambda tokens: pytest.fail("rewound"))


def test_an_engine_whose_numbers_depend_on_the_pass_keeps_no_cache() -> None:
    runner = object.__new__(run.Runner)
    runner.engine, runner.context_tokens, runner.eos_ids, runner.keep_tokens = Stateful(), 50, [], 20
    assert list(runner.stream([1, 2, 3], 2)) == list(runner.stream([1, 2, 3], 2)) == [6, 6]
    assert runner.kept is None


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_goes_on(tmp_path: Path, ending: signal.Signals) -> None:
    entries, arguments = rows(60), ["--chat", "--max-tokens", "60"]
    file, out, part = write(tmp_path / "in.jsonl", entries), tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    command = [sys.executable, str(bundle("ort-int4") / "run.py"), "--batch", str(file), "--out", str(out), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=ctrl_c_as_usual)
    while process.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 3):
        time.sleep(0.002)
    process.send_signal(ending)
    said = process.communicate()[1]
    assert process.returncode == (130 if ending == signal.SIGINT else -ending) and not out.exists()
    if ending == signal.SIGINT:
        assert f"of {len(entries)} rows are answered: the same command goes on from there" in said
    kept = part.read_bytes()[: part.read_bytes().rfind(b"\n") + 1]
    part.write_bytes(kept + b'31 {"text": "half a li')
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (
        f"{kept.count(chr(10).encode()) - 1} of {len(entries)} rows were answered before" in done.stderr
        and not part.exists()
    )
    assert batch(bundle("ort-int4"), file, tmp_path / "at once", *arguments) == 0
    assert out.read_bytes() == (tmp_path / "at once").read_bytes()
    for line in kept.decode().splitlines()[1:]:
        place, _, text = line.partition(" ")
        assert out.read_text().splitlines()[int(place)] == text


def test_a_run_that_ended_before_its_journal_went_ends_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = write(tmp_path / "in.jsonl", rows(2)), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run.os, "unlink", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        assert batch(bundle("ort-int4"), file, out, "--chat", "--max-tokens", "2") == 130
    first = out.read_bytes()
    assert batch(bundle("ort-int4"), file, out, "--chat", "--max-tokens", "2") == 0
    assert out.read_bytes() == first and sorted(os.listdir(tmp_path)) == ["in.jsonl", "out"]


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (("--max-tokens", "3"), True),
        (("--system", "x"), True),
        ((), False),
    ],
)
def test_another_batchs_answers_are_not_taken_up(
    change: tuple[str, ...], refused: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "out"
    journal = run.Journal(out, {"batch": "another"})
    journal.add(0, '{"text": "x"}')
    before = journal.path.read_bytes()
    options = run.parse(["--chat", "--max-tokens", "2"])
    if not refused:
        sha256 = run.read_batch(file)[1]
        chosen = {name: getattr(options, name) for name in run.ANSWERED_BY}
        own = run.read_manifest(bundle("ort-int4"))[run.SELF_HASH]
        journal.path.unlink()
        run.Journal(out, {"batch": sha256, "bundle": own, "options": chosen}).add(0, '{"text": "kept"}')
    code = batch(bundle("ort-int4"), file, out, "--chat", "--max-tokens", "2", *change)
    assert code == int(refused)
    if refused:
        assert "out.part: holds no answers of this batch, by this bundle, with these options" in capsys.readouterr().err
        assert journal.path.read_bytes() == before
    else:
        assert lines(out)[0] == {"text": "kept"}


@pytest.mark.parametrize("text", [b"my notes", b"my notes\n", b"\xff\n", b"{}\nx\n", b"1\n"])
def test_a_file_that_is_no_journal_is_left_alone(
    text: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.part").write_bytes(text)
    assert batch(bundle("ort-int4"), write(tmp_path / "in", [{"prompt": "a"}]), tmp_path / "out") == 1
    assert "out.part: holds no answers of this batch" in capsys.readouterr().err
    assert (tmp_path / "out.part").read_bytes() == text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: cannot be read: Expecting property name"),
        (b"", "line 2: is empty"),
        (
            b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
            "line 2: ends with an answer, so that nothing is asked",
        ),
        (b"3", "line 2: has no prompt and no messages, or both: 3"),
        (b'{"text": "x"}', "line 2: has no prompt and no messages, or both"),
        (b'{"prompt": "x", "messages": []}', "line 2: has no prompt and no messages, or both"),
        (b'{"prompt": 3}', "line 2: 'prompt' is no text: 3"),
        (b'{"prompt": "x", "completion": "y"}', "line 2: has keys that are not used: completion"),
        (b'{"prompt": "x", "tools": []}', "line 2: has keys that are not used: tools"),
        (b'{"messages": []}', "line 2: is no list of messages"),
        (b'{"messages": [{"content": "x"}]}', "line 2: message 1 has no 'role'"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [1]}', "line 2: 'tools' is no list of objects"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "line 2: this model continues plain prompts"),
        (b'{"prompt": ""}', "line 2: is empty"),
        (b'{"prompt": "' + b"x y " * 600 + b'"}', "line 2: 1801 tokens and an answer do not fit the context of 512"),
        (b'{"prompt": "\\ud800"}', "line 2: is no text"),
        (b"\xff", "line 2: cannot be read: "),
        (b"[" * 100_000, "line 2: cannot be read: it is nested too deeply"),
        (b"x" * (run.MOST_BYTES + 9), "line 2: is longer than the 16 MiB that are read"),
    ],
)
def test_a_bad_row_is_one_error_with_its_line(
    line: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    assert batch(bundle("ort-int4"), tmp_path / "in.jsonl", tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert out == "" and f"in.jsonl, {message}" in err and "Traceback" not in err
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_several_bad_rows_are_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").write_text('{"prompt": "a"}\n' + "3\n" * 7)
    assert batch(bundle("ort-int4"), tmp_path / "in", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "7 lines cannot be used" in said and "line 6" in said and "line 7" not in said and "... and 2 more" in said


def test_what_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "in", [{"prompt": "a"}])
    (tmp_path / "out").write_text("mine")
    assert batch(bundle("ort-int4"), file, tmp_path / "out") == 1
    assert "out: is there already" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"
    (tmp_path / "in").write_text("")
    assert batch(bundle("ort-int4"), file, tmp_path / "new") == 1
    assert "there are no rows in it" in capsys.readouterr().err
    assert batch(bundle("ort-int4"), tmp_path / "missing", tmp_path / "new") == 1
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--batch", "x"], ["--out", "x"], ["--batch", "x", "--out", "y", "z"], ["--serve", "z"], ["--serve", "--verify"]],
)
def test_options_that_do_not_go_together_are_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.parse(arguments)
    assert caught.value.code == 2


def test_lines_are_served_as_they_come_and_a_conversation_goes_on(read: list[int]) -> None:
    folder, asked = bundle("ort-int4"), [{"role": "user", "content": ROWS[0]}]
    arguments = ["--chat", "--max-tokens", "5"]
    command = [sys.executable, str(folder / "run.py"), "--serve", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        for turn in range(3):
            entry = {"id": turn, "messages": asked}
            process.stdin.write(json.dumps(entry) + "\nnonsense\n")
            process.stdin.flush()
            made = json.loads(process.stdout.readline())
            assert made == alone(folder, [entry], *arguments)[0]
            assert "line" in json.loads(process.stdout.readline())["error"]
            asked += [{"role": "assistant", "content": made["text"]}, {"role": "user", "content": "and?"}]
        process.stdin.close()
        assert process.wait() == 0
    assert script(folder, "--serve", stdin="").stdout == ""
