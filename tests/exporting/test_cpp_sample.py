"""examples/cpp, built and run where a compiler and the runtime's libraries are: a bundle's golden vectors from C++."""

from __future__ import annotations

import glob
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bundles import bundle, reseal, script
from tiny import EXAMPLES


def library(module: str, pattern: str) -> str | None:
    spec = importlib.util.find_spec(module)
    found = sorted(glob.glob(str(Path(spec.origin).parent / pattern))) if spec and spec.origin else []
    return found[0] if found else None


GENAI = library("onnxruntime_genai", "libonnxruntime-genai.so")
ONNXRUNTIME = library("onnxruntime", "capi/libonnxruntime.so.1*")
pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("cmake") and GENAI and ONNXRUNTIME),
    reason="no C++ compiler, no cmake, or no library of the runtime",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample as a device gets it: a folder with the program and both libraries, away from where it was built."""
    build, device = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("device")
    libraries = [f"-DGENAI_LIBRARY={GENAI}", f"-DONNXRUNTIME_LIBRARY={ONNXRUNTIME}"]
    subprocess.run(
        ["cmake", "-S", str(EXAMPLES / "cpp"), "-B", str(build), *libraries], check=True, capture_output=True
    )
    done = subprocess.run(["cmake", "--build", str(build)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("bundle", "libonnxruntime-genai.so", "libonnxruntime.so.1"):
        shutil.copy(build / name, device / name)
    shutil.rmtree(build)
    return device / "bundle"


def run(program: Path, *arguments: object, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(home), "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=home)


@pytest.mark.parametrize("target", ["ort-int4", "ort-fp32"])
def test_golden_vectors_are_replayed(target: str, program: Path, tmp_path: Path) -> None:
    golden = json.loads((bundle(target) / "bundle.json").read_text(encoding="utf-8"))["golden"]
    done = run(program, bundle(target), home=tmp_path)
    tokens = sum(len(each["greedy_ids"]) for each in golden)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(golden)} prompts, {tokens} tokens: as exported\n" and tokens > len(golden) > 2
    assert list(tmp_path.rglob("*")) == []  # nothing was left in the home folder


def test_it_answers_as_run_py_does(program: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle("ort-int4"), folder)
    for prompt in ("Package: libx\nSection:", 'Größe "naïve" \\ 12%'):
        for form in ("plain", "chat"):
            reseal(folder, lambda manifest, form=form: manifest.update(prompt_format=form, system="Be brief."))
            wanted = script(folder, prompt, "--max-tokens", "500", OMP_NUM_THREADS="1")
            given = run(program, folder, prompt, home=tmp_path)
            assert given.returncode == 0 and given.stdout == wanted.stdout, (prompt, form, given.stderr, wanted.stderr)


def other_token(golden: dict[str, Any]) -> None:
    """At the end, so that no later step follows it, and by a margin that binds."""
    golden["greedy_ids"][-1], golden["margins"][-1] = 7, 99.0


FAULTS = {
    "another token": (other_token, "instead of 7 at token"),
    "another logit": (
        lambda golden: golden["top_logits"].__setitem__(0, golden["top_logits"][0] + 1),
        "another logit of",
    ),
    "another text": (lambda golden: golden.update(text=golden["text"] + "x"), "other tokens than at export"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bundle_that_is_not_as_exported_is_exit_4(fault: str, program: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle("ort-int4"), folder)
    plant, said = FAULTS[fault]
    reseal(folder, lambda manifest: plant(manifest["golden"][0]))
    done = run(program, folder, home=tmp_path)
    assert done.returncode == 4 and "not as exported" in done.stdout
    assert done.stderr.startswith("prompt 0: ") and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_folder_that_is_no_bundle_is_said(program: Path, tmp_path: Path) -> None:
    done = run(program, tmp_path, home=tmp_path)
    assert done.returncode == 1 and "bundle.json: cannot be read" in done.stderr
    assert run(program, home=tmp_path).returncode == 2
