"""How does a merged checkpoint become a folder that a device runs, and that proves what it is?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from edgeft.adapters import AdapterSource, Written, add_adapters
from edgeft.artifacts import saving, sha256_file, shipped_folder, staging, versions
from edgeft.budget import MALLOC_ENVIRONMENT, reset_resident_peak, resident_bytes
from edgeft.bundle import (
    MANIFEST,
    SBOM,
    Bundle,
    BundledAdapter,
    BundledFile,
    Golden,
    GoldenInput,
    Measured,
    Measurement,
    PromptFormat,
    measurement_path,
)
from edgeft.data import TextTokenizer
from edgeft.errors import BadInput, EdgeftError, MissingExtra, ParityFailed
from edgeft.footprint import Weights, choose_context, predict
from edgeft.model_spec import ModelSpec, read_model_spec
from edgeft.runner import RUNNER, runner_module
from edgeft.sbom import Component, bill_of_materials
from edgeft.scores import Proof
from edgeft.target import Target

GOLDEN_TOKENS = 16  # greedy tokens kept per golden vector
GOLDEN_LOGITS = 8  # largest first logits kept per golden vector


class ArtifactModel:
    """A bundle in its own runtime, token ids in and logits out: what the parity ladder compares."""

    def __init__(self, bundle: Path) -> None:
        runner = runner_module()
        try:
            self._runner = runner.Runner(Path(bundle))
        except runner.MissingRuntime as problem:
            raise _missing(problem) from None
        except runner.RunError as problem:
            raise BadInput(bundle, str(problem)) from None
        self.context_tokens: int = self._runner.context_tokens

    def use(self, adapter: str | None) -> None:
        """Answer with this adapter of the bundle from now on (None: without). Raises BadInput."""
        try:
            self._runner.use(adapter)
        except runner_module().RunError as problem:
            raise BadInput("artifact", str(problem)) from None

    def logits(self, ids: list[int]) -> numpy.ndarray[Any, numpy.dtype[numpy.float32]]:
        """Logits after each token: (len(ids), vocabulary). Raises BadInput if ids exceed the context."""
        try:
            return numpy.asarray(self._runner.logits(list(ids)), dtype=numpy.float32)
        except runner_module().RunError as problem:
            raise BadInput("artifact", str(problem)) from None

    def greedy(self, ids: list[int], max_new_tokens: int, eos_ids: Sequence[int]) -> list[int]:
        """The likeliest continuation, cut before its first end token, as `evaluate.greedy` gives it."""
        try:
            return list(self._runner.greedy(list(ids), max_new_tokens, eos_ids))
        except runner_module().RunError as problem:
            raise BadInput("artifact", str(problem)) from None


def _missing(problem: Exception) -> MissingExtra:
    text = str(problem).split("\n\nhint: ")[0].removeprefix("onnxruntime-genai: ")
    return MissingExtra("onnxruntime-genai", text, "pip install onnxruntime-genai")


def build_bundle(
    merged: Path,
    target: Target,
    out: Path,
    *,
    prompts: Sequence[GoldenInput],
    prompt_format: PromptFormat = "plain",
    device_memory_bytes: int | None = None,
    device_bandwidth_bytes_per_second: float | None = None,
    input_sha256: str = "",
    provenance: dict[str, str] | None = None,
    prove: Callable[[ArtifactModel], Proof] | None = None,
    measure: bool = True,
    predicted_peak_bytes: int | None = None,
    sources: Sequence[Component] = (),
    adapters: Sequence[AdapterSource] = (),
) -> Bundle:
    """The bundle of a standard checkpoint folder, written to `out` as a whole or not at all.

    `sources` are what it was made from, for the bill of materials. What is measured goes beside the folder: the same
    inputs give the same bundle, byte for byte. `adapters` go beside the model, each with golden vectors of its own.

    Raises BadInput (an architecture that the runtime's builder does not know, no tokenizer), DoesNotFit,
    ParityFailed (the runtime tokenizes or templates a prompt differently) and MissingExtra.
    """
    start = time.perf_counter()
    spec = read_model_spec(str(merged))
    tokenizer = TextTokenizer(merged)
    if prompt_format == "chat" and tokenizer.template_text is None:
        raise BadInput(merged, "there is no chat template", "export with prompt_format 'plain'")
    with staging(out) as folder:
        reset_resident_peak()
        waiting = resident_bytes()
        builder = _build_model(merged, target, spec, folder)
        inputs, written = add_adapters(folder, spec, adapters) if adapters else ({}, {})
        _copy_tokenizer(merged, folder)
        with saving(out):
            shutil.copyfile(shipped_folder("export") / RUNNER, folder / RUNNER)
        weights = _with_adapters(read_weights(folder / "model.onnx"), written)
        context_tokens, limited_by = choose_context(spec, target, weights, device_memory_bytes)
        stop_ids = stop_ids_of(tokenizer)
        _limit(folder, context_tokens, stop_ids)
        files = _hash(folder)
        hashes = {name: file.sha256 for name, file in files.items()}
        with saving(out):
            (folder / SBOM).write_text(bill_of_materials(hashes, sources, target.name), encoding="utf-8")
        files = _hash(folder)
        bundle = Bundle(
            input_sha256=input_sha256,
            versions=versions(),
            target=target,
            prompt_format=prompt_format,
            prefix_ids=tokenizer.prefix_ids,
            stop_ids=stop_ids,
            context_tokens=context_tokens,
            context_limited_by=limited_by,
            golden_logit_tolerance=target.golden_logit_tolerance,
            weight_bytes_per_token=weights.bytes_per_token,
            size_bytes=sum(file.size_bytes for file in files.values()),
            files=files,
            golden=[],
            provenance=provenance or {},
            predicted=predict(
                spec, target, weights, context_tokens, device_memory_bytes, device_bandwidth_bytes_per_second
            ),
        )
        bundle.write(folder / MANIFEST)
        model = ArtifactModel(folder)
        golden = _record(model._runner, tokenizer, prompts, target.golden_logit_tolerance)
        del model  # its memory, before the bench
        bundle = bundle.model_copy(update={"golden": golden, "adapter_inputs": inputs})
        bundle.write(folder / MANIFEST)
        bundle = bundle.model_copy(update={"adapters": _prove_adapters(folder, bundle, adapters, written)})
        bundle.write(folder / MANIFEST)
        if prove is not None:
            bundle = bundle.model_copy(update={"proof": prove(ArtifactModel(folder))})
            bundle.write(folder / MANIFEST)
        peak = max(waiting + builder, resident_bytes(highest=True)) if builder else None
        measured = _measure(folder) if measure else None
    path = measurement_path(out.resolve())
    with saving(path):
        path.unlink(missing_ok=True)  # of the bundle that was here before
    if measured is not None:
        here = predict(spec, target, weights, measured.prompt_tokens + measured.new_tokens)
        Measurement(
            input_sha256=sha256_file(out / MANIFEST),
            versions=versions(),
            measured=measured,
            predicted_here_bytes=here.memory_bytes,
            predicted_peak_bytes=predicted_peak_bytes,
            measured_peak_bytes=peak,
            seconds=time.perf_counter() - start,
        ).write(path)
    return Bundle.read(out / MANIFEST)


def _with_adapters(weights: Weights, written: Mapping[str, Written]) -> Weights:
    """All adapters may be loaded at a time; a token reads those of one."""
    sizes = [sum(4 * rows * columns for rows, columns in each.parameters.values()) for each in written.values()]
    if not sizes:
        return weights
    return Weights(weights.stored_bytes + sum(sizes), weights.head_bytes, weights.bytes_per_token + max(sizes))


def _prove_adapters(
    folder: Path, bundle: Bundle, sources: Sequence[AdapterSource], written: Mapping[str, Written]
) -> dict[str, BundledAdapter]:
    """What each adapter answers and how near that is to what was trained, all of them by one loaded model."""
    entries: dict[str, BundledAdapter] = {}
    if not sources:
        return entries
    for source in sources:
        file, rank, parameters = written[source.name]
        entries[source.name] = BundledAdapter(
            file=file,
            base_sha256=source.base_sha256,
            train_sha256=source.train_sha256,
            rank=rank,
            prompt_format=source.prompt_format,
            parameters=parameters,
            golden=[],
        )
    bundle.model_copy(update={"adapters": entries}).write(folder / MANIFEST)  # for the runner's check of the contract
    model = ArtifactModel(folder)
    for source in sources:
        model.use(source.name)
        golden = _record(model._runner, source.tokenizer, source.prompts, bundle.golden_logit_tolerance)
        proof = source.prove(model) if source.prove else None
        entries[source.name] = entries[source.name].model_copy(update={"golden": golden, "proof": proof})
    return entries


def _build_model(merged: Path, target: Target, spec: ModelSpec, folder: Path) -> int:
    """model.onnx, its weights and genai_config.json in `folder`, by onnxruntime-genai's model builder.

    Returns the builder's highest resident bytes, 0 where no /proc tells them.
    """
    peak = _run_builder(merged, folder, _quantisation(target, spec.tie_word_embeddings, ()))
    if target.weight_bits == 8 and spec.tie_word_embeddings:
        # The builder shares a tied table between embedding and head only where its base type is int4, and
        # would store an fp32 copy for int8 (10.9 MB instead of 6.9 in ort-int8.toml). So: int4, every matmul
        # promoted by name; the names come from the first build.
        names = [
            node.name.removesuffix("_Q8")
            for node in _graph(folder / "model.onnx").node
            if node.op_type == "MatMulNBits"
        ]
        peak = max(peak, _run_builder(merged, folder, _quantisation(target, True, names)))
    return peak


def _quantisation(target: Target, tied: bool, promoted: Sequence[str]) -> dict[str, Any] | None:
    """The builder's `quant_config.weights` (None for fp32). `promoted` names the matmuls that get 8 bits."""
    if target.weight_bits == 32:
        return None
    overrides: list[dict[str, Any]] = [{"match": {"name": name}, "type": "int8"} for name in promoted]
    if target.weight_bits == 4 and target.head_bits == 8:
        overrides = [{"match": {"preset": "last_matmul"}, "type": "int8"}]
    # In onnxruntime-genai 0.18 only "default" quantises a separate embedding, and only "rtn" can share a tied
    # 8-bit one (with "default" the graph names a weight that does not exist). Both round to nearest.
    separate = not tied and target.embedding_bits == 4
    shared = tied and (target.weight_bits == 4 or bool(promoted))
    return {
        "type": "int8" if target.weight_bits == 8 and not promoted else "int4",
        "method": "default" if separate else "rtn",
        "block_size": target.block_size,
        "symmetric": target.symmetric,
        "accuracy_level": target.accuracy_level,
        "op_types": ["MatMul", "Gather"] if separate or shared else ["MatMul"],
        "overrides": overrides,
    }


# The builder as a script that, whatever happens to it, leaves its highest resident bytes in a file.
BUILDER = """
import os, runpy, shutil
try:
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
finally:
    if os.path.exists("/proc/self/status"):
        shutil.copyfile("/proc/self/status", os.environ["EDGEFT_BUILDER_STATUS"])
"""


def _run_builder(merged: Path, folder: Path, weights: dict[str, Any] | None) -> int:
    """Run the builder in its own process: its memory ends with it, its noise goes to a log. Offline.

    Returns its highest resident bytes, 0 where no /proc tells them.
    """
    scratch = folder / ".scratch"
    scratch.mkdir(exist_ok=True)
    log, status = scratch / "builder.log", scratch / "status"
    # -P: no file of the current folder may shadow a module
    command = [sys.executable, "-P", "-c", BUILDER, "-e", "cpu"]
    command += [
        "-i",
        str(merged.resolve()),
        "-o",
        str(folder.resolve()),
        "-c",
        str((scratch / "cache").resolve()),
    ]
    if weights is None:
        command += ["-p", "fp32"]
    else:
        options = {"quant_config": {"io_dtype": "fp32", "weights": weights}}
        command += ["--builder_config_version", "2", "--target_options", json.dumps(options)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TMPDIR": str(scratch.resolve()),
        "PYTHONDONTWRITEBYTECODE": "1", "EDGEFT_BUILDER_STATUS": str(status.resolve()), **MALLOC_ENVIRONMENT,
    }  # fmt: skip
    with open(log, "wb") as noise:
        code = subprocess.run(command, stdout=noise, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    text = log.read_text(encoding="utf-8", errors="replace")
    if code == 0 and (folder / "genai_config.json").is_file():
        peak = resident_bytes(highest=True, status=status)
        shutil.rmtree(scratch)
        return peak
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no output"]
    if "No module named onnxruntime_genai" in text or "No module named 'onnxruntime_genai'" in text:
        raise MissingExtra("onnxruntime-genai", "is not installed", "pip install onnxruntime-genai")
    if "No space left on device" in text:
        raise OSError(28, "No space left on device")  # `staging` words it
    if lines[-1].startswith("NotImplementedError"):
        hint = "it knows Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3, Phi-3, SmolLM3, Granite, OLMo, Nemotron"
        raise BadInput(
            merged, f"onnxruntime-genai cannot build this architecture: {lines[-1].partition(': ')[2]}", hint
        )
    last = "\n".join(lines[-3:])
    raise EdgeftError(
        merged,
        f"onnxruntime-genai's builder failed (exit {code}):\n{last}",
        "check the checkpoint folder: does transformers load it?",
    )


def _graph(path: Path) -> Any:
    """The ONNX graph without its weights."""
    import onnx

    return onnx.load(str(path), load_external_data=False).graph


def read_weights(path: Path) -> Weights:
    """Sizes of an ONNX file's weights. A token takes one row of the embedding and rotary tables: not read."""
    graph = _graph(path)
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    stored = head = read = 0
    for tensor in graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        size = int(external.get("length", len(tensor.raw_data)))
        stored += size
        if tensor.name.startswith("lm_head"):
            head += size
        rows_only = readers.get(tensor.name, set()) <= {"Gather", "GatherBlockQuantized"}
        if not rows_only and not tensor.name.startswith(("cos_cache", "sin_cache")):
            read += size
    return Weights(stored, head, read)


TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json")


def _copy_tokenizer(merged: Path, folder: Path) -> None:
    """The checkpoint's tokenizer, byte for byte, instead of what the builder's transformers made of it.

    tokenizer_config.json stays the builder's: the runtime cannot read the 1e30 that means "no limit" in many.
    """
    for name in TOKENIZER_FILES:
        if (merged / name).is_file():
            with saving(folder):
                shutil.copyfile(merged / name, folder / name)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):  # how the builder found it, nothing about the tokenizer
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stop_ids_of(tokenizer: TextTokenizer) -> list[int]:
    """The checkpoint's end tokens, and the special token with which the chat template closes an answer."""
    found = list(tokenizer.eos_ids)
    if tokenizer.template_text is not None:
        probe = "edgeft"
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": probe}]
        try:
            after = tokenizer.render(messages, add_generation_prompt=False).rpartition(probe)[2]
        except BadInput:  # a template of another kind of turn: the checkpoint's own end tokens have to do
            after = ""
        closing = tokenizer.encode([after])[0][:1]
        special = {token for token, entry in tokenizer.backend.get_added_tokens_decoder().items() if entry.special}
        found += [token for token in closing if token in special and token not in found]
    return found


def _limit(folder: Path, context_tokens: int, stop_ids: list[int]) -> None:
    """Write context limit and stop ids to genai_config.json, where any ONNX Runtime GenAI app reads them."""
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["context_length"] = context_tokens
    config["model"]["eos_token_id"] = stop_ids
    config["search"]["max_length"] = context_tokens
    path.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def _hash(folder: Path) -> dict[str, BundledFile]:
    return {
        path.relative_to(folder).as_posix(): BundledFile(sha256=sha256_file(path), size_bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _record(model: Any, tokenizer: TextTokenizer, prompts: Sequence[GoldenInput], tolerance: float) -> list[Golden]:
    """Golden vectors, made by the artifact. Raises ParityFailed if text or ids are not what training used."""
    made = []
    for prompt in prompts:
        plain = prompt.messages is None
        text = prompt.text or ""
        if prompt.messages is not None:
            text = tokenizer.render(prompt.messages, add_generation_prompt=True)
        expected = (tokenizer.prefix_ids if plain else []) + tokenizer.encode([text])[0]
        dated = "strftime" in (tokenizer.template_text or "")
        if prompt.messages is not None and not dated and (given := model.render(prompt.messages)) != text:
            problem = f"the runtime renders {given!r}, training used {text!r}"
            raise ParityFailed("chat template", problem, "simplify chat_template.jinja, or export plain prompts")
        ids = model.encode(text, plain=plain)
        if ids != expected:
            problem = f"the runtime encodes {text!r:.200} as {ids[:20]}, training used {expected[:20]}"
            raise ParityFailed("tokenizer", problem, "the runtime does not know this kind of tokenizer.json")
        steps: list[int] = []
        last = first = model.logits(ids)[-1]
        while len(steps) < min(GOLDEN_TOKENS, model.context_tokens - len(ids)):
            second, best = numpy.sort(last)[-2:]
            if best - second <= 2 * tolerance:  # each of the two may move by the tolerance
                break
            steps.append(int(last.argmax()))
            last = model.logits(ids + steps)[-1]
        top = numpy.argsort(-first, kind="stable")[:GOLDEN_LOGITS]
        made.append(
            Golden(
                messages=None if dated else prompt.messages,
                text=text,
                plain=plain,
                ids=ids,
                greedy_ids=steps,
                top_ids=[int(token) for token in top],
                top_logits=[float(first[token]) for token in top],
            )
        )
    return made


def _measure(folder: Path) -> Measured:
    """run.py --bench in a process of its own, so that its peak memory is the runner's."""
    command = [sys.executable, "-P", str(folder / RUNNER), "--bench", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise EdgeftError(folder / RUNNER, f"--bench failed (exit {done.returncode}): {lines[-1]}")
    return Measured.model_validate_json(done.stdout)
