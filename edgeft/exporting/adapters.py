"""How does one graph take LoRA adapters as inputs, so that a device switches between them without a reload?

Every matmul that any of the adapters changes gets y = x W + (x A) B, with A and B inputs of the graph that default to
rank 0: without an adapter the base answers, bit for bit. ONNX Runtime feeds them from .onnx_adapter files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from edgeft.data.dataset import TextTokenizer
from edgeft.documents import saving
from edgeft.errors import BadInput
from edgeft.exporting.bundle import GoldenInput, PromptFormat
from edgeft.merging.peft_folder import lora_scale, read_adapter_config
from edgeft.models.checkpoint import Checkpoint, TensorFile
from edgeft.models.metrics import Proof
from edgeft.models.spec import ModelSpec
from edgeft.settings.tuners import ADAPTERS, DOWN, UP, Tuning, adapter_parts
from edgeft.targets.runtimes import runtime_of
from edgeft.targets.target import Target

FOLDER = "adapters"
Matrix = numpy.ndarray[Any, numpy.dtype[numpy.float32]]
# The builder's names of the matmuls: /model/layers.3/attn/qkv_proj/MatMul_Q4
NODE = re.compile(r"/model/layers\.(\d+)/(\w+)/(\w+)/MatMul(?:_Q\d)?")
MODULE = re.compile(r"(?:.*\.)?layers\.(\d+)\.(\w+)\.(\w+)\.weight")
BLOCKS = {"self_attn": "attn", "mlp": "mlp"}  # transformers' names: the builder's


class AdapterSource(NamedTuple):
    """An adapter to put into a bundle: {weight name: (A (in, r), B (r, out) with the scale)}, and what proves it."""

    name: str
    folder: Path
    changes: dict[str, tuple[Matrix, Matrix]]
    base_sha256: str
    train_sha256: str
    prompt_format: PromptFormat
    prompts: Sequence[GoldenInput]
    tokenizer: TextTokenizer
    prove: Callable[[Any], Proof] | None = None  # given the bundle in its runtime, with this adapter in use
    system: str | None = None  # message that every training row had
    tensors: dict[str, Any] | None = None  # by a portable graph's inputs (`exporting.portable_adapters`)


class Written(NamedTuple):
    """What became of an adapter: its file in the bundle, rank, and the names and shapes in it."""

    file: str
    rank: int
    parameters: dict[str, list[int]]
    tokens: int = 0  # that it puts before the text


def check_switches(target: Target) -> None:
    """Nothing. Raises BadInput for a target whose bundles hold one model each."""
    if runtime_of(target).switches is None:
        problem = f"runs in {target.runtime}, which edgeft cannot give several adapters to switch between"
        hint = "choose an ort- or onnx-portable- target, or export each merged model by itself"
        raise BadInput(f"target {target.name}", problem, hint)


def check_switched(folder: Path, tuner: Tuning, target: Target) -> None:
    """Nothing. Raises BadInput for what was trained where a target's runtime cannot switch to it."""
    check_switches(target)
    own, beside = "merge it and export a bundle of its own", not tuner.folds
    inputs = runtime_of(target).switches == "inputs"
    if beside and not inputs:
        problem = f"was trained by {tuner.title}, and the graph of {target.name} takes no more than factors of weights"
        raise BadInput(folder, problem, f"choose an onnx-portable- target, or {own}")
    if tuner.switched and inputs:
        problem = f"was trained by {tuner.title}, whose factors the graph of {target.name} has no inputs for"
        raise BadInput(folder, problem, f"choose an ort- target, or {own}")
    if not tuner.switched and not beside:
        problem = f"was trained by {tuner.title}, whose change cannot be switched to"
        raise BadInput(folder, problem, f"plan with --set tuner={'prefix' if inputs else ADAPTERS}, or {own}")


def factors(folder: Path, base: Path) -> dict[str, tuple[Matrix, Matrix]]:
    """LoRA's factors by the base's weights, the scale in the second one."""
    config, weights = read_adapter_config(folder), Checkpoint(base)
    file, changes = TensorFile(folder / "adapter_model.safetensors"), {}
    for module, keys in adapter_parts(file.entries).items():
        down, up = (file.read(keys[part.strip(".")]).float().numpy().T for part in (DOWN, UP))
        scale = numpy.float32(lora_scale(config, module, down.shape[1]))
        changes[weights.name_of(f"{module}.weight")] = (down, up * scale)
    return changes


