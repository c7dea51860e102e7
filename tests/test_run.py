"""Does a bundle's own run.py answer and measure, and does it find and name what is wrong with it?"""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_bundle import ROWS, bundle, save_tokenizer

from edgeft.build import ArtifactModel
from edgeft.data import TextTokenizer
from edgeft.runner import runner_module

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


def script(
    folder: Path, *arguments: str, stdin: str | None = None, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """run.py of a bundle as a device starts it: as a script, without edgeft on the path."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(folder / "run.py"), *arguments], input=stdin, capture_output=True, text=True,
        stdin=subprocess.DEVNULL if stdin is None else None, cwd=cwd, env=kept | environment, check=False,
    )  # fmt: skip


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change bundle.json and make all its hashes right again, as one who exchanges a file on purpose."""
    manifest = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    change(manifest)
    for name, entry in manifest["files"].items():
        raw = (folder / name).read_bytes()
        entry.update(sha256=hashlib.sha256(raw).hexdigest(), size_bytes=len(raw))
    manifest["self_sha256"] = "0" * 64
    blank = json.dumps(manifest)
    sealed = blank.replace(
        '"self_sha256": "' + "0" * 64, '"self_sha256": "' + hashlib.sha256(blank.encode()).hexdigest()
    )
    (folder / "bundle.json").write_text(sealed, encoding="utf-8")


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
