"""What shape has this model, and how many parameters has each part of it, read from config.json alone?

A family of architectures is a row of FAMILIES; any other model is built on the meta device and counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pydantic

from edgeft.documents import Strict, invalid
from edgeft.errors import BadInput
from edgeft.models.families import (
    COMPOSITE,
    COPY_AGAIN,
    ENCODERS,
    ESSENTIAL,
    FAMILIES,
    SHAPE,
    SIZES,
    Family,
    Role,
    family_of,
)
from edgeft.models.headers import check_weights, has_weights

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
    config = _read_object(path)
    _refuse(path, config)
    own = config
    if config["model_type"] in COMPOSITE:
        text = config.get("text_config") or {}
        if not isinstance(text, dict):
            raise BadInput(path, f"text_config: expected a JSON object, got {type(text).__name__}", COPY_AGAIN)
        own = COMPOSITE[config["model_type"]] | text
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
        spec = ModelSpec(**values, total_parameters=sum(parts) + sum(values["layer_parameters"]))
    except pydantic.ValidationError as problem:
        raise invalid(path, problem, ModelSpec) from None
    if not has_weights(path.parent):
        return spec
    return spec.model_copy(update={"dtype": check_weights(path.parent, spec) or spec.dtype})


def config_path(model: str) -> Path:
    """Where the config.json of a checkpoint folder or a hub id lies. Raises BadInput."""
    folder, hint = Path(model).expanduser(), "give the folder of a Hugging Face checkpoint (with config.json)"
    if folder.is_file():
        raise BadInput(model, "is a file, not a folder", f"give the folder that holds it: {folder.parent}")
    if not folder.is_dir():
        # A hub id is `name` or `owner/name`; `owner` being a folder here means that a path was meant.
        is_path = folder.parent.name and folder.parent.is_dir()
        if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model) and not is_path:
            return _download(model)
        raise BadInput(model, "no such folder", hint)
    if (folder / "config.json").is_file():
        return folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        base = _read_object(folder / "adapter_config.json").get("base_model_name_or_path") or "an unnamed base"
        hint = "give the base as the model, or merge the adapter into it first"
        raise BadInput(model, f"is an adapter of {base}, not a model", hint)
    raise BadInput(model, "has no config.json", hint)


def _download(model: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    problem, hint = (
        "the hub cannot be reached",
        "go online, or give the folder of a model that is on this machine",
    )
    try:
        return Path(hf_hub_download(model, "config.json"))
    except errors.GatedRepoError:
        problem, hint = "the hub model is gated", "accept its licence there and log in (hf auth login)"
    except errors.RepositoryNotFoundError:
        problem, hint = (
            "no such model on the hub",
            "check the spelling, or log in if it is private (hf auth login)",
        )
    except errors.EntryNotFoundError as missing:
        if not isinstance(missing, errors.LocalEntryNotFoundError):  # that one: offline, and not in the cache
            problem, hint = (
                "the hub model has no config.json",
                "for an adapter or a GGUF file, give its base model",
            )
    except (OSError, ValueError):
        pass
    raise BadInput(model, f"no such folder, and {problem}", hint)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as problem:
        raise BadInput(path, f"cannot be read: {problem.strerror}") from None
    except ValueError as problem:
        raise BadInput(path, f"is not JSON: {problem}", COPY_AGAIN) from None
    if not isinstance(value, dict):
        raise BadInput(path, f"expected a JSON object, got {type(value).__name__}", COPY_AGAIN)
    return value


def _refuse(path: Path, config: dict[str, Any]) -> None:
    """None for a causal language model in its original precision; else raises BadInput with the reason."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise BadInput(path, "missing model_type", 'add the family, as in "model_type": "llama"')
    architecture, reason = next(iter(config.get("architectures") or ()), ""), ""
    if config.get("is_encoder_decoder"):
        reason = f"{kind} is an encoder-decoder"
    elif kind in ENCODERS:
        reason = f"{kind} is an encoder"
    elif kind not in COMPOSITE and not re.search(r"(ForCausalLM|LMHeadModel|^)$", architecture):
        reason = f"{architecture} is not a ...ForCausalLM"
    if reason:
        hint = "edgeft trains decoder-only models that predict the next token; give one of those"
        raise BadInput(path, f"{reason}, so not a causal language model", hint)
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "method not named")
        hint = "give the checkpoint it was quantised from; edgeft quantises in memory, and again on export"
        raise BadInput(path, f"is quantised ({method}); a merge needs the original-precision weights", hint)


