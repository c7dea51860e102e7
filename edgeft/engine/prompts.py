"""How does a soft prompt begin on a model that trains, and how is it written? As PEFT has it (arXiv 2104.08691).

It begins as the embeddings of tokens drawn by the seed: untrained, it is the base with these tokens before the text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgeft.engine.prefixes import start_ids
from edgeft.models.checkpoint import DTYPES, Checkpoint, TensorFile
from edgeft.models.kv_prefix import PEFT_NAME
from edgeft.models.parts import Parts
from edgeft.models.soft_prompt import hang, prompt_of
from edgeft.settings.job import Training


def inject(model: Any, parts: Parts, training: Training, stored: Checkpoint | None = None) -> None:
    """A prompt before all that the model reads, in fp32."""
    hang(model, parts, _begun(model, parts, training), DTYPES[training.compute_dtype])


def _begun(model: Any, parts: Parts, training: Training) -> torch.Tensor:
    embedding: Any = parts.embedding
    device = embedding.weight.device
    if device.type == "meta":
        return torch.empty((training.prefix_tokens, embedding.weight.shape[1]), device=device)
    ids = start_ids(model.config.get_text_config(decoder=True).vocab_size, training).to(device)
    with torch.no_grad():
        return embedding(ids)[0].float().clone()  # type: ignore[no-any-return]


def written(model: Any, parts: Parts, training: Training) -> tuple[Any, dict[str, torch.Tensor]]:
    """What PEFT reads of it: its config, and the embeddings."""
    from peft import PromptTuningConfig

    embeddings, config = prompt_of(parts).embeddings.detach(), model.config.get_text_config(decoder=True)
    told = PromptTuningConfig(
        num_virtual_tokens=len(embeddings), token_dim=embeddings.shape[1], num_layers=len(parts.layers),
        num_attention_heads=config.num_attention_heads, num_transformer_submodules=1, task_type="CAUSAL_LM",
        inference_mode=True,
    )  # fmt: skip
    return told, {PEFT_NAME: embeddings.float().cpu().contiguous()}


def restore(model: nn.Module, parts: Parts, saved: TensorFile) -> None:
    """Give the prompt what was written of it."""
    with torch.no_grad():
        prompt_of(parts).embeddings.copy_(saved.read(PEFT_NAME))
