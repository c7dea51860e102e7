"""How good is a model on rows of data: loss per trained token, perplexity, exact match of its greedy answers?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from edgeft.architectures import Parts
from edgeft.batches import Batch, make_batch
from edgeft.data import Sample, TextTokenizer
from edgeft.loss import chunked_cross_entropy, head_transform
from edgeft.scores import Metrics

EVAL_TOKENS = 1024  # padded tokens scored at once where no plan says otherwise
MAX_ANSWER_TOKENS = 256


@contextlib.contextmanager
def autocast(device: torch.device, compute: torch.dtype) -> Iterator[None]:
    """Half-precision products where the plan computes in half; nothing at all in fp32."""
    if compute == torch.float32:
        yield
    else:
        with torch.autocast(device.type, dtype=compute):
            yield


def token_losses(
    model: Any,
    parts: Parts,
    samples: Sequence[Sample],
    device: torch.device,
    compute: torch.dtype,
    chunk_tokens: int,
) -> torch.Tensor:
    """Scalar sum of cross entropies, in nats, over the trained tokens of `samples` as one batch; keeps the graph."""
    batch = make_batch(samples).to(device)
    with autocast(device, compute):
        hidden = _hidden(model, parts, batch, compute)
        return _cross_entropy(model, parts, hidden, batch.targets, chunk_tokens)


def row_losses(
    model: Any, parts: Parts, samples: Sequence[Sample], device: torch.device, compute: torch.dtype, chunk_tokens: int
) -> list[float]:
    """`token_losses` of each row by itself, from one pass over all of them."""
    batch = make_batch(samples).to(device)
    counts = [sample.trained_tokens for sample in samples]
    with autocast(device, compute):
        hidden = _hidden(model, parts, batch, compute)
        parts_of_rows = zip(torch.split(hidden, counts), torch.split(batch.targets, counts), strict=True)
        return [float(_cross_entropy(model, parts, *row, chunk_tokens)) for row in parts_of_rows]


def _hidden(model: Any, parts: Parts, batch: Batch, compute: torch.dtype) -> torch.Tensor:
    """Last hidden states (N, h) at the batch's trained positions."""
    hidden = parts.body(input_ids=batch.ids, use_cache=False).last_hidden_state
    # CUDA's autocast leaves a LayerNorm's result in fp32: the head would be copied to fp32 for it, chunk by chunk
    return hidden.reshape(-1, hidden.shape[-1])[batch.positions].to(compute)  # type: ignore[no-any-return]


def _cross_entropy(
    model: Any, parts: Parts, hidden: torch.Tensor, targets: torch.Tensor, chunk_tokens: int
) -> torch.Tensor:
    scale, softcap = head_transform(model.config.get_text_config(decoder=True))
    head: Any = parts.head
    return chunked_cross_entropy(
        hidden, head.weight, head.bias, targets, chunk_tokens=chunk_tokens, scale=scale, softcap=softcap
    )


def by_length(samples: Sequence[Sample], tokens: int = EVAL_TOKENS) -> Iterator[list[Sample]]:
    """Samples in groups of similar length, at most `tokens` padded tokens each (one sample at least)."""
    group: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: len(sample.ids)):
        if group and len(sample.ids) * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(sample)
    yield group


@torch.no_grad()
def greedy(model: Any, prompts: Sequence[list[int]], eos_ids: Sequence[int], max_new_tokens: int,
           device: torch.device) -> list[list[int]]:  # fmt: skip
    """Greedy continuation of each prompt, in order, cut before its first end token; prompts padded on the left."""
    width = max(map(len, prompts))
    pad = eos_ids[0]
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    made = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True,
        eos_token_id=list(eos_ids), pad_token_id=pad, temperature=None, top_p=None, top_k=None,
    )[:, width:].tolist()  # fmt: skip
    return [row[: next((i for i, token in enumerate(row) if token in eos_ids), len(row))] for row in made]


def is_exact(tokenizer: TextTokenizer, sample: Sample, answer: Sequence[int]) -> bool:
    """Whether an answer reads the same as the row's completion, white space around both left out."""
    return tokenizer.decode(answer).strip() == tokenizer.decode(sample.ids[sample.prompt_tokens :]).strip()


def answer_tokens(samples: Sequence[Sample]) -> int:
    """Tokens that are enough to give the longest completion of `samples` and its end, at most MAX_ANSWER_TOKENS."""
    return min(MAX_ANSWER_TOKENS, max(len(sample.ids) - sample.prompt_tokens for sample in samples) + 1)


@torch.no_grad()
def evaluate(
    model: Any,
    parts: Parts,
    samples: Sequence[Sample],
    tokenizer: TextTokenizer,
    *,
    device: torch.device,
    compute: torch.dtype = torch.float32,
    chunk_tokens: int = 1024,
    group_tokens: int = EVAL_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Metrics:
    """Metrics over all of `samples`, in groups of similar length; each row's own are kept with them."""
    has_prompt = bool(samples[0].completion)
    longest_answer = answer_tokens(samples)
    losses, exact = dict.fromkeys(map(id, samples), 0.0), dict.fromkeys(map(id, samples), False)
    done = 0
    for group in by_length(samples, group_tokens):
        found = row_losses(model, parts, group, device, compute, chunk_tokens)
        losses |= zip(map(id, group), found, strict=True)
        if has_prompt:
            with autocast(device, compute):
                prompts = [sample.ids[: sample.prompt_tokens] for sample in group]
                answers = greedy(model, prompts, tokenizer.eos_ids, longest_answer, device)
            exact |= {id(s): is_exact(tokenizer, s, answer) for s, answer in zip(group, answers, strict=True)}
        done += len(group)
        progress(done, len(samples))
    tokens = [sample.trained_tokens for sample in samples]
    rows = [losses[id(sample)] for sample in samples]
    right = sum(exact[id(sample)] for sample in samples)
    made = metrics(len(samples), sum(rows) / max(1, sum(tokens)), right / len(samples) if has_prompt else None)
    bits = "".join("01"[exact[id(sample)]] for sample in samples) if has_prompt else ""
    kept = {"row_losses": tuple(round(loss, 6) for loss in rows), "row_tokens": tuple(tokens), "row_exact": bits}
    return made.model_copy(update=kept)


def metrics(rows: int, loss: float, exact_match: float | None) -> Metrics:
    """Metrics of a mean loss in nats per token; the perplexity is exp(loss), capped where a float ends."""
    return Metrics(rows=rows, loss=loss, perplexity=math.exp(min(loss, 700.0)), exact_match=exact_match)
