"""Does a bundle's own run.py answer and measure, and does it find and name what is wrong with it?"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import ROWS, bundle, reseal, save_tokenizer, script

from edgeft.data.dataset import TextTokenizer
from edgeft.errors import BadInput
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.bundle import Bundle, GoldenInput, readme
from edgeft.machines import limits
from edgeft.machines.runner import runner_module
from edgeft.targets.target import load_target

NAMES = [
    "README.md", "bundle.json", "chat_template.jinja", "genai_config.json", "model.onnx", "model.onnx.data", "run.py",
    "sbom.cdx.json", "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip


def verify(folder: Path) -> list[str]:
    found = runner_module().verify(folder)
    assert isinstance(found, list)
    return found


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A bundle to damage, in a path with spaces."""
    folder = tmp_path / "my bundle"
    shutil.copytree(bundle("ort-int4"), folder)
    return folder


def test_only_old_python_and_the_standard_library_are_asked_for() -> None:
    source = (bundle("ort-int4") / "run.py").read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 9))
    top = {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
    top |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in top} <= set(sys.stdlib_module_names)
    anywhere = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {name.split(".")[0] for name in anywhere} - set(sys.stdlib_module_names) == {
        "numpy"
    }  # and the runtime, by its name in bundle.json


def test_answers_the_prompt_from_another_folder_as_the_artifact_does(copy: Path, tmp_path: Path) -> None:
    ids = TextTokenizer(copy).encode([ROWS[3]])[0]
    expected = ArtifactModel(copy).greedy(ids, 10, [0, 2])
    plain = script(copy, ROWS[3], "--max-tokens", "10", "--json", cwd=tmp_path)
    assert (plain.returncode, plain.stderr) == (0, "")
    given = json.loads(plain.stdout)
    text = given.pop("text")
    assert given == {"ids": expected, "prompt_ids": ids}
    streamed = script(copy, ROWS[3], "--max-tokens", "10", cwd=tmp_path)
    assert streamed.stdout == text + "\n"
    for arguments in ([], ["-"]):
        piped = script(copy, *arguments, "--max-tokens", "10", stdin=ROWS[3] + "\n")
        assert piped.stdout == streamed.stdout
    assert not (copy / "__pycache__").exists()


def test_text_survives_the_way_through_the_runtimes_tokenizer() -> None:
    runner = runner_module().Runner(bundle("ort-int4"))
    for text in (*ROWS[:50], "Größe: naïve → 12.5%\n\n  tabs\tand ünïcode", "日本語 🙂"):
        assert runner.decode(runner.encode(text, plain=True)) == text


