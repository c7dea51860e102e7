"""A graph that edgeft rounds against the one that the runtime's builder rounds by itself: nodes and bytes."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import checkpoint, save_tokenizer, some_ids
from runtimes import by_builder
from tiny import BENCH
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.errors import EdgeftError
from edgeft.exporting.artifact import ArtifactModel
from edgeft.exporting.build import build_bundle
from edgeft.models.checkpoint import load_plain
from edgeft.models.spec import read_model_spec
from edgeft.targets import nbits, onnx_file
from edgeft.targets.grid import Encoded, Grid
from edgeft.targets.ort import _nodes, build_model
from edgeft.targets.rounding import round_model
from edgeft.targets.target import Target, eight_bit_modules, load_target, promoted

ROUNDED = ("MatMulNBits", "GatherBlockQuantized")
INT4, INT8 = load_target("ort-int4"), load_target("ort-int8")


def narrow(folder: Path, tied: bool) -> Path:
    """A model whose rows no whole number of blocks fills, and whose blocks of a row are odd in number."""
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder), hidden_size=80, intermediate_size=112, num_hidden_layers=1,
        num_attention_heads=5, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rounded(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Each node on blocks by its name: kind, attributes, and of every input that a file holds its shape and bytes."""
    import onnx

    graph = onnx.load(str(folder / "model.onnx")).graph
    held = {each.name: (tuple(each.dims), each.data_type, each.raw_data) for each in graph.initializer}
    made = {node.output[0]: node for node in graph.node}

    def value(name: str) -> Any:
        shaped = made.get(name)
        return held.get(shaped.input[0] if shaped is not None and shaped.op_type == "Reshape" else name)

    found = {}
    for node in graph.node:
        if node.op_type in ROUNDED:
            attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            found[node.name] = (node.op_type, attributes, [value(name) for name in node.input])
    return found


def rest(folder: Path) -> dict[str, str]:
    """The kinds of all other nodes that compute something, by name."""
    graph = onnx_file.read_graph(folder).graph
    return {node.name: node.op_type for node in graph.node if node.op_type not in (*ROUNDED, "Constant", "Reshape")}


def alike(source: Path, target: Target, place: Path) -> None:
    spec = read_model_spec(str(source))
    modules = eight_bit_modules(target, spec.num_hidden_layers, tuple(linear.name for linear in spec.linears))
    theirs, mine = by_builder(source, target, _nodes(modules), place / "theirs"), place / "mine"
    mine.mkdir()
    build_model(source, target, spec, mine)
    wanted, given = rounded(theirs), rounded(mine)
    assert set(given) == set(wanted)
    for name, (kind, attributes, inputs) in wanted.items():
        assert given[name][:2] == (kind, attributes), name
        assert [each for each in given[name][2] if each] == [each for each in inputs if each], name
    others = rest(mine)
    assert [others.pop(f"/lm_head/last/{each}") for each in ("Slice", "Gather")] == ["Slice", "Gather"]
    assert others == rest(theirs)
    assert not list(mine.glob("*.new")) and (mine / "model.onnx.data").stat().st_size < 1.2 * spec.stored_bytes


SOME = [
    ("tied, three widths of one layer apart", True, promoted(INT4, ["layers.0.v_proj", "layers.1.down_proj"])),
    ("a table of its own", False, INT4),
]
MORE = [
    ("8 bits, tied", True, INT8),
    ("8 bits, a table of its own in fp32", False, INT8),
    ("symmetric", True, INT4.model_copy(update={"symmetric": True, "head_bits": 4})),
    ("symmetric, a table of its own in fp32", False, INT4.model_copy(update={"symmetric": True, "embedding_bits": 32})),
    ("smaller blocks, exact sums", True, INT4.model_copy(update={"block_size": 16, "accuracy_level": 0})),
    ("an eighth of the layers", True, load_target("ort-int4-mixed")),
]


@pytest.mark.parametrize(
    "tied, target",
    [pytest.param(tied, target, id=name) for name, tied, target in SOME]
    + [pytest.param(tied, target, id=name, marks=pytest.mark.slow) for name, tied, target in MORE],
)
def test_nodes_and_bytes_are_those_of_the_builders_quantiser(tmp_path: Path, tied: bool, target: Target) -> None:
    alike(checkpoint(tied), target, tmp_path)


