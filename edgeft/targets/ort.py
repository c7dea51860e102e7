"""How does a checkpoint become an ONNX Runtime GenAI folder, by the runtime's own builder and with which bits?"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from edgeft.data.tokenizer import find_template, write_template
from edgeft.documents import saving
from edgeft.errors import BadInput, EdgeftError
from edgeft.machines import processes
from edgeft.machines.extras import missing
from edgeft.machines.limits import MALLOC_ENVIRONMENT, resident_bytes
from edgeft.machines.runner import runner_module
from edgeft.models.headers import blocks
from edgeft.models.layer_shares import layer_of
from edgeft.models.spec import ModelSpec
from edgeft.targets.kv_cache import CacheScales, with_full_cache
from edgeft.targets.matrices import Weights
from edgeft.targets.onnx_file import HEAD, Stored, Values, forget, read_graph, rewrite, write_graph
from edgeft.targets.target import Target, eight_bit_modules

if TYPE_CHECKING:
    from edgeft.targets.codes import Codes
    from edgeft.targets.grid import Encoded

LAST = "/lm_head/last"  # how ours of what goes into it does
# How the builder names the matmuls of a layer; it takes apart what a checkpoint holds fused.
NODES = {
    "qkv_proj": ("attn/q_proj", "attn/k_proj", "attn/v_proj"),
    "gate_up_proj": ("mlp/gate_proj", "mlp/up_proj"),
    **{name: (f"attn/{name}",) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: (f"mlp/{name}",) for name in ("gate_proj", "up_proj", "down_proj")},
}


def build_model(
    merged: Path, target: Target, spec: ModelSpec, folder: Path, codes: Codes | None = None,
    scales: CacheScales | None = None,
) -> int:  # fmt: skip
    """model.onnx, its weights, genai_config.json and the tokenizer in `folder`.

    The builder writes the graph in fp32, tensor by tensor; then its matrices are rounded one at a time (nbits.py), to
    nearest or as calibrated `codes` say. With `scales` keys and values are kept in 8 bits. The graph gives logits after
    the last tokens of a pass alone: `every_position` undoes that for a proof.

    Returns the builder's highest resident bytes, 0 where no /proc tells them.

    Raises BadInput for an architecture that the builder does not know, MissingExtra without the runtime.
    """
    if problem := spec.family.ort_problem:
        raise BadInput(merged, problem, "choose an onnx-portable- or a gguf- target")
    modules = eight_bit_modules(target, spec.num_hidden_layers, tuple(linear.name for linear in spec.linears))
    promoted = _nodes(modules)
    # named apart, query, key and value are no one product
    apart = any("/attn/" in name for name in promoted) and not any("/qkv_proj/" in name for name in promoted)
    options: dict[str, Any] = {"optimizations": {"fuse_qkv": False}} if apart else {}
    if scales is not None:
        scales.write(_scratch(folder) / "kv_scales.json")
        cache = {"scheme": "int8_per_channel", "scale_file": str((_scratch(folder) / "kv_scales.json").resolve())}
        options["attention"] = {"kv_cache": cache}
    peak = _run_builder(merged, folder, options)
    if scales is not None:
        _share_buffer(folder)
    if target.weight_bits < 16:
        from edgeft.targets.nbits import quantise

        quantise(folder, target, promoted, None if codes is None else matrices(codes, spec))
    if target.weight_bits == 16:
        _store_half(folder)
    _prune_head(folder)
    _copy_tokenizer(merged, folder)
    return peak


def _nodes(modules: Sequence[str]) -> list[str]:
    """Names of the builder's matmuls for modules such as layers.0.down_proj."""
    parts = [module.split(".", 2) for module in modules]
    return [f"/model/layers.{layer}/{node}/MatMul" for _, layer, name in parts for node in NODES[name]]


def matrices(codes: Codes, spec: ModelSpec) -> dict[str, Callable[[], Encoded]]:
    """The codes of each matrix product by the builder's name of it, read when they are called."""
    kv = spec.num_key_value_heads * spec.head_dim
    query = spec.num_attention_heads * spec.head_dim
    heights = {"qkv_proj": (query, kv, kv), "gate_up_proj": (spec.intermediate_size, spec.intermediate_size)}
    found: dict[str, Callable[[], Encoded]] = {}
    for name in codes:
        projection, first = name.split(".")[-2], 0
        nodes = NODES[projection]
        for node, height in zip(nodes, heights.get(projection, (None,)), strict=True):
            rows = slice(first, None if height is None else first + height)
            found[f"/model/layers.{layer_of(name)}/{node}"] = functools.partial(_read_rows, codes, name, rows)
            first += height or 0
    return found