def _from_family(path: Path, family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a known family, by arithmetic on its row."""
    essential = [key for key in ESSENTIAL if key not in family.optional]
    name = {key: family.names.get(key, key) for key in (*essential, *family.optional)}
    value: dict[str, Any] = {key: config.get(name[key], family.optional.get(key)) for key in name}
    problems = [f"missing {name[key]}" for key in essential if value[key] is None]
    problems += [
        f"{name[key]}: expected a positive whole number, got {value[key]!r}"
        for key in SIZES
        if value.get(key) is not None and (type(value[key]) is not int or value[key] < 1)
    ]
    if problems:
        raise BadInput(path, "\n".join(problems), COPY_AGAIN)
    hidden, layers, heads, vocab = (value[key] for key in ESSENTIAL if key != "intermediate_size")
    kv_heads = value.get("num_key_value_heads") or heads
    head_dim = value.get("head_dim") or hidden // heads
    if heads % kv_heads or (not value.get("head_dim") and hidden % heads):
        what = f"hidden size {hidden}, {heads} heads and {kv_heads} key-value heads do not divide evenly"
        raise BadInput(path, what, COPY_AGAIN)
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
    norm = hidden * (2 if family.norm_bias else 1)
    norms = family.norms * norm + (2 * head_dim if family.qk_norm else 0)
    embedding_width = value.get("word_embed_proj_dim") or hidden
    # OPT: no final norm when norms follow the blocks; a narrower embedding is projected in and out, no bias.
    other = norm if value.get("do_layer_norm_before", True) else 0
    other += 2 * hidden * embedding_width if embedding_width != hidden else 0
    if family.position_offset is not None:
        other += (value["max_position_embeddings"] + family.position_offset) * hidden
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
        "embedding_parameters": vocab * embedding_width,
        "layer_parameters": (sum(linear.parameters for linear in linears) + norms,) * layers,
        "head_parameters": 0 if value["tie_word_embeddings"] else vocab * embedding_width,
        "other_parameters": other,
    }


def _from_meta_model(path: Path) -> dict[str, Any]:
    """The fields of any causal language model transformers knows, read off a model built without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgeft.models.parts import find_parts, is_linear, units

    try:
        loaded = AutoConfig.from_pretrained(path.parent)
        _refuse(path, {"model_type": loaded.model_type, "is_encoder_decoder": loaded.is_encoder_decoder})
        with torch.device("meta"):
            net: torch.nn.Module = AutoModelForCausalLM.from_config(loaded)  # type: ignore[no-untyped-call]
    except BadInput:
        raise
    except Exception as problem:  # a model's code may raise anything here
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        hint = "known without transformers: " + ", ".join(FAMILIES)
        raise BadInput(path, f"transformers cannot build this model: {reason:.200}", hint) from None
    config, found = loaded.get_text_config(decoder=True), find_parts(net)
    kinds = sorted({type(layer).__name__ for layer in found.layers})
    if len(kinds) > 1:
        raise BadInput(path, f"its layers are of different kinds: {', '.join(kinds)}", "edgeft plans equal layers only")
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", None)
    if not heads:
        raise BadInput(path, f"{type(net).__name__} has no attention heads", "edgeft plans attention models only")

    def count(*modules: torch.nn.Module) -> int:
        return sum(weight.numel() for weight in {weight for module in modules for weight in module.parameters()})

    embedding, head = count(found.embedding), 0 if found.tied else count(found.head)
    parameters_of = units(net, found)
    layers = [sum(p.numel() for _, p in parameters_of[f"layer {i}"]) for i in range(len(found.layers))]
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    modules = dict(found.layers[0].named_modules())
    linears = _guess_roles({n: m for n, m in modules.items() if is_linear(m)}, hidden, heads * head_dim, head_dim)
    inputs = {role: sum(x.out_features for x in linears if x.role == role) for role in ("attention_in", "mlp_in")}
    intermediate = max((x.in_features for x in linears if x.role == "mlp_out"), default=4 * hidden)
    # Falcon and others name their key-value heads in their own ways; the width of q, k and v together tells.
    kv_heads, rest = divmod(inputs["attention_in"] - heads * head_dim, 2 * head_dim)
    if rest or not 1 <= kv_heads <= heads:
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
    norms = {name: module for name, module in modules.items() if "Norm" in type(module).__name__}
    qk_norms = [name for name in norms if re.search(r"(^|\.)(q|k|query|key)_\w+$", name)]
    return {key: getattr(config, key, None) for key in SHAPE} | {
        "architecture": type(net).__name__,
        "counted_from": "meta model",
        "intermediate_size": intermediate,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": found.tied,
        "hidden_act": str(getattr(config, "hidden_act", None) or getattr(config, "activation_function", "unknown")),
        "linears": linears,
        "gated_mlp": inputs["mlp_in"] == 2 * intermediate,
        "qk_norm": bool(qk_norms),
        "norms_per_layer": len(norms) - len(qk_norms),
        "norm_parameters_per_layer": count(*norms.values()),
        "embedding_parameters": embedding,
        "layer_parameters": tuple(layers),
        "head_parameters": head,
        "other_parameters": count(net) - embedding - head - count(found.layers),
        "stacked": _stacked(net),
    }


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
