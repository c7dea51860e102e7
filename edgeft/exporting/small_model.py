"""What is the smallest part of a model that goes through every later stage as the whole would? Its first layers.

Width, vocabulary, tokenizer, template and everything else of the config stay as they are: they are what a stage may
not know. Only the number of layers is cut, to two, or to as many as show every kind of layer that the model has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgeft.errors import BadInput
from edgeft.models.checkpoint import Checkpoint, TensorFile, copy_side_files, quiet_transformers, write_checkpoint

LAYERS = 2  # one could not show what passes from layer to layer
MOST_LAYERS = 8  # Gemma 3's sixth layer is its first with full attention; more than this is no excerpt


class CannotCut(BadInput):
    """A model that has no excerpt, which says nothing about whether the model itself would pass."""


def cut(source: Path, out: Path) -> int:
    """Write the excerpt of checkpoint folder `source` into `out`, a standard folder too; how many layers it has.

    Real weights in the files' own dtype, a tensor in memory at a time. Raises CannotCut with the reason, BadInput for a
    folder that cannot be read.
    """
    count = count_layers(source)
    checkpoint = keep_first(Checkpoint(source), count)
    copy_side_files(source, out)
    _cut_config(out / "config.json", source, count)
    for _ in write_checkpoint(checkpoint, out, lambda name, tensor: tensor):
        pass
    return count


def count_layers(source: Path) -> int:
    """How many of the first layers an excerpt takes. Raises CannotCut where no few layers stand for all."""
    checkpoint, config = Checkpoint(source), _text_config(source)
    total = int(config.num_hidden_layers)
    layers = _layers_of(checkpoint, total)
    per_layer = [value for value in config.to_dict().values() if isinstance(value, list) and len(value) == total]
    kinds: list[object] = []
    for layer in range(total):
        tensors = frozenset((part, checkpoint.shape(name)) for name, (at, part) in layers.items() if at == layer)
        kinds.append((tensors, tuple(json.dumps(value[layer], default=str) for value in per_layer)))
    needed = max(kinds.index(kind) for kind in kinds) + 1
    if needed > min(MOST_LAYERS, total):
        problem = f"its {total} layers are of {len(set(kinds))} kinds, which the first {MOST_LAYERS} do not show"
        raise CannotCut(source, problem)
    return min(total, max(LAYERS, needed))


def keep_first(checkpoint: Checkpoint, count: int) -> Checkpoint:
    """The same checkpoint without its later layers; files that held nothing else are left out."""
    total = int(_text_config(checkpoint.folder).num_hidden_layers)
    layers = _layers_of(checkpoint, total)
    kept: list[TensorFile] = []
    for file in checkpoint.files:
        file.entries = {name: entry for name, entry in file.entries.items() if layers.get(name, (0, ""))[0] < count}
        kept += [file] if file.entries else []
    checkpoint.files = kept
    checkpoint.owner = {name: file for file in kept for name in file.entries}
    return checkpoint


def _layers_of(checkpoint: Checkpoint, total: int) -> dict[str, tuple[int, str]]:
    """(layer, name within it) of every tensor that belongs to one of the model's layers.

    They are the tensors numbered 0 to total - 1 behind one prefix; numbers further in count experts. Where another
    tower of the model has as many layers, the text model's is the one with more weights by far.
    """
    found: dict[str, dict[str, tuple[int, str]]] = {}
    for name in checkpoint.owner:
        match = re.match(r"(.*?)(?:^|\.)(\d+)\.(.+)$", name)
        if match:
            found.setdefault(match[1], {})[name] = (int(match[2]), match[3])
    right = {
        prefix: names for prefix, names in found.items() if {layer for layer, _ in names.values()} == set(range(total))
    }
    if not right:
        raise CannotCut(checkpoint.folder, f"no {total} layers are numbered in its tensors' names")
    sizes = {prefix: sum(_elements(checkpoint.shape(name)) for name in names) for prefix, names in right.items()}
    best = max(sizes, key=lambda prefix: sizes[prefix])
    if sizes[best] < 0.6 * sum(sizes.values()):
        raise CannotCut(checkpoint.folder, f"several parts of it have {total} layers: {', '.join(sorted(right))}")
    return right[best]


def _elements(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _text_config(folder: Path) -> Any:
    from transformers import AutoConfig

    with quiet_transformers():
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        except (OSError, ValueError, KeyError) as problem:
            raise CannotCut(folder, f"transformers cannot read its config: {problem}") from None


def _cut_config(path: Path, source: Path, count: int) -> None:
    """Say in config.json that there are `count` layers, and cut every list that has an entry per layer."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    known = _text_config(source)
    name = type(known).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    total = int(known.num_hidden_layers)
    nested = [value for value in config.values() if isinstance(value, dict) and value.get(name) == total]
    for part in [config] if name in config or not nested else nested[:1]:
        part[name] = count
        for key, value in part.items():
            if isinstance(value, list) and len(value) == total:
                part[key] = value[:count]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
