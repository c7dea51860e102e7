"""What shape has this model, and how many parameters has each part of it, read from config.json alone?

A family of architectures is a row of FAMILIES; any other model is built on the meta device and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pydantic

from edgeft.documents import Strict, invalid
from edgeft.errors import BadInput
from edgeft.models.config_file import check_kind, config_path, read_object, text_config
from edgeft.models.families import COPY_AGAIN, ESSENTIAL, FAMILIES, SHAPE, SIZES, Family, Role, family_of
from edgeft.models.headers import check_weights, has_weights, refuse_other_weights

STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}  # of an element in a checkpoint's files


class Linear(Strict):
    """One linear projection of a decoder layer; `name` is unique in it and a valid PEFT target module."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool
    role: Role

    @property
    def parameters(self) -> int:
        """in * out, plus out when it has a bias."""
        return self.in_features * self.out_features + (self.out_features if self.has_bias else 0)


class ModelSpec(Strict):
    """The shape of a causal language model, with exact parameter counts; a tied head counts once."""

    model: str
    model_type: str
    architecture: str
    counted_from: Literal["config", "meta model"]
    dtype: str  # of the stored weights
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int | None  # None: no limit in the config (ALiBi models)
    tie_word_embeddings: bool
    sliding_window: int | None
    final_logit_softcapping: float | None
    attn_logit_softcapping: float | None
    hidden_act: str
    linears: tuple[Linear, ...]  # of the first decoder layer
    gated_mlp: bool
    qk_norm: bool
    norms_per_layer: int  # over the hidden size; query and key norms are not among them
    norm_parameters_per_layer: int  # query and key norms included
    embedding_parameters: int
    layer_parameters: tuple[int, ...]  # one per decoder layer
    head_parameters: int  # 0 when tied
    other_parameters: int  # final norm, learned positions, projections around the embedding
    total_parameters: int
    stacked: tuple[str, ...] = ()  # parameters that transformers puts together from several tensors of the files

    @property
    def family(self) -> Family:
        """The row of its model type."""
        return family_of(self.model_type)

    @property
    def exact(self) -> bool:
        """Whether its operations are written down in `edgeft.memory.dataflow`; others get a wider margin."""
        return self.model_type in FAMILIES and self.counted_from == "config"

    @property
    def stored_bytes(self) -> int:
        """Bytes of the checkpoint's weight files."""
        return self.total_parameters * STORED_BYTES.get(self.dtype, 4)


def read_model_spec(model: str) -> ModelSpec:
    """The spec of a checkpoint folder, or of a hub id while the hub or its cache has it. Raises BadInput.

    Where the folder has weights, their names and shapes must be those of the config, and their dtype is the spec's.
    """
    path = config_path(model)
    spec = spec_of(path, read_object(path), model)
    if not has_weights(path.parent):
        refuse_other_weights(path.parent)
        return spec
    return spec.model_copy(update={"dtype": check_weights(path.parent, spec) or spec.dtype})


def spec_of(path: Path, config: dict[str, Any], model: str) -> ModelSpec:
    """The spec of a config alone; of families that are not known, of the file in `path`. Raises BadInput."""
    check_kind(path, config)
    own = text_config(path, config)
    dtypes = [place.get(key) for place in (config, own) for key in ("dtype", "torch_dtype")]
    told = [str(dtype).removeprefix("torch.") for dtype in dtypes if dtype not in (None, "auto")]
    family = FAMILIES.get(own["model_type"])
    if family is None or any(own.get(key, value) != value for key, value in family.assumes.items()):
        values = _from_meta_model(path)
    else:
        values = _from_family(path, family, own)
    values |= {"model": model, "model_type": own["model_type"]}
    values["dtype"] = (told or ["float32"])[0]
    parts = (values["embedding_parameters"], values["head_parameters"], values["other_parameters"])
    try:
        return ModelSpec(**values, total_parameters=sum(parts) + sum(values["layer_parameters"]))
    except pydantic.ValidationError as problem:
        raise invalid(path, problem, ModelSpec) from None


