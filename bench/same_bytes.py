"""Is a bundle of a larger shape, rounded matrix by matrix, byte for byte what the runtime's builder rounds by itself?

    make bench-same-bytes

The comparison of tests/targets/test_nbits.py on shapes that people have, with random weights: every node on blocks with
its attributes, codes, scales and zero points, and the kind of every other node. The builder holds the whole graph.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from large_stages import random_shards
from run import ROOT, record

from edgeft.models.spec import read_model_spec
from edgeft.targets.ort import build_model
from edgeft.targets.target import load_target

sys.path.insert(0, str(ROOT / "tests"))
from runtimes import by_builder

CASES = (("smollm2-135m", "ort-int4"), ("smollm2-135m", "ort-int8"), ("llama-3.2-1b", "ort-int4"))
ON_BLOCKS = ("MatMulNBits", "GatherBlockQuantized")
OURS = ("/lm_head/last/Slice", "/lm_head/last/Gather")  # edgeft's own: the head sees the last positions alone


class Graph:
    """What a folder's graph computes, and digests of the tensors that it computes with."""

    def __init__(self, folder: Path) -> None:
        import onnx

        graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
        self.folder = folder
        self.tensors = {each.name: each for each in graph.initializer}
        self.reshaped = {each.output[0]: each.input[0] for each in graph.node if each.op_type == "Reshape"}
        skipped = {"Constant", "Reshape", *ON_BLOCKS}
        self.others = {each.name: each.op_type for each in graph.node if each.op_type not in skipped}
        self.nodes = {each.name: each for each in graph.node if each.op_type in ON_BLOCKS}
        self.onnx = onnx

    def on_blocks(self, name: str) -> tuple[Any, ...]:
        """A node's kind, attributes and the digest of each input that a file holds."""
        node = self.nodes[name]
        attributes = {each.name: self.onnx.helper.get_attribute_value(each) for each in node.attribute}
        held = (self.tensors.get(self.reshaped.get(each, each)) for each in node.input)
        return node.op_type, attributes, [self.digest(each) for each in held if each is not None]

    def digest(self, tensor: Any) -> tuple[Any, ...]:
        place = {entry.key: entry.value for entry in tensor.external_data}
        data = tensor.raw_data
        if place:
            with open(self.folder / place["location"], "rb") as file:
                file.seek(int(place.get("offset", 0)))
                data = file.read(int(place["length"]))
        return tuple(tensor.dims), tensor.data_type, len(data), hashlib.sha256(data).hexdigest()


def compare(mine: Graph, theirs: Graph) -> dict[str, Any]:
    """How many nodes and bytes on blocks were compared, and which nodes are not the builder's."""
    different, size = [], 0
    for name in sorted({*mine.nodes, *theirs.nodes}):
        pair = [graph.on_blocks(name) if name in graph.nodes else None for graph in (mine, theirs)]
        different += [name] if pair[0] != pair[1] else []
        size += sum(digest[2] for digest in pair[1][2]) if pair[1] else 0
    own, others = {**mine.others}, theirs.others
    for name in OURS:
        own.pop(name, None)
    different += sorted(name for name in {*own, *others} if own.get(name) != others.get(name))
    return {"nodes": len(theirs.nodes), "other_nodes": len(others), "bytes": size, "different": different}


def main() -> None:
    rows = []
    for name, target in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            source, wanted = random_shards(folder / "model", name), load_target(target)
            mine = folder / "mine"
            mine.mkdir()
            build_model(source, wanted, read_model_spec(str(source)), mine)
            found = compare(Graph(mine), Graph(by_builder(source, wanted, (), folder / "theirs")))
            shutil.rmtree(mine)
        rows.append({"model": name, "target": target, **found})
        print(json.dumps(rows[-1]), flush=True)
    record("same_bytes", {"rows": rows})


if __name__ == "__main__":
    main()
