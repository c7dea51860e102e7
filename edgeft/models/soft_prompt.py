"""How does a model read trained embeddings before every text? Once, as the keys and values that it makes of them.

What a causal model makes of a token does not depend on what follows: the keys and values of a soft prompt (arXiv
2104.08691), run through the model alone, are those that it would have before any row. From there on they are a prefix's
(`kv_prefix`), in training, for scores, on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeft.models import kv_prefix
from edgeft.models.kv_prefix import Pair, attention_of
from edgeft.models.parts import Parts, find_parts
from edgeft.models.spec import ModelSpec
from edgeft.models.streamed import load_streamed
from edgeft.settings.tuners import PREFIX, PROMPT

PEFT_KIND = "PROMPT_TUNING"  # of an adapter that holds one; its only tensor is called as a prefix's


class Made(nn.Module):
    """Keys and values that one layer's attention sees before any text: what it made of the prompt when it read it."""

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    reads = False  # the prompt now

    def keep(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """What the attention of one row, the prompt, sees."""
        self.keys, self.values = key.squeeze(0), value.squeeze(0)

    def pair(self) -> Pair:
        """What was kept."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def drop(self) -> None:
        self.keys = self.values = None


class SoftPrompt(nn.Module):
    """Embeddings (tokens, width) that lie before every text, and where each layer keeps what it makes of them."""

    def __init__(self, embeddings: torch.Tensor, compute: torch.dtype, parts: Parts) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(embeddings)
        self.compute = compute
        self.made = [Made() for _ in parts.layers]  # a plain list: they hang under the layers
        self._read: int | None = None  # the version of the embeddings that was read for passes without gradients
        for layer, made in zip(parts.layers, self.made, strict=True):
            attention_of(layer).add_module(PREFIX, made)

    def drop(self) -> None:
        """Forget what was read."""
        self._read = None
        for each in self.made:
            each.drop()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        for each in self.made:
            each.reads = True
        try:
            yield
        finally:
            for each in self.made:
                each.reads = False

    def read(self, body: nn.Module) -> None:
        """Let a model's body read the prompt, if what it made of it is of another one, or gradients are wanted."""
        wanted = torch.is_grad_enabled() and self.embeddings.requires_grad
        if not wanted and self._read == self.embeddings._version:
            return
        self.drop()
        start = self.embeddings[None].to(self.compute)
        if wanted:  # once it has its gradient, the pass is over
            start.register_hook(lambda gradient: self.drop())  # type: ignore[no-untyped-call]
        else:
            self._read = self.embeddings._version
        with self._reading():
            body(inputs_embeds=start, use_cache=False)

    def before(self, body: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A body's arguments for a text behind the prompt, which is read first."""
        if self.made[0].reads:
            return None
        self.read(body)
        return kv_prefix.behind(len(self.embeddings), body, given, named)


def hang(model: Any, parts: Parts, embeddings: torch.Tensor, compute: torch.dtype) -> None:
    """Put embeddings before all that a model, which computes in `compute`, reads from now on."""
    prompt = SoftPrompt(embeddings, compute, parts)
    parts.body.add_module(PROMPT, prompt)
    parts.body.register_forward_pre_hook(prompt.before, with_kwargs=True)
    kv_prefix.attend_with(model)


def prompt_of(parts: Parts) -> SoftPrompt:
    """The prompt that hangs on a model."""
    found: Any = parts.body._modules[PROMPT]
    return found  # type: ignore[no-any-return]


def seen(layer: nn.Module) -> tuple[torch.Tensor, ...]:
    """What a decoder layer made of a prompt, where there is one that was read."""
    made = _made_in(layer)
    return () if made is None or made.keys is None else made.pair()


def is_read(layer: nn.Module) -> bool:
    """Whether a decoder layer reads a prompt now: a few tokens, once for all rows, whose activations are kept."""
    made = _made_in(layer)
    return made is not None and made.reads


def _made_in(layer: nn.Module) -> Made | None:
    found = (layer._modules[name] for name in kv_prefix.ATTENTIONS if name in layer._modules)
    made = next((each._modules.get(PREFIX) for each in found if each is not None), None)
    return made if isinstance(made, Made) else None


def pairs_of(saved: torch.Tensor, base: Path, spec: ModelSpec, *, embeds: bool) -> list[Pair]:
    """The keys and values of every layer, of PEFT's tensor of a prefix, or of a prompt (`embeds`) that `base` reads."""
    if embeds:
        return pairs_made(base, saved)
    return kv_prefix.pairs_in(saved, spec.num_hidden_layers, spec.num_key_value_heads)


@torch.no_grad()
def pairs_made(folder: Path, embeddings: torch.Tensor) -> list[Pair]:
    """The keys and values that a checkpoint's layers make of a prompt, in fp32, one layer in memory at a time."""
    model = load_streamed(folder)
    parts = find_parts(model)
    hang(model, parts, embeddings.float(), torch.float32)
    prompt = prompt_of(parts)
    prompt.read(parts.body)
    return [(keys.clone(), values.clone()) for keys, values in map(Made.pair, prompt.made)]
