"""How does one portable graph take prefixes and bottlenecks as inputs, so that a device switches without a reload?

Its past is an input as it is: what lies before a text is a file of keys and values that run.py begins the past with. A
bottleneck is y + GELU(y D) U on a module's output, or of its input, with D and U inputs of the graph that default to
width 0: without an adapter the base answers, bit for bit. The base is there once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edgeft.documents import saving
from edgeft.errors import BadInput
from edgeft.exporting.adapters import FOLDER, AdapterSource, Written
from edgeft.models.bottleneck import places
from edgeft.models.checkpoint import TensorFile, write_tensors
from edgeft.models.kv_prefix import PEFT_NAME, kept
from edgeft.models.soft_prompt import pairs_of
from edgeft.models.spec import ModelSpec
from edgeft.settings.tuners import BESIDE, NARROW, SAVED, TUNERS, WIDE
from edgeft.training.result import TrainResult

Tensors = dict[str, torch.Tensor]  # by the names of a graph's inputs
PAST = "past_key_values."
# what a linear module's last operation gives, in the graph that optimum exports: with a bias, without
RESULTS = ("Add_output_0", "MatMul_output_0")
HALF, ONE, ROOT = "edgeft_half", "edgeft_one", "edgeft_root_of_two"


def inputs_of(folder: Path, result: TrainResult, base: Path) -> Tensors:
    """What a graph is given of a training result: keys and values before the text, or a bottleneck's matrices."""
    training, file = result.plan.training, TensorFile(folder / "adapter_model.safetensors")
    if TUNERS[training.tuner].prefixed:
        return kept(pairs_of(file.read(PEFT_NAME), base, result.plan.spec, embeds=training.embeds))
    names = {name.removeprefix(SAVED): name for name in file.entries}
    places(names)
    return {name: file.read(key).float().T.contiguous() for name, key in names.items()}


def add_inputs(
    folder: Path, spec: ModelSpec, sources: Sequence[AdapterSource]
) -> tuple[dict[str, list[int]], dict[str, Written]]:
    """(the graph's inputs and their shapes, the adapters' files) after changing model.onnx in `folder` where it must.

    Raises BadInput for a bottleneck on a module that has no output of its own in the graph.
    """
    inputs: dict[str, list[int]] = {}
    for source in sources:
        inputs |= {name: open_shape(name, tensor.shape) for name, tensor in (source.tensors or {}).items()}
    hung = {name: shape for name, shape in inputs.items() if not name.startswith(PAST)}
    if hung:
        import onnx

        model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        hang_in_graph(model.graph, hung, sources[0].folder)
        with saving(folder):
            (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    with saving(folder):
        (folder / FOLDER).mkdir(exist_ok=True)
    return dict(sorted(inputs.items())), {source.name: write_inputs(folder, source, inputs) for source in sources}


def open_shape(name: str, shape: Iterable[int]) -> list[int]:
    """An input's shape, 0 for what each adapter has its own of: tokens, or the inner width."""
    sizes = list(shape)
    sizes[2 if name.startswith(PAST) else 1 if name.endswith(NARROW) else 0] = 0
    return sizes


def write_inputs(folder: Path, source: AdapterSource, inputs: Mapping[str, list[int]]) -> Written:
    """One source's file. Raises BadInput where the graph has not its inputs, or takes them of other shapes."""
    tensors = source.tensors or {}
    other = [name for name, tensor in tensors.items() if inputs.get(name) != open_shape(name, tensor.shape)]
    if other:
        problem = f"gives {len(other)} tensors that the bundle's graph has no inputs for:\n" + "\n".join(other[:8])
        hint = "train what its adapters train, or export all of them again: edgeft adapters NAME=TRAIN ..."
        raise BadInput(source.folder, problem, hint)
    file = f"{FOLDER}/{source.name}.safetensors"
    with saving(folder):
        write_tensors(folder / file, tensors)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    tokens = next((shape[2] for name, shape in shapes.items() if name.startswith(PAST)), 0)
    rank = next((shape[1] for name, shape in shapes.items() if name.endswith(NARROW)), 0)
    return Written(file, rank, dict(sorted(shapes.items())), tokens)


def hang_in_graph(graph: Any, inputs: Mapping[str, list[int]], folder: Path) -> None:
    """Give a graph a bottleneck for each pair of inputs. Raises BadInput naming modules that it does not have."""
    from onnx import TensorProto, helper

    found = {place: _place(graph, *place) for place in places(inputs)}
    if lost := [".".join(place) for place, tensors in found.items() if tensors is None]:
        problem = "changes what has no output of its own in the runtime's graph:\n" + "\n".join(lost[:8])
        raise BadInput(folder, problem, "merge it and export a bundle of its own")
    for name, value in ((HALF, 0.5), (ONE, 1.0), (ROOT, 2.0**0.5)):
        graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
    for name, shape in inputs.items():  # an initializer of the same name makes an input optional
        graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, shape, []))
        sizes = [size or f"{name}.width" for size in shape]
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))
    after: dict[str, list[tuple[str, str, str]]] = {}
    for (module, where), tensors in found.items():
        assert tensors is not None
        down, up = (f"{module}.{where}.{part}" for part in (NARROW, WIDE))
        after.setdefault(tensors[1], []).append((tensors[0], down, up))
    nodes = []
    for node in graph.node:
        nodes.append(node)
        for place, output in enumerate(node.output):
            if output in after:
                node.output[place] = f"{output}/base"
                nodes += _branches(output, after[output])
    del graph.node[:]
    graph.node.extend(nodes)