def test_the_bench_of_whole_shapes_sees_a_byte_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    bench = importlib.import_module("same_bytes")
    folders = [tmp_path / name for name in ("mine", "theirs")]
    folders[0].mkdir()
    build_model(checkpoint(), INT4, read_model_spec(str(checkpoint())), folders[0])
    shutil.copytree(*folders)
    mine, theirs = map(bench.Graph, folders)
    for name in bench.OURS:
        del theirs.others[name]
    alike = bench.compare(mine, theirs)
    assert alike["different"] == [] and alike["nodes"] > 2 * 4 and alike["bytes"] > 10_000
    node = theirs.nodes["/model/layers.1/mlp/down_proj/MatMul_Q4"]
    place = {entry.key: entry.value for entry in theirs.tensors[node.input[2]].external_data}
    with open(folders[1] / place["location"], "r+b") as file:
        file.seek(int(place["offset"]))
        file.write(b"\x7f")
    assert bench.compare(mine, theirs)["different"] == [node.name]
    del theirs.others[next(iter(theirs.others))]
    assert len(bench.compare(mine, theirs)["different"]) == 2


@pytest.mark.slow
def test_rows_that_blocks_do_not_fill_are_padded_as_the_builder_does(tmp_path: Path) -> None:
    alike(narrow(tmp_path / "model", False), INT8, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_an_odd_number_of_blocks_computes_what_torch_does(tmp_path: Path, tied: bool) -> None:
    """The builder's own quantiser ends in an error where the head is the embedding."""
    exact = INT4.model_copy(update={"accuracy_level": 0})
    source = narrow(tmp_path / "model", tied)
    build_bundle(source, exact, tmp_path / "bundle", prompts=[], measure=False)
    model, ids = load_plain(source), some_ids(40)
    round_model(model, exact)
    with torch.no_grad():
        mine = model(torch.tensor([ids])).logits[0]
    given = torch.tensor(ArtifactModel(tmp_path / "bundle").logits(ids))
    torch.testing.assert_close(given, mine, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def in_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    build_model(checkpoint(), load_target("ort-fp32"), read_model_spec(str(checkpoint())), folder)
    return folder


def codes_of(folder: Path) -> dict[str, Encoded]:
    """Of each matmul of the layers, what nearest rounding of transposed random weights gives."""
    graph = onnx_file.read_graph(folder).graph
    shapes = {each.name: tuple(each.dims) for each in graph.initializer}
    grid = Grid(4, 32, False, "rtn")
    return {
        node.name.removesuffix("/MatMul"): grid.encode(torch.randn(*shapes[node.input[1]][::-1]))
        for node in graph.node
        if node.op_type == "MatMul" and "/layers." in node.name
    }


def test_codes_that_were_chosen_are_stored_as_they_are(in_fp32: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(in_fp32, tmp_path / "graph")
    codes = codes_of(folder)
    nbits.quantise(folder, INT4, (), {name: lambda each=each: each for name, each in codes.items()})
    stored, seen = rounded(folder), 0
    for name, each in codes.items():
        held = [part[2] for part in stored[f"{name}/MatMul_Q4"][2] if part]
        assert held == list(nbits.packed(each))
        seen += 1
    assert seen == 2 * 5 and stored["/lm_head/MatMul_Q8"][1]["bits"] == 8


def test_codes_that_do_not_belong_to_the_graph_are_refused(in_fp32: Path, tmp_path: Path) -> None:
    codes = codes_of(in_fp32)
    down = "/model/layers.0/mlp/down_proj"
    planted: list[tuple[dict[str, Encoded], str]] = [
        ({name: each for name, each in codes.items() if name != down}, f"there are no codes for {down}"),
        (codes | {"/model/layers.7/mlp/down_proj": codes[down]}, "the builder's graph has no /model/layers.7"),
        (codes | {down: codes[down].rows(slice(0, -2))}, r"are 4 bits of \(62, 128\), the graph's matrix is 4 bits"),
        (codes | {down: Grid(8, 32, False, "rtn").encode(torch.randn(64, 128))}, "are 8 bits of"),
    ]
    for at, (known, message) in enumerate(planted):
        folder = shutil.copytree(in_fp32, tmp_path / str(at))
        with pytest.raises(EdgeftError, match=message):
            nbits.quantise(folder, INT4, (), {name: lambda each=each: each for name, each in known.items()})
        assert (folder / "model.onnx").read_bytes() == (in_fp32 / "model.onnx").read_bytes()
