"""What all rows of a scoring begin with (a chat template's system message) is read once, each row behind its keys.

The same sums in another order: a row's loss moves by what rounding does, 1e-6 nats in fp32. A family whose layers keep
something else than keys and values, or that says other things behind a cache, is noticed on one row: its rows are then
read whole.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from edgeft.data.batches import Batch, make_batch
from edgeft.data.beginning import shared_tokens
from edgeft.data.samples import Sample
from edgeft.models.cache_names import cache_argument
from edgeft.models.kv_prefix import before
from edgeft.models.parts import Parts

# Of the largest state before the head: what a row's may differ by, behind a cache, from those of the row read whole.
ALIKE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
# What a model has whose layers come anew for each pass (streamed, copied, gathered): three more would save nothing.
COSTLY_PASSES = ("edgeft_window", "edgeft_shards", "edgeft_stream")


class Beginning(NamedTuple):
    """Tokens that lie before what is read of each row, and the cache that holds them; none by default."""

    tokens: int = 0
    cache: Any = None

    def rest(self, samples: Sequence[Sample]) -> list[Sample]:
        """The rows behind it."""
        if not self.tokens:
            return list(samples)
        return [
            Sample(each.ids[self.tokens :], each.labels[self.tokens :], max(0, each.prompt_tokens - self.tokens))
            for each in samples
        ]

    def read(self, parts: Parts, ids: torch.Tensor) -> torch.Tensor:
        """The hidden states (B, S, h) of ids (B, S) behind it."""
        behind = {cache_argument(parts.body): self.cache} if self.tokens else {}
        return parts.body(input_ids=ids, use_cache=False, **behind).last_hidden_state  # type: ignore[no-any-return]

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """The rows behind it as one batch; positions are those in what is read."""
        return make_batch(self.rest(samples))


NONE = Beginning()


@torch.no_grad()
def read_beginning(
    model: Any, parts: Parts, samples: Sequence[Sample], device: torch.device, dtype: torch.dtype
) -> Beginning:
    """What all rows begin with, read once; none where that saves too little, or the model does not go on from a cache.

    To be called as the rows will be read: under the same autocast, whose dtype is `dtype`.
    """
    tokens = shared_tokens(samples)
    costly = any(hasattr(model, name) for name in COSTLY_PASSES)
    if not tokens or costly or parts.start is not None or len(parts.stacks) > 1:
        return NONE
    ids = torch.tensor([max(samples, key=len).ids], device=device)
    kept = _keys_and_values(parts, ids[:, :tokens])
    if kept is None:
        return NONE
    found = Beginning(tokens, kept)
    whole = parts.body(input_ids=ids, use_cache=False).last_hidden_state[:, tokens:]
    try:
        behind = found.read(parts, ids[:, tokens:])
    except Exception:  # whatever a family's own code says to keys and values that it did not make
        return NONE
    apart = (behind - whole).abs().max() / whole.abs().max()
    return found if apart <= ALIKE[dtype] else NONE


def _keys_and_values(parts: Parts, ids: torch.Tensor) -> Any:
    """A cache of what each layer keeps of ids (1, n); None where that is not keys and values of them all."""
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

    made = DynamicCache()
    try:
        parts.body(input_ids=ids, use_cache=True, **{cache_argument(parts.body): made})
    except Exception:  # a family that wants a cache of its own kind
        return None
    if len(made.layers) != len(parts.layers):
        return None
    if any(type(each) is not DynamicLayer or each.get_seq_length() != ids.shape[1] for each in made.layers):
        return None
    layers: Any = made.layers
    return Cache(layers=[_layer()(each.keys, each.values) for each in layers])


@functools.cache
def _layer() -> Any:
    from transformers import cache_utils

    layer: Any = cache_utils.DynamicLayer

    class Before(layer):  # type: ignore[misc]
        """Keys and values (1, heads, n, d) that lie before those of every row, and stay as they are."""

        def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
            super().__init__()
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
            return before(self.keys, key_states), before(self.values, value_states)

    return Before
