"""Which lists of modules are the text model's layers? Found in its structure, not by class or attribute names.

What is relied on: layers stand in a list as long as the config says; the list of the text model is nearer to the token
embedding in the tree of modules than any other; a tower of another modality has a config of another class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

from torch import nn

from edgeft.errors import BadInput

Layers = nn.ModuleList | nn.Sequential
Path = tuple[str, ...]  # a module's dotted name, split; () is the model itself


@dataclass(frozen=True)
class Stack:
    """One stack of transformer layers. `name` is "encoder" or "decoder" when the model has both, else ""."""

    name: str
    path: str
    layers: Layers

    def unit(self, number: int) -> str:
        """`layer 3`, or `encoder layer 3`: the layer's key in `parts.units`."""
        return f"{self.name} layer {number}".lstrip()


def find_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """Every stack of the text model's layers: one, or an encoder's and a decoder's in this order.

    Raises BadInput listing the lists there are when none has the config's layer count or several could be meant.
    """
    config: Any = model.config
    tokens = token_paths(model)
    text = _text_config(config)
    lists = _nearest(
        {
            path: layers
            for path, layers in layer_lists(model, tokens).items()
            if not _foreign(model, path, text, tokens)
        },
        tokens,
    )
    if getattr(config, "is_encoder_decoder", False):
        numbers = _whole_numbers(_fields(config), "layer", nested=True)
        encoder, decoder = _sides(model, lists)
        if encoder:  # else it reads something else than tokens
            first, second = _the_one(model, encoder, set(), numbers), _the_one(model, decoder, set(), numbers)
            return Stack("encoder", *first), Stack("decoder", *second)
    counts = _whole_numbers({"layers": getattr(text, "num_hidden_layers", None)}, "layers")
    numbers = _whole_numbers(_fields(text), "layer") | _whole_numbers(_fields(config), "layer")
    return (Stack("", *_the_one(model, lists, counts, numbers)),)


def _sides(model: nn.Module, lists: dict[Path, Layers]) -> tuple[dict[Path, Layers], dict[Path, Layers]]:
    """The lists of the encoder and those of the decoder."""
    decoder = given(model, "get_decoder")
    if decoder is None or set(lists.values()) <= set(decoder.modules()):  # it has none that is a module of its own
        # an encoder is made before the decoder that reads from it
        return dict(list(lists.items())[:-1]), dict(list(lists.items())[-1:])
    held = set(decoder.modules())
    return (
        {path: layers for path, layers in lists.items() if layers not in held},
        {path: layers for path, layers in lists.items() if layers in held},
    )


def _the_one(model: nn.Module, lists: dict[Path, Layers], counts: set[int], numbers: set[int]) -> tuple[str, Layers]:
    """The (path, list) that holds the layers. Raises BadInput when none of `lists` fits, or several do.

    Its length is one of `counts`; or else one of `numbers`, whatever they count, when hardly another list is there:
    num_hidden_layers is twice LongCat's layers, and Blenderbot's encoder's in its decoder.
    """
    right = [path for path in lists if len(lists[path]) in counts]
    rivals = right or list(lists)
    right = right or [path for path in lists if len(lists[path]) in numbers]
    listed = ", ".join(f"{'.'.join(path)} ({_describe(layers)})" for path, layers in lists.items()) or "none"
    name = type(model).__name__
    if not right:
        expected = ", ".join(map(str, sorted(counts or numbers))) or "no number"
        problem = f"the config says {expected} for its layers; the lists of layers beside the token embedding: {listed}"
        raise BadInput(name, problem, "correct the number in config.json if it is wrong")
    sizes = {path: sum(parameter.numel() for parameter in lists[path].parameters()) for path in rivals}
    path = max(right, key=lambda path: sizes[path])
    # Small helpers of the same length may stand beside the layers. XLM keeps attentions and MLPs in a list each.
    if sizes[path] < 0.9 * sum(sizes.values()):
        raise BadInput(name, f"it is not clear which list holds its layers: {listed}", "report this model")
    return ".".join(path), lists[path]


def _describe(layers: Layers) -> str:
    return f"{len(layers)} {' and '.join(sorted({type(layer).__name__ for layer in layers}))}"


def layer_lists(model: nn.Module, tokens: list[Path]) -> dict[Path, Layers]:
    """Lists with a member of two or more weight matrices, by path; none that holds a token embedding or lies in one.

    Members of a list that holds an embedding are whole models. Lists inside a layer (its experts) are part of it.
    """
    found: dict[Path, Layers] = {}
    for name, module in model.named_modules():
        path = split(name)
        if (
            isinstance(module, Layers)
            and not any(inside(path, outer) for outer in found)
            and not any(inside(token, path) for token in tokens)
            and any(len(list(islice(_matrices(member), 2))) == 2 for member in module)
        ):
            found[path] = module
    return found