def _read_rows(codes: Codes, name: str, rows: slice) -> Encoded:
    return codes.read(name).rows(rows)


def _store_half(folder: Path) -> None:
    """Store the matrices of an fp32 model in fp16, each followed by a cast that the runtime carries out on loading.

    The builder's own fp16 graph fails on a CPU at the first decoding step: ONNX Runtime 1.31 has no fp16 kernels for
    its operators there, inserts casts and reuses a buffer of another shape. Raises BadInput for weights beyond 65504.
    """
    from onnx import TensorProto, helper

    model, casts = read_graph(folder), []

    def half(tensor: Any, values: Values) -> list[Stored] | None:
        if values is None or values.ndim != 2 or "_cache" in tensor.name:
            return None
        name = f"{tensor.name}.fp16"
        cast = helper.make_node("Cast", [name], [tensor.name], f"/cast/{tensor.name}", to=TensorProto.FLOAT)
        casts.append(cast)
        return [Stored(name, TensorProto.FLOAT16, values.shape, _halves(tensor.name, values))]

    rewrite(folder, model, half)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    forget(model.graph, {name for cast in casts for name in cast.output})
    write_graph(folder, model)


def _halves(name: str, values: Values) -> Iterator[bytes]:
    for part in blocks(values.shape):
        with numpy.errstate(over="ignore"):
            made = values[part].astype("<f2")
        if not numpy.isfinite(made).all():
            raise BadInput(name, "has values beyond the range of fp16", "export with --target ort-fp32")
        yield made.tobytes()


def _prune_head(folder: Path) -> None:
    """Let the head see the last few positions of a pass: the others' logits are of no use to a device.

    All would be a sixth of a prefill's time at 135M, and 200 KB per token. `logits` are those of the last position, its
    second dimension declared as 1, by which onnxruntime-genai knows it; those of the few are an output of their own,
    by which run.py checks guesses. A graph without a head of that name stays as it is.
    """
    import onnx

    model = read_graph(folder)
    graph, helper = model.graph, onnx.helper
    head = next((node for node in graph.node if node.name.startswith(HEAD)), None)
    if head is None:
        return
    few = -runner_module().LAST_POSITIONS
    for name, value in (("starts", few), ("ends", 2**62), ("axes", 1), ("index", -1)):
        graph.initializer.append(helper.make_tensor(f"{LAST}/{name}", onnx.TensorProto.INT64, [1], [value]))
    given = [head.input[0], *(f"{LAST}/{each}" for each in ("starts", "ends", "axes"))]
    cut = helper.make_node("Slice", given, [f"{LAST}/output"], f"{LAST}/Slice")
    at = list(graph.node).index(head)
    head.input[0] = cut.output[0]
    graph.node.insert(at, cut)
    every = runner_module().LAST_LOGITS
    _rename(graph, "logits", every)
    graph.node.append(helper.make_node("Gather", [every, f"{LAST}/index"], ["logits"], f"{LAST}/Gather", axis=1))
    _declare_logits(graph, 1)
    logits = next(each.type.tensor_type for each in graph.output if each.name == "logits")
    shape = ["batch_size", "last_positions", logits.shape.dim[2].dim_value]
    graph.output.append(helper.make_tensor_value_info(every, logits.elem_type, shape))
    write_graph(folder, model)


def _rename(graph: Any, old: str, new: str) -> None:
    """Give a tensor that nodes make another name."""
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


def every_position(folder: Path, full_cache: bool = False) -> bytes:
    """The folder's graph with logits after every token, over the same weights: what a proof compares.

    `full_cache`: keys and values kept in fp32, whatever the bundle's own do.
    """
    model = read_graph(folder)
    graph = model.graph
    if full_cache:
        with_full_cache(model)
    ours = {node.op_type: node for node in graph.node if node.name.startswith(f"{LAST}/")}
    if ours:
        cut, take = ours.get("Slice", ours["Gather"]), ours["Gather"]
        for node in ours.values():
            graph.node.remove(node)
        _rename(graph, cut.output[0], cut.input[0])
        for few in [each for each in graph.initializer if each.name.startswith(f"{LAST}/")]:
            graph.initializer.remove(few)
        if cut is not take:  # else a bundle of 0.2, whose head sees the last position alone
            _rename(graph, take.input[0], "logits")
            graph.output.remove(next(each for each in graph.output if each.name == take.input[0]))
        _declare_logits(graph, "sequence_length")
    return model.SerializeToString(deterministic=True)  # type: ignore[no-any-return]