def test_chat_goes_through_the_template(copy: Path) -> None:
    tokenizer = TextTokenizer(copy)
    text = tokenizer.render([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    given = json.loads(script(copy, "hello", "--chat", "--max-tokens", "2", "--json").stdout)
    assert given["prompt_ids"] == tokenizer.encode([text])[0]
    reseal(copy, lambda manifest: manifest.update(prompt_format="chat"))
    assert json.loads(script(copy, "hello", "--max-tokens", "2", "--json").stdout) == given
    plain = json.loads(script(copy, "hello", "--plain", "--max-tokens", "2", "--json").stdout)
    assert plain["prompt_ids"] == tokenizer.encode(["hello"])[0]


def test_sampling_repeats_with_a_seed_and_narrows_to_greedy() -> None:
    runner = runner_module().Runner(bundle("ort-int4"))
    ids = runner.encode(ROWS[0], plain=True)
    draw = [list(runner.stream(ids, 12, (), temperature=3.0, seed=seed)) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    assert all(len(tokens) == 12 for tokens in draw)
    assert list(runner.stream(ids, 12, (), temperature=3.0, top_p=0.0, seed=3)) == runner.greedy(ids, 12, ())


def test_an_answer_ends_where_the_context_ends() -> None:
    runner = runner_module().Runner(bundle("ort-int4"))
    ids = [token for row in ROWS for token in runner.encode(row, plain=True)]
    assert len(runner.greedy(ids[:505], 100, ())) == 512 - 505


def test_bench_measures_and_its_figures_agree_with_each_other(copy: Path) -> None:
    done = script(copy, "--bench", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    made = json.loads(done.stdout)
    assert set(made) == {
        "load_seconds", "prompt_tokens", "new_tokens", "time_to_first_token_seconds", "cores",
        "prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes",
        "weight_bytes_per_token",
        "bandwidth_bytes_per_second", "bound_tokens_per_second", "fraction_of_bound",
    }  # fmt: skip
    assert all(value > 0 for value in made.values())
    assert (made["prompt_tokens"], made["new_tokens"]) == (128, 64)
    bound = made["bandwidth_bytes_per_second"] / made["weight_bytes_per_token"]
    assert made["bound_tokens_per_second"] == pytest.approx(bound)
    assert made["fraction_of_bound"] == pytest.approx(made["decode_tokens_per_second"] / bound)
    text = runner_module().show_bench(made)
    assert "time to first token" in text and "tokens/s" in text and "may stay in the CPU's caches" in text


def test_an_untouched_bundle_verifies(copy: Path) -> None:
    done = script(copy, "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    signed = "not signed: the hashes show damage, not who made this"
    assert done.stdout == f"verified: every file and every golden vector is as exported\n{signed}\n"
    given = json.loads(script(copy, "--verify", "--json").stdout)
    assert given == {"ok": True, "problems": [], "signature": signed, "notes": []}
    elsewhere = subprocess.run(
        [sys.executable, str(bundle("ort-fp32") / "run.py"), "--bundle", str(copy), "--verify"], check=False
    )
    assert elsewhere.returncode == 0


def test_every_file_is_covered() -> None:
    assert sorted(path.name for path in bundle("ort-int4").iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", [0.0, 0.37, 1.0])
def test_one_flipped_bit_is_found_and_named(copy: Path, name: str, where: float) -> None:
    raw = bytearray((copy / name).read_bytes())
    raw[int(where * (len(raw) - 1))] ^= 1
    (copy / name).write_bytes(raw)
    problems = verify(copy)
    assert any(name in line.split(": ")[0] for line in problems), problems
    others = [other for other in NAMES if other != name and any(line.startswith(f"{other}: ") for line in problems)]
    if name != "bundle.json":  # a flip in the list of hashes puts the file of that hash in doubt as well
        assert others in ([], ["tokenizer.json"])  # a template's or tokenizer's golden vectors name the tokenizer


def test_white_space_in_the_manifest_counts_too(copy: Path) -> None:
    path = copy / "bundle.json"
    path.write_bytes(path.read_bytes() + b" ")
    assert verify(copy)[0] == "bundle.json: changed since the export"


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    problems = verify(copy)
    assert any(name in line and ("missing" in line or "no such file" in line) for line in problems), problems


def test_a_truncated_and_an_extra_file_are_named_together(copy: Path) -> None:
    path = copy / "model.onnx.data"
    whole = path.stat().st_size
    os.truncate(path, whole - 1)
    (copy / "notes.txt").write_text("x", encoding="utf-8")
    done = script(copy, "--verify")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.splitlines() == [
        f"{copy}: not what was exported",
        f"model.onnx.data: {whole - 1} bytes, the export wrote {whole}",
        "notes.txt: not part of the export",
        "golden vectors: not replayed, the files above come first",
    ]


def test_a_file_of_ones_own_is_to_be_moved_out(copy: Path) -> None:
    (copy / "notes.txt").write_text("x", encoding="utf-8")
    done = script(copy, "x")
    assert done.returncode == 4 and "notes.txt: not part of the export" in done.stderr
    assert "move it out of this folder" in done.stderr and "copy the bundle again" not in done.stderr
    (copy / "tokenizer.json").unlink()
    done = script(copy, "x")
    assert done.returncode == 4 and "copy the bundle again" in done.stderr


def test_a_wrong_tokenizer_with_the_right_hash_is_found_by_the_golden_vectors(copy: Path) -> None:
    save_tokenizer(copy, words=500)
    shutil.copyfile(bundle("ort-int4") / "tokenizer_config.json", copy / "tokenizer_config.json")
    reseal(copy, lambda manifest: None)
    problems = verify(copy)
    start = "tokenizer.json: wrong tokenizer, golden vector "
    assert problems and all(line.startswith(start) for line in problems)
    done = script(copy, "--verify", "--json")
    assert done.returncode == 4 and json.loads(done.stdout)["problems"] == problems


def test_another_model_or_template_with_the_right_hashes_is_found_too(copy: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copyfile(bundle("ort-fp32") / name, copy / name)
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("im_end", "im_start"), encoding="utf-8")
    reseal(copy, lambda manifest: None)
    problems = verify(copy)
    assert any(line.startswith("model: golden vector 1's first logits differ by ") for line in problems)
    assert any(line.startswith("chat template: golden vector 3 gives '<|im_start|>system") for line in problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"bundle\.json: cannot be read: Expecting property name"),
        ("[]", r"bundle\.json: is not a JSON object"),
        ("{}", r"bundle\.json: unknown format_version None, this file reads 1"),
        (
            '{"format_version": 1, "files": {}}',
            r"incomplete, there is no 'golden', 'prompt_format', 'prefix_ids'",
        ),
        ("\xff", r"bundle\.json: cannot be read: "),
    ],
)
def test_a_malformed_manifest_says_how(copy: Path, text: str, message: str) -> None:
    (copy / "bundle.json").write_text(text, encoding="latin-1")
    with pytest.raises(runner_module().RunError, match=message):
        runner_module().read_manifest(copy)
    done = script(copy, "prompt")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert script(copy, "--verify").returncode == 4


def test_a_prompt_beyond_the_context_is_refused(copy: Path) -> None:
    done = script(copy, "-", stdin=" ".join(ROWS))
    assert done.returncode == 1
    expected = r"prompt: \d+ tokens and an answer do not fit the context of 512 tokens\n\nhint: shorten the prompt"
    assert re.match(expected, done.stderr)
    assert script(copy, "").stderr.startswith("prompt: is empty")


def test_usage_errors_exit_with_2(copy: Path) -> None:
    assert script(copy, "--help").returncode == 0
    for arguments in (["--bench", "--verify"], ["x", "--max-tokens", "0"], ["x", "--temperature", "-1"]):
        assert script(copy, *arguments).returncode == 2


def test_without_the_runtime_hashes_are_checked_and_the_rest_names_it(copy: Path, tmp_path: Path) -> None:
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "onnxruntime_genai.py").write_text("raise ImportError('No module named onnxruntime_genai')")
    done = script(copy, "prompt", PYTHONPATH=str(fake))
    assert (done.returncode, done.stdout) == (5, "")
    assert "onnxruntime-genai: cannot be imported" in done.stderr
    assert done.stderr.endswith("hint: pip install onnxruntime-genai\n")
    assert script(copy, "--help", PYTHONPATH=str(fake)).returncode == 0
    done = script(copy, "--verify", PYTHONPATH=str(fake))
    assert done.returncode == 5
    assert done.stderr.startswith("verify: the files are as exported; the golden vectors need onnxruntime-genai, which")
    files = script(copy, "--verify", "--no-replay", PYTHONPATH=str(fake))
    assert (files.returncode, files.stderr) == (0, "") and files.stdout.startswith(
        "verified: every file is as exported"
    )
    (copy / "chat_template.jinja").unlink()
    done = script(copy, "--verify", PYTHONPATH=str(fake))
    assert done.returncode == 4
    assert "chat_template.jinja: missing" in done.stderr
    assert "golden vectors: not replayed, onnxruntime-genai is not installed" in done.stderr


RUNNER = runner_module()
BAD_NAMES = [
    "../secret", "/etc/passwd", "a/../../secret", "a//b", "./model.onnx", "", "..", "C:/x", "C:x", "..\\secret",
    "a\\b", "a\0b", "a\nb: missing", "nul:", "a/.. /b", "a/. ./b", "model.onnx.", "*", None, 7, ["x"],
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_may_leave_the_bundle_is_refused(name: Any) -> None:
    assert RUNNER.name_fault(name)


@pytest.mark.parametrize("name", ["model.onnx", "adapters/a-b_c.onnx_adapter", ".hidden", "größe 2.json", "a..b"])
def test_a_name_inside_is_none(name: str) -> None:
    assert RUNNER.name_fault(name) == ""


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a\\b", "C:x"])
def test_every_door_refuses_such_a_name(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copy.parent / "secret").write_text("x", encoding="utf-8")
    manifest = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    manifest["files"][name] = {"sha256": "0" * 64, "size_bytes": 1}
    (copy / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BadInput, match="file name"):
        Bundle.read(copy / "bundle.json")
    with pytest.raises(RUNNER.NotAsExported, match="file name"):
        RUNNER.read_manifest(copy)
    for arguments in (["x"], ["x", "--no-check"], ["--bench"], ["--verify"]):
        assert RUNNER.main(["--bundle", str(copy), *arguments]) == 4
        assert "file name" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("README.md", "run.py", "sbom.cdx.json")])
def test_what_is_loaded_is_compared_with_its_hash_first(
    copy: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = bytearray((copy / name).read_bytes())
    at = raw.rindex(b'"') - 1 if name == "bundle.json" else len(raw) // 2  # within the last hash: still JSON
    raw[at] = ord("1" if raw[at] != ord("1") else "2")
    (copy / name).write_bytes(raw)
    for arguments in (["x", "--max-tokens", "1"], ["--bench"]):
        assert RUNNER.main(["--bundle", str(copy), *arguments]) == 4
        out, err = capsys.readouterr()
        assert out == "" and f"{name}: changed since the export" in err


def test_the_check_can_be_left_out_and_what_is_never_loaded_is_not_checked(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["--bundle", str(copy), "x", "--max-tokens", "1"]
    (copy / "sbom.cdx.json").write_text("{}", encoding="utf-8")
    assert RUNNER.main(ask) == 0
    path = copy / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert RUNNER.main(ask) == 4
    assert RUNNER.main([*ask, "--no-check"]) == 0
    for arguments in (["--verify", "--no-check"], ["x", "--no-check", "--public-key", "k"]):
        with pytest.raises(SystemExit) as caught:
            RUNNER.main(arguments)
        assert caught.value.code == 2


def test_a_stranger_that_a_runtime_would_read_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["--bundle", str(copy), "x", "--max-tokens", "1"]
    (copy / "notes").write_text("mine", encoding="utf-8")
    (copy / "adapters.json").mkdir()
    (copy / "adapters.json" / "x").write_text("mine", encoding="utf-8")
    assert RUNNER.main(ask) == 0
    (copy / "special_tokens_map.json").write_text("{}", encoding="utf-8")
    assert RUNNER.main(ask) == 4
    assert "special_tokens_map.json: not part of the export" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.onnx.data", "bundle.json", "tokenizer.json"])
def test_a_link_is_not_followed(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / name).rename(copy.parent / "elsewhere")
    (copy / name).symlink_to("../elsewhere")
    assert RUNNER.main(["--bundle", str(copy), "x"]) == 4
    assert f"{name}: a link to ../elsewhere, outside the bundle" in capsys.readouterr().err


def test_what_is_exchanged_while_it_is_loaded_is_not_used(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = RUNNER.OnnxRuntimeGenAI

    def exchange(*arguments: Any) -> Any:
        shutil.copyfile(copy / "model.onnx.data", copy.parent / "other")
        (copy.parent / "other").replace(copy / "model.onnx.data")
        return load(*arguments)

    monkeypatch.setattr(RUNNER, "OnnxRuntimeGenAI", exchange)
    with pytest.raises(RUNNER.NotAsExported, match=r"model\.onnx\.data: changed while it was loaded"):
        RUNNER.Runner(copy)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (("model", "decoder"), "filename", "../model.onnx"),
        (("model", "decoder"), "filename", "/elsewhere/model.onnx"),
        (("model", "decoder", "session_options"), "custom_ops_library", "evil.so"),
        (("model",), "extra", [{"provider_options": [{"x": {"plugin_library_path": "evil.so"}}]}]),
    ],
)
def test_a_runtimes_settings_name_no_library_and_no_file_outside(
    copy: Path, place: tuple[str, ...], key: str, value: Any
) -> None:
    """Although every hash is right: loading a library runs it."""
    path = copy / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    inner = config
    for name in place:
        inner = inner.setdefault(name, {})
    inner[key] = value
    path.write_text(json.dumps(config), encoding="utf-8")
    reseal(copy, lambda manifest: None)
    with pytest.raises(RUNNER.NotAsExported, match=r"genai_config\.json: names a (library|file)"):
        RUNNER.Runner(copy)
    assert any("genai_config.json: names a " in line for line in verify(copy))


@pytest.mark.parametrize("name", ["bundle.json", "genai_config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 200_000, "cannot be read: it is nested too deeply"),
        (b'{"a":' * 200_000, "cannot be read: it is nested too deeply"),
        (b" " * (16 * 2**20 + 1), "is larger than the 16 MiB that are read"),
        (b"9" * 5000, "cannot be read: "),
        (b"\xff", "cannot be read: "),
    ],
)
def test_json_that_nobody_writes_is_one_line(
    copy: Path, name: str, text: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / name).write_bytes(text)
    assert RUNNER.main(["--bundle", str(copy), "x", "--no-check"]) == 1
    out, err = capsys.readouterr()
    first, _, rest = err.partition("\n")
    assert out == "" and name in first and message in first
    assert rest.startswith("\nhint: ") or rest == ""


def test_a_pipe_in_the_place_of_the_manifest_does_not_hang(copy: Path) -> None:
    (copy / "bundle.json").unlink()
    os.mkfifo(copy / "bundle.json")
    done = script(copy, "x")
    assert done.returncode == 1 and "bundle.json: is no plain file" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b"x" * (16 * 2**20 + 1), "larger than the 16 MiB that are read"),
        (b"{}", "is no list of messages"),
        (b"[]", "is no list of messages"),
        (b'[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]', "ends with an answer"),
        (b'[{"content": "x"}]', "message 1 has no 'role'"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_conversation_that_is_none(
    tmp_path: Path, text: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(text)
    assert RUNNER.main(["--bundle", str(bundle("ort-int4")), "--chat", "--messages", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_standard_input_is_limited_and_must_be_text(copy: Path) -> None:
    for raw, message in ((b"x" * (16 * 2**20 + 1), "larger than the 16 MiB"), (b"\xff\xfe\xff", "is no text")):
        done = subprocess.run(
            [sys.executable, str(copy / "run.py"), "-"], input=raw, capture_output=True, check=False,
            env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.decode().startswith("standard input: ") and message in done.stderr.decode()
    given = script(copy, b"\xff".decode("utf-8", "surrogateescape"))
    assert given.returncode == 1 and given.stderr.startswith("prompt: is no text: ")


class Terminal:
    """Standard input on which somebody types."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_each_line_is_asked_behind_those_before(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed, asked, encode = iter(["hello", "x" * 4000, " more ", ""]), list[Any](), RUNNER.prompt_ids
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda shown: next(typed))
    monkeypatch.setattr(RUNNER, "prompt_ids", lambda *given: asked.append(encode(*given)) or asked[-1])
    reseal(copy, lambda manifest: manifest.update(prompt_format="chat", system="Be brief."))
    assert RUNNER.main(["--bundle", str(copy), "--max-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert "an empty line ends it" in err and "tokens" in err  # and what is too long for the context is no end
    talk = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first}, {"role": "user", "content": "more"},
    ]  # fmt: skip
    tokenizer = TextTokenizer(copy)
    assert asked[-1] == tokenizer.encode([tokenizer.render(talk, add_generation_prompt=True)])[0] and second
    monkeypatch.setattr("builtins.input", lambda shown: (_ for _ in ()).throw(EOFError))
    assert RUNNER.main(["--bundle", str(copy)]) == 0  # ^D
    assert RUNNER.main(["--bundle", str(copy), "--plain"]) == 1  # a plain model has no conversations
    assert capsys.readouterr().err.endswith(f"prompt: there is none\n\nhint: {RUNNER.NO_PROMPT}\n")


def test_an_empty_standard_input_is_no_prompt(copy: Path) -> None:
    for arguments in ((), ("-",)):
        done = script(copy, *arguments, stdin=" \n")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("prompt: standard input is empty")


def test_help_shows_how_this_bundle_is_asked(copy: Path) -> None:
    golden = json.loads((copy / "bundle.json").read_text())["golden"][0]
    said = " ".join(script(copy, "--help").stdout.split())
    how = "a prompt goes in as it is, and the model writes on. It was exported with prompts like this one:"
    assert f"{how} {' '.join(golden['text'].split())}" in said
    reseal(copy, lambda manifest: manifest.update(prompt_format="chat"))
    assert "a prompt goes through its chat template." in " ".join(script(copy, "--help").stdout.split())
    (copy / "bundle.json").write_text("[")
    done = script(copy, "--help")
    assert done.returncode == 0 and "This bundle" not in done.stdout


def prompt_ids(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> Any:
    capsys.readouterr()
    code = RUNNER.main(["--bundle", str(folder), *arguments, "--json", "--max-tokens", "1"])
    out, err = capsys.readouterr()
    return json.loads(out)["prompt_ids"] if code == 0 else err


def test_the_system_message_that_was_trained_is_given_and_can_be_replaced(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, user = TextTokenizer(copy), {"role": "user", "content": "hello"}

    def expected(*messages: dict[str, str]) -> list[int]:
        return tokenizer.encode([tokenizer.render(list(messages), add_generation_prompt=True)])[0]

    def system(text: str) -> dict[str, str]:
        return {"role": "system", "content": text}

    reseal(copy, lambda manifest: manifest.update(prompt_format="chat", system="Be brief."))
    assert prompt_ids(capsys, copy, "hello") == expected(system("Be brief."), user)
    assert prompt_ids(capsys, copy, "hello", "--system", "Be long.") == expected(system("Be long."), user)
    assert prompt_ids(capsys, copy, "hello", "--system", "") == expected(user)
    assert prompt_ids(capsys, copy, "hello", "--plain") == tokenizer.encode(["hello"])[0]
    talk = [user, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "more"}]
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(talk), encoding="utf-8")
    assert prompt_ids(capsys, copy, "--messages", str(path)) == expected(system("Be brief."), *talk)
    path.write_text(json.dumps([system("Mine."), *talk]), encoding="utf-8")
    assert prompt_ids(capsys, copy, "--messages", str(path)) == expected(system("Mine."), *talk)
    assert "has a system message already" in prompt_ids(capsys, copy, "--messages", str(path), "--system", "x")
    assert "add --chat" in prompt_ids(capsys, copy, "hello", "--plain", "--system", "x")
    assert "add --chat" in prompt_ids(capsys, copy, "--messages", str(path), "--plain")


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"messages": [{"role": "user", "content": "x"}], "tools": "weather"}, "'tools' is no list of objects"),
        ({"messages": [{"role": "user", "content": "x"}], "documents": ["x"]}, "'documents' is no list of objects"),
        ({"messages": [{"role": "user", "content": "x"}], "tool": []}, "has keys that are not used: tool"),
        ({"messages": []}, "is no list of messages"),
        ({"tools": []}, "is no list of messages"),
    ],
)
def test_a_conversation_with_tools_is_read_or_refused(document: Any, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(RUNNER.RunError, match=problem):
        RUNNER.read_messages(path)
    user, tools = {"role": "user", "content": "x"}, [{"type": "function"}]
    path.write_text(json.dumps({"messages": [user], "tools": tools, "documents": [{}]}), encoding="utf-8")
    assert RUNNER.read_messages(path) == (None, [user], tools, [{}])


def golden_of(folder: Path, change: Callable[[dict[str, Any]], None]) -> tuple[list[str], list[str]]:
    """(problems, notes) of a bundle whose first golden vector was changed, hashes and all."""
    reseal(folder, lambda manifest: change(manifest["golden"][0]))
    notes: list[str] = []
    return RUNNER.verify(folder, notes=notes), notes


def test_a_token_counts_where_its_recorded_margin_lets_it(copy: Path) -> None:
    manifest = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    tolerance, count = manifest["golden_logit_tolerance"], 5
    tokens = RUNNER.Runner(copy).greedy(manifest["golden"][0]["ids"], count, ())
    wide, narrow = 2.5 * tolerance, 1.5 * tolerance

    def other(at: int, margins: list[float] | None) -> Callable[[dict[str, Any]], None]:
        def change(vector: dict[str, Any]) -> None:
            vector["greedy_ids"] = [*tokens]
            vector["greedy_ids"][at] = (tokens[at] + 1) % 300
            vector["margins"] = margins or []

        return change

    last = count - 1  # what follows a token that was exchanged is another text
    text = f"golden vector 1 continues with {tokens[last]} instead of"
    assert golden_of(copy, lambda vector: vector.update(greedy_ids=tokens, margins=[wide] * count)) == ([], [])
    problems, notes = golden_of(copy, other(last, [wide] * count))
    assert len(problems) == 1 and problems[0].startswith(f"model: {text}") and notes == []
    problems, notes = golden_of(copy, other(last, [wide] * last + [narrow]))
    assert problems == [] and len(notes) == 1
    assert notes[0].startswith(text) and notes[0].endswith(f"within the margin, the best two were {narrow:.3g} apart")
    problems, notes = golden_of(copy, other(last, None))  # a bundle of before margins were recorded
    assert len(problems) == 1 and notes == []


def test_another_machine_or_runtime_is_said_where_something_differs(copy: Path) -> None:
    manifest = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    tokens = RUNNER.Runner(copy).greedy(manifest["golden"][0]["ids"], 3, ())
    recorded = {"cpu": "Abacus 3000", "features": ["beads"], "runtime": "onnxruntime-genai 0.0.1 no-such-package 2"}
    reseal(copy, lambda manifest: manifest.update(environment=recorded))
    assert golden_of(copy, lambda vector: None) == ([], [])
    wrong = {"greedy_ids": [*tokens[:-1], (tokens[-1] + 1) % 300], "margins": [0.0] * 3}
    problems, notes = golden_of(copy, lambda vector: vector.update(wrong))
    assert problems == [] and len(notes) == 2
    assert notes[1].startswith("the golden vectors were recorded elsewhere: cpu Abacus 3000, here ")
    assert "; features ['beads'], here [" in notes[1]
    assert "; runtime onnxruntime-genai 0.0.1 no-such-package 2, here onnxruntime-genai " in notes[1]


def test_a_bundle_of_another_version_is_noted_and_no_fault(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(copy / "run.py", "a", encoding="utf-8") as file:
        file.write("# of another version\n")
    assert RUNNER.main(["--bundle", str(copy), "--verify", "--no-replay"]) == 4
    assert "run.py: " in capsys.readouterr().err
    reseal(copy, lambda manifest: None)
    note = "run.py: the bundle's own is another version than the one that runs now"
    assert RUNNER.main(["--bundle", str(copy), "--verify", "--no-replay"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("verified: ") and err == f"note: {note}\n"
    assert RUNNER.main(["--bundle", str(copy), "--verify", "--no-replay", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [note]
    own = script(copy, "--verify", "--no-replay")
    assert (own.returncode, own.stderr) == (0, "")


@pytest.mark.parametrize(
    ("groups", "files", "most"),
    [
        ("0::/a/b", {"a/cpu.max": "200000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "cpu.max": "150000 100000"}, 1),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("4:cpu,x:/a", {"cpu,x/a/cpu.cfs_quota_us": "300000", "cpu,x/a/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu:/a", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:memory:/a", {"memory/a/cpu.cfs_quota_us": "1", "memory/a/cpu.cfs_period_us": "1"}, None),
        ("nonsense", {"cpu.max": "x"}, None),
        (None, {}, None),
    ],
)  # fmt: skip
def test_threads_keep_to_the_cgroups_quota(
    tmp_path: Path, groups: str | None, files: dict[str, str], most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    (tmp_path / "proc" / "self").mkdir(parents=True)
    if groups is not None:
        (tmp_path / "proc" / "self" / "cgroup").write_text(groups + "\n", encoding="utf-8")
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    places = (tmp_path / "proc", tmp_path / "cgroup")
    assert RUNNER.usable_cores(*places) == (most or 64)
    if groups != "nonsense":
        assert limits.usable_cores(*places) == (most or 64)  # the planner's own count


def test_nothing_is_written_and_no_home_is_needed(copy: Path, tmp_path: Path) -> None:
    def listing() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))

    for path in [*copy.rglob("*"), copy]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = listing()
    # root may write anywhere: as another user where that is possible
    other = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    may = shutil.which("setpriv") and subprocess.run([*other, "true"], capture_output=True, check=False).returncode == 0
    place = Path(tempfile.mkdtemp(prefix="edgeft of another user "))  # pytest's own folders are its user's alone
    try:
        shutil.copytree(copy, place / "bundle")
        place.chmod(0o755)
        variables = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
        for arguments in (["x", "--max-tokens", "1"], ["--verify"], ["--bench"]):
            command = [*(other if may else []), sys.executable, "-B", str(place / "bundle" / "run.py"), *arguments]
            done = subprocess.run(command, env=variables, cwd="/", capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert sorted(path.name for path in (place / "bundle").iterdir()) == NAMES
    finally:
        (place / "bundle").chmod(0o755)
        shutil.rmtree(place)
    assert listing() == before


def test_the_readme_says_how_to_run_it_and_how_to_keep_it_silent() -> None:
    text = (bundle("ort-int4") / "README.md").read_text(encoding="utf-8")
    assert "pip install onnxruntime-genai numpy" in text and 'python run.py "a prompt"' in text
    assert "ORT_DISABLE_TELEMETRY=1" in text and "system message" not in text
    prompts = [{"role": "user", "content": said} for said in ("x" * 1001, "How large\n\nis it?")]
    shown = [GoldenInput(messages=[each]) for each in prompts]
    chat = readme(load_target("ort-int4"), "chat", "Be brief.\nBe kind.", ["a", "b"], (), shown)
    assert "like this one:\n\n> How large\n>\n> is it?\n" in chat and "xxx" not in chat
    assert "> Be brief.\n> Be kind." in chat and "Adapters for `--adapter`: a, b." in chat