def _matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in module.parameters() if parameter.ndim > 1)


def _foreign(model: nn.Module, path: Path, text: Any, tokens: list[Path]) -> bool:
    """Whether a list belongs to another modality: to a module with a config of another class that embeds no tokens."""
    around = [path[:length] for length in range(1, len(path))]
    configs = [(outer, getattr(model.get_submodule(".".join(outer)), "config", None)) for outer in around]
    classes = {outer: type(config) for outer, config in configs if config is not None}
    if not classes:
        return False
    own = list(classes.values())[-1]  # the nearest; a part may share its config with the whole that embeds
    whole = next(outer for outer in classes if classes[outer] is own)
    return own not in (type(text), type(model.config)) and not any(inside(token, whole) for token in tokens)


def _nearest(lists: dict[Path, Layers], tokens: list[Path]) -> dict[Path, Layers]:
    """The lists that share the longest path with a token embedding.

    A tied weight appears in several places. One from where a list is farther away than from another place (the head,
    T5's `shared`) says nothing.
    """
    reach = {token: {path: len(meet(path, token)) for path in lists} for token in tokens}
    depth = {path: max(reach[token][path] for token in tokens) for path in lists}
    near: set[Path] = set()
    for distances in reach.values():
        claimed = [path for path in lists if distances[path] == max(distances.values())]
        if all(distances[path] == depth[path] for path in claimed):
            near.update(claimed)
    return {path: layers for path, layers in lists.items() if path in near}


def token_paths(model: nn.Module) -> list[Path]:
    """The paths of every module that owns a token embedding's parameter. Raises BadInput when there is none."""
    sides = [model]
    if getattr(model.config, "is_encoder_decoder", False):
        sides += [side for side in (given(model, "get_encoder"), given(model, "get_decoder")) if side is not None]
    words = _whole_numbers(_fields(model.config), "vocab", nested=True)
    tables = [table for side in sides for table in _tables(side, words)]
    paths = owners(model, tables)
    if not paths:
        raise BadInput(type(model).__name__, "has no token embedding", "use a language model")
    return paths


def _tables(model: nn.Module, words: set[int]) -> list[nn.Module]:
    """What the model calls its input embedding, if it has a row per word; else the embeddings outside lists that do."""
    table = given(model, "get_input_embeddings")
    if table is not None and any(isinstance(part, nn.Embedding) or rows(part) in words for part in table.modules()):
        return [table]
    found = [module for module in outside_lists(model) if isinstance(module, nn.Embedding)]
    most = max(map(rows, found), default=0)
    return [table for table in found if rows(table) in words] or [table for table in found if rows(table) == most]


def rows(module: nn.Module) -> int:
    """Rows of a module's own largest matrix; 0 when it has none."""
    return max((parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.ndim == 2), default=0)


def outside_lists(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that are in no ModuleList, and so in no layer."""
    lists = [split(name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, module in model.named_modules():
        if not any(inside(split(name), path) for path in lists):
            yield module


def owners(model: nn.Module, modules: list[nn.Module]) -> list[Path]:
    """Every path of a module that owns a parameter of one of `modules`: tied weights have several."""
    weights = {parameter for module in modules for parameter in module.parameters()}
    return [
        split(name)
        for name, module in model.named_modules(remove_duplicate=False)
        if not weights.isdisjoint(module.parameters(recurse=False))
    ]


def given(model: nn.Module, method: str) -> nn.Module | None:
    """What a method of transformers' models gives, or None: code from elsewhere may lack it or not answer it."""
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config(decoder=True)
    except (AttributeError, ValueError):
        return config


def _fields(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    return fields


def _whole_numbers(fields: dict[str, Any], word: str, nested: bool = False) -> set[int]:
    """The whole numbers whose key has `word` in it."""
    found = {value for key, value in fields.items() if word in str(key) and type(value) is int}
    if nested:
        for value in fields.values():
            found |= _whole_numbers(value, word, nested) if isinstance(value, dict) else set()
    return found


def split(name: str) -> Path:
    """`model.layers` as its names."""
    return tuple(name.split(".")) if name else ()


def inside(path: Path, outer: Path) -> bool:
    """Whether a module is `outer` or lies in it."""
    return path[: len(outer)] == outer


def meet(*paths: Path) -> Path:
    """The longest path that all of them start with."""
    return tuple(names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False)))