def add_adapters(
    folder: Path, spec: ModelSpec, sources: Sequence[AdapterSource]
) -> tuple[dict[str, list[int]], dict[str, Written]]:
    """(the graph's new inputs and their shapes, the adapters' files) after changing model.onnx in `folder`.

    Raises BadInput for an adapter of a weight that is no matmul of its own in the graph, or of another shape.
    """
    import onnx

    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    sizes = _matmuls(model.graph)
    packed = {source.name: _pack(source, sizes, spec) for source in sources}
    changed = [place for place in sizes if any(place in parts for parts in packed.values())]
    inputs = _add_inputs(model.graph, {place: sizes[place] for place in changed})
    with saving(folder):
        (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
        (folder / FOLDER).mkdir()
        return inputs, {source.name: _write(folder, source, packed[source.name]) for source in sources}


def write_adapter(folder: Path, spec: ModelSpec, source: AdapterSource, inputs: Mapping[str, list[int]]) -> Written:
    """An adapter's file for a graph that has its inputs already, which is only read.

    Raises BadInput for an adapter of a weight that has no input there.
    """
    import onnx

    parts = _pack(source, _matmuls(onnx.load(str(folder / "model.onnx"), load_external_data=False).graph), spec)
    lost = [place for place in parts if not all(name in inputs for name in _names(place))]
    if lost:
        problem = f"changes {len(lost)} products that the bundle's graph has no inputs for:\n" + "\n".join(lost[:8])
        hint = "train the modules that its adapters train, or export all of them again: edgeft adapters NAME=TRAIN ..."
        raise BadInput(source.folder, problem, hint)
    with saving(folder):
        return _write(folder, source, parts)


def _matmuls(graph: Any) -> dict[str, tuple[int, int]]:
    """(in, out) of every layer's matmuls by the place where they are, as in layers.3.attn.qkv_proj."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes |= {  # weights stored in fp16 are cast
        node.output[0]: shapes[node.input[0]]
        for node in graph.node
        if node.op_type == "Cast" and node.input[0] in shapes
    }
    found = {}
    for node in graph.node:
        match = NODE.fullmatch(node.name)
        if match is None or node.op_type not in ("MatMul", "MatMulNBits"):
            continue
        place = "layers.{}.{}.{}".format(*match.groups())
        values = {attribute.name: attribute.i for attribute in node.attribute}
        found[place] = (values["K"], values["N"]) if node.op_type == "MatMulNBits" else shapes[node.input[1]]
    return found


def _pack(
    source: AdapterSource, sizes: Mapping[str, tuple[int, int]], spec: ModelSpec
) -> dict[str, tuple[Matrix, Matrix]]:
    """An adapter's matrices by place in the graph. q, k and v of one matmul: their A side by side, their B diagonal."""
    heads, kv_heads = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    columns = {"q_proj": (0, heads), "k_proj": (heads, kv_heads), "v_proj": (heads + kv_heads, kv_heads)}
    parts: dict[str, list[tuple[int, Matrix, Matrix]]] = {}
    lost = []
    for weight, (a, b) in source.changes.items():
        match = MODULE.fullmatch(weight)
        layer, block, leaf = match.groups() if match else ("", "", "")
        place, start = f"layers.{layer}.{BLOCKS.get(block, block)}.{leaf}", 0
        if place not in sizes and leaf in columns:
            place, (start, width) = place.removesuffix(leaf) + "qkv_proj", columns[leaf]
            if b.shape[1] != width:
                place = ""
        elif place in sizes and b.shape[1] != sizes[place][1]:
            place = ""
        if place not in sizes or a.shape[0] != sizes[place][0] or start + b.shape[1] > sizes[place][1]:
            lost.append(f"{weight}: {a.shape[0]} to {b.shape[1]} values")
        else:
            parts.setdefault(place, []).append((start, a, b))
    if lost:
        hint = "train with --set target_modules=... of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
        problem = "changes what is no matmul of its own in the runtime's graph:\n" + "\n".join(lost[:8])
        raise BadInput(source.folder, problem, hint)
    packed = {}
    for place, entries in parts.items():
        diagonal = numpy.zeros((sum(b.shape[0] for _, _, b in entries), sizes[place][1]), dtype=numpy.float32)
        row = 0
        for start, _, b in entries:
            diagonal[row : row + b.shape[0], start : start + b.shape[1]] = b
            row += b.shape[0]
        packed[place] = (numpy.concatenate([a for _, a, _ in entries], axis=1), diagonal)
    return packed


def _names(place: str) -> tuple[str, str]:
    return f"model.{place}{DOWN}weight", f"model.{place}{UP}weight"


def _add_inputs(graph: Any, sizes: Mapping[str, tuple[int, int]]) -> dict[str, list[int]]:
    """The new inputs and their shapes, 0 for the rank, after giving each of these matmuls its adapter's branch."""
    from onnx import TensorProto, helper

    inputs: dict[str, list[int]] = {}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        match = NODE.fullmatch(node.name)
        place = "layers.{}.{}.{}".format(*match.groups()) if match else ""
        if place not in sizes:
            continue
        output = node.output[0]
        node.output[0] = f"{output}/base"
        for name, shape in zip(_names(place), ([sizes[place][0], 0], [0, sizes[place][1]]), strict=True):
            inputs[name] = shape
            # an initializer of the same name makes an input optional
            graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, shape, []))
            graph.input.append(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [size or f"{place}.rank" for size in shape])
            )
        down, up = _names(place)
        nodes += [
            helper.make_node("MatMul", [node.input[0], down], [f"{output}/down"], name=f"{node.name}/lora_A"),
            helper.make_node("MatMul", [f"{output}/down", up], [f"{output}/up"], name=f"{node.name}/lora_B"),
            helper.make_node("Add", [f"{output}/base", f"{output}/up"], [output], name=f"{node.name}/lora_Add"),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    return inputs


def _write(folder: Path, source: AdapterSource, parts: Mapping[str, tuple[Matrix, Matrix]]) -> Written:
    from onnxruntime import AdapterFormat, OrtValue

    tensors = {
        parameter: numpy.ascontiguousarray(matrix, dtype=numpy.float32)
        for place, matrices in parts.items()
        for parameter, matrix in zip(_names(place), matrices, strict=True)
    }
    adapter = AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({key: OrtValue.ortvalue_from_numpy(value) for key, value in tensors.items()})
    file = f"{FOLDER}/{source.name}.onnx_adapter"
    adapter.export_adapter(str(folder / file))
    # what the contract says is read back from the file itself
    kept = AdapterFormat.read_adapter(str(folder / file)).get_parameters()
    shapes = {key: list(value.shape()) for key, value in kept.items()}
    return Written(file, max(a.shape[1] for a, _ in source.changes.values()), dict(sorted(shapes.items())))