def _place(graph: Any, module: str, where: str) -> tuple[str, str] | None:
    """(what a bottleneck reads, what it is added to) of a module in a graph; None where the graph has no such thing."""
    makers, scope = {name: node for node in graph.node for name in node.output}, _scope(module)

    def result(path: str) -> str | None:
        return next((name for kind in RESULTS if (name := f"{path}/{kind}") in makers), None)

    if where != BESIDE:
        made = result(scope)
        return None if made is None else (f"{made}/base", made)
    made = result(f"{scope}/down_proj")
    first = next((node for node in graph.node if node.name.startswith(f"{scope}/gate_proj/MatMul")), None)
    if made is None or first is None:
        return None
    given = first.input[0]
    rounds = makers.get(given)
    return (rounds.input[0] if rounds is not None and rounds.op_type == "DynamicQuantizeLinear" else given), made


def _scope(module: str) -> str:
    """A module's name as the exporter writes it: model.layers.0.mlp is /model/layers.0/mlp."""
    return "/" + re.sub(r"\.(?!\d+(\.|$))", "/", module)


def _branches(made: str, each: Sequence[tuple[str, str, str]]) -> list[Any]:
    """made = made/base + GELU(given D) U + ..., GELU by the error function as torch has it."""
    from onnx import helper

    nodes, before = [], f"{made}/base"
    for given, down, up in each:
        name, after = f"/{down.removesuffix(f'.{NARROW}')}", f"{made}/with {down}"
        steps = [
            ("MatMul", [given, down], "low"), ("Div", ["low", ROOT], "part"), ("Erf", ["part"], "error"),
            ("Add", ["error", ONE], "more"), ("Mul", ["low", "more"], "twice"), ("Mul", ["twice", HALF], "bent"),
            ("MatMul", ["bent", up], "wide"), ("Add", [before, "wide"], after),
        ]  # fmt: skip
        own = {step[2]: f"{name}/{step[2]}" for step in steps[:-1]} | {after: made if down == each[-1][1] else after}
        nodes += [
            helper.make_node(kind, [own.get(part, part) for part in read], [own[out]], name=f"{name}/{n}_{kind}")
            for n, (kind, read, out) in enumerate(steps)
        ]
        before = after
    return nodes