def _declare_logits(graph: Any, positions: int | str) -> None:
    """Declare the logits' second dimension, and leave the shapes of what leads from the head to them to inference."""
    behind: set[str] = set()
    for node in graph.node:  # in topological order
        if node.name.startswith(HEAD) or behind & set(node.input):
            behind |= set(node.output)
    forget(graph, behind)
    for output in graph.output:
        if output.name in behind:
            shape = output.type.tensor_type.shape.dim[1]
            shape.Clear()
            setattr(shape, "dim_param" if isinstance(positions, str) else "dim_value", positions)


# The builder as a script that, whatever happens to it, leaves its highest resident bytes in a file.
BUILDER = """
import os, runpy, shutil
try:
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
finally:
    if os.path.exists("/proc/self/status"):
        shutil.copyfile("/proc/self/status", os.environ["EDGEFT_BUILDER_STATUS"])
"""


def _scratch(folder: Path) -> Path:
    """A folder for the builder alone."""
    scratch = folder / ".scratch"
    scratch.mkdir(exist_ok=True)
    return scratch


def _share_buffer(folder: Path) -> None:
    """Have the runtime keep one cache and write into it, as it does in fp32; the builder asks for a copy a token.

    Going back to an earlier token stays exact (tests/exporting/test_kv_cache.py).
    """
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["search"]["past_present_share_buffer"] = True
    path.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")


def _run_builder(merged: Path, folder: Path, options: dict[str, Any]) -> int:
    """Have the builder write the graph in fp32, in its own process: memory ends with it, noise goes to a log. Offline.

    Returns its highest resident bytes, 0 where no /proc tells them.
    """
    scratch = _scratch(folder)
    log, status = scratch / "builder.log", scratch / "status"
    places = ("-i", merged.resolve(), "-o", folder.resolve(), "-c", (scratch / "cache").resolve())
    command = processes.command(BUILDER, "-e", "cpu", "-p", "fp32", *places)
    if options:
        command += ["--builder_config_version", "2", "--target_options", json.dumps(options)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TMPDIR": str(scratch.resolve()),
        # the builder stamps the commit of whatever repository its environment stands in, a user's own, on the graph
        "GIT_DIR": os.devnull,
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
        raise missing("onnxruntime-genai", "is not installed", "export")
    if "No space left on device" in text:
        raise OSError(28, "No space left on device")  # `staging` words it
    if lines[-1].startswith("NotImplementedError"):
        hint = "it knows Llama, Mistral, Qwen2, Qwen3, Gemma 1 and 2, Phi-3, SmolLM3, Granite, OLMo, Nemotron"
        raise BadInput(
            merged, f"onnxruntime-genai cannot build this architecture: {lines[-1].partition(': ')[2]}", hint
        )
    last = "\n".join(lines[-3:])
    raise EdgeftError(
        merged,
        f"onnxruntime-genai's builder failed (exit {code}):\n{last}",
        "check the checkpoint folder: does transformers load it?",
    )


def read_weights(folder: Path) -> Weights:
    """Sizes of a model's weights in memory. A token takes one row of the embedding and rotary tables: not read.

    Weights behind a cast count as fp32: the runtime carries the cast out on loading.
    """
    graph = read_graph(folder).graph
    readers: dict[str, set[str]] = {}
    cast = {}
    for node in graph.node:
        if node.op_type == "Cast":
            cast[node.input[0]] = node.output[0]
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    stored = head = read = 0
    for tensor in graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        size = int(external.get("length", len(tensor.raw_data))) * (2 if tensor.name in cast else 1)
        stored += size
        if tensor.name.startswith("lm_head"):
            head += size
        rows_only = readers.get(cast.get(tensor.name, tensor.name), set()) <= {"Gather", "GatherBlockQuantized"}
        if not rows_only and not tensor.name.startswith(("cos_cache", "sin_cache")):
            read += size
    return Weights(stored, head, read)


TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json")


def _copy_tokenizer(merged: Path, folder: Path) -> None:
    """The checkpoint's tokenizer, byte for byte, instead of what the builder's transformers made of it.

    The chat template lies in a file of its own as training read it, wherever and with whatever line ends the checkpoint
    keeps it. tokenizer_config.json stays the builder's: the runtime cannot read the 1e30 that means "no limit" in many.
    """
    for name in TOKENIZER_FILES:
        if (merged / name).is_file():
            with saving(folder):
                shutil.copyfile(merged / name, folder / name)
    write_template(find_template(merged), folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):  # how the builder found it, nothing about the tokenizer
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_limits(folder: Path, context_tokens: int, stop_ids: list[int]) -> None:
    """Write context limit and stop ids to genai_config.json, where any ONNX Runtime GenAI app reads them."""
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["context_length"] = context_tokens
    config["model"]["eos_token_id"] = stop_ids
    config["search"]["max_length"] = context_tokens
    path.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
