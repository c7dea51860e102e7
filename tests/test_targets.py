"""Does every shipped target, in its own runtime, compute what PyTorch computes with the weights in the artifact?

Run by name, `make test-targets`: optimum and llama.cpp live in environments of their own. For each target the example's
model is built, run.py answers and verifies, and 64 greedy tokens for each of 20 prompts are held against PyTorch on the
artifact's own weights, taken from its codes: equal token for token. Where the runtime's products are not those of fp32
the reason is printed, and logits must be within the target's stated tolerance of PyTorch's at every step.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import ROWS, workplace
from tiny import EXAMPLE

from edgeft.data.samples import Sample
from edgeft.data.tokenizer import TextTokenizer
from edgeft.documents import shipped_folder
from edgeft.errors import MissingExtra
from edgeft.exporting.build import build_bundle
from edgeft.exporting.bundle import GoldenInput
from edgeft.exporting.calibrate import calibrate, put_codes
from edgeft.machines.runner import runner_module
from edgeft.models.checkpoint import load_plain
from edgeft.targets.codes import Codes
from edgeft.targets.rounding import round_model
from edgeft.targets.target import Target, load_target

pytestmark = pytest.mark.targets

PROMPTS, TOKENS = 20, 64
TARGETS = sorted(path.stem for path in shipped_folder("export").glob("*.toml"))
# What is absent here is skipped; where this is set to what must be there, it is a failure instead.
REQUIRED = os.environ.get("EDGEFT_REQUIRED_RUNTIMES", "").split()


# Where a runtime's products are not those of fp32, and how not. Following its rule in PyTorch brings little: a sum that
# differs in its last bit moves a value over the edge between two codes, and after four layers most errors are others.
BLOCKS = "activations are rounded to int8 inside every product, a scale for each {} of them"
CACHE = "; keys and values are kept in fp16"
REASONS = {
    **dict.fromkeys(("ort-int4", "ort-int4-calibrated", "ort-int4-mixed", "ort-int8"), BLOCKS.format(32)),
    **dict.fromkeys(("gguf-q8_0", "gguf-q4_0"), BLOCKS.format(32) + CACHE),
    "gguf-q4_k_m": BLOCKS.format(256) + CACHE,
    "gguf-f16": "activations are rounded to fp16 inside every product" + CACHE,
    "onnx-portable-int8": "activations are rounded to uint8 inside every product, one scale for all tokens of a pass",
}


@functools.cache
def prompts() -> list[list[int]]:
    return TextTokenizer(EXAMPLE).encode([row[:200] for row in ROWS[:PROMPTS]])


def built(target: Target) -> Path:
    out = workplace() / f"{target.name} level {target.accuracy_level}"
    codes = (lambda folder: calibrated(target)) if target.calibration != "none" else None
    build_bundle(EXAMPLE, target, out, prompts=[GoldenInput(text=ROWS[0][:200])], measure=False, codes=codes)
    return out


@functools.cache
def calibrated(target: Target) -> Codes:
    folder = workplace() / f"codes of {target.name} level {target.accuracy_level}"
    folder.mkdir()
    rows = [Sample(ids, ids, 0) for ids in TextTokenizer(EXAMPLE).encode([row[:200] for row in ROWS])]
    return calibrate(EXAMPLE, target, rows, folder)


def continuation(folder: Path, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """(64 greedy tokens, the logits each was chosen by) of a bundle in its runtime, through its cache."""
    runner = runner_module().Runner(folder)
    session = runner.engine.start(len(ids) + TOKENS)
    last, made, logits = session.append(ids), [], []
    for _ in range(TOKENS):
        logits.append(torch.from_numpy(np.array(last, dtype=np.float32)))
        made.append(int(last.argmax()))
        last = session.append(made[-1:])
    return made, torch.stack(logits)


def compared(folder: Path, model: Any) -> tuple[int, float]:
    """(steps with the token that torch would take, largest difference of one of torch's eight largest logits)."""
    equal, furthest = 0, 0.0
    for ids in prompts():
        made, logits = continuation(folder, ids)
        with torch.no_grad():
            expected = model(torch.tensor([ids + made])).logits[0, len(ids) - 1 : -1]
        equal += int((expected.argmax(-1) == torch.tensor(made)).sum())
        largest = expected.topk(8).indices
        furthest = max(furthest, float((logits.gather(1, largest) - expected.gather(1, largest)).abs().max()))
    return equal, furthest


def torch_greedy(model: Any, ids: list[int]) -> list[int]:
    """64 greedy tokens of PyTorch, by transformers' own generation, through end tokens as run.py with none."""
    given = torch.tensor([ids])
    model.generation_config.eos_token_id = None
    made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=TOKENS, do_sample=False)
    return list(map(int, made[0, len(ids) :]))