def _from_family(path: Path, family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a known family, by arithmetic on its row."""
    value = _values(path, family, config)
    hidden, layers, heads, vocab = (value[key] for key in ESSENTIAL if key != "intermediate_size")
    kv_heads, head_dim = _divided(path, value)
    intermediate = value["intermediate_size"] or 4 * hidden
    widths = {
        "hidden": hidden,
        "query": heads * head_dim,
        "key": kv_heads * head_dim,
        "qkv": (heads + 2 * kv_heads) * head_dim,
        "inner": intermediate,
        "gate_up": 2 * intermediate,
    }
    linears = tuple(
        Linear(
            name=row,
            in_features=widths[input],
            out_features=widths[output],
            has_bias=bool(value.get(bias, False)) if isinstance(bias, str) else bias,
            role=role,
        )
        for row, input, output, bias, role in family.linears
    )
    norms = family.norms * _norm(family, hidden) + (2 * head_dim if family.qk_norm else 0)
    embedding = vocab * _embedding_width(value)
    mlp_width = sum(linear.out_features for linear in linears if linear.role == "mlp_in")
    return {key: value.get(key) for key in SHAPE} | {
        "architecture": family.architecture,
        "counted_from": "config",
        "intermediate_size": intermediate,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "sliding_window": value.get("sliding_window") if value.get("use_sliding_window", True) else None,
        "linears": linears,
        "gated_mlp": mlp_width == 2 * intermediate,
        "qk_norm": family.qk_norm,
        "norms_per_layer": family.norms,
        "norm_parameters_per_layer": norms,
        "embedding_parameters": embedding,
        "layer_parameters": (sum(linear.parameters for linear in linears) + norms,) * layers,
        "head_parameters": 0 if value["tie_word_embeddings"] else embedding,
        "other_parameters": _other_parameters(family, value),
    }


def _values(path: Path, family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """What the config says, under edgeft's names. Raises BadInput for what is missing or no size."""
    essential = [key for key in ESSENTIAL if key not in family.optional]
    name = {key: family.names.get(key, key) for key in (*essential, *family.optional)}
    value: dict[str, Any] = {key: config.get(name[key], family.optional.get(key)) for key in name}
    problems = [f"missing {name[key]}" for key in essential if value[key] is None]
    problems += [
        f"{name[key]}: expected a positive whole number, got {value[key]!r}"
        for key in SIZES
        if value.get(key) is not None and (type(value[key]) is not int or not 1 <= value[key] < 2**31)
    ]
    if problems:
        raise BadInput(path, "\n".join(problems), COPY_AGAIN)
    return value


def _divided(path: Path, value: dict[str, Any]) -> tuple[int, int]:
    """(key-value heads, the width of a head). Raises BadInput where heads do not divide evenly."""
    hidden, heads = value["hidden_size"], value["num_attention_heads"]
    kv_heads = value.get("num_key_value_heads") or heads
    if heads % kv_heads or (not value.get("head_dim") and hidden % heads):
        what = f"hidden size {hidden}, {heads} heads and {kv_heads} key-value heads do not divide evenly"
        raise BadInput(path, what, COPY_AGAIN)
    return kv_heads, value.get("head_dim") or hidden // heads


def _norm(family: Family, hidden: int) -> int:
    """Parameters of one norm over the hidden size."""
    return hidden * (2 if family.norm_bias else 1)


def _embedding_width(value: dict[str, Any]) -> int:
    return int(value.get("word_embed_proj_dim") or value["hidden_size"])


def _other_parameters(family: Family, value: dict[str, Any]) -> int:
    """Of the final norm, learned positions, and projections into and out of a narrower embedding, without a bias."""
    hidden, width = value["hidden_size"], _embedding_width(value)
    found = _norm(family, hidden) if value.get("do_layer_norm_before", True) else 0  # OPT's may follow the blocks
    found += 2 * hidden * width if width != hidden else 0
    if family.position_offset is not None:
        found += (value["max_position_embeddings"] + family.position_offset) * hidden
    return found


def _meta_model(path: Path) -> tuple[Any, Any]:
    """(config, model) of any causal language model that transformers knows, built without memory. Raises BadInput."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        loaded = AutoConfig.from_pretrained(path.parent)
        check_kind(path, {"model_type": loaded.model_type, "is_encoder_decoder": loaded.is_encoder_decoder})
        with torch.device("meta"):
            net: torch.nn.Module = AutoModelForCausalLM.from_config(loaded)  # type: ignore[no-untyped-call]
    except BadInput:
        raise
    except Exception as problem:  # a model's code may raise anything here
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        hint = "known without transformers: " + ", ".join(FAMILIES)
        raise BadInput(path, f"transformers cannot build this model: {reason:.200}", hint) from None
    return loaded.get_text_config(decoder=True), net


def _from_meta_model(path: Path) -> dict[str, Any]:
    """The fields of a model that no row of FAMILIES describes, read off the model itself."""
    from edgeft.models.parts import find_parts, is_linear, units

    config, net = _meta_model(path)
    found = find_parts(net)
    kinds = sorted({type(layer).__name__ for layer in found.layers})
    if len(kinds) > 1:
        raise BadInput(path, f"its layers are of different kinds: {', '.join(kinds)}", "edgeft plans equal layers only")
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", None)
    if not heads:
        raise BadInput(path, f"{type(net).__name__} has no attention heads", "edgeft plans attention models only")
    embedding, head = _count(found.embedding), 0 if found.tied else _count(found.head)
    parameters_of = units(net, found)
    layers = [sum(p.numel() for _, p in parameters_of[f"layer {i}"]) for i in range(len(found.layers))]
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    modules = dict(found.layers[0].named_modules())
    linears = _guess_roles({n: m for n, m in modules.items() if is_linear(m)}, hidden, heads * head_dim, head_dim)
    inputs = {role: sum(x.out_features for x in linears if x.role == role) for role in ("attention_in", "mlp_in")}
    intermediate = max((x.in_features for x in linears if x.role == "mlp_out"), default=4 * hidden)
    norms = {name: module for name, module in modules.items() if "Norm" in type(module).__name__}
    qk_norms = [name for name in norms if re.search(r"(^|\.)(q|k|query|key)_\w+$", name)]
    return {key: getattr(config, key, None) for key in SHAPE} | {
        "architecture": type(net).__name__,
        "counted_from": "meta model",
        "intermediate_size": intermediate,
        "num_key_value_heads": _key_value_heads(config, inputs["attention_in"], head_dim),
        "head_dim": head_dim,
        "tie_word_embeddings": found.tied,
        "hidden_act": str(getattr(config, "hidden_act", None) or getattr(config, "activation_function", "unknown")),
        "linears": linears,
        "gated_mlp": inputs["mlp_in"] == 2 * intermediate,
        "qk_norm": bool(qk_norms),
        "norms_per_layer": len(norms) - len(qk_norms),
        "norm_parameters_per_layer": _count(*norms.values()),
        "embedding_parameters": embedding,
        "layer_parameters": tuple(layers),
        "head_parameters": head,
        "other_parameters": _count(net) - embedding - head - _count(found.layers),
        "stacked": _stacked(net),
    }


def _count(*modules: Any) -> int:
    """Parameters of modules; what they share counts once."""
    return sum(weight.numel() for weight in {weight for module in modules for weight in module.parameters()})


def _key_value_heads(config: Any, attention_width: int, head_dim: int) -> int:
    """Falcon and others name their key-value heads in their own ways; the width of q, k and v together tells."""
    heads = int(config.num_attention_heads)
    found, rest = divmod(attention_width - heads * head_dim, 2 * head_dim)
    return int(getattr(config, "num_key_value_heads", None) or heads) if rest or not 1 <= found <= heads else found


def _stacked(net: Any) -> tuple[str, ...]:
    """The parameters of a model that its files do not hold under a name of their own, such as a layer's experts."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5, names in memory were those of the files
        return ()
    stored = revert_weight_conversion(net, dict(net.state_dict()))
    ends = {name.rpartition(".layers.")[2] for name in stored}
    own = dict(net.named_parameters())
    renamed = Counter(tuple(stored[name].shape) for name in stored if name not in own)
    found = []
    for name, parameter in own.items():
        if name.rpartition(".layers.")[2] in ends:
            continue
        shape = tuple(parameter.shape)
        if renamed[shape]:  # one tensor of the files under another name, such as GPT-NeoX's embed_out
            renamed[shape] -= 1
        else:
            found.append(name)
    return tuple(found)


def _guess_roles(modules: dict[str, Any], hidden: int, query: int, head_dim: int) -> tuple[Linear, ...]:
    """A layer's projections, in order, with the role their shapes imply; "other" when they imply none.

    What is narrower than a head, as what chooses experts, has none. The MLP's width is the largest that leads back to
    the hidden size. The last projection from the query heads' width to the hidden size is the attention's output. Names
    lose their module unless two clash.
    """
    # Conv1D (GPT-2's linear) keeps its weight as in x out, nn.Linear as out x in.
    shapes = {n: tuple(m.weight.shape)[:: 1 if type(m).__name__ == "Conv1D" else -1] for n, m in modules.items()}
    width = max((i for i, o in shapes.values() if o == hidden and i not in (hidden, query)), default=0)
    last = [name for name, shape in shapes.items() if shape == (query, hidden)][-1:]
    leaves = Counter(name.rpartition(".")[2] for name in modules)
    linears = []
    for name, (inner, outer) in shapes.items():
        projects = inner == hidden and outer >= head_dim
        role: Role = "attention_in" if projects else "other"
        if (inner, outer) == (width, hidden):
            role = "mlp_out"
        elif inner == hidden and outer in (width, 2 * width):
            role = "mlp_in"
        elif name in last:
            role = "attention_out"
        leaf, bias = name.rpartition(".")[2], modules[name].bias is not None
        short = leaf if leaves[leaf] == 1 else name
        linears.append(Linear(name=short, in_features=inner, out_features=outer, has_bias=bias, role=role))
    return tuple(linears)
