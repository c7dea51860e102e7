"""How does a checkpoint become ONNX that any runtime reads: exported by optimum, standard operators, 8 bits or none?"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy

from edgeft.data.tokenizer import SPECIALS, TextTokenizer, read_json, write_template
from edgeft.documents import saving
from edgeft.errors import BadInput, EdgeftError, MissingExtra
from edgeft.machines.limits import MALLOC_ENVIRONMENT, resident_bytes
from edgeft.models.spec import ModelSpec
from edgeft.targets import optimum_script
from edgeft.targets.matrices import Weights
from edgeft.targets.target import Target

MODEL, DATA = "model.onnx", "model.onnx.data"
TASK = "text-generation-with-past"
INTERPRETER = "EDGEFT_OPTIMUM_PYTHON"  # the environment variable that names it
FOLDER = ".venv-optimum"  # where it is looked for, from the current folder on
EXTERNAL_BYTES = 1024  # a tensor of more goes to the data file, which a runtime maps
HINT = (
    f"make optimum, or: python3 -m venv {FOLDER} && {FOLDER}/bin/pip install 'optimum-onnx[onnxruntime]==0.1.0' "
    f"accelerate; it is found in this folder, elsewhere by {INTERPRETER}=.../bin/python"
)


def interpreter() -> str:
    """The Python that has optimum: the one that is named, this one, else the environment that `make` keeps here.

    Raises BadInput when the named one does not exist, MissingExtra (exit 5) when there is none.
    """
    named = os.environ.get(INTERPRETER)
    if named:
        found = shutil.which(named)
        if found is None:
            raise BadInput(INTERPRETER, f"no such program: {named}", HINT)
        return found
    if importlib.util.find_spec("optimum") is not None:
        return sys.executable
    beside = Path(FOLDER, "bin", "python")
    if beside.is_file():
        return str(beside.absolute())
    problem = "is not installed; it wants an older transformers than edgeft and lives in an environment of its own"
    raise MissingExtra("optimum-onnx", problem, HINT)


def build_model(merged: Path, target: Target, spec: ModelSpec, folder: Path) -> int:
    """model.onnx, its weights and the tokenizer in `folder`.

    Returns the exporter's highest resident bytes, 0 where no /proc tells them. Raises BadInput for an architecture
    that optimum does not know or that is not a decoder with keys and values alone, MissingExtra without optimum.
    """
    peak = write_graph(merged, target, TASK, folder)
    inputs = {value.name.partition(".")[0] for value in _load(folder).graph.input}
    unknown = sorted(inputs - {"input_ids", "attention_mask", "position_ids", "past_key_values"})
    if unknown:
        problem = f"its ONNX graph asks for {', '.join(unknown)}, which run.py cannot give"
        raise BadInput(merged, problem, "export with an ort- target")
    write_tokenizer(merged, folder, TextTokenizer(merged))
    return peak


def write_graph(merged: Path, target: Target, task: str, folder: Path) -> int:
    """model.onnx and model.onnx.data for one of optimum's tasks; the exporter's highest resident bytes."""
    import onnx

    peak = _run(merged, folder, task, target.opset)
    scratch = folder / ".scratch"
    model = onnx.load(str(scratch / MODEL))
    if target.weight_bits == 8:
        model = _quantise(model, scratch)
    _only_standard(model, target)
    for node in model.graph.node:
        node.doc_string = ""
    versions = json.loads((scratch / "versions.json").read_text(encoding="utf-8"))
    onnx.helper.set_model_props(model, versions)  # of the exporter's environment, which bundle.json does not know
    with saving(folder):
        onnx.save_model(
            model, str(folder / MODEL), save_as_external_data=True, all_tensors_to_one_file=True, location=DATA,
            size_threshold=EXTERNAL_BYTES,
        )  # fmt: skip
    shutil.rmtree(scratch)
    return peak


def _run(merged: Path, folder: Path, task: str, opset: int) -> int:
    """Run the exporter in its own process and environment; offline."""
    scratch = folder / ".scratch"
    scratch.mkdir()
    command = [interpreter(), "-P", str(Path(optimum_script.__file__)), str(merged.resolve()), str(scratch.resolve())]
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment = kept | {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(scratch.resolve()), **MALLOC_ENVIRONMENT,
    }  # fmt: skip
    done = subprocess.run(
        [*command, task, str(opset)], capture_output=True, text=True, errors="replace", env=environment, check=False
    )
    if done.returncode == 0 and (scratch / MODEL).is_file():
        return resident_bytes(highest=True, status=scratch / "status")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no output"]
    if lines[-1].startswith("ModuleNotFoundError"):
        raise MissingExtra("optimum-onnx", f"cannot be imported by {command[0]}: {lines[-1]}", HINT)
    if "No space left on device" in done.stderr:
        raise OSError(28, "No space left on device")  # `staging` words it
    if "unsupported architecture" in lines[-1] or "Unrecognized configuration class" in done.stderr:
        raise BadInput(merged, f"optimum cannot export this architecture: {lines[-1]}", "choose another target")
    last = "\n".join(lines[-3:])
    raise EdgeftError(merged, f"optimum's exporter failed (exit {done.returncode}):\n{last}", "choose another target")


def _only_standard(model: Any, target: Target) -> None:
    """Nothing. Raises EdgeftError for an operator that is not ONNX's own, or of another version than the target's."""
    domains = {node.domain for node in _nodes(model.graph)} | {entry.domain for entry in model.opset_import}
    versions = {entry.version for entry in model.opset_import}
    if domains - {"", "ai.onnx"} or versions != {target.opset} or len(model.functions):
        found = f"operators of {sorted(domains)}, versions {sorted(versions)}"
        raise EdgeftError(f"target {target.name}", f"the graph has {found}, not only standard ones of {target.opset}")


def _nodes(graph: Any) -> list[Any]:
    """All nodes of a graph and of the graphs inside them."""
    found = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found += _nodes(inner)
    return found


def _quantise(model: Any, scratch: Path) -> Any:
    """The model with uint8 weights, a scale and a zero point per output, by ONNX Runtime's own quantiser.

    Activations become uint8 too, per tensor, while it runs (DynamicQuantizeLinear, MatMulInteger). Not int8: the sums
    of uint8 and int8 saturate on processors without VNNI, and a portable graph shall give one answer everywhere.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    table = _untie(model)
    whole, rounded = scratch / "whole.onnx", scratch / "rounded.onnx"
    onnx.save_model(model, str(whole), save_as_external_data=True, location="whole.data")
    logging.disable(logging.WARNING)  # it recommends a pass of its own that changes nothing here
    try:
        quantize_dynamic(
            whole, rounded, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QUInt8,
            use_external_data_format=True,
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    made = onnx.load(str(rounded))
    for entry in list(made.opset_import):
        if entry.domain not in ("", "ai.onnx"):  # the quantiser declares its own domain, used or not
            made.opset_import.remove(entry)
    if table:
        _look_up_in_head(made, table)
    return made


HEAD = "edgeft_head"


def _untie(model: Any) -> str:
    """Name of the embedding whose transpose is the head, after the head became a constant of its own; "" if none is.

    The quantiser leaves a product alone whose matrix is computed.
    """
    from onnx import numpy_helper

    tables = {tensor.name: tensor for tensor in model.graph.initializer}
    looked_up = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    for node in list(model.graph.node):
        if node.op_type == "Transpose" and node.input[0] in tables and node.input[0] in looked_up:
            _read_instead(model, node.output[0], HEAD)
            head = numpy_helper.to_array(tables[node.input[0]]).T
            model.graph.initializer.append(numpy_helper.from_array(numpy.ascontiguousarray(head), HEAD))
            model.graph.node.remove(node)
            return str(node.input[0])
    return ""


def _read_instead(model: Any, old: str, new: str) -> None:
    """Let every operation that reads one tensor read another one."""
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def _look_up_in_head(model: Any, table: str) -> None:
    """Read the embedding's rows from the head's rounded columns, (code - zero) * scale, and drop the fp32 table."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    lookup = next(node for node in graph.node if node.op_type == "Gather" and node.input[0] == table)
    place, ids, out = list(graph.node).index(lookup), lookup.input[1], lookup.output[0]
    codes, scale, zero = (f"{HEAD}_{part}" for part in ("quantized", "scale", "zero_point"))
    last = numpy_helper.from_array(numpy.array([-1], dtype=numpy.int64), "edgeft_last_axis")
    nodes = [
        helper.make_node("Gather", [codes, ids], ["edgeft_columns"], axis=1),  # (hidden, batch, tokens)
        helper.make_node("Transpose", ["edgeft_columns"], ["edgeft_codes"], perm=[1, 2, 0]),
        helper.make_node("Cast", ["edgeft_codes"], ["edgeft_whole"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [zero, ids], ["edgeft_zeros"], axis=0),
        helper.make_node("Cast", ["edgeft_zeros"], ["edgeft_zero"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["edgeft_zero", last.name], ["edgeft_zero_last"]),
        helper.make_node("Gather", [scale, ids], ["edgeft_scales"], axis=0),
        helper.make_node("Unsqueeze", ["edgeft_scales", last.name], ["edgeft_scale_last"]),
        helper.make_node("Sub", ["edgeft_whole", "edgeft_zero_last"], ["edgeft_steps"]),
        helper.make_node("Mul", ["edgeft_steps", "edgeft_scale_last"], [out]),
    ]
    for node in nodes:
        node.name = f"/edgeft/{node.output[0]}"
    graph.node.remove(lookup)
    for node in reversed(nodes):
        graph.node.insert(place, node)
    graph.initializer.append(last)
    graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == table))


def _load(folder: Path) -> Any:
    """The ONNX model without its weights."""
    import onnx

    return onnx.load(str(folder / MODEL), load_external_data=False)


def read_weights(folder: Path) -> Weights:
    """Sizes of a graph's constants. An embedding that is no head too is read one row per token: not counted as read."""
    import onnx

    graph = _load(folder).graph
    stored = {
        tensor.name: int(numpy.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in graph.initializer
        if tensor.data_type != onnx.TensorProto.INT64  # shapes and axes
    }
    readers: dict[str, set[str]] = {}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    head = _head(graph, makers, stored)
    rows = sum(stored[name] for name in stored if readers.get(name) == {"Gather"} and stored[name] > EXTERNAL_BYTES)
    return Weights(sum(stored.values()), head, sum(stored.values()) - rows)


def _head(graph: Any, makers: dict[str, Any], stored: dict[str, int]) -> int:
    """Bytes of the constants of the last product before the logits, through transposes and scales."""
    name = next((value.name for value in graph.output if value.name == "logits"), "")
    while name in makers:
        node = makers[name]
        if node.op_type in ("MatMul", "MatMulInteger"):
            second = node.input[1]
            second = makers[second].input[0] if second in makers else second
            stem = second.removesuffix("_quantized")
            parts = {second, f"{stem}_scale", f"{stem}_zero_point"} if stem != second else {second}
            return sum(stored.get(part, 0) for part in parts)
        name = node.input[0]
    return 0


def write_tokenizer(merged: Path, folder: Path, tokenizer: TextTokenizer | None) -> None:
    """tokenizer.json byte for byte, and its config; the chat template as a file of its own, wherever they were kept."""
    with saving(folder):
        shutil.copyfile(merged / "tokenizer.json", folder / "tokenizer.json")
        config = read_json(merged / "tokenizer_config.json")
        if tokenizer is not None:
            config |= {name: text for name in SPECIALS if (text := tokenizer.special(name))}
            write_template(tokenizer.template_text, folder)
        for key in ("chat_template", "is_local", "local_files_only"):
            config.pop(key, None)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def write_limits(folder: Path, context_tokens: int, stop_ids: list[int]) -> None:
    """Nothing: ONNX has no place for them, run.py reads both from bundle.json."""