def from_rounding(folder: Path, target: Target) -> Any:
    model = load_plain(EXAMPLE)
    if target.calibration != "none":
        assert put_codes(model, target, calibrated(target)) > 0
    elif target.weight_bits < 16:
        assert round_model(model, target) > 0
    return model


def from_gguf(folder: Path, target: Target) -> Any:
    from runtimes import dequantised

    return dequantised(folder)


def from_portable(folder: Path, target: Target) -> Any:
    """The example's model with the weights of a portable graph: fp32 as it is, or (code - zero point) * scale."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(folder / "model.onnx")).graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    model = load_plain(EXAMPLE)
    state, seen = model.state_dict(), 0
    for node in graph.node:
        if node.op_type not in ("MatMul", "MatMulInteger") or node.input[1] not in held:
            continue
        matrix = numpy_helper.to_array(held[node.input[1]]).astype(np.float32)  # (inputs, outputs)
        if node.op_type == "MatMulInteger":
            stem = node.input[1].removesuffix("_quantized")
            zero, scale = (numpy_helper.to_array(held[f"{stem}_{part}"]) for part in ("zero_point", "scale"))
            matrix = (matrix - zero.astype(np.float32)) * scale
        path = node.name.removeprefix("/").rpartition("/")[0].replace("/", ".")
        name = "model.embed_tokens.weight" if path == "lm_head" else f"{path}.weight"
        state[name].copy_(torch.from_numpy(np.ascontiguousarray(matrix.T)))
        seen += 1
    head = int(target.weight_bits == 8)  # in fp32 the tied head is a transpose, and no constant
    assert seen == 8 * 7 + head
    return model


WEIGHTS: dict[str, Callable[[Path, Target], Any]] = {
    "ort-genai": from_rounding, "llama.cpp": from_gguf, "onnxruntime": from_portable,
}  # fmt: skip


def or_skip(name: str, problem: str) -> None:
    if load_target(name).runtime in REQUIRED:
        pytest.fail(f"{name} was not built: {problem}")
    print(f"\n{name}: NOT RUN, {problem}")
    pytest.skip(f"{name}: not run, {problem}")


@pytest.mark.parametrize("name", TARGETS)
def test_an_artifact_runs_and_computes_what_torch_does_with_its_weights(name: str) -> None:
    target = load_target(name)
    if target.runtime == "llama.cpp" and importlib.util.find_spec("gguf") is None:
        or_skip(name, 'the gguf package is not installed: pip install "edgeft[gguf,llama]"')
    try:
        folder = built(target)
    except MissingExtra as missing:
        or_skip(name, f"{missing.where} {missing.problem}")
    for arguments, expected in (
        (["--verify"], "verified: "),
        (["--max-tokens", "4", "--json", ROWS[1][:200]], '{"text": '),
    ):
        command = [sys.executable, str(folder / "run.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout.startswith(expected), done.stdout + done.stderr
    assert len(json.loads(done.stdout)["ids"]) > 0
    model = WEIGHTS[target.runtime](folder, target)
    if name not in REASONS:
        assert_equal(name, folder, model)
        return
    if target.runtime == "ort-genai":  # the same codes, in products of fp32
        exact = built(target.model_copy(update={"accuracy_level": 0}))
        assert_equal(f"{name}, activations left in fp32", exact, model)
    equal, furthest = compared(folder, model)
    print(
        f"\n{name}: {equal} of {PROMPTS * TOKENS} tokens are torch's, logits at most {furthest:.3g} from torch's "
        f"(allowed {target.golden_logit_tolerance:g}): {REASONS[name]}"
    )
    assert furthest <= target.golden_logit_tolerance


def assert_equal(name: str, folder: Path, model: Any) -> None:
    runner = runner_module().Runner(folder)
    for ids in prompts():
        assert runner.greedy(ids, TOKENS, ()) == torch_greedy(model, ids), f"{name}: another token than torch's"
    print(f"\n{name}: {PROMPTS} x {TOKENS} tokens, every one of them torch's")


def test_every_target_is_either_exact_or_says_why_not() -> None:
    assert set(REASONS) <= set(TARGETS) and len(TARGETS) == 12
