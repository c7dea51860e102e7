"""How does a prefix begin on a model that trains, and how is it written? As PEFT has it (arXiv 2101.00190).

It begins as the base's own keys and values of tokens drawn by the seed: an untrained prefix is the base with these
tokens before the text, also in layers whose prefix never trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgeft.models.cache_names import cache_of
from edgeft.models.checkpoint import DTYPES, Checkpoint, TensorFile
from edgeft.models.evaluate import autocast
from edgeft.models.kv_prefix import PEFT_NAME, Pair, attention_of, hang, kv_shape, pairs_in, pairs_of
from edgeft.models.parts import Parts
from edgeft.settings.job import Training
from edgeft.settings.tuners import PREFIX


def inject(model: Any, parts: Parts, training: Training, stored: Checkpoint | None = None) -> None:
    """A prefix in every layer, in fp32."""
    hang(model, parts, _begun(model, parts, training))


def start_ids(words: int, training: Training) -> torch.Tensor:
    """The tokens (1, n) that a prefix begins as."""
    random = torch.Generator().manual_seed(training.seed)
    return torch.randint(words, (1, training.prefix_tokens), generator=random)


def _begun(model: Any, parts: Parts, training: Training) -> list[Pair]:
    config = model.config.get_text_config(decoder=True)
    embedding: Any = parts.embedding
    device = embedding.weight.device
    if device.type == "meta":
        heads, width = kv_shape(config)
        shape = (heads, training.prefix_tokens, width)
        return [(torch.empty(shape, device=device), torch.empty(shape, device=device)) for _ in parts.layers]
    ids = start_ids(config.vocab_size, training).to(device)
    with torch.no_grad(), autocast(device, DTYPES[training.compute_dtype]):
        made = cache_of(parts.body(input_ids=ids, use_cache=True))
    return [(each.keys[0].float().clone(), each.values[0].float().clone()) for each in made.layers]


def written(model: Any, parts: Parts, training: Training) -> tuple[Any, dict[str, torch.Tensor]]:
    """What PEFT reads of it: its config, and the keys and values of all layers, trained or not."""
    from peft import PrefixTuningConfig

    pairs = pairs_of(parts)
    heads, tokens, width = pairs[0][0].shape
    config = PrefixTuningConfig(
        num_virtual_tokens=tokens, num_layers=len(pairs), num_attention_heads=heads, token_dim=heads * width,
        encoder_hidden_size=heads * width, num_transformer_submodules=1, task_type="CAUSAL_LM", inference_mode=True,
    )  # fmt: skip
    return config, {PEFT_NAME: flat(pairs).cpu()}


def flat(pairs: list[Pair]) -> torch.Tensor:
    """Keys and values as PEFT lays them out, see `pairs_in`."""
    each = [tensor.float().transpose(0, 1).flatten(1) for pair in pairs for tensor in pair]
    return torch.cat(each, dim=1).contiguous()


def restore(model: nn.Module, parts: Parts, saved: TensorFile) -> None:
    """Give every layer what was written of it."""
    pairs = pairs_in(saved.read(PEFT_NAME), len(parts.layers), pairs_of(parts)[0][0].shape[0])
    with torch.no_grad():
        for layer, (keys, values) in zip(parts.layers, pairs, strict=True):
            own: Any = attention_of(layer)._modules[PREFIX]
            own.keys.copy_(keys)
            own.values.copy_(values)


def scale(module: Any, share: float) -> None:
    """A prefix is there: a share of one is not between base and fine-tune."""
    if share != 1.0:
        raise ValueError(f"a prefix at a share of {share:g}")
