"""Where does a model keep its layers, embeddings and head, and which unit is each parameter of?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeft.data.samples import Sample
from edgeft.errors import BadInput
from edgeft.models.stacks import (
    Layers,
    Path,
    Stack,
    find_stacks,
    given,
    inside,
    layer_lists,
    meet,
    outside_lists,
    owners,
    rows,
    split,
    token_paths,
)
from edgeft.settings.tuners import PROMPT

Units = dict[str, list[tuple[str, nn.Parameter]]]  # (name, parameter) by unit


@dataclass(frozen=True)
class Parts:
    """The pieces of one language model. `body(input_ids=...)` gives the hidden states that `head` turns into logits.

    With an encoder and a decoder, `body`, `layers` and `layers_path` are the decoder's; `stacks` has both.
    """

    body: nn.Module
    layers: Layers
    layers_path: str
    embedding: nn.Module
    head: nn.Module
    stacks: tuple[Stack, ...]
    text_path: str  # of the smallest module that holds the stacks and their token embeddings; "" is the model itself
    start: Callable[[Sequence[Sample]], AbstractContextManager[None]] | None = None  # `edgeft.models.boundary`

    @property
    def tied(self) -> bool:
        """Whether head and token embedding are one tensor."""
        return not set(self.embedding.parameters()).isdisjoint(self.head.parameters())

    def starting(self, samples: Sequence[Sample]) -> AbstractContextManager[None]:
        """Where `body` is to run on `samples`: with what is kept of them, if anything is."""
        return contextlib.nullcontext() if self.start is None else self.start(samples)

    def head_weight(self) -> torch.Tensor:
        """What hidden states are multiplied with: the head's weight, rounded where it trains for a target."""
        head: Any = self.head
        return head.rounded.table() if hasattr(head, "rounded") else head.weight  # type: ignore[no-any-return]


def find_parts(model: nn.Module) -> Parts:
    """The parts of a language model. Raises BadInput as find_stacks does, and when there is no language-model head."""
    stacks, tokens = find_stacks(model), token_paths(model)
    embedding = given(model, "get_input_embeddings") or model.get_submodule(".".join(tokens[0]))
    head = given(model, "get_output_embeddings")
    if head is None or isinstance(head, nn.Embedding):  # not given, or given as the table that it is tied to
        head = _vocabulary_linear(model, embedding) or head
    if head is None:
        raise BadInput(type(model).__name__, "has no language-model head", "use a ...ForCausalLM checkpoint")
    around = [_around(stack, tokens) for stack in stacks]
    body = _body(model, stacks[-1].layers, around[-1], head)
    text = ".".join(meet(*around))
    return Parts(body, stacks[-1].layers, stacks[-1].path, embedding, head, stacks, text)


def units(model: nn.Module, parts: Parts) -> Units:
    """Every parameter of the model in exactly one unit, as (name, parameter): a partition.

    "layer 0", "layer 1", ... (with two stacks "encoder layer 0", ..., "decoder layer 0", ...), "embedding" (token, and
    learned position and type tables; a tied head's weight), "norm" (what else the text model has: norms, projections),
    "head" (its own weight and bias; empty when tied without a bias), and only where there is such a thing "other":
    towers of other modalities and what leads from them into the text model. A parameter that several layers share
    belongs to the first of them.
    """
    found: Units = {}
    unit_of: dict[nn.Parameter, str] = {}
    for stack in parts.stacks:
        for number, layer in enumerate(stack.layers):
            found[stack.unit(number)] = []
            for parameter in layer.parameters():
                unit_of.setdefault(parameter, stack.unit(number))
    text, head_path = split(parts.text_path), _path_of(model, parts.head)
    towers = _towers(model, parts, head_path)
    unit_of |= {parameter: "head" for parameter in parts.head.parameters()}
    unit_of |= {parameter: "embedding" for parameter in parts.embedding.parameters()}
    served = (text, meet(head_path, text))  # beside the text model, only what stands where the head does serves it
    for name, module in model.named_modules():
        path = split(name)
        is_other = any(inside(path, tower) for tower in towers) or meet(path, text) not in served
        kind = "other" if is_other else "embedding" if isinstance(module, nn.Embedding) else "norm"
        kind = PROMPT if path[-1:] == (PROMPT,) else kind
        for parameter in module.parameters(recurse=False):
            unit_of.setdefault(parameter, kind)
    found |= {"embedding": [], "norm": [], "head": []}
    for name, parameter in model.named_parameters():
        found.setdefault(unit_of[parameter], []).append((name, parameter))
    return found


def _vocabulary_linear(model: nn.Module, embedding: nn.Module) -> nn.Module | None:
    """The one linear module outside lists whose outputs are as many as the embedding has rows, or None."""
    words = max(rows(module) for module in embedding.modules())
    found = [x for x in outside_lists(model) if is_linear(x) and getattr(x, "out_features", 0) == words]
    return found[0] if len(found) == 1 else None


def _around(stack: Stack, tokens: list[Path]) -> Path:
    """The smallest module that holds a stack and its token embedding."""
    path = split(stack.path)
    return max((meet(path, token) for token in tokens), key=len)


def _body(model: nn.Module, layers: Layers, around: Path, head: nn.Module) -> nn.Module:
    """The module that turns ids into hidden states: what the model calls its decoder, if that has no head.

    Else the largest one without the head that holds layers and token embedding; else, the head within, the smallest.
    """
    decoder = given(model, "get_decoder")
    if decoder is not None and layers in (within := set(decoder.modules())) and head not in within:
        return decoder
    modules = [model.get_submodule(".".join(around[:length])) for length in range(len(around) + 1)]
    headless = [module for module in modules if head not in set(module.modules())]
    return headless[0] if headless else modules[-1]


def _towers(model: nn.Module, parts: Parts, head_path: Path) -> list[Path]:
    """The largest module around each list of layers that is none of the text model's and holds nothing of its."""
    own = [*owners(model, [parts.embedding]), head_path, *(split(stack.path) for stack in parts.stacks)]
    towers = []
    for path in layer_lists(model, own):
        if path not in own:
            prefixes = [path[:length] for length in range(1, len(path) + 1)]
            towers.append(next(prefix for prefix in prefixes if not any(inside(part, prefix) for part in own)))
    return towers


def _path_of(model: nn.Module, module: nn.Module) -> Path:
    return next(split(name) for name, part in model.named_modules() if part is module)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product that adapters can sit on: Linear, its 4-bit form, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit")


def repeat_for_groups(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                      attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
                      is_causal: bool | None = None, **_: object) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Scaled dot-product attention with key and value heads repeated; (B, S, heads, head_dim) and None.

    Before compute capability 8.0 grouped-query attention otherwise falls to the math kernel, whose S x S scores turn
    7.5 GiB into 12.9 at 4,096 tokens of an 8B model; the memory-efficient kernel needs equal head counts.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    causal = (is_causal if is_causal is not None else True) and attention_mask is None and query.shape[2] > 1
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, is_causal=causal
    )
    return output.transpose(1, 2).contiguous(), None


def cap_scores(model: nn.Module) -> None:
    """Make a transformers model that caps its scores (Gemma 2) compute them itself.

    PyTorch's kernels know no caps, and some versions of transformers (5.17) take them all the same: the caps are
    left out without a word.
    """
    causal: Any = model
    config = causal.config.get_text_config(decoder=True)
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation != "eager":
        causal.set_attn_implementation("eager")


def repeat_groups(model: nn.Module) -> None:
    """Make a transformers model attend with `repeat_for_groups` where it attends by torch's own function.

    One that caps its scores (Gemma-2) computes them itself, and must go on doing so.
    """
    causal: Any = model
    if causal.config.get_text_config(decoder=True)._attn_implementation != "sdpa":
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("edgeft_repeat", repeat_for_groups)
    AttentionMaskInterface.register("edgeft_repeat", sdpa_mask)
    causal.set_attn_implementation("edgeft_repeat")
